//! Threads that share one piece of work.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Most threads of one piece of work.
const THREADS_MAX: usize = 16;
/// A step that takes longer has waited for a server that is far away or slow: more of them at once cost it nothing.
const SLOW: Duration = Duration::from_millis(10);
/// Memory of one thread's stack. Nothing recurses deeper than a backing chain, 200 images at most.
const STACK_BYTES: usize = 512 << 10;

/// Some threads from the start, and where a disk lies on a server, others for when that turns out to be slow.
pub(crate) struct Crew {
    at_first: usize,
    in_all: usize,
    joined: AtomicUsize,
    reserve: Mutex<Reserve>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reserve {
    Waits,
    Called,
    Dismissed,
}

impl Crew {
    /// `threads` are 1 to 16; `remote` keeps the rest of 16 in reserve.
    pub(crate) fn new(threads: usize, remote: bool) -> Crew {
        let at_first = threads.clamp(1, THREADS_MAX);
        Crew {
            at_first,
            in_all: if remote { THREADS_MAX } else { at_first },
            joined: AtomicUsize::new(0),
            reserve: Mutex::new(Reserve::Waits),
            changed: Condvar::new(),
        }
    }

    /// Runs `work` on every thread; it returns when nothing is left to do.
    pub(crate) fn run(&self, work: &(dyn Fn() + Sync)) {
        run_on_threads(self.in_all, &|| {
            if self.joined.fetch_add(1, Ordering::Relaxed) < self.at_first || self.is_called() {
                work();
                self.tell(Reserve::Dismissed);
            }
        });
    }

    /// Does a step of the work, and calls the reserve if there is one and it took long.
    pub(crate) fn step<R>(&self, step: impl FnOnce() -> R) -> R {
        if self.in_all == self.at_first {
            return step();
        }
        let began = Instant::now();
        let done = step();
        self.took(began.elapsed());
        done
    }

    fn took(&self, time: Duration) {
        if time >= SLOW {
            self.tell(Reserve::Called);
        }
    }

    fn tell(&self, what: Reserve) {
        let mut reserve = self.reserve.lock();
        // Who was called stays, and finds nothing to do by itself.
        if *reserve == Reserve::Waits {
            *reserve = what;
            self.changed.notify_all();
        }
    }

    fn is_called(&self) -> bool {
        let mut reserve = self.reserve.lock();
        while *reserve == Reserve::Waits {
            self.changed.wait(&mut reserve);
        }
        *reserve == Reserve::Called
    }
}

/// Runs `work` on this thread and `count - 1` others, fewer where the host gives no more.
pub fn run_on_threads(count: usize, work: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for _ in 1..count {
            // One thread less is slower and nothing else.
            let _ = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        }
        work();
    });
}

#[test]
fn the_reserve_works_only_where_steps_are_slow() {
    for (remote, time, want) in [(false, SLOW, 2), (true, SLOW / 2, 2), (true, SLOW, THREADS_MAX)] {
        let crew = Crew::new(2, remote);
        let at_work = Mutex::new(0);
        let all_here = Condvar::new();
        crew.run(&|| {
            let mut at_work = at_work.lock();
            *at_work += 1;
            all_here.notify_all();
            crew.took(time);
            while *at_work < want {
                all_here.wait(&mut at_work);
            }
        });
        assert_eq!(at_work.into_inner(), want, "{remote} {time:?}");
    }
}
