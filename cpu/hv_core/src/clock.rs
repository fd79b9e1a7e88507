//! Guest time: one clock per machine, lent to every device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Nanoseconds of guest time since the machine was created. Stands still while the machine is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestNs(pub u64);

impl GuestNs {
    /// Never reached.
    pub const NEVER: GuestNs = GuestNs(u64::MAX);

    /// `ns` later; stops at [`GuestNs::NEVER`].
    pub fn plus(self, ns: u64) -> GuestNs {
        GuestNs(self.0.saturating_add(ns))
    }
    /// Nanoseconds from `earlier` to here; 0 if `earlier` is later.
    pub fn since(self, earlier: GuestNs) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The machine's clock. Clones are the same clock.
///
/// A *host* clock follows the host's monotonic time. A *virtual* clock moves only when the software CPU moves it, by one
/// nanosecond per retired instruction: then a run is repeatable to the instruction.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Source>);

#[derive(Debug)]
enum Source {
    // While running, guest time is `origin.elapsed() - lost_ns`; while paused it is `lost_ns` itself, reinterpreted as
    // the frozen value, so that a reader needs the two atomics only.
    Host { origin: Instant, lost_ns: AtomicU64, frozen_ns: AtomicU64, frozen: AtomicBool },
    Virtual { now_ns: AtomicU64 },
}

impl Clock {
    /// A clock that follows the host from 0, running.
    pub fn host() -> Clock {
        Clock(Arc::new(Source::Host {
            origin: Instant::now(),
            lost_ns: AtomicU64::new(0),
            frozen_ns: AtomicU64::new(0),
            frozen: AtomicBool::new(false),
        }))
    }

    /// A clock that stands at 0 until [`Clock::advance_to`].
    pub fn virtual_clock() -> Clock {
        Clock(Arc::new(Source::Virtual { now_ns: AtomicU64::new(0) }))
    }

    /// Whether time is instructions retired.
    pub fn is_virtual(&self) -> bool {
        matches!(*self.0, Source::Virtual { .. })
    }

    /// The time now.
    #[inline]
    pub fn now(&self) -> GuestNs {
        match &*self.0 {
            Source::Host { origin, lost_ns, frozen_ns, frozen } => {
                if frozen.load(Ordering::Acquire) {
                    return GuestNs(frozen_ns.load(Ordering::Relaxed));
                }
                let host = origin.elapsed().as_nanos() as u64;
                GuestNs(host.saturating_sub(lost_ns.load(Ordering::Relaxed)))
            }
            Source::Virtual { now_ns } => GuestNs(now_ns.load(Ordering::Relaxed)),
        }
    }

    /// Moves a virtual clock forward; never back. Does nothing to a host clock.
    #[inline]
    pub fn advance_to(&self, now: GuestNs) {
        if let Source::Virtual { now_ns } = &*self.0 {
            now_ns.fetch_max(now.0, Ordering::Relaxed);
        }
    }

    /// Stops a host clock (the machine is paused). Called by the thread that owns the lifecycle, with vCPUs stopped.
    pub fn pause(&self) {
        if let Source::Host { frozen_ns, frozen, .. } = &*self.0
            && !frozen.load(Ordering::Relaxed)
        {
            frozen_ns.store(self.now().0, Ordering::Relaxed);
            frozen.store(true, Ordering::Release);
        }
    }

    /// Lets a paused host clock go on from where it stood. Same caller as [`Clock::pause`].
    pub fn resume(&self) {
        if let Source::Host { origin, lost_ns, frozen_ns, frozen } = &*self.0
            && frozen.load(Ordering::Relaxed)
        {
            let host = origin.elapsed().as_nanos() as u64;
            lost_ns.store(host.saturating_sub(frozen_ns.load(Ordering::Relaxed)), Ordering::Relaxed);
            frozen.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_clock_moves_only_forward_and_only_when_told() {
        let clock = Clock::virtual_clock();
        clock.advance_to(GuestNs(5));
        clock.advance_to(GuestNs(3));
        assert_eq!(clock.now(), GuestNs(5));
    }

    #[test]
    fn a_paused_host_clock_stands_and_goes_on_without_a_jump() {
        let clock = Clock::host();
        clock.pause();
        let stood = clock.now();
        let start = Instant::now();
        while start.elapsed().as_micros() < 300 {}
        assert_eq!(clock.now(), stood);
        clock.resume();
        assert!(clock.now().since(stood) < start.elapsed().as_nanos() as u64);
    }
}
