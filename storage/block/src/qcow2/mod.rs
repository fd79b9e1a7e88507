//! A qcow2 image in use: its tables in memory, and the operations on it.
//!
//! `tables` finds and changes L1 and L2 entries, `alloc` hands out host clusters, `commit` writes tables back
//! in a safe order, `read`, `write` and `zero` serve requests, `rebuild` mends refcounts after an unclean end.

mod alloc;
mod commit;
mod read;
mod rebuild;
mod tables;
mod write;
mod zero;

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;

use image::qcow2::{
    AUTOCLEAR_OFFSET, Geometry, Header, INCOMPAT_CORRUPT, INCOMPAT_OFFSET, OFFSET_MASK, header_area_bytes,
};

use crate::error::{Action, BlockError, ErrorKind};
use crate::io::FileBackend;
use crate::slice_cache::SliceCache;
use crate::sys::{ReadBufs, WriteBufs};

/// Memory for refcount blocks: 2 GiB of 64 KiB clusters for each 64 KiB of it.
const REFCOUNT_CACHE_BYTES: u64 = 256 << 10;

pub(crate) struct Qcow2Options {
    pub(crate) read_only: bool,
    pub(crate) has_backing: bool,
    /// Give the space of freed clusters back to the host.
    pub(crate) punch_freed: bool,
    /// Never wait for stable storage.
    pub(crate) no_sync: bool,
    pub(crate) l2_cache_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    /// Damage was found: writes are refused.
    Corrupt,
    /// A flush failed: the host may have dropped what was written.
    FlushFailed,
}

/// The cluster that was unpacked last, by its L2 entry.
#[derive(Default)]
struct Unpacked {
    host: u64,
    bytes: u64,
    plain: Vec<u8>,
}

pub(crate) struct Qcow2Node {
    file: Box<dyn FileBackend>,
    path: PathBuf,
    header: Header,
    geometry: Geometry,
    options: Qcow2Options,
    health: Health,
    /// The L1 table as the guest sees it; entries in `l1_dirty` are not on disk yet.
    l1: Vec<u64>,
    l1_dirty: BTreeSet<usize>,
    /// Offsets of refcount blocks; entries in `reftable_dirty` are not on disk yet.
    reftable: Vec<u64>,
    reftable_dirty: BTreeSet<usize>,
    /// The header does not point to the refcount table yet.
    reftable_moved: bool,
    l2_cache: SliceCache,
    refcount_cache: SliceCache,
    /// No cluster below is free.
    free_hint: u64,
    /// Clusters that lose a reference once the tables on disk do not refer to them any more.
    pending_frees: Vec<u64>,
    /// Clusters that hold the header and tables: never to be handed out.
    table_clusters: HashSet<u64>,
    /// One past the last cluster that exists in the file.
    file_clusters: u64,
    unpacked: Unpacked,
}

impl Qcow2Node {
    pub(crate) fn open(
        file: Box<dyn FileBackend>,
        path: PathBuf,
        options: &Qcow2Options,
    ) -> Result<Qcow2Node, BlockError> {
        let header = read_header(&*file, &path)?;
        let geometry = header.geometry;
        if !options.read_only && header.is_corrupt() {
            return Err(BlockError::MarkedCorrupt { path });
        }
        let file_bytes = file.len_bytes().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
        let mut node = Qcow2Node {
            l2_cache: SliceCache::new(geometry.slice_bytes(), options.l2_cache_bytes),
            refcount_cache: SliceCache::new(geometry.slice_bytes(), REFCOUNT_CACHE_BYTES),
            options: Qcow2Options { ..*options },
            file,
            path,
            geometry,
            health: Health::Good,
            l1: Vec::new(),
            l1_dirty: BTreeSet::new(),
            reftable: Vec::new(),
            reftable_dirty: BTreeSet::new(),
            reftable_moved: false,
            free_hint: 0,
            pending_frees: Vec::new(),
            table_clusters: HashSet::new(),
            file_clusters: file_bytes.div_ceil(geometry.cluster_bytes()),
            unpacked: Unpacked::default(),
            header,
        };
        let l1_entries = u64::from(node.header.l1_entries);
        node.l1 = node.load_table("L1 table", node.header.l1_offset, l1_entries)?;
        if !node.options.read_only {
            node.prepare_for_writing()?;
        }
        Ok(node)
    }

    /// Reads a table of big-endian u64 that must lie inside the file; its length is bounded by the header check.
    fn load_table(&self, table: &'static str, offset: u64, entries: u64) -> Result<Vec<u64>, BlockError> {
        let file_bytes = self.file.len_bytes().map_err(|e| self.io(Action::Stat, e))?;
        if offset.saturating_add(entries * 8) > file_bytes {
            return Err(BlockError::TablePastEnd { path: self.path.clone(), table, offset, file_bytes });
        }
        let mut raw = vec![0; (entries * 8) as usize];
        self.read_file(offset, &mut raw)?;
        let entry = |bytes: &[u8]| bytes.try_into().map(u64::from_be_bytes).unwrap_or(0);
        Ok(raw.chunks_exact(8).map(entry).collect())
    }

