//! 8254 programmable interval timer, ports 0x40 to 0x43, and the system control port 0x61 that gates its channel 2.
//! "DS" is the Intel 82C54 data sheet.
//!
//! Counters are not counted: their value follows from guest time. Channel 0 drives IRQ 0, channel 1 refreshed memory once
//! and is not connected, channel 2 is the speaker's and calibrates time stamp counters.

use hv_core::{Clock, GuestNs, IrqLine, PortDevice, ResetDevice, StateError, TimedDevice};
use minicbor::{Decode, Encode};

use crate::ticks;

/// Input clock of the counters.
pub const PIT_HZ: u64 = 1_193_182;
/// The refresh bit of port 0x61 changes every 15.085 microseconds. ICH9 10.7.1 "NMI_SC".
const REFRESH_TOGGLE_NS: u64 = 15_085;

/// Saved state of one channel. Times are nanoseconds of guest time.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
#[allow(missing_docs)] // one register or flip-flop of the DS each
pub struct ChannelStateV1 {
    #[n(0)]
    pub mode: u8,
    #[n(1)]
    pub bcd: bool,
    #[n(2)]
    pub access: u8,
    /// Counts per period, 1 to 65536.
    #[n(3)]
    pub count: u32,
    /// A count for the next period of modes 2 and 3; 0: none.
    #[n(4)]
    pub next_count: u32,
    /// A count has been written and, where the mode needs one, a trigger has come.
    #[n(5)]
    pub running: bool,
    #[n(6)]
    pub start_ns: u64,
    /// Counts made before `start_ns`, while the gate was open earlier.
    #[n(7)]
    pub counted: u64,
    #[n(8)]
    pub gate: bool,
    /// First byte of a two-byte count; above 255: none.
    #[n(9)]
    pub low_written: u16,
    #[n(10)]
    pub read_high_next: bool,
    #[n(11)]
    pub latched: Option<u16>,
    #[n(12)]
    pub latched_status: Option<u8>,
    #[n(13)]
    pub armed: bool,
    /// Rising edges of the output up to this tick have been delivered.
    #[n(14)]
    pub delivered: u64,
}

/// Saved state of the chip.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct PitStateV1 {
    /// Channels 0 to 2.
    #[n(0)]
    pub channels: [ChannelStateV1; 3],
    /// Bits 3:0 of port 0x61.
    #[n(1)]
    pub control: u8,
}

const NO_BYTE: u16 = 0x100;

/// One counter. The runtime form is the saved form: every field is guest-visible and none holds a handle.
struct Channel(ChannelStateV1);

impl Channel {
    fn new(gate: bool) -> Channel {
        Channel(ChannelStateV1 { access: 3, count: 65536, gate, low_written: NO_BYTE, mode: 3, ..Default::default() })
    }

    fn periodic(&self) -> bool {
        matches!(self.0.mode, 2 | 3)
    }
    /// Modes that a rising gate starts rather than a written count. DS figure 15.
    fn triggered(&self) -> bool {
        matches!(self.0.mode, 1 | 5)
    }
    fn counting(&self) -> bool {
        self.0.running && (self.0.gate || self.triggered())
    }
    /// Counts made since the counter was loaded.
    fn elapsed(&self, now: GuestNs) -> u64 {
        let running = if self.counting() { ticks::from_ns(now.since(GuestNs(self.0.start_ns)), PIT_HZ) } else { 0 };
        self.0.counted.saturating_add(running)
    }
    /// When `elapsed` reaches `count`.
    fn at(&self, count: u64) -> GuestNs {
        GuestNs(self.0.start_ns).plus(ticks::to_ns(count.saturating_sub(self.0.counted), PIT_HZ).0)
    }
    fn restart(&mut self, now: GuestNs) {
        self.0.start_ns = now.0;
        self.0.counted = 0;
        self.0.delivered = 0;
        self.0.running = true;
    }
    /// Takes over a count that waits for the end of the period.
    fn settle(&mut self, now: GuestNs) {
        let n = u64::from(self.0.count);
        if self.0.next_count != 0 && self.periodic() && self.elapsed(now) >= n {
            let left_over = self.elapsed(now) - n;
            let begin = ticks::from_ns(self.0.start_ns, PIT_HZ) + n.saturating_sub(self.0.counted);
            let begin = ticks::to_ns(begin, PIT_HZ);
            self.0.count = std::mem::take(&mut self.0.next_count);
            self.0.delivered = 0;
            if self.counting() && begin <= now {
                self.0.start_ns = begin.0;
                self.0.counted = 0;
            } else {
                self.0.start_ns = now.0;
                self.0.counted = left_over;
            }
        }
    }

