//! Host clusters: refcounts, handing out, giving back, growing the refcount structures.

use image::qcow2::refcount;

use super::Tables;
use crate::blkdebug::Event;
use crate::error::BlockError;

/// Frees kept back before a commit is forced.
const PENDING_FREES_MAX: usize = 1 << 16;
/// Table entries hold host offsets below 2^56.
const HOST_OFFSET_BITS: u32 = 56;

impl Tables {
    /// Cached slice, index in it, for a cluster's refcount; `None` where no refcount block covers it.
    fn refcount_slot(&self, cluster: u64) -> Option<(u64, usize)> {
        let bits = self.geometry.refblock_bits();
        let block = *self.reftable.get(usize::try_from(cluster >> bits).ok()?)?;
        if block == 0 {
            return None;
        }
        let per_slice = (self.geometry.slice_bytes() << 3) >> self.geometry.refcount_order;
        let index = cluster & (self.geometry.refblock_entries() - 1);
        Some((block + index / per_slice * self.geometry.slice_bytes(), (index % per_slice) as usize))
    }

    fn load_refcounts(&mut self, key: u64) -> Result<(), BlockError> {
        if self.refcount_cache.contains(key) {
            return Ok(());
        }
        if self.refcount_cache.is_crowded() {
            self.write_refcounts()?;
        }
        let (file, path) = (&self.file, &self.path);
        file.event(Event::REFBLOCK_LOAD);
        self.refcount_cache.insert(key, |slice| {
            let read = file.read_at(key, &crate::sys::ReadBufs::from_slice(slice));
            read.map_err(|e| BlockError::io(path, crate::error::Action::Read, e))
        })
    }

    pub(super) fn refcount(&mut self, cluster: u64) -> Result<u64, BlockError> {
        let Some((key, index)) = self.refcount_slot(cluster) else { return Ok(0) };
        self.load_refcounts(key)?;
        let slice = self.refcount_cache.get(key).unwrap_or_default();
        Ok(refcount::get(slice, self.geometry.refcount_order, index).unwrap_or(0))
    }

    /// Drops one reference in memory. Returns whether it was the last.
    pub(super) fn drop_reference(&mut self, cluster: u64) -> Result<bool, BlockError> {
        // One less than what is stored always fits.
        let left = self.change_references(cluster, |count| count - 1)?;
        if left == 0 && self.packed_end >> self.geometry.cluster_bits == cluster {
            self.packed_end = 0;
        }
        Ok(left == 0)
    }

    /// Adds one reference in memory to a cluster whose refcount is not at its limit.
    pub(super) fn add_reference(&mut self, cluster: u64) -> Result<(), BlockError> {
        self.change_references(cluster, |count| count + 1).map(|_| ())
    }

    /// Changes the refcount of a cluster that is in use; returns the new one, which must fit.
    fn change_references(&mut self, cluster: u64, change: impl FnOnce(u64) -> u64) -> Result<u64, BlockError> {
        let count = self.refcount(cluster)?;
        let Some((key, index)) = self.refcount_slot(cluster).filter(|_| count > 0) else {
            let offset = cluster << self.geometry.cluster_bits;
            return Err(BlockError::RefcountZero { path: self.path.clone(), offset });
        };
        let changed = change(count);
        let slice = self.refcount_cache.get_dirty(key).unwrap_or_default();
        let stored = refcount::set(slice, self.geometry.refcount_order, index, changed);
        debug_assert!(stored, "the caller looked at the limit");
        Ok(changed)
    }

    /// Takes back clusters that were handed out and that no table refers to.
    pub(super) fn give_back(&mut self, cluster: u64, count: u64) -> Result<(), BlockError> {
        for cluster in cluster..cluster + count {
            self.drop_reference(cluster)?;
        }
        self.free_hint = self.free_hint.min(cluster);
        Ok(())
    }

    /// Every cluster that the range touches loses a reference, after the next commit.
    pub(super) fn free_later(&mut self, offset: u64, bytes: u64) {
        let bits = self.geometry.cluster_bits;
        let last = offset.saturating_add(bytes.saturating_sub(1)) >> bits;
        self.pending_frees.extend(offset >> bits..=last);
    }

    /// Commits when much waits for it. Called between requests, when no table is half changed.
    pub(super) fn relieve(&mut self) -> Result<(), BlockError> {
        if self.pending_frees.len() > PENDING_FREES_MAX { self.commit() } else { Ok(()) }
    }

    /// Hands out up to `want` consecutive clusters, at least one, with a refcount of one each in memory.
    pub(super) fn alloc_run(&mut self, want: u64) -> Result<(u64, u64), BlockError> {
        let per_slice = (self.geometry.slice_bytes() << 3) >> self.geometry.refcount_order;
        let mut cluster = self.free_hint.max(1);
        self.file.event(Event::CLUSTER_ALLOC);
        loop {
            if cluster >> (HOST_OFFSET_BITS - self.geometry.cluster_bits) != 0 {
                return Err(BlockError::RefcountTableFull { path: self.path.clone() });
            }
            let Some((key, index)) = self.refcount_slot(cluster) else {
                self.new_refcount_block(cluster >> self.geometry.refblock_bits())?;
                continue;
            };
            self.load_refcounts(key)?;
            let order = self.geometry.refcount_order;
            let slice = self.refcount_cache.get(key).unwrap_or_default();
            let is_free = |index: usize| refcount::get(slice, order, index) == Some(0);
            let Some(first) = (index..per_slice as usize).find(|index| is_free(*index)) else {
                cluster += per_slice - index as u64;
                continue;
            };
            let count = (first..per_slice as usize).take(want as usize).take_while(|index| is_free(*index)).count();
            cluster += (first - index) as u64;
            self.take(cluster, count as u64, key, first)?;
            return Ok((cluster, count as u64));
        }
    }

