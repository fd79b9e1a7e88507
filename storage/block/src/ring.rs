//! Requests that go on while their thread does other things: what lies in a file as it is moves through an io_uring.
//!
//! Only transfers that change no table are taken: reads of data, and writes of clusters that the image owns. They are
//! what a guest does nearly all the time; the caller carries everything else out by itself, with [`Disk::read_at`] and
//! [`Disk::write_at`]. A request that a ring has counts as in flight to the image: its clusters go to no other owner.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use crate::disk::Disk;
use crate::node::{Found, Node, Place, Ticket};
use crate::sys::GuestRing;
use crate::throttle::Direction;

/// A read of what the host has cached is done at once up to this length. A longer one is more likely to have a part that
/// is not cached, and would be copied twice.
const NOW_BYTES: u64 = 64 << 10;

/// What became of a request that was offered to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is done.
    Done,
    /// The ring has it: [`Ring::next_over`] tells when it is over. It starts with [`Ring::submit`] at the latest.
    UnderWay,
    /// Nothing was done: the caller does it.
    Refused,
}

/// A request that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over<T> {
    /// The caller's name for it.
    pub tag: T,
    /// Which way it went.
    pub direction: Direction,
    /// Its length.
    pub bytes: u64,
    /// It went well. Where not, any part may have been moved: the caller does it again by itself, and hears why.
    pub good: bool,
}

/// What is known of a request while it is under way. Dropping it ends its flight.
struct Flying<T> {
    _landing: Landing,
    tag: T,
    direction: Direction,
    bytes: u64,
}

/// Tells the layer when it is dropped that the request is over.
struct Landing {
    node: Arc<dyn Node>,
    ticket: Ticket,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.node.land(self.ticket);
    }
}

/// Requests on disks whose data lies in one guest's memory, each with a name that the caller gives it. Belongs to one
/// thread at a time. Dropping it waits for what is under way.
pub struct Ring<B: Bitmap + 'static, T = u64> {
    ring: GuestRing<B, Flying<T>>,
    takes_all: bool,
}

impl<B: Bitmap + 'static, T> Ring<B, T> {
    /// A ring for up to `requests` (1 to 4096) at once over `memory`. Fails where the kernel has no io_uring or forbids
    /// it.
    pub fn new(requests: u16, memory: GuestMemoryMmap<B>) -> io::Result<Ring<B, T>> {
        Ok(Ring { ring: GuestRing::new(requests, memory)?, takes_all: false })
    }

    /// Takes writes to the host's page cache too, which cost more in a ring: the kernel hands most of them to a thread. The
    /// caller is never held up by a host that has too much to write.
    pub fn take_all(&mut self) {
        self.takes_all = true;
    }

    /// Requests that are under way.
    pub fn under_way(&self) -> usize {
        self.ring.under_way()
    }

    /// System calls made so far to hand requests over and to wait for them.
    pub fn calls(&self) -> u64 {
        self.ring.calls()
    }

    /// Begins to fill guest memory from `offset`. The slices are marked dirty in their bitmaps when it is over.
    pub fn read<S: BitmapSlice>(&mut self, disk: &Disk, offset: u64, bufs: &[VolatileSlice<'_, S>], tag: T) -> Begun {
        self.begin(disk, Direction::Read, offset, bufs, tag)
    }

    /// Begins to write guest memory to `offset`.
    pub fn write<S: BitmapSlice>(&mut self, disk: &Disk, offset: u64, bufs: &[VolatileSlice<'_, S>], tag: T) -> Begun {
        self.begin(disk, Direction::Write, offset, bufs, tag)
    }

    fn begin<S: BitmapSlice>(
        &mut self,
        disk: &Disk,
        direction: Direction,
        offset: u64,
        bufs: &[VolatileSlice<'_, S>],
        tag: T,
    ) -> Begun {
        if direction == Direction::Write && !disk.is_direct() && !self.takes_all {
            return Begun::Refused;
        }
        let Some(prepared) = self.ring.prepare(bufs) else { return Begun::Refused };
        let bytes = prepared.bytes() as u64;
        if bytes == 0 {
            return Begun::Refused;
        }
        // An error is found again, and told, by who does the request instead.
        let Ok(Some(found)) = disk.place(direction, offset, bytes) else { return Begun::Refused };
        let Found { node, place: Place { file, host, ticket } } = found;
        let flying = Flying { _landing: Landing { node: node.clone(), ticket }, tag, direction, bytes };
        let Some(target) = file.ring_file(host, bytes, &|align| prepared.is_aligned(align)) else {
            return Begun::Refused;
        };
        let at_once = direction == Direction::Read && !target.is_direct && bytes <= NOW_BYTES;
        if at_once && prepared.read_now(target.file, host) {
            disk.count(direction, bytes);
            return Begun::Done;
        }
        match prepared.push(direction, target.file, host, flying) {
            Ok(()) => Begun::UnderWay,
            Err(_no_room) => Begun::Refused,
        }
    }

    /// Hands what was begun to the kernel. An error means that the ring is of no use any more; what it has stays under way.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Submits, and waits until a request is over, if any is under way.
    pub fn wait(&mut self) -> io::Result<()> {
        self.ring.wait()
    }

    /// The next request that is over; `disk` is the one it was begun on.
    pub fn next_over(&mut self, disk: &Disk) -> Option<Over<T>> {
        let over = self.ring.next_over()?;
        let Flying { tag, direction, bytes, .. } = over.keep;
        if over.whole {
            disk.count(direction, bytes);
        }
        Some(Over { tag, direction, bytes, good: over.whole })
    }
}

impl<B: Bitmap + 'static, T> AsFd for Ring<B, T> {
    /// Readable when a request is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
