//! Rebuilding refcounts of an image whose last writer kept them lazily and did not close it.

use image::qcow2::check::{Counts, count_references};
use image::qcow2::{INCOMPAT_DIRTY, INCOMPAT_OFFSET, REFTABLE_POINTER_OFFSET, layout, refcount};

use super::Qcow2Node;
use crate::error::{Action, BlockError};
use crate::sys::ReadBufs;

impl Qcow2Node {
    /// Counts all references and writes new refcount structures behind everything in use; the header then
    /// changes to them, and last the dirty bit goes. A crash before that leaves the image as dirty as it was.
    pub(super) fn rebuild_refcounts(&mut self) -> Result<(), BlockError> {
        let file_bytes = self.file.len_bytes().map_err(|e| self.io(Action::Stat, e))?;
        let mut read = |offset: u64, out: &mut [u8]| self.file.read_at(offset, &ReadBufs::from_slice(out));
        let report = count_references(&self.header, file_bytes, &mut read)
            .map_err(|source| BlockError::Rebuild { path: self.path.clone(), source })?;
        let too_many = report.counts.iter().find(|(_, count)| *count > self.geometry.refcount_max());
        if report.corruptions > 0 || too_many.is_some() {
            let first = report.findings.first().cloned();
            let first = first.unwrap_or_else(|| format!("{too_many:?} is more than a refcount can hold"));
            let corruptions = report.corruptions.max(1);
            return Err(BlockError::Unrepairable { path: self.path.clone(), corruptions, first });
        }
        self.write_new_structures(&report.counts)?;
        self.header.incompatible &= !INCOMPAT_DIRTY;
        self.write_file(INCOMPAT_OFFSET, &self.header.incompatible.to_be_bytes())?;
        self.barrier()
    }

    fn write_new_structures(&mut self, counts: &Counts) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits;
        let start = counts.end().max(self.file_clusters);
        let (table_clusters, blocks) = layout::refcount_clusters(&geometry, start);
        if table_clusters << bits > image::qcow2::REFTABLE_MAX_BYTES.max(1 << bits) {
            return Err(BlockError::RefcountTableFull { path: self.path.clone() });
        }
        let end = start + blocks + table_clusters;
        let mut by_block: Vec<Vec<(usize, u64)>> = vec![Vec::new(); blocks as usize];
        let own = (start..end).map(|cluster| (cluster, 1));
        for (cluster, count) in counts.iter().chain(own) {
            if let Some(block) = by_block.get_mut((cluster >> geometry.refblock_bits()) as usize) {
                block.push(((cluster & (geometry.refblock_entries() - 1)) as usize, count));
            }
        }
        let mut table = vec![0u8; (table_clusters << bits) as usize];
        for ((index, block), entry) in by_block.iter().enumerate().zip(table.chunks_exact_mut(8)) {
            let mut contents = vec![0; geometry.cluster_bytes() as usize];
            for (index, count) in block {
                // Checked against the width above.
                let _ = refcount::set(&mut contents, geometry.refcount_order, *index, *count);
            }
            let offset = (start + index as u64) << bits;
            self.write_file(offset, &contents)?;
            entry.copy_from_slice(&offset.to_be_bytes());
        }
        let table_offset = (start + blocks) << bits;
        self.write_file(table_offset, &table)?;
        self.barrier()?;
        let mut pointer = [0; 12];
        pointer[..8].copy_from_slice(&table_offset.to_be_bytes());
        pointer[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
        self.write_file(REFTABLE_POINTER_OFFSET, &pointer)?;
        self.barrier()?;
        self.header.reftable_offset = table_offset;
        self.header.reftable_clusters = table_clusters as u32;
        self.file_clusters = end;
        Ok(())
    }
}
