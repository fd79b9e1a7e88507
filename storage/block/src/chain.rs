//! Finding the files of a disk by path: for the daemon and the command line. A VMM gets descriptors.

use std::collections::HashSet;
use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::qcow2::{AUTOCLEAR_BITMAPS, COMPAT_LAZY_REFCOUNTS, CompressionType, CryptMethod, Header};
use image::{Format, PROBE_BYTES};

use crate::disk::ChainBackend;
use crate::error::{Action, BlockError};
use crate::foreign::{ForeignImage, ForeignReport};
use crate::host_file::HostFile;
use crate::io::FileBackend;
use crate::luks::{EncryptionInfo, Volume, disk_bytes};
use crate::qcow2::{check_file, luks_volume, read_header, recount_file};
use crate::spec::has_protocol;
use crate::sys::{ReadBufs, lock_byte_held_elsewhere, lock_shared, pread, unlock};
use crate::vmdk::VmdkInfo;

/// Most files in a chain; libvirt's limit.
pub const CHAIN_MAX: usize = 200;

/// One file of a chain, open. Locks taken on it belong to the open file and travel with the descriptor.
#[derive(Debug)]
pub struct ChainFile {
    /// The open file.
    pub file: File,
    /// Its path, for error messages only.
    pub path_label: PathBuf,
    /// Its format.
    pub format: Format,
    /// The other files that the image is made of, see [`crate::ForeignImage::extent_names`].
    pub extents: Vec<(File, PathBuf)>,
}

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The image's format.
    pub format: Format,
    /// Size of the guest disk in bytes.
    pub virtual_size_bytes: u64,
    /// Storage the file takes on the host.
    pub allocated_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Cluster size; `None` for raw.
    pub cluster_bytes: Option<u64>,
    /// Backing file name as stored in the image.
    pub backing_name: Option<String>,
    /// Backing file format as stored in the image.
    pub backing_format: Option<String>,
    /// The image was not closed cleanly by a writer with lazy refcounts.
    pub dirty: bool,
    /// The image is marked corrupt.
    pub corrupt: bool,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
    /// The file that holds the guest data of a qcow2 image, if another does.
    pub data_file: Option<DataFileInfo>,
    /// What only vmdk has.
    pub vmdk: Option<VmdkInfo>,
    /// How it is encrypted.
    pub encryption: Option<EncryptionInfo>,
}

/// What a qcow2 image says of its external data file, which nobody has opened for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileInfo {
    /// Its name as stored: any text. `None`: the image does not say it.
    pub name: Option<String>,
    /// It stays a raw image of the disk.
    pub raw: bool,
}

/// Fields of a qcow2 header that a person may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// How compressed clusters are packed.
    pub compression: CompressionType,
    /// Refcounts may be behind while a writer has the image open.
    pub lazy_refcounts: bool,
    /// Bits of a refcount, 1 to 64.
    pub refcount_bits: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Persistent bitmaps.
    pub has_bitmaps: bool,
}

/// Opens an image and every backing file below it, the top one first. The top is opened for writing unless
/// `read_only`, the others never. With `locks`, QEMU's image locks are taken on each. A backing format must
/// be stored in the image. `format` `None` probes the top file, which only serves a person who asks.
pub fn resolve_chain(
    path: &Path,
    format: Option<Format>,
    read_only: bool,
    locks: bool,
) -> Result<Vec<ChainFile>, BlockError> {
    resolve(path, format, read_only, locks, false)
}

/// As [`resolve_chain`], but a backing file whose format is not stored is probed. A guest that can write a raw
/// backing file decides then what it is: for images from before the rule, on a person's word.
pub fn resolve_chain_probing(
    path: &Path,
    format: Option<Format>,
    read_only: bool,
    locks: bool,
) -> Result<Vec<ChainFile>, BlockError> {
    resolve(path, format, read_only, locks, true)
}

/// Opens one image, whatever it says is below it; its format is settled first. What else it needs is not opened.
pub fn open_alone(path: &Path, format: Option<Format>, read_only: bool, locks: bool) -> Result<ChainFile, BlockError> {
    let file = open_locked(path, read_only, locks)?;
    let format = settle_format(path, &file, format)?;
    Ok(ChainFile { file, path_label: path.to_owned(), format, extents: Vec::new() })
}

/// Reads what an image says about itself, without opening its backing file. `format` `None` probes.
/// Takes no lock, so it serves for an image in use; the answer may be old by then.
pub fn inspect(path: &Path, format: Option<Format>) -> Result<ImageInfo, BlockError> {
    let file = open_image(path, true)?;
    let declared = format.is_some();
    let format = settle_format(path, &file, format)?;
    let foreign = match format {
        Format::Raw | Format::Luks | Format::Qcow2 => None,
        _ => Some(foreign_image(path, &file, format, true, false, declared)?.0),
    };
    describe(&host_file(&file, path)?, path, format, foreign)
}

