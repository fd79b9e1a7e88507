//! An io_uring whose requests move guest memory: the kernel works on it while the program goes on.
//!
//! A request borrows nothing. The ring owns a handle of the guest's memory, takes only buffers that lie in it, and does
//! not let go of it before the kernel is done.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice, bitmap::BitmapSlice};

use super::memory::{IOV_MAX, Pieces, aligned, total};
use crate::throttle::Direction;

/// Buffers that lie in the memory of a ring.
struct Buffers {
    pieces: Pieces,
    bytes: usize,
}

/// A request for a ring, before it is known which file serves it.
pub(crate) struct Prepared<'r, B: Bitmap + 'static, K> {
    ring: &'r mut GuestRing<B, K>,
    buffers: Buffers,
}

/// A request that the kernel has, or is about to get.
struct Slot<K> {
    buffers: Buffers,
    direction: Direction,
    keep: K,
}

/// A request that is over.
pub(crate) struct Over<K> {
    /// What was kept for it.
    pub(crate) keep: K,
    /// Every byte was moved. Where not, any part may have been.
    pub(crate) whole: bool,
}

/// The ring. It may go to another thread between calls.
pub(crate) struct GuestRing<B: Bitmap + 'static, K> {
    uring: IoUring,
    memory: GuestMemoryMmap<B>,
    /// Fixed places: the kernel reads the vectors of a request when it is handed over.
    slots: Box<[Option<Slot<K>>]>,
    free: Vec<u16>,
    calls: u64,
}

impl<B: Bitmap + 'static, K> GuestRing<B, K> {
    /// A ring for up to `requests` at once (1 to 4096) over `memory`. It can read and write files and nothing else, so
    /// that it is no way around a filter of system calls. Fails where the kernel has no io_uring or forbids it.
    pub(crate) fn new(requests: u16, memory: GuestMemoryMmap<B>) -> io::Result<GuestRing<B, K>> {
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled();
            if cooperative {
                builder.setup_coop_taskrun();
            }
            builder.build(requests.clamp(1, 4096).into())
        };
        // Older kernels refuse flags that they do not know.
        let uring = build(true).or_else(|_| build(false))?;
        let operations = [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE];
        uring.submitter().register_restrictions(&mut operations.map(Restriction::sqe_op))?;
        uring.submitter().register_enable_rings()?;
        let count = uring.params().sq_entries() as u16;
        Ok(GuestRing {
            uring,
            memory,
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            calls: 0,
        })
    }

    /// Requests that the kernel has, or is about to get.
    pub(crate) fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Begins a request with buffers in the memory; `None` if they are too many, or one is not all inside.
    pub(crate) fn prepare<S: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, S>]) -> Option<Prepared<'_, B, K>> {
        if slices.len() > IOV_MAX || !slices.iter().all(|slice| self.holds(slice.ptr_guard().as_ptr(), slice.len())) {
            return None;
        }
        let piece = |slice: &VolatileSlice<'_, S>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        let pieces: Pieces = slices.iter().map(piece).collect();
        let buffers = Buffers { bytes: total(&pieces), pieces };
        Some(Prepared { ring: self, buffers })
    }

    fn holds(&self, start: *const u8, len: usize) -> bool {
        let start = start as usize;
        self.memory.iter().any(|region| {
            let first = region.as_ptr() as usize;
            start >= first && start.checked_add(len).is_some_and(|end| end <= first + region.size())
        })
    }

    /// Tells the memory's bitmap what was written to it.
    fn mark(&self, buffers: &Buffers) {
        for piece in &buffers.pieces {
            let start = piece.iov_base as usize;
            for region in self.memory.iter() {
                let first = region.as_ptr() as usize;
                if (first..first + region.size()).contains(&start) {
                    region.bitmap().mark_dirty(start - first, piece.iov_len);
                }
            }
        }
    }

    /// Hands over what was pushed.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Waits until a request is over; returns at once when none is under way.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        while self.under_way() > 0 && self.uring.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    /// System calls made so far to hand over and to wait.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        self.calls += 1;
        match self.uring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            // The kernel has no memory at the moment, or was interrupted.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::EBUSY)) => {
                std::thread::yield_now();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next request that is over.
    pub(crate) fn next_over(&mut self) -> Option<Over<K>> {
        let answer = self.uring.completion().next()?;
        let index = u16::try_from(answer.user_data()).ok()?;
        let Slot { buffers, direction, keep } = self.slots.get_mut(usize::from(index))?.take()?;
        self.free.push(index);
        if direction == Direction::Read {
            self.mark(&buffers);
        }
        Some(Over { keep, whole: usize::try_from(answer.result()) == Ok(buffers.bytes) })
    }
}

