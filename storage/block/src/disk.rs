//! A guest disk: the top image takes the writes, what it does not map shows through from below.

use std::fs::File;
use std::path::PathBuf;

use image::Format;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::chain::ChainFile;
use crate::error::{Action, BlockError};
use crate::host_file::HostFile;
use crate::io::FileBackend;
use crate::qcow2::{Qcow2Node, Qcow2Options};
use crate::raw::RawNode;
use crate::sys::{ReadBufs, WriteBufs};

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
    /// A flush does nothing. A crash of the host loses the image.
    Unsafe,
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
    /// Turn writes that hold only zeroes into `write_zeroes`.
    pub detect_zeroes: bool,
    /// How the host may cache.
    pub cache: CacheMode,
    /// Bound of the memory for L2 tables, for each qcow2 image of the chain. At least 16 KiB are used.
    pub l2_cache_bytes: u64,
}

impl Default for OpenOptions {
    /// A writable qcow2 with a cache that maps 8 GiB of disk in 64 KiB clusters.
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            format: Format::Qcow2,
            discard: Discard::Unmap,
            detect_zeroes: false,
            cache: CacheMode::Writeback,
            l2_cache_bytes: 1 << 20,
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

pub(crate) enum Node {
    Raw(RawNode),
    Qcow2(Box<Qcow2Node>),
}

impl Node {
    fn size_bytes(&self) -> u64 {
        match self {
            Node::Raw(node) => node.size_bytes(),
            Node::Qcow2(node) => node.size_bytes(),
        }
    }
}

/// Reads from the first of `nodes`, and through it from those below. What lies past its end is zeroes.
pub(crate) fn read_chain(nodes: &mut [Node], offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
    let Some((top, below)) = nodes.split_first_mut() else {
        bufs.fill_zero();
        return Ok(());
    };
    let inside = usize::try_from(top.size_bytes().saturating_sub(offset)).unwrap_or(usize::MAX).min(bufs.len());
    if inside < bufs.len() {
        bufs.range(inside, bufs.len() - inside).fill_zero();
    }
    if inside == 0 {
        return Ok(());
    }
    let cut;
    let bufs = if inside == bufs.len() {
        bufs
    } else {
        cut = bufs.range(0, inside);
        &cut
    };
    match top {
        Node::Raw(node) => node.read(offset, bufs),
        Node::Qcow2(node) => node.read(below, offset, bufs),
    }
}

/// One guest disk: a chain of images opened from file descriptors. `Send`; used by one I/O thread at a time.
/// Dropping it writes tables back as [`Disk::flush`] does, without reporting errors: flush first.
pub struct Disk {
    nodes: Vec<Node>,
    path: PathBuf,
    read_only: bool,
    discard: Discard,
    detect_zeroes: bool,
    cache: CacheMode,
    size_bytes: u64,
    counters: Counters,
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
        let labels: Vec<PathBuf> = chain.iter().map(|file| file.path_label.clone()).collect();
        let mut nodes = Vec::with_capacity(chain.len());
        for (depth, layer) in chain.into_iter().enumerate() {
            let next = labels.get(depth + 1);
            nodes.push(open_node(layer, depth, next, opts)?);
        }
        let size_bytes = nodes.first().map_or(0, Node::size_bytes);
        Ok(Disk {
            nodes,
            path,
            read_only: opts.read_only,
            discard: opts.discard,
            detect_zeroes: opts.detect_zeroes,
            cache: opts.cache,
            size_bytes,
            counters: Counters::default(),
        })
    }

