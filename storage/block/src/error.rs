//! What can go wrong with a disk, and what a device or the daemon makes of it.

use std::io;
use std::path::PathBuf;

use image::luks::LuksError;
use image::qcow2::check::CheckError;
use image::qcow2::{DecompressError, EntryError, HeaderError};
use image::{Format, FormatMismatch, UnreadFormat};
use rustix::io::Errno;
use thiserror::Error;

use crate::luks::KeySlotError;
use crate::nbd::NbdError;
use crate::qcow2::MaintenanceError;

/// What the engine was doing when the host refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Opening the file.
    Open,
    /// Creating the file.
    Create,
    /// Asking for length or allocation.
    Stat,
    /// Taking or testing image locks.
    Lock,
    /// Reading guest data or tables.
    Read,
    /// Writing guest data or tables.
    Write,
    /// Waiting for stable storage.
    Sync,
    /// Zeroing or giving space back.
    Discard,
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Action::Open => "cannot be opened",
            Action::Create => "cannot be created",
            Action::Stat => "cannot be examined",
            Action::Lock => "cannot be locked",
            Action::Read => "cannot be read",
            Action::Write => "cannot be written",
            Action::Sync => "cannot be flushed to stable storage",
            Action::Discard => "cannot give space back",
        })
    }
}

/// The classes of failure that change what a caller does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No space on the host: pause the guest, try the same request again later.
    NoSpace,
    /// The disk or file is read only.
    ReadOnly,
    /// The request is outside the disk.
    OutOfRange,
    /// The image contradicts itself.
    Corrupt,
    /// The host failed.
    Io,
    /// Something this engine does not do, or a chain it refuses to open.
    Unsupported,
}