/// As [`inspect`], of an open backend that is no host file.
pub fn inspect_backend(layer: &ChainBackend) -> Result<ImageInfo, BlockError> {
    let (path, format) = (&layer.path_label, layer.format);
    if !matches!(format, Format::Raw | Format::Luks | Format::Qcow2) {
        return Err(BlockError::BackingFormat { path: path.clone(), format: format.name().to_owned() });
    }
    describe(&*layer.file, path, format, None)
}

fn describe(
    file: &dyn FileBackend,
    path: &Path,
    format: Format,
    foreign: Option<ForeignImage>,
) -> Result<ImageInfo, BlockError> {
    let stat = |e| BlockError::io(path, Action::Stat, e);
    let file_bytes = file.len_bytes().map_err(stat)?;
    let mut info = ImageInfo {
        format,
        virtual_size_bytes: file_bytes.checked_next_multiple_of(512).unwrap_or(file_bytes),
        allocated_bytes: file.allocated_bytes().map_err(stat)?,
        file_bytes,
        cluster_bytes: None,
        backing_name: None,
        backing_format: None,
        dirty: false,
        corrupt: false,
        qcow2: None,
        data_file: None,
        vmdk: None,
        encryption: None,
    };
    if let Some(foreign) = foreign {
        let said = foreign.inspect()?;
        info.virtual_size_bytes = said.size_bytes;
        info.cluster_bytes = Some(said.cluster_bytes).filter(|bytes| *bytes > 0);
        info.allocated_bytes = said.allocated_bytes;
        info.backing_format = said.backing_name.as_ref().map(|_| format.name().to_owned());
        info.backing_name = said.backing_name;
        info.vmdk = said.vmdk;
    }
    if format == Format::Luks {
        let header = Volume::read(file, path, 0, file_bytes)?.header;
        info.virtual_size_bytes = disk_bytes(file_bytes, header.payload_offset());
        info.encryption = Some(EncryptionInfo::Luks(Box::new(header)));
    }
    if format == Format::Qcow2 {
        let header = read_header(file, path)?;
        info.virtual_size_bytes = header.geometry.size_bytes;
        info.cluster_bytes = Some(header.geometry.cluster_bytes());
        info.dirty = header.is_dirty();
        info.corrupt = header.is_corrupt();
        info.qcow2 = Some(Qcow2Info {
            version: header.geometry.version,
            compression: header.compression,
            lazy_refcounts: header.compatible & COMPAT_LAZY_REFCOUNTS != 0,
            refcount_bits: 1 << header.geometry.refcount_order,
            snapshots: header.snapshot_count,
            extended_l2: header.geometry.l2_entry_bytes() == 16,
            has_bitmaps: header.autoclear & AUTOCLEAR_BITMAPS != 0,
        });
        let (name, raw) = (header.data_file_name(), header.is_data_file_raw());
        info.data_file = header.geometry.data_file.then_some(DataFileInfo { name, raw });
        info.encryption = match header.crypt_method {
            CryptMethod::None => None,
            CryptMethod::LegacyAes => Some(EncryptionInfo::LegacyAes),
            CryptMethod::Luks(_) => Some(EncryptionInfo::Luks(Box::new(luks_volume(file, path, &header)?.header))),
        };
        info.backing_name = header.backing_name;
        info.backing_format = header.backing_format;
    }
    Ok(info)
}

/// Looks for contradictions in the tables of a vdi, vmdk or vhdx; `None` for a format without checks. Takes no lock.
pub fn check_foreign(path: &Path, format: Format) -> Result<Option<ForeignReport>, BlockError> {
    if matches!(format, Format::Raw | Format::Luks | Format::Qcow2) {
        return Ok(None);
    }
    foreign_image(path, &open_image(path, true)?, format, true, false, true)?.0.check()
}

/// Walks a whole qcow2 image and compares what is referenced with what is counted; changes nothing. Takes no lock:
/// an image in use may show leaks, or damage that is not there.
pub fn check_image(path: &Path) -> Result<Checked, BlockError> {
    check_file(&host_file(&open_image(path, true)?, path)?, path)
}

/// Whether all that a check finds wrong in a qcow2 image goes when its refcounts are counted anew, which opening it
/// for writing does if it was not closed cleanly. Changes nothing, takes no lock.
pub fn rebuild_suffices(path: &Path) -> Result<bool, BlockError> {
    recount_file(&host_file(&open_image(path, true)?, path)?, path)
}

