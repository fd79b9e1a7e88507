//! Requests that go on while the next commands run: those of `aio_read` and `aio_write`.
//!
//! One without a breakpoint in its way is over before the next command starts. What came of it is said by the next
//! command that waits for something, as in qemu-io.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use block::Disk;
use block::blkdebug::{Breakpoints, Stop};

use super::commands::Failure;
use super::requests::{Answer, Request};
use crate::error::host;
use crate::output::{self, say_line};

/// Most requests under way at once: each is a thread.
const REQUESTS_MAX: usize = 1024;

type Outcome = Result<Answer, Failure>;

/// Requests under way, and answers that nobody has seen.
pub struct Background {
    running: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
    sender: Sender<Outcome>,
    answers: Receiver<Outcome>,
}

/// Counts a request until it is over.
struct Running {
    all: Arc<AtomicUsize>,
    disk: Arc<Disk>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::AcqRel);
        self.disk.breakpoints().iter().for_each(|breakpoints| breakpoints.look_again());
    }
}

impl Default for Background {
    fn default() -> Background {
        let (sender, answers) = channel();
        Background { running: Arc::default(), threads: Vec::new(), sender, answers }
    }
}

/// Prints what happens to requests at the breakpoints of a disk, as blkdebug does.
pub fn announce(disk: &Disk) {
    let say = |stop, tag: &str| {
        let what = match stop {
            Stop::Suspended => "Suspended",
            Stop::Resuming => "Resuming",
        };
        // Nobody is there to read it: the request goes on all the same.
        say_line(format_args!("blkdebug: {what} request '{tag}'"));
    };
    if let Some(breakpoints) = disk.breakpoints() {
        breakpoints.watch(Box::new(say));
    }
}

impl Background {
    /// Starts a request. Returns when it is over, or when some request waits at a breakpoint.
    pub fn start(&mut self, disk: &Arc<Disk>, request: Request) -> Result<(), Failure> {
        self.threads.retain(|thread| !thread.is_finished());
        if self.threads.len() >= REQUESTS_MAX {
            return Err(Failure::Error(format!("{REQUESTS_MAX} requests are under way: resume some and aio_flush")));
        }
        self.running.fetch_add(1, Ordering::AcqRel);
        let running = Running { all: self.running.clone(), disk: disk.clone() };
        let sender = self.sender.clone();
        let work = move || {
            // Whoever stops listening has left: the answer is for nobody.
            let _ = sender.send(request.run(&running.disk));
        };
        let thread = Builder::new().name("request".to_owned()).spawn(work);
        let failed = |error| Failure::Error(format!("a request cannot start: {}", host(&error)));
        self.threads.push(thread.map_err(failed)?);
        self.settle(disk);
        Ok(())
    }

    /// Waits until no request is under way, or one waits at a breakpoint; says whether none is.
    pub fn settle(&mut self, disk: &Disk) -> bool {
        let idle = || self.running.load(Ordering::Acquire) == 0;
        match disk.breakpoints() {
            Some(breakpoints) => breakpoints.wait_until(|stopped| idle() || !stopped.is_empty()),
            None => self.join(),
        }
        self.running.load(Ordering::Acquire) == 0
    }

    /// Waits for all requests and says what came of them. Refuses while one waits at a breakpoint: nobody else would let
    /// it go on.
    pub fn finish(&mut self, disk: &Disk) -> Result<(), Failure> {
        let all = self.settle(disk);
        self.deliver()?;
        if all {
            return Ok(());
        }
        let mut tags = String::new();
        if let Some(breakpoints) = disk.breakpoints() {
            breakpoints.wait_until(|stopped| {
                tags = stopped.join("', '");
                true
            });
        }
        Err(Failure::Error(format!("a request is suspended at '{tags}': resume it first")))
    }

    /// Waits until a request stops at the breakpoint of a tag. Refuses when none is under way that could.
    pub fn wait_break(&self, breakpoints: &Breakpoints, tag: &str) -> Result<(), Failure> {
        let mut has_stopped = false;
        breakpoints.wait_until(|stopped| {
            has_stopped = stopped.contains(&tag);
            has_stopped || self.running.load(Ordering::Acquire) == 0
        });
        if has_stopped { Ok(()) } else { Err(Failure::Error(format!("no request is left that could stop at '{tag}'"))) }
    }

    /// Says what came of requests that are over. Their failures do not count.
    pub fn deliver(&mut self) -> Result<(), Failure> {
        for outcome in self.answers.try_iter() {
            if let Err(failure) = outcome.and_then(|answer| answer.print()) {
                failure.print();
            }
        }
        output::flush();
        Ok(())
    }

    /// Lets everything go on, and waits for it: no more commands follow.
    pub fn end(&mut self, disk: &Disk) -> Result<(), Failure> {
        if let Some(breakpoints) = disk.breakpoints() {
            breakpoints.clear();
        }
        self.join();
        self.deliver()
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A request that panicked has said so, and has no answer.
            let _ = thread.join();
        }
    }
}
