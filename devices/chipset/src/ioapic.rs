//! I/O APIC with 24 pins, version 0x20, memory-mapped registers. "DS" is the Intel 82093AA data sheet; the end-of-interrupt
//! register is ICH9's (13.5.5). Inputs are in terms of "asserted": the polarity bit is kept and has no effect.

use std::sync::Arc;

use hv_core::{MmioDevice, Msi, ResetDevice, StateError};
use minicbor::{Decode, Encode};

/// Number of input pins.
pub const PINS: usize = 24;

const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are read-only; bits 55:17 are reserved.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where redirected interrupts go: the engine.
pub trait InterruptBus: Send + Sync {
    /// Delivers a message to local APICs.
    fn signal(&self, msi: Msi);
    /// The redirection of `pin` has changed; `None`: it is masked.
    fn set_route(&self, pin: u8, route: Option<Msi>);
}

/// Saved state.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct IoApicStateV1 {
    /// Register select.
    #[n(0)]
    pub select: u8,
    /// APIC id, bits 27:24 of register 0.
    #[n(1)]
    pub id: u32,
    /// Redirection table.
    #[n(2)]
    pub table: Vec<u64>,
    /// Asserted inputs, a bit per pin.
    #[n(3)]
    pub asserted: u32,
}

/// The chip.
pub struct IoApic {
    select: u8,
    id: u32,
    table: [u64; PINS],
    asserted: u32,
    bus: Arc<dyn InterruptBus>,
}

impl IoApic {
    /// The chip after reset: every pin masked.
    pub fn new(bus: Arc<dyn InterruptBus>) -> IoApic {
        IoApic { select: 0, id: 0, table: [MASKED; PINS], asserted: 0, bus }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> IoApicStateV1 {
        let IoApic { select, id, table, asserted, bus: _ } = self;
        IoApicStateV1 { select: *select, id: *id, table: table.to_vec(), asserted: *asserted }
    }

    /// Builds the chip from a saved state and tells the bus its routes. `Length`: not 24 entries.
    pub fn restore(state: IoApicStateV1, bus: Arc<dyn InterruptBus>) -> Result<IoApic, StateError> {
        let IoApicStateV1 { select, id, table, asserted } = state;
        let table: [u64; PINS] = table.try_into().map_err(|got: Vec<u64>| StateError::Length {
            field: "ioapic.table",
            want: PINS,
            got: got.len(),
        })?;
        let table = table.map(|entry| entry & (WRITABLE | REMOTE_IRR));
        let ioapic = IoApic { select, id: id & 0x0f00_0000, table, asserted, bus };
        ioapic.announce_routes();
        Ok(ioapic)
    }

    /// The level of input `pin`; pins from 24 on do not exist.
    pub fn set_level(&mut self, pin: u8, asserted: bool) {
        let bit = 1u32.checked_shl(pin.into()).unwrap_or(0);
        let rising = asserted && self.asserted & bit == 0;
        self.asserted = if asserted { self.asserted | bit } else { self.asserted & !bit };
        let Some(entry) = self.table.get(usize::from(pin)) else { return };
        if entry & LEVEL != 0 {
            self.deliver_level(pin);
        } else if rising && entry & MASKED == 0 {
            // An edge on a masked pin is neither delivered nor held pending. DS 3.2.4 "Interrupt Mask".
            self.bus.signal(message(*entry));
        }
    }

    /// A local APIC has ended level-triggered interrupt `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS as u8 {
            let Some(entry) = self.table.get_mut(usize::from(pin)) else { return };
            if *entry & LEVEL != 0 && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                self.deliver_level(pin);
            }
        }
    }

    fn deliver_level(&mut self, pin: u8) {
        let asserted = self.asserted & 1u32.checked_shl(pin.into()).unwrap_or(0) != 0;
        let Some(entry) = self.table.get_mut(usize::from(pin)) else { return };
        if asserted && *entry & (MASKED | REMOTE_IRR) == 0 {
            // Only interrupts that a local APIC ends set remote IRR: fixed and lowest priority.
            if *entry >> 8 & 7 <= 1 {
                *entry |= REMOTE_IRR;
            }
            self.bus.signal(message(*entry));
        }
    }

    fn announce(&self, pin: usize) {
        if let Some(&entry) = self.table.get(pin) {
            self.bus.set_route(pin as u8, (entry & MASKED == 0).then(|| message(entry)));
        }
    }
    fn announce_routes(&self) {
        (0..PINS).for_each(|pin| self.announce(pin));
    }

    fn read_register(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => (PINS as u32 - 1) << 16 | 0x20,
            select @ 0x10.. => {
                let entry = self.table.get(usize::from(select - 0x10) / 2).copied().unwrap_or(0);
                if select & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) {
        match self.select {
            0 => self.id = value & 0x0f00_0000,
            select @ 0x10.. => {
                let pin = usize::from(select - 0x10) / 2;
                let Some(entry) = self.table.get_mut(pin) else { return };
                let old = *entry;
                let new = if select & 1 == 0 {
                    old & 0xffff_ffff_0000_0000 | u64::from(value)
                } else {
                    old & 0xffff_ffff | u64::from(value) << 32
                };
                *entry = new & WRITABLE | old & REMOTE_IRR;
                // A pin that is made edge-triggered has no remote interrupt: Linux clears stuck ones in this way.
                if *entry & LEVEL == 0 {
                    *entry &= !REMOTE_IRR;
                }
                let level = *entry & LEVEL != 0;
                if *entry != old {
                    self.announce(pin);
                }
                if level {
                    self.deliver_level(pin as u8);
                }
            }
            _ => {}
        }
    }
}

