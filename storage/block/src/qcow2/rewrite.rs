//! Changing an image as a whole: snapshots, its size, its features.
//!
//! QEMU changes tables in place in an order that leaves leaks, and flags that contradict refcounts, when the power goes.
//! Here everything that changes is written to new places: tables ([`Rewrite::place`]), and the refcounts
//! ([`Recount`]). Then one sector of the header switches from the old state to the new; what only the old one used is
//! free after that. A power cut at any write leaves the one or the other, without a leak.

use std::collections::HashSet;
use std::path::Path;

use image::qcow2::{COPIED, Freed, Geometry, Header, L1Entry, L2Entry, header_steps};

use super::data_file::Data;
use super::maintenance_error::MaintenanceError;
use super::recount::Recount;
use super::{Sealing, Tables};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// A file with its name in errors.
#[derive(Clone, Copy)]
pub(super) struct Place<'f> {
    pub(super) file: &'f dyn FileBackend,
    pub(super) path: &'f Path,
}

impl Place<'_> {
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BlockError> {
        let read = self.file.read_at(offset, &ReadBufs::from_slice(out));
        read.map_err(|e| BlockError::io(self.path, Action::Read, e))
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let write = self.file.write_at(offset, &WriteBufs::from_slice(bytes));
        write.map_err(|e| BlockError::io(self.path, Action::Write, e))
    }

    pub(super) fn refuse(&self, source: MaintenanceError) -> BlockError {
        BlockError::Maintenance { path: self.path.to_owned(), source }
    }
}

/// A change under way. Dropping it before [`Rewrite::finish`] changes nothing.
pub(super) struct Rewrite<'f> {
    pub(super) place: Place<'f>,
    pub(super) data: Data,
    pub(super) geometry: Geometry,
    /// Length of the file when the change began.
    file_bytes: u64,
    /// The header as it will be; its refcount table and active L1 table follow by themselves.
    pub(super) header: Header,
    /// The active L1 table on disk.
    pub(super) old_l1: Vec<u64>,
    pub(super) counts: Recount<'f>,
    /// How guest data lie in the file.
    pub(super) sealing: Sealing,
    no_sync: bool,
    punch: bool,
}

impl<'f> Rewrite<'f> {
    /// Starts from tables that are on disk as they are in memory, while nobody uses the image.
    pub(super) fn begin(tables: &'f Tables) -> Result<Rewrite<'f>, BlockError> {
        let place = Place { file: &*tables.file, path: &tables.path };
        let file_bytes = tables.file.len_bytes().map_err(|e| BlockError::io(&tables.path, Action::Stat, e))?;
        Ok(Rewrite {
            place,
            data: tables.data.clone(),
            geometry: tables.geometry,
            file_bytes,
            header: tables.header.clone(),
            old_l1: tables.l1.clone(),
            counts: Recount::new(place, tables.geometry, &tables.reftable, &tables.table_clusters),
            sealing: tables.options.sealing.clone(),
            no_sync: tables.options.no_sync,
            punch: tables.options.punch_freed,
        })
    }

    /// Reads an L1 table, which must lie in the file.
    pub(super) fn read_l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>, BlockError> {
        let file_bytes = self.place.file.len_bytes().map_err(|e| BlockError::io(self.place.path, Action::Stat, e))?;
        let bytes = u64::from(entries) * 8;
        if offset.saturating_add(bytes) > file_bytes {
            let path = self.place.path.to_owned();
            return Err(BlockError::TablePastEnd { path, table: "L1 table of a snapshot", offset, file_bytes });
        }
        let mut raw = vec![0; bytes as usize];
        self.place.read(offset, &mut raw)?;
        Ok(words(&raw))
    }

    /// Writes a table to new clusters and returns where. An empty one gets a cluster too.
    pub(super) fn place(&mut self, bytes: &[u8]) -> Result<u64, BlockError> {
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_bytes()).max(1);
        let offset = self.counts.alloc(clusters)?;
        // Whole clusters, so that a table is never read past the end of the file.
        let mut padded = bytes.to_vec();
        padded.resize((clusters * self.geometry.cluster_bytes()) as usize, 0);
        self.place.write(offset, &padded)?;
        Ok(offset)
    }

