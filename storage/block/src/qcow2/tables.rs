//! L1 and L2 tables: finding an entry, and changing it in memory.

use image::qcow2::{COPIED, EntryError, ExtendedEntry, Freed, L1Entry, L2Entry};

use super::Tables;
use super::rewrite::word;
use crate::blkdebug::Event;
use crate::error::BlockError;

impl Tables {
    fn damaged(&self, guest_offset: u64, source: EntryError) -> BlockError {
        BlockError::Entry { path: self.path.clone(), guest_offset, source }
    }

    pub(super) fn l1_entry(&self, offset: u64) -> Result<L1Entry, BlockError> {
        let raw = usize::try_from(self.geometry.l1_index(offset)).ok().and_then(|index| self.l1.get(index)).copied();
        L1Entry::decode(raw.unwrap_or(0), &self.geometry).map_err(|e| self.damaged(offset, e))
    }

    /// The words of the L2 entry for a guest offset, the second one for entries that have a bitmap; zeroes where no
    /// table is.
    pub(super) fn raw_entry(&mut self, offset: u64) -> Result<[u64; 2], BlockError> {
        let Some(table) = self.l1_entry(offset)?.table else { return Ok([0; 2]) };
        let (key, at) = self.slice_of(table, offset);
        self.load_l2(key, table)?;
        let extended = self.geometry.extended_l2;
        let slice = self.l2_cache.get(key).and_then(|slice| slice.get(at..)).unwrap_or_default();
        Ok([word(slice), if extended { word(slice.get(8..).unwrap_or_default()) } else { 0 }])
    }

    /// What the image says about the cluster that holds a guest offset, where entries have no bitmap.
    pub(super) fn entry(&mut self, offset: u64) -> Result<L2Entry, BlockError> {
        let [raw, _] = self.raw_entry(offset)?;
        L2Entry::decode_at(raw, offset, &self.geometry).map_err(|e| self.damaged(offset, e))
    }

    /// As [`Tables::entry`], where entries have a bitmap.
    pub(super) fn extended_entry(&mut self, offset: u64) -> Result<ExtendedEntry, BlockError> {
        let [raw, bitmap] = self.raw_entry(offset)?;
        let entry = L2Entry::decode_at(raw, offset, &self.geometry)
            .and_then(|_| ExtendedEntry::decode(raw, bitmap, &self.geometry));
        entry.map_err(|e| self.damaged(offset, e))
    }

    /// What the image says about a guest offset, and for how many bytes from there; at most to the end of the cluster.
    pub(super) fn piece(&mut self, offset: u64) -> Result<(L2Entry, u64), BlockError> {
        let within = self.geometry.in_cluster(offset);
        if self.geometry.extended_l2 {
            return Ok(self.extended_entry(offset)?.piece(&self.geometry, within));
        }
        Ok((self.entry(offset)?, self.geometry.cluster_bytes() - within))
    }

    /// What the entry for a guest offset refers to.
    pub(super) fn freed_by(&mut self, offset: u64) -> Result<Option<Freed>, BlockError> {
        let geometry = self.geometry;
        match geometry.extended_l2 {
            true => Ok(self.extended_entry(offset)?.freed(&geometry)),
            false => Ok(self.entry(offset)?.freed(&geometry)),
        }
    }

    /// Key of the cached slice for a guest offset, and the byte in it where the entry starts.
    fn slice_of(&self, table: u64, offset: u64) -> (u64, usize) {
        let byte = self.geometry.l2_index(offset) * self.geometry.l2_entry_bytes();
        let in_slice = byte & (self.geometry.slice_bytes() - 1);
        (table + byte - in_slice, in_slice as usize)
    }