/// The message of a redirection entry. SDM 3A 11.11 "Message Signalled Interrupts".
fn message(entry: u64) -> Msi {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let (vector, delivery, level) = (entry as u32 & 0xff, entry as u32 & 0x700, entry as u32 & LEVEL as u32);
    Msi { address: 0xfee0_0000 | destination << 12 | logical << 2, data: vector | delivery | 1 << 14 | level }
}

impl MmioDevice for IoApic {
    fn read(&mut self, offset: u64, _bytes: u8) -> u64 {
        match offset & 0xff {
            0x00 => self.select.into(),
            0x10 => self.read_register().into(),
            _ => 0,
        }
    }
    fn write(&mut self, offset: u64, _bytes: u8, value: u64) {
        match offset & 0xff {
            0x00 => self.select = value as u8,
            0x10 => self.write_register(value as u32),
            0x40 => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl ResetDevice for IoApic {
    fn reset(&mut self) {
        let asserted = self.asserted;
        *self = IoApic { asserted, ..IoApic::new(self.bus.clone()) };
        self.announce_routes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::MsiSink;
    use hv_null::golden;
    use hv_null::script::{Bench, Probe, UnderTest, Words, check};

    struct Bus(Arc<Probe>);
    impl InterruptBus for Bus {
        fn signal(&self, msi: Msi) {
            self.0.signal(msi);
        }
        /// Shown as the level of line `pin`.
        fn set_route(&self, pin: u8, route: Option<Msi>) {
            hv_core::LineTarget::set_level(&*self.0, pin, route.is_some());
        }
    }

    struct Subject(IoApic);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(IoApic::new(Arc::new(Bus(bench.probe.clone()))))
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            Subject(IoApic::restore(state, Arc::new(Bus(bench.probe.clone()))).unwrap())
        }
        fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "pin" => {
                    let pin = words.dec() as u8;
                    let high = words.word() == "high";
                    self.0.set_level(pin, high);
                }
                "eoi" => self.0.end_of_interrupt(words.hex() as u8),
                // `reg 14 = 41`, `reg 14 is 41`: select and window in one.
                "reg" => {
                    self.0.write(0, 4, words.hex());
                    if words.accept("=") {
                        self.0.write(0x10, 4, words.hex());
                    } else {
                        let got = self.0.read(0x10, 4);
                        words.check("register", got);
                    }
                }
                "reset" => self.0.reset(),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn registers_after_reset() {
        check::<Subject>(
            "reg 0 is 0  reg 1 is 170020  reg 10 is 10000  reg 3e is 10000  reg 3f is 0  reg 40 is 0
             reg 0 = ffffffff  reg 0 is f000000  write4 0 = 1  read4 0 is 1  read4 20 is 0
             reg 11 = ffffffff  reg 11 is ff000000  reg 10 = ffffffff  reg 10 is 1afff  reset  reg 10 is 10000  reg 11 is 0",
        );
    }

    #[test]
    fn an_edge_is_one_message() {
        check::<Subject>(
            "reg 19 = 3000000  reg 18 = 841   # pin 4: vector 41, logical, destination 3
             irq 4 high  pin 4 high  msi is fee03004 4041  msi none  pin 4 high msi none  pin 4 low pin 4 high  msi is fee03004 4041",
        );
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_lost() {
        check::<Subject>("reg 18 = 10041  irq 4 low  pin 4 high  msi none  reg 18 = 41  irq 4 high  msi none");
    }

    #[test]
    fn a_level_comes_again_after_its_end_while_it_holds() {
        check::<Subject>(
            "reg 30 = 8052  pin 16 high  msi is fee00000 c052  reg 30 is c052  pin 16 low pin 16 high  msi none
             eoi 51  msi none  eoi 52  msi is fee00000 c052  pin 16 low  eoi 52  msi none  reg 30 is 8052",
        );
    }

    #[test]
    fn a_level_that_waits_is_delivered_when_it_is_unmasked() {
        check::<Subject>("reg 30 = 18052  pin 16 high  msi none  reg 30 = 8052  msi is fee00000 c052");
    }

    #[test]
    fn the_eoi_register_ends_a_vector_and_edge_mode_clears_remote_irr() {
        check::<Subject>(
            "reg 30 = 8052  pin 16 high  msi is fee00000 c052  write4 40 = 52  msi is fee00000 c052
             reg 30 = 10052  reg 30 is 10052  reg 30 = 18052  reg 30 is 18052",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let ioapic = IoApic::new(Arc::new(Bus(bench.probe)));
        golden::check("testdata/states/ioapic-v1.hex".as_ref(), &ioapic.save());
    }
}
