//! Changing what an image was created with: its version, how refcounts are kept, how wide they are.

use image::qcow2::check::count_references;
use image::qcow2::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, EXT_DATA_FILE, EXT_FEATURE_NAMES, Freed, HeaderError,
    INCOMPAT_CORRUPT, INCOMPAT_DIRTY, L1Entry, L2Entry, feature_names, header_steps,
};

use super::Tables;
use super::maintenance::Qcow2Image;
use super::maintenance_error::MaintenanceError;
use super::rebuild::write_refcounts_anew;
use super::rewrite::{Place, Rewrite, word};
use super::snapshots::{read_table, replace_table};
use crate::error::{Action, BlockError};
use crate::sys::ReadBufs;

/// Smallest clusters whose header gets the table of feature names; QEMU leaves it out of smaller ones too.
const FEATURE_NAMES_CLUSTER_BITS_MIN: u32 = 13;

/// What is changed; `None` leaves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: Option<u32>,
    /// Whether writers may leave refcounts behind while they have the image open; needs version 3.
    pub lazy_refcounts: Option<bool>,
    /// log2 of the width of a refcount, 0 to 6; version 2 has 4.
    pub refcount_order: Option<u32>,
    /// The name under which the external data file is stored; an empty one is not stored.
    pub data_file: Option<String>,
    /// Frees the external data file from staying a raw image of the disk.
    pub data_file_not_raw: bool,
}

impl Qcow2Image {
    /// Changes features of the image. Each step is complete or has not happened, and each leaves the data as it was:
    /// first a new version that allows more, then refcounts, then a version that allows less. Going back to version 2
    /// gives every cluster of zeroes in front of a backing file a cluster of its own.
    pub fn amend(&self, amend: &Amend) -> Result<(), BlockError> {
        let header = self.header();
        let version = amend.version.unwrap_or(header.geometry.version);
        let order = amend.refcount_order.unwrap_or(header.geometry.refcount_order);
        let header_error = |source| self.refuse(MaintenanceError::Header(source));
        if !matches!(version, 2 | 3) {
            return Err(header_error(HeaderError::Version(version)));
        }
        if order > 6 || (version == 2 && order != 4) {
            return Err(header_error(HeaderError::RefcountOrder(order)));
        }
        if version == 2 && amend.lazy_refcounts == Some(true) {
            return Err(header_error(HeaderError::NeedsVersion3 { feature: "lazy refcounts" }));
        }
        if amend.data_file.is_some() && !header.geometry.data_file {
            let reason = "it has no external data file";
            return Err(self.refuse(MaintenanceError::Unsupported { what: "the data file", reason }));
        }
        if let Some(name) = &amend.data_file {
            self.node.rewrite(|rewrite| {
                let stored = Some(name.clone().into_bytes()).filter(|name| !name.is_empty());
                rewrite.header.set_extension(EXT_DATA_FILE, stored);
                Ok(())
            })?;
        }
        if amend.data_file_not_raw && header.is_data_file_raw() {
            self.node.rewrite(|rewrite| {
                rewrite.header.autoclear &= !AUTOCLEAR_RAW_DATA;
                Ok(())
            })?;
        }
        if version == 3 && header.geometry.version == 2 {
            self.node.rewrite(upgrade)?;
        }
        if order != header.geometry.refcount_order {
            let mut tables = self.node.quiet()?;
            let changed = tables.write_refcount_order(order);
            let changed = tables.settle(changed);
            tables.noticing(changed)?;
        }
        if let Some(lazy) = amend.lazy_refcounts.filter(|_| version == 3) {
            self.node.rewrite(|rewrite| {
                let others = rewrite.header.compatible & !COMPAT_LAZY_REFCOUNTS;
                rewrite.header.compatible = others | if lazy { COMPAT_LAZY_REFCOUNTS } else { 0 };
                Ok(())
            })?;
        }
        if version == 2 && header.geometry.version == 3 {
            self.node.rewrite(downgrade)?;
        }
        Ok(())
    }
}

fn upgrade(rewrite: &mut Rewrite<'_>) -> Result<(), BlockError> {
    rewrite.header.geometry.version = 3;
    rewrite.header.extra = vec![0; 8];
    if rewrite.geometry.cluster_bits >= FEATURE_NAMES_CLUSTER_BITS_MIN {
        rewrite.header.set_extension(EXT_FEATURE_NAMES, Some(feature_names().data));
    }
    // Snapshots of version 3 say more about themselves.
    let table = read_table(rewrite.place, &rewrite.header)?;
    if table.snapshots.is_empty() { Ok(()) } else { replace_table(rewrite, &table) }
}