    fn prepare_for_writing(&mut self) -> Result<(), BlockError> {
        if self.header.is_dirty() {
            self.rebuild_refcounts()?;
        }
        let entries = u64::from(self.header.reftable_clusters) * self.geometry.cluster_bytes() / 8;
        self.reftable = self.load_table("refcount table", self.header.reftable_offset, entries)?;
        self.note_table_clusters()?;
        if self.header.autoclear != 0 {
            // "if the bit is unset after the image was modified by an unaware program": data behind these
            // bits (bitmaps) would go stale with the first write.
            self.header.autoclear = 0;
            self.write_file(AUTOCLEAR_OFFSET, &0u64.to_be_bytes())?;
            self.barrier()?;
        }
        Ok(())
    }

    /// Remembers where tables are, and refuses refcount table entries that cannot be right.
    fn note_table_clusters(&mut self) -> Result<(), BlockError> {
        let bits = self.geometry.cluster_bits;
        let extent = |offset: u64, bytes: u64| offset >> bits..(offset + bytes).div_ceil(1 << bits);
        let mut tables: HashSet<u64> = HashSet::from([0]);
        tables.extend(extent(self.header.l1_offset, u64::from(self.header.l1_entries) * 8));
        tables.extend(extent(self.header.reftable_offset, u64::from(self.header.reftable_clusters) << bits));
        for (index, raw) in self.reftable.iter_mut().enumerate().filter(|(_, raw)| **raw != 0) {
            let offset = *raw & OFFSET_MASK;
            let cluster = offset >> bits;
            if !self.geometry.is_aligned(offset) || cluster >= self.file_clusters || !tables.insert(cluster) {
                return Err(BlockError::RefcountTable { path: self.path.clone(), index: index as u64, raw: *raw });
            }
            *raw = offset;
        }
        tables.extend(self.l1.iter().map(|raw| (raw & OFFSET_MASK) >> bits).filter(|cluster| *cluster != 0));
        self.table_clusters = tables;
        Ok(())
    }

    /// Size of the guest disk in whole sectors.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.geometry.size_bytes & !511
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    pub(crate) fn backing_name(&self) -> Option<&str> {
        self.header.backing_name.as_deref()
    }

    pub(crate) fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.file.allocated_bytes().map_err(|e| self.io(Action::Stat, e))
    }

    fn io(&self, action: Action, source: std::io::Error) -> BlockError {
        BlockError::io(&self.path, action, source)
    }

    fn read_file(&self, offset: u64, out: &mut [u8]) -> Result<(), BlockError> {
        self.file.read_at(offset, &ReadBufs::from_slice(out)).map_err(|e| self.io(Action::Read, e))
    }

    fn write_file(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        self.file.write_at(offset, &WriteBufs::from_slice(bytes)).map_err(|e| self.io(Action::Write, e))
    }

    /// Everything written so far is on stable storage when this returns. A failure is final: Linux forgets
    /// dirty pages that it could not write, so a second try would succeed without the data.
    fn barrier(&mut self) -> Result<(), BlockError> {
        if self.options.no_sync {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| {
            self.health = Health::FlushFailed;
            self.io(Action::Sync, e)
        })
    }

    fn check_writable(&self) -> Result<(), BlockError> {
        let path = || self.path.clone();
        match self.health {
            _ if self.options.read_only => Err(BlockError::ReadOnly { path: path() }),
            Health::Good => Ok(()),
            Health::Corrupt => Err(BlockError::MarkedCorrupt { path: path() }),
            Health::FlushFailed => Err(BlockError::FlushFailed { path: path() }),
        }
    }

    /// Passes an error on; one that means damage marks the image, so that nobody writes to it before a check.
    fn noticing<T>(&mut self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
            && !matches!(error, BlockError::Compressed { .. })
            && self.health == Health::Good
            && !self.options.read_only
        {
            self.health = Health::Corrupt;
            if self.geometry.version >= 3 {
                self.header.incompatible |= INCOMPAT_CORRUPT;
                // The first error is what the caller must see; a mark that cannot be written changes nothing.
                let marked = self.write_file(INCOMPAT_OFFSET, &self.header.incompatible.to_be_bytes());
                let _ = marked.and_then(|()| self.file.sync_data().map_err(|e| self.io(Action::Sync, e)));
            }
        }
        result
    }
}

impl Drop for Qcow2Node {
    fn drop(&mut self) {
        // Twice: the first writes the tables, the second the refcounts of what they gave up.
        if self.flush().is_ok() && self.refcount_cache.has_dirty() {
            let _ = self.flush();
        }
    }
}

/// Reads and checks the header cluster.
pub(crate) fn read_header(file: &dyn FileBackend, path: &std::path::Path) -> Result<Header, BlockError> {
    let read = |len: u64| -> Result<Vec<u8>, BlockError> {
        let file_bytes = file.len_bytes().map_err(|e| BlockError::io(path, Action::Stat, e))?;
        let mut out = vec![0; len.min(file_bytes) as usize];
        file.read_at(0, &ReadBufs::from_slice(&mut out)).map_err(|e| BlockError::io(path, Action::Read, e))?;
        Ok(out)
    };
    let refused = |source| BlockError::Header { path: path.to_owned(), source };
    let first = read(image::PROBE_BYTES as u64)?;
    image::check_declared(image::Format::Qcow2, &first)
        .map_err(|source| BlockError::Mismatch { path: path.to_owned(), source })?;
    let area = read(header_area_bytes(&first).map_err(refused)?)?;
    Header::parse(&area).map_err(refused)
}
