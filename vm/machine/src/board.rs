//! The board: every chip, wired, and the bus that leads a vCPU's accesses to them.

use std::sync::Arc;

use arc_swap::ArcSwap;
use chipset::debug::{DebugConsole, Diagnostic, PanicEvent};
use chipset::hpet::{Hpet, HpetLines, LegacyRoute};
use chipset::i8042::I8042;
use chipset::ioapic::IoApic;
use chipset::pic::Pic;
use chipset::pit::Pit;
use chipset::pm::Pm;
use chipset::reset::{RESET_CONTROL, ResetControl};
use chipset::rtc::Rtc;
use chipset::serial::{Serial, SerialSink};
use hv_core::{
    Clock, Doorbell, Gpa, GuestNs, IrqLine, LineTarget, Msi, MsiSink, ResetDevice, Space, TimedDevice, VcpuIo, Vm,
};
use parking_lot::Mutex;
use pci::host_bridge::{ECAM_WINDOW, HostBridge};
use pci::lpc::{Lpc, PM_WINDOW};
use pci::{Pirqs, Root, SharedFunction, Window};

use crate::counters::{Counters, Exits};
use crate::deadlines::{Alarm, Deadlines};
use crate::layout;
use crate::lines::{Intr, IoApicPins, IsaLines, Messages, PicPins, SharedLine};
use crate::map::{Map, MmioTarget, PortTarget};
use crate::power::PowerLatch;

/// Ports of the four serial ports, and their ISA interrupts. The IBM PC's.
pub const SERIAL_PORTS: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

const SLOT_PIT: usize = 0;
const SLOT_RTC: usize = 1;
const SLOT_PM: usize = 2;
const SLOT_HPET: usize = 3;
const SLOT_SERIAL: usize = 4;

/// What a board is built from.
pub(crate) struct BoardParts {
    pub(crate) clock: Clock,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) power: Arc<PowerLatch>,
    /// Seconds since 1970 that the RTC shows at the start.
    pub(crate) unix_s: i64,
    pub(crate) serial: [Option<Box<dyn SerialSink>>; 4],
    pub(crate) debug_console: Option<Box<dyn FnMut(u8) + Send>>,
}

/// The chips outside PCI.
struct Chips {
    pic: Arc<Mutex<Pic>>,
    ioapic: Arc<Mutex<IoApic>>,
    pit: Arc<Mutex<Pit>>,
    rtc: Arc<Mutex<Rtc>>,
    pm: Arc<Mutex<Pm>>,
    hpet: Arc<Mutex<Hpet>>,
    i8042: Arc<Mutex<I8042>>,
    reset: Arc<Mutex<ResetControl>>,
    diagnostic: Arc<Mutex<Diagnostic>>,
    panic_event: Arc<Mutex<PanicEvent>>,
    debug_console: Option<Arc<Mutex<DebugConsole>>>,
    serial: [Option<Arc<Mutex<Serial>>>; 4],
}

