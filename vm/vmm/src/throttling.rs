//! Limits on disks: which disk has which, and the timer of one that has to wait.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use block::{Admission, Direction, Limit, Limits, Throttle, ThrottleError, ThrottleLimits};
use hv_core::{DiskFault, Transfer};
use monitor::{DiskThrottle, RateLimit, RateLimits};
use parking_lot::Mutex;
use rustix::event::Timespec;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, clock_gettime, timerfd_create,
    timerfd_settime,
};

/// Limits that several disks may share.
type SharedThrottle = Arc<Mutex<Throttle>>;

/// The groups of a machine, by name. A group is there as long as a disk is in it.
#[derive(Default)]
pub struct ThrottleGroups(Mutex<HashMap<String, Weak<Mutex<Throttle>>>>);

/// The limits of one disk.
pub struct DiskLimits {
    /// Nothing is asked while it is false.
    limited: AtomicBool,
    shared: Mutex<SharedThrottle>,
}

/// The present, as timers count it.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

fn limits(throttle: &DiskThrottle) -> Result<ThrottleLimits, ThrottleError> {
    let limit = |RateLimit { rate, burst_rate, burst_s }| Limit { rate, burst_rate, burst_s };
    let all =
        |RateLimits { total, read, write }| Limits { total: limit(total), read: limit(read), write: limit(write) };
    let limits = ThrottleLimits {
        bytes: all(throttle.bytes),
        requests: all(throttle.requests),
        request_bytes: throttle.request_bytes,
    };
    limits.check().map(|()| limits)
}

impl ThrottleGroups {
    /// What a disk with `throttle` shares: the limits of its group, which change, or limits of its own.
    fn join(&self, throttle: &DiskThrottle) -> Result<SharedThrottle, ThrottleError> {
        let limits = limits(throttle)?;
        let new = || Arc::new(Mutex::new(Throttle::new(limits, now_ns())));
        let Some(name) = &throttle.group else { return Ok(new()) };
        let mut groups = self.0.lock();
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(name).and_then(Weak::upgrade) {
            let mut shared = group.lock();
            // Disks that join with the same limits do not forget what was moved.
            if *shared.limits() != limits {
                shared.set_limits(limits, now_ns());
            }
            drop(shared);
            return Ok(group);
        }
        let group = new();
        groups.insert(name.clone(), Arc::downgrade(&group));
        Ok(group)
    }

    /// The limits of a new disk.
    pub fn limits(&self, throttle: &DiskThrottle) -> Result<DiskLimits, ThrottleError> {
        let shared = self.join(throttle)?;
        let limited = !shared.lock().limits().is_unlimited();
        Ok(DiskLimits { limited: limited.into(), shared: Mutex::new(shared) })
    }

    /// Gives a disk other limits, and with it the disks of its new group. Who waits is to be woken then. After an error
    /// nothing has changed.
    pub fn change(&self, disk: &DiskLimits, throttle: &DiskThrottle) -> Result<(), ThrottleError> {
        let shared = self.join(throttle)?;
        let limited = !shared.lock().limits().is_unlimited();
        *disk.shared.lock() = shared;
        disk.limited.store(limited, Ordering::Release);
        Ok(())
    }
}

/// What waits for limits: a disk's controller, or one queue of it.
pub struct Waiter {
    member: u64,
    timer: OwnedFd,
    /// What the timer is set to, while that is to come.
    due_ns: Option<u64>,
}

impl Waiter {
    /// A new one. Makes a descriptor.
    pub fn new() -> io::Result<Waiter> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Waiter { member: NEXT.fetch_add(1, Ordering::Relaxed), timer, due_ns: None })
    }

    /// Readable when it is time.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Asks whether a request may begin; [`DiskFault::Wait`] sets the timer.
    pub fn admit(&mut self, disk: &DiskLimits, transfer: Transfer, bytes: u64) -> Result<(), DiskFault> {
        if !disk.limited.load(Ordering::Acquire) {
            return Ok(());
        }
        let direction = match transfer {
            Transfer::Read => Direction::Read,
            Transfer::Write => Direction::Write,
        };
        let shared = disk.shared.lock().clone();
        let now_ns = now_ns();
        let admission = shared.lock().admit(self.member, direction, bytes, now_ns);
        match admission {
            Admission::Go => Ok(()),
            Admission::At(due_ns) => {
                // Several queues wait behind one timer: the earliest counts, and whoever comes too early asks again.
                let due_ns = self.due_ns.filter(|set| *set > now_ns).map_or(due_ns, |set| set.min(due_ns));
                if self.due_ns != Some(due_ns) {
                    self.set_timer(due_ns);
                }
                Err(DiskFault::Wait)
            }
        }
    }

    fn set_timer(&mut self, due_ns: u64) {
        self.due_ns = Some(due_ns);
        let at = Timespec { tv_sec: (due_ns / 1_000_000_000) as i64, tv_nsec: (due_ns % 1_000_000_000) as i64 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: at };
        // Setting a timer to a valid time does not fail. It is not readable any more until then.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn throttle(group: Option<&str>, rate: u64) -> DiskThrottle {
        let total = RateLimit { rate, ..RateLimit::default() };
        let bytes = RateLimits { total, ..RateLimits::default() };
        DiskThrottle { group: group.map(str::to_owned), bytes, ..DiskThrottle::default() }
    }

    #[test]
    fn disks_of_a_group_share_their_limits() {
        let groups = ThrottleGroups::default();
        let slow = throttle(Some("g"), 1);
        let (a, b) = (groups.limits(&slow).unwrap(), groups.limits(&slow).unwrap());
        let alone = groups.limits(&throttle(None, 1)).unwrap();
        let mut waiter = Waiter::new().unwrap();
        assert_eq!(waiter.admit(&a, Transfer::Write, 1000), Ok(()));
        assert_eq!(waiter.admit(&b, Transfer::Read, 1), Err(DiskFault::Wait));
        assert_eq!(waiter.admit(&alone, Transfer::Read, 1), Ok(()));
        // The limits of one are those of the other; one that leaves takes nothing along.
        groups.change(&a, &throttle(Some("g"), 1 << 40)).unwrap();
        assert_eq!(waiter.admit(&b, Transfer::Read, 1 << 20), Ok(()));
        groups.change(&a, &DiskThrottle::default()).unwrap();
        assert!((0..9).all(|_| waiter.admit(&a, Transfer::Write, 1 << 50) == Ok(())));
        assert_eq!(waiter.admit(&b, Transfer::Write, 1 << 50), Ok(()));
        assert_eq!(waiter.admit(&b, Transfer::Write, 1), Err(DiskFault::Wait));
        let wrong = DiskThrottle { request_bytes: 1, ..throttle(Some("g"), 1) };
        assert_eq!(groups.change(&b, &wrong), Err(ThrottleError::RequestBytesAlone));
    }

    #[test]
    fn the_timer_ends_the_wait() {
        let groups = ThrottleGroups::default();
        let disk = groups.limits(&throttle(None, 1_000_000)).unwrap();
        let mut waiter = Waiter::new().unwrap();
        assert_eq!(waiter.admit(&disk, Transfer::Write, 101_000), Ok(()));
        while waiter.admit(&disk, Transfer::Write, 101_000) == Err(DiskFault::Wait) {
            let mut fds = [PollFd::from_borrowed_fd(waiter.fd(), PollFlags::IN)];
            let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(poll(&mut fds, Some(&limit)), Ok(1));
        }
    }
}
