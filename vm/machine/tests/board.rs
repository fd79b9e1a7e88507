//! The wiring of a board: who answers where, which interrupt arrives as what, what a reset leaves behind.

mod support;

use hv_core::{Clock, Gpa, GuestNs, Msi, PowerEvent, VcpuIo};
use machine::{BootSource, DeviceSpec, Entry, Machine, MachineConfig, MachineError};
use support::{Spy, kernel};

struct Zeroes;
impl virtio::RandomSource for Zeroes {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        buffer.fill(0);
        true
    }
}

fn config(ram_mib: u64, sources: usize) -> MachineConfig {
    MachineConfig {
        ram_bytes: ram_mib << 20,
        vcpus: 1,
        clock: Clock::virtual_clock(),
        unix_s: 1_767_225_600, // 2026-01-01 00:00:00
        serial: [Some(Box::new(chipset::serial::NoSink)), None, None, None],
        debug_console: None,
        devices: (0..sources).map(|_| DeviceSpec::VirtioRng { source: Box::new(Zeroes) }).collect(),
        boot: BootSource { kernel: kernel(), initrd: None, cmdline: "quiet".into(), entry: Entry::Fastest },
    }
}

fn machine(spy: &Spy) -> Machine {
    let (mut machine, _) = Machine::build(spy, config(32, 2)).unwrap();
    machine.reset().unwrap();
    machine
}

/// Level bit of a message, set in every interrupt that is not a de-assertion. SDM 3A 11.11.2
const ASSERT: u32 = 1 << 14;
const ECAM: u64 = 0xb000_0000;

/// Configuration space of `device` on bus 0, function 0.
fn config_read(machine: &Machine, device: u64, offset: u64, bytes: u8) -> u64 {
    machine.board().mmio_read(Gpa(ECAM + (device << 15) + offset), bytes)
}
fn config_write(machine: &Machine, device: u64, offset: u64, bytes: u8, value: u64) {
    machine.board().mmio_write(Gpa(ECAM + (device << 15) + offset), bytes, value);
}

#[test]
fn holes_read_all_ones_at_every_width() {
    let machine = machine(&Spy::default());
    let board = machine.board();
    for port in [0x0000, 0x2f8, 0x3b0, 0x510, 0xcd8, 0xb000, 0xffff] {
        assert_eq!((board.port_read(port, 1) as u8, board.port_read(port, 2) as u16), (0xff, 0xffff), "{port:#x}");
        assert_eq!(board.port_read(port, 4), u32::MAX, "{port:#x}");
    }
    for gpa in [0xa_0000, 0xafff_fff8, 0xfec0_1000, 0xffff_fff0, 1 << 40] {
        assert_eq!(board.mmio_read(Gpa(gpa), 8), u64::MAX, "{gpa:#x}");
        board.mmio_write(Gpa(gpa), 8, 0);
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let machine = machine(&Spy::default());
    let board = machine.board();
    let old_way = |device: u32, offset: u32| {
        board.port_write(0xcf8, 4, 1 << 31 | device << 11 | offset & 0xfc);
        board.port_read(0xcfc + (offset & 3) as u16, 2)
    };
    for (device, vendor, id) in [(0, 0x8086, 0x29c0), (1, 0x1af4, 0x1044), (3, 0xffff, 0xffff), (31, 0x8086, 0x2918)] {
        assert_eq!((old_way(device, 0) as u16, old_way(device, 2) as u16), (vendor, id), "device {device}");
        let express = config_read(&machine, device.into(), 0, 4);
        assert_eq!(express as u32, u32::from(id) << 16 | u32::from(vendor), "device {device}");
    }
    // q35 as firmware knows it: the subsystem of the host bridge.
    assert_eq!(config_read(&machine, 0, 0x2c, 4), 0x1100_1af4);
    board.port_write(0xcf8, 4, 0);
    assert_eq!(board.port_read(0xcfc, 4), u32::MAX, "the address register is off");
}

#[test]
fn a_bar_that_moves_takes_its_window_and_its_doorbells_along() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    let base = config_read(&machine, 1, 0x20, 4) & !0xf;
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2) as u16, 0xffff, "decoding is off");
    assert!(spy.vm().doorbells().is_empty());
    config_write(&machine, 1, 4, 2, 2);
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2), 1, "one queue");
    let bells = |base: u64| {
        let bells: Vec<u64> = spy.vm().doorbells().iter().map(|bell| bell.address.0 - base).collect();
        bells
    };
    assert_eq!(bells(base), [0x3000]);
    let moved = 0xd000_0000;
    config_write(&machine, 1, 0x20, 4, moved);
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2) as u16, 0xffff);
    assert_eq!(board.mmio_read(Gpa(moved + 0x12), 2), 1);
    assert_eq!(bells(moved), [0x3000]);
    let rung = board.exits().doorbells;
    board.mmio_write(Gpa(moved + 0x3000), 2, 0);
    assert_eq!(board.exits().doorbells, rung + 1, "the plain write path rings too");
    config_write(&machine, 1, 4, 2, 0);
    assert!(spy.vm().doorbells().is_empty());
    assert_eq!(board.mmio_read(Gpa(moved + 0x12), 2) as u16, 0xffff);
}