/// The board. vCPU threads call it through [`VcpuIo`]; the I/O thread runs deadlines and feeds serial ports.
pub struct Board {
    clock: Clock,
    vm: Arc<dyn Vm>,
    chips: Chips,
    root: Root,
    pirqs: Arc<Pirqs>,
    messages: Arc<Messages>,
    map: ArcSwap<Map>,
    /// Windows and doorbells that `map` was made of; its lock orders rebuilds.
    mapped: Mutex<Mapped>,
    deadlines: Deadlines,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Mapped {
    windows: Vec<Window>,
    doorbells: Vec<Doorbell>,
}

fn wire(parts: BoardParts, messages: &Arc<Messages>) -> (Chips, Arc<Pirqs>) {
    let BoardParts { clock, vm, power, unix_s, serial, debug_console } = parts;
    let shared = |chip| Arc::new(Mutex::new(chip));
    let pic = shared(Pic::new(IrqLine::new(Arc::new(Intr(vm)), 0)));
    let ioapic = Arc::new(Mutex::new(IoApic::new(messages.clone())));
    let isa: Arc<dyn LineTarget> = Arc::new(IsaLines { pic: pic.clone(), ioapic: ioapic.clone() });
    let line = |pin| IrqLine::new(isa.clone(), pin);
    let legacy = LegacyRoute::default();
    let gated = |pin| IrqLine::new(legacy.gate(isa.clone()), pin);
    let ioapic_pins: Arc<dyn LineTarget> = Arc::new(IoApicPins(ioapic.clone()));
    let pirqs = Arc::new(Pirqs::new(ioapic_pins.clone(), Arc::new(PicPins(pic.clone()))));
    let hpet_lines = HpetLines { irq0: line(0), irq8: line(8), pin2: IrqLine::new(ioapic_pins, 2) };
    let shared_line = |pin| -> Arc<dyn LineTarget> { Arc::new(SharedLine::new(isa.clone(), pin)) };
    let serial_lines = [(4, shared_line(4)), (3, shared_line(3))];
    let mut number = 0u8;
    let serial = serial.map(|sink| {
        let (_, irq) = SERIAL_PORTS[usize::from(number)];
        let target = serial_lines.iter().find(|(pin, _)| *pin == irq).map(|(_, target)| target.clone());
        let line = target.map_or_else(IrqLine::unconnected, |target| IrqLine::new(target, number));
        number += 1;
        sink.map(|sink| Arc::new(Mutex::new(Serial::new(clock.clone(), line, sink))))
    });
    let chips = Chips {
        pit: Arc::new(Mutex::new(Pit::new(clock.clone(), gated(0)))),
        rtc: Arc::new(Mutex::new(Rtc::new(unix_s, clock.clone(), gated(8)))),
        pm: Arc::new(Mutex::new(Pm::new(clock.clone(), line(9), power.clone()))),
        hpet: Arc::new(Mutex::new(Hpet::new(clock, hpet_lines, legacy))),
        i8042: Arc::new(Mutex::new(I8042::new(line(1), line(12), power.clone()))),
        reset: Arc::new(Mutex::new(ResetControl::new(power.clone()))),
        diagnostic: Arc::default(),
        panic_event: Arc::new(Mutex::new(PanicEvent::new(power))),
        debug_console: debug_console.map(|sink| Arc::new(Mutex::new(DebugConsole::new(sink)))),
        serial,
        pic,
        ioapic,
    };
    (chips, pirqs)
}

impl Board {
    /// A board with the chipset's own functions at 00:00.0 and 00:1f.0.
    pub(crate) fn new(parts: BoardParts) -> Board {
        let counters = Arc::<Counters>::default();
        let messages = Arc::new(Messages { vm: parts.vm.clone(), counters: counters.clone() });
        let (clock, vm) = (parts.clock.clone(), parts.vm.clone());
        let (chips, pirqs) = wire(parts, &messages);
        let mut root = Root::new();
        root.add(0, 0, Arc::new(Mutex::new(HostBridge::new())));
        root.add(31, 0, Arc::new(Mutex::new(Lpc::new(pirqs.clone()))));
        Board {
            clock,
            vm,
            chips,
            root,
            pirqs,
            messages,
            map: ArcSwap::from_pointee(Map::new()),
            mapped: Mutex::default(),
            deadlines: Deadlines::new(),
            counters,
        }
    }

    /// Adds a function at `device`. False: the place is taken.
    pub(crate) fn add_function(&mut self, device: u8, function: SharedFunction) -> bool {
        self.root.add(device, 0, function)
    }
    /// Interrupt pin INTA of `device`.
    pub(crate) fn interrupt_pin(&self, device: u8) -> IrqLine {
        IrqLine::new(self.pirqs.clone(), device * 4)
    }
    /// Where message interrupts go.
    pub(crate) fn messages(&self) -> Arc<dyn MsiSink> {
        self.messages.clone()
    }
    /// Bus 0.
    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// A serial port, for whoever moves its bytes.
    pub fn serial(&self, number: usize) -> Option<&Arc<Mutex<Serial>>> {
        self.chips.serial.get(number)?.as_ref()
    }
    /// Bytes from the host for serial port `number`, as many as it has room for; the rest is left. Returns how many.
    pub fn serial_receive(&self, number: usize, bytes: &[u8]) -> usize {
        let Some(port) = self.serial(number) else { return bytes.len() };
        let mut port = port.lock();
        let taken = bytes.len().min(port.room());
        port.receive(&bytes[..taken]);
        if taken < bytes.len() {
            // Asked when it is full, the port tells its sink when there is room again.
            port.room();
        }
        taken
    }
    /// Hands all collected output to the host's side.
    pub fn flush_serial(&self) {
        for (number, port) in self.chips.serial.iter().enumerate() {
            if let Some(port) = port {
                let mut port = port.lock();
                port.flush();
                self.deadlines.set(SLOT_SERIAL + number, port.next_due());
            }
        }
    }
    /// Someone pressed the power button.
    pub fn press_power_button(&self) {
        self.chips.pm.lock().press_power_button();
    }
    /// A non-maskable interrupt to every vCPU. SDM 3A 11.11
    pub fn inject_nmi(&self) {
        /// Physical destination 0xff: all.
        const TO_ALL: u64 = 0xfeef_f000;
        const MODE_NMI: u32 = 4 << 8;
        MsiSink::signal(&*self.messages, Msi { address: TO_ALL, data: MODE_NMI });
    }
    /// Presets CMOS memory for firmware.
    pub(crate) fn preset_cmos(&self, index: u8, value: u8) {
        self.chips.rtc.lock().preset(index, value);
    }