/// What [`check_image`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Contradictions that can lose data.
    pub corruptions: u64,
    /// Clusters that are counted and not used.
    pub leaks: u64,
    /// Guest clusters with data.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those that do not follow the one before in the file; compressed ones count always.
    pub fragmented_clusters: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Where the last cluster in use ends in the file.
    pub image_end_bytes: u64,
    /// The first findings in words.
    pub findings: Vec<String>,
}

fn resolve(
    path: &Path,
    format: Option<Format>,
    read_only: bool,
    locks: bool,
    probe_backing: bool,
) -> Result<Vec<ChainFile>, BlockError> {
    let mut chain: Vec<ChainFile> = Vec::new();
    let mut seen = HashSet::new();
    let top_declared = format.is_some();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next.take() {
        let read_only = read_only || !chain.is_empty();
        let file = match open_image(&path, read_only) {
            Err(BlockError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && !chain.is_empty() =>
            {
                let above = chain.last().map(|above| above.path_label.clone()).unwrap_or_default();
                return Err(BlockError::BackingMissing { path: above, backing: path });
            }
            opened => opened?,
        };
        let meta = file.metadata().map_err(|e| BlockError::io(&path, Action::Stat, e))?;
        if !seen.insert((meta.dev(), meta.ino())) {
            return Err(BlockError::Loop { path });
        }
        if chain.len() >= CHAIN_MAX {
            return Err(BlockError::TooDeep { path, max: CHAIN_MAX });
        }
        let declared = format.is_some();
        let format = settle_format(&path, &file, format)?;
        if locks {
            lock_image(&path, &file, read_only)?;
        }
        let mut extents = Vec::new();
        match format {
            Format::Raw | Format::Luks => {}
            Format::Qcow2 => {
                let header = read_header(&host_file(&file, &path)?, &path)?;
                // Only a person at a command line can mean a file that an image names.
                let consent = declared && top_declared && probe_backing;
                extents.extend(data_file_of(&path, &header, read_only, locks, consent)?);
                next = backing_of(&path, header, probe_backing)?;
            }
            // Nobody but a person at a command line wants these: a machine's disk is raw or qcow2.
            _ if !probe_backing => {
                return Err(BlockError::BackingFormat { path, format: format.name().to_owned() });
            }
            Format::Vmdk => {
                let (image, opened) = foreign_image(&path, &file, format, read_only, locks, declared)?;
                extents = opened;
                next = image.inspect()?.backing_name.map(|name| (beside(&path, &name), Some(format)));
            }
            Format::Vdi | Format::Vhdx | Format::Vpc => {}
        }
        chain.push(ChainFile { file, path_label: path, format, extents });
    }
    Ok(chain)
}

/// Opens a file or block device; anything else, which might block or have side effects, is refused unopened.
fn open_image(path: &Path, read_only: bool) -> Result<File, BlockError> {
    let meta = std::fs::metadata(path).map_err(|e| BlockError::io(path, Action::Open, e))?;
    if meta.is_dir() {
        return Err(BlockError::IsDirectory { path: path.to_owned() });
    }
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(BlockError::NotAFile { path: path.to_owned() });
    }
    let opened = FileOptions::new().read(true).write(!read_only).open(path);
    opened.map_err(|e| BlockError::io(path, Action::Open, e))
}

/// Opens a file that an image needs, locked if asked.
fn open_locked(path: &Path, read_only: bool, locks: bool) -> Result<File, BlockError> {
    let file = open_image(path, read_only)?;
    if locks {
        lock_image(path, &file, read_only)?;
    }
    Ok(file)
}

fn settle_format(path: &Path, file: &File, format: Option<Format>) -> Result<Format, BlockError> {
    let mut first = [0; PROBE_BYTES];
    let got = pread(file, 0, &ReadBufs::from_slice(&mut first)).map_err(|e| BlockError::io(path, Action::Read, e))?;
    let first = first.get(..got).unwrap_or_default();
    let Some(declared) = format else {
        return image::probe(first).map_err(|source| BlockError::Unread { path: path.to_owned(), source });
    };
    let checked = image::check_declared(declared, first);
    checked.map_err(|source| BlockError::Mismatch { path: path.to_owned(), source })?;
    Ok(declared)
}

