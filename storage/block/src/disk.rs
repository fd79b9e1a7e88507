//! A guest disk: the top image takes the writes, what it does not map shows through from below.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use image::Format;
use smallvec::SmallVec;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::blkdebug::Breakpoints;
use crate::chain::ChainFile;
use crate::create::{Preallocation, Qcow2Create, format_qcow2};
use crate::error::{Action, BlockError};
use crate::foreign::{ForeignImage, open_foreign};
use crate::host_file::HostFile;
use crate::io::FileBackend;
use crate::luks::{LayerKey, open_luks};
use crate::node::{Below, Extent, ExtentKind, Found, Mapped, Node, Placed, read_chain};
use crate::qcow2::{DataFile, Qcow2Image, Qcow2Node, Qcow2Options, Sealing};
use crate::raw::RawNode;
use crate::sys::{ReadBufs, WriteBufs};
use crate::throttle::Direction;

/// What a guest's discard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// Space goes back to the host.
    Unmap,
    /// Nothing.
    Ignore,
}

/// How the host may cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// The host's page cache is used; a flush makes data safe.
    Writeback,
    /// As `Writeback`, and whoever opened the files did so with `O_DIRECT`.
    None,
    /// As `Writeback`, and each write is on stable storage when it is done.
    Writethrough,
    /// As `None`, and each write is on stable storage when it is done.
    DirectSync,
    /// A flush does nothing. A crash of the host loses the image.
    Unsafe,
}

impl CacheMode {
    /// Whether files are opened past the host's page cache.
    pub fn is_direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::DirectSync)
    }
    /// Whether each write is followed by a flush.
    pub fn writes_through(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::DirectSync)
    }
}

/// What becomes of a write that holds only zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// It is written as it is.
    #[default]
    Off,
    /// The range is made to read as zeroes; its space stays.
    On,
    /// The same, and its space may go back where discards may.
    Unmap,
}

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse writes. Files may be open read only then.
    pub read_only: bool,
    /// Format of the top image.
    pub format: Format,
    /// What a guest's discard does.
    pub discard: Discard,
    /// What becomes of writes that hold only zeroes.
    pub detect_zeroes: DetectZeroes,
    /// How the host may cache.
    pub cache: CacheMode,
    /// Bound of the memory for L2 tables, for each qcow2 image of the chain. At least 16 KiB are used.
    pub l2_cache_bytes: u64,
    /// What opens the encryption of each layer, the top image's first; layers behind the end have no key.
    pub keys: Vec<LayerKey>,
}

impl Default for OpenOptions {
    /// A writable qcow2 with a cache that maps 8 GiB of disk in 64 KiB clusters.
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            format: Format::Qcow2,
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheMode::Writeback,
            l2_cache_bytes: 1 << 20,
            keys: Vec::new(),
        }
    }
}

/// One layer of a disk as a backend of the caller's choice. Top first, then each backing file.
pub struct ChainBackend {
    /// The file.
    pub file: Box<dyn FileBackend>,
    /// Its name in errors.
    pub path_label: PathBuf,
    /// Its format.
    pub format: Format,
    /// The other files that the image is made of, in the order it names them, with their names in errors: those of
    /// some vmdk images, and the external data file of a qcow2 image.
    pub extents: Vec<(Box<dyn FileBackend>, PathBuf)>,
}

/// What a disk has done since it was opened, and the space it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Read requests that succeeded.
    pub reads: u64,
    /// Bytes they read.
    pub read_bytes: u64,
    /// Write and write-zeroes requests that succeeded.
    pub writes: u64,
    /// Bytes they wrote.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Bytes they covered.
    pub discarded_bytes: u64,
    /// Storage the top image takes on the host; 0 when the host does not say.
    pub allocated_bytes: u64,
}

/// Where in a chain a run of a disk comes from, see [`Disk::extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// How many layers down the run is decided: 0 is the top image.
    pub depth: usize,
    /// The run. [`ExtentKind::Below`] means that no layer says anything: it reads as zeroes.
    pub extent: Extent,
}

/// Counters that any thread may add to.
#[derive(Default)]
struct Meters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    discarded_bytes: AtomicU64,
}

impl Meters {
    fn count(requests: &AtomicU64, bytes: &AtomicU64, more: u64) {
        requests.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(more, Ordering::Relaxed);
    }
}

