//! A raw LUKS volume as a layer: header and key slots, then the sectors of the disk to the end of the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{LUKS_KEY_PARAMETER, LayerKey, Sealed, Volume, needed};
use crate::create::{Preallocation, check_shrink, preallocate};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::node::{Below, Extent, ExtentKind, Node};
use crate::sys::{ReadBufs, WriteBufs};
use crate::zeroes::{PIECE_BYTES, write_zero_data};

pub(crate) struct LuksNode {
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    /// `None`: the layer was opened without its key.
    sealed: Option<Sealed>,
    payload_offset: u64,
    size_bytes: AtomicU64,
    read_only: bool,
    /// Never wait for stable storage.
    no_sync: bool,
}

/// Opens a volume with its key.
pub(crate) fn open_luks(
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    key: &LayerKey,
    read_only: bool,
    no_sync: bool,
) -> Result<LuksNode, BlockError> {
    let file_bytes = file.len_bytes().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
    let volume = Volume::read(&*file, &path, 0, file_bytes)?;
    let sealed = match key {
        LayerKey::Closed => None,
        key => Some(Sealed::new(volume.open(needed(key, &path, LUKS_KEY_PARAMETER)?)?)),
    };
    let payload_offset = volume.header.payload_offset();
    let size_bytes = disk_bytes(file_bytes, payload_offset);
    Ok(LuksNode { file, path, sealed, payload_offset, size_bytes: AtomicU64::new(size_bytes), read_only, no_sync })
}

/// Size of the disk in a file; a last sector that is cut off counts, as in a raw image.
pub(crate) fn disk_bytes(file_bytes: u64, payload_offset: u64) -> u64 {
    file_bytes.saturating_sub(payload_offset).min(i64::MAX as u64 - 511).next_multiple_of(512)
}

impl LuksNode {
    fn done<T>(&self, action: Action, result: std::io::Result<T>) -> Result<T, BlockError> {
        result.map_err(|e| BlockError::io(&self.path, action, e))
    }

    fn sealed(&self) -> Result<&Sealed, BlockError> {
        self.sealed.as_ref().ok_or_else(|| BlockError::Closed { path: self.path.clone() })
    }

    fn writable(&self) -> Result<(), BlockError> {
        if self.read_only { Err(BlockError::ReadOnly { path: self.path.clone() }) } else { Ok(()) }
    }
}

impl Node for LuksNode {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// A hole of the file is no zeroes of the disk: all is data.
    fn extent(&self, _offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        Ok(Extent::new(bytes, ExtentKind::Data))
    }

    fn read(&self, _below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        let read = self.sealed()?.read(&*self.file, self.payload_offset + offset, offset, bufs);
        self.done(Action::Read, read)
    }

    fn write(&self, _below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.writable()?;
        let write = self.sealed()?.write(&*self.file, self.payload_offset + offset, offset, bufs);
        self.done(Action::Write, write)
    }

    /// Zeroes are written encrypted: there is no cheaper way to say them.
    fn write_zeroes(&self, below: Below<'_>, offset: u64, bytes: u64, _may_unmap: bool) -> Result<(), BlockError> {
        write_zero_data(offset..offset + bytes, PIECE_BYTES, |at, zeroes| self.write(below, at, zeroes))
    }

    /// Nothing: a hole would read as arbitrary bytes, and show which sectors are not in use.
    fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), BlockError> {
        self.writable()
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.no_sync { Ok(()) } else { self.done(Action::Sync, self.file.sync_data()) }
    }

    /// New bytes are arbitrary: what a hole of the file decrypts to.
    fn resize(&self, _below: Below<'_>, to_bytes: u64, shrink: bool, room: Preallocation) -> Result<(), BlockError> {
        self.writable()?;
        check_shrink(&self.path, self.size_bytes(), to_bytes, shrink)?;
        let rounded = to_bytes.checked_next_multiple_of(512);
        let end =
            rounded.and_then(|bytes| bytes.checked_add(self.payload_offset)).filter(|end| *end <= i64::MAX as u64);
        let end = self.done(Action::Write, end.ok_or_else(|| std::io::ErrorKind::FileTooLarge.into()))?;
        self.done(Action::Write, self.file.set_len_bytes(end))?;
        preallocate(&*self.file, &self.path, self.payload_offset + self.size_bytes()..end, room)?;
        self.size_bytes.store(end - self.payload_offset, Ordering::Relaxed);
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