/// An error of the block engine. Each names the file it is about.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum BlockError {
    #[error("{path}: {action}", path = path.display())]
    Io { path: PathBuf, action: Action, source: io::Error },
    #[error("{path}: {action}: no space is left on the host; the request can be repeated when there is some", path = path.display())]
    NoSpace { path: PathBuf, action: Action, source: io::Error },
    #[error("{path}: the disk is read only", path = path.display())]
    ReadOnly { path: PathBuf },
    #[error("a request for {bytes} bytes at {offset} is outside the disk of {size_bytes} bytes")]
    OutOfRange { offset: u64, bytes: u64, size_bytes: u64 },
    #[error("{path}: the qcow2 header is refused", path = path.display())]
    Header { path: PathBuf, source: HeaderError },
    #[error("{path}: the file is not what it is declared to be; correct the format, or the file", path = path.display())]
    Mismatch { path: PathBuf, source: FormatMismatch },
    #[error("{path}: its format was guessed", path = path.display())]
    Unread { path: PathBuf, source: UnreadFormat },
    #[error("{path}: guest offset {guest_offset:#x} is mapped by a damaged entry; run a check with repair on the image", path = path.display())]
    Entry { path: PathBuf, guest_offset: u64, source: EntryError },
    #[error("{path}: the {table} at {offset:#x} lies past the end of the file ({file_bytes} bytes); the image was truncated", path = path.display())]
    TablePastEnd { path: PathBuf, table: &'static str, offset: u64, file_bytes: u64 },
    #[error("{path}: the compressed cluster for guest offset {guest_offset:#x} cannot be unpacked", path = path.display())]
    Compressed { path: PathBuf, guest_offset: u64, source: DecompressError },
    #[error("{path}: cluster {offset:#x} is counted as free, but holds a table; run a check with repair on the image", path = path.display())]
    FreeTable { path: PathBuf, offset: u64 },
    #[error("{path}: guest offset {guest_offset:#x} is mapped to cluster {offset:#x}, which holds a table; run a check with repair on the image", path = path.display())]
    DataIsTable { path: PathBuf, guest_offset: u64, offset: u64 },
    #[error("{path}: cluster {offset:#x} is in use, but its refcount is 0; run a check with repair on the image", path = path.display())]
    RefcountZero { path: PathBuf, offset: u64 },
    #[error("{path}: refcount table entry {index} ({raw:#x}) is not a cluster offset", path = path.display())]
    RefcountTable { path: PathBuf, index: u64, raw: u64 },
    #[error("{path}: the image is marked corrupt and can only be opened read only; run a check with repair on it", path = path.display())]
    MarkedCorrupt { path: PathBuf },
    #[error("{path}: refcounts cannot be rebuilt after an unclean end: {corruptions} contradictions, the first: {first}", path = path.display())]
    Unrepairable { path: PathBuf, corruptions: u64, first: String },
    #[error("{path}: refcounts cannot be rebuilt after an unclean end", path = path.display())]
    Rebuild { path: PathBuf, source: CheckError<io::Error> },
    #[error("{path}: the image cannot be checked", path = path.display())]
    CheckFailed { path: PathBuf, source: CheckError<io::Error> },
    #[error("{path}: an earlier flush failed, so what is on the disk is unknown; shut the guest down and check the image", path = path.display())]
    FlushFailed { path: PathBuf },
    #[error("{path}: the refcount table has reached its limit of 8 MiB; use a larger cluster size or refcount width", path = path.display())]
    RefcountTableFull { path: PathBuf },
    #[error("{path}: the format has no compressed writes", path = path.display())]
    NoCompression { path: PathBuf },
    #[error("{path}: the format has no way to change the size of the disk here", path = path.display())]
    NoResize { path: PathBuf },
    #[error("{path}: {bytes} bytes at {offset:#x} are no whole clusters of {cluster_bytes} bytes, as compressed writes need them", path = path.display())]
    PartialCluster { path: PathBuf, offset: u64, bytes: u64, cluster_bytes: u64 },
    #[error("{path}: a compressed cluster of {bytes} bytes at {offset} is not shorter than a cluster, or not at one", path = path.display())]
    NoPackedCluster { path: PathBuf, offset: u64, bytes: u64 },
    #[error("{path}: {heading}", path = path.display(), heading = source.heading())]
    Maintenance { path: PathBuf, source: MaintenanceError },
    #[error("{path}: the image is refused", path = path.display())]
    Format { path: PathBuf, source: Box<image::FormatError> },
    #[error("{path}: {format} is no format of another vendor", path = path.display())]
    NotForeign { path: PathBuf, format: Format },
    #[error("{path}: is a vmdk that names other files, the first: {name}; declare it as vmdk (-f vmdk) to open them", path = path.display())]
    ExtentConsent { path: PathBuf, name: String },
    #[error("{path}: its file {name} cannot be opened", path = path.display())]
    ExtentFile { path: PathBuf, name: String, source: Box<BlockError> },
    #[error("{path}: keeps its data in another file, which was not given; name it with the option data-file", path = path.display())]
    DataFileNotGiven { path: PathBuf },
    #[error("{path}: its data file {name} cannot be opened", path = path.display())]
    DataFile { path: PathBuf, name: String, source: Box<BlockError> },
    #[error("{path}: has no external data file, but {data} was given as one", path = path.display(), data = data.display())]
    UnexpectedDataFile { path: PathBuf, data: PathBuf },
    #[error("{path}: keeps its data in the file '{name}', which is opened only on request; declare the image as qcow2 (-f qcow2), or name the file with the option data-file", path = path.display())]
    DataFileConsent { path: PathBuf, name: String },
    #[error("{path}: the name of its data file, '{name}', is not a path; name it with the option data-file", path = path.display())]
    DataFileProtocol { path: PathBuf, name: String },
    #[error("{path}: the LUKS header is refused", path = path.display())]
    Luks { path: PathBuf, source: LuksError },
    #[error("{path}: the LUKS header and its key material need {need} bytes, but there is room for {room}; the image was truncated", path = path.display())]
    LuksCutOff { path: PathBuf, need: u64, room: u64 },
    #[error("{path}: is encrypted, and no passphrase was given; name a secret with the option {parameter}", path = path.display())]
    KeyNeeded { path: PathBuf, parameter: &'static str },
    #[error("{path}: the passphrase fits none of the key slots", path = path.display())]
    WrongKey { path: PathBuf },
    #[error("{path}: is encrypted, and was opened without its key: what it describes can be read, its data cannot", path = path.display())]
    Closed { path: PathBuf },
    #[error("{path}: has the AES-CBC encryption of old qcow2 images, which is not safe and can only be read by a tool; convert the image to one with LUKS", path = path.display())]
    LegacyEncryption { path: PathBuf },
    #[error("{path}: PBKDF iterations {iterations} larger than {max}; ask for less time", path = path.display())]
    IterTime { path: PathBuf, iterations: u64, max: u32 },
    #[error("{path}: the key slots are not changed", path = path.display())]
    KeySlot { path: PathBuf, source: KeySlotError },
    #[error("{path}: is encrypted and keeps its data in another file, which is not supported; qemu-img can convert it", path = path.display())]
    SealedDataFile { path: PathBuf },
    #[error("{path}: the image is not encrypted with LUKS", path = path.display())]
    NotLuks { path: PathBuf },
    #[error("{path}: an encrypted image has no compressed writes: they would put plain text into it", path = path.display())]
    CompressedPlain { path: PathBuf },
    #[error("stopped on request")]
    Stopped,
    #[error("{path}: a job is running on the disk; wait for its end, or cancel it", path = path.display())]
    BusyWithJob { path: PathBuf },
    #[error("{path}: only a qcow2 image can take in what shows through it", path = path.display())]
    NoPull { path: PathBuf },
    #[error("{path}: only a qcow2 image has bitmaps", path = path.display())]
    NoBitmaps { path: PathBuf },
    #[error("the disk has {layers} layers; a job on layer {layer} is not possible")]
    NoSuchLayer { layer: usize, layers: usize },
    #[error("{path}: the target of {have} bytes is smaller than the disk of {need} bytes", path = path.display())]
    TargetTooSmall { path: PathBuf, have: u64, need: u64 },
    #[error("a disk needs at least one file")]
    EmptyChain,
    #[error("{path}: opened as {opened}, but the options say {option}", path = path.display())]
    FormatDisagrees { path: PathBuf, opened: Format, option: Format },
    #[error("{path}: its backing file {backing} was not given", path = path.display())]
    BackingNotGiven { path: PathBuf, backing: String },
    #[error("{path}: has no backing file, but {next} was given as one", path = path.display(), next = next.display())]
    UnexpectedBacking { path: PathBuf, next: PathBuf },
    #[error("{path}: is a directory; name an image file in it", path = path.display())]
    IsDirectory { path: PathBuf },
    #[error("{path}: is neither a file nor a block device", path = path.display())]
    NotAFile { path: PathBuf },
    #[error("{path}: its backing file {backing} does not exist; restore it, or correct the name with 'qemu-img rebase -u'", path = path.display(), backing = backing.display())]
    BackingMissing { path: PathBuf, backing: PathBuf },
    #[error("{path}: the name of its backing file, '{name}', is not a path; protocols and json: names are not supported", path = path.display())]
    BackingProtocol { path: PathBuf, name: String },
    #[error("{path}: does not say which format its backing file '{name}' has; add it with 'qemu-img rebase -u -b {name} -F FORMAT'", path = path.display())]
    BackingFormatMissing { path: PathBuf, name: String },
    #[error("{path}: format '{format}' is not supported for a backing file; raw and qcow2 are", path = path.display())]
    BackingFormat { path: PathBuf, format: String },
    #[error("{path}: the backing chain comes back to this file; correct it with 'qemu-img rebase -u'", path = path.display())]
    Loop { path: PathBuf },
    #[error("{path}: the backing chain has more than {max} files; commit or flatten some of them", path = path.display())]
    TooDeep { path: PathBuf, max: usize },
    #[error("{path}: another process uses the image ({access}); is a guest running on it?", path = path.display())]
    Locked { path: PathBuf, access: &'static str },
    #[error(transparent)]
    Nbd(Box<NbdError>),
}

impl BlockError {
    /// Wraps a failure of the host; a lack of space gets its own variant.
    pub(crate) fn io(path: &std::path::Path, action: Action, source: io::Error) -> BlockError {
        let path = path.to_owned();
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOSPC | Errno::DQUOT) => BlockError::NoSpace { path, action, source },
            _ => BlockError::Io { path, action, source },
        }
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        use BlockError as E;
        match self {
            E::NoSpace { .. } => ErrorKind::NoSpace,
            E::ReadOnly { .. } => ErrorKind::ReadOnly,
            E::OutOfRange { .. } => ErrorKind::OutOfRange,
            E::Entry { .. }
            | E::TablePastEnd { .. }
            | E::Compressed { .. }
            | E::FreeTable { .. }
            | E::DataIsTable { .. }
            | E::RefcountZero { .. }
            | E::RefcountTable { .. }
            | E::MarkedCorrupt { .. }
            | E::Unrepairable { .. } => ErrorKind::Corrupt,
            E::Header { source, .. } => kind_of_header(source),
            E::Maintenance { source, .. } if source.is_damage() => ErrorKind::Corrupt,
            E::Format { source, .. } if !source.is_unsupported() => ErrorKind::Corrupt,
            E::Luks { source, .. } if !source.is_unsupported() => ErrorKind::Corrupt,
            E::LuksCutOff { .. } => ErrorKind::Corrupt,
            E::ExtentFile { source, .. } | E::DataFile { source, .. } => source.kind(),
            E::CheckFailed { source, .. } | E::Rebuild { source, .. } => kind_of_check(source),
            E::Io { .. } | E::FlushFailed { .. } => ErrorKind::Io,
            E::BackingMissing { .. } | E::Locked { .. } | E::Nbd(_) => ErrorKind::Io,
            E::Mismatch { .. }
            | E::Unread { .. }
            | E::RefcountTableFull { .. }
            | E::NoCompression { .. }
            | E::NoPackedCluster { .. }
            | E::PartialCluster { .. }
            | E::NoResize { .. }
            | E::Maintenance { .. }
            | E::Stopped
            | E::BusyWithJob { .. }
            | E::NoPull { .. }
            | E::NoBitmaps { .. }
            | E::NoSuchLayer { .. }
            | E::TargetTooSmall { .. }
            | E::Luks { .. }
            | E::KeyNeeded { .. }
            | E::WrongKey { .. }
            | E::Closed { .. }
            | E::LegacyEncryption { .. }
            | E::IterTime { .. }
            | E::KeySlot { .. }
            | E::CompressedPlain { .. }
            | E::NotLuks { .. }
            | E::SealedDataFile { .. }
            | E::Format { .. }
            | E::NotForeign { .. }
            | E::ExtentConsent { .. }
            | E::DataFileNotGiven { .. }
            | E::UnexpectedDataFile { .. }
            | E::DataFileConsent { .. }
            | E::DataFileProtocol { .. }
            | E::EmptyChain
            | E::FormatDisagrees { .. }
            | E::BackingNotGiven { .. }
            | E::UnexpectedBacking { .. }
            | E::IsDirectory { .. }
            | E::NotAFile { .. }
            | E::BackingProtocol { .. }
            | E::BackingFormatMissing { .. }
            | E::BackingFormat { .. }
            | E::Loop { .. }
            | E::TooDeep { .. } => ErrorKind::Unsupported,
        }
    }
}

fn kind_of_header(error: &HeaderError) -> ErrorKind {
    match error {
        HeaderError::Version(_)
        | HeaderError::Encrypted(_)
        | HeaderError::Feature { .. }
        | HeaderError::Compression(_) => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    }
}

fn kind_of_check(error: &CheckError<io::Error>) -> ErrorKind {
    match error {
        CheckError::Snapshots(_) => ErrorKind::Corrupt,
        CheckError::TooLarge => ErrorKind::Unsupported,
        CheckError::Read(_) => ErrorKind::Io,
    }
}
