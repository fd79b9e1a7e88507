//! A descriptor that wakes a thread in `poll`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd. Setting it twice before it is cleared is setting it once.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// An event that is not set.
    pub fn new() -> io::Result<Event> {
        Ok(Event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }
    /// Wakes whoever polls it. Safe in a signal handler.
    pub fn set(&self) {
        // A counter that cannot take more is not zero.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
    /// Clears it.
    pub fn clear(&self) {
        clear(self.0.as_fd());
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Clears an eventfd or timerfd that does not block.
pub fn clear(fd: BorrowedFd<'_>) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}