/// One guest disk: a chain of images opened from file descriptors. Any number of threads use it at once;
/// requests that overlap and are in flight together take effect in any order, as on a real disk.
/// Dropping it writes tables back as [`Disk::flush`] does, without reporting errors: flush first.
pub struct Disk {
    nodes: Vec<Arc<dyn Node>>,
    path: PathBuf,
    read_only: bool,
    discard: Discard,
    detect_zeroes: DetectZeroes,
    cache: CacheMode,
    /// A layer lies on a server.
    remote: bool,
    meters: Arc<Meters>,
    /// Where requests of the top image can be made to stop.
    breakpoints: Option<Arc<Breakpoints>>,
    /// Jobs that are told of changes.
    taps: SmallVec<[Arc<dyn Tap>; 1]>,
}

/// A job that must know what changes on a disk. It is told by the thread that makes the change.
pub(crate) trait Tap: Send + Sync {
    /// A range is about to change: what it holds now can still be read. The change waits for this.
    fn before(&self, disk: &Disk, offset: u64, bytes: u64);
    /// A range has changed, or a part of it when the change failed.
    fn after(&self, disk: &Disk, offset: u64, bytes: u64);
}

impl Disk {
    /// Opens a chain of files, the top image first. Nothing is opened by path. Opening for writing rebuilds
    /// the refcounts of an image that was not closed cleanly, and clears feature bits as the format demands.
    pub fn open(chain: Vec<ChainFile>, opts: &OpenOptions) -> Result<Disk, BlockError> {
        let backends: Result<Vec<ChainBackend>, BlockError> = chain.into_iter().map(ChainBackend::from_file).collect();
        Disk::open_backends(backends?, opts)
    }

    /// As [`Disk::open`], over backends other than host files.
    pub fn open_backends(chain: Vec<ChainBackend>, opts: &OpenOptions) -> Result<Disk, BlockError> {
        let top = chain.first().ok_or(BlockError::EmptyChain)?;
        if top.format != opts.format {
            let path = top.path_label.clone();
            return Err(BlockError::FormatDisagrees { path, opened: top.format, option: opts.format });
        }
        let path = top.path_label.clone();
        let breakpoints = top.file.breakpoints();
        let remote = chain.iter().any(|layer| layer.file.is_remote());
        let labels: Vec<PathBuf> = chain.iter().map(|file| file.path_label.clone()).collect();
        let mut nodes = Vec::with_capacity(chain.len());
        for (depth, layer) in chain.into_iter().enumerate() {
            let next = labels.get(depth + 1);
            nodes.push(open_node(layer, depth, next, opts)?);
        }
        Ok(Disk {
            nodes,
            path,
            read_only: opts.read_only,
            discard: opts.discard,
            detect_zeroes: opts.detect_zeroes,
            cache: opts.cache,
            remote,
            meters: Arc::default(),
            breakpoints,
            taps: SmallVec::new(),
        })
    }

    /// This disk below a new image that takes what is written, in `file`, which holds nothing and needs no name: what the
    /// disk holds stays as it is. The new image is gone with its file when the disk is dropped.
    pub fn with_scratch(mut self, file: File) -> Result<Disk, BlockError> {
        let path = PathBuf::from("temporary file");
        let chain_file = ChainFile { file, path_label: path.clone(), format: Format::Qcow2, extents: Vec::new() };
        let layer = ChainBackend::from_file(chain_file)?;
        // Nobody looks for what the name says.
        let new = Qcow2Create { backing: Some(("below".to_owned(), String::new())), ..Qcow2Create::default() };
        format_qcow2(&*layer.file, &path, self.size_bytes(), &new)?;
        let options = OpenOptions { cache: CacheMode::Unsafe, discard: Discard::Unmap, ..OpenOptions::default() };
        let top = open_node(layer, 0, Some(&self.path), &options)?;
        self.nodes.insert(0, top);
        Ok(Disk { path, read_only: false, cache: CacheMode::Unsafe, discard: Discard::Unmap, ..self })
    }

    /// Size the guest sees; a multiple of 512. It changes when the top image is resized or a snapshot applied.
    pub fn size_bytes(&self) -> u64 {
        self.nodes.first().map_or(0, |top| top.size_bytes())
    }

