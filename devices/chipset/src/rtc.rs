//! MC146818A real-time clock and CMOS RAM: ports 0x70 (index) and 0x71 (data), IRQ 8.
//! "DS" is the Motorola MC146818A data sheet. The update-in-progress bit always reads clear: an update takes no time, so
//! whatever a guest reads is consistent. Not modelled: square wave, daylight saving.

use hv_core::{Clock, GuestNs, IrqLine, PortDevice, ResetDevice, StateError, TimedDevice};
use minicbor::{Decode, Encode};

use crate::{civil, ticks};

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
/// Index of the century byte, as the ACPI FADT announces it.
pub const CENTURY: usize = 0x32;

const B_SET: u8 = 0x80;
const B_24H: u8 = 0x02;
const B_BINARY: u8 = 0x04;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const IRQF: u8 = 0x80;

const NS_PER_S: u64 = 1_000_000_000;
const CRYSTAL_HZ: u64 = 32_768;

/// Saved state. Guest time 0 showed `base_s` seconds since 1970 minus the phase `base_at_ns`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct RtcStateV1 {
    /// Index register.
    #[n(0)]
    pub index: u8,
    /// All 128 bytes; time registers are current only while the clock is set or stopped.
    #[n(1)]
    pub cmos: Vec<u8>,
    /// Seconds since 1970 shown at `base_at_ns`.
    #[n(2)]
    pub base_s: i64,
    /// Guest time at which `base_s` began, in nanoseconds; may lie before 0.
    #[n(3)]
    pub base_at_ns: i64,
    /// Guest time up to which events have been noticed, in nanoseconds.
    #[n(4)]
    pub seen_ns: u64,
}

/// The chip.
pub struct Rtc {
    index: u8,
    cmos: [u8; 128],
    base_s: i64,
    base_at_ns: i64,
    seen: GuestNs,
    clock: Clock,
    irq8: IrqLine,
}

impl Rtc {
    /// A clock that shows `unix_s` now; CMOS RAM is zero.
    pub fn new(unix_s: i64, clock: Clock, irq8: IrqLine) -> Rtc {
        let now = clock.now();
        let mut cmos = [0; 128];
        cmos[REG_A] = 0x26;
        cmos[REG_B] = B_24H;
        cmos[REG_D] = 0x80; // VRT: the battery is good
        Rtc { index: 0, cmos, base_s: unix_s, base_at_ns: now.0 as i64, seen: now, clock, irq8 }
    }

