//! A qcow2 image in use: its tables in memory, and the operations on it.
//!
//! [`Qcow2Node`] serves requests of several threads (`read`, `write`, `packed`, `zero`). [`Tables`], behind its one lock, is
//! the image's metadata: `tables` finds and changes L1 and L2 entries, `alloc` hands out host clusters, `commit`
//! writes tables back in a safe order, `rebuild` mends refcounts after an unclean end.
//!
//! Operations on the image as a whole ([`Qcow2Image`]: `snapshots`, `vm_state`, `resize`, `amend`, `bitmaps`) wait for
//! a moment without requests, write everything that changes beside what is in use and switch the header (`rewrite`,
//! `recount`). `repair` needs no image in use: it mends a file.
//!
//! Data moves outside the lock. A request looks its clusters up, counts itself as in flight ([`Flights`]) and then
//! reads or writes the file; a cluster that a table gave up is punched and handed out again only after every
//! request that may have seen the old entry has landed. A write that needs new clusters registers the guest
//! range that it fills, and others that would change the same clusters wait for it.

mod alloc;
mod amend;
mod bitmaps;
mod commit;
mod data_file;
mod flights;
mod maintenance;
mod maintenance_error;
mod packed;
mod pull;
mod read;
mod rebuild;
mod recount;
mod repair;
mod resize;
mod rewrite;
mod sealing;
mod snapshots;
mod tables;
mod vm_state;
mod write;
mod zero;

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use image::qcow2::{
    AUTOCLEAR_OFFSET, AUTOCLEAR_RAW_DATA, CompressionType, Compressor, CryptMethod, CryptoHeader, Geometry, Header,
    INCOMPAT_CORRUPT, INCOMPAT_OFFSET, L2Entry, OFFSET_MASK, header_area_bytes,
};

use parking_lot::{Condvar, Mutex, MutexGuard};

pub use self::amend::Amend;
use self::bitmaps::Recording;
pub use self::bitmaps::{BitmapBits, BitmapInfo};
use self::data_file::Data;
pub(crate) use self::data_file::DataFile;
pub(crate) use self::flights::Flight;
use self::flights::Flights;
pub use self::maintenance::Qcow2Image;
pub use self::maintenance_error::MaintenanceError;
pub use self::repair::{Repair, Repaired, repair_backend, repair_image};
pub(crate) use self::repair::{check_file, recount_file};
pub(crate) use self::sealing::{Sealing, luks_volume};
pub use self::snapshots::SnapshotTime;
use crate::blkdebug::Event;
use crate::create::Preallocation;
use crate::error::{Action, BlockError, ErrorKind};
use crate::io::FileBackend;
use crate::luks::LayerKey;
use crate::node::{Below, Extent, ExtentKind, Landing, Mapped, Node, Place, Placed, Ticket};
use crate::page_buf::PageBuf;
use crate::slice_cache::SliceCache;
use crate::sys::{ReadBufs, WriteBufs};

/// Memory for refcount blocks: 2 GiB of 64 KiB clusters for each 64 KiB of it.
const REFCOUNT_CACHE_BYTES: u64 = 256 << 10;

/// A table is read in pieces of this size.
const TABLE_PIECE_BYTES: usize = 16 << 10;

#[derive(Clone)]
pub(crate) struct Qcow2Options {
    pub(crate) read_only: bool,
    pub(crate) has_backing: bool,
    /// Give the space of freed clusters back to the host.
    pub(crate) punch_freed: bool,
    /// Never wait for stable storage.
    pub(crate) no_sync: bool,
    pub(crate) l2_cache_bytes: u64,
    /// How guest data lie in the file.
    pub(crate) sealing: Sealing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    /// Damage was found: writes are refused.
    Corrupt,
    /// A flush failed: the host may have dropped what was written.
    FlushFailed,
}

/// A qcow2 image as a layer of a disk.
pub(crate) struct Qcow2Node {
    file: Arc<dyn FileBackend>,
    /// Where guest data is; compressed clusters are always in `file`.
    data: Data,
    path: PathBuf,
    /// Its size is the one at opening; see `disk_bytes`.
    geometry: Geometry,
    /// Size of the guest disk, which maintenance changes.
    disk_bytes: AtomicU64,
    compression: CompressionType,
    sealing: Sealing,
    tables: Mutex<Tables>,
    /// Told when a range of [`Tables::filling`] is done.
    filled: Condvar,
    flights: Arc<Flights>,
    unpacked: Mutex<read::Unpacked>,
    /// Held while a compressed stream is placed and written.
    packing: Mutex<()>,
    compressors: Mutex<Vec<Compressor>>,
}

