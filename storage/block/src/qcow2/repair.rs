//! Checking an image and mending what is wrong.
//!
//! A repair only writes what the check found. Refcounts go up or down in place where the structures are sound, and
//! are written anew otherwise; entries that point nowhere read as zeroes afterwards. The bits that keep writers away
//! go last, when a second check finds no damage, so that a power cut leaves an image that still needs the repair.

use std::path::Path;

use image::qcow2::check::{CheckError, Report, check, count_references, owned_cluster, with_copied};
use image::qcow2::{
    Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, INCOMPAT_OFFSET, L1Entry, OFFSET_MASK, REFTABLE_POINTER_OFFSET, refcount,
};

use super::maintenance::Qcow2Image;
use super::read_header;
use super::rebuild::write_refcounts_anew;
use super::rewrite::{Place, word, words};
use crate::chain::{ChainFile, Checked};
use crate::disk::ChainBackend;
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::ReadBufs;

/// What a repair mends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clusters that are counted and not used are given back; damage stays.
    Leaks,
    /// Everything.
    All,
}

/// What a repair did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// What the check before found.
    pub before: Checked,
    /// Clusters given back.
    pub leaks_fixed: u64,
    /// Contradictions that are gone.
    pub corruptions_fixed: u64,
    /// What a check afterwards finds.
    pub after: Checked,
}

/// Checks a qcow2 image that nobody else uses, and mends it. An image without faults is not written to, except for bits
/// that said it had some.
pub fn repair_image(file: ChainFile, what: Repair) -> Result<Repaired, BlockError> {
    repair_backend(ChainBackend::from_file(file)?, what)
}

/// As [`repair_image`], over a backend other than a host file.
pub fn repair_backend(layer: ChainBackend, what: Repair) -> Result<Repaired, BlockError> {
    let ChainBackend { file, path_label, format, extents } = layer;
    if format != image::Format::Qcow2 {
        let option = image::Format::Qcow2;
        return Err(BlockError::FormatDisagrees { path: path_label, opened: format, option });
    }
    let place = Place { file: &*file, path: &path_label };
    let header = read_header(&*file, &path_label)?;
    let found = walk(place, &header)?;
    let before = checked(&header, &found);
    let mut mender = Mender { place, header };
    match what {
        // What looks unused may belong to the part that nobody can read, and be all that is left of it.
        _ if found.references_unknown => {}
        Repair::Leaks => mender.lower_refcounts(&found)?,
        Repair::All => mender.mend_all(&found)?,
    }
    mender.barrier()?;
    let after = walk(place, &mender.header)?;
    let incomplete = if what == Repair::All { after.incomplete_snapshots } else { 0 };
    if after.corruptions == incomplete {
        mender.clear_marks()?;
    }
    let mut after = checked(&mender.header, &after);
    if incomplete > 0 && after.corruptions == incomplete {
        after = complete_snapshots(ChainBackend { file, path_label, format, extents })?;
    }
    Ok(Repaired {
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        before,
        after,
    })
}

/// Writes the snapshot table of an image without other damage anew, with all that version 3 demands.
fn complete_snapshots(layer: ChainBackend) -> Result<Checked, BlockError> {
    let image = Qcow2Image::open_backend(layer, false)?;
    image.rewrite_snapshot_table()?;
    let tables = image.node.tables.lock();
    check_file(&*tables.file, &tables.path)
}

/// What a check says, in numbers.
pub(crate) fn checked(header: &Header, report: &Report) -> Checked {
    let cluster_bytes = header.geometry.cluster_bytes();
    Checked {
        corruptions: report.corruptions,
        leaks: report.leaks,
        allocated_clusters: report.allocated_clusters,
        compressed_clusters: report.compressed_clusters,
        fragmented_clusters: report.fragmented_clusters,
        total_clusters: header.geometry.size_bytes.div_ceil(cluster_bytes),
        image_end_bytes: report.end_cluster.saturating_mul(cluster_bytes),
        findings: report.findings.clone(),
    }
}

