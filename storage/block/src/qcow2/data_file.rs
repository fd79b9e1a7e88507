//! The external data file of an image: guest data where the guest sees it, without refcounts, beside the qcow2 file
//! with the tables ("External data file" and feature bits in the specification).
//!
//! A cluster has one place, so nothing is allocated there and nothing moves. What tables say of a cluster becomes true
//! on disk after its data: every barrier is one of both files, the data file's first.

use std::path::PathBuf;
use std::sync::Arc;

use image::qcow2::Header;

use super::rewrite::Rewrite;
use super::{MaintenanceError, Qcow2Node, Tables};
use crate::create::{Preallocation, preallocate};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// What an opener has for the guest data of an image.
#[derive(Clone)]
pub(crate) enum DataFile {
    /// Nothing: the image must hold its data itself.
    Inside,
    /// This file, with its name in errors.
    Given(Arc<dyn FileBackend>, PathBuf),
    /// Nothing, and no guest data will be asked for.
    Unneeded,
}

/// Where guest data is: in the image's own file, or beside it.
#[derive(Clone)]
pub(super) struct Data {
    pub(super) file: Arc<dyn FileBackend>,
    pub(super) path: PathBuf,
}

impl Data {
    pub(super) fn of(
        header: &Header,
        own: (&Arc<dyn FileBackend>, &PathBuf),
        given: DataFile,
    ) -> Result<Data, BlockError> {
        let path = own.1.clone();
        match (header.geometry.data_file, given) {
            (false, DataFile::Inside | DataFile::Unneeded) => Ok(Data { file: own.0.clone(), path }),
            (false, DataFile::Given(_, data)) => Err(BlockError::UnexpectedDataFile { path, data }),
            (true, DataFile::Given(file, path)) => Ok(Data { file, path }),
            (true, DataFile::Inside) => Err(BlockError::DataFileNotGiven { path }),
            (true, DataFile::Unneeded) => Ok(Data { file: Arc::new(Absent), path }),
        }
    }

    pub(super) fn failed(&self, action: Action, source: std::io::Error) -> BlockError {
        BlockError::io(&self.path, action, source)
    }
}

impl Qcow2Node {
    /// Prepares a range of the data file for entries that will say zeroes or nothing: zeroes where the file must stay a
    /// raw image of the disk, else holes at most.
    pub(super) fn pass_down(&self, offset: u64, bytes: u64, unmap: bool) -> Result<(), BlockError> {
        if !self.geometry.data_file {
            return Ok(());
        }
        if self.pass_zeroes(offset, bytes, unmap)? || !unmap {
            return Ok(());
        }
        let start = offset.next_multiple_of(self.geometry.cluster_bytes());
        let end = offset + bytes;
        let end = if end >= self.size_bytes() { end } else { end - self.geometry.in_cluster(end) };
        let tables = self.lock_settled(offset, bytes);
        let _flight = self.enter(&tables);
        let wanted = tables.options.punch_freed && start < end;
        drop(tables);
        if wanted {
            let punched = self.data.file.punch_hole(start, end - start);
            punched.map_err(|e| self.data.failed(Action::Discard, e))?;
        }
        Ok(())
    }

    /// Zeroes a range of a data file that must stay a raw image; `false` where it need not. A zeroing request does so
    /// before its entries change, for a crash in between, and after, for writes that came in between.
    pub(super) fn pass_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> Result<bool, BlockError> {
        if !self.geometry.data_file {
            return Ok(false);
        }
        let mut tables = self.lock_settled(offset, bytes);
        tables.begin_change(offset, bytes)?;
        if !tables.header.is_data_file_raw() {
            return Ok(false);
        }
        let _flight = self.enter(&tables);
        drop(tables);
        let zeroed = self.data.file.write_zeroes(offset, bytes, unmap);
        zeroed.map(|()| true).map_err(|e| self.data.failed(Action::Write, e))
    }
}

impl Tables {
    /// Takes places for new data of the cluster at a guest offset and those behind it: up to `want`, at least one.
    /// Returns the first host cluster, and how many.
    pub(super) fn alloc_data(&mut self, guest_offset: u64, want: u64) -> Result<(u64, u64), BlockError> {
        match self.geometry.data_file {
            true => Ok((guest_offset >> self.geometry.cluster_bits, want)),
            false => self.alloc_run(want),
        }
    }

    /// Undoes [`Tables::alloc_data`].
    pub(super) fn give_back_data(&mut self, cluster: u64, count: u64) -> Result<(), BlockError> {
        if self.geometry.data_file { Ok(()) } else { self.give_back(cluster, count) }
    }
}

impl Rewrite<'_> {
    /// Snapshots would share data, which has one place here.
    pub(super) fn refuse_snapshots(&self) -> Result<(), BlockError> {
        if self.geometry.data_file {
            return Err(self.place.refuse(MaintenanceError::NotWithDataFile { what: "snapshots" }));
        }
        Ok(())
    }

    /// Gives the data file the length of a disk that grows. Its new bytes are zeroes, whatever the file held there.
    pub(super) fn grow_data(&self, from_bytes: u64, to_bytes: u64, room: Preallocation) -> Result<(), BlockError> {
        let failed = |e| self.data.failed(Action::Write, e);
        let file = &*self.data.file;
        file.set_len_bytes(from_bytes).map_err(failed)?;
        let held = file.len_bytes().map_err(failed)?.min(to_bytes).saturating_sub(from_bytes);
        if held > 0 {
            file.write_zeroes(from_bytes, held, true).map_err(failed)?;
        }
        file.set_len_bytes(to_bytes).map_err(failed)?;
        preallocate(file, &self.data.path, from_bytes..to_bytes, room)
    }

    /// Writes data of the cluster at a guest offset to its place, which nothing maps yet.
    pub(super) fn put_data(&self, guest_offset: u64, bytes: &[u8]) -> Result<u64, BlockError> {
        let written = self.data.file.write_at(guest_offset, &WriteBufs::from_slice(bytes));
        written.map(|()| guest_offset).map_err(|e| self.data.failed(Action::Write, e))
    }

    /// Gives the data file the length of a disk that has become smaller.
    pub(super) fn shrink_data(data: &Data, to_bytes: u64) -> Result<(), BlockError> {
        data.file.set_len_bytes(to_bytes).map_err(|e| data.failed(Action::Write, e))
    }
}

/// The data file of an image that was opened for its tables alone.
struct Absent;

fn absent<T>() -> std::io::Result<T> {
    Err(std::io::Error::other("the external data file was not opened"))
}

impl FileBackend for Absent {
    fn read_at(&self, _: u64, _: &ReadBufs<'_>) -> std::io::Result<()> {
        absent()
    }
    fn write_at(&self, _: u64, _: &WriteBufs<'_>) -> std::io::Result<()> {
        absent()
    }
    fn sync_data(&self) -> std::io::Result<()> {
        // Nothing was written.
        Ok(())
    }
    fn punch_hole(&self, _: u64, _: u64) -> std::io::Result<()> {
        absent()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        absent()
    }
    fn len_bytes(&self) -> std::io::Result<u64> {
        absent()
    }
    fn set_len_bytes(&self, _: u64) -> std::io::Result<()> {
        absent()
    }
    fn allocated_bytes(&self) -> std::io::Result<u64> {
        Ok(0)
    }
}