    /// Reads guest memory full from `offset`. The slices are marked dirty in their bitmaps, also when the
    /// read fails, because any part may have been filled.
    pub fn read_at<B: BitmapSlice>(&self, offset: u64, bufs: &[VolatileSlice<'_, B>]) -> Result<(), BlockError> {
        let result = self.read_bufs(offset, &ReadBufs::from_guest(bufs));
        for slice in bufs {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        result
    }

    /// Writes guest memory to `offset`. After an error any part may have been written; the same write can be
    /// repeated.
    pub fn write_at<B: BitmapSlice>(&self, offset: u64, bufs: &[VolatileSlice<'_, B>]) -> Result<(), BlockError> {
        self.write_bufs(offset, &WriteBufs::from_guest(bufs))
    }

    /// Reads into our own memory.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.read_bufs(offset, &ReadBufs::from_slice(buf))
    }

    /// Writes our own memory.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<(), BlockError> {
        self.write_bufs(offset, &WriteBufs::from_slice(buf))
    }

    /// What the disk is made of from `offset` on: the longest run, at most `bytes`, that one answer describes, or
    /// a part of it. `bytes` is at least 1.
    pub fn extent(&self, offset: u64, bytes: u64) -> Result<ChainExtent, BlockError> {
        self.check_range(offset, bytes)?;
        let mut bytes = bytes;
        for (depth, node) in self.nodes.iter().enumerate() {
            let inside = node.size_bytes().saturating_sub(offset);
            if inside == 0 {
                let extent = Extent::new(bytes, ExtentKind::Below);
                return Ok(ChainExtent { depth, extent });
            }
            let extent = node.extent(offset, bytes.min(inside))?;
            if extent.kind != ExtentKind::Below {
                return Ok(ChainExtent { depth, extent });
            }
            bytes = extent.bytes;
        }
        let extent = Extent::new(bytes, ExtentKind::Below);
        Ok(ChainExtent { depth: self.nodes.len(), extent })
    }

    fn top(&self) -> Result<(&dyn Node, Below<'_>), BlockError> {
        let (top, below) = self.nodes.split_first().ok_or(BlockError::EmptyChain)?;
        Ok((&**top, below))
    }

    fn read_bufs(&self, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.check_range(offset, bufs.len() as u64)?;
        read_chain(&self.nodes, offset, bufs)?;
        self.count(Direction::Read, bufs.len() as u64);
        Ok(())
    }

    fn write_bufs(&self, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        let bytes = bufs.len() as u64;
        self.check_write(offset, bytes)?;
        if self.detect_zeroes != DetectZeroes::Off && bufs.is_zero() {
            let unmap = self.detect_zeroes == DetectZeroes::Unmap && self.discard == Discard::Unmap;
            return self.write_zeroes(offset, bytes, unmap);
        }
        let (top, below) = self.top()?;
        self.changing(offset, bytes, || top.write(below, offset, bufs))?;
        self.written()?;
        self.count(Direction::Write, bytes);
        Ok(())
    }

    /// Compresses one cluster of the top image into `packed`; `false` when it does not shrink. A cluster that the
    /// end of the disk cuts short is filled up with zeroes.
    pub fn pack(&self, cluster: &[u8], packed: &mut Vec<u8>) -> Result<bool, BlockError> {
        let top = self.top()?.0;
        let whole = usize::try_from(top.cluster_bytes()).unwrap_or(usize::MAX);
        if cluster.len() >= whole {
            return top.pack(cluster, packed);
        }
        let mut filled = cluster.to_vec();
        filled.resize(whole, 0);
        top.pack(&filled, packed)
    }

    /// Where the first bytes of a range are in a file as they are, and which file. The layer is the one that
    /// [`Disk::extent`] named.
    pub(crate) fn map_read(&self, depth: usize, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        self.check_range(offset, bytes)?;
        self.nodes.get(depth).map_or(Ok(None), |node| node.map_read(offset, bytes))
    }

    /// Where the first bytes of a write belong in a file, if the caller can put them there itself.
    pub(crate) fn map_write(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        self.check_write(offset, bytes)?;
        // A job has to see what is written.
        if self.taps.is_empty() { self.top()?.0.map_write(offset, bytes) } else { Ok(None) }
    }

    /// Where all of a request lies in a file as it is, if moving its data is all there is to do.
    pub(crate) fn place(&self, direction: Direction, offset: u64, bytes: u64) -> Result<Option<Found<'_>>, BlockError> {
        let layers = match direction {
            Direction::Read => {
                self.check_range(offset, bytes)?;
                &self.nodes[..]
            }
            Direction::Write => {
                self.check_write(offset, bytes)?;
                let more_to_do =
                    !self.taps.is_empty() || self.detect_zeroes != DetectZeroes::Off || self.cache.writes_through();
                if more_to_do {
                    return Ok(None);
                }
                self.nodes.get(..1).unwrap_or_default()
            }
        };
        let end = offset.saturating_add(bytes);
        for node in layers {
            let placed = match direction {
                _ if end > node.size_bytes() => Placed::Nowhere,
                Direction::Read => node.place_read(offset, bytes)?,
                Direction::Write => node.place_write(offset, bytes)?,
            };
            match placed {
                Placed::Here(place) => return Ok(Some(Found { node, place })),
                Placed::Below => {}
                Placed::Nowhere => return Ok(None),
            }
        }
        Ok(None)
    }