    /// How often the guest left its instructions so far.
    pub fn exits(&self) -> Exits {
        self.counters.now()
    }
    /// The clock of the machine.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Says whom to wake when the earliest deadline changes. With a virtual clock the engine asks instead.
    pub fn set_alarm(&self, alarm: Box<dyn Alarm>) {
        self.deadlines.set_alarm(alarm);
    }
    /// Sets the alarm again, after the clock stood still.
    pub fn rearm(&self) {
        self.deadlines.rearm();
    }

    /// Runs every deadline up to `now`; the next one, or [`GuestNs::NEVER`].
    pub fn run_deadlines(&self, now: GuestNs) -> GuestNs {
        if self.deadlines.earliest() <= now {
            for slot in self.deadlines.due(now) {
                self.counters.deadlines.up();
                match slot {
                    SLOT_PIT => self.run_slot(slot, &self.chips.pit, now),
                    SLOT_RTC => self.run_slot(slot, &self.chips.rtc, now),
                    SLOT_PM => self.run_slot(slot, &self.chips.pm, now),
                    SLOT_HPET => self.run_slot(slot, &self.chips.hpet, now),
                    _ => {
                        if let Some(port) = self.serial(slot - SLOT_SERIAL) {
                            self.run_slot(slot, port, now);
                        }
                    }
                }
            }
        }
        self.deadlines.earliest()
    }
    fn run_slot<D: TimedDevice>(&self, slot: usize, device: &Mutex<D>, now: GuestNs) {
        let mut device = device.lock();
        device.on_due(now);
        self.deadlines.set(slot, device.next_due());
    }

    /// Every chip and function back to its state after power-on. vCPUs stand and working halves have stopped.
    pub(crate) fn reset(&self) {
        let c = &self.chips;
        c.pit.lock().reset();
        c.hpet.lock().reset();
        c.rtc.lock().reset();
        c.pm.lock().reset();
        c.i8042.lock().reset();
        c.reset.lock().reset();
        c.serial.iter().flatten().for_each(|port| port.lock().reset());
        for (_, _, function) in self.root.functions() {
            function.lock().reset();
        }
        self.root.reset();
        // Last, so that lines that fell leave nothing behind.
        c.pic.lock().reset();
        c.ioapic.lock().reset();
        for slot in [SLOT_PIT, SLOT_RTC, SLOT_PM, SLOT_HPET] {
            self.deadlines.set(slot, None);
        }
        self.remap();
    }