fn downgrade(rewrite: &mut Rewrite<'_>) -> Result<(), BlockError> {
    let refuse = |rewrite: &Rewrite<'_>, reason| {
        Err(rewrite.place.refuse(MaintenanceError::Unsupported { what: "the version", reason }))
    };
    if rewrite.header.incompatible & !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT) != 0 {
        return refuse(rewrite, "it uses a feature that version 2 does not have (zstd or extended L2 entries)");
    }
    if rewrite.geometry.data_file {
        return Err(rewrite.place.refuse(MaintenanceError::NotWithDataFile { what: "version 2" }));
    }
    if rewrite.header.autoclear & AUTOCLEAR_BITMAPS != 0 {
        return refuse(rewrite, "it has bitmaps, which version 2 does not have; remove them first");
    }
    let mut table = read_table(rewrite.place, &rewrite.header)?;
    for snapshot in &mut table.snapshots {
        let mut l1 = rewrite.read_l1(snapshot.l1.offset, snapshot.l1.entries)?;
        if rewrite.expand_zeroes(&mut l1)? {
            let raw: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let old = snapshot.l1;
            snapshot.l1.offset = rewrite.place(&raw)?;
            rewrite.drop_table(old.offset, u64::from(old.entries) * 8)?;
        }
    }
    if !table.snapshots.is_empty() {
        replace_table(rewrite, &table)?;
    }
    let mut l1 = rewrite.old_l1.clone();
    rewrite.expand_zeroes(&mut l1)?;
    rewrite.set_active(l1, false)?;
    let header = &mut rewrite.header;
    header.geometry.version = 2;
    (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
    header.extra = Vec::new();
    header.set_extension(EXT_FEATURE_NAMES, None);
    Ok(())
}

impl Rewrite<'_> {
    /// Replaces every entry that says zeroes, which version 2 does not know: by nothing where no backing file would
    /// show, else by a cluster of zeroes. Returns whether the L1 table changed.
    fn expand_zeroes(&mut self, l1: &mut [u64]) -> Result<bool, BlockError> {
        let mut changed = false;
        for (index, offset) in self.l2_tables(l1)? {
            let mut table = self.read_l2(offset)?;
            let mut zeroes = false;
            for entry in table.chunks_exact_mut(8) {
                let decoded = L2Entry::decode(word(entry), &self.geometry).map_err(|e| self.damaged(index, e))?;
                let L2Entry::Zero { .. } = decoded else { continue };
                zeroes = true;
                if let Some(Freed { offset, bytes }) = decoded.freed(&self.geometry) {
                    self.counts.drop(offset, bytes)?;
                }
                let raw = match self.header.backing_name {
                    None => 0,
                    Some(_) => L2Entry::fresh_data(self.place_data(&[])?),
                };
                entry.copy_from_slice(&raw.to_be_bytes());
            }
            if !zeroes {
                continue;
            }
            let copy = self.place(&table)?;
            self.counts.drop(offset, self.geometry.cluster_bytes())?;
            self.counts.relieve()?;
            if let Some(raw) = l1.get_mut(index) {
                // Another snapshot may share the old table, never the copy.
                let entry = L1Entry::decode(*raw, &self.geometry).map_err(|e| self.damaged(index, e))?;
                *raw = copy | if entry.copied { image::qcow2::COPIED } else { 0 };
            }
            changed = true;
        }
        Ok(changed)
    }
}

impl Tables {
    /// Writes all refcounts anew in another width, behind everything in use, and switches to them.
    fn write_refcount_order(&mut self, order: u32) -> Result<(), BlockError> {
        let file_bytes = self.file.len_bytes().map_err(|e| self.io(Action::Stat, e))?;
        let mut read = |offset: u64, out: &mut [u8]| self.file.read_at(offset, &ReadBufs::from_slice(out));
        let report = count_references(&self.header, file_bytes, &mut read)
            .map_err(|source| BlockError::CheckFailed { path: self.path.clone(), source })?;
        if report.corruptions > 0 {
            let first = report.findings.first().cloned().unwrap_or_default();
            return Err(BlockError::Unrepairable { path: self.path.clone(), corruptions: report.corruptions, first });
        }
        let mut header = self.header.clone();
        header.geometry.refcount_order = order;
        let geometry = header.geometry;
        let place = Place { file: &*self.file, path: &self.path };
        let max = geometry.refcount_max();
        if let Some((cluster, _)) = report.counts.iter().find(|(_, count)| *count > max) {
            let offset = cluster << geometry.cluster_bits;
            return Err(place.refuse(MaintenanceError::RefcountOverflow { offset, max }));
        }
        let new = write_refcounts_anew(place, &geometry, &report.counts)?;
        (header.reftable_offset, header.reftable_clusters) = new.table();
        let mut old_area = vec![0; geometry.cluster_bytes().min(file_bytes) as usize];
        place.read(0, &mut old_area)?;
        let steps =
            header_steps(&old_area, &header).map_err(|source| place.refuse(MaintenanceError::Header(source)))?;
        self.barrier()?;
        for writes in steps {
            for (offset, bytes) in writes {
                self.write_file(offset, &bytes)?;
            }
            self.barrier()?;
        }
        Ok(())
    }
}
