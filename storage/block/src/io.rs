//! The seam between the engine and files.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::blkdebug::{Breakpoints, Event};
use crate::sys::{ReadBufs, WriteBufs};

/// A file of the host that a ring works on.
pub struct RingFile<'a> {
    /// The file.
    pub file: &'a File,
    /// It bypasses the host's page cache.
    pub is_direct: bool,
}

/// A file, as the engine needs it. Calls may block, and come from several threads.
pub trait FileBackend: Send + Sync {
    /// Fills all of `bufs`; bytes past the end of the file are zeroes.
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()>;
    /// Writes all of `bufs`, growing the file as needed. After an error any part may have been written.
    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()>;
    /// Returns when everything written before is on stable storage. `fdatasync(2)`.
    fn sync_data(&self) -> io::Result<()>;
    /// Gives the space of a range back; it reads as zeroes or unchanged. A file that cannot do it succeeds.
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Makes a range read as zeroes, inside the file or past its end. `may_unmap` allows it to become a hole.
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()>;
    /// How far from `offset` on, at most `bytes`, the file is all data (`true`) or all hole: at least 1 byte.
    /// A file that cannot tell is all data.
    fn extent(&self, _offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        Ok((bytes, true))
    }
    /// For a file that tells what is marked in place of where data is: how far from `offset` on, at most `bytes`, all or
    /// nothing is marked. Only [`crate::nbd::NbdFile`] may.
    fn mark(&self, _offset: u64, _bytes: u64) -> io::Result<Option<(u64, bool)>> {
        Ok(None)
    }
    /// The engine is about to do something to the file. Only [`crate::Blkdebug`] listens; to others it costs nothing.
    fn event(&self, _event: Event) {}
    /// The places at which requests can be made to stop, where somebody listens to events.
    fn breakpoints(&self) -> Option<Arc<Breakpoints>> {
        None
    }
    /// The file as one of the host, for copies from file to file.
    fn as_host_file(&self) -> Option<&File> {
        None
    }
    /// The file of the host in which a ring may read or write a range by itself; `is_aligned` tells whether the memory is
    /// aligned to some size. `None`: [`FileBackend::read_at`] and [`FileBackend::write_at`] do more than that.
    fn ring_file(&self, _offset: u64, _bytes: u64, _is_aligned: &dyn Fn(usize) -> bool) -> Option<RingFile<'_>> {
        None
    }
    /// Length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;
    /// Sets the length. What [keeps its length](FileBackend::keeps_len) has room for any that is no longer.
    fn set_len_bytes(&self, bytes: u64) -> io::Result<()>;
    /// It cannot be cut, so its length says nothing of what is in it: a device, or an export of a server.
    fn keeps_len(&self) -> bool {
        false
    }
    /// Each request waits for a server.
    fn is_remote(&self) -> bool {
        false
    }
    /// Bytes of storage in use, at most 512 off.
    fn allocated_bytes(&self) -> io::Result<u64>;
}

/// What can only be read; [`ReadOnly`] makes a file of it. The calls are those of [`FileBackend`].
pub trait ReadBackend: Send + Sync {
    /// See [`FileBackend::read_at`].
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()>;
    /// See [`FileBackend::extent`].
    fn extent(&self, _offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        Ok((bytes, true))
    }
    /// See [`FileBackend::len_bytes`].
    fn len_bytes(&self) -> io::Result<u64>;
    /// See [`FileBackend::allocated_bytes`].
    fn allocated_bytes(&self) -> io::Result<u64>;
}

/// A file that refuses changes (`EROFS`), and so has nothing to bring to stable storage.
pub struct ReadOnly<B>(pub B);

fn read_only() -> io::Result<()> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl<B: ReadBackend> FileBackend for ReadOnly<B> {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        self.0.read_at(offset, bufs)
    }
    fn write_at(&self, _: u64, _: &WriteBufs<'_>) -> io::Result<()> {
        read_only()
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        read_only()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        read_only()
    }
    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        self.0.extent(offset, bytes)
    }
    fn len_bytes(&self) -> io::Result<u64> {
        self.0.len_bytes()
    }
    fn set_len_bytes(&self, _: u64) -> io::Result<()> {
        read_only()
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.0.allocated_bytes()
    }
}