    /// A request has succeeded.
    pub(crate) fn count(&self, direction: Direction, bytes: u64) {
        match direction {
            Direction::Read => Meters::count(&self.meters.reads, &self.meters.read_bytes, bytes),
            Direction::Write => Meters::count(&self.meters.writes, &self.meters.written_bytes, bytes),
        }
    }

    /// Stores one cluster from what [`Disk::pack`] made of it. `offset` is at a cluster; `bytes` is what the
    /// cluster covers of the disk.
    pub fn write_packed(&self, offset: u64, packed: &[u8], bytes: u64) -> Result<(), BlockError> {
        self.check_write(offset, bytes)?;
        self.check_whole(offset, bytes)?;
        self.changing(offset, bytes, || self.top()?.0.write_packed(offset, packed))?;
        self.written()?;
        self.count(Direction::Write, bytes);
        Ok(())
    }

    /// Writes a range compressed, cluster by cluster; clusters that do not shrink are stored as they are.
    /// `PartialCluster`, with nothing changed: the range is not whole clusters, and does not end with the disk.
    pub fn write_compressed(&self, offset: u64, plain: &[u8]) -> Result<(), BlockError> {
        self.check_write(offset, plain.len() as u64)?;
        self.check_whole(offset, plain.len() as u64)?;
        let unit = self.cluster_bytes().max(512);
        let mut packed = Vec::new();
        for (at, cluster) in (offset..).step_by(unit as usize).zip(plain.chunks(unit as usize)) {
            if self.pack(cluster, &mut packed)? {
                self.write_packed(at, &packed, cluster.len() as u64)?;
            } else {
                self.write(at, cluster)?;
            }
        }
        Ok(())
    }

    /// A packed cluster has all of its bytes: what a range leaves out of it would be lost.
    fn check_whole(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        let cluster_bytes = self.cluster_bytes().max(1);
        let is_end = offset.saturating_add(bytes) == self.size_bytes();
        if offset.is_multiple_of(cluster_bytes) && (is_end || bytes.is_multiple_of(cluster_bytes)) {
            return Ok(());
        }
        Err(BlockError::PartialCluster { path: self.path.clone(), offset, bytes, cluster_bytes })
    }

