//! A raw image: the file is the disk. A file whose length is no multiple of 512 is rounded up, as QEMU does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::blkdebug::Event;
use crate::create::{Preallocation, check_shrink, preallocate};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::node::{Below, Extent, Landing, Mapped, Node, Place, Placed, Ticket};
use crate::sys::{ReadBufs, WriteBufs};

pub(crate) struct RawNode {
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    size_bytes: AtomicU64,
    /// Never wait for stable storage.
    no_sync: bool,
}

impl RawNode {
    pub(crate) fn open(file: Arc<dyn FileBackend>, path: PathBuf, no_sync: bool) -> Result<RawNode, BlockError> {
        let bytes = file.len_bytes().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
        let size_bytes = bytes.min(i64::MAX as u64 - 511).next_multiple_of(512);
        Ok(RawNode { file, path, size_bytes: AtomicU64::new(size_bytes), no_sync })
    }

    fn done<T>(&self, action: Action, result: std::io::Result<T>) -> Result<T, BlockError> {
        result.map_err(|e| BlockError::io(&self.path, action, e))
    }
}

impl Node for RawNode {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        if let Some((bytes, marked)) = self.done(Action::Stat, self.file.mark(offset, bytes))? {
            return Ok(Extent { hole: false, marked, ..Extent::placed(bytes, offset, true) });
        }
        let (bytes, data) = self.done(Action::Stat, self.file.extent(offset, bytes))?;
        // The file is all there is: its holes are no data.
        Ok(Extent { hole: false, ..Extent::placed(bytes, offset, data) })
    }

    fn read(&self, _below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.done(Action::Read, self.file.read_at(offset, bufs))
    }

    fn write(&self, _below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.done(Action::Write, self.file.write_at(offset, bufs))
    }

    fn map_read(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        Ok(Some(Mapped { file: &*self.file, host: offset, bytes, landing: Landing::Nothing }))
    }

    fn map_write(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        Ok(Some(Mapped { file: &*self.file, host: offset, bytes, landing: Landing::Nothing }))
    }

    fn place_read(&self, offset: u64, _bytes: u64) -> Result<Placed<'_>, BlockError> {
        Ok(Placed::Here(Place { file: &*self.file, host: offset, ticket: Ticket::default() }))
    }

    fn place_write(&self, offset: u64, bytes: u64) -> Result<Placed<'_>, BlockError> {
        self.place_read(offset, bytes)
    }

    fn write_zeroes(&self, _below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.done(Action::Write, self.file.write_zeroes(offset, bytes, may_unmap))
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.done(Action::Discard, self.file.punch_hole(offset, bytes))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.file.event(Event::FLUSH_TO_OS);
        self.file.event(Event::FLUSH_TO_DISK);
        if self.no_sync { Ok(()) } else { self.done(Action::Sync, self.file.sync_data()) }
    }

    fn resize(&self, _below: Below<'_>, to_bytes: u64, shrink: bool, room: Preallocation) -> Result<(), BlockError> {
        check_shrink(&self.path, self.size_bytes(), to_bytes, shrink)?;
        let rounded = to_bytes.min(i64::MAX as u64 - 511).next_multiple_of(512);
        // The last sector may be a part of one, as in any raw file.
        let wanted = to_bytes.min(rounded);
        self.done(Action::Write, self.file.set_len_bytes(wanted))?;
        if self.done(Action::Stat, self.file.len_bytes())? != wanted {
            let fixed = std::io::Error::new(std::io::ErrorKind::InvalidInput, "Cannot resize device files");
            return self.done(Action::Write, Err(fixed));
        }
        preallocate(&*self.file, &self.path, self.size_bytes()..rounded, room)?;
        self.size_bytes.store(rounded, Ordering::Relaxed);
        Ok(())
    }

    fn cluster_bytes(&self) -> u64 {
        0
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.done(Action::Stat, self.file.allocated_bytes())
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
