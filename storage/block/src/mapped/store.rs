//! A file with its name: every failure says which file it was, and unsafe cache mode never waits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::FormatError;

use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// An image's file.
pub(crate) struct Store {
    pub(crate) file: Arc<dyn FileBackend>,
    pub(crate) path: PathBuf,
    /// Never wait for stable storage.
    pub(crate) no_sync: bool,
}

impl Store {
    fn done<T>(&self, action: Action, result: std::io::Result<T>) -> Result<T, BlockError> {
        result.map_err(|e| BlockError::io(&self.path, action, e))
    }

    pub(crate) fn read(&self, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.done(Action::Read, self.file.read_at(offset, bufs))
    }

    /// Reads `bytes` from `offset`, or what the file has of them. The caller has bounded `bytes`.
    pub(crate) fn read_vec(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, BlockError> {
        let have = self.len_bytes()?.saturating_sub(offset);
        let mut out = vec![0; bytes.min(have) as usize];
        self.read(offset, &ReadBufs::from_slice(&mut out))?;
        Ok(out)
    }

    pub(crate) fn write(&self, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.done(Action::Write, self.file.write_at(offset, bufs))
    }

    pub(crate) fn write_slice(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        self.write(offset, &WriteBufs::from_slice(bytes))
    }

    pub(crate) fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.done(Action::Write, self.file.write_zeroes(offset, bytes, may_unmap))
    }

    pub(crate) fn punch_hole(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.done(Action::Discard, self.file.punch_hole(offset, bytes))
    }

    pub(crate) fn sync(&self) -> Result<(), BlockError> {
        if self.no_sync { Ok(()) } else { self.done(Action::Sync, self.file.sync_data()) }
    }

    pub(crate) fn len_bytes(&self) -> Result<u64, BlockError> {
        self.done(Action::Stat, self.file.len_bytes())
    }

    pub(crate) fn set_len_bytes(&self, bytes: u64) -> Result<(), BlockError> {
        self.done(Action::Write, self.file.set_len_bytes(bytes))
    }

    /// See [`FileBackend::keeps_len`].
    pub(crate) fn keeps_len(&self) -> bool {
        self.file.keeps_len()
    }

    pub(crate) fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.done(Action::Stat, self.file.allocated_bytes())
    }

    /// How far the file is data, or a hole.
    pub(crate) fn extent(&self, offset: u64, bytes: u64) -> Result<(u64, bool), BlockError> {
        self.done(Action::Stat, self.file.extent(offset, bytes))
    }

    /// The image contradicts itself, or needs what is not supported.
    pub(crate) fn refused(&self, source: impl Into<FormatError>) -> BlockError {
        refused(&self.path, source)
    }

    pub(crate) fn read_only(&self) -> BlockError {
        BlockError::ReadOnly { path: self.path.clone() }
    }
}

/// An error about the image at `path`, with the cause as its source.
pub(crate) fn refused(path: &Path, source: impl Into<FormatError>) -> BlockError {
    BlockError::Format { path: path.to_owned(), source: Box::new(source.into()) }
}
