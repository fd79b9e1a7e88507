//! VMware disks: one sparse file, a stream, or a descriptor with extents in files beside it.

mod create;
mod identity;
mod info;
mod sparse;
mod stream;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::vmdk::{
    Access, Descriptor, ExtentKind as LineKind, ExtentLine, GD_ENTRIES_MAX, SECTOR_BYTES, SparseHeader, VmdkError,
    deflate_grain,
};

use crate::error::BlockError;
use crate::io::FileBackend;
use crate::mapped::{Mapped, Store};
use crate::node::{Below, Extent, ExtentKind, Node};
use crate::sys::{ReadBufs, WriteBufs};
use identity::{Identity, find_descriptor, sparse_header};
use sparse::{GrainTables, open_sparse};
use stream::StreamWriter;

pub use create::{VmdkOptions, create_vmdk, create_vmdk_extent, vmdk_extents};
pub use identity::{vmdk_descriptor, vmdk_extent_names};
pub use info::{VmdkExtentInfo, VmdkInfo};

/// An extent file of a vmdk, open, with its name in errors.
pub(crate) type ExtentFile = (Arc<dyn FileBackend>, PathBuf);

/// A part of the disk.
struct Part {
    /// Where it starts on the disk.
    start: u64,
    bytes: u64,
    read_only: bool,
    /// Which file: 0 for the image's own, n for the n-th of its extents.
    file: usize,
    kind: PartKind,
}

enum PartKind {
    /// The bytes of the disk, from this offset of the file on.
    Flat(Store, u64),
    Zero,
    Sparse(Box<Mapped<GrainTables>>),
    Stream(StreamWriter),
}

/// A vmdk.
pub(crate) struct VmdkNode {
    path: PathBuf,
    size_bytes: u64,
    /// In the order of the disk, without gaps.
    parts: Vec<Part>,
    identity: Identity,
    descriptor: Option<Descriptor>,
    /// The image is one file.
    is_single: bool,
}

/// Opens a vmdk. `extents` are the files of [`vmdk_extent_names`], in that order.
pub(crate) fn open_vmdk(
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    extents: Vec<ExtentFile>,
    read_only: bool,
    no_sync: bool,
) -> Result<VmdkNode, BlockError> {
    let store = Store { file: file.clone(), path: path.clone(), no_sync };
    let header = sparse_header(&store)?;
    let (descriptor, place) = find_descriptor(&store, header.as_ref())?.unzip();
    let is_single = header.is_some();
    let parts = match (header, &descriptor) {
        (Some(header), _) => {
            let whole = Store { file, path: path.clone(), no_sync };
            vec![open_single(whole, header, read_only)?]
        }
        (None, Some(descriptor)) => open_parts(&store, descriptor, extents, read_only)?,
        (None, None) => return Err(store.refused(VmdkError::NoDescriptor)),
    };
    let size_bytes = parts.iter().map(|part| part.bytes).sum();
    let identity = Identity::new(store, place);
    Ok(VmdkNode { path, size_bytes, parts, identity, descriptor, is_single })
}

fn open_single(store: Store, header: SparseHeader, read_only: bool) -> Result<Part, BlockError> {
    let bytes = header.capacity_sectors * SECTOR_BYTES;
    let kind = if header.is_compressed() && !read_only {
        PartKind::Stream(StreamWriter::new(store, &header, bytes)?)
    } else {
        PartKind::Sparse(Box::new(open_sparse(store, header, 0, bytes, read_only)?))
    };
    Ok(Part { start: 0, bytes, read_only, file: 0, kind })
}

fn open_parts(
    store: &Store,
    descriptor: &Descriptor,
    extents: Vec<ExtentFile>,
    read_only: bool,
) -> Result<Vec<Part>, BlockError> {
    const TYPES: [&str; 5] = ["monolithicFlat", "vmfs", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "custom"];
    if !TYPES.contains(&descriptor.create_type.as_str()) {
        return Err(store.refused(VmdkError::CreateType(descriptor.create_type.clone())));
    }
    if descriptor.extents.is_empty() {
        return Err(store.refused(VmdkError::NoExtents));
    }
    let mut files = (1..).zip(extents);
    let mut start = 0;
    let mut gd_entries = 0;
    let mut parts = Vec::with_capacity(descriptor.extents.len());
    for line in &descriptor.extents {
        let file =
            match line.kind {
                LineKind::Zero => None,
                _ => Some(files.next().ok_or_else(|| BlockError::BackingNotGiven {
                    path: store.path.clone(),
                    backing: line.name.clone(),
                })?),
            };
        let (number, file) =
            file.map(|(number, (file, path))| (number, Store { file, path, no_sync: store.no_sync })).unzip();
        let part = Part { file: number.unwrap_or(0), ..open_line(line, file, start, read_only)? };
        if let PartKind::Sparse(disk) = &part.kind {
            gd_entries += disk.table.gd_entries();
        }
        if gd_entries > GD_ENTRIES_MAX {
            return Err(store.refused(VmdkError::GdTooLarge { entries: gd_entries, max: GD_ENTRIES_MAX }));
        }
        start += part.bytes;
        parts.push(part);
    }
    Ok(parts)
}

