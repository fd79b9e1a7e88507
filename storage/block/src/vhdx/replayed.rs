//! A file as it is after its log has been replayed, without changing it: for images that may only be read.

use std::io;
use std::sync::Arc;

use image::vhdx::log::Change;

use crate::io::{FileBackend, ReadBackend};
use crate::sys::ReadBufs;

pub(super) struct ReplayedFile {
    below: Arc<dyn FileBackend>,
    /// In the order in which they are made. At most as many bytes as the log has.
    changes: Vec<Change>,
    len_bytes: u64,
}

impl ReplayedFile {
    pub(super) fn new(below: Arc<dyn FileBackend>, changes: Vec<Change>, len_bytes: u64) -> ReplayedFile {
        ReplayedFile { below, changes, len_bytes }
    }
}

impl ReadBackend for ReplayedFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        self.below.read_at(offset, bufs)?;
        let end = offset.saturating_add(bufs.len() as u64);
        for change in &self.changes {
            let (start, stop) = match change {
                Change::Sector { offset, bytes } => (*offset, offset.saturating_add(bytes.len() as u64)),
                Change::Zero { offset, bytes } => (*offset, offset.saturating_add(*bytes)),
            };
            let (from, to) = (start.max(offset), stop.min(end));
            if from >= to {
                continue;
            }
            let part = bufs.range((from - offset) as usize, (to - from) as usize);
            match change {
                Change::Sector { bytes, .. } => {
                    part.copy_from(bytes.get((from - start) as usize..).unwrap_or_default())
                }
                Change::Zero { .. } => part.fill_zero(),
            }
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len_bytes)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.below.allocated_bytes()
    }
}