    /// Makes a range read as zeroes. `may_unmap` allows its space to go back to the host.
    pub fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check_write(offset, bytes)?;
        let (top, below) = self.top()?;
        self.changing(offset, bytes, || top.write_zeroes(below, offset, bytes, may_unmap))?;
        self.written()?;
        self.count(Direction::Write, bytes);
        Ok(())
    }

    /// Tells that the guest does not need a range any more. Whole clusters read as zeroes afterwards or are
    /// unchanged; parts of clusters are unchanged.
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_write(offset, bytes)?;
        if self.discard == Discard::Unmap {
            self.changing(offset, bytes, || self.top()?.0.discard(offset, bytes))?;
            self.written()?;
        }
        Meters::count(&self.meters.discards, &self.meters.discarded_bytes, bytes);
        Ok(())
    }

    /// Returns when everything written before is on stable storage: data, then tables, in an order that a
    /// crash cannot turn into damage. After a failure other than lack of space the disk refuses to go on.
    pub fn flush(&self) -> Result<(), BlockError> {
        if !self.read_only {
            self.top()?.0.flush()?;
        }
        self.meters.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A write is in its place: with [`CacheMode::writes_through`] it goes to stable storage now.
    pub(crate) fn written(&self) -> Result<(), BlockError> {
        if self.cache.writes_through() { self.top()?.0.flush() } else { Ok(()) }
    }

    /// Changes the size of the disk, where the top image's format can; rounded up to 512 bytes. New bytes read as zeroes,
    /// whatever is below. Shrinking needs `shrink`; what lies behind the new end is lost.
    pub fn resize(&self, to_bytes: u64, shrink: bool, room: Preallocation) -> Result<(), BlockError> {
        self.check_write(0, 0)?;
        if !self.taps.is_empty() {
            return Err(BlockError::BusyWithJob { path: self.path.clone() });
        }
        let (top, below) = self.top()?;
        top.resize(below, to_bytes, shrink, room)
    }

    /// The top image, for operations on it as a whole; `None` when it is no qcow2 image.
    pub fn qcow2(&self) -> Option<Qcow2Image> {
        let top = self.nodes.first()?.clone();
        top.as_qcow2().map(Qcow2Image::of)
    }

    /// The unit in which the top image takes space; 0 where there is none.
    pub fn cluster_bytes(&self) -> u64 {
        self.nodes.first().map_or(0, |top| top.cluster_bytes())
    }

    /// Whether requests wait for a server, so that many at once take as long as one.
    pub fn is_remote(&self) -> bool {
        self.remote
    }

    /// Whether the host's page cache is bypassed.
    pub(crate) fn is_direct(&self) -> bool {
        self.cache.is_direct()
    }

    /// See [`Node::writes_to_page_cache`].
    pub(crate) fn writes_to_page_cache(&self) -> bool {
        self.nodes.first().is_some_and(|top| top.writes_to_page_cache())
    }

    /// Whether the top image can only be written once, compressed, in ascending order.
    pub fn is_stream(&self) -> bool {
        self.nodes.first().is_some_and(|top| top.is_stream())
    }

    /// Where requests can be made to stop, if the file of the top image is a [`crate::blkdebug::Blkdebug`].
    pub fn breakpoints(&self) -> Option<&Arc<Breakpoints>> {
        self.breakpoints.as_ref()
    }

    /// How many images the disk is made of.
    pub fn layers(&self) -> usize {
        self.nodes.len()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Name of the top image in messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the disk has done since it was opened.
    pub fn counters(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            reads: of(&self.meters.reads),
            read_bytes: of(&self.meters.read_bytes),
            writes: of(&self.meters.writes),
            written_bytes: of(&self.meters.written_bytes),
            flushes: of(&self.meters.flushes),
            discards: of(&self.meters.discards),
            discarded_bytes: of(&self.meters.discarded_bytes),
            allocated_bytes: self.nodes.first().map_or(0, |top| top.allocated_bytes().unwrap_or(0)),
        }
    }

    /// Makes a change of a range and tells the jobs.
    fn changing<T>(
        &self,
        offset: u64,
        bytes: u64,
        change: impl FnOnce() -> Result<T, BlockError>,
    ) -> Result<T, BlockError> {
        self.taps.iter().for_each(|tap| tap.before(self, offset, bytes));
        let changed = change();
        self.taps.iter().for_each(|tap| tap.after(self, offset, bytes));
        changed
    }

    /// The layers, the top one first.
    pub(crate) fn nodes(&self) -> &[Arc<dyn Node>] {
        &self.nodes
    }

    /// Goes on with other layers, of which there is at least one: no request is under way.
    pub(crate) fn set_nodes(&mut self, nodes: Vec<Arc<dyn Node>>) {
        self.path = nodes.first().map_or_else(PathBuf::new, |top| top.path().to_owned());
        self.nodes = nodes;
    }

    pub(crate) fn add_tap(&mut self, tap: Arc<dyn Tap>) {
        self.taps.push(tap);
    }

    pub(crate) fn remove_tap(&mut self, tap: &Arc<dyn Tap>) {
        self.taps.retain(|kept| !Arc::ptr_eq(kept, tap));
    }

    /// A disk over the layers from `depth` on, which it shares with this one.
    pub(crate) fn view(&self, depth: usize, read_only: bool) -> Disk {
        let nodes = self.nodes.get(depth..).unwrap_or_default().to_vec();
        let path = nodes.first().map_or_else(PathBuf::new, |top| top.path().to_owned());
        let Disk { discard, cache, remote, .. } = *self;
        let (meters, breakpoints, taps) = (Arc::default(), None, SmallVec::new());
        let detect_zeroes = DetectZeroes::Off;
        Disk { nodes, path, read_only, discard, detect_zeroes, cache, remote, meters, breakpoints, taps }
    }

    /// Goes on with the layers of another disk: no request is under way.
    pub(crate) fn move_to(&mut self, target: Disk) {
        self.remote = target.remote;
        self.set_nodes(target.nodes);
    }

    /// Puts a layer in the place of another one over the same image: opened anew, to be written.
    pub(crate) fn replace_node(&mut self, depth: usize, layer: ChainBackend) -> Result<(), BlockError> {
        let next = self.nodes.get(depth + 1).map(|next| next.path().to_owned());
        let opts = OpenOptions { discard: self.discard, ..OpenOptions::default() };
        let node = open_node(layer, 0, next.as_ref(), &opts)?;
        match self.nodes.get_mut(depth) {
            Some(place) => *place = node,
            None => return Err(BlockError::EmptyChain),
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        let size_bytes = self.size_bytes();
        match offset.checked_add(bytes) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(BlockError::OutOfRange { offset, bytes, size_bytes }),
        }
    }

    fn check_write(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly { path: self.path.clone() });
        }
        self.check_range(offset, bytes)
    }
}

