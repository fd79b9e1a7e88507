//! What a disk controller asks of the disk behind it.

use std::os::fd::BorrowedFd;

use guest_ram::vm_memory::VolatileSlice;
use guest_ram::{MarksSlice, Memory};

/// A piece of guest memory that takes part in a transfer.
pub type GuestBuffer<'a> = VolatileSlice<'a, MarksSlice<'a>>;

/// How a request that did not succeed ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// The machine is being paused; the controller keeps the request and tries it again after [`crate::Work::resumed`].
    Hold,
    /// The disk's limits forbid it now; the controller keeps the request and tries it again when
    /// [`DiskBackend::wait_fd`] is readable, or earlier.
    Wait,
    /// The guest sees an error.
    Report,
    /// The disk cannot do such a thing at all.
    Unsupported,
}

/// Which way a request moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// To the guest.
    Read,
    /// From the guest; zeroes count as data.
    Write,
}

/// What became of a transfer that a disk was asked to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is done.
    Done,
    /// The disk works on it: [`DiskBackend::next_over`] tells when it is over.
    UnderWay,
    /// The disk does not do such a transfer by itself: [`DiskBackend::read`] or [`DiskBackend::write`] does it.
    Refused,
}

/// A transfer that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over {
    /// The controller's name for it.
    pub tag: u64,
    /// It went well. Where not, any part may have been moved: it is done again with [`DiskBackend::read`] or
    /// [`DiskBackend::write`], which answer for it.
    pub good: bool,
}

/// A disk, in bytes. Implementations decide by their error policy whether a failure is held, reported or hidden.
/// Offsets and lengths come from a guest: a request that reaches past the end is answered with [`DiskFault::Report`].
pub trait DiskBackend: Send {
    /// Size in bytes. It changes only while the machine stands, and [`crate::Work::back_end_changed`] is called then.
    fn size_bytes(&self) -> u64;
    /// The guest may not write.
    fn read_only(&self) -> bool;
    /// A write that is done may be lost until the next flush. Where not, guests need no flushes.
    fn write_cache(&self) -> bool {
        true
    }
    /// Asks whether a request that moves `bytes` may begin now; it is then counted. Asked once for a whole request, before
    /// any part of it, and again after [`DiskFault::Wait`].
    fn admit(&mut self, _transfer: Transfer, _bytes: u64) -> Result<(), DiskFault> {
        Ok(())
    }
    /// Becomes readable when a request that had to wait may be tried again.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// The memory in which all buffers will lie. A disk that is not told works on nothing by itself. Called once, before
    /// any request.
    fn attach(&mut self, _memory: &Memory) {}
    /// Begins a transfer of a whole request that was admitted; `tag` names it. Several are under way at once and end in
    /// any order, as on a real disk.
    fn begin(&mut self, _transfer: Transfer, _offset: u64, _buffers: &[GuestBuffer<'_>], _tag: u64) -> Begun {
        Begun::Refused
    }
    /// What was begun starts now at the latest.
    fn submit(&mut self) {}
    /// The next transfer that is over.
    fn next_over(&mut self) -> Option<Over> {
        None
    }
    /// Submits, and waits until a transfer is over, if any is under way.
    fn wait(&mut self) {}
    /// Readable when a transfer is over.
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Fills `buffers` from `offset` on.
    fn read(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault>;
    /// Writes `buffers` from `offset` on.
    fn write(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault>;
    /// Returns once everything written before is on stable storage.
    fn flush(&mut self) -> Result<(), DiskFault>;
    /// The guest does not need these bytes any more.
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault>;
    /// These bytes read as zero from now on; `may_unmap` allows to give their space back.
    fn write_zeroes(&mut self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), DiskFault>;
}