    fn load_l2(&mut self, key: u64, table: u64) -> Result<(), BlockError> {
        if self.l2_cache.contains(key) {
            return Ok(());
        }
        if table >> self.geometry.cluster_bits >= self.file_clusters {
            let file_bytes = self.file_clusters << self.geometry.cluster_bits;
            return Err(BlockError::TablePastEnd {
                path: self.path.clone(),
                table: "L2 table",
                offset: table,
                file_bytes,
            });
        }
        if self.l2_cache.is_crowded() {
            self.commit()?;
        }
        let (file, path) = (&self.file, &self.path);
        file.event(Event::L2_LOAD);
        self.l2_cache.insert(key, |slice| {
            let read = file.read_at(key, &crate::sys::ReadBufs::from_slice(slice));
            read.map_err(|e| BlockError::io(path, crate::error::Action::Read, e))
        })
    }

    /// Guest bytes from `offset` to the end of the slice that maps it.
    pub(super) fn slice_reach(&self, offset: u64) -> u64 {
        let reach = (self.geometry.slice_bytes() / self.geometry.l2_entry_bytes()) << self.geometry.cluster_bits;
        reach - (offset & (reach - 1))
    }

    /// Makes the L2 table for a guest offset exist and belong to this image alone, and loads the slice, so
    /// that [`Tables::set_entries`] can follow.
    pub(super) fn own_l2(&mut self, offset: u64) -> Result<(), BlockError> {
        let entry = self.l1_entry(offset)?;
        let table = match entry {
            L1Entry { table: Some(table), copied: true } => table,
            L1Entry { table: old, .. } => self.new_l2(offset, old)?,
        };
        let (key, _) = self.slice_of(table, offset);
        self.load_l2(key, table)
    }

    /// A new table, empty or a copy of one that a snapshot shares. It is complete in the file before the L1
    /// entry changes in memory, so the next commit may write entry and slices in any order.
    fn new_l2(&mut self, offset: u64, old: Option<u64>) -> Result<u64, BlockError> {
        let bytes = self.geometry.cluster_bytes();
        let mut contents = vec![0; bytes as usize];
        if let Some(old) = old {
            // Never dirty in the cache: only owned tables are changed.
            self.file.event(Event::L2_ALLOC_COW_READ);
            self.read_file(old, &mut contents)?;
        }
        let (cluster, _) = self.alloc_run(1)?;
        let table = cluster << self.geometry.cluster_bits;
        self.file.event(Event::L2_ALLOC_WRITE);
        if let Err(error) = self.write_file(table, &contents) {
            self.give_back(cluster, 1)?;
            return Err(error);
        }
        self.l2_cache.forget(table, bytes);
        self.table_clusters.insert(cluster);
        let index = self.geometry.l1_index(offset) as usize;
        if let Some(raw) = self.l1.get_mut(index) {
            *raw = table | COPIED;
            self.l1_dirty.insert(index);
        }
        if let Some(old) = old {
            self.table_clusters.remove(&(old >> self.geometry.cluster_bits));
            self.free_later(old, bytes);
        }
        Ok(table)
    }

    /// Stores entries for consecutive clusters from `offset` on, all in one slice that [`Tables::own_l2`]
    /// was called for before: the entry, and the bitmap where entries have one. On an error nothing has changed.
    pub(super) fn set_entries(
        &mut self,
        offset: u64,
        entries: impl Iterator<Item = [u64; 2]>,
    ) -> Result<(), BlockError> {
        self.own_l2(offset)?;
        let Some(table) = self.l1_entry(offset)?.table else { return Ok(()) };
        let (key, at) = self.slice_of(table, offset);
        let entry_bytes = self.geometry.l2_entry_bytes() as usize;
        if let Some(slice) = self.l2_cache.get_dirty(key) {
            let targets = slice.get_mut(at..).unwrap_or_default().chunks_exact_mut(entry_bytes);
            for (target, words) in targets.zip(entries) {
                for (part, word) in target.chunks_exact_mut(8).zip(words) {
                    part.copy_from_slice(&word.to_be_bytes());
                }
            }
        }
        Ok(())
    }
}