    fn fixed_map(&self) -> Map {
        let c = &self.chips;
        let mut map = Map::new();
        map.add_ports(0x20, 2, PortTarget::Bytes(c.pic.clone()));
        map.add_ports(0xa0, 2, PortTarget::Bytes(c.pic.clone()));
        map.add_ports(0x4d0, 2, PortTarget::Bytes(c.pic.clone()));
        map.add_ports(0x40, 4, PortTarget::TimedBytes(c.pit.clone(), SLOT_PIT));
        map.add_ports(0x61, 1, PortTarget::TimedBytes(c.pit.clone(), SLOT_PIT));
        map.add_ports(0x60, 1, PortTarget::Bytes(c.i8042.clone()));
        map.add_ports(0x64, 1, PortTarget::Bytes(c.i8042.clone()));
        map.add_ports(0x70, 2, PortTarget::TimedBytes(c.rtc.clone(), SLOT_RTC));
        map.add_ports(0x80, 1, PortTarget::Bytes(c.diagnostic.clone()));
        map.add_ports(0x92, 1, PortTarget::Bytes(c.reset.clone()));
        map.add_ports(RESET_CONTROL, 1, PortTarget::Bytes(c.reset.clone()));
        map.add_ports(0xb2, 2, PortTarget::TimedBytes(c.pm.clone(), SLOT_PM));
        map.add_ports(0x505, 1, PortTarget::Bytes(c.panic_event.clone()));
        if let Some(console) = &c.debug_console {
            map.add_ports(0x402, 1, PortTarget::Bytes(console.clone()));
        }
        for (number, port) in c.serial.iter().enumerate() {
            if let (Some(port), Some(&(first, _))) = (port, SERIAL_PORTS.get(number)) {
                map.add_ports(first, 8, PortTarget::TimedBytes(port.clone(), SLOT_SERIAL + number));
            }
        }
        map.add_ports(0xcf8, 8, PortTarget::PciConfig);
        map.add_mmio(layout::IOAPIC, 0x1000, MmioTarget::Chip(c.ioapic.clone()));
        map.add_mmio(layout::HPET, 0x400, MmioTarget::Timed(c.hpet.clone(), SLOT_HPET));
        map
    }

    /// Replaces the map if a window has moved, and tells the engine about doorbells. No function is locked by the caller.
    pub(crate) fn remap(&self) {
        let mut mapped = self.mapped.lock();
        let (mut windows, mut doorbells, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (_, _, function) in self.root.functions() {
            let guard = function.lock();
            guard.windows(&mut windows);
            guard.doorbells(&mut doorbells);
            owners.resize_with(windows.len(), || function.clone());
        }
        if mapped.windows == windows && !windows.is_empty() {
            return;
        }
        let mut map = self.fixed_map();
        for (&window, owner) in windows.iter().zip(owners) {
            match (window.space, window.id) {
                (Space::Port, PM_WINDOW) => map.add_ports(
                    window.base as u16,
                    window.bytes as u16,
                    PortTarget::TimedWide(self.chips.pm.clone(), SLOT_PM),
                ),
                (Space::Port, _) => {
                    map.add_ports(window.base as u16, window.bytes as u16, PortTarget::Window(owner, window))
                }
                (Space::Memory, ECAM_WINDOW) => map.add_mmio(window.base, window.bytes, MmioTarget::Ecam),
                (Space::Memory, id) => map.add_mmio(window.base, window.bytes, MmioTarget::Window(owner, id)),
            }
        }
        map.set_doorbells(doorbells.clone());
        let gone = std::mem::replace(&mut mapped.doorbells, doorbells);
        gone.iter().for_each(|bell| self.vm.remove_doorbell(bell));
        self.map.store(Arc::new(map));
        mapped.windows = windows;
        for bell in &mapped.doorbells {
            // Refused doorbells still ring: the plain write path looks them up.
            let _ = self.vm.add_doorbell(bell);
        }
    }

    fn read_port(&self, map: &Map, port: u16, bytes: u8) -> u32 {
        match map.port(port) {
            None => u32::MAX,
            Some(PortTarget::TimedWide(chip, slot)) => {
                let mut chip = chip.lock();
                let value = chip.read(port, bytes);
                self.deadlines.set(*slot, chip.next_due());
                value
            }
            Some(PortTarget::PciConfig) => self.root.port_read(port, bytes),
            Some(PortTarget::Window(function, window)) => {
                let offset = u64::from(port).saturating_sub(window.base);
                function.lock().window_read(window.id, offset, bytes) as u32
            }
            Some(PortTarget::Bytes(_) | PortTarget::TimedBytes(..)) if bytes > 1 => (0..bytes).fold(0, |value, i| {
                let byte = self.read_port(map, port.wrapping_add(i.into()), 1) & 0xff;
                value | byte << (8 * i)
            }),
            Some(PortTarget::Bytes(chip)) => chip.lock().read(port, 1),
            Some(PortTarget::TimedBytes(chip, slot)) => {
                let mut chip = chip.lock();
                let value = chip.read(port, 1);
                self.deadlines.set(*slot, chip.next_due());
                value
            }
        }
    }

    /// True: windows have changed.
    fn write_port(&self, map: &Map, port: u16, bytes: u8, value: u32) -> bool {
        match map.port(port) {
            None => {}
            Some(PortTarget::TimedWide(chip, slot)) => {
                let mut chip = chip.lock();
                chip.write(port, bytes, value);
                self.deadlines.set(*slot, chip.next_due());
            }
            Some(PortTarget::PciConfig) => return self.root.port_write(port, bytes, value),
            Some(PortTarget::Window(function, window)) => {
                let offset = u64::from(port).saturating_sub(window.base);
                function.lock().window_write(window.id, offset, bytes, value.into());
                self.ring(map, Space::Port, port.into(), bytes, value.into());
            }
            Some(PortTarget::Bytes(_) | PortTarget::TimedBytes(..)) if bytes > 1 => {
                return (0..bytes).fold(false, |changed, i| {
                    changed | self.write_port(map, port.wrapping_add(i.into()), 1, value >> (8 * i) & 0xff)
                });
            }
            Some(PortTarget::Bytes(chip)) => chip.lock().write(port, 1, value),
            Some(PortTarget::TimedBytes(chip, slot)) => {
                let mut chip = chip.lock();
                chip.write(port, 1, value);
                self.deadlines.set(*slot, chip.next_due());
            }
        }
        false
    }

    fn ring(&self, map: &Map, space: Space, address: u64, bytes: u8, value: u64) {
        for bell in map.rung(space, address, bytes, value) {
            self.counters.doorbells.up();
            bell.target.ring();
        }
    }
}

impl VcpuIo for Board {
    fn port_read(&self, port: u16, bytes: u8) -> u32 {
        self.counters.port_reads.up();
        self.read_port(&self.map.load(), port, bytes)
    }

