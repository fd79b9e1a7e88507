//! New images: as new files, or in the place of whatever a file held.

use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use image::qcow2::layout::DataFile;
use image::qcow2::layout::{Features, NewImage, Plan};
use image::qcow2::{CompressionType, CryptMethod, CryptoHeader};

use crate::chain::lock_image;
use crate::error::{Action, BlockError};
use crate::host_file::HostFile;
use crate::io::FileBackend;
use crate::luks::{LuksCreate, NewVolume, new_volume};
use crate::qcow2::MaintenanceError;
use crate::sys::WriteBufs;
use crate::zeroes::{PIECE_BYTES, write_zero_data};

/// Creates an empty qcow2 image, on stable storage when this returns. The size is rounded up to 512 bytes.
/// On an error no file is left behind.
pub fn create_qcow2(path: &Path, size_bytes: u64, opts: &Qcow2Create) -> Result<(), BlockError> {
    create_file(path, |file| format_qcow2(file, path, size_bytes, opts))
}

/// Creates a sparse raw image. The size is rounded up to 512 bytes. On an error no file is left behind.
pub fn create_raw(path: &Path, size_bytes: u64) -> Result<(), BlockError> {
    create_file(path, |file| format_raw(file, path, size_bytes, Preallocation::Off))
}

/// How much of a new image takes its space at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing but what describes the image.
    #[default]
    Off,
    /// Tables for the whole disk; its data are holes of the file.
    Metadata,
    /// Tables, and data that the host reserves.
    Falloc,
    /// Tables, and data written as zeroes.
    Full,
}

/// A new qcow2 image in all its variants.
#[derive(Clone, Debug)]
pub struct Qcow2Create {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// log2 of the width of a refcount, 0 to 6.
    pub refcount_order: u32,
    /// Backing file and its format as they shall be stored; an empty format is left out.
    pub backing: Option<(String, String)>,
    /// How clusters will be compressed.
    pub compression: CompressionType,
    /// Refcounts may be behind while a writer has the image open.
    pub lazy_refcounts: bool,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// What takes its space at once.
    pub preallocation: Preallocation,
    /// The file that guest data goes to, see [`format_data_file`].
    pub data_file: Option<DataFile>,
    /// How it is encrypted.
    pub encryption: Option<LuksCreate>,
}

impl Default for Qcow2Create {
    /// QEMU's defaults: version 3, 64 KiB clusters, 16-bit refcounts, zlib.
    fn default() -> Qcow2Create {
        Qcow2Create {
            cluster_bits: 16,
            version: 3,
            refcount_order: 4,
            backing: None,
            compression: CompressionType::Zlib,
            lazy_refcounts: false,
            extended_l2: false,
            preallocation: Preallocation::Off,
            data_file: None,
            encryption: None,
        }
    }
}

/// Opens a file for a new image: it is created if it is not there, locked as QEMU locks a writer, and emptied. A block
/// device keeps what it holds. Another process that uses the image keeps it, and nothing has changed.
pub fn open_for_new(path: &Path) -> Result<File, BlockError> {
    let failed = |e| BlockError::io(path, Action::Create, e);
    if std::fs::metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Err(BlockError::IsDirectory { path: path.to_owned() });
    }
    let file = FileOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path);
    let file = file.map_err(failed)?;
    lock_image(path, &file, false)?;
    if file.metadata().map_err(failed)?.is_file() {
        file.set_len(0).map_err(failed)?;
    }
    Ok(file)
}

