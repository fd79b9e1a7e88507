//! Writing tables back, in an order that a crash cannot turn into damage.
//!
//! Between commits the tables on disk describe the state of the last one. New clusters have been counted and
//! filled, but only in places nothing on disk refers to. A commit then goes in three steps, each behind a barrier:
//!
//! 1. refcounts that went up (and, behind a barrier of their own when there are any, the refcount table entries
//!    and the header field that make new refcount blocks count);
//! 2. L2 and L1 entries: what they refer to, data, tables and refcounts, is on disk already;
//! 3. after that, and after the requests in flight that looked them up, references that entries gave up are dropped in memory: the clusters may be punched and handed out
//!    again, because no table on disk refers to them. Their refcounts reach the disk with the next commit.
//!
//! So a refcount on disk is never lower than the references on disk. QEMU reaches the same with two caches that
//! depend on each other (`block/qcow2-cache.c`); holding frees back needs no dependencies and at most two
//! barriers for a commit that allocates.

use image::qcow2::REFTABLE_POINTER_OFFSET;

use super::Tables;
use crate::blkdebug::Event;
use crate::error::{Action, BlockError};

impl Tables {
    /// All three steps, in the middle of other work.
    pub(super) fn commit(&mut self) -> Result<(), BlockError> {
        self.commit_tables()?;
        self.barrier()?;
        let frees = std::mem::take(&mut self.pending_frees);
        self.retire(frees)
    }

    /// Whether the tables on disk differ from those in memory, or clusters wait to be dropped.
    pub(super) fn is_dirty(&self) -> bool {
        let tables = self.l2_cache.has_dirty() || !self.l1_dirty.is_empty() || self.refcount_cache.has_dirty();
        let refcount_table = self.reftable_moved || !self.reftable_dirty.is_empty();
        tables || refcount_table || !self.pending_frees.is_empty() || !self.leaving.is_empty()
    }

    /// Steps 1 and 2. What entries gave up may be retired after one more barrier.
    pub(super) fn commit_tables(&mut self) -> Result<(), BlockError> {
        self.write_refcounts()?;
        if !self.reftable_dirty.is_empty() || self.reftable_moved {
            self.barrier()?;
            self.write_reftable()?;
        }
        if self.l2_cache.has_dirty() || !self.l1_dirty.is_empty() {
            self.barrier()?;
            self.write_mappings()?;
        }
        Ok(())
    }

    /// Writes dirty refcounts. Harmless at any time: nothing on disk refers to what they newly count, and
    /// what they count no more is referred to by nothing on disk.
    pub(super) fn write_refcounts(&mut self) -> Result<(), BlockError> {
        for key in self.refcount_cache.dirty_keys() {
            let slice = self.refcount_cache.get(key).unwrap_or_default();
            self.file.event(Event::REFBLOCK_UPDATE_PART);
            let write = self.file.write_at(key, &crate::sys::WriteBufs::from_slice(slice));
            write.map_err(|e| BlockError::io(&self.path, Action::Write, e))?;
            self.refcount_cache.mark_clean(key);
        }
        Ok(())
    }

    fn write_reftable(&mut self) -> Result<(), BlockError> {
        while let Some(index) = self.reftable_dirty.first().copied() {
            let entry = self.reftable.get(index).copied().unwrap_or(0);
            self.file.event(Event::REFBLOCK_ALLOC_HOOKUP);
            self.write_file(self.header.reftable_offset + index as u64 * 8, &entry.to_be_bytes())?;
            self.reftable_dirty.remove(&index);
        }
        if self.reftable_moved {
            self.file.event(Event::REFBLOCK_ALLOC_SWITCH_TABLE);
            // Twelve bytes of one sector: they change together.
            let mut pointer = [0; 12];
            pointer[..8].copy_from_slice(&self.header.reftable_offset.to_be_bytes());
            pointer[8..].copy_from_slice(&self.header.reftable_clusters.to_be_bytes());
            self.write_file(REFTABLE_POINTER_OFFSET, &pointer)?;
            self.reftable_moved = false;
        }
        Ok(())
    }

    fn write_mappings(&mut self) -> Result<(), BlockError> {
        for key in self.l2_cache.dirty_keys() {
            let slice = self.l2_cache.get(key).unwrap_or_default();
            self.file.event(Event::L2_UPDATE);
            let write = self.file.write_at(key, &crate::sys::WriteBufs::from_slice(slice));
            write.map_err(|e| BlockError::io(&self.path, Action::Write, e))?;
            self.l2_cache.mark_clean(key);
        }
        while let Some(index) = self.l1_dirty.first().copied() {
            let entry = self.l1.get(index).copied().unwrap_or(0);
            self.file.event(Event::L1_UPDATE);
            self.write_file(self.header.l1_offset + index as u64 * 8, &entry.to_be_bytes())?;
            self.l1_dirty.remove(&index);
        }
        Ok(())
    }

    /// Step 3 for clusters that no table on disk refers to any more, except those that a request in flight may
    /// still read or write: they wait for a later commit.
    pub(super) fn retire(&mut self, mut frees: Vec<u64>) -> Result<(), BlockError> {
        if !frees.is_empty() {
            frees.sort_unstable_by(|a, b| b.cmp(a));
            self.leaving.push_back((self.generation, frees));
        }
        // A generation opens when the one before the last has landed: two counters tell them apart.
        if self.flights.landed(self.generation + 1) {
            self.generation += 1;
        }
        while let Some((generation, mut frees)) = self.leaving.pop_front() {
            let landed = match self.generation - generation {
                0 => false,
                1 => self.flights.landed(generation),
                _ => true,
            };
            let released = if landed { self.release(&mut frees) } else { Ok(()) };
            if !frees.is_empty() {
                self.leaving.push_front((generation, frees));
                return released;
            }
            released?;
        }
        Ok(())
    }

    /// Drops references, the last element's first. A cluster is punched before it can be handed out, so that a
    /// late punch cannot hit its next owner.
    fn release(&mut self, frees: &mut Vec<u64>) -> Result<(), BlockError> {
        self.releases += 1;
        self.file.event(Event::CLUSTER_FREE);
        let mut hole = 0..0;
        while let Some(cluster) = frees.last().copied() {
            let last = self.drop_reference(cluster)?;
            frees.pop();
            if !last {
                continue;
            }
            self.free_hint = self.free_hint.min(cluster);
            if hole.end != cluster {
                self.punch(&hole)?;
                hole = cluster..cluster;
            }
            hole.end = cluster + 1;
        }
        self.punch(&hole)
    }

    fn punch(&self, clusters: &std::ops::Range<u64>) -> Result<(), BlockError> {
        if !self.options.punch_freed || clusters.is_empty() {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let bytes = (clusters.end - clusters.start) << bits;
        self.file.punch_hole(clusters.start << bits, bytes).map_err(|e| self.io(Action::Discard, e))
    }
}
