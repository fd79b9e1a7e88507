//! ACPI power management block of the ICH9: status, enable and control registers, the power management timer, general
//! purpose events, and the SMI registers without SMM behind them. "DS" is the Intel ICH9 data sheet 13.8; "ACPI" is the
//! ACPI specification 6.5, 4.8.3.

use std::sync::Arc;

use hv_core::{Clock, GuestNs, IrqLine, Lifecycle, PortDevice, PowerEvent, ResetDevice, StateError, TimedDevice};
use minicbor::{Decode, Encode};

use crate::ticks;

/// Length of the block in ports.
pub const PM_PORTS: u16 = 128;
/// Frequency of the power management timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// Value of SLP_TYP that means S5. DS 13.8.3.3
pub const SLP_TYP_S5: u8 = 7;

const STS_TIMER: u16 = 1;
const STS_GLOBAL: u16 = 1 << 5;
const STS_POWER_BUTTON: u16 = 1 << 8;
const STS_RTC: u16 = 1 << 10;
const STS_ALL: u16 = STS_TIMER | STS_GLOBAL | STS_POWER_BUTTON | STS_RTC;
const CNT_SCI_EN: u16 = 1;
const CNT_SLP_EN: u16 = 1 << 13;
/// SLP_TYP and BM_RLD; SCI_EN stays set, for there is no SMM that could hand ACPI back to firmware.
const CNT_WRITABLE: u16 = 0x1c02;
/// APMC_EN: firmware that finds it set takes SMM for initialised and leaves it alone.
const SMI_EN: u32 = 0x20;
const TIMER_TOP: u64 = 1 << 31;

/// Saved state.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
#[allow(missing_docs)] // register names of the DS
pub struct PmStateV1 {
    #[n(0)]
    pub status: u16,
    #[n(1)]
    pub enable: u16,
    #[n(2)]
    pub control: u16,
    #[n(3)]
    pub gpe_status: u64,
    #[n(4)]
    pub gpe_enable: u64,
    /// Timer ticks up to which overflows have been noticed.
    #[n(5)]
    pub seen_ticks: u64,
    #[n(6)]
    pub apm_control: u8,
    #[n(7)]
    pub apm_status: u8,
}

/// The block, and the advanced power management ports 0xb2 and 0xb3.
pub struct Pm {
    state: PmStateV1,
    clock: Clock,
    sci: IrqLine,
    lifecycle: Arc<dyn Lifecycle>,
}