    fn output(&self, now: GuestNs) -> bool {
        let n = u64::from(self.0.count);
        let elapsed = self.elapsed(now);
        match self.0.mode {
            0 => self.0.running && elapsed >= n,
            1 => !self.0.running || elapsed >= n,
            _ if !self.0.running => true,
            2 => !self.0.gate || elapsed % n != n - 1,
            3 => !self.0.gate || elapsed % n < n.div_ceil(2),
            _ => elapsed != n,
        }
    }
    /// What a read of the counter shows.
    fn value(&self, now: GuestNs) -> u16 {
        let n = u64::from(self.0.count);
        let elapsed = self.elapsed(now);
        let left = match self.0.mode {
            2 => n - elapsed % n,
            // Mode 3 counts by two. DS "Mode 3: Square Wave Mode".
            3 => n - (2 * (elapsed % n)) % n,
            _ if self.0.bcd => (n + 10_000 - elapsed % 10_000) % 10_000,
            _ => n.wrapping_sub(elapsed) & 0xffff,
        };
        if self.0.bcd { to_bcd((left % 10_000) as u16) } else { left as u16 }
    }

    /// The tick of the first rising edge of the output after `after`.
    fn next_edge(&self, after: u64) -> Option<u64> {
        let n = u64::from(self.0.count);
        match self.0.mode {
            0 | 1 => (after < n).then_some(n),
            2 | 3 => Some((after / n + 1) * n),
            _ => (after <= n).then_some(n + 1),
        }
    }
    fn next_due(&self) -> Option<GuestNs> {
        let edge = self.counting().then(|| self.next_edge(self.0.delivered)).flatten()?;
        Some(self.at(edge))
    }
    /// Whether the output rose between the last call and `now`.
    fn take_edge(&mut self, now: GuestNs) -> bool {
        let rose = self.next_due().is_some_and(|due| due <= now);
        if rose {
            self.0.delivered = self.elapsed(now);
        }
        self.settle(now);
        rose
    }

    fn set_gate(&mut self, gate: bool, now: GuestNs) {
        self.settle(now);
        let rising = gate && !self.0.gate;
        if !self.triggered() && self.0.gate && !gate {
            self.0.counted = self.elapsed(now);
        }
        self.0.gate = gate;
        if rising {
            // Modes 1, 2, 3, 5 start over; 0 and 4 go on. DS figure 15.
            match self.0.mode {
                0 | 4 => self.0.start_ns = now.0,
                2 | 3 if self.0.running => self.restart(now),
                1 | 5 if self.0.armed => self.restart(now),
                _ => {}
            }
        }
    }

    fn write_control(&mut self, control: u8, now: GuestNs) {
        self.settle(now);
        let access = control >> 4 & 3;
        if access == 0 {
            self.0.latched.get_or_insert(self.value(now));
            return;
        }
        let mode = control >> 1 & 7;
        // Modes 6 and 7 are 2 and 3. DS figure 7.
        self.0.mode = if mode > 5 { mode - 4 } else { mode };
        self.0.bcd = control & 1 != 0;
        self.0.access = access;
        self.0.low_written = NO_BYTE;
        self.0.read_high_next = false;
        self.0.latched = None;
        self.0.latched_status = None;
        self.0.next_count = 0;
        self.0.running = false;
        self.0.armed = false;
        self.0.counted = 0;
    }

    fn read_back(&mut self, control: u8, now: GuestNs) {
        self.settle(now);
        if control & 0x20 == 0 {
            let value = self.value(now);
            self.0.latched.get_or_insert(value);
        }
        if control & 0x10 == 0 && self.0.latched_status.is_none() {
            let null = if self.0.armed { 0 } else { 0x40 };
            let out = u8::from(self.output(now)) << 7;
            self.0.latched_status = Some(out | null | self.0.access << 4 | self.0.mode << 1 | u8::from(self.0.bcd));
        }
    }

    fn write(&mut self, value: u8, now: GuestNs) {
        self.settle(now);
        let count = match self.0.access {
            1 => u16::from(value),
            2 => u16::from(value) << 8,
            _ if self.0.low_written == NO_BYTE => {
                self.0.low_written = value.into();
                if self.0.mode == 0 {
                    self.0.running = false; // the first byte stops mode 0. DS "Mode 0"
                }
                return;
            }
            _ => std::mem::replace(&mut self.0.low_written, NO_BYTE) | u16::from(value) << 8,
        };
        let count = match (count, self.0.bcd) {
            (0, false) => 65_536,
            (0, true) => 10_000,
            (count, false) => count.into(),
            (count, true) => from_bcd(count).max(1).into(),
        };
        self.0.armed = true;
        if self.periodic() && self.0.running {
            self.0.next_count = count;
            return;
        }
        self.0.count = count;
        if !self.triggered() {
            self.restart(now);
        }
    }

