//! High precision event timer: 3 timers, 64-bit counter at 100 MHz, memory-mapped at 0xfed00000.
//! "DS" is the Intel IA-PC HPET specification 1.0a. Timer interrupts as messages (FSB) are not offered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hv_core::{Clock, GuestNs, IrqLine, LineTarget, MmioDevice, ResetDevice, StateError, TimedDevice};
use minicbor::{Decode, Encode};

/// Frequency of the main counter.
pub const HPET_HZ: u64 = 100_000_000;
const TICK_NS: u64 = 10;
/// Low half: revision 1, 3 timers, 64 bits, legacy routing, vendor 0x8086; high half: period in femtoseconds. DS 2.3.4
const CAPABILITIES: u64 = 10_000_000 << 32 | 0x8086_a201;

const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

const LEVEL: u64 = 1 << 1;
const INT_ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE_SHIFT: u32 = 9;
/// Periodic and 64-bit capable, may be routed to IOAPIC pin 2 only.
const TIMER_CAPS: u64 = (1 << 2) << 32 | 1 << 4 | 1 << 5;
const TIMER_WRITABLE: u64 = LEVEL | INT_ENABLE | PERIODIC | SET_VALUE | MODE_32 | 0x1f << ROUTE_SHIFT;

/// Whether the HPET has taken IRQ 0 and IRQ 8 from the PIT and the RTC. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct LegacyRoute(Arc<AtomicBool>);

impl LegacyRoute {
    /// The HPET drives IRQ 0 and IRQ 8.
    pub fn taken(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
    /// `target` as the PIT or RTC sees it: cut off while the HPET has taken their interrupts.
    pub fn gate(&self, target: Arc<dyn LineTarget>) -> Arc<dyn LineTarget> {
        Arc::new(Gate { route: self.clone(), target })
    }
}

struct Gate {
    route: LegacyRoute,
    target: Arc<dyn LineTarget>,
}
impl LineTarget for Gate {
    fn set_level(&self, pin: u8, high: bool) {
        if !self.route.taken() {
            self.target.set_level(pin, high);
        }
    }
}

/// Lines that the HPET may drive.
#[derive(Clone)]
pub struct HpetLines {
    /// ISA IRQ 0, taken by timer 0 with legacy routing.
    pub irq0: IrqLine,
    /// ISA IRQ 8, taken by timer 1 with legacy routing.
    pub irq8: IrqLine,
    /// IOAPIC pin 2, where every timer may be routed without legacy routing.
    pub pin2: IrqLine,
}

/// Saved state of one timer.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
pub struct TimerStateV1 {
    /// Writable configuration bits.
    #[n(0)]
    pub config: u64,
    /// Comparator.
    #[n(1)]
    pub comparator: u64,
    /// Value last written to the comparator: the period in periodic mode.
    #[n(2)]
    pub period: u64,
}

/// Saved state.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct HpetStateV1 {
    /// General configuration.
    #[n(0)]
    pub config: u64,
    /// General interrupt status.
    #[n(1)]
    pub status: u64,
    /// Main counter at `since_ns`.
    #[n(2)]
    pub counter: u64,
    /// Guest time at which the counter showed `counter`, in nanoseconds.
    #[n(3)]
    pub since_ns: u64,
    /// Counter value up to which comparators have been looked at.
    #[n(4)]
    pub seen: u64,
    /// The timers.
    #[n(5)]
    pub timers: [TimerStateV1; 3],
}

/// The chip.
pub struct Hpet {
    config: u64,
    status: u64,
    counter: u64,
    since: GuestNs,
    seen: u64,
    timers: [TimerStateV1; 3],
    clock: Clock,
    lines: HpetLines,
    legacy: LegacyRoute,
}

