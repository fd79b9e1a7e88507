//! A raw image: the file is the disk. A file whose length is no multiple of 512 is rounded up, as QEMU does.

use std::path::PathBuf;

use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

pub(crate) struct RawNode {
    file: Box<dyn FileBackend>,
    path: PathBuf,
    size_bytes: u64,
}

impl RawNode {
    pub(crate) fn open(file: Box<dyn FileBackend>, path: PathBuf) -> Result<RawNode, BlockError> {
        let bytes = file.len_bytes().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
        let size_bytes = bytes.min(i64::MAX as u64 - 511).next_multiple_of(512);
        Ok(RawNode { file, path, size_bytes })
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn read(&self, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.file.read_at(offset, bufs).map_err(|e| BlockError::io(&self.path, Action::Read, e))
    }

    pub(crate) fn write(&self, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.file.write_at(offset, bufs).map_err(|e| BlockError::io(&self.path, Action::Write, e))
    }

    pub(crate) fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.file.write_zeroes(offset, bytes, may_unmap).map_err(|e| BlockError::io(&self.path, Action::Write, e))
    }

    pub(crate) fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.file.punch_hole(offset, bytes).map_err(|e| BlockError::io(&self.path, Action::Discard, e))
    }

    pub(crate) fn flush(&self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(|e| BlockError::io(&self.path, Action::Sync, e))
    }

    pub(crate) fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.file.allocated_bytes().map_err(|e| BlockError::io(&self.path, Action::Stat, e))
    }
}