    fn read(&mut self, now: GuestNs) -> u8 {
        self.settle(now);
        if let Some(status) = self.0.latched_status.take() {
            return status;
        }
        let value = self.0.latched.unwrap_or_else(|| self.value(now));
        let high = self.0.access == 2 || self.0.access == 3 && self.0.read_high_next;
        if self.0.access == 3 {
            self.0.read_high_next = !self.0.read_high_next;
        }
        if !self.0.read_high_next {
            self.0.latched = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn restore(state: ChannelStateV1) -> Result<Channel, StateError> {
        let value = |field, got: u64| Err(StateError::Value { field, got });
        match &state {
            s if s.mode > 5 => value("pit.mode", s.mode.into()),
            s if !(1..=3).contains(&s.access) => value("pit.access", s.access.into()),
            s if !(1..=65_536).contains(&s.count) => value("pit.count", s.count.into()),
            s if s.next_count > 65_536 => value("pit.next_count", s.next_count.into()),
            s if s.low_written > NO_BYTE => value("pit.low_written", s.low_written.into()),
            _ => Ok(Channel(state)),
        }
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).map(|i| (value / 10u16.pow(i) % 10) << (4 * i)).sum()
}
fn from_bcd(bcd: u16) -> u16 {
    (0..4).fold(0u16, |sum, i| sum.saturating_add((bcd >> (4 * i) & 0xf) * 10u16.pow(i)))
}

/// The chip, and port 0x61.
pub struct Pit {
    channels: [Channel; 3],
    control: u8,
    clock: Clock,
    irq0: IrqLine,
}

impl Pit {
    /// The timer after reset: nothing counts.
    pub fn new(clock: Clock, irq0: IrqLine) -> Pit {
        Pit { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], control: 0, clock, irq0 }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> PitStateV1 {
        let Pit { channels, control, clock: _, irq0: _ } = self;
        PitStateV1 { channels: channels.each_ref().map(|c| c.0.clone()), control: *control }
    }

    /// Builds the chip from a saved state. `Value`: a mode, access or count that does not exist.
    pub fn restore(state: PitStateV1, clock: Clock, irq0: IrqLine) -> Result<Pit, StateError> {
        let PitStateV1 { channels: [a, b, c], control } = state;
        let channels = [Channel::restore(a)?, Channel::restore(b)?, Channel::restore(c)?];
        Ok(Pit { channels, control: control & 0xf, clock, irq0 })
    }

    fn notice(&mut self, now: GuestNs) {
        if self.channels[0].take_edge(now) {
            self.irq0.edge();
        }
    }

    fn read_control(&self, now: GuestNs) -> u8 {
        let refresh = (now.0 / REFRESH_TOGGLE_NS) as u8 & 1;
        let out2 = u8::from(self.channels[2].output(now));
        self.control | refresh << 4 | out2 << 5
    }
}

impl PortDevice for Pit {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        let now = self.clock.now();
        self.notice(now);
        let value = match port {
            0x61 => self.read_control(now),
            _ => match self.channels.get_mut(usize::from(port & 3)) {
                Some(channel) => channel.read(now),
                None => 0xff, // the control word is write-only
            },
        };
        value.into()
    }

    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        let (now, value) = (self.clock.now(), value as u8);
        self.notice(now);
        if port == 0x61 {
            self.control = value & 0xf;
            self.channels[2].set_gate(value & 1 != 0, now);
            return;
        }
        match (self.channels.get_mut(usize::from(port & 3)), value >> 6) {
            (Some(channel), _) => channel.write(value, now),
            (None, 3) => {
                for (i, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << i != 0 {
                        channel.read_back(value, now);
                    }
                }
            }
            (None, select) => {
                if let Some(channel) = self.channels.get_mut(usize::from(select)) {
                    channel.write_control(value, now);
                }
                // In mode 0 the output is low until the count is reached. DS "Mode 0"
                if select == 0 && value & 0x30 != 0 && value & 0xe == 0 {
                    self.irq0.lower();
                }
            }
        }
    }
}

impl TimedDevice for Pit {
    fn next_due(&self) -> Option<GuestNs> {
        self.channels[0].next_due()
    }
    fn on_due(&mut self, now: GuestNs) {
        self.notice(now);
    }
}