impl Hpet {
    /// The chip after reset.
    pub fn new(clock: Clock, lines: HpetLines, legacy: LegacyRoute) -> Hpet {
        legacy.0.store(false, Ordering::Relaxed);
        let timer = || TimerStateV1 { config: 0, comparator: u64::MAX, period: 0 };
        let timers = [timer(), timer(), timer()];
        Hpet { config: 0, status: 0, counter: 0, since: GuestNs(0), seen: 0, timers, clock, lines, legacy }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> HpetStateV1 {
        let Hpet { config, status, counter, since, seen, timers, clock: _, lines: _, legacy: _ } = self;
        HpetStateV1 {
            config: *config,
            status: *status,
            counter: *counter,
            since_ns: since.0,
            seen: *seen,
            timers: timers.clone(),
        }
    }

    /// Builds the chip from a saved state and drives its lines.
    pub fn restore(
        state: HpetStateV1,
        clock: Clock,
        lines: HpetLines,
        legacy: LegacyRoute,
    ) -> Result<Hpet, StateError> {
        let HpetStateV1 { config, status, counter, since_ns, seen, timers } = state;
        if since_ns > clock.now().0 {
            return Err(StateError::Value { field: "hpet.since_ns", got: since_ns });
        }
        let timers = timers.map(|t| TimerStateV1 { config: t.config & TIMER_WRITABLE, ..t });
        legacy.0.store(config & LEGACY != 0, Ordering::Relaxed);
        let hpet = Hpet {
            config: config & (ENABLE | LEGACY),
            status: status & 7,
            counter,
            since: GuestNs(since_ns),
            seen,
            timers,
            clock,
            lines,
            legacy,
        };
        (0..3).for_each(|i| hpet.drive_level(i));
        Ok(hpet)
    }

    fn now(&self) -> u64 {
        let running = if self.config & ENABLE != 0 { self.clock.now().since(self.since) / TICK_NS } else { 0 };
        self.counter.wrapping_add(running)
    }
    /// When the counter is `ticks` past `self.seen`.
    fn at(&self, ticks: u64) -> GuestNs {
        let from_base = self.seen.wrapping_sub(self.counter).saturating_add(ticks);
        self.since.plus(from_base.saturating_mul(TICK_NS))
    }
    fn width(&self, timer: usize) -> u64 {
        if self.timers[timer].config & MODE_32 != 0 { u64::from(u32::MAX) } else { u64::MAX }
    }
    /// Ticks from `self.seen` to the next match of `timer`; a match at `seen` itself has been handled.
    fn distance(&self, timer: usize) -> u64 {
        let mask = self.width(timer);
        let distance = self.timers[timer].comparator.wrapping_sub(self.seen) & mask;
        if distance == 0 { mask } else { distance }
    }
    fn line(&self, timer: usize) -> Option<&IrqLine> {
        match (self.config & LEGACY != 0, timer) {
            (true, 0) => Some(&self.lines.irq0),
            (true, 1) => Some(&self.lines.irq8),
            _ => (self.timers[timer].config >> ROUTE_SHIFT & 0x1f == 2).then_some(&self.lines.pin2),
        }
    }
    fn drive_level(&self, timer: usize) {
        let config = self.timers[timer].config;
        if config & LEVEL != 0
            && let Some(line) = self.line(timer)
        {
            line.set(config & INT_ENABLE != 0 && self.status & 1 << timer != 0);
        }
    }

    /// Handles the comparators that the counter has passed.
    fn notice(&mut self) {
        if self.config & ENABLE == 0 {
            return;
        }
        let now = self.now();
        let passed = now.wrapping_sub(self.seen);
        for i in 0..3 {
            let distance = self.distance(i);
            if distance > passed {
                continue;
            }
            let (mask, timer) = (self.width(i), &mut self.timers[i]);
            let period = timer.period & mask;
            if timer.config & PERIODIC != 0 && period != 0 {
                // The next multiple past the counter: periods that were missed are one interrupt.
                let periods = (passed - distance) / period + 1;
                timer.comparator = timer.comparator.wrapping_add(period.wrapping_mul(periods)) & mask;
            }
            let config = timer.config;
            if config & LEVEL != 0 {
                self.status |= 1 << i;
                self.drive_level(i);
            } else if config & INT_ENABLE != 0
                && let Some(line) = self.line(i)
            {
                line.edge();
            }
        }
        self.seen = now;
    }

    fn write_config(&mut self, value: u64) {
        let value = value & (ENABLE | LEGACY);
        if (value ^ self.config) & ENABLE != 0 {
            self.counter = self.now();
            self.since = self.clock.now();
            self.seen = self.counter;
        }
        self.config = value;
        self.legacy.0.store(value & LEGACY != 0, Ordering::Relaxed);
    }

    fn write_timer(&mut self, timer: usize, register: u64, last_part: bool, value: u64) {
        let mask = self.width(timer);
        let t = &mut self.timers[timer];
        match register {
            0 => {
                t.config = value & TIMER_WRITABLE;
                if t.config & MODE_32 != 0 {
                    t.comparator &= u64::from(u32::MAX);
                    t.period &= u64::from(u32::MAX);
                }
                self.drive_level(timer);
            }
            8 => {
                // In periodic mode a write sets the period, and the comparator too after SET_VALUE. DS 2.3.9.2
                if t.config & PERIODIC == 0 || t.config & SET_VALUE != 0 {
                    t.comparator = value & mask;
                }
                if t.config & PERIODIC != 0 {
                    t.period = value & mask;
                }
                // A 64-bit register is often written in two halves: the flag covers both.
                if last_part || mask != u64::MAX {
                    t.config &= !SET_VALUE;
                }
            }
            _ => {}
        }
    }

    fn register(&self, offset: u64) -> u64 {
        match offset {
            0x000 => CAPABILITIES,
            0x010 => self.config,
            0x020 => self.status,
            0x0f0 => self.now(),
            0x100..=0x15f => {
                let timer = &self.timers[(offset as usize - 0x100) / 0x20 % 3];
                match offset & 0x18 {
                    0 => timer.config & !SET_VALUE | TIMER_CAPS,
                    8 => timer.comparator,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// `last_part`: not the lower half of a register that is written in two.
    fn write_register(&mut self, offset: u64, last_part: bool, value: u64) {
        match offset {
            0x010 => self.write_config(value),
            0x020 => {
                // Writing 1 clears; the bits of edge-triggered timers always read 0. DS 2.3.6
                self.status &= !value;
                (0..3).for_each(|i| self.drive_level(i));
            }
            0x0f0 if self.config & ENABLE == 0 => {
                self.counter = value;
                self.seen = value;
            }
            0x100..=0x15f => {
                let timer = (offset as usize - 0x100) / 0x20 % 3;
                self.write_timer(timer, offset & 0x18, last_part, value);
            }
            _ => {}
        }
    }
}

impl MmioDevice for Hpet {
    fn read(&mut self, offset: u64, bytes: u8) -> u64 {
        self.notice();
        let value = self.register(offset & 0x3f8);
        value >> (8 * (offset & if bytes == 8 { 0 } else { 4 }))
    }
    fn write(&mut self, offset: u64, bytes: u8, value: u64) {
        self.notice();
        let aligned = offset & 0x3f8;
        // Configuration and comparator bits that a half write leaves alone keep their value.
        let old = match aligned {
            0x020 => 0,
            0x100..=0x15f if aligned & 0x18 == 0 => self.timers[(aligned as usize - 0x100) / 0x20 % 3].config,
            0x100..=0x15f if aligned & 0x18 == 8 => {
                let timer = &self.timers[(aligned as usize - 0x100) / 0x20 % 3];
                let sets = timer.config & (PERIODIC | SET_VALUE) != PERIODIC;
                if sets { timer.comparator } else { timer.period }
            }
            _ => self.register(aligned),
        };
        let value = match (bytes, offset & 4) {
            (8, _) => value,
            (_, 0) => old & !0xffff_ffff | value & 0xffff_ffff,
            _ => old & 0xffff_ffff | value << 32,
        };
        self.write_register(aligned, bytes == 8 || offset & 4 != 0, value);
    }
}

impl TimedDevice for Hpet {
    fn next_due(&self) -> Option<GuestNs> {
        if self.config & ENABLE == 0 {
            return None;
        }
        let ticks = (0..3)
            .filter(|&i| {
                let config = self.timers[i].config;
                config & INT_ENABLE != 0 && !(config & LEVEL != 0 && self.status & 1 << i != 0)
            })
            .map(|i| self.distance(i))
            .min()?;
        Some(self.at(ticks))
    }
    fn on_due(&mut self, _now: GuestNs) {
        self.notice();
    }
}

impl ResetDevice for Hpet {
    fn reset(&mut self) {
        self.status = 0;
        (0..3).for_each(|i| self.drive_level(i));
        *self = Hpet::new(self.clock.clone(), self.lines.clone(), self.legacy.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(Hpet, LegacyRoute);
    fn lines(bench: &Bench) -> HpetLines {
        HpetLines { irq0: bench.line(0), irq8: bench.line(8), pin2: bench.line(2) }
    }
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            let legacy = LegacyRoute::default();
            Subject(Hpet::new(bench.clock.clone(), lines(bench), legacy.clone()), legacy)
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            let hpet = Hpet::restore(state, bench.clock.clone(), lines(bench), self.1.clone()).unwrap();
            Subject(hpet, self.1)
        }
        fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
            Some(&mut self.0)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, _words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "taken" => assert!(self.1.taken()),
                "free" => assert!(!self.1.taken()),
                "reset" => self.0.reset(),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn registers_after_reset() {
        check::<Subject>(
            "read8 0 is 9896808086a201  read4 4 is 989680  read8 10 is 0  read8 f0 is 0
             read8 100 is 400000030  read8 120 is 400000030  read8 108 is ffffffffffffffff  read8 160 is 0",
        );
    }

    #[test]
    fn the_counter_runs_at_100_mhz_while_enabled() {
        check::<Subject>(
            "step 1us  read8 f0 is 0  write8 f0 = 64  write4 10 = 1  step 1us  read8 f0 is c8  read4 f0 is c8  read4 f4 is 0
             write8 f0 = 0  read8 f0 is c8  write4 10 = 0  step 1us  read8 f0 is c8",
        );
    }

    #[test]
    fn a_one_shot_fires_once() {
        check::<Subject>(
            "write4 100 = 404  write8 108 = 64  write4 10 = 1   # timer 0 to pin 2, edge, at tick 100
             step 999ns edges 2 is 0  step 1ns edges 2 is 1  step 1s edges 2 is 0
             read8 f0  write4 108 = 5f5e200  step 1s edges 2 is 1",
        );
    }

    #[test]
    fn legacy_routing_takes_irq_0_and_irq_8() {
        check::<Subject>(
            "write4 100 = 4  write4 120 = 4  write8 108 = 64  write8 128 = c8  free  write4 10 = 3  taken
             step 1us edges 0 is 1 edges 8 is 0  step 1us edges 0 is 0 edges 8 is 1 edges 2 is 0  reset free",
        );
    }

    #[test]
    fn a_periodic_timer_keeps_its_phase() {
        check::<Subject>(
            "write4 10 = 1  step 1us                                # counter 100
             write4 100 = 44c  write8 108 = 12c  write8 108 = c8    # first at 300, then every 200
             step 1999ns edges 2 is 0  step 1ns edges 2 is 1  step 2us edges 2 is 1  step 20us edges 2 is 10
             read8 108 is a8c",
        );
        check::<Subject>(
            "write4 10 = 1  write4 100 = 44c  write4 108 = 12c  write4 10c = 0  write4 108 = c8  write4 10c = 0
             step 3us edges 2 is 1  step 2us edges 2 is 1",
        );
    }

    #[test]
    fn the_comparator_may_be_written_in_halves() {
        check::<Subject>(
            "write4 108 = 11111111  write4 10c = 22222222  read8 108 is 2222222211111111  read4 10c is 22222222",
        );
    }

    #[test]
    fn thirty_two_bit_mode_wraps() {
        check::<Subject>(
            "write8 f0 = fffffff0  write4 100 = 504  write4 108 = 10  write4 10 = 1
             step 319ns edges 2 is 0  step 1ns edges 2 is 1",
        );
    }

    #[test]
    fn a_level_holds_until_its_status_bit_is_written() {
        check::<Subject>(
            "write4 100 = 406  write8 108 = 64  write4 10 = 1  step 2us  irq 2 high  read4 20 is 1
             write4 20 = 2 irq 2 high  write4 20 = 1  irq 2 low  read4 20 is 0",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let hpet = Hpet::new(bench.clock.clone(), lines(&bench), LegacyRoute::default());
        golden::check("testdata/states/hpet-v1.hex".as_ref(), &hpet.save());
    }
}
