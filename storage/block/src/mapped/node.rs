//! A whole disk behind one table, as a layer; and new files.

use std::path::Path;

use image::NewFile;

use super::{BlockTable, Mapped};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::node::{Below, Extent, ExtentKind, Node};
use crate::random::fill_random;
use crate::sys::{ReadBufs, WriteBufs};

/// A layer that is one [`Mapped`], of a format without backing files: nothing shows through from below.
pub(crate) struct MappedNode<T: BlockTable> {
    disk: Mapped<T>,
}

impl<T: BlockTable> MappedNode<T> {
    pub(crate) fn new(disk: Mapped<T>) -> MappedNode<T> {
        MappedNode { disk }
    }

    pub(crate) fn disk(&self) -> &Mapped<T> {
        &self.disk
    }
}

impl<T: BlockTable> Node for MappedNode<T> {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let extent = self.disk.extent(offset, bytes)?;
        let kind = if extent.kind == ExtentKind::Below { ExtentKind::Zero } else { extent.kind };
        Ok(Extent { kind, ..extent })
    }

    fn read(&self, _below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.disk.read(&[], offset, bufs)
    }

    fn write(&self, _below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.disk.write(&[], offset, bufs)
    }

    fn writes_to_page_cache(&self) -> bool {
        self.disk.store.file.as_host_file().is_some()
    }

    fn write_zeroes(&self, _below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.disk.write_zeroes(&[], offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.disk.discard(offset, bytes)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.disk.flush()
    }

    fn cluster_bytes(&self) -> u64 {
        self.disk.table.block_bytes()
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.disk.store.allocated_bytes()
    }

    fn path(&self) -> &Path {
        &self.disk.store.path
    }
}

/// Makes `file` hold a new image, on stable storage when this returns.
pub(crate) fn write_new(file: &dyn FileBackend, path: &Path, layout: &NewFile) -> Result<(), BlockError> {
    let written = crate::create::empty(file).and_then(|()| {
        for (offset, bytes) in &layout.pieces {
            file.write_at(*offset, &WriteBufs::from_slice(bytes))?;
        }
        file.set_len_bytes(layout.file_bytes)?;
        file.sync_data()
    });
    written.map_err(|e| BlockError::io(path, Action::Create, e))
}

/// A random UUID, version 4.
pub(crate) fn random_uuid(path: &Path) -> Result<[u8; 16], BlockError> {
    let mut uuid = [0; 16];
    fill_random(path, &mut uuid)?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