/// The metadata of an image, in memory.
pub(crate) struct Tables {
    file: Arc<dyn FileBackend>,
    data: Data,
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
    /// Bitmaps that record changes.
    recording: Recording,
    /// A guest has changed data since the image was opened.
    changed: bool,
    /// How often bits were loaded.
    recordings: u64,
    /// Where the compressed stream that was placed last ends, when its cluster has room behind it; else at a cluster.
    packed_end: u64,
    /// Clusters that lose a reference once the tables on disk do not refer to them any more.
    pending_frees: Vec<u64>,
    /// Clusters that no table refers to any more, not even on disk, by the generation of the requests that may
    /// still use them.
    leaving: VecDeque<(u64, Vec<u64>)>,
    flights: Arc<Flights>,
    /// The generation that requests join now.
    generation: u64,
    /// How often clusters were given back.
    releases: u64,
    /// Guest ranges, whole clusters, that writes are filling new clusters for.
    filling: Vec<Range<u64>>,
    /// Clusters that hold the header and tables: never to be handed out.
    table_clusters: HashSet<u64>,
    /// One past the last cluster that exists in the file.
    file_clusters: u64,
}

impl Tables {
    fn open(
        file: Arc<dyn FileBackend>,
        data: DataFile,
        path: PathBuf,
        options: &Qcow2Options,
    ) -> Result<Tables, BlockError> {
        let header = read_header(&*file, &path)?;
        let data = Data::of(&header, (&file, &path), data)?;
        let geometry = header.geometry;
        if !options.read_only && header.is_corrupt() {
            return Err(BlockError::MarkedCorrupt { path });
        }
        let file_bytes = file.len_bytes().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
        let mut node = Tables {
            l2_cache: SliceCache::new(geometry.slice_bytes(), options.l2_cache_bytes),
            refcount_cache: SliceCache::new(geometry.slice_bytes(), REFCOUNT_CACHE_BYTES),
            options: options.clone(),
            file,
            data,
            path,
            geometry,
            health: Health::Good,
            l1: Vec::new(),
            l1_dirty: BTreeSet::new(),
            reftable: Vec::new(),
            reftable_dirty: BTreeSet::new(),
            reftable_moved: false,
            free_hint: 0,
            recording: Recording::Off,
            recordings: 0,
            changed: false,
            packed_end: 0,
            pending_frees: Vec::new(),
            leaving: VecDeque::new(),
            flights: Arc::default(),
            generation: 0,
            releases: 0,
            filling: Vec::new(),
            table_clusters: HashSet::new(),
            file_clusters: file_bytes.div_ceil(geometry.cluster_bytes()),
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
        // In pieces, and only what is not zero is stored: a refcount table is empty but for its start, and memory that
        // is never written takes no space.
        let mut table = vec![0; entries as usize];
        let mut raw = vec![0; TABLE_PIECE_BYTES.min(entries as usize * 8)];
        for (entries, at) in table.chunks_mut(TABLE_PIECE_BYTES / 8).zip((offset..).step_by(TABLE_PIECE_BYTES)) {
            let raw = raw.get_mut(..entries.len() * 8).unwrap_or_default();
            self.read_file(at, raw)?;
            for (entry, bytes) in entries.iter_mut().zip(raw.chunks_exact(8)) {
                match bytes.try_into().map_or(0, u64::from_be_bytes) {
                    0 => {}
                    word => *entry = word,
                }
            }
        }
        Ok(table)
    }

    fn prepare_for_writing(&mut self) -> Result<(), BlockError> {
        if self.header.is_dirty() {
            self.rebuild_refcounts()?;
        }
        let entries = u64::from(self.header.reftable_clusters) * self.geometry.cluster_bytes() / 8;
        self.file.event(Event::REFTABLE_LOAD);
        self.reftable = self.load_table("refcount table", self.header.reftable_offset, entries)?;
        self.note_table_clusters()?;
        let raw_data = if self.geometry.data_file { AUTOCLEAR_RAW_DATA } else { 0 };
        let kept = self.look_for_bitmaps() | raw_data;
        if self.header.autoclear & !kept != 0 {
            // "if the bit is unset after the image was modified by an unaware program": data behind bits that are
            // not known here would go stale with the first write.
            self.header.autoclear &= kept;
            self.write_file(AUTOCLEAR_OFFSET, &self.header.autoclear.to_be_bytes())?;
            self.barrier()?;
        }
        Ok(())
    }

    /// Remembers where tables are, and refuses refcount table entries that cannot be right.
    fn note_table_clusters(&mut self) -> Result<(), BlockError> {
        let bits = self.geometry.cluster_bits;
        let extent = |offset: u64, bytes: u64| offset >> bits..(offset + bytes).div_ceil(1 << bits);
        let mut tables: HashSet<u64> = HashSet::from([0]);
        if let CryptMethod::Luks(CryptoHeader { offset, bytes }) = self.header.crypt_method {
            tables.extend(extent(offset, bytes));
        }
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
    fn size_bytes(&self) -> u64 {
        self.geometry.size_bytes & !511
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
        sync_both(&self.data, &*self.file, &self.path, self.geometry.data_file).inspect_err(|_| {
            self.health = Health::FlushFailed;
        })
    }

    /// A guest range is about to change, if the image can be written at all.
    fn begin_change(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_writable()?;
        self.changed = true;
        let recorded = self.record(offset, bytes);
        self.noticing(recorded)
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

impl Qcow2Node {
    pub(crate) fn open(
        file: Arc<dyn FileBackend>,
        data: DataFile,
        path: PathBuf,
        options: Qcow2Options,
        key: &LayerKey,
    ) -> Result<Qcow2Node, BlockError> {
        let header = read_header(&*file, &path)?;
        let sealing = Sealing::open(&*file, &path, &header, key, options.read_only)?;
        let options = Qcow2Options { sealing, ..options };
        let tables = Tables::open(file.clone(), data, path.clone(), &options)?;
        Ok(Qcow2Node {
            file,
            data: tables.data.clone(),
            path,
            geometry: tables.geometry,
            disk_bytes: AtomicU64::new(tables.geometry.size_bytes),
            compression: tables.header.compression,
            sealing: options.sealing,
            filled: Condvar::new(),
            flights: tables.flights.clone(),
            unpacked: Mutex::default(),
            packing: Mutex::default(),
            compressors: Mutex::default(),
            tables: Mutex::new(tables),
        })
    }

    /// Size of the guest disk in whole sectors.
    fn size_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Relaxed) & !511
    }

    /// A compressed cluster would be plain text in the file.
    fn refuse_sealed(&self) -> Result<(), BlockError> {
        match self.sealing.is_plain() {
            true => Ok(()),
            false => Err(BlockError::CompressedPlain { path: self.path.clone() }),
        }
    }

    fn set_size(&self, bytes: u64) {
        self.disk_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Counts a request as in flight, so that no cluster it looked up goes to another owner.
    fn enter(&self, tables: &Tables) -> Flight<'_> {
        self.flights.enter(tables.generation)
    }

    /// A request with its data at an offset of the file that holds data.
    fn place(&self, tables: &Tables, host: u64) -> Placed<'_> {
        if !self.sealing.is_plain() {
            return Placed::Nowhere;
        }
        Placed::Here(Place { file: &*self.data.file, host, ticket: self.flights.take_off(tables.generation) })
    }

    /// The tables, with no write filling clusters of the range: they may be changed by the caller.
    fn lock_settled(&self, offset: u64, bytes: u64) -> MutexGuard<'_, Tables> {
        let mut tables = self.tables.lock();
        let end = offset.saturating_add(bytes);
        while tables.filling.iter().any(|range| range.start < end && offset < range.end) {
            self.filled.wait(&mut tables);
        }
        tables
    }

