//! Walks a whole image and compares what is referenced with what is counted, and says what a repair would change.
//! The same walk rebuilds refcounts after a crash of a writer that kept them lazily.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

use thiserror::Error;

use super::bitmaps::{
    BITMAP_DIRECTORY_MAX_BYTES, BitmapError, BitmapExtension, BitmapTableEntry, bitmap_directory_bytes, parse_bitmaps,
};
use super::{
    COMPRESSED, COPIED, CryptMethod, CryptoHeader, EntryError, ExtendedEntry, Freed, Geometry, Header, L1_RESERVED,
    L1Entry, L2Entry, OFFSET_MASK, SNAPSHOT_TABLE_MAX_BYTES, Snapshot, SnapshotError, SnapshotL1, Subclusters, ZERO,
    l2_reserved_bits, parse_damaged_snapshots, parse_snapshots, refcount,
};

/// Findings kept as text; beyond, only counts grow.
const FINDINGS_MAX: usize = 64;
/// Entries that one repair replaces; a check after it finds the rest.
const FIXES_MAX: usize = 1 << 16;
/// Clusters whose refcount is wrong that are remembered for the check of flags.
const MISCOUNTED_MAX: usize = 1 << 20;
const PAGE_CLUSTERS: u64 = 4096;
/// 1 GiB of counts: 16 TiB of 64 KiB clusters when densely used.
const PAGES_MAX: usize = 65536;

/// References per host cluster, in pages so that a sparse image costs little.
#[derive(Default)]
pub struct Counts {
    pages: Vec<Box<[u32]>>,
    /// Where in `pages` each page is.
    index: HashMap<u64, usize>,
    /// The page that was looked up last, and where it is: neighbours follow each other.
    last: Cell<Option<(u64, usize)>>,
}

impl Counts {
    fn find(&self, page: u64) -> Option<usize> {
        match self.last.get() {
            Some((last, at)) if last == page => Some(at),
            _ => {
                let at = *self.index.get(&page)?;
                self.last.set(Some((page, at)));
                Some(at)
            }
        }
    }

    fn add(&mut self, cluster: u64) -> bool {
        let page = cluster / PAGE_CLUSTERS;
        let at = match self.find(page) {
            Some(at) => at,
            None if self.pages.len() >= PAGES_MAX => return false,
            None => {
                self.pages.push(vec![0; PAGE_CLUSTERS as usize].into_boxed_slice());
                self.index.insert(page, self.pages.len() - 1);
                self.pages.len() - 1
            }
        };
        let counts = self.pages.get_mut(at);
        if let Some(count) = counts.and_then(|counts| counts.get_mut((cluster % PAGE_CLUSTERS) as usize)) {
            *count = count.saturating_add(1);
        }
        true
    }

    /// The counts of a whole page; `None` when nothing in it has a reference.
    fn page(&self, page: u64) -> Option<&[u32]> {
        self.find(page).and_then(|at| self.pages.get(at)).map(|counts| &**counts)
    }

    /// References to a host cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let counts = self.page(cluster / PAGE_CLUSTERS);
        counts.and_then(|counts| counts.get((cluster % PAGE_CLUSTERS) as usize)).map_or(0, |count| u64::from(*count))
    }

    /// One past the highest cluster with a reference.
    pub fn end(&self) -> u64 {
        let last = self.index.iter().max_by_key(|(page, _)| **page);
        let used = last.and_then(|(page, at)| Some((page, self.pages.get(*at)?.iter().rposition(|count| *count > 0)?)));
        used.map_or(0, |(page, at)| page * PAGE_CLUSTERS + at as u64 + 1)
    }

    /// Clusters with references and how many, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.index.iter().flat_map(|(page, at)| {
            let counts = self.pages.get(*at).map(|counts| &**counts).unwrap_or_default();
            let used = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            used.map(move |(index, count)| (page * PAGE_CLUSTERS + index as u64, u64::from(*count)))
        })
    }
}

/// A table entry that cannot be right, and what replaces it in a repair. What it mapped reads as zeroes then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFix {
    /// Where the entry is in the file.
    pub at: u64,
    /// The new entry.
    pub raw: u64,
    /// The new subcluster bitmap behind it, with extended L2 entries.
    pub bitmap: Option<u64>,
}