#[test]
fn isa_interrupts_reach_the_ioapic_and_the_8259() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    let redirect = |pin: u64, low: u64| {
        board.mmio_write(Gpa(0xfec0_0000), 4, 0x10 + 2 * pin);
        board.mmio_write(Gpa(0xfec0_0010), 4, low);
    };
    // The serial port: interrupt when the transmitter is empty, which it is.
    redirect(4, 0x34);
    board.port_write(0x3fc, 1, 8);
    board.port_write(0x3f9, 1, 2);
    assert_eq!(spy.vm().take_msis(), [Msi { address: 0xfee0_0000, data: ASSERT | 0x34 }]);
    assert_eq!(spy.vm().ioapic_route(4).map(|msi| msi.data & 0xff), Some(0x34));
    // The timer: IRQ 0 is pin 2 there, and pin 0 of the 8259.
    redirect(2, 0x30);
    for (port, value) in [(0x20, 0x11), (0x21, 0x08), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        board.port_write(port, 1, value);
    }
    for value in [0x34, 0xe8, 0x03] {
        board.port_write(if value == 0x34 { 0x43 } else { 0x40 }, 1, value);
    }
    let due = board.run_due(GuestNs(0)).expect("the timer is armed");
    assert!((GuestNs(800_000)..GuestNs(900_000)).contains(&due), "1000 ticks of 1.193182 MHz: {due:?}");
    board.clock().advance_to(due);
    board.run_due(due);
    assert_eq!(spy.vm().take_msis(), [Msi { address: 0xfee0_0000, data: ASSERT | 0x30 }]);
    assert!(spy.vm().extint());
    assert_eq!((board.pic_ack(), spy.vm().extint(), board.pic_ack()), (Some(8), false, None));
}

#[test]
fn power_events_arrive_from_every_register_that_makes_one() {
    for (port, bytes, value, event) in [
        (0x604, 2, 0x3c00, Some(PowerEvent::PowerOff)),
        (0x604, 2, 0x3400, None), // another sleep state
        (0xcf9, 1, 0x06, Some(PowerEvent::Reset)),
        (0xcf9, 1, 0x02, None),
        (0x92, 1, 0x01, Some(PowerEvent::Reset)),
        (0x64, 1, 0xfe, Some(PowerEvent::Reset)),
        (0x505, 1, 0x01, Some(PowerEvent::Panicked)),
    ] {
        let machine = machine(&Spy::default());
        machine.board().port_write(port, bytes, value);
        assert_eq!(machine.power().take(), event, "{port:#x} = {value:#x}");
    }
}

#[test]
fn a_reset_brings_everything_back() {
    let spy = Spy::default();
    let mut machine = machine(&spy);
    let board = machine.board().clone();
    let base = config_read(&machine, 1, 0x20, 4);
    config_write(&machine, 1, 4, 2, 2);
    config_write(&machine, 1, 0x20, 4, 0xd000_0000);
    board.port_write(0x43, 1, 0x34);
    board.port_write(0x40, 1, 1);
    board.port_write(0x40, 1, 1);
    board.port_write(0x3f9, 1, 2);
    machine.ram().write(Gpa(0x10_0000), &[0xcc]).unwrap();
    let states = machine.reset().unwrap();
    assert_eq!((states.len(), states[0].rip, states[0].cr0), (1, 0x10_0000, 0x11));
    assert_eq!((config_read(&machine, 1, 0x20, 4), config_read(&machine, 1, 4, 2)), (base, 0));
    assert_eq!(board.run_due(board.clock().now()), None, "no timer is armed");
    assert_eq!(board.port_read(0x3f9, 1) as u8, 0);
    let mut first = [0];
    machine.ram().read(Gpa(0x10_0000), &mut first).unwrap();
    assert_eq!(first, [0xf4], "the kernel is loaded anew");
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let build = |config| Machine::build(&Spy::default(), config).map(|_| ()).unwrap_err();
    assert!(matches!(build(config(31, 0)), MachineError::MemorySize { .. }));
    assert!(matches!(build(config(1 << 30, 0)), MachineError::MemoryBeyond { physical_bits: 46, .. }));
    assert!(matches!(build(config(32, 31)), MachineError::TooManyDevices { count: 31, slots: 30 }));
    assert!(matches!(build(MachineConfig { vcpus: 0, ..config(32, 0) }), MachineError::NoVcpu));
}