/// Opens the extent of a line of the descriptor, which starts at `start` on the disk.
fn open_line(line: &ExtentLine, file: Option<Store>, start: u64, read_only: bool) -> Result<Part, BlockError> {
    let bytes = line.sectors * SECTOR_BYTES;
    let read_only = read_only || line.access == Access::ReadOnly;
    let fits = |file: &Store, have_sectors: u64| {
        let (name, want_sectors) = (line.name.clone(), line.sectors);
        let too_short = VmdkError::ExtentSize { name, have_sectors, want_sectors };
        if have_sectors < want_sectors { Err(file.refused(too_short)) } else { Ok(()) }
    };
    let kind = match (line.kind, file) {
        (LineKind::Flat { offset }, Some(file)) => {
            fits(&file, file.len_bytes()?.saturating_sub(offset) / SECTOR_BYTES)?;
            PartKind::Flat(file, offset)
        }
        (LineKind::Sparse, Some(file)) => {
            let header = sparse_header(&file)?.ok_or_else(|| file.refused(VmdkError::Magic))?;
            fits(&file, header.capacity_sectors)?;
            PartKind::Sparse(Box::new(open_sparse(file, header, start, bytes, read_only)?))
        }
        (_, _) => PartKind::Zero,
    };
    Ok(Part { start, bytes, read_only, file: 0, kind })
}

impl VmdkNode {
    /// Calls `step` for each part of the disk that the range touches: the part, where in it the range starts, how
    /// far from the start of the range that is, and how long it is there.
    fn each_part(
        &self,
        offset: u64,
        bytes: u64,
        mut step: impl FnMut(&Part, u64, usize, u64) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        let end = offset + bytes;
        let first = self.parts.partition_point(|part| part.start + part.bytes <= offset);
        for part in self.parts.get(first..).unwrap_or_default() {
            let from = offset.max(part.start);
            let to = end.min(part.start + part.bytes);
            if from >= end {
                break;
            }
            if from < to {
                step(part, from - part.start, (from - offset) as usize, to - from)?;
            }
        }
        Ok(())
    }

    fn writable(&self, part: &Part) -> Result<(), BlockError> {
        if part.read_only {
            return Err(BlockError::ReadOnly { path: self.path.clone() });
        }
        self.identity.change()
    }
}