    /// A range of [`Tables::filling`] is done: who waits for it goes on.
    fn settle(&self, tables: &mut Tables, range: &Range<u64>) {
        if let Some(at) = tables.filling.iter().position(|filling| filling == range) {
            tables.filling.swap_remove(at);
        }
        self.filled.notify_all();
    }

    fn failed(&self, action: Action, source: std::io::Error) -> BlockError {
        BlockError::io(&self.path, action, source)
    }

    /// Everything written before is on stable storage when this returns. The last barrier, which takes longest,
    /// keeps no other request waiting.
    fn flush_tables(&self) -> Result<(), BlockError> {
        let mut tables = self.tables.lock();
        if tables.options.read_only {
            return Ok(());
        }
        tables.check_writable()?;
        self.file.event(Event::FLUSH_TO_OS);
        let written = tables.commit_tables();
        tables.noticing(written)?;
        self.file.event(Event::FLUSH_TO_DISK);
        let frees = std::mem::take(&mut tables.pending_frees);
        let sync = || sync_both(&self.data, &*self.file, &self.path, self.geometry.data_file);
        let synced = if tables.options.no_sync { Ok(()) } else { MutexGuard::unlocked(&mut tables, sync) };
        if let Err(error) = synced {
            tables.pending_frees.extend(frees);
            tables.health = Health::FlushFailed;
            return Err(error);
        }
        let retired = tables.retire(frees);
        tables.noticing(retired)
    }
}

impl Node for Qcow2Node {
    fn size_bytes(&self) -> u64 {
        Qcow2Node::size_bytes(self)
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let mut tables = self.tables.lock();
        let found = tables.run(offset, bytes);
        let (entry, bytes) = tables.noticing(found)?;
        let within = self.geometry.in_cluster(offset);
        let (kind, host, compressed) = match entry {
            L2Entry::Unallocated => (ExtentKind::Below, None, false),
            L2Entry::Zero { host, .. } => (ExtentKind::Zero, host.map(|host| host + within), false),
            L2Entry::Data { host, .. } => (ExtentKind::Data, Some(host + within), false),
            L2Entry::Compressed { .. } => (ExtentKind::Data, None, true),
        };
        let host = host.filter(|_| self.sealing.is_plain());
        Ok(Extent { host, file: usize::from(self.geometry.data_file), compressed, ..Extent::new(bytes, kind) })
    }