    fn port_write(&self, port: u16, bytes: u8, value: u32) {
        self.counters.port_writes.up();
        if self.write_port(&self.map.load(), port, bytes, value) {
            self.remap();
        }
    }

    fn mmio_read(&self, gpa: Gpa, bytes: u8) -> u64 {
        self.counters.mmio_reads.up();
        let map = self.map.load();
        let Some(range) = map.mmio(gpa) else { return u64::MAX };
        let offset = gpa.0 - range.start;
        match &range.target {
            MmioTarget::Chip(chip) => chip.lock().read(offset, bytes),
            MmioTarget::Timed(chip, slot) => {
                let mut chip = chip.lock();
                let value = chip.read(offset, bytes);
                self.deadlines.set(*slot, chip.next_due());
                value
            }
            MmioTarget::Ecam => self.root.ecam_read(offset, bytes),
            MmioTarget::Window(function, id) => function.lock().window_read(*id, offset, bytes),
        }
    }

    fn mmio_write(&self, gpa: Gpa, bytes: u8, value: u64) {
        self.counters.mmio_writes.up();
        let map = self.map.load();
        let Some(range) = map.mmio(gpa) else { return };
        let offset = gpa.0 - range.start;
        match &range.target {
            MmioTarget::Chip(chip) => chip.lock().write(offset, bytes, value),
            MmioTarget::Timed(chip, slot) => {
                let mut chip = chip.lock();
                chip.write(offset, bytes, value);
                self.deadlines.set(*slot, chip.next_due());
            }
            MmioTarget::Ecam => {
                if self.root.ecam_write(offset, bytes, value) {
                    self.remap();
                }
            }
            MmioTarget::Window(function, id) => {
                function.lock().window_write(*id, offset, bytes, value);
                self.ring(&map, Space::Memory, gpa.0, bytes, value);
            }
        }
    }

    fn pic_ack(&self) -> Option<u8> {
        let mut pic = self.chips.pic.lock();
        if !pic.pending() {
            return None;
        }
        self.counters.pic_acknowledges.up();
        Some(pic.acknowledge())
    }

    fn eoi(&self, vector: u8) {
        self.counters.ends_of_interrupt.up();
        self.chips.ioapic.lock().end_of_interrupt(vector);
    }

    fn run_due(&self, now: GuestNs) -> Option<GuestNs> {
        let next = if self.deadlines.earliest() > now { self.deadlines.earliest() } else { self.run_deadlines(now) };
        (next != GuestNs::NEVER).then_some(next)
    }
}
