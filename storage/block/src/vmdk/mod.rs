//! VMware disks: one sparse file, a stream, or a descriptor with extents in files beside it.

mod create;
mod sparse;
mod stream;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use image::vmdk::{
    Access, DESCRIPTOR_MAX_BYTES, Descriptor, ExtentKind as LineKind, GD_ENTRIES_MAX, SECTOR_BYTES, SparseHeader,
    VmdkError, deflate_grain, replace_cid,
};

use crate::error::BlockError;
use crate::foreign::{ForeignReport, Places};
use crate::io::FileBackend;
use crate::mapped::{Entry, Mapped, Store};
use crate::node::{Below, Extent, ExtentKind, Node};
use crate::sys::{ReadBufs, WriteBufs};
use sparse::{GrainTables, open_sparse, read_header};
use stream::StreamWriter;

pub use create::{VmdkOptions, create_vmdk};

/// An extent file of a vmdk, open, with its name in errors.
pub(crate) type ExtentFile = (Arc<dyn FileBackend>, PathBuf);

/// A part of the disk.
struct Part {
    /// Where it starts on the disk.
    start: u64,
    bytes: u64,
    read_only: bool,
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
    descriptor_is_embedded: bool,
}

/// The descriptor, whose CID changes with the first write.
struct Identity {
    store: Store,
    /// Where the descriptor is, and how long it can be where it is embedded.
    place: Option<(u64, Option<u64>)>,
    changed: Mutex<bool>,
}

/// The descriptor of the vmdk in `file`: embedded, or the file itself. `None` for an extent without one.
/// Descriptor, and its offset and room.
type Found = (Option<Descriptor>, Option<(u64, Option<u64>)>);

fn find_descriptor(store: &Store, header: Option<&SparseHeader>) -> Result<Found, BlockError> {
    let file_bytes = store.len_bytes()?;
    let (offset, room) = match header {
        None => (0, None),
        Some(header) => match header.descriptor_range(file_bytes).map_err(|e| store.refused(e))? {
            None => return Ok((None, None)),
            Some((offset, bytes)) => (offset, Some(bytes)),
        },
    };
    let text = store.read_vec(offset, room.unwrap_or(DESCRIPTOR_MAX_BYTES + 1))?;
    // An embedded one that is empty is as good as none.
    if room.is_some() && text.first().is_none_or(|byte| *byte == 0) {
        return Ok((None, None));
    }
    let descriptor = Descriptor::parse(&text).map_err(|e| store.refused(e))?;
    Ok((Some(descriptor), Some((offset, room))))
}

fn sparse_header(store: &Store) -> Result<Option<SparseHeader>, BlockError> {
    let first = store.read_vec(0, 4)?;
    if first == b"COWD" {
        return Err(store.refused(VmdkError::Cowd));
    }
    if first == b"KDMV" { read_header(store).map(Some) } else { Ok(None) }
}

/// Names of the extent files that [`open_vmdk`] needs beside `file`, in its order. They are plain names: the
/// caller opens them in the image's own directory, if it may at all. Empty for an image in one file.
pub fn vmdk_extent_names(file: Arc<dyn FileBackend>, path: &Path) -> Result<Vec<String>, BlockError> {
    let store = Store { file, path: path.to_owned(), no_sync: false };
    let header = sparse_header(&store)?;
    if header.is_some() {
        return Ok(Vec::new());
    }
    let (descriptor, _) = find_descriptor(&store, None)?;
    let extents = descriptor.map(|descriptor| descriptor.extents).unwrap_or_default();
    Ok(extents.into_iter().filter(|extent| extent.kind != LineKind::Zero).map(|extent| extent.name).collect())
}

/// What the descriptor of a vmdk says. An extent without one has an empty `create_type`.
pub fn vmdk_descriptor(file: Arc<dyn FileBackend>, path: &Path) -> Result<Option<Descriptor>, BlockError> {
    let store = Store { file, path: path.to_owned(), no_sync: false };
    let header = sparse_header(&store)?;
    Ok(find_descriptor(&store, header.as_ref())?.0)
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
    let (descriptor, place) = find_descriptor(&store, header.as_ref())?;
    let descriptor_is_embedded = header.is_some();
    let parts = match (header, &descriptor) {
        (Some(header), _) => {
            let whole = Store { file, path: path.clone(), no_sync };
            vec![open_single(whole, header, read_only)?]
        }
        (None, Some(descriptor)) => open_parts(&store, descriptor, extents, read_only)?,
        (None, None) => return Err(store.refused(VmdkError::NoDescriptor)),
    };
    let size_bytes = parts.iter().map(|part| part.bytes).sum();
    let identity = Identity { store, place, changed: Mutex::new(false) };
    Ok(VmdkNode { path, size_bytes, parts, identity, descriptor, descriptor_is_embedded })
}