    fn take(&mut self, cluster: u64, count: u64, key: u64, index: usize) -> Result<(), BlockError> {
        if let Some(table) = (cluster..cluster + count).find(|cluster| self.table_clusters.contains(cluster)) {
            let offset = table << self.geometry.cluster_bits;
            return Err(BlockError::FreeTable { path: self.path.clone(), offset });
        }
        let order = self.geometry.refcount_order;
        let slice = self.refcount_cache.get_dirty(key).unwrap_or_default();
        for index in index..index + count as usize {
            // 1 fits every width, and the index was found in this slice.
            let _ = refcount::set(slice, order, index, 1);
        }
        self.free_hint = cluster + count;
        self.file_clusters = self.file_clusters.max(self.free_hint);
        Ok(())
    }

    /// A refcount block for clusters that have none yet. It lies in the first of them and counts itself; it
    /// is in the file before the refcount table refers to it.
    fn new_refcount_block(&mut self, index: u64) -> Result<(), BlockError> {
        if index >= self.reftable.len() as u64 {
            return self.grow_reftable();
        }
        let cluster = index << self.geometry.refblock_bits();
        let offset = cluster << self.geometry.cluster_bits;
        if self.table_clusters.contains(&cluster) {
            return Err(BlockError::FreeTable { path: self.path.clone(), offset });
        }
        self.file.event(Event::REFBLOCK_ALLOC);
        let mut block = vec![0; self.geometry.cluster_bytes() as usize];
        let _ = refcount::set(&mut block, self.geometry.refcount_order, 0, 1);
        self.file.event(Event::REFBLOCK_ALLOC_WRITE);
        self.write_file(offset, &block)?;
        self.refcount_cache.forget(offset, self.geometry.cluster_bytes());
        if let Some(entry) = self.reftable.get_mut(index as usize) {
            *entry = offset;
        }
        self.reftable_dirty.insert(index as usize);
        self.table_clusters.insert(cluster);
        self.file_clusters = self.file_clusters.max(cluster + 1);
        Ok(())
    }

    /// A larger refcount table behind everything the present one covers, with the blocks that count it.
    /// All of it is in the file before anything in memory changes.
    fn grow_reftable(&mut self) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let (bits, bytes) = (geometry.cluster_bits, geometry.cluster_bytes());
        let old_entries = self.reftable.len() as u64;
        let start = old_entries << geometry.refblock_bits();
        let (table_clusters, blocks) = larger_table(&geometry, old_entries);
        if table_clusters * bytes > image::qcow2::REFTABLE_MAX_BYTES.max(bytes) {
            return Err(BlockError::RefcountTableFull { path: self.path.clone() });
        }
        self.file.event(Event::REFTABLE_GROW);
        let mut table = self.reftable.clone();
        self.file.event(Event::REFBLOCK_ALLOC_WRITE_BLOCKS);
        for block in 0..blocks {
            let used = (blocks + table_clusters)
                .saturating_sub(block * geometry.refblock_entries())
                .min(geometry.refblock_entries());
            let mut contents = vec![0; bytes as usize];
            for index in 0..used {
                let _ = refcount::set(&mut contents, geometry.refcount_order, index as usize, 1);
            }
            self.write_file((start + block) << bits, &contents)?;
            table.push((start + block) << bits);
        }
        table.resize((table_clusters * bytes / 8) as usize, 0);
        let raw: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table_offset = (start + blocks) << bits;
        self.file.event(Event::REFBLOCK_ALLOC_WRITE_TABLE);
        self.write_file(table_offset, &raw)?;

        let (old_offset, old_clusters) = (self.header.reftable_offset, u64::from(self.header.reftable_clusters));
        self.free_later(old_offset, old_clusters << bits);
        for cluster in (old_offset >> bits)..(old_offset >> bits) + old_clusters {
            self.table_clusters.remove(&cluster);
        }
        let end = start + blocks + table_clusters;
        self.table_clusters.extend(start..end);
        self.refcount_cache.forget(start << bits, (end - start) << bits);
        self.reftable = table;
        self.reftable_dirty.clear();
        self.reftable_moved = true;
        self.header.reftable_offset = table_offset;
        self.header.reftable_clusters = table_clusters as u32;
        self.file_clusters = self.file_clusters.max(end);
        Ok(())
    }
}

/// Clusters of a table half again as large, and refcount blocks for itself and them behind the old end.
fn larger_table(geometry: &image::qcow2::Geometry, old_entries: u64) -> (u64, u64) {
    let (mut table_clusters, mut blocks) = (1u64, 1u64);
    loop {
        let want_blocks: u64 = (blocks + table_clusters).div_ceil(geometry.refblock_entries()).max(blocks);
        let want_entries = (old_entries + old_entries / 2).max(old_entries + want_blocks);
        let want_clusters = (want_entries * 8).div_ceil(geometry.cluster_bytes());
        if (want_clusters, want_blocks) == (table_clusters, blocks) {
            return (table_clusters, blocks);
        }
        (table_clusters, blocks) = (want_clusters, want_blocks);
    }
}