/// Bytes of guest memory.
fn memory<const N: usize>(machine: &Machine, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    machine.ram().read(Gpa(gpa), &mut bytes).unwrap();
    bytes
}

/// The FADT as an operating system finds it: RSDP, XSDT, signature. ACPI 5.2.5, 5.2.8
fn fadt(machine: &Machine) -> u64 {
    let rsdp = (0xe_0000..0x10_0000).step_by(16).find(|&at| &memory::<8>(machine, at) == b"RSD PTR ").expect("an RSDP");
    let xsdt = u64::from_le_bytes(memory(machine, rsdp + 24));
    let length = u64::from(u32::from_le_bytes(memory(machine, xsdt + 4)));
    let mut tables = (36..length).step_by(8).map(|at| u64::from_le_bytes(memory(machine, xsdt + at)));
    tables.find(|&table| &memory::<4>(machine, table) == b"FACP").expect("a FADT")
}

#[test]
fn registers_that_the_fadt_names_reset_and_power_off() {
    let machine = machine(&Spy::default());
    let fadt = fadt(&machine);
    let word = |at| u16::from_le_bytes(memory(&machine, fadt + at));
    // RESET_REG is a port, RESET_VALUE follows it, the flag says that they mean something. ACPI 5.2.9
    let flags = u32::from_le_bytes(memory(&machine, fadt + 112));
    assert_eq!((memory::<1>(&machine, fadt + 116), flags & 1 << 10), ([1], 1 << 10));
    machine.board().port_write(word(120), 1, memory::<1>(&machine, fadt + 128)[0].into());
    assert_eq!(machine.power().take(), Some(PowerEvent::Reset));
    // PM1a_CNT: sleep type from _S5, sleep enable. ACPI 4.8.3.2.1, 7.4.2
    let dsdt = u64::from_le_bytes(memory(&machine, fadt + 140));
    let length = u64::from(u32::from_le_bytes(memory(&machine, dsdt + 4)));
    let s5 = (dsdt..dsdt + length).find(|&at| &memory::<4>(&machine, at) == b"_S5_").expect("_S5");
    // Name, then: package, its length, four elements, a byte, its value. ACPI 20.2.5.4
    let [package, _, elements, prefix, sleep_type] = memory::<5>(&machine, s5 + 4);
    assert_eq!((package, elements, prefix), (0x12, 4, 0x0a));
    machine.board().port_write(word(64), 2, u32::from(sleep_type) << 10 | 1 << 13);
    assert_eq!(machine.power().take(), Some(PowerEvent::PowerOff));
}

#[test]
fn the_power_button_holds_sci_until_its_status_is_cleared() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    let vectors = || spy.vm().take_msis().iter().map(|msi| msi.data & 0xff).collect::<Vec<_>>();
    // Pin 9, level-triggered, vector 0x39.
    board.mmio_write(Gpa(0xfec0_0000), 4, 0x10 + 2 * 9);
    board.mmio_write(Gpa(0xfec0_0010), 4, 1 << 15 | 0x39);
    board.port_write(0x602, 2, 1 << 8);
    assert!(vectors().is_empty());
    board.press_power_button();
    assert_eq!((vectors(), board.port_read(0x600, 2) & 1 << 8), (vec![0x39], 1 << 8));
    board.eoi(0x39);
    assert_eq!(vectors(), [0x39], "the line is still high");
    board.port_write(0x600, 2, 1 << 8);
    board.eoi(0x39);
    assert!(vectors().is_empty());
}

