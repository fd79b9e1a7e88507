//! Walks a whole image and compares what is referenced with what is counted. The same walk rebuilds
//! refcounts after a crash of a writer that kept them lazily.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

use thiserror::Error;

use super::{
    Freed, Geometry, Header, L1Entry, L2Entry, OFFSET_MASK, SNAPSHOT_TABLE_MAX_BYTES, SnapshotError, SnapshotL1,
    parse_snapshots, refcount,
};

/// Findings kept as text; beyond, only counts grow.
const FINDINGS_MAX: usize = 64;
const PAGE_CLUSTERS: u64 = 4096;
/// 1 GiB of counts: 16 TiB of 64 KiB clusters when densely used.
const PAGES_MAX: usize = 65536;

/// References per host cluster, in pages so that a sparse image costs little.
#[derive(Default)]
pub struct Counts {
    pages: HashMap<u64, Vec<u32>>,
}

impl Counts {
    fn add(&mut self, cluster: u64) -> bool {
        let page = cluster / PAGE_CLUSTERS;
        if !self.pages.contains_key(&page) && self.pages.len() >= PAGES_MAX {
            return false;
        }
        let counts = self.pages.entry(page).or_insert_with(|| vec![0; PAGE_CLUSTERS as usize]);
        if let Some(count) = counts.get_mut((cluster % PAGE_CLUSTERS) as usize) {
            *count = count.saturating_add(1);
        }
        true
    }

    /// References to a host cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&(cluster / PAGE_CLUSTERS));
        page.and_then(|counts| counts.get((cluster % PAGE_CLUSTERS) as usize)).map_or(0, |count| u64::from(*count))
    }

    /// One past the highest cluster with a reference.
    pub fn end(&self) -> u64 {
        self.iter().map(|(cluster, _)| cluster + 1).max().unwrap_or(0)
    }

    /// Clusters with references and how many, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pages.iter().flat_map(|(page, counts)| {
            let used = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            used.map(move |(index, count)| (page * PAGE_CLUSTERS + index as u64, u64::from(*count)))
        })
    }
}

/// What a check found.
#[derive(Default)]
pub struct Report {
    /// Damage: something is referenced that is not counted, or points where it cannot.
    pub corruptions: u64,
    /// Clusters counted more often than referenced: lost space, no danger.
    pub leaks: u64,
    /// The first findings in words.
    pub findings: Vec<String>,
    /// Guest clusters with data.
    pub allocated_clusters: u64,
    /// References to each host cluster.
    pub counts: Counts,
    /// Where refcount blocks are.
    pub refblocks: Vec<u64>,
}

impl Report {
    fn corrupt(&mut self, finding: String) {
        self.corruptions += 1;
        self.note(finding);
    }