fn entry<K>(slot: &Slot<K>, file: &File, offset: u64) -> squeue::Entry {
    let file = types::Fd(file.as_raw_fd());
    let pieces = &slot.buffers.pieces;
    let count = pieces.len() as u32;
    match (slot.direction, pieces.as_slice()) {
        (Direction::Read, [piece]) => {
            opcode::Read::new(file, piece.iov_base.cast(), piece.iov_len as u32).offset(offset).build()
        }
        (Direction::Write, [piece]) => {
            opcode::Write::new(file, piece.iov_base.cast(), piece.iov_len as u32).offset(offset).build()
        }
        (Direction::Read, _) => opcode::Readv::new(file, pieces.as_ptr(), count).offset(offset).build(),
        (Direction::Write, _) => opcode::Writev::new(file, pieces.as_ptr(), count).offset(offset).build(),
    }
}

impl<B: Bitmap + 'static, K> Prepared<'_, B, K> {
    /// Bytes that it moves.
    pub(crate) fn bytes(&self) -> usize {
        self.buffers.bytes
    }

    /// Whether every buffer starts and ends on a multiple of `align`.
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        aligned(&self.buffers.pieces, align)
    }

    /// Fills the buffers from a file if that takes no wait; `false`: not, or not all of them.
    pub(crate) fn read_now(&self, file: &File, offset: u64) -> bool {
        let Ok(offset) = i64::try_from(offset) else { return false };
        let Buffers { pieces, bytes } = &self.buffers;
        let count = pieces.len() as libc::c_int;
        // SAFETY: the pieces lie in the ring's memory, which is there as long as the ring is borrowed, `count` is their
        // number, and the descriptor is borrowed.
        let got = unsafe { libc::preadv2(file.as_raw_fd(), pieces.as_ptr(), count, offset, libc::RWF_NOWAIT) };
        if got > 0 {
            self.ring.mark(&self.buffers);
        }
        usize::try_from(got) == Ok(*bytes)
    }

    /// Puts it in line for [`GuestRing::submit`], which must come before the file is closed. Gives `keep` back if there
    /// is no room.
    pub(crate) fn push(self, direction: Direction, file: &File, offset: u64, keep: K) -> Result<(), K> {
        let Prepared { ring, buffers } = self;
        let Some(&index) = ring.free.last() else { return Err(keep) };
        let Some(place) = ring.slots.get_mut(usize::from(index)) else { return Err(keep) };
        let slot = place.insert(Slot { buffers, direction, keep });
        let entry = entry(slot, file, offset).user_data(index.into());
        // SAFETY: the buffers lie in the ring's memory and the vectors in a slot that stays where it is; both are kept
        // until the kernel has answered, also when the ring is dropped. A closed descriptor harms no memory.
        match unsafe { ring.uring.submission().push(&entry) } {
            Ok(()) => drop(ring.free.pop()),
            // There are as many places in the kernel's queue as slots: it has not taken what was submitted.
            Err(_) => return place.take().map_or(Ok(()), |slot| Err(slot.keep)),
        }
        Ok(())
    }
}

// SAFETY: the raw pointers of the pieces point into guest memory, which any thread may use and which the ring owns; the
// ring's own queues are used through `&mut self` alone.
unsafe impl<B: Bitmap + Send + Sync + 'static, K: Send> Send for GuestRing<B, K> {}

impl<B: Bitmap + 'static, K> AsFd for GuestRing<B, K> {
    /// Readable when a request is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's own, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }
}

impl<B: Bitmap + 'static, K> Drop for GuestRing<B, K> {
    fn drop(&mut self) {
        while self.under_way() > 0 {
            if self.wait().is_err() {
                // What the kernel may still write to must stay where it is.
                std::mem::forget(self.memory.clone());
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.next_over().is_some() {}
        }
    }
}