fn open_single(store: Store, header: SparseHeader, read_only: bool) -> Result<Part, BlockError> {
    let bytes = header.capacity_sectors * SECTOR_BYTES;
    let kind = if header.is_compressed() && !read_only {
        PartKind::Stream(StreamWriter::new(store, &header, bytes)?)
    } else {
        PartKind::Sparse(Box::new(open_sparse(store, header, 0, bytes, read_only)?))
    };
    Ok(Part { start: 0, bytes, read_only, kind })
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
    let mut files = extents.into_iter();
    let mut start = 0;
    let mut gd_entries = 0;
    let mut parts = Vec::with_capacity(descriptor.extents.len());
    for line in &descriptor.extents {
        let bytes = line.sectors * SECTOR_BYTES;
        let read_only = read_only || line.access == Access::ReadOnly;
        let mut next_file = || {
            let (file, path) = files
                .next()
                .ok_or_else(|| BlockError::BackingNotGiven { path: store.path.clone(), backing: line.name.clone() })?;
            Ok::<Store, BlockError>(Store { file, path, no_sync: store.no_sync })
        };
        let too_short =
            |have_sectors| VmdkError::ExtentSize { name: line.name.clone(), have_sectors, want_sectors: line.sectors };
        let kind = match line.kind {
            LineKind::Zero => PartKind::Zero,
            LineKind::Flat { offset } => {
                let file = next_file()?;
                let have = file.len_bytes()?.saturating_sub(offset);
                if have < bytes {
                    return Err(store.refused(too_short(have / SECTOR_BYTES)));
                }
                PartKind::Flat(file, offset)
            }
            LineKind::Sparse => {
                let file = next_file()?;
                let header = sparse_header(&file)?.ok_or_else(|| file.refused(VmdkError::Magic))?;
                gd_entries += header.gd_entries();
                if gd_entries > GD_ENTRIES_MAX {
                    return Err(store.refused(VmdkError::GdTooLarge { entries: gd_entries, max: GD_ENTRIES_MAX }));
                }
                if header.capacity_sectors < line.sectors {
                    return Err(store.refused(too_short(header.capacity_sectors)));
                }
                PartKind::Sparse(Box::new(open_sparse(file, header, start, bytes, read_only)?))
            }
        };
        parts.push(Part { start, bytes, read_only, kind });
        start += bytes;
    }
    Ok(parts)
}

impl Identity {
    /// Gives the contents a new CID before they change for the first time, so that images which have this one as
    /// their parent can tell.
    fn change(&self) -> Result<(), BlockError> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if *changed {
            return Ok(());
        }
        if let Some((offset, room)) = self.place {
            let raw = self.store.read_vec(offset, room.unwrap_or(DESCRIPTOR_MAX_BYTES))?;
            let text = raw.split(|byte| *byte == 0).next().unwrap_or_default();
            let text = std::str::from_utf8(text).map_err(|_| self.store.refused(VmdkError::DescriptorText))?;
            if let Some(text) = replace_cid(text, create::random_cid(&self.store.path)?) {
                let mut bytes = text.into_bytes();
                match room {
                    Some(room) if bytes.len() as u64 > room => {
                        return Err(self.store.refused(VmdkError::DescriptorTooLarge { bytes: bytes.len() as u64 }));
                    }
                    Some(room) => bytes.resize(room as usize, 0),
                    None => {}
                }
                self.store.write_slice(offset, &bytes)?;
                if room.is_none() {
                    self.store.set_len_bytes(bytes.len() as u64)?;
                }
            }
        }
        *changed = true;
        Ok(())
    }
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

/// What only a vmdk says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkInfo {
    /// Changes with the contents.
    pub cid: u32,
    /// The parent's CID when the image was made; `0xffff_ffff` without a parent.
    pub parent_cid: u32,
    /// `monolithicSparse` and others; empty for an extent without a descriptor.
    pub create_type: String,
    /// In the order of the disk.
    pub extents: Vec<VmdkExtentInfo>,
}

/// An extent of a vmdk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkExtentInfo {
    /// Size of its part of the disk.
    pub size_bytes: u64,
    /// Its file; `None` where the descriptor says that there are zeroes.
    pub path: Option<PathBuf>,
    /// Grain size; 0 for a flat one.
    pub cluster_bytes: u64,
    /// `SPARSE`, `FLAT` or `ZERO`; empty for an image in one file.
    pub kind: &'static str,
    /// Whether its grains are compressed.
    pub compressed: bool,
}