impl ChainBackend {
    /// The external data file of a qcow2 image: the one file beside it.
    pub(crate) fn data_file(extents: Vec<(Box<dyn FileBackend>, PathBuf)>) -> DataFile {
        let first = extents.into_iter().next();
        first.map_or(DataFile::Inside, |(file, path)| DataFile::Given(file.into(), path))
    }

    /// An open file of a chain, with its locks.
    pub fn from_file(chain_file: ChainFile) -> Result<ChainBackend, BlockError> {
        let ChainFile { file, path_label, format, extents } = chain_file;
        let host = |file: File, path: &Path| -> Result<Box<dyn FileBackend>, BlockError> {
            let file = HostFile::new(file).map_err(|e| BlockError::io(path, Action::Stat, e))?;
            // The tables of a qcow2 image say how long it is; others end where their file ends.
            Ok(Box::new(if format == Format::Qcow2 { file.growing() } else { file }))
        };
        let file = host(file, &path_label)?;
        let extents = extents.into_iter().map(|(file, path)| Ok((host(file, &path)?, path)));
        Ok(ChainBackend { file, extents: extents.collect::<Result<_, BlockError>>()?, path_label, format })
    }
}

fn open_node(
    layer: ChainBackend,
    depth: usize,
    next: Option<&PathBuf>,
    opts: &OpenOptions,
) -> Result<Arc<dyn Node>, BlockError> {
    let ChainBackend { file, path_label: path, format, extents } = layer;
    let file: Arc<dyn FileBackend> = file.into();
    let key = opts.keys.get(depth).unwrap_or(&LayerKey::None);
    let (read_only, no_sync) = (opts.read_only || depth > 0, opts.cache == CacheMode::Unsafe);
    let node: Arc<dyn Node> = match format {
        Format::Raw => Arc::new(RawNode::open(file, path, no_sync)?),
        Format::Luks => Arc::new(open_luks(file, path, key, read_only, no_sync)?),
        Format::Qcow2 => {
            let options = Qcow2Options {
                read_only,
                has_backing: next.is_some(),
                punch_freed: opts.discard == Discard::Unmap,
                no_sync,
                l2_cache_bytes: opts.l2_cache_bytes,
                sealing: Sealing::Plain,
            };
            Arc::new(Qcow2Node::open(file, ChainBackend::data_file(extents), path, options, key)?)
        }
        Format::Vdi | Format::Vmdk | Format::Vhdx | Format::Vpc => {
            let extents = extents.into_iter().map(|(file, path)| (file.into(), path)).collect();
            open_foreign(ForeignImage { file, path, format, extents }, read_only, no_sync)?
        }
    };
    match (node.backing_name(), next) {
        (Some(backing), None) => Err(BlockError::BackingNotGiven { path: node.path().to_owned(), backing }),
        (None, Some(next)) => Err(BlockError::UnexpectedBacking { path: node.path().to_owned(), next: next.clone() }),
        _ => Ok(node),
    }
}

#[test]
fn several_threads_can_use_a_disk() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Disk>();
}
