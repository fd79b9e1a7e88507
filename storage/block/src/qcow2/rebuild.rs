//! Rebuilding refcounts of an image whose last writer kept them lazily and did not close it.

use std::collections::BTreeMap;

use image::qcow2::check::{Counts, count_references};
use image::qcow2::{Geometry, INCOMPAT_DIRTY, INCOMPAT_OFFSET, REFTABLE_MAX_BYTES, REFTABLE_POINTER_OFFSET, refcount};

use super::Tables;
use super::rewrite::Place;
use crate::error::{Action, BlockError};
use crate::sys::ReadBufs;

impl Tables {
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
        let place = Place { file: &*self.file, path: &self.path };
        let new = write_refcounts_anew(place, &self.geometry, counts)?;
        self.barrier()?;
        self.write_file(REFTABLE_POINTER_OFFSET, &new.pointer())?;
        self.barrier()?;
        self.header.reftable_offset = new.table_offset;
        self.header.reftable_clusters = new.table_clusters;
        self.file_clusters = new.end_cluster.max(self.file_clusters);
        Ok(())
    }
}

/// New refcount structures in the file, which nothing refers to yet.
pub(super) struct NewRefcounts {
    table_offset: u64,
    table_clusters: u32,
    end_cluster: u64,
}

impl NewRefcounts {
    /// Offset and clusters of the refcount table.
    pub(super) fn table(&self) -> (u64, u32) {
        (self.table_offset, self.table_clusters)
    }

    /// The header's twelve bytes that make them count; they lie in one sector.
    pub(super) fn pointer(&self) -> [u8; 12] {
        let mut pointer = [0; 12];
        pointer[..8].copy_from_slice(&self.table_offset.to_be_bytes());
        pointer[8..].copy_from_slice(&self.table_clusters.to_be_bytes());
        pointer
    }
}

/// The first cluster behind everything: what is in use, and what a file holds that no table knows of. How long a device
/// is says nothing of that.
fn first_behind(place: Place<'_>, geometry: &Geometry, counts: &Counts) -> Result<u64, BlockError> {
    if place.file.keeps_len() {
        return Ok(counts.end());
    }
    let file_bytes = place.file.len_bytes().map_err(|e| BlockError::io(place.path, Action::Stat, e))?;
    Ok(counts.end().max(file_bytes.div_ceil(geometry.cluster_bytes())))
}

/// Writes refcount blocks and a table for `counts` and themselves, behind everything in use.
pub(super) fn write_refcounts_anew(
    place: Place<'_>,
    geometry: &Geometry,
    counts: &Counts,
) -> Result<NewRefcounts, BlockError> {
    let start = first_behind(place, geometry, counts)?;
    let bits = geometry.cluster_bits;
    let Some((by_block, table_clusters)) = arrange(geometry, counts, start) else {
        return Err(BlockError::RefcountTableFull { path: place.path.to_owned() });
    };
    let blocks = by_block.len() as u64;
    let mut table = vec![0u8; (table_clusters << bits) as usize];
    for ((block_index, block), cluster) in by_block.iter().zip(start..) {
        let mut contents = vec![0; geometry.cluster_bytes() as usize];
        for (index, count) in block {
            // Checked against the width by the callers.
            let _ = refcount::set(&mut contents, geometry.refcount_order, *index, *count);
        }
        let offset = cluster << bits;
        place.write(offset, &contents)?;
        if let Some(entry) = table.chunks_exact_mut(8).nth(*block_index as usize) {
            entry.copy_from_slice(&offset.to_be_bytes());
        }
    }
    let table_offset = (start + blocks) << bits;
    place.write(table_offset, &table)?;
    let end_cluster = start + blocks + table_clusters;
    Ok(NewRefcounts { table_offset, table_clusters: table_clusters as u32, end_cluster })
}

/// Refcounts by refcount block, each with its index in the block.
type Blocks = BTreeMap<u64, Vec<(usize, u64)>>;

/// Which refcount blocks are needed for `counts` and for the new blocks and table themselves, which lie from
/// `start` on; and the clusters of the table. A block without references is left out, so that a sparse file
/// costs nothing. `None` when the table would be larger than the format's limit.
fn arrange(geometry: &Geometry, counts: &Counts, start: u64) -> Option<(Blocks, u64)> {
    let mut used = Blocks::new();
    let add = |blocks: &mut Blocks, cluster: u64, count: u64| {
        let index = (cluster & (geometry.refblock_entries() - 1)) as usize;
        blocks.entry(cluster >> geometry.refblock_bits()).or_default().push((index, count));
    };
    counts.iter().for_each(|(cluster, count)| add(&mut used, cluster, count));
    let (mut block_count, mut table_clusters) = (used.len() as u64, 1);
    loop {
        let last_block = (start + block_count + table_clusters - 1) >> geometry.refblock_bits();
        let own = (last_block + 1).saturating_sub(start >> geometry.refblock_bits());
        let shared = u64::from(used.contains_key(&(start >> geometry.refblock_bits())));
        let want_blocks = used.len() as u64 + own - shared;
        let want_table = ((last_block + 1) * 8).div_ceil(geometry.cluster_bytes());
        if want_table * geometry.cluster_bytes() > REFTABLE_MAX_BYTES.max(geometry.cluster_bytes()) {
            return None;
        }
        if (want_blocks, want_table) == (block_count, table_clusters) {
            break;
        }
        (block_count, table_clusters) = (want_blocks.max(block_count), want_table.max(table_clusters));
    }
    (start..start + block_count + table_clusters).for_each(|cluster| add(&mut used, cluster, 1));
    Some((used, table_clusters))
}
