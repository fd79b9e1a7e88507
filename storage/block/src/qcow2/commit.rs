//! Writing tables back, in an order that a crash cannot turn into damage.
//!
//! Between commits the tables on disk describe the state of the last one. New clusters have been counted and
//! filled, but only in places nothing on disk refers to. A commit then goes in three steps, each behind a barrier:
//!
//! 1. refcounts that went up (and, behind a barrier of their own when there are any, the refcount table entries
//!    and the header field that make new refcount blocks count);
//! 2. L2 and L1 entries: what they refer to, data, tables and refcounts, is on disk already;
//! 3. after that, references that entries gave up are dropped in memory: the clusters may be punched and handed out
//!    again, because no table on disk refers to them. Their refcounts reach the disk with the next commit.
//!
//! So a refcount on disk is never lower than the references on disk. QEMU reaches the same with two caches that
//! depend on each other (`block/qcow2-cache.c`); holding frees back needs no dependencies and at most two
//! barriers for a commit that allocates.

use image::qcow2::REFTABLE_POINTER_OFFSET;

use super::Qcow2Node;
use crate::error::{Action, BlockError};

impl Qcow2Node {
    /// Everything the guest wrote before is on stable storage when this returns.
    pub(crate) fn flush(&mut self) -> Result<(), BlockError> {
        if self.options.read_only {
            return Ok(());
        }
        self.check_writable()?;
        let result = self.commit();
        self.noticing(result)
    }

    pub(super) fn commit(&mut self) -> Result<(), BlockError> {
        self.write_refcounts()?;
        if !self.reftable_dirty.is_empty() || self.reftable_moved {
            self.barrier()?;
            self.write_reftable()?;
        }
        if self.l2_cache.has_dirty() || !self.l1_dirty.is_empty() {
            self.barrier()?;
            self.write_mappings()?;
        }
        self.barrier()?;
        self.release()
    }

    /// Writes dirty refcounts. Harmless at any time: nothing on disk refers to what they newly count, and
    /// what they count no more is referred to by nothing on disk.
    pub(super) fn write_refcounts(&mut self) -> Result<(), BlockError> {
        for key in self.refcount_cache.dirty_keys() {
            let slice = self.refcount_cache.get(key).unwrap_or_default();
            let write = self.file.write_at(key, &crate::sys::WriteBufs::from_slice(slice));
            write.map_err(|e| BlockError::io(&self.path, Action::Write, e))?;
            self.refcount_cache.mark_clean(key);
        }
        Ok(())
    }

    fn write_reftable(&mut self) -> Result<(), BlockError> {
        while let Some(index) = self.reftable_dirty.first().copied() {
            let entry = self.reftable.get(index).copied().unwrap_or(0);
            self.write_file(self.header.reftable_offset + index as u64 * 8, &entry.to_be_bytes())?;
            self.reftable_dirty.remove(&index);
        }
        if self.reftable_moved {
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
            let write = self.file.write_at(key, &crate::sys::WriteBufs::from_slice(slice));
            write.map_err(|e| BlockError::io(&self.path, Action::Write, e))?;
            self.l2_cache.mark_clean(key);
        }
        while let Some(index) = self.l1_dirty.first().copied() {
            let entry = self.l1.get(index).copied().unwrap_or(0);
            self.write_file(self.header.l1_offset + index as u64 * 8, &entry.to_be_bytes())?;
            self.l1_dirty.remove(&index);
        }
        Ok(())
    }

    /// Drops the references that no table on disk holds any more. A cluster is punched before it can be
    /// handed out, so that a late punch cannot hit its next owner.
    fn release(&mut self) -> Result<(), BlockError> {
        self.pending_frees.sort_unstable_by(|a, b| b.cmp(a));
        let mut hole = 0..0;
        while let Some(cluster) = self.pending_frees.last().copied() {
            let last = self.drop_reference(cluster)?;
            self.pending_frees.pop();
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
