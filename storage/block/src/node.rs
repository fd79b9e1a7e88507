//! The layers of a disk: what every image format can do, and how one shows through another.

use std::path::Path;
use std::sync::Arc;

use crate::create::Preallocation;
use crate::error::BlockError;
use crate::io::FileBackend;
use crate::page_buf::PageBuf;
use crate::qcow2::Flight;
use crate::sys::{ReadBufs, WriteBufs};

/// What a run of a layer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// The layer holds its bytes.
    Data,
    /// The layer says that it reads as zeroes.
    Zero,
    /// The layer says nothing: what is below shows through, or zeroes where nothing is.
    Below,
}

/// A run that one answer describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length; at least 1.
    pub bytes: u64,
    /// What it is made of.
    pub kind: ExtentKind,
    /// Where in its file it lies, when its bytes are there as they are (for zeroes: reserved there).
    pub host: Option<u64>,
    /// Which file that is: 0 for the image's own, n for the n-th of its extents.
    pub file: usize,
    /// Zeroes that the layer holds like data, and that are a hole of the file.
    pub hole: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Whether the context of an NBD server marks it that was asked for in place of `base:allocation`. It is read like
    /// data.
    pub marked: bool,
}

impl Extent {
    /// A run whose bytes are nowhere as they are.
    pub(crate) fn new(bytes: u64, kind: ExtentKind) -> Extent {
        Extent { bytes, kind, host: None, file: 0, hole: false, compressed: false, marked: false }
    }

    /// A run of a place in a file that is all data, or all hole.
    pub(crate) fn placed(bytes: u64, host: u64, data: bool) -> Extent {
        let kind = if data { ExtentKind::Data } else { ExtentKind::Zero };
        Extent { host: Some(host), hole: !data, ..Extent::new(bytes, kind) }
    }
}

/// A place in an image's file where a caller reads or writes guest data itself: with a ring, or from file to file.
/// Until it is dropped the place belongs to that data.
pub(crate) struct Mapped<'a> {
    /// The file.
    pub(crate) file: &'a dyn FileBackend,
    /// Where in it.
    pub(crate) host: u64,
    /// How many bytes, at least 1.
    pub(crate) bytes: u64,
    /// What remains to be done.
    pub(crate) landing: Landing<'a>,
}

/// Where all of a request lies in a file, as it is.
pub(crate) struct Place<'a> {
    /// The file.
    pub(crate) file: &'a dyn FileBackend,
    /// Where in it.
    pub(crate) host: u64,
    /// For [`Node::land`].
    pub(crate) ticket: Ticket,
}

/// The place of a request in a chain.
pub(crate) struct Found<'a> {
    /// The layer to tell when the request is over.
    pub(crate) node: &'a Arc<dyn Node>,
    /// Where in that layer.
    pub(crate) place: Place<'a>,
}

/// The answer of a layer that is asked for the place of a request.
pub(crate) enum Placed<'a> {
    /// There; it stays the request's until [`Node::land`].
    Here(Place<'a>),
    /// The layer says nothing about any of it.
    Below,
    /// It has no single place, or more must be done than to move data.
    Nowhere,
}

/// What a layer must be told when a request that it found a place for is over.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticket(pub(crate) u64);

/// What has to follow when mapped data was moved.
pub(crate) enum Landing<'a> {
    /// Nothing.
    Nothing,
    /// The request lands.
    Flight(#[allow(dead_code, reason = "what counts is when it is dropped")] Flight<'a>),
    /// New clusters: tables refer to them when told `true`, they go back when told `false` or dropped.
    Filled(Box<dyn Filled + 'a>),
}

/// New clusters that are being filled.
pub(crate) trait Filled {
    /// Whether they hold their data now.
    fn end(&mut self, filled: bool) -> Result<(), BlockError>;
}

impl Mapped<'_> {
    /// The data is in its place: what the guest sees changes now.
    pub(crate) fn finish(self) -> Result<(), BlockError> {
        match self.landing {
            Landing::Filled(mut clusters) => clusters.end(true),
            _ => Ok(()),
        }
    }
}

/// The layers below one, the next one first.
pub(crate) type Below<'a> = &'a [Arc<dyn Node>];