/// What a check found.
#[derive(Default)]
pub struct Report {
    /// Damage: something is referenced that is not counted, or points where it cannot, or flags contradict counts.
    pub corruptions: u64,
    /// Clusters counted more often than referenced: lost space, no danger.
    pub leaks: u64,
    /// The first findings, in QEMU's words where it has some.
    pub findings: Vec<String>,
    /// Guest clusters with data.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those that do not follow the one before in the file; compressed ones count always.
    pub fragmented_clusters: u64,
    /// One past the last cluster that is referenced or counted.
    pub end_cluster: u64,
    /// References to each host cluster.
    pub counts: Counts,
    /// Where refcount blocks are.
    pub refblocks: Vec<u64>,
    /// Entries that a repair replaces.
    pub fixes: Vec<EntryFix>,
    /// The refcount table or its blocks cannot hold the right counts: a repair writes new ones.
    pub refcounts_unusable: bool,
    /// A part of the image that holds references could not be read: clusters that look unused may not be, so none
    /// is called leaked.
    pub references_unknown: bool,
    /// Entries of the snapshot table without the sizes that version 3 demands; they are among the corruptions.
    pub incomplete_snapshots: u64,
    /// Clusters with references and another refcount, and that; their flags are judged by it.
    miscounted: HashMap<u64, u64>,
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

    fn fix(&mut self, fix: EntryFix) {
        if self.fixes.len() < FIXES_MAX {
            self.fixes.push(fix);
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
    /// What harms no reader and no writer is a finding too, and what is damaged is passed over.
    thorough: bool,
    /// L1 tables that were walked: no two tables lie in the same place.
    walked: HashSet<u64>,
}

/// Counts every reference and compares with the refcounts. An image is consistent when no corruption is found.
pub fn check<E: Debug>(header: &Header, file_bytes: u64, read: &mut ReadAt<'_, E>) -> Result<Report, CheckError<E>> {
    let mut walk = Walk::new(header, file_bytes, read);
    walk.thorough = true;
    walk.tables(header)?;
    let table = walk.refcount_table(header)?;
    walk.count(0, 1, "the header");
    if walk.too_large {
        return Err(CheckError::TooLarge);
    }
    walk.compare(&table)?;
    walk.copied_flags(header, true)?;
    Ok(walk.report)
}

/// Counts the references of guest data, L2, L1 and snapshot tables, bitmaps and the header: everything but the
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
    walk.copied_flags(header, false)?;
    Ok(walk.report)
}

impl<'a, 'r, E: Debug> Walk<'a, 'r, E> {
    fn new(header: &Header, file_bytes: u64, read: &'a mut ReadAt<'r, E>) -> Self {
        let geometry = header.geometry;
        let (report, walked) = (Report::default(), HashSet::new());
        Walk { geometry, file_bytes, read, report, too_large: false, thorough: false, walked }
    }