impl Node for VmdkNode {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let mut found = Extent::new(bytes, ExtentKind::Zero);
        let mut seen = false;
        self.each_part(offset, bytes, |part, at, _, bytes| {
            if std::mem::replace(&mut seen, true) {
                return Ok(());
            }
            found = match &part.kind {
                PartKind::Zero => Extent::new(bytes, ExtentKind::Zero),
                PartKind::Flat(store, base) => {
                    let (bytes, data) = store.extent(base + at, bytes)?;
                    Extent { file: part.file, ..Extent::placed(bytes, base + at, data) }
                }
                PartKind::Sparse(disk) => Extent { file: part.file, ..disk.extent(at, bytes)? },
                PartKind::Stream(stream) => {
                    let within = at % stream.grain_bytes();
                    let present = stream.find(at / stream.grain_bytes())?.is_some();
                    let kind = if present { ExtentKind::Data } else { ExtentKind::Below };
                    Extent { compressed: present, ..Extent::new(bytes.min(stream.grain_bytes() - within), kind) }
                }
            };
            Ok(())
        })?;
        Ok(found)
    }

    fn read(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.each_part(offset, bufs.len() as u64, |part, at, done, bytes| {
            let bufs = bufs.range(done, bytes as usize);
            match &part.kind {
                PartKind::Zero => {
                    bufs.fill_zero();
                    Ok(())
                }
                PartKind::Flat(store, base) => store.read(base + at, &bufs),
                PartKind::Sparse(disk) => disk.read(below, at, &bufs),
                PartKind::Stream(stream) => stream.read(at, &bufs),
            }
        })
    }

    fn write(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.each_part(offset, bufs.len() as u64, |part, at, done, bytes| {
            self.writable(part)?;
            let bufs = bufs.range(done, bytes as usize);
            match &part.kind {
                PartKind::Zero => Err(BlockError::ReadOnly { path: self.path.clone() }),
                PartKind::Flat(store, base) => store.write(base + at, &bufs),
                PartKind::Sparse(disk) => disk.write(below, at, &bufs),
                PartKind::Stream(stream) => append_plain(stream, at, &bufs, &self.identity.store),
            }
        })
    }

    fn writes_to_page_cache(&self) -> bool {
        matches!(&*self.parts, [Part { kind: PartKind::Sparse(disk), .. }] if disk.store.file.as_host_file().is_some())
    }

    fn write_zeroes(&self, below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.each_part(offset, bytes, |part, at, _, bytes| match &part.kind {
            PartKind::Zero => Ok(()),
            PartKind::Stream(stream) => stream.write_zeroes(at),
            kind => {
                self.writable(part)?;
                match kind {
                    PartKind::Flat(store, base) => store.write_zeroes(base + at, bytes, may_unmap),
                    PartKind::Sparse(disk) => disk.write_zeroes(below, at, bytes, may_unmap),
                    PartKind::Zero | PartKind::Stream(_) => Ok(()),
                }
            }
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.each_part(offset, bytes, |part, at, _, bytes| {
            self.writable(part)?;
            match &part.kind {
                PartKind::Zero | PartKind::Stream(_) => Ok(()),
                PartKind::Flat(store, base) => store.punch_hole(base + at, bytes),
                PartKind::Sparse(disk) => disk.discard(at, bytes),
            }
        })
    }

    fn flush(&self) -> Result<(), BlockError> {
        if !self.is_single {
            self.identity.flush()?;
        }
        self.parts.iter().filter(|part| !part.read_only).try_for_each(|part| match &part.kind {
            PartKind::Zero => Ok(()),
            PartKind::Flat(store, _) => store.sync(),
            PartKind::Sparse(disk) => disk.flush(),
            PartKind::Stream(stream) => stream.flush(),
        })
    }

    fn is_stream(&self) -> bool {
        matches!(self.parts.first(), Some(Part { kind: PartKind::Stream(_), .. }))
    }

    fn pack(&self, cluster: &[u8], packed: &mut Vec<u8>) -> Result<bool, BlockError> {
        if !self.is_stream() {
            return Err(BlockError::NoCompression { path: self.path.clone() });
        }
        deflate_grain(cluster, packed);
        // A stream has no other form of a grain, so it is packed even when it grows.
        Ok(true)
    }

    fn write_packed(&self, offset: u64, packed: &[u8]) -> Result<(), BlockError> {
        match self.parts.first() {
            Some(Part { kind: PartKind::Stream(stream), .. }) => {
                self.identity.change()?;
                stream.append(offset, packed)
            }
            _ => Err(BlockError::NoCompression { path: self.path.clone() }),
        }
    }

    fn cluster_bytes(&self) -> u64 {
        self.parts.iter().find_map(|part| part.kind.grain_bytes()).unwrap_or(0)
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        let own = if !self.is_single { self.identity.store.allocated_bytes()? } else { 0 };
        self.parts.iter().try_fold(own, |sum, part| Ok(sum.saturating_add(part.kind.allocated_bytes()?)))
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn backing_name(&self) -> Option<String> {
        let descriptor = self.descriptor.as_ref().filter(|descriptor| descriptor.parent_cid != u32::MAX);
        descriptor.and_then(|descriptor| descriptor.parent_name.clone())
    }
}

impl PartKind {
    fn grain_bytes(&self) -> Option<u64> {
        match self {
            PartKind::Flat(..) | PartKind::Zero => None,
            PartKind::Sparse(disk) => Some(disk.block_bytes()),
            PartKind::Stream(stream) => Some(stream.grain_bytes()),
        }
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        match self {
            PartKind::Zero => Ok(0),
            PartKind::Flat(store, _) => store.allocated_bytes(),
            PartKind::Sparse(disk) => disk.store.allocated_bytes(),
            PartKind::Stream(stream) => stream.allocated_bytes(),
        }
    }
}

/// Packs and appends whole grains; the last one of the disk may be short.
fn append_plain(stream: &StreamWriter, at: u64, bufs: &WriteBufs<'_>, store: &Store) -> Result<(), BlockError> {
    let grain_bytes = stream.grain_bytes();
    let end = at + bufs.len() as u64;
    if !end.is_multiple_of(grain_bytes) && end != stream.size_bytes() {
        return Err(store.refused(VmdkError::StreamOnly));
    }
    let mut grain = vec![0; grain_bytes as usize];
    let mut packed = Vec::new();
    for done in (0..bufs.len()).step_by(grain_bytes as usize) {
        grain.fill(0);
        bufs.range(done, grain_bytes as usize).copy_to(&mut grain);
        deflate_grain(&grain, &mut packed);
        stream.append(at + done as u64, &packed)?;
    }
    Ok(())
}
