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
    eventfd: Option<OwnedFd>,
    work: OnceLock<Weak<Mutex<dyn Work>>>,
    rung: AtomicBool,
}

impl Bell {
    /// A bell that writes to `eventfd`.
    pub fn waking(eventfd: OwnedFd) -> Bell {
        Bell { eventfd: Some(eventfd), work: OnceLock::new(), rung: AtomicBool::new(false) }
    }
    /// A bell that runs the working half on the thread that rings.
    pub fn inline() -> Bell {
        Bell { eventfd: None, work: OnceLock::new(), rung: AtomicBool::new(false) }
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
            while self.rung.swap(false, Ordering::AcqRel) {
                work.work();
            }
        }
    }
}

impl Ring for Bell {
    fn ring(&self) {
        match &self.eventfd {
            // The counter of an eventfd that cannot take more is not zero: its reader wakes up all the same.
            Some(fd) => drop(rustix::io::write(fd, &1u64.to_ne_bytes())),
            None => {
                self.rung.store(true, Ordering::Release);
                self.run();
            }
        }
    }
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(u32, Arc<Bell>);
    impl Work for Counting {
        fn work(&mut self) {
            self.0 += 1;
            if self.0 < 3 {
                self.1.ring(); // left-over work
            }
        }
    }

    #[test]
    fn an_inline_bell_runs_work_that_rings_again() {
        let bell = Arc::new(Bell::inline());
        let counting = Arc::new(Mutex::new(Counting(0, bell.clone())));
        let work: SharedWork = counting.clone();
        bell.connect(&work);
        bell.ring();
        assert_eq!(counting.lock().0, 3);
        bell.ring();
        assert_eq!(counting.lock().0, 4);
    }
}