    fn read(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.read_all(below, offset, bufs)
    }

    fn write(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.write_all(below, offset, bufs)
    }

    fn map_read(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        if !self.sealing.is_plain() {
            return Ok(None);
        }
        let mut tables = self.tables.lock();
        let found = tables.run(offset, bytes);
        let (L2Entry::Data { host, .. }, bytes) = tables.noticing(found)? else { return Ok(None) };
        let landing = Landing::Flight(self.enter(&tables));
        self.file.event(Event::READ_AIO);
        Ok(Some(Mapped { file: &*self.data.file, host: host + self.geometry.in_cluster(offset), bytes, landing }))
    }

    fn map_write(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        if self.sealing.is_plain() { self.map_new_data(offset, bytes) } else { Ok(None) }
    }

    fn place_read(&self, offset: u64, bytes: u64) -> Result<Placed<'_>, BlockError> {
        let mut tables = self.tables.lock();
        let found = tables.run(offset, bytes);
        match tables.noticing(found)? {
            (_, run) if run < bytes => Ok(Placed::Nowhere),
            (L2Entry::Data { host, .. }, _) => Ok(self.place(&tables, host + self.geometry.in_cluster(offset))),
            (L2Entry::Unallocated, _) => Ok(Placed::Below),
            _ => Ok(Placed::Nowhere),
        }
    }

    fn place_write(&self, offset: u64, bytes: u64) -> Result<Placed<'_>, BlockError> {
        let mut tables = self.lock_settled(offset, bytes);
        tables.begin_change(offset, bytes)?;
        let found = tables.in_place(offset, bytes);
        match tables.noticing(found)? {
            Some((host, run)) if run == bytes => Ok(self.place(&tables, host)),
            _ => Ok(Placed::Nowhere),
        }
    }

    fn land(&self, ticket: Ticket) {
        self.flights.land(ticket);
    }

    fn write_zeroes(&self, below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.zero_all(below, offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.discard_all(offset, bytes)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flush_tables()
    }

    fn pack(&self, cluster: &[u8], packed: &mut Vec<u8>) -> Result<bool, BlockError> {
        self.refuse_packed()?;
        self.refuse_sealed()?;
        Ok(self.pack_cluster(cluster, packed))
    }

    fn write_packed(&self, offset: u64, packed: &[u8]) -> Result<(), BlockError> {
        self.refuse_packed()?;
        self.refuse_sealed()?;
        self.store_or_unpack(offset, packed)
    }

    fn pull(&self, below: Below<'_>, offset: u64, bytes: u64, room: &mut PageBuf) -> Result<u64, BlockError> {
        self.pull_run(below, offset, bytes, room)
    }

    fn cluster_bytes(&self) -> u64 {
        self.geometry.cluster_bytes()
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        let own = self.file.allocated_bytes().map_err(|e| self.failed(Action::Stat, e))?;
        let beside = if self.geometry.data_file { self.data.file.allocated_bytes() } else { Ok(0) };
        Ok(own.saturating_add(beside.map_err(|e| self.data.failed(Action::Stat, e))?))
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn backing_name(&self) -> Option<String> {
        self.tables.lock().header.backing_name.clone()
    }

    fn resize(&self, below: Below<'_>, to_bytes: u64, shrink: bool, room: Preallocation) -> Result<(), BlockError> {
        self.resize_over(below, to_bytes, shrink, room)
    }

    fn as_qcow2(self: Arc<Self>) -> Option<Arc<Qcow2Node>> {
        Some(self)
    }
}

impl Drop for Qcow2Node {
    fn drop(&mut self) {
        let tables = self.tables.get_mut();
        if !tables.changed && !tables.is_dirty() {
            // An image that was only looked at, or changed as a whole, is on disk already.
            return;
        }
        // Twice: the first writes the tables, the second the refcounts of what they gave up.
        if self.flush_tables().is_ok() && self.tables.get_mut().refcount_cache.has_dirty() {
            let _ = self.flush_tables();
        }
        // An error leaves bitmaps that nobody trusts.
        let _ = self.close_bitmaps();
    }
}

/// Everything written to either file is on stable storage when this returns: guest data first.
fn sync_both(data: &Data, file: &dyn FileBackend, path: &Path, is_apart: bool) -> Result<(), BlockError> {
    if is_apart {
        data.file.sync_data().map_err(|e| data.failed(Action::Sync, e))?;
    }
    file.sync_data().map_err(|e| BlockError::io(path, Action::Sync, e))
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