impl VmdkNode {
    /// What the image says about itself.
    pub(crate) fn info(&self) -> VmdkInfo {
        let single = self.descriptor_is_embedded;
        let extents = self.parts.iter().map(|part| VmdkExtentInfo {
            size_bytes: part.bytes,
            path: part.kind.path().cloned(),
            cluster_bytes: part.kind.grain_bytes().unwrap_or(0),
            kind: if single { "" } else { part.kind.name() },
            compressed: part.kind.is_compressed(),
        });
        VmdkInfo {
            cid: self.descriptor.as_ref().map_or(0, |descriptor| descriptor.cid),
            parent_cid: self.descriptor.as_ref().map_or(u32::MAX, |descriptor| descriptor.parent_cid),
            create_type: self.descriptor.as_ref().map_or_else(String::new, |descriptor| descriptor.create_type.clone()),
            extents: extents.collect(),
        }
    }

    /// Looks for entries that make no sense and for grains with two owners.
    pub(crate) fn check(&self) -> Result<ForeignReport, BlockError> {
        let mut report = ForeignReport::default();
        for part in &self.parts {
            let PartKind::Sparse(disk) = &part.kind else { continue };
            let unit = if disk.table.is_compressed() { SECTOR_BYTES } else { disk.block_bytes() };
            let mut places = Places::new(disk.store.len_bytes()?, unit);
            disk.check(&mut report, &mut |grain, entry, report| {
                if let Entry::At(offset) | Entry::Packed(offset) = entry
                    && !places.claim(offset)
                {
                    report.add(|| format!("grain {grain} is at {offset:#x}, where another grain is"));
                }
            })?;
        }
        Ok(report)
    }
}

impl Node for VmdkNode {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let mut found = Extent { bytes, kind: ExtentKind::Zero, host: None, compressed: false };
        let mut seen = false;
        self.each_part(offset, bytes, |part, at, _, bytes| {
            if std::mem::replace(&mut seen, true) {
                return Ok(());
            }
            found = match &part.kind {
                PartKind::Zero => Extent { bytes, kind: ExtentKind::Zero, host: None, compressed: false },
                PartKind::Flat(store, base) => {
                    let (bytes, data) = store.extent(base + at, bytes)?;
                    let kind = if data { ExtentKind::Data } else { ExtentKind::Zero };
                    // Callers look for the bytes in the image's own file.
                    Extent { bytes, kind, host: None, compressed: false }
                }
                PartKind::Sparse(disk) => {
                    let extent = disk.extent(at, bytes)?;
                    Extent { host: extent.host.filter(|_| self.parts.len() == 1), ..extent }
                }
                PartKind::Stream(stream) => {
                    let within = at % stream.grain_bytes();
                    let present = stream.find(at / stream.grain_bytes())?.is_some();
                    let kind = if present { ExtentKind::Data } else { ExtentKind::Below };
                    Extent { bytes: bytes.min(stream.grain_bytes() - within), kind, host: None, compressed: present }
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
        let changed = *self.identity.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed && self.parts.len() > 1 {
            self.identity.store.sync()?;
        }
        self.parts.iter().filter(|part| !part.read_only).try_for_each(|part| match &part.kind {
            PartKind::Zero => Ok(()),
            PartKind::Flat(store, _) => store.sync(),
            PartKind::Sparse(disk) => disk.flush(),
            PartKind::Stream(stream) => stream.flush(),
        })
    }

    fn pack(&self, cluster: &[u8], packed: &mut Vec<u8>) -> Result<bool, BlockError> {
        if !matches!(self.parts.first(), Some(Part { kind: PartKind::Stream(_), .. })) {
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
        let own = if self.parts.len() > 1 { self.identity.store.allocated_bytes()? } else { 0 };
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
    fn name(&self) -> &'static str {
        match self {
            PartKind::Flat(..) => "FLAT",
            PartKind::Zero => "ZERO",
            PartKind::Sparse(_) | PartKind::Stream(_) => "SPARSE",
        }
    }

    fn path(&self) -> Option<&PathBuf> {
        match self {
            PartKind::Flat(store, _) => Some(&store.path),
            PartKind::Zero => None,
            PartKind::Sparse(disk) => Some(&disk.store.path),
            PartKind::Stream(stream) => Some(stream.path()),
        }
    }

    fn is_compressed(&self) -> bool {
        match self {
            PartKind::Flat(..) | PartKind::Zero => false,
            PartKind::Sparse(disk) => disk.table.is_compressed(),
            PartKind::Stream(_) => true,
        }
    }

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