    fn bytes(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, CheckError<E>> {
        let mut out = vec![0; len as usize];
        (self.read)(offset, &mut out).map_err(CheckError::Read)?;
        Ok(out)
    }

    /// Where the last cluster of the file ends; it may be partly written.
    fn limit(&self) -> u64 {
        self.file_bytes.checked_next_multiple_of(self.geometry.cluster_bytes()).unwrap_or(u64::MAX)
    }

    /// Counts one reference to each cluster of a range; ranges outside the file are damage.
    fn count(&mut self, offset: u64, bytes: u64, what: &str) -> bool {
        let bits = self.geometry.cluster_bits;
        let end = offset.saturating_add(bytes);
        if bytes == 0 {
            return true;
        }
        if end > self.limit() {
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
        self.bitmaps(header)?;
        if let CryptMethod::Luks(CryptoHeader { offset, bytes }) = header.crypt_method {
            self.count(offset, bytes, "the LUKS header");
        }
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let have = self.file_bytes.saturating_sub(header.snapshots_offset).min(SNAPSHOT_TABLE_MAX_BYTES);
        let table = self.bytes(header.snapshots_offset, have)?;
        let parse = if self.thorough { parse_damaged_snapshots } else { parse_snapshots };
        let table = parse(header, &table).map_err(CheckError::Snapshots)?;
        self.count(header.snapshots_offset, table.bytes.min(have), "the snapshot table");
        let mut lost = HashSet::new();
        for fault in &table.faults {
            if let SnapshotError::L1 { index, .. } = fault {
                lost.insert(*index);
            }
            if self.thorough {
                self.snapshot_fault(fault, &table.snapshots);
            }
        }
        for (_, snapshot) in (0u32..).zip(&table.snapshots).filter(|(index, _)| !lost.contains(index)) {
            self.l1(snapshot.l1, false)?;
        }
        Ok(())
    }

    fn snapshot_fault(&mut self, fault: &SnapshotError, snapshots: &[Snapshot]) {
        match *fault {
            SnapshotError::Incomplete { index } => {
                self.report.incomplete_snapshots += 1;
                self.report.corrupt(format!("ERROR snapshot table entry {index} is incomplete"));
            }
            SnapshotError::L1 { index, entries, offset } => {
                self.report.references_unknown = true;
                let snapshot = snapshots.get(index as usize);
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).escape_debug().to_string();
                let (id, name) = snapshot.map(|s| (text(&s.id), text(&s.name))).unwrap_or_default();
                let what = match self.geometry.is_aligned(offset) {
                    true => format!("l1_size={entries:#x}: L1 table is too large"),
                    false => format!("l1_offset={offset:#x}: L1 table is not cluster aligned"),
                };
                self.report.corrupt(format!("ERROR snapshot {id} ({name}) {what}; snapshot table entry corrupted"));
            }
            ref other => self.report.corrupt(other.to_string()),
        }
    }

    fn l1(&mut self, l1: SnapshotL1, active: bool) -> Result<(), CheckError<E>> {
        let l1_bytes = u64::from(l1.entries) * 8;
        // A table in a hole would let a few bytes of header ask for much work.
        if l1.offset.saturating_add(l1_bytes) > self.file_bytes.saturating_add(self.geometry.cluster_bytes()) {
            self.report.corrupt(format!("an L1 table at {:#x} lies past the end of the file", l1.offset));
            return Ok(());
        }
        if l1_bytes > 0 && !self.walked.insert(l1.offset) {
            self.report.corrupt(format!("the L1 table at {:#x} is used twice", l1.offset));
            return Ok(());
        }
        let table = self.bytes(l1.offset, l1_bytes)?;
        self.count(l1.offset, l1_bytes, "an L1 table");
        let mut seen = HashSet::new();
        for (at, raw) in (l1.offset..).step_by(8).zip(words(&table)) {
            self.reserved_bits(at, raw, raw & L1_RESERVED, "L1");
            let drop = EntryFix { at, raw: 0, bitmap: None };
            match L1Entry::decode(raw, &self.geometry) {
                Err(error) => {
                    self.report.corrupt(error.to_string());
                    self.report.fix(drop);
                }
                Ok(L1Entry { table: None, .. }) => {}
                Ok(L1Entry { table: Some(offset), .. }) if !seen.insert(offset) => {
                    self.report.corrupt(format!("the L2 table at {offset:#x} is used twice"));
                }
                Ok(L1Entry { table: Some(offset), .. }) => {
                    if self.count(offset, self.geometry.cluster_bytes(), "an L2 table") {
                        let reach = self.geometry.l2_reach_bytes();
                        self.l2(offset, (at - l1.offset) / 8 * reach, active)?;
                    } else {
                        self.report.fix(drop);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reserved bits of an entry, which say nothing to those who read it, so that clearing them changes nothing else.
    fn reserved_bits(&mut self, at: u64, raw: u64, reserved: u64, level: &str) {
        if self.thorough && reserved != 0 {
            self.report.corrupt(format!("ERROR found {level} entry with reserved bits set: {raw:x}"));
            self.report.fix(EntryFix { at, raw: raw & !reserved, bitmap: None });
        }
    }

    /// Walks the L2 table at an offset of the file, which maps the disk from a guest offset on.
    fn l2(&mut self, offset: u64, guest: u64, active: bool) -> Result<(), CheckError<E>> {
        let geometry = self.geometry;
        let table = self.bytes(offset, geometry.cluster_bytes())?;
        let entry_bytes = geometry.l2_entry_bytes() as usize;
        let mut next_contiguous = None;
        let guests = (guest..).step_by(geometry.cluster_bytes() as usize);
        let places = (offset..).step_by(entry_bytes).zip(guests);
        for ((at, guest), entry) in places.zip(table.chunks_exact(entry_bytes)) {
            let (raw, bitmap) = (crate::be64(entry, 0).unwrap_or(0), crate::be64(entry, 8).unwrap_or(0));
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let reserved = l2_reserved_bits(raw);
            self.reserved_bits(at, raw, reserved, "l2");
            let mut raw = raw & !reserved;
            if self.thorough && raw & COMPRESSED != 0 && raw & COPIED != 0 {
                // Nothing looks at it: a compressed cluster is never changed in place.
                raw &= !COPIED;
                let host = L2Entry::decode(raw, &geometry).ok().and_then(|entry| entry.freed(&geometry));
                let host = host.map_or(0, |freed| freed.offset);
                self.report.corrupt(format!(
                    "ERROR: coffset={host:#x}: copied flag must never be set for compressed clusters"
                ));
                self.report.fix(EntryFix { at, raw, bitmap: None });
            }
            let cluster = match cluster_of(raw, bitmap, guest, &geometry) {
                Ok(cluster) => cluster,
                Err(error) => {
                    self.report.corrupt(error.to_string());
                    self.report.fix(zero_fix(at, &geometry, &error));
                    continue;
                }
            };
            let Some(Freed { offset, bytes }) = cluster else { continue };
            if !geometry.data_file && !self.count(offset, bytes, "a data cluster") {
                let nowhere = EntryError::UnalignedData { raw, cluster_bytes: geometry.cluster_bytes() };
                self.report.fix(zero_fix(at, &geometry, &nowhere));
                continue;
            }
            if !active {
                continue;
            }
            self.report.allocated_clusters += 1;
            if raw & COMPRESSED != 0 {
                self.report.compressed_clusters += 1;
                self.report.fragmented_clusters += 1;
            } else {
                self.report.fragmented_clusters += u64::from(next_contiguous.is_some_and(|next| next != offset));
                next_contiguous = Some(offset + geometry.cluster_bytes());
            }
        }
        Ok(())
    }

    /// The directory of bitmaps, their tables, and the clusters with their bits.
    fn bitmaps(&mut self, header: &Header) -> Result<(), CheckError<E>> {
        let extension = match BitmapExtension::of(header) {
            Ok(Some(extension)) => extension,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.report.corrupt(error.to_string());
                return Ok(());
            }
        };
        let bytes = extension.directory_bytes.min(BITMAP_DIRECTORY_MAX_BYTES);
        if !self.count(extension.directory_offset, bytes, "the bitmap directory") {
            return Ok(());
        }
        if self.thorough && extension.directory_offset.saturating_add(bytes) > self.file_bytes {
            let error = BitmapError::Directory { offset: extension.directory_offset, bytes };
            self.report.corrupt(error.to_string());
        }
        let directory = self.bytes(extension.directory_offset, bytes)?;
        let bitmaps = match parse_bitmaps(header, extension.count, &directory) {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                self.report.corrupt(error.to_string());
                return Ok(());
            }
        };
        let entries_bytes = bitmap_directory_bytes(&bitmaps);
        if self.thorough && bytes.next_multiple_of(8) != entries_bytes {
            self.report.corrupt(BitmapError::DirectoryLength { bytes, entries_bytes }.to_string());
        }
        for bitmap in bitmaps {
            let table_bytes = u64::from(bitmap.table_entries) * 8;
            if !self.count(bitmap.table_offset, table_bytes, "a bitmap table") {
                continue;
            }
            let table = self.bytes(bitmap.table_offset, table_bytes)?;
            for raw in words(&table) {
                match BitmapTableEntry::decode(raw, &self.geometry) {
                    Ok(BitmapTableEntry::At(offset)) => {
                        self.count(offset, self.geometry.cluster_bytes(), "bits of a bitmap");
                    }
                    Ok(BitmapTableEntry::Clear | BitmapTableEntry::Set) => {}
                    Err(error) => self.report.corrupt(error.to_string()),
                }
            }
        }
        Ok(())
    }

    /// An entry that claims to own its cluster lets a writer change it in place, so the claim must be true. QEMU
    /// takes the reverse for an error too: `both`.
    fn copied_flags(&mut self, header: &Header, both: bool) -> Result<(), CheckError<E>> {
        let geometry = self.geometry;
        let limit = self.limit();
        if header.l1_offset.saturating_add(u64::from(header.l1_entries) * 8) > limit {
            return Ok(());
        }
        let l1 = self.bytes(header.l1_offset, u64::from(header.l1_entries) * 8)?;
        let mut seen = HashSet::new();
        for (index, raw) in (0u64..).zip(words(&l1)) {
            let Ok(L1Entry { table: Some(table), copied }) = L1Entry::decode(raw, &geometry) else { continue };
            if table >= limit || !seen.insert(table) {
                continue;
            }
            if self.flag_is_wrong(table, copied, both) {
                let refcount = self.counted(table);
                self.report.corrupt(format!(
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={refcount}"
                ));
            }
            let l2 = self.bytes(table, geometry.cluster_bytes())?;
            for entry in l2.chunks_exact(geometry.l2_entry_bytes() as usize) {
                let raw = crate::be64(entry, 0).unwrap_or(0);
                if let Some((host, copied)) = owned_cluster(raw, &geometry)
                    && host < limit
                    && self.flag_is_wrong(host, copied, both)
                {
                    let refcount = self.counted(host);
                    self.report
                        .corrupt(format!("ERROR OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}"));
                }
            }
        }
        Ok(())
    }

    /// The refcount of a cluster as stored.
    fn counted(&self, host: u64) -> u64 {
        let cluster = host >> self.geometry.cluster_bits;
        self.report.miscounted.get(&cluster).copied().unwrap_or(self.report.counts.get(cluster))
    }

    fn flag_is_wrong(&self, host: u64, copied: bool, both: bool) -> bool {
        let cluster = host >> self.geometry.cluster_bits;
        let references = self.report.counts.get(cluster);
        if both { copied != (self.counted(host) == 1) } else { copied && references > 1 }
    }

    fn refcount_table(&mut self, header: &Header) -> Result<Vec<u64>, CheckError<E>> {
        let geometry = self.geometry;
        let bytes = u64::from(header.reftable_clusters) * geometry.cluster_bytes();
        if !self.count(header.reftable_offset, bytes, "the refcount table") {
            self.report.refcounts_unusable = true;
            return Ok(Vec::new());
        }
        let raw = self.bytes(header.reftable_offset, bytes)?;
        for (index, _) in words(&raw).enumerate().filter(|(_, raw)| raw & !OFFSET_MASK != 0) {
            self.report.corrupt(format!("ERROR refcount table entry {index} has reserved bits set"));
            self.report.refcounts_unusable = true;
        }
        let mut table: Vec<u64> = words(&raw).map(|raw| raw & OFFSET_MASK).collect();
        let mut seen = HashSet::new();
        for (index, offset) in table.iter_mut().enumerate().filter(|(_, offset)| **offset != 0) {
            let usable = geometry.is_aligned(*offset) && seen.insert(*offset);
            if !usable || !self.count(*offset, geometry.cluster_bytes(), "a refcount block") {
                self.report.corrupt(format!("refcount table entry {index} ({offset:#x}) is not usable"));
                self.report.refcounts_unusable = true;
                *offset = 0;
            } else {
                // What else is in the block's cluster is damage that only new blocks end.
                let references = self.report.counts.get(*offset >> geometry.cluster_bits);
                if references != 1 {
                    self.report.refcounts_unusable = true;
                    self.report.corrupt(format!("ERROR refcount block {index} refcount={references}"));
                }
                self.report.refblocks.push(*offset);
            }
        }
        Ok(table)
    }

    fn compare(&mut self, table: &[u64]) -> Result<(), CheckError<E>> {
        let bits = self.geometry.refblock_bits();
        let order = self.geometry.refcount_order;
        let geometry_bytes = self.geometry.cluster_bytes();
        self.report.end_cluster = self.report.counts.end();
        for (block_index, offset) in table.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            let block = self.bytes(*offset, self.geometry.cluster_bytes())?;
            let first = (block_index as u64) << bits;
            let page_bytes = ((PAGE_CLUSTERS << order) / 8).min(geometry_bytes) as usize;
            for (piece, part) in (0u64..).zip(block.chunks(page_bytes)) {
                let from = first + piece * ((page_bytes as u64 * 8) >> order);
                self.compare_page(from, part);
            }
        }
        let uncovered = |cluster: u64| table.get((cluster >> bits) as usize).is_none_or(|offset| *offset == 0);
        let missing: Vec<(u64, u64)> = self.report.counts.iter().filter(|(cluster, _)| uncovered(*cluster)).collect();
        for (cluster, referenced) in missing {
            self.report.refcounts_unusable = true;
            if self.report.miscounted.len() < MISCOUNTED_MAX {
                self.report.miscounted.insert(cluster, 0);
            }
            self.report.corrupt(format!("ERROR cluster {cluster} refcount=0 reference={referenced}"));
        }
        Ok(())
    }
}

impl<E: Debug> Walk<'_, '_, E> {
    /// Compares a piece of a refcount block that lies in one page of counts, from a cluster on.
    fn compare_page(&mut self, from: u64, part: &[u8]) {
        let order = self.geometry.refcount_order;
        let has_counts = self.report.counts.page(from / PAGE_CLUSTERS).is_some();
        if !has_counts && part.iter().all(|byte| *byte == 0) {
            return;
        }
        for (cluster, index) in (from..).zip(0..(part.len() << 3) >> order) {
            let counted = refcount::get(part, order, index).unwrap_or(0);
            let referenced = self.report.counts.get(cluster);
            if counted > 0 {
                self.report.end_cluster = self.report.end_cluster.max(cluster + 1);
            }
            if counted == referenced {
                continue;
            }
            if referenced > 0 && self.report.miscounted.len() < MISCOUNTED_MAX {
                self.report.miscounted.insert(cluster, counted);
            }
            if counted < referenced {
                self.report.corrupt(format!("ERROR cluster {cluster} refcount={counted} reference={referenced}"));
                continue;
            }
            if self.report.references_unknown {
                continue;
            }
            self.report.leaks += 1;
            if self.report.findings.len() < FINDINGS_MAX {
                self.report.note(format!("Leaked cluster {cluster} refcount={counted} reference={referenced}"));
            }
        }
    }
}

fn words(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table.chunks_exact(8).filter_map(|raw| crate::be64(raw, 0))
}

/// What the L2 entry of a guest cluster refers to, in the image or in its external data file.
fn cluster_of(raw: u64, bitmap: u64, guest: u64, geometry: &Geometry) -> Result<Option<Freed>, EntryError> {
    L2Entry::decode_at(raw, guest, geometry)?;
    let counted = Geometry { data_file: false, ..*geometry };
    Ok(match geometry.extended_l2 {
        true => ExtendedEntry::decode(raw, bitmap, geometry)?.freed(&counted),
        false => L2Entry::decode(raw, geometry)?.freed(&counted),
    })
}

/// The cluster that an entry may own, and whether it says so. Those of an external data file are not counted.
pub fn owned_cluster(raw: u64, geometry: &Geometry) -> Option<(u64, bool)> {
    match L2Entry::decode(raw, geometry) {
        _ if geometry.data_file => None,
        Ok(L2Entry::Data { host, copied } | L2Entry::Zero { host: Some(host), copied }) => Some((host, copied)),
        _ => None,
    }
}

/// The flag of an entry as `owned` wants it.
pub fn with_copied(raw: u64, owned: bool) -> u64 {
    if owned { raw | COPIED } else { raw & !COPIED }
}

/// An entry that reads as zeroes instead of one that cannot be right. Version 2 has none: nothing is mapped there.
fn zero_fix(at: u64, geometry: &Geometry, error: &EntryError) -> EntryFix {
    match (geometry.extended_l2, error) {
        // What the bitmap says twice is data; what is said to be data in no cluster is zeroes.
        (true, EntryError::Subclusters { raw, bitmap }) if raw & OFFSET_MASK != 0 => {
            let subclusters = Subclusters { data: *bitmap as u32, zero: (bitmap >> 32) as u32 & !(*bitmap as u32) };
            EntryFix { at, raw: *raw, bitmap: Some(subclusters.bitmap()) }
        }
        (true, _) => EntryFix { at, raw: 0, bitmap: Some(Subclusters::ALL_ZERO.bitmap()) },
        (false, _) => EntryFix { at, raw: if geometry.version >= 3 { ZERO } else { 0 }, bitmap: None },
    }
}