/// One layer of a disk. Several threads use it at once; requests that overlap may take effect in any order.
/// Ranges are inside [`Node::size_bytes`].
pub(crate) trait Node: Send + Sync {
    /// Size of the disk that this layer shows; a multiple of 512.
    fn size_bytes(&self) -> u64;
    /// The longest run from `offset` on, at most `bytes`, that one answer describes, or a part of it.
    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError>;
    /// Fills `bufs` with what a guest sees.
    fn read(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError>;
    /// Writes `bufs`.
    fn write(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError>;
    /// Where the first bytes of a read are in a file, as they are; `None` where [`Node::read`] must do it.
    fn map_read(&self, _offset: u64, _bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        Ok(None)
    }
    /// Where the first bytes of a write belong in a file; `None` where [`Node::write`] must do it.
    fn map_write(&self, _offset: u64, _bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        Ok(None)
    }
    /// Where a read finds all of its bytes.
    fn place_read(&self, _offset: u64, _bytes: u64) -> Result<Placed<'_>, BlockError> {
        Ok(Placed::Nowhere)
    }
    /// Where a write puts all of its bytes, if no table changes.
    fn place_write(&self, _offset: u64, _bytes: u64) -> Result<Placed<'_>, BlockError> {
        Ok(Placed::Nowhere)
    }
    /// A request that was [`Placed::Here`] is over.
    fn land(&self, _ticket: Ticket) {}
    /// Whether [`Node::write`] is little else than to move bytes to the host's page cache, in one file.
    fn writes_to_page_cache(&self) -> bool {
        false
    }
    /// Makes a range read as zeroes. `may_unmap` allows its space to go back.
    fn write_zeroes(&self, below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError>;
    /// The range is not needed any more. It reads as zeroes or unchanged afterwards.
    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError>;
    /// Returns when everything written before is on stable storage.
    fn flush(&self) -> Result<(), BlockError>;
    /// Compresses one whole cluster ([`Node::cluster_bytes`]) into `packed`, replacing what it holds; `false` when
    /// the cluster does not shrink and must be written as it is. Changes nothing in the image, so several threads
    /// pack at once.
    fn pack(&self, _cluster: &[u8], _packed: &mut Vec<u8>) -> Result<bool, BlockError> {
        Err(BlockError::NoCompression { path: self.path().to_owned() })
    }
    /// Stores one cluster from what [`Node::pack`] made of it. `offset` is at a cluster.
    fn write_packed(&self, _offset: u64, _packed: &[u8]) -> Result<(), BlockError> {
        Err(BlockError::NoCompression { path: self.path().to_owned() })
    }
    /// Whether it can only be written by [`Node::pack`] and [`Node::write_packed`], once, in ascending order.
    fn is_stream(&self) -> bool {
        false
    }
    /// Takes in what shows through from `below` where the layer says nothing, so that the guest sees the same without
    /// it: as much of the range as one answer describes. Returns how many bytes are done, at least 1. A range that
    /// `below` does not reach into reads as zeroes.
    fn pull(&self, _below: Below<'_>, _offset: u64, _bytes: u64, _room: &mut PageBuf) -> Result<u64, BlockError> {
        Err(BlockError::NoPull { path: self.path().to_owned() })
    }
    /// The unit in which space is taken; 0 where there is none.
    fn cluster_bytes(&self) -> u64;
    /// Storage the image takes on the host.
    fn allocated_bytes(&self) -> Result<u64, BlockError>;
    /// Its name in errors.
    fn path(&self) -> &Path;
    /// Name of its backing file as stored.
    fn backing_name(&self) -> Option<String> {
        None
    }
    /// Changes the size, see [`crate::Disk::resize`].
    fn resize(&self, _below: Below<'_>, _to_bytes: u64, _shrink: bool, _room: Preallocation) -> Result<(), BlockError> {
        Err(BlockError::NoResize { path: self.path().to_owned() })
    }
    /// The image behind it, when it is a qcow2 one.
    fn as_qcow2(self: Arc<Self>) -> Option<Arc<crate::qcow2::Qcow2Node>> {
        None
    }
}

/// Reads from the first of `nodes`, and through it from those below. What lies past its end is zeroes.
pub(crate) fn read_chain(nodes: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
    let Some((top, below)) = nodes.split_first() else {
        bufs.fill_zero();
        return Ok(());
    };
    let inside = usize::try_from(top.size_bytes().saturating_sub(offset)).unwrap_or(usize::MAX).min(bufs.len());
    if inside < bufs.len() {
        bufs.range(inside, bufs.len() - inside).fill_zero();
    }
    match inside {
        0 => Ok(()),
        all if all == bufs.len() => top.read(below, offset, bufs),
        part => top.read(below, offset, &bufs.range(0, part)),
    }
}