#[test]
fn clocks_interrupt_on_their_lines() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    for (pin, vector) in [(2u64, 0x32), (8, 0x38)] {
        board.mmio_write(Gpa(0xfec0_0000), 4, 0x10 + 2 * pin);
        board.mmio_write(Gpa(0xfec0_0010), 4, vector);
    }
    let run_to = |due: GuestNs| {
        board.clock().advance_to(due);
        board.run_due(due);
        spy.vm().take_msis().iter().map(|msi| msi.data & 0xff).collect::<Vec<_>>()
    };
    let due = || board.run_due(board.clock().now()).expect("a deadline");
    // RTC: the update interrupt, at the next second, until register C is read.
    for (index, value) in [(0x0b, 0x12), (0x0c, 0)] {
        board.port_write(0x70, 1, index);
        board.port_write(0x71, 1, value);
    }
    assert_eq!(run_to(due()), [0x38]);
    board.port_write(0x70, 1, 0x0c);
    assert_eq!(board.port_read(0x71, 1) as u8 & 0x90, 0x90, "IRQF and UF");
    board.port_write(0x70, 1, 0x0b);
    board.port_write(0x71, 1, 0x02);
    // HPET: timer 0 takes the place of the PIT (legacy replacement), once, a millisecond from now. HPET 2.3.8
    board.mmio_write(Gpa(0xfed0_0100), 8, 1 << 2);
    let counter = board.mmio_read(Gpa(0xfed0_00f0), 8);
    board.mmio_write(Gpa(0xfed0_0108), 8, counter + 100_000);
    board.mmio_write(Gpa(0xfed0_0010), 8, 3);
    let start = board.clock().now();
    let fires = due();
    assert!((990_000..=1_010_000).contains(&fires.since(start)), "{fires:?}");
    assert_eq!(run_to(fires), [0x32]);
}

#[test]
fn an_nvme_controller_is_found_and_enabled_through_the_board() {
    struct Disk;
    impl hv_core::DiskBackend for Disk {
        fn size_bytes(&self) -> u64 {
            1 << 20
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read(&mut self, _: u64, _: &[hv_core::GuestBuffer<'_>]) -> Result<(), hv_core::DiskFault> {
            Ok(())
        }
        fn write(&mut self, _: u64, _: &[hv_core::GuestBuffer<'_>]) -> Result<(), hv_core::DiskFault> {
            Ok(())
        }
        fn flush(&mut self) -> Result<(), hv_core::DiskFault> {
            Ok(())
        }
        fn discard(&mut self, _: u64, _: u64) -> Result<(), hv_core::DiskFault> {
            Ok(())
        }
        fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> Result<(), hv_core::DiskFault> {
            Ok(())
        }
    }
    let spy = Spy::default();
    let nvme = DeviceSpec::Nvme { disk: Box::new(Disk), serial: "SN-1".into() };
    let (mut machine, _) = Machine::build(&spy, MachineConfig { devices: vec![nvme], ..config(32, 0) }).unwrap();
    machine.reset().unwrap();
    let board = machine.board();
    assert_eq!(config_read(&machine, 1, 8, 4) >> 8, 0x01_0802, "class: NVM Express");
    let base = config_read(&machine, 1, 0x10, 4) & !0xf;
    config_write(&machine, 1, 4, 2, 6);
    let register = |offset| board.mmio_read(Gpa(base + offset), 4) as u32;
    // AQA, ASQ, ACQ, CC.EN; then CSTS.RDY. NVME 7.6.1
    for (offset, bytes, value) in
        [(0x24, 4, 0x000f_000f), (0x28, 8, 0x10_0000), (0x30, 8, 0x11_0000), (0x14, 4, 0x46_0001)]
    {
        board.mmio_write(Gpa(base + offset), bytes, value);
    }
    assert_eq!(register(0x1c), 1);
    // Identify controller into 0x120000: opcode 6, command 7, CNS 1. NVME 5.15
    let mut command = [0u8; 64];
    command[0] = 6;
    command[2] = 7;
    command[24..32].copy_from_slice(&0x12_0000u64.to_le_bytes());
    command[40] = 1;
    machine.ram().write(Gpa(0x10_0000), &command).unwrap();
    board.mmio_write(Gpa(base + 0x1000), 4, 1);
    let completion = memory::<16>(&machine, 0x11_0000);
    assert_eq!(completion[8..16], [1, 0, 0, 0, 7, 0, 1, 0], "queue head, queue, command, phase and success");
    assert_eq!(&memory::<20>(&machine, 0x12_0004), b"SN-1                ");
}
