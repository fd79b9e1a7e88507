//! The working half of a device: queues and back end, apart from the registers.

use std::os::fd::BorrowedFd;

/// What a device does beside answering register accesses: its queues and its back end.
///
/// A working half is owned by one thread at a time: the I/O thread, or, where everything has to be repeatable, the vCPU
/// thread that rings the doorbell. It never locks the register half; the two meet through messages and a doorbell.
pub trait Work: Send {
    /// Does everything that is pending: messages from the register half, rung queues, a back end that became ready.
    /// Bounded: what is left over rings the doorbell again.
    fn work(&mut self);
    /// The descriptor whose readiness is a reason to call [`Work::work`].
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Which readiness of [`Work::fd`] matters now; asked after every [`Work::work`].
    fn interest(&self) -> Interest {
        Interest::default()
    }
    /// A second descriptor, whose readability is always a reason to call [`Work::work`]: something that the device began
    /// is over.
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// The machine is about to stand: returns when nothing that the device began is under way.
    fn settle(&mut self) {}
    /// The machine goes on after a pause: what was held back because of an error may be tried again.
    fn resumed(&mut self) {}
    /// The back end is another than before: a disk has been resized. The machine stands.
    fn back_end_changed(&mut self) {}
}

/// Readiness that a [`Work`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interest {
    /// There is something to read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
}