impl Pm {
    /// The block after reset.
    pub fn new(clock: Clock, sci: IrqLine, lifecycle: Arc<dyn Lifecycle>) -> Pm {
        let seen_ticks = ticks::from_ns(clock.now().0, PM_TIMER_HZ);
        Pm { state: PmStateV1 { control: CNT_SCI_EN, seen_ticks, ..Default::default() }, clock, sci, lifecycle }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> PmStateV1 {
        let Pm { state, clock: _, sci: _, lifecycle: _ } = self;
        state.clone()
    }

    /// Builds the block from a saved state. Bits that do not exist are dropped.
    pub fn restore(
        mut state: PmStateV1,
        clock: Clock,
        sci: IrqLine,
        lifecycle: Arc<dyn Lifecycle>,
    ) -> Result<Pm, StateError> {
        if state.seen_ticks > ticks::from_ns(clock.now().0, PM_TIMER_HZ) {
            return Err(StateError::Value { field: "pm.seen_ticks", got: state.seen_ticks });
        }
        state.status &= STS_ALL;
        state.enable &= STS_ALL;
        state.control = state.control & CNT_WRITABLE | CNT_SCI_EN;
        let pm = Pm { state, clock, sci, lifecycle };
        pm.drive_sci();
        Ok(pm)
    }

    /// Someone pressed the power button.
    pub fn press_power_button(&mut self) {
        self.state.status |= STS_POWER_BUTTON;
        self.drive_sci();
    }

    fn ticks(&self) -> u64 {
        ticks::from_ns(self.clock.now().0, PM_TIMER_HZ)
    }
    /// Sets the timer status when the top bit has changed. ACPI 4.8.3.1.1
    fn notice(&mut self) {
        let now = self.ticks();
        if now / TIMER_TOP != self.state.seen_ticks / TIMER_TOP {
            self.state.status |= STS_TIMER;
        }
        self.state.seen_ticks = now;
        self.drive_sci();
    }
    fn drive_sci(&self) {
        let fixed = self.state.status & self.state.enable != 0;
        let general = self.state.gpe_status & self.state.gpe_enable != 0;
        self.sci.set(fixed || general);
    }

    fn read_byte(&self, offset: u16) -> u8 {
        let byte = |value: u64, base: u16| (value >> (8 * (offset - base))) as u8;
        let s = &self.state;
        match offset {
            0x00..=0x01 => byte(s.status.into(), 0),
            0x02..=0x03 => byte(s.enable.into(), 2),
            0x04..=0x05 => byte(s.control.into(), 4),
            0x08..=0x0b => byte(self.ticks() & 0xffff_ffff, 8),
            0x20..=0x27 => byte(s.gpe_status, 0x20),
            0x28..=0x2f => byte(s.gpe_enable, 0x28),
            0x30..=0x33 => byte(SMI_EN.into(), 0x30),
            _ => 0,
        }
    }
    fn write_byte(&mut self, offset: u16, value: u8) {
        let s = &mut self.state;
        let place = |old: u64, base: u16| {
            let shift = 8 * (offset - base);
            old & !(0xff << shift) | u64::from(value) << shift
        };
        let clear = |base: u16| u64::from(value) << (8 * (offset - base));
        match offset {
            0x00..=0x01 => s.status &= !(clear(0) as u16),
            0x02..=0x03 => s.enable = place(s.enable.into(), 2) as u16 & STS_ALL,
            0x04..=0x05 => {
                let control = place(s.control.into(), 4) as u16;
                s.control = control & CNT_WRITABLE | CNT_SCI_EN;
                if control & CNT_SLP_EN != 0 && (control >> 10 & 7) as u8 == SLP_TYP_S5 {
                    self.lifecycle.request(PowerEvent::PowerOff);
                }
            }
            0x20..=0x27 => s.gpe_status &= !clear(0x20),
            0x28..=0x2f => s.gpe_enable = place(s.gpe_enable, 0x28),
            _ => {}
        }
    }
}

impl PortDevice for Pm {
    /// The block is aligned to its length, so the low bits of the port are the offset; 0xb2 and 0xb3 come with bit 7 set.
    fn read(&mut self, port: u16, bytes: u8) -> u32 {
        match port {
            0xb2 => return self.state.apm_control.into(),
            0xb3 => return self.state.apm_status.into(),
            _ => {}
        }
        self.notice();
        let offset = port & (PM_PORTS - 1);
        if bytes == 4 && offset == 8 {
            return self.ticks() as u32;
        }
        (0..u16::from(bytes.min(4))).fold(0, |value, i| value | u32::from(self.read_byte(offset + i)) << (8 * i))
    }
    fn write(&mut self, port: u16, bytes: u8, value: u32) {
        match port {
            0xb2 => return self.state.apm_control = value as u8,
            0xb3 => return self.state.apm_status = value as u8,
            _ => {}
        }
        self.notice();
        let offset = port & (PM_PORTS - 1);
        for i in 0..u16::from(bytes.min(4)) {
            self.write_byte(offset + i, (value >> (8 * i)) as u8);
        }
        self.drive_sci();
    }
}

impl TimedDevice for Pm {
    fn next_due(&self) -> Option<GuestNs> {
        let wanted = self.state.enable & !self.state.status & STS_TIMER != 0;
        wanted.then(|| ticks::to_ns((self.state.seen_ticks / TIMER_TOP + 1) * TIMER_TOP, PM_TIMER_HZ))
    }
    fn on_due(&mut self, _now: GuestNs) {
        self.notice();
    }
}

impl ResetDevice for Pm {
    fn reset(&mut self) {
        *self = Pm::new(self.clock.clone(), self.sci.clone(), self.lifecycle.clone());
        self.drive_sci();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(Pm);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(Pm::new(bench.clock.clone(), bench.line(9), bench.probe.clone()))
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            Subject(Pm::restore(state, bench.clock.clone(), bench.line(9), bench.probe.clone()).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, _words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "press" => self.0.press_power_button(),
                "reset" => self.0.reset(),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn registers_after_reset() {
        check::<Subject>(
            "inw 600 is 0 inw 602 is 0 inw 604 is 1 inl 608 is 0 inl 630 is 20 outl 630 = 0 inl 630 is 20 in 6ff is 0",
        );
    }

    #[test]
    fn the_power_button_raises_sci_until_its_status_is_written() {
        check::<Subject>(
            "press  irq 9 low  inw 600 is 100  outw 602 = 100  irq 9 high  outw 600 = 1  irq 9 high
             outw 600 = 100  irq 9 low  inw 600 is 0  inw 602 is 100  press irq 9 high  reset irq 9 low  inw 602 is 0",
        );
    }

    #[test]
    fn sleep_type_7_with_sleep_enable_powers_off() {
        check::<Subject>(
            "outw 604 = 1c00  power none  inw 604 is 1c01  outw 604 = 2000  power none  outw 604 = 3c00  power is off",
        );
    }

    #[test]
    fn the_control_register_may_be_written_in_bytes() {
        check::<Subject>("out 605 = 3c  power is off  in 604 is 1  in 605 is 1c");
    }

    #[test]
    fn the_timer_has_32_bits_at_3_58_mhz() {
        check::<Subject>("step 1s inl 608 is 369e99  in 60a is 36  inw 608 is 9e99  step 1200s  inl 608 is 3e0bc9");
    }

    #[test]
    fn a_change_of_the_timers_top_bit_is_an_event() {
        // 2^31 ticks are 599.93 s.
        check::<Subject>(
            "outw 602 = 1  step 599s irq 9 low  step 1s irq 9 high  inw 600 is 1  outw 600 = 1 irq 9 low
             step 599s irq 9 low step 1s irq 9 high",
        );
    }

    #[test]
    fn general_purpose_registers_and_apm_ports_hold_what_is_written() {
        check::<Subject>(
            "outl 628 = 12345678  inl 628 is 12345678  in 629 is 56  out b2 = 5  in b2 is 5  out b3 = 6  in b3 is 6 in b2 is 5",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let pm = Pm::new(bench.clock.clone(), bench.line(9), bench.probe.clone());
        golden::check("testdata/states/pm-v1.hex".as_ref(), &pm.save());
    }
}