    /// Writes guest data to a new cluster and returns where. What is missing of it is zeroes.
    pub(super) fn place_data(&mut self, bytes: &[u8]) -> Result<u64, BlockError> {
        let offset = self.counts.alloc(1)?;
        let mut padded = bytes.to_vec();
        padded.resize(self.geometry.cluster_bytes() as usize, 0);
        self.sealing.write(self.place.file, self.place.path, offset, &WriteBufs::from_slice(&padded))?;
        Ok(offset)
    }

    /// Drops the references to a table at `offset`.
    pub(super) fn drop_table(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        if bytes == 0 { Ok(()) } else { self.counts.drop(offset, bytes) }
    }

    pub(super) fn damaged(&self, l1_index: usize, source: image::qcow2::EntryError) -> BlockError {
        let guest_offset = (l1_index as u64).saturating_mul(self.geometry.l2_reach_bytes());
        BlockError::Entry { path: self.place.path.to_owned(), guest_offset, source }
    }

    /// The L2 tables of an L1 table, with their indices in it; each may occur once.
    pub(super) fn l2_tables(&self, l1: &[u64]) -> Result<Vec<(usize, u64)>, BlockError> {
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        for (index, raw) in l1.iter().enumerate() {
            let entry = L1Entry::decode(*raw, &self.geometry).map_err(|e| self.damaged(index, e))?;
            let Some(offset) = entry.table else { continue };
            if !seen.insert(offset) {
                return Err(self.place.refuse(MaintenanceError::SharedL2 { offset }));
            }
            found.push((index, offset));
        }
        Ok(found)
    }

    pub(super) fn read_l2(&self, offset: u64) -> Result<Vec<u8>, BlockError> {
        let mut table = vec![0; self.geometry.cluster_bytes() as usize];
        self.place.read(offset, &mut table)?;
        Ok(table)
    }

    /// One more reference to everything that an L1 table refers to: its L2 tables, and their clusters.
    pub(super) fn add_references(&mut self, l1: &[u64]) -> Result<(), BlockError> {
        for (index, offset) in self.l2_tables(l1)? {
            self.counts.add(offset, self.geometry.cluster_bytes())?;
            for Freed { offset, bytes } in self.clusters_of(index, offset)? {
                self.counts.add(offset, bytes)?;
            }
            self.counts.relieve()?;
        }
        Ok(())
    }

    /// One reference less.
    pub(super) fn drop_references(&mut self, l1: &[u64]) -> Result<(), BlockError> {
        for (index, offset) in self.l2_tables(l1)? {
            for Freed { offset, bytes } in self.clusters_of(index, offset)? {
                self.counts.drop(offset, bytes)?;
            }
            self.counts.drop(offset, self.geometry.cluster_bytes())?;
            self.counts.relieve()?;
        }
        Ok(())
    }

    /// What the entries of an L2 table refer to.
    fn clusters_of(&self, l1_index: usize, offset: u64) -> Result<Vec<Freed>, BlockError> {
        let table = self.read_l2(offset)?;
        let mut found = Vec::new();
        for entry in table.chunks_exact(self.geometry.l2_entry_bytes() as usize) {
            let raw = word(entry);
            if raw != 0 {
                let entry = L2Entry::decode(raw, &self.geometry).map_err(|e| self.damaged(l1_index, e))?;
                found.extend(entry.freed(&self.geometry));
            }
        }
        Ok(found)
    }

    /// Makes `l1` the active table, once all references are counted as they will be. Flags that say who owns a cluster
    /// are set as the counts demand, in copies of the L2 tables where that changes them. `keep_old`: the present L1
    /// table on disk stays in use as it is.
    pub(super) fn set_active(&mut self, mut l1: Vec<u64>, keep_old: bool) -> Result<(), BlockError> {
        // A table without entries would take a cluster that nothing is counted to use.
        l1.resize(l1.len().max(1), 0);
        for (index, offset) in self.l2_tables(&l1)? {
            let mut table = self.read_l2(offset)?;
            let placed = match self.settle_flags(index, &mut table)? {
                true => {
                    let copy = self.place(&table)?;
                    self.counts.drop(offset, self.geometry.cluster_bytes())?;
                    copy
                }
                false => offset,
            };
            let owned = self.counts.get(placed >> self.geometry.cluster_bits)? == 1;
            if let Some(raw) = l1.get_mut(index) {
                *raw = placed | if owned { COPIED } else { 0 };
            }
            self.counts.relieve()?;
        }
        if !keep_old && l1 == self.old_l1 {
            return Ok(());
        }
        let raw: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let (old_offset, old_entries) = (self.header.l1_offset, self.header.l1_entries);
        self.header.l1_offset = self.place(&raw)?;
        self.header.l1_entries = l1.len() as u32;
        if keep_old { Ok(()) } else { self.drop_table(old_offset, u64::from(old_entries) * 8) }
    }