    /// Presets bytes of CMOS RAM that firmware reads (memory size and such); time and control registers stay.
    pub fn preset(&mut self, index: u8, value: u8) {
        if !is_clock(usize::from(index))
            && let Some(byte) = self.cmos.get_mut(usize::from(index))
        {
            *byte = value;
        }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> RtcStateV1 {
        let Rtc { index, cmos, base_s, base_at_ns, seen, clock: _, irq8: _ } = self;
        RtcStateV1 { index: *index, cmos: cmos.to_vec(), base_s: *base_s, base_at_ns: *base_at_ns, seen_ns: seen.0 }
    }

    /// Builds the chip from a saved state. `Length`: not 128 bytes of CMOS.
    pub fn restore(state: RtcStateV1, clock: Clock, irq8: IrqLine) -> Result<Rtc, StateError> {
        let RtcStateV1 { index, cmos, base_s, base_at_ns, seen_ns } = state;
        let cmos = cmos.try_into().map_err(|got: Vec<u8>| StateError::Length {
            field: "rtc.cmos",
            want: 128,
            got: got.len(),
        })?;
        let rtc = Rtc { index: index & 0x7f, cmos, base_s, base_at_ns, seen: GuestNs(seen_ns), clock, irq8 };
        rtc.drive_irq(); // the level follows from register C, so it is not saved
        Ok(rtc)
    }

    fn divider_held(&self) -> bool {
        self.cmos[REG_A] & 0x60 == 0x60 // DV = 11x resets the divider chain. DS table 2
    }
    fn stopped(&self) -> bool {
        self.cmos[REG_B] & B_SET != 0 || self.divider_held()
    }
    /// Seconds since 1970 at `at`.
    fn unix_s(&self, at: GuestNs) -> i64 {
        let since = i128::from(at.0) - i128::from(self.base_at_ns);
        let seconds = since.div_euclid(i128::from(NS_PER_S));
        self.base_s.saturating_add(i64::try_from(seconds).unwrap_or(0))
    }
    /// Guest time at which the second `unix_s` begins.
    fn second_at(&self, unix_s: i64) -> GuestNs {
        let seconds = i128::from(unix_s) - i128::from(self.base_s);
        let ns = i128::from(self.base_at_ns) + seconds * i128::from(NS_PER_S);
        GuestNs(u64::try_from(ns.max(0)).unwrap_or(u64::MAX))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.cmos[REG_B] & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }
    fn decode(&self, byte: u8) -> u8 {
        if self.cmos[REG_B] & B_BINARY != 0 { byte } else { (byte >> 4).wrapping_mul(10).wrapping_add(byte & 0xf) }
    }
    fn encode_hour(&self, hour: u8) -> u8 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | afternoon
    }
    fn decode_hour(&self, byte: u8) -> u8 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.decode(byte);
        }
        let afternoon = if byte & 0x80 != 0 { 12 } else { 0 };
        self.decode(byte & 0x7f) % 12 + afternoon
    }

    /// Writes the time at `at` into the time registers.
    fn show_time(&mut self, at: GuestNs) {
        let t = civil::from_unix(self.unix_s(at));
        let century = (t.year / 100).clamp(0, 99) as u8;
        let year = t.year.rem_euclid(100) as u8;
        self.cmos[0] = self.encode(t.second);
        self.cmos[2] = self.encode(t.minute);
        self.cmos[4] = self.encode_hour(t.hour);
        self.cmos[6] = self.encode(t.weekday + 1); // Sunday is 1
        self.cmos[7] = self.encode(t.day);
        self.cmos[8] = self.encode(t.month);
        self.cmos[9] = self.encode(year);
        self.cmos[CENTURY] = ((century / 10) << 4) | (century % 10);
    }
    /// Takes the time registers as the time at `at`, which begins a second `phase_ns` before.
    fn take_time(&mut self, at: GuestNs, phase_ns: i64) {
        let century = i64::from(self.cmos[CENTURY] >> 4) * 10 + i64::from(self.cmos[CENTURY] & 0xf);
        let time = civil::Civil {
            year: century * 100 + i64::from(self.decode(self.cmos[9])),
            month: self.decode(self.cmos[8]).clamp(1, 12),
            day: self.decode(self.cmos[7]).clamp(1, 31),
            hour: self.decode_hour(self.cmos[4]),
            minute: self.decode(self.cmos[2]),
            second: self.decode(self.cmos[0]),
            weekday: 0,
        };
        self.base_s = civil::to_unix(&time);
        self.base_at_ns = (at.0 as i64).saturating_sub(phase_ns);
        self.seen = at;
    }

    /// Length of the periodic interrupt's period in crystal ticks. DS table 3.
    fn period_ticks(&self) -> Option<u64> {
        match self.cmos[REG_A] & 0xf {
            _ if self.divider_held() => None,
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }
    fn next_periodic(&self) -> Option<GuestNs> {
        let period = self.period_ticks()?;
        let passed = ticks::from_ns(self.seen.0, CRYSTAL_HZ) / period;
        Some(ticks::to_ns((passed + 1) * period, CRYSTAL_HZ))
    }
    fn next_update(&self) -> Option<GuestNs> {
        (!self.stopped()).then(|| self.second_at(self.unix_s(self.seen).saturating_add(1)))
    }
    fn next_alarm(&self) -> Option<GuestNs> {
        if self.stopped() {
            return None;
        }
        // Codes from 0xc0 on match anything. DS "Alarm bytes".
        let any = |byte: u8| byte & 0xc0 == 0xc0;
        let want = |byte: u8, value: u8| (!any(byte)).then_some(value);
        let (s, m, h) = (self.cmos[1], self.cmos[3], self.cmos[5]);
        let hour = want(h, self.decode_hour(h));
        let next = civil::next_match(self.unix_s(self.seen), hour, want(m, self.decode(m)), want(s, self.decode(s)))?;
        Some(self.second_at(next))
    }

    /// Latches what has happened up to `now` into register C.
    fn notice(&mut self, now: GuestNs) {
        let flag = |due: Option<GuestNs>, bit: u8| if due.is_some_and(|d| d <= now) { bit } else { 0 };
        let happened =
            flag(self.next_periodic(), PERIODIC) | flag(self.next_update(), UPDATE) | flag(self.next_alarm(), ALARM);
        self.cmos[REG_C] |= happened;
        self.seen = self.seen.max(now);
        self.drive_irq();
    }
    fn pending(&self) -> u8 {
        self.cmos[REG_C] & self.cmos[REG_B] & (PERIODIC | ALARM | UPDATE)
    }
    fn drive_irq(&self) {
        self.irq8.set(self.pending() != 0);
    }

    fn write_control(&mut self, index: usize, value: u8, now: GuestNs) {
        let (was_stopped, was_held) = (self.stopped(), self.divider_held());
        match index {
            REG_A => self.cmos[REG_A] = value & 0x7f, // UIP is read-only
            _ => {
                // Hours and format change meaning with register B: a running clock shows its time anew.
                self.cmos[REG_B] = value & !1; // daylight saving stays off
                // SET clears the update interrupt enable. DS "Register B".
                if value & B_SET != 0 {
                    self.cmos[REG_B] &= !UPDATE;
                }
            }
        }
        if !was_stopped && self.stopped() {
            self.show_time(now);
        } else if was_stopped && !self.stopped() {
            // After a divider reset the first update comes half a second later. DS "Divider control".
            self.take_time(now, if was_held { (NS_PER_S / 2) as i64 } else { 0 });
        }
    }
}