    fn note(&mut self, finding: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// The check could not be carried out.
#[derive(Debug, Error)]
pub enum CheckError<E: Debug> {
    /// The image could not be read.
    #[error("a read failed: {0:?}")]
    Read(E),
    /// The snapshot table is damaged.
    #[error("{0}")]
    Snapshots(SnapshotError),
    /// The references are spread over more of the file than a check can count.
    #[error("the image refers to more than {} regions of the file; it cannot be checked in memory", PAGES_MAX)]
    TooLarge,
}

/// Reads `out.len()` bytes at a file offset; bytes past the end of the file are zeroes.
pub type ReadAt<'a, E> = dyn FnMut(u64, &mut [u8]) -> Result<(), E> + 'a;

struct Walk<'a, 'r, E> {
    geometry: Geometry,
    file_bytes: u64,
    read: &'a mut ReadAt<'r, E>,
    report: Report,
    too_large: bool,
}

/// Counts every reference and compares with the refcounts. An image is consistent when no corruption is found.
pub fn check<E: Debug>(header: &Header, file_bytes: u64, read: &mut ReadAt<'_, E>) -> Result<Report, CheckError<E>> {
    let mut walk = Walk::new(header, file_bytes, read);
    walk.tables(header)?;
    let table = walk.refcount_table(header)?;
    walk.count(0, 1, "the header");
    if walk.too_large {
        return Err(CheckError::TooLarge);
    }
    walk.compare(&table)?;
    walk.copied_flags(header)?;
    Ok(walk.report)
}

/// Counts the references of guest data, L2, L1 and snapshot tables and the header: everything but the
/// refcount structures, which a rebuild replaces.
pub fn count_references<E: Debug>(
    header: &Header,
    file_bytes: u64,
    read: &mut ReadAt<'_, E>,
) -> Result<Report, CheckError<E>> {
    let mut walk = Walk::new(header, file_bytes, read);
    walk.count(0, 1, "the header");
    walk.tables(header)?;
    if walk.too_large {
        return Err(CheckError::TooLarge);
    }
    walk.copied_flags(header)?;
    Ok(walk.report)
}

impl<'a, 'r, E: Debug> Walk<'a, 'r, E> {
    fn new(header: &Header, file_bytes: u64, read: &'a mut ReadAt<'r, E>) -> Self {
        Walk { geometry: header.geometry, file_bytes, read, report: Report::default(), too_large: false }
    }

    fn bytes(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, CheckError<E>> {
        let mut out = vec![0; len as usize];
        (self.read)(offset, &mut out).map_err(CheckError::Read)?;
        Ok(out)
    }

    /// Counts one reference to each cluster of a range; ranges outside the file are damage. The last
    /// cluster of a file may be partly written.
    fn count(&mut self, offset: u64, bytes: u64, what: &str) -> bool {
        let bits = self.geometry.cluster_bits;
        let end = offset.saturating_add(bytes);
        let limit = self.file_bytes.checked_next_multiple_of(self.geometry.cluster_bytes()).unwrap_or(u64::MAX);
        if bytes == 0 {
            return true;
        }
        if end > limit {
            self.report
                .corrupt(format!("{what} at {offset:#x} lies past the end of the file ({} bytes)", self.file_bytes));
            return false;
        }
        for cluster in offset >> bits..=(end - 1) >> bits {
            self.too_large |= !self.report.counts.add(cluster);
        }
        true
    }

    fn tables(&mut self, header: &Header) -> Result<(), CheckError<E>> {
        self.l1(SnapshotL1 { offset: header.l1_offset, entries: header.l1_entries }, true)?;
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let have = self.file_bytes.saturating_sub(header.snapshots_offset).min(SNAPSHOT_TABLE_MAX_BYTES);
        let table = self.bytes(header.snapshots_offset, have)?;
        let table = parse_snapshots(header, &table).map_err(CheckError::Snapshots)?;
        self.count(header.snapshots_offset, table.bytes.min(have), "the snapshot table");
        for snapshot in table.snapshots {
            self.l1(snapshot.l1, false)?;
        }
        Ok(())
    }

    fn l1(&mut self, l1: SnapshotL1, active: bool) -> Result<(), CheckError<E>> {
        let l1_bytes = u64::from(l1.entries) * 8;
        // A table in a hole would let a few bytes of header ask for much work.
        if l1.offset.saturating_add(l1_bytes) > self.file_bytes.saturating_add(self.geometry.cluster_bytes()) {
            self.report.corrupt(format!("an L1 table at {:#x} lies past the end of the file", l1.offset));
            return Ok(());
        }
        let table = self.bytes(l1.offset, l1_bytes)?;
        self.count(l1.offset, l1_bytes, "an L1 table");
        let mut seen = HashSet::new();
        for raw in table.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0)) {
            match L1Entry::decode(raw, &self.geometry) {
                Err(error) => self.report.corrupt(error.to_string()),
                Ok(L1Entry { table: None, .. }) => {}
                Ok(L1Entry { table: Some(offset), .. }) if !seen.insert(offset) => {
                    self.report.corrupt(format!("the L2 table at {offset:#x} is used twice"));
                }
                Ok(L1Entry { table: Some(offset), .. }) => {
                    if self.count(offset, self.geometry.cluster_bytes(), "an L2 table") {
                        self.l2(offset, active)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, active: bool) -> Result<(), CheckError<E>> {
        let geometry = self.geometry;
        let table = self.bytes(offset, geometry.cluster_bytes())?;
        for raw in table.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0)) {
            let entry = match L2Entry::decode(raw, &geometry) {
                Ok(entry) => entry,
                Err(error) => {
                    self.report.corrupt(error.to_string());
                    continue;
                }
            };
            if let Some(Freed { offset, bytes }) = entry.freed(&geometry) {
                self.count(offset, bytes, "a data cluster");
                self.report.allocated_clusters += u64::from(active);
            }
        }
        Ok(())
    }

    /// An entry that claims to own its cluster lets a writer change it in place, so the claim must be true.
    fn copied_flags(&mut self, header: &Header) -> Result<(), CheckError<E>> {
        let geometry = self.geometry;
        let limit = self.file_bytes.checked_next_multiple_of(geometry.cluster_bytes()).unwrap_or(u64::MAX);
        if header.l1_offset.saturating_add(u64::from(header.l1_entries) * 8) > limit {
            return Ok(());
        }
        let l1 = self.bytes(header.l1_offset, u64::from(header.l1_entries) * 8)?;
        let mut seen = HashSet::new();
        for raw in l1.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0)) {
            let Ok(L1Entry { table: Some(table), copied }) = L1Entry::decode(raw, &geometry) else { continue };
            if table >= limit || !seen.insert(table) {
                continue;
            }
            self.owned_once(table, copied, "L2 table");
            let l2 = self.bytes(table, geometry.cluster_bytes())?;
            for raw in l2.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0)) {
                if let Ok(L2Entry::Data { host, copied } | L2Entry::Zero { host: Some(host), copied }) =
                    L2Entry::decode(raw, &geometry)
                {
                    self.owned_once(host, copied, "data cluster");
                }
            }
        }
        Ok(())
    }

    fn owned_once(&mut self, host: u64, copied: bool, what: &str) {
        let references = self.report.counts.get(host >> self.geometry.cluster_bits);
        if copied && references > 1 {
            self.report.corrupt(format!("the {what} at {host:#x} is marked as owned, but has {references} references"));
        }
    }

    fn refcount_table(&mut self, header: &Header) -> Result<Vec<u64>, CheckError<E>> {
        let geometry = self.geometry;
        let bytes = u64::from(header.reftable_clusters) * geometry.cluster_bytes();
        if !self.count(header.reftable_offset, bytes, "the refcount table") {
            return Ok(Vec::new());
        }
        let raw = self.bytes(header.reftable_offset, bytes)?;
        let mut table: Vec<u64> =
            raw.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0)).map(|raw| raw & OFFSET_MASK).collect();
        let mut seen = HashSet::new();
        for (index, offset) in table.iter_mut().enumerate().filter(|(_, offset)| **offset != 0) {
            let usable = geometry.is_aligned(*offset) && seen.insert(*offset);
            if !usable || !self.count(*offset, geometry.cluster_bytes(), "a refcount block") {
                self.report.corrupt(format!("refcount table entry {index} ({offset:#x}) is not usable"));
                *offset = 0;
            } else {
                self.report.refblocks.push(*offset);
            }
        }
        Ok(table)
    }

    fn compare(&mut self, table: &[u64]) -> Result<(), CheckError<E>> {
        let bits = self.geometry.refblock_bits();
        let order = self.geometry.refcount_order;
        for (block_index, offset) in table.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            let block = self.bytes(*offset, self.geometry.cluster_bytes())?;
            let first = (block_index as u64) << bits;
            for index in 0..self.geometry.refblock_entries() {
                let counted = refcount::get(&block, order, index as usize).unwrap_or(0);
                let referenced = self.report.counts.get(first + index);
                if counted < referenced {
                    self.report
                        .corrupt(format!("cluster {}: refcount {counted}, {referenced} references", first + index));
                } else if counted > referenced {
                    self.report.leaks += 1;
                    self.report.note(format!(
                        "cluster {}: leaked, refcount {counted}, {referenced} references",
                        first + index
                    ));
                }
            }
        }
        let uncovered = |cluster: u64| table.get((cluster >> bits) as usize).is_none_or(|offset| *offset == 0);
        let missing: Vec<u64> =
            self.report.counts.iter().map(|(cluster, _)| cluster).filter(|c| uncovered(*c)).collect();
        for cluster in missing {
            self.report.corrupt(format!("cluster {cluster} is in use, but no refcount block covers it"));
        }
        Ok(())
    }
}