    /// Sets the flags of an L2 table's entries; returns whether any changed.
    fn settle_flags(&mut self, l1_index: usize, table: &mut [u8]) -> Result<bool, BlockError> {
        let bits = self.geometry.cluster_bits;
        let mut changed = false;
        for entry in table.chunks_exact_mut(self.geometry.l2_entry_bytes() as usize) {
            let raw = word(entry);
            if raw == 0 {
                continue;
            }
            let host = match L2Entry::decode(raw, &self.geometry).map_err(|e| self.damaged(l1_index, e))? {
                L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } => Some(host),
                L2Entry::Unallocated | L2Entry::Zero { host: None, .. } | L2Entry::Compressed { .. } => None,
            };
            let owned = match host {
                Some(_) if self.geometry.data_file => true,
                Some(host) => self.counts.get(host >> bits)? == 1,
                None => false,
            };
            let want = if owned { raw | COPIED } else { raw & !COPIED };
            if want != raw {
                entry.get_mut(..8).unwrap_or_default().copy_from_slice(&want.to_be_bytes());
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Switches to the new state. After an error before the switch the image is as it was; what a failed barrier
    /// leaves is unknown.
    pub(super) fn finish(mut self) -> Result<(), BlockError> {
        let refused = |source| self.place.refuse(MaintenanceError::Header(source));
        // Whatever was asked for, a header that no reader would take is not written.
        let mut area = self.header.serialise().map_err(refused)?;
        area.resize(self.geometry.cluster_bytes() as usize, 0);
        Header::parse(&area).map_err(refused)?;
        drop(area);
        if self.geometry.data_file && !self.no_sync {
            self.data.file.sync_data().map_err(|e| self.data.failed(Action::Sync, e))?;
        }
        if !self.counts.is_unchanged() {
            let old = (self.header.reftable_offset, self.header.reftable_clusters);
            (self.header.reftable_offset, self.header.reftable_clusters) = self.counts.write(old)?;
            self.barrier()?;
        }
        // Only now: until here nothing has changed it, and a cluster may be large.
        let mut old_area = vec![0; self.geometry.cluster_bytes().min(self.file_bytes) as usize];
        self.place.read(0, &mut old_area)?;
        let steps = header_steps(&old_area, &self.header)
            .map_err(|source| self.place.refuse(MaintenanceError::Header(source)))?;
        for writes in steps {
            for (offset, bytes) in writes {
                self.place.write(offset, &bytes)?;
            }
            self.barrier()?;
        }
        if self.punch {
            // The change has happened. Space that the host does not take back is a loss and no failure.
            let _ = self.give_back();
        }
        Ok(())
    }

    /// Gives the space of clusters that only the old state used back to the host.
    fn give_back(&mut self) -> Result<(), BlockError> {
        let bits = self.geometry.cluster_bits;
        for run in self.counts.freed()? {
            let punched = self.place.file.punch_hole(run.start << bits, (run.end - run.start) << bits);
            punched.map_err(|e| BlockError::io(self.place.path, Action::Discard, e))?;
        }
        Ok(())
    }

    fn barrier(&self) -> Result<(), BlockError> {
        if self.no_sync {
            return Ok(());
        }
        self.place.file.sync_data().map_err(|e| BlockError::io(self.place.path, Action::Sync, e))
    }
}

/// The first big-endian u64 of an entry.
pub(super) fn word(entry: &[u8]) -> u64 {
    entry.get(..8).and_then(|raw| raw.try_into().ok()).map_or(0, u64::from_be_bytes)
}

pub(super) fn words(raw: &[u8]) -> Vec<u64> {
    raw.chunks_exact(8).map(word).collect()
}