/// Writes an empty qcow2 image into `file`, whose contents are lost; `path` names it in errors. The size is rounded
/// up to 512 bytes. Nothing is flushed.
pub fn format_qcow2(
    file: &dyn FileBackend,
    path: &Path,
    size_bytes: u64,
    opts: &Qcow2Create,
) -> Result<(), BlockError> {
    let refused = |source| BlockError::Header { path: path.to_owned(), source };
    let size_bytes =
        size_bytes.checked_next_multiple_of(512).ok_or_else(|| refused(image::qcow2::HeaderError::Size(size_bytes)))?;
    let new = NewImage {
        size_bytes,
        cluster_bits: opts.cluster_bits,
        version: opts.version,
        refcount_order: opts.refcount_order,
        backing: opts.backing.clone(),
    };
    if opts.encryption.is_some() && opts.data_file.is_some() {
        return Err(BlockError::SealedDataFile { path: path.to_owned() });
    }
    let volume = opts.encryption.as_ref().map(|luks| new_volume(path, luks)).transpose()?;
    let features = Features {
        compression: opts.compression,
        lazy_refcounts: opts.lazy_refcounts,
        extended_l2: opts.extended_l2,
        preallocate: opts.preallocation != Preallocation::Off,
        data_file: opts.data_file.clone(),
        crypto_header_bytes: volume.as_ref().map_or(0, NewVolume::bytes),
    };
    let plan = Plan::new(&new, &features).map_err(refused)?;
    let failed = |e| BlockError::io(path, Action::Create, e);
    let held = file.len_bytes().map_err(failed)?.min(plan.file_bytes());
    if held > 0 {
        file.write_zeroes(0, held, true).map_err(failed)?;
    }
    for (offset, bytes) in plan.pieces() {
        file.write_at(offset, &WriteBufs::from_slice(&bytes)).map_err(failed)?;
    }
    if file.len_bytes().map_err(failed)? < plan.file_bytes() {
        file.set_len_bytes(plan.file_bytes()).map_err(failed)?;
    }
    let Some(volume) = volume else {
        return preallocate(file, path, plan.data_range(), opts.preallocation);
    };
    if let CryptMethod::Luks(CryptoHeader { offset, bytes }) = plan.header().crypt_method {
        file.write_zeroes(offset, bytes, false).map_err(failed)?;
        volume.write(file, path, offset)?;
    }
    match opts.version {
        // Version 2 cannot say that room reads as zeroes.
        2 => volume.write_zeroes(file, path, plan.data_range()),
        _ => preallocate(file, path, plan.data_range(), opts.preallocation),
    }
}

/// Makes `file` the external data file of a new qcow2 image; what it held is lost. The image comes after it, so that no
/// image refers to a file with other data.
pub fn format_data_file(
    file: &dyn FileBackend,
    path: &Path,
    size_bytes: u64,
    opts: &Qcow2Create,
) -> Result<(), BlockError> {
    empty(file).map_err(|e| BlockError::io(path, Action::Create, e))?;
    format_raw(file, path, size_bytes, opts.preallocation)
}

/// Makes a file hold nothing; one that cannot be cut, as a block device, holds zeroes then.
pub(crate) fn empty(file: &dyn FileBackend) -> std::io::Result<()> {
    match file.keeps_len() {
        false => file.set_len_bytes(0),
        true => file.write_zeroes(0, file.len_bytes()?, true),
    }
}

/// Makes `file` a raw image of zeroes; `path` names it in errors. The size is rounded up to 512 bytes. A block device that
/// is large enough keeps what it holds, as QEMU leaves it.
pub fn format_raw(
    file: &dyn FileBackend,
    path: &Path,
    size_bytes: u64,
    preallocation: Preallocation,
) -> Result<(), BlockError> {
    let size_bytes = size_bytes.checked_next_multiple_of(512).unwrap_or(u64::MAX);
    file.set_len_bytes(size_bytes).map_err(|e| BlockError::io(path, Action::Create, e))?;
    preallocate(file, path, 0..size_bytes, preallocation)
}

/// Takes the space of a range that holds nothing; an empty one may end before it starts.
pub(crate) fn preallocate(
    file: &dyn FileBackend,
    path: &Path,
    range: std::ops::Range<u64>,
    mode: Preallocation,
) -> Result<(), BlockError> {
    let failed = |e| BlockError::io(path, Action::Write, e);
    match mode {
        _ if range.is_empty() => Ok(()),
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => file.write_zeroes(range.start, range.end - range.start, false).map_err(failed),
        Preallocation::Full => {
            write_zero_data(range, PIECE_BYTES, |at, zeroes| file.write_at(at, zeroes)).map_err(failed)
        }
    }
}

/// Refuses to make a disk smaller where that is not allowed.
pub(crate) fn check_shrink(path: &Path, from_bytes: u64, to_bytes: u64, allowed: bool) -> Result<(), BlockError> {
    if to_bytes >= from_bytes || allowed {
        return Ok(());
    }
    let source = MaintenanceError::ShrinkNotAllowed { from_bytes, to_bytes };
    Err(BlockError::Maintenance { path: path.to_owned(), source })
}

/// A new file under `path`, as `fill` makes it.
fn create_file(path: &Path, fill: impl FnOnce(&HostFile) -> Result<(), BlockError>) -> Result<(), BlockError> {
    let failed = |e| BlockError::io(path, Action::Create, e);
    let file = FileOptions::new().read(true).write(true).create_new(true).mode(0o644).open(path).map_err(failed)?;
    let filled = HostFile::new(file).map_err(failed).and_then(|file| {
        fill(&file)?;
        file.sync_all().map_err(failed)
    });
    if filled.is_err() {
        // The first error is what matters; a file that cannot even be removed is visible to the user.
        let _ = std::fs::remove_file(path);
        return filled;
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}
