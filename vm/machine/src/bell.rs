//! What a doorbell does: it wakes the I/O thread, or runs the working half at once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use hv_core::{Ring, Work};
use parking_lot::Mutex;

/// A working half as the machine holds it. Only its owner locks it, so the lock is never waited for.
pub type SharedWork = Arc<Mutex<dyn Work>>;

/// Where a working half runs.
pub struct Bell {
    /// Waking: rung for the I/O thread. Inline: written when what the working half waits for has changed.
    event: OwnedFd,
    inline: bool,
    work: OnceLock<Weak<Mutex<dyn Work>>>,
    rung: AtomicBool,
}

impl Bell {
    /// A bell that writes to `event`, an eventfd; its reader runs the working half.
    pub fn waking(event: OwnedFd) -> Bell {
        Bell { event, inline: false, work: OnceLock::new(), rung: AtomicBool::new(false) }
    }
    /// A bell that runs the working half on the thread that rings, and writes to `event`, an eventfd, where
    /// [`Work::interest`] is another one afterwards.
    pub fn inline(event: OwnedFd) -> Bell {
        Bell { event, inline: true, work: OnceLock::new(), rung: AtomicBool::new(false) }
    }
    /// Whether ringing runs the working half.
    pub fn is_inline(&self) -> bool {
        self.inline
    }
    /// The eventfd given to [`Bell::waking`] or [`Bell::inline`], for the I/O thread.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    /// Says which working half it is; once.
    pub fn connect(&self, work: &SharedWork) {
        let _ = self.work.set(Arc::downgrade(work));
    }

    /// Runs the working half until nothing is rung any more. If it runs already, its runner sees the flag.
    fn run(&self) {
        let Some(work) = self.work.get().and_then(Weak::upgrade) else { return };
        while self.rung.load(Ordering::Acquire) {
            let Some(mut work) = work.try_lock() else { return };
            let before = work.interest();
            while self.rung.swap(false, Ordering::AcqRel) {
                work.work();
            }
            if work.interest() != before {
                self.write_event();
            }
        }
    }
    fn write_event(&self) {
        // The counter of an eventfd that cannot take more is not zero: its reader wakes up all the same.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl Ring for Bell {
    fn ring(&self) {
        if self.inline {
            self.rung.store(true, Ordering::Release);
            self.run();
        } else {
            self.write_event();
        }
    }
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        (!self.inline).then(|| self.event())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use hv_core::Interest;
    use rustix::event::{EventfdFlags, eventfd};

    /// Rings its own bell until the count is 3; waits for input from then on.
    struct Counting(u32, Arc<Bell>);
    impl Work for Counting {
        fn work(&mut self) {
            self.0 += 1;
            if self.0 < 3 {
                self.1.ring(); // left-over work
            }
        }
        fn interest(&self) -> Interest {
            Interest { readable: self.0 >= 3, writable: false }
        }
    }

    #[test]
    fn an_inline_bell_runs_work_that_rings_again_and_tells_of_a_new_interest() {
        let bell = Arc::new(Bell::inline(eventfd(0, EventfdFlags::NONBLOCK).unwrap()));
        let counting = Arc::new(Mutex::new(Counting(0, bell.clone())));
        let work: SharedWork = counting.clone();
        bell.connect(&work);
        bell.ring();
        assert_eq!(counting.lock().0, 3);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(bell.event(), &mut count), Ok(8));
        bell.ring();
        assert_eq!(counting.lock().0, 4);
        assert!(rustix::io::read(bell.event(), &mut count).is_err());
    }
}