/// A register that shows the time or controls it.
fn is_clock(index: usize) -> bool {
    index <= REG_D || index == CENTURY
}
fn is_time(index: usize) -> bool {
    matches!(index, 0 | 2 | 4 | 6..=9 | CENTURY)
}

impl PortDevice for Rtc {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        if port & 1 == 0 {
            return 0xff; // the index register is write-only
        }
        let now = self.clock.now();
        self.notice(now);
        let index = usize::from(self.index & 0x7f);
        if is_time(index) && !self.stopped() {
            self.show_time(now);
        }
        let mut value = self.cmos[index];
        if index == REG_C {
            if self.pending() != 0 {
                value |= IRQF;
            }
            self.cmos[REG_C] = 0;
            self.drive_irq();
        }
        value.into()
    }

    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        let value = value as u8;
        if port & 1 == 0 {
            self.index = value & 0x7f; // bit 7 masks NMI, which this machine raises only on request
            return;
        }
        let now = self.clock.now();
        self.notice(now);
        match usize::from(self.index) {
            REG_C | REG_D => {}
            index @ (REG_A | REG_B) => self.write_control(index, value, now),
            index if is_time(index) && !self.stopped() => {
                let phase = (now.0 as i64).saturating_sub(self.base_at_ns).rem_euclid(NS_PER_S as i64);
                self.show_time(now);
                self.cmos[index] = value;
                self.take_time(now, phase);
            }
            index => self.cmos[index & 0x7f] = value,
        }
        self.drive_irq();
    }
}

impl TimedDevice for Rtc {
    fn next_due(&self) -> Option<GuestNs> {
        // A flag that is set already raises nothing new.
        let wanted = self.cmos[REG_B] & !self.cmos[REG_C];
        let due = |bit: u8, at: &dyn Fn() -> Option<GuestNs>| if wanted & bit != 0 { at() } else { None };
        let events = [
            due(PERIODIC, &|| self.next_periodic()),
            due(UPDATE, &|| self.next_update()),
            due(ALARM, &|| self.next_alarm()),
        ];
        events.into_iter().flatten().min()
    }
    fn on_due(&mut self, now: GuestNs) {
        self.notice(now);
    }
}

impl ResetDevice for Rtc {
    /// The battery keeps time and memory; a reset clears interrupt enables and flags. DS "RESET".
    fn reset(&mut self) {
        self.cmos[REG_B] &= !(PERIODIC | ALARM | UPDATE);
        self.cmos[REG_C] = 0;
        self.drive_irq();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check_with};