/// Path and format of the backing file, from the image's header.
fn backing_of(path: &Path, header: Header, probe: bool) -> Result<Option<(PathBuf, Option<Format>)>, BlockError> {
    let Some(name) = header.backing_name else { return Ok(None) };
    let format = match header.backing_format {
        Some(format) => match format.parse::<Format>() {
            Ok(format) => Some(format),
            Err(_) => return Err(BlockError::BackingFormat { path: path.to_owned(), format }),
        },
        None if probe => None,
        None => return Err(BlockError::BackingFormatMissing { path: path.to_owned(), name }),
    };
    if has_protocol(&name) {
        return Err(BlockError::BackingProtocol { path: path.to_owned(), name });
    }
    Ok(Some((beside(path, &name), format)))
}

/// Opens the external data file that a header names, with the consent of whoever named the image. The name may be a
/// path and no more: a protocol or `json:` in it would reach anything (CVE-2024-4467).
fn data_file_of(
    path: &Path,
    header: &Header,
    read_only: bool,
    locks: bool,
    consent: bool,
) -> Result<Option<(File, PathBuf)>, BlockError> {
    if !header.geometry.data_file {
        return Ok(None);
    }
    let owned = path.to_owned();
    let Some(name) = header.data_file_name().filter(|name| !name.is_empty()) else {
        return Err(BlockError::DataFileNotGiven { path: owned });
    };
    if !consent {
        return Err(BlockError::DataFileConsent { path: owned, name });
    }
    if has_protocol(&name) {
        return Err(BlockError::DataFileProtocol { path: owned, name });
    }
    // Not beside the image: QEMU takes the name as it is, both when it creates the file and when it opens it.
    let data_path = PathBuf::from(&name);
    match open_locked(&data_path, read_only, locks) {
        Ok(data) => Ok(Some((data, data_path))),
        Err(source) => Err(BlockError::DataFile { path: owned, name, source: Box::new(source) }),
    }
}

/// Where a file is that an image names: absolute, or relative to the image's directory.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

fn host_file(file: &File, path: &Path) -> Result<HostFile, BlockError> {
    file.try_clone().and_then(HostFile::new).map_err(|e| BlockError::io(path, Action::Stat, e))
}

/// Open files with their paths.
type OpenExtents = Vec<(File, PathBuf)>;

/// An image of another vendor over its file, with the files beside it that belong to it, which are opened.
fn foreign_image(
    path: &Path,
    file: &File,
    format: Format,
    read_only: bool,
    locks: bool,
    declared: bool,
) -> Result<(ForeignImage, OpenExtents), BlockError> {
    let mut image = ForeignImage::new(Arc::new(host_file(file, path)?), path, format);
    let extents = open_extents(path, &image, read_only, locks, declared)?;
    for (extent, beside) in &extents {
        image.extents.push((Arc::new(host_file(extent, beside)?), beside.clone()));
    }
    Ok((image, extents))
}

/// Opens the files beside an image that it is made of. What a probed image names may be anybody's: those files are
/// opened only for an image whose format was declared.
fn open_extents(
    path: &Path,
    image: &ForeignImage,
    read_only: bool,
    locks: bool,
    declared: bool,
) -> Result<OpenExtents, BlockError> {
    let mut extents = Vec::new();
    for name in image.extent_names()? {
        if !declared {
            return Err(BlockError::ExtentConsent { path: path.to_owned(), name });
        }
        let beside = beside(path, &name);
        let failed =
            |source: BlockError| BlockError::ExtentFile { path: path.to_owned(), name, source: Box::new(source) };
        extents.push((open_locked(&beside, read_only, locks).map_err(failed)?, beside.clone()));
    }
    Ok(extents)
}

/// Lock bytes of QEMU (`block/file-posix.c`): a shared lock on 100 + bit says "I use this permission", on
/// 200 + bit "nobody else may".
const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Takes the locks of a reader or writer and looks for others whose locks exclude it. First take, then look:
/// of two that arrive together, at least one sees the other.
pub(crate) fn lock_image(path: &Path, file: &File, read_only: bool) -> Result<(), BlockError> {
    let used: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
    let unshared = [WRITE, RESIZE];
    let taken: Vec<i64> =
        used.iter().map(|bit| USED_BASE + bit).chain(unshared.iter().map(|bit| UNSHARED_BASE + bit)).collect();
    let failed = |e| BlockError::io(path, Action::Lock, e);
    for byte in &taken {
        lock_shared(file, *byte).map_err(failed)?;
    }
    let excluded = used.iter().map(|bit| UNSHARED_BASE + bit).chain(unshared.iter().map(|bit| USED_BASE + bit));
    for byte in excluded {
        if lock_byte_held_elsewhere(file, byte).map_err(failed)? {
            for byte in &taken {
                unlock(file, *byte).map_err(failed)?;
            }
            let access = if read_only { "read access was asked for" } else { "write access was asked for" };
            return Err(BlockError::Locked { path: path.to_owned(), access });
        }
    }
    Ok(())
}