impl ResetDevice for Pit {
    fn reset(&mut self) {
        self.irq0.lower();
        *self = Pit::new(self.clock.clone(), self.irq0.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(Pit);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(Pit::new(bench.clock.clone(), bench.line(0)))
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            Subject(Pit::restore(state, bench.clock.clone(), bench.line(0)).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, _words: &mut Words<'_>, _bench: &Bench) -> bool {
            self.0.reset();
            word == "reset"
        }
    }

    // One tick is 838.095 ns; 1193 ticks are 999.848 us.

    #[test]
    fn mode_2_interrupts_every_period() {
        check::<Subject>(
            "out 43 = 34  out 40 = a9  out 40 = 4   # channel 0, mode 2, 1193 counts
             step 999847ns edges 0 is 0  step 1us edges 0 is 1  step 1ms edges 0 is 1  step 8ms edges 0 is 8
             reset step 10ms edges 0 is 0",
        );
    }

    #[test]
    fn a_new_count_in_mode_2_waits_for_the_end_of_the_period() {
        check::<Subject>(
            "out 43 = 34  out 40 = a9  out 40 = 4  step 500us  out 40 = 52  out 40 = 9  # 2386
             step 500us edges 0 is 1  step 1990us edges 0 is 0  step 10us edges 0 is 1",
        );
    }

    #[test]
    fn mode_0_interrupts_once_and_goes_on_counting() {
        check::<Subject>(
            "out 43 = 30  out 40 = a9  out 40 = 4  step 900us edges 0 is 0  step 100us edges 0 is 1
             irq 0 high  step 10ms edges 0 is 0
             out 43 = 00  in 40 is 64  in 40 is d1  # 1193 - 13125 mod 65536
             out 43 = 30  irq 0 low",
        );
    }

    #[test]
    fn the_latch_holds_a_count_until_both_bytes_are_read() {
        check::<Subject>(
            "out 43 = b4  out 61 = 1  out 42 = ff  out 42 = ff   # channel 2, mode 2
             step 838096ns  out 43 = 80  step 838096ns
             in 42 is 17  in 42 is fc                            # ffff - 1000
             out 43 = e8  in 42 is b4",
        );
    }

    #[test]
    fn read_back_latches_status_before_count() {
        check::<Subject>(
            "out 43 = b0  out 43 = e8  in 42 is 70                # mode 0 chosen, no count yet, output low
             out 61 = 1  out 42 = 2  out 42 = 0  out 43 = c8  in 42 is 30  in 42 is 2  in 42 is 0
             step 2us  out 43 = e8  in 42 is b0",
        );
    }

    #[test]
    fn channel_2_counts_while_its_gate_is_open() {
        check::<Subject>(
            "out 43 = b0  out 42 = 64  out 42 = 0                 # mode 0, 100 counts, gate closed
             step 10ms  in 61 is 0
             out 61 = 1  step 50us  out 61 = 0  step 1ms  in 61   # 59 counted, then stopped
             out 61 = 1  step 30us  out 43 = e8  in 42 is 30  step 10us  out 43 = e8  in 42 is b0",
        );
    }

    #[test]
    fn a_rising_gate_starts_mode_1_again() {
        check::<Subject>(
            "out 43 = b2  out 42 = 64  out 42 = 0  out 43 = e8 in 42 is b2
             out 61 = 1  out 43 = e8 in 42 is 32  step 80us  out 61 = 0  out 61 = 1  step 80us  out 43 = e8 in 42 is 32
             step 4us  out 43 = e8 in 42 is b2",
        );
    }

    #[test]
    fn mode_3_is_a_square_wave_that_counts_by_two() {
        check::<Subject>(
            "out 61 = 1  out 43 = b6  out 42 = 64  out 42 = 0  out 43 = e8 in 42 is b6
             step 9us  out 43 = 80 in 42 is 50 in 42 is 0      # 10 ticks
             step 33us  out 43 = e8 in 42 is 36  step 42us  out 43 = e8 in 42 is b6",
        );
    }

    #[test]
    fn port_61_shows_the_refresh_toggle_and_keeps_its_low_bits() {
        check::<Subject>("in 61 is 20  step 16us in 61 is 30  step 15us in 61 is 20  out 61 = ff  in 61 is 2f");
    }

    #[test]
    fn bcd_counts_ten_thousand_at_most() {
        check::<Subject>(
            "out 61 = 1  out 43 = b5  out 42 = 0  out 42 = 10  step 9us  out 43 = 80  in 42 is 90  in 42 is 9",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let pit = Pit::new(bench.clock.clone(), bench.line(0));
        golden::check("testdata/states/pit-v1.hex".as_ref(), &pit.save());
    }
}