    /// Size the guest sees; a multiple of 512.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads guest memory full from `offset`. The slices are marked dirty in their bitmaps, also when the
    /// read fails, because any part may have been filled.
    pub fn read_at<B: BitmapSlice>(&mut self, offset: u64, bufs: &[VolatileSlice<'_, B>]) -> Result<(), BlockError> {
        let result = self.read_bufs(offset, &ReadBufs::from_guest(bufs));
        for slice in bufs {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        result
    }

    /// Writes guest memory to `offset`. After an error any part may have been written; the same write can be
    /// repeated.
    pub fn write_at<B: BitmapSlice>(&mut self, offset: u64, bufs: &[VolatileSlice<'_, B>]) -> Result<(), BlockError> {
        self.write_bufs(offset, &WriteBufs::from_guest(bufs))
    }

    /// Reads into our own memory.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.read_bufs(offset, &ReadBufs::from_slice(buf))
    }

    /// Writes our own memory.
    pub fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), BlockError> {
        self.write_bufs(offset, &WriteBufs::from_slice(buf))
    }

    fn read_bufs(&mut self, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.check_range(offset, bufs.len() as u64)?;
        read_chain(&mut self.nodes, offset, bufs)?;
        self.counters.reads += 1;
        self.counters.read_bytes += bufs.len() as u64;
        Ok(())
    }

    fn write_bufs(&mut self, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        let bytes = bufs.len() as u64;
        self.check_write(offset, bytes)?;
        if self.detect_zeroes && bufs.is_zero() {
            return self.write_zeroes(offset, bytes, self.discard == Discard::Unmap);
        }
        match self.nodes.split_first_mut() {
            Some((Node::Raw(node), _)) => node.write(offset, bufs)?,
            Some((Node::Qcow2(node), below)) => node.write(below, offset, bufs)?,
            None => return Err(BlockError::EmptyChain),
        }
        self.counters.writes += 1;
        self.counters.written_bytes += bytes;
        Ok(())
    }

    /// Makes a range read as zeroes. `may_unmap` allows its space to go back to the host.
    pub fn write_zeroes(&mut self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check_write(offset, bytes)?;
        match self.nodes.split_first_mut() {
            Some((Node::Raw(node), _)) => node.write_zeroes(offset, bytes, may_unmap)?,
            Some((Node::Qcow2(node), below)) => node.write_zeroes(below, offset, bytes, may_unmap)?,
            None => return Err(BlockError::EmptyChain),
        }
        self.counters.writes += 1;
        self.counters.written_bytes += bytes;
        Ok(())
    }

    /// Tells that the guest does not need a range any more. Whole clusters read as zeroes afterwards or are
    /// unchanged; parts of clusters are unchanged.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_write(offset, bytes)?;
        if self.discard == Discard::Unmap {
            match self.nodes.first_mut() {
                Some(Node::Raw(node)) => node.discard(offset, bytes)?,
                Some(Node::Qcow2(node)) => node.discard(offset, bytes)?,
                None => return Err(BlockError::EmptyChain),
            }
        }
        self.counters.discards += 1;
        self.counters.discarded_bytes += bytes;
        Ok(())
    }

    /// Returns when everything written before is on stable storage: data, then tables, in an order that a
    /// crash cannot turn into damage. After a failure other than lack of space the disk refuses to go on.
    pub fn flush(&mut self) -> Result<(), BlockError> {
        if !self.read_only {
            match self.nodes.first_mut() {
                Some(Node::Raw(node)) if self.cache != CacheMode::Unsafe => node.flush()?,
                Some(Node::Qcow2(node)) => node.flush()?,
                _ => {}
            }
        }
        self.counters.flushes += 1;
        Ok(())
    }

    /// What the disk has done since it was opened.
    pub fn counters(&self) -> Counters {
        let allocated = match self.nodes.first() {
            Some(Node::Raw(node)) => node.allocated_bytes(),
            Some(Node::Qcow2(node)) => node.allocated_bytes(),
            None => Ok(0),
        };
        Counters { allocated_bytes: allocated.unwrap_or(0), ..self.counters }
    }

    fn check_range(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(BlockError::OutOfRange { offset, bytes, size_bytes: self.size_bytes }),
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
    fn from_file(chain_file: ChainFile) -> Result<ChainBackend, BlockError> {
        let ChainFile { file, path_label, format } = chain_file;
        let file: File = file;
        let file = HostFile::new(file).map_err(|e| BlockError::io(&path_label, Action::Stat, e))?;
        Ok(ChainBackend { file: Box::new(file), path_label, format })
    }
}

fn open_node(
    layer: ChainBackend,
    depth: usize,
    next: Option<&PathBuf>,
    opts: &OpenOptions,
) -> Result<Node, BlockError> {
    let ChainBackend { file, path_label: path, format } = layer;
    if format == Format::Raw {
        if let Some(next) = next {
            return Err(BlockError::UnexpectedBacking { path, next: next.clone() });
        }
        return Ok(Node::Raw(RawNode::open(file, path)?));
    }
    let options = Qcow2Options {
        read_only: opts.read_only || depth > 0,
        has_backing: next.is_some(),
        punch_freed: opts.discard == Discard::Unmap,
        no_sync: opts.cache == CacheMode::Unsafe,
        l2_cache_bytes: opts.l2_cache_bytes,
    };
    let node = Qcow2Node::open(file, path, &options)?;
    match (node.backing_name(), next) {
        (Some(backing), None) => {
            Err(BlockError::BackingNotGiven { path: node.path().clone(), backing: backing.to_owned() })
        }
        (None, Some(next)) => Err(BlockError::UnexpectedBacking { path: node.path().clone(), next: next.clone() }),
        _ => Ok(Node::Qcow2(Box::new(node))),
    }
}

#[test]
fn a_disk_can_move_to_its_io_thread() {
    fn is_send<T: Send>() {}
    is_send::<Disk>();
}