fn walk(place: Place<'_>, header: &Header) -> Result<Report, BlockError> {
    let file_bytes = file_bytes(place)?;
    let mut read = |offset: u64, out: &mut [u8]| place.file.read_at(offset, &ReadBufs::from_slice(out));
    check(header, file_bytes, &mut read).map_err(|source| refused(place.path, source))
}

fn refused(path: &Path, source: CheckError<std::io::Error>) -> BlockError {
    BlockError::CheckFailed { path: path.to_owned(), source }
}

fn file_bytes(place: Place<'_>) -> Result<u64, BlockError> {
    place.file.len_bytes().map_err(|e| BlockError::io(place.path, Action::Stat, e))
}

struct Mender<'f> {
    place: Place<'f>,
    header: Header,
}

impl Mender<'_> {
    fn barrier(&self) -> Result<(), BlockError> {
        self.place.file.sync_data().map_err(|e| BlockError::io(self.place.path, Action::Sync, e))
    }

    fn mend_all(&mut self, found: &Report) -> Result<(), BlockError> {
        for fix in &found.fixes {
            let mut raw = fix.raw.to_be_bytes().to_vec();
            raw.extend(fix.bitmap.iter().flat_map(|bitmap| bitmap.to_be_bytes()));
            self.place.write(fix.at, &raw)?;
        }
        if !found.fixes.is_empty() {
            self.barrier()?;
        }
        if found.refcounts_unusable {
            self.write_refcounts_anew()?;
        } else if found.corruptions > 0 || found.leaks > 0 {
            self.set_refcounts(found, |counted, referenced| counted != referenced)?;
        }
        // Counts first: a flag says that a count is one.
        self.barrier()?;
        self.set_flags()
    }

    /// Gives leaked clusters back, where the structures allow it.
    fn lower_refcounts(&mut self, found: &Report) -> Result<(), BlockError> {
        if found.leaks == 0 || found.refcounts_unusable {
            return Ok(());
        }
        self.set_refcounts(found, |counted, referenced| counted > referenced)?;
        if found.corruptions > 0 {
            return Ok(());
        }
        // A cluster that was counted for another has one owner again, who may say so.
        self.barrier()?;
        self.set_flags()
    }

    /// Stores the number of references of each cluster that `wanted` picks by its refcount and that number.
    fn set_refcounts(&mut self, found: &Report, wanted: impl Fn(u64, u64) -> bool) -> Result<(), BlockError> {
        let geometry = self.header.geometry;
        let order = geometry.refcount_order;
        let mut table = vec![0; (u64::from(self.header.reftable_clusters) * geometry.cluster_bytes()) as usize];
        self.place.read(self.header.reftable_offset, &mut table)?;
        for (index, raw) in (0u64..).zip(words(&table)) {
            let offset = raw & OFFSET_MASK;
            if offset == 0 || !geometry.is_aligned(offset) {
                continue;
            }
            let mut block = vec![0; geometry.cluster_bytes() as usize];
            self.place.read(offset, &mut block)?;
            let first = index << geometry.refblock_bits();
            let mut changed = false;
            for within in 0..geometry.refblock_entries() {
                let counted = refcount::get(&block, order, within as usize).unwrap_or(0);
                let referenced = found.counts.get(first + within);
                // More references than fit stay as they are, and the check afterwards says so.
                if wanted(counted, referenced) {
                    changed |= refcount::set(&mut block, order, within as usize, referenced);
                }
            }
            if changed {
                self.place.write(offset, &block)?;
            }
        }
        Ok(())
    }

    fn write_refcounts_anew(&mut self) -> Result<(), BlockError> {
        let geometry = self.header.geometry;
        let file_bytes = file_bytes(self.place)?;
        let mut read = |offset: u64, out: &mut [u8]| self.place.file.read_at(offset, &ReadBufs::from_slice(out));
        let found =
            count_references(&self.header, file_bytes, &mut read).map_err(|source| refused(self.place.path, source))?;
        if let Some((cluster, _)) = found.counts.iter().find(|(_, count)| *count > geometry.refcount_max()) {
            let first = format!("cluster {cluster} has more references than a refcount can hold");
            let path = self.place.path.to_owned();
            return Err(BlockError::Unrepairable { path, corruptions: found.corruptions.max(1), first });
        }
        let new = write_refcounts_anew(self.place, &geometry, &found.counts)?;
        self.barrier()?;
        self.place.write(REFTABLE_POINTER_OFFSET, &new.pointer())?;
        self.barrier()?;
        self.header = read_header(self.place.file, self.place.path)?;
        Ok(())
    }

    /// Makes the flags of the active tables say what the references are.
    fn set_flags(&mut self) -> Result<(), BlockError> {
        let geometry = self.header.geometry;
        let found = walk(self.place, &self.header)?;
        let limit = file_bytes(self.place)?.next_multiple_of(geometry.cluster_bytes());
        let mut raw_l1 = vec![0; self.header.l1_entries as usize * 8];
        if self.header.l1_offset.saturating_add(raw_l1.len() as u64) > limit {
            return Ok(());
        }
        self.place.read(self.header.l1_offset, &mut raw_l1)?;
        let owned = |host: u64| found.counts.get(host >> geometry.cluster_bits) == 1;
        for (index, raw) in (0u64..).zip(words(&raw_l1)) {
            let Ok(L1Entry { table: Some(offset), .. }) = L1Entry::decode(raw, &geometry) else { continue };
            if offset >= limit {
                continue;
            }
            let want = with_copied(raw, owned(offset));
            if want != raw {
                self.place.write(self.header.l1_offset + index * 8, &want.to_be_bytes())?;
            }
            let mut table = vec![0; geometry.cluster_bytes() as usize];
            self.place.read(offset, &mut table)?;
            let mut changed = false;
            for entry in table.chunks_exact_mut(geometry.l2_entry_bytes() as usize) {
                let raw = word(entry);
                let Some((host, _)) = owned_cluster(raw, &geometry) else { continue };
                let want = with_copied(raw, owned(host));
                if want != raw {
                    entry.get_mut(..8).unwrap_or_default().copy_from_slice(&want.to_be_bytes());
                    changed = true;
                }
            }
            if changed {
                self.place.write(offset, &table)?;
            }
        }
        Ok(())
    }

    /// Nothing is wrong any more: writers may come again.
    fn clear_marks(&mut self) -> Result<(), BlockError> {
        let marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
        if self.header.geometry.version < 3 || self.header.incompatible & marks == 0 {
            return Ok(());
        }
        self.barrier()?;
        self.header.incompatible &= !marks;
        self.place.write(INCOMPAT_OFFSET, &self.header.incompatible.to_be_bytes())?;
        self.barrier()
    }
}

/// Reads the header and walks the image, changing nothing.
pub(crate) fn check_file(file: &dyn FileBackend, path: &Path) -> Result<Checked, BlockError> {
    let header = read_header(file, path)?;
    let report = walk(Place { file, path }, &header)?;
    Ok(checked(&header, &report))
}

/// Whether an image is right but for its refcounts.
pub(crate) fn recount_file(file: &dyn FileBackend, path: &Path) -> Result<bool, BlockError> {
    let header = read_header(file, path)?;
    let file_bytes = file_bytes(Place { file, path })?;
    let mut read = |offset: u64, out: &mut [u8]| file.read_at(offset, &ReadBufs::from_slice(out));
    let found = count_references(&header, file_bytes, &mut read).map_err(|source| refused(path, source))?;
    let max = header.geometry.refcount_max();
    Ok(found.corruptions == 0 && found.counts.iter().all(|(_, count)| count <= max))
}
