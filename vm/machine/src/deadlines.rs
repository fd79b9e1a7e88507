//! The earliest deadline of all devices, kept up to date by the accesses that change one.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use hv_core::GuestNs;
use parking_lot::Mutex;

/// Devices that may have deadlines.
const SLOTS: usize = 16;

/// Wakes whoever runs deadlines. Called while a device is locked: it may set a timer and nothing else.
pub trait Alarm: Send + Sync {
    /// The earliest deadline is `due` now ([`GuestNs::NEVER`]: none).
    fn set(&self, due: GuestNs);
}

/// Deadlines by slot.
pub(crate) struct Deadlines {
    slots: [AtomicU64; SLOTS],
    earliest: AtomicU64,
    arming: Mutex<()>,
    alarm: OnceLock<Box<dyn Alarm>>,
}

impl Deadlines {
    pub(crate) fn new() -> Deadlines {
        Deadlines {
            slots: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            earliest: AtomicU64::new(u64::MAX),
            arming: Mutex::new(()),
            alarm: OnceLock::new(),
        }
    }

    /// Says whom to wake; once.
    pub(crate) fn set_alarm(&self, alarm: Box<dyn Alarm>) {
        let _ = self.alarm.set(alarm);
        self.rearm();
    }

    pub(crate) fn earliest(&self) -> GuestNs {
        GuestNs(self.earliest.load(Ordering::Acquire))
    }

    /// The deadline of `slot` is `due` now.
    #[inline]
    pub(crate) fn set(&self, slot: usize, due: Option<GuestNs>) {
        let due = due.unwrap_or(GuestNs::NEVER);
        let Some(place) = self.slots.get(slot) else { return };
        if place.swap(due.0, Ordering::AcqRel) != due.0 {
            self.refresh();
        }
    }

    fn refresh(&self) {
        let _guard = self.arming.lock();
        let min = self.slots.iter().map(|s| s.load(Ordering::Acquire)).min().unwrap_or(u64::MAX);
        let old = self.earliest.swap(min, Ordering::AcqRel);
        // An alarm that is too early is harmless: it finds nothing due and is set anew.
        if min < old {
            self.ring(GuestNs(min));
        }
    }

    /// Sets the alarm to the earliest deadline, whatever it was set to before.
    pub(crate) fn rearm(&self) {
        let _guard = self.arming.lock();
        self.ring(self.earliest());
    }

    fn ring(&self, due: GuestNs) {
        if let Some(alarm) = self.alarm.get() {
            alarm.set(due);
        }
    }

    /// Slots whose deadline is `now` or earlier.
    pub(crate) fn due(&self, now: GuestNs) -> impl Iterator<Item = usize> + '_ {
        (0..SLOTS).filter(move |&slot| self.slots.get(slot).is_some_and(|s| s.load(Ordering::Acquire) <= now.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Default, Clone)]
    struct Seen(Arc<Mutex<Vec<u64>>>);
    impl Alarm for Seen {
        fn set(&self, due: GuestNs) {
            self.0.lock().push(due.0);
        }
    }

    #[test]
    fn the_alarm_is_set_when_a_deadline_comes_nearer_and_not_when_it_goes() {
        let (deadlines, seen) = (Deadlines::new(), Seen::default());
        deadlines.set_alarm(Box::new(seen.clone()));
        deadlines.set(0, Some(GuestNs(50)));
        deadlines.set(1, Some(GuestNs(70)));
        deadlines.set(1, Some(GuestNs(30)));
        deadlines.set(1, None);
        assert_eq!(*seen.0.lock(), [u64::MAX, 50, 30]);
        assert_eq!(deadlines.earliest(), GuestNs(50));
        assert_eq!(deadlines.due(GuestNs(49)).count(), 0);
        assert_eq!(deadlines.due(GuestNs(50)).collect::<Vec<_>>(), [0]);
        deadlines.rearm();
        assert_eq!(seen.0.lock().last(), Some(&50));
    }
}