    struct Subject(Rtc);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(Rtc::new(0, bench.clock.clone(), bench.line(8)))
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            Subject(Rtc::restore(state, bench.clock.clone(), bench.line(8)).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(&mut self.0)
        }
        /// `cmos 0c is a0`, `cmos 0b = 22`: index and data in one.
        fn word(&mut self, word: &str, words: &mut Words<'_>, bench: &Bench) -> bool {
            if word == "reset" {
                self.0.reset();
                return true;
            }
            let index = words.hex() as u32;
            self.0.write(0x70, 1, index);
            // The index is part of the state: save between the two halves of an access.
            let state = golden::recode(&self.0.save());
            self.0 = Rtc::restore(state, bench.clock.clone(), bench.line(8)).unwrap();
            if words.accept("=") {
                let value = words.hex() as u32;
                self.0.write(0x71, 1, value);
            } else {
                let got = self.0.read(0x71, 1);
                words.check(&format!("cmos {index:02x}"), got.into());
            }
            word == "cmos"
        }
    }

    /// 2026-02-28, a Saturday, at `clock` UTC.
    fn check_rtc(clock: &str, script: &str) {
        let part = |i: usize| clock.split(':').nth(i).unwrap().parse::<i64>().unwrap();
        let unix_s = 1_772_236_800 + part(0) * 3600 + part(1) * 60 + part(2);
        check_with(|bench| Subject(Rtc::new(unix_s, bench.clock.clone(), bench.line(8))), script);
    }

    #[test]
    fn time_is_shown_in_bcd_and_binary() {
        check_rtc(
            "23:59:58",
            "cmos 00 is 58 cmos 02 is 59 cmos 04 is 23 cmos 06 is 7 cmos 07 is 28 cmos 08 is 2 cmos 09 is 26 cmos 32 is 20
             step 2s
             cmos 00 is 0 cmos 04 is 0 cmos 06 is 1 cmos 07 is 1 cmos 08 is 3
             cmos 0b = 06  cmos 09 is 1a  cmos 0a is 26  cmos 0d is 80",
        );
    }

    #[test]
    fn twelve_hour_mode() {
        for (utc, byte) in [("00:30:00", "12"), ("11:00:00", "11"), ("12:00:00", "92"), ("13:00:00", "81")] {
            check_rtc(utc, &format!("cmos 0b = 00  cmos 04 is {byte}"));
        }
    }

    #[test]
    fn setting_the_clock_stops_it_until_set_is_cleared() {
        check_rtc(
            "10:00:00",
            "cmos 0b = 82  step 10s  cmos 00 is 0  cmos 00 = 30  cmos 04 = 17  step 5s  cmos 00 is 30
             cmos 0b = 02  step 999ms cmos 00 is 30 step 1ms cmos 00 is 31  cmos 04 is 17  cmos 07 is 28",
        );
    }

    #[test]
    fn the_first_update_after_a_divider_reset_comes_after_half_a_second() {
        check_rtc(
            "10:00:00",
            "cmos 0a = 66  cmos 00 = 40  cmos 0a = 26  step 499ms cmos 00 is 40 step 1ms cmos 00 is 41",
        );
    }

    #[test]
    fn alarm_holds_irq8_high_until_register_c_is_read() {
        check_rtc(
            "11:59:58",
            "cmos 05 = 12   cmos 03 = 00   cmos 01 = 00   # alarm at 12:00:00, BCD
             cmos 0c  cmos 0b = 22                        # alarm interrupt on, 24 h
             step 1999ms    irq 8 low
             step 1ms       irq 8 high
             cmos 0c is f0  irq 8 low                     # IRQF, AF; periods and updates have passed, too
             step 60s       irq 8 low",
        );
    }

    #[test]
    fn an_alarm_with_wildcards_comes_every_minute() {
        check_rtc(
            "11:59:58",
            "cmos 05 = ff cmos 03 = ff cmos 01 = 30 cmos 0b = 22 step 31s irq 8 low step 1s irq 8 high cmos 0c
             irq 8 low step 59s irq 8 low step 1s irq 8 high",
        );
    }

    #[test]
    fn the_periodic_interrupt_has_the_rate_of_register_a() {
        check_rtc(
            "10:00:00",
            "cmos 0b = 42          # rate 6: 1024 Hz
             step 976us irq 8 low  step 1us irq 8 high  cmos 0c is c0  irq 8 low  edges 8 is 1
             step 977us irq 8 high step 50ms edges 8 is 1  # none follows until register C is read
             cmos 0c is c0  cmos 0b = 02  step 1ms  irq 8 low  cmos 0c is 40",
        );
    }

    #[test]
    fn the_update_interrupt_comes_each_second_and_reset_disables_it() {
        check_rtc(
            "10:00:00",
            "cmos 0b = 12 step 1s irq 8 high cmos 0c is d0 step 1s irq 8 high reset irq 8 low cmos 0b is 2",
        );
    }

    #[test]
    fn cmos_memory_is_kept_and_the_index_has_seven_bits() {
        check_rtc("10:00:00", "cmos 40 = 5a  cmos c0 is 5a  cmos 0d = 00  cmos 0d is 80  in 70 is ff");
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let rtc = Rtc::new(1_772_236_800, bench.clock.clone(), bench.line(8));
        golden::check("testdata/states/rtc-v1.hex".as_ref(), &rtc.save());
    }
}
