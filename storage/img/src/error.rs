//! What goes wrong, in words, and the exit code of each. Where qemu-img has a text that callers match, it is that text.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use block::blkdebug::RulesFileError;
use block::ova::OvaError;
use block::spec::SpecError;
use block::{Action, BlockError, LuksError, UnreadFormat};

use crate::getopt::OptionFault;
use crate::serve::ServeError;
use crate::size::{self, SizeError};

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum ImgError {
    // --- the command line
    #[error("Not enough arguments")]
    NoCommand,
    #[error("Command not found: {0}")]
    NoSuchCommand(String),
    #[error("'{0}' is not supported here; qemu-img can do it on the same image")]
    NotSupported(&'static str),
    #[error("{command}: {fault}")]
    Option { command: &'static str, fault: OptionFault },
    #[error("cannot make a temporary file in '{}': {}; TMPDIR names another folder", dir.display(), host(source))]
    Scratch { dir: PathBuf, source: std::io::Error },
    #[error("Expecting one image file name")]
    OneFile { command: &'static str },
    #[error("Expecting {expected}")]
    Expecting { command: &'static str, expected: &'static str },
    #[error("Unexpected argument: {found}")]
    Extra { command: &'static str, found: String },
    #[error("--output expects 'human' or 'json' not '{found}'")]
    OutputFormat { command: &'static str, found: String },
    #[error("--image-opts and --format are mutually exclusive")]
    ImageOptsAndFormat,
    #[error("Cannot mix '-l', '-a', '-c', '-d'")]
    MixedActions { command: &'static str },
    #[error("{what}")]
    Needed { command: &'static str, what: &'static str },
    #[error("the value of --{option} is not UTF-8 text")]
    NotText { option: &'static str },
    #[error("--repair (-r) expects 'leaks' or 'all' not '{found}'")]
    RepairWhat { command: &'static str, found: String },
    #[error("Invalid {cache}cache option: {found}")]
    Cache { cache: &'static str, found: String },
    #[error("Invalid {what} specified: '{found}'.")]
    Number { what: &'static str, found: String },
    #[error("Invalid {what} specified. Must be between {min} and {max}.")]
    NumberRange { what: &'static str, min: u64, max: u64 },
    // --- names and values of -o
    #[error("{}Invalid parameter '{name}'", prefix(subject))]
    Parameter { subject: String, name: String },
    #[error("{}Parameter '{name}' expects 'on' or 'off'", prefix(subject))]
    ParameterSwitch { subject: String, name: &'static str },
    #[error("{}Parameter '{name}' expects a number", prefix(subject))]
    ParameterNumber { subject: String, name: &'static str },
    #[error(
        "{}Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
         kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        prefix(subject)
    )]
    ParameterSize { subject: String, name: &'static str },
    #[error("{}Value '{found}' is out of range for parameter '{name}'", prefix(subject))]
    ParameterRange { subject: String, name: &'static str, found: String },
    #[error("{}{rule}", prefix(subject))]
    Rule { subject: String, rule: Rule },
    // --- secrets
    #[error("object type '{0}' is not supported; 'secret' and 'tls-creds-x509' are")]
    ObjectType(String),
    #[error("Parameter '{0}' is missing")]
    ObjectMissing(&'static str),
    #[error(
        "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a \
         letter."
    )]
    ObjectId,
    #[error("attempt to add duplicate property '{0}' to object (type 'container')")]
    ObjectTwice(String),
    #[error("Expected '=' after parameter '{0}'")]
    ObjectNoValue(String),
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    ObjectValueKind { name: String, expected: &'static str },
    #[error("JSON parse error, {0}")]
    ObjectJson(serde_json::Error),
    #[error("Parameter '{name}' expects 'on' or 'off'")]
    ObjectSwitch { name: &'static str },
    #[error("Parameter '{name}' does not accept value '{found}'")]
    ObjectValue { name: &'static str, found: String },
    #[error("Parameter '{0}' is unexpected")]
    ObjectParameter(String),
    #[error("'{0}' of tls-creds-x509 is not supported; leave it out")]
    ObjectNotBuilt(String),
    #[error("Missing 'dir' property value")]
    TlsDir,
    #[error("{}", chain(.0))]
    Tls(block::nbd::TlsError),
    #[error("'file' and 'data' are mutually exclusive")]
    SecretBoth,
    #[error("Either 'file' or 'data' must be provided")]
    SecretNothing,
    #[error("secret '{0}' is not valid base64")]
    SecretBase64(String),
    #[error("secret '{id}' has more than {max} bytes")]
    SecretSize { id: String, max: usize },
    #[error("IV is required to decrypt secret")]
    SecretIv,
    #[error("IV should be 16 bytes in length not {0}")]
    SecretIvSize(usize),
    #[error("Key should be 32 bytes in length")]
    SecretKeySize,
    #[error("secret '{0}' is not encrypted with its key: the padding is wrong")]
    SecretPadding(String),
    #[error("Unable to read {path}: {}", host(source))]
    SecretFile { path: String, source: io::Error },
    #[error("No secret with id '{0}'")]
    NoSecret(String),
    // --- images
    #[error("Could not open '{name}': {}", spec(source))]
    Spec { name: String, source: SpecError },
    #[error("Could not open '{name}': {}", why(source))]
    Open { name: String, source: BlockError },
    #[error("Could not open '{name}': Could not open backing file: {}", why(source))]
    OpenBelow { name: String, source: BlockError },
    #[error("Could not open '{name}': {}", host(source))]
    OpenHost { name: String, source: io::Error },
    #[error("Could not open '{name}': {reason}")]
    OpenRule { name: String, reason: Rule },
    #[error("{name}: {source}")]
    Create { name: String, source: MakeError },
    #[error("{name}: error while converting {format}: {source}")]
    Converting { name: String, format: String, source: MakeError },
    #[error("error while copying: {}\nThe target '{target}' is incomplete.", why(source))]
    Incomplete { target: String, source: BlockError },
    #[error("error while reading at byte {at}: {}", why(source))]
    Reading { at: u64, source: BlockError },
    #[error("error while writing at byte {at}: {}", host(source))]
    Writing { at: u64, source: io::Error },
    #[error("{}", why(source))]
    Resize { source: BlockError },
    #[error("error while writing at byte {at}: {}", why(source))]
    WritingDisk { at: u64, source: BlockError },
    #[error("{name}: error while creating output image: {source}")]
    CreatingOutput { name: String, source: MakeError },
    #[error("Failed request: {}", why(source))]
    BenchFailed { source: BlockError },
    #[error("The kernel takes no requests from the ring any more: {0}; try --aio=threads")]
    Ring(io::Error),
    #[error("{name}: {}", why(source))]
    Commit { name: String, source: BlockError },
    #[error("Could not open new backing file '{name}': {}", why(source))]
    NewBacking { name: String, source: BlockError },
    #[error("{name}: {}\nThe image still has its old backing file, and holds what it held.", why(source))]
    Rebase { name: String, source: BlockError },
    #[error("the bitmaps cannot be copied: {}", why(source))]
    Bitmaps { source: BlockError },
    #[error("Error while comparing: {}", why(source))]
    Comparing { source: BlockError },
    #[error("{name}: Could not create '{name}': {}", host(source))]
    CreateHost { name: String, source: io::Error },
    #[error("Failed to read block status: {}", why(source))]
    BlockStatus { source: BlockError },
    #[error("Could not open '{name}': {}", chain(fault))]
    Ova { name: String, fault: OvaFault },
    #[error("{source}\n{}: Invalid options for file format '{format}'", crate::program())]
    OptionsOf { format: String, source: Box<ImgError> },
    #[error("{doing}: {}", why(source))]
    Failed { doing: String, source: BlockError },
    #[error("{0}")]
    Plain(Rule),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("This image format does not support checks")]
    NoChecks,
    #[error("the answer cannot be written: {}", host(.0))]
    Output(#[from] io::Error),
    /// Another exit code than that of the error.
    #[error("{source}")]
    WithCode { code: u8, source: Box<ImgError> },
}

/// What is wrong with an OVA file, or what it has that is not read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum OvaFault {
    #[error(transparent)]
    Archive(OvaError<io::Error>),
    #[error("the archive has no disk")]
    NoDisk,
    #[error("the archive has several disks; name one of them:\n{names}")]
    ManyDisks { names: String },
    #[error("the disk '{member}' is packed ({how}); unpack the archive, and the file, first")]
    Packed { member: String, how: String },
    #[error("the manifest names '{member}', which is not in the archive")]
    NotThere { member: String },
    #[error("the contents of '{member}' do not match their digest in the manifest; the archive was changed or damaged")]
    Digest { member: String },
    #[error("the disk '{member}' is not supported: {source}")]
    Unread { member: String, source: UnreadFormat },
}

/// Why an image was not created.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Options that cannot be.
    #[error("{0}")]
    Rule(Rule),
    /// The engine refused.
    #[error("{}", why(.0))]
    Block(BlockError),
    /// The host refused.
    #[error("{}", host(.0))]
    Host(io::Error),
}

/// Rules that hold whatever the image; the texts are qemu-img's.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum Rule {
    #[error("Parameter '{name}' does not accept value '{found}'")]
    Value { name: &'static str, found: String },
    #[error("Unknown file format '{0}'")]
    UnknownFormat(String),
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    #[error("Unknown driver '{0}'\nCould not open backing image.")]
    BackingDriver(String),
    #[error("{}\nCould not open backing image.", why(.0))]
    BackingOpen(BlockError),
    #[error("invalid parameter value: {0}")]
    EnumValue(String),
    #[error("Format driver '{0}' does not support image creation")]
    NotCreated(String),
    #[error("Image creation needs a size parameter")]
    NoSize,
    #[error("The image size must be specified only once")]
    SizeTwice,
    #[error("Expected backing file name, got empty string")]
    EmptyBacking,
    #[error("Backing file specified without backing format\nDetected format of {0}.")]
    NoBackingFormat(String),
    #[error("Backing format cannot be used without backing file")]
    BackingFormatAlone,
    #[error("Backing file not supported for file format '{0}'")]
    NoBacking(String),
    #[error("Backing format not supported for file format '{0}'")]
    NoBackingFormatOption(String),
    #[error("{0}")]
    Name(SpecError),
    #[error("Error: Trying to create an image with the same filename as the backing file")]
    OwnBacking,
    #[error("Cluster size must be a power of two between 512 and 2048k")]
    ClusterSize,
    #[error("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")]
    ExtendedL2Cluster,
    #[error(
        "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )]
    ExtendedL2Version,
    #[error("Refcount width must be a power of two and may not exceed 64 bits")]
    RefcountBits,
    #[error(
        "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
    )]
    RefcountVersion,
    #[error("Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)")]
    LazyVersion,
    #[error(
        "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )]
    CompressionVersion,
    #[error("Backing file and preallocation can only be used at the same time if extended_l2 is on")]
    BackingPreallocation,
    #[error("Unsupported preallocation mode: {0}")]
    Preallocation(String),
    #[error(
        "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )]
    DataFileVersion,
    #[error("Backing file and data-file-raw cannot be used at the same time")]
    DataFileRawBacking,
    #[error("data-file-raw requires data-file")]
    DataFileRaw,
    #[error("Unsupported VDI image size (size is {size:#x}, max supported is {max:#x})")]
    VdiSize { size: u64, max: u64 },
    #[error("Could not resize image: Image size cannot be negative")]
    Negative,
    #[error("The image size is too large for file format '{0}' (try using a larger cluster size)")]
    TooLarge(String),
    #[error("option '{0}' is not supported here")]
    Option(String),
    #[error("protocol '{0}' cannot hold a new image; name a file")]
    CreateThere(String),
    #[error("this command needs an image in one file of the host")]
    NotAPath,
    #[error("force-share=on can only be used with read-only images")]
    ShareWrite,
    #[error("Image does not have a backing file")]
    NoBackingFile,
    #[error(
        "Use the --shrink option to perform a shrink operation.\n{}: warning: Shrinking an image will delete all data \
         beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.",
        crate::program()
    )]
    Shrink,
    #[error("New image size must be positive")]
    NotPositive,
    #[error("The new size must be a multiple of 512")]
    NotSectors,
    #[error("Preallocation can only be used for growing images")]
    PreallocateShrink,
    #[error("Invalid preallocation mode '{0}'")]
    PreallocationMode(String),
    #[error("Could not resize file: File too large")]
    FileTooLarge,
    #[error("Could not {action} snapshot '{name}': {reason}")]
    Snapshot { action: &'static str, name: String, reason: &'static str },
    #[error("Invalid parameter '{name}'\n{}: Failed in parsing snapshot param '{params}'", crate::program())]
    SnapshotParameter { name: String, params: String },
    #[error("Could not change the backing file to '{name}': {reason}")]
    Backing { name: String, reason: &'static str },
    #[error("Could not create '{0}': Is a directory")]
    Directory(String),
    #[error("Either --size N or one filename must be specified.")]
    MeasureWhat,
    #[error("At most one filename argument is allowed.")]
    MeasureOne,
    #[error("--size N cannot be used together with a filename.")]
    MeasureBoth,
    #[error("--image-opts, -f, and -l require a filename argument.")]
    MeasureNeedsFile,
    #[error("The image size is too large (try using a larger cluster size)")]
    MeasureTooLarge,
    #[error("Block driver '{0}' does not support size measurement")]
    NotMeasured(String),
    #[error("Parameter '{0}' is required for cipher")]
    KeySecret(&'static str),
    #[error("No secret with id '{0}'")]
    NoSecret(String),
    #[error("No TLS credentials with id '{0}'")]
    NoTlsCreds(String),
    #[error("Expected TLS credentials for a {0} endpoint")]
    TlsEndpoint(&'static str),
    #[error("{}", why(.0))]
    Block(BlockError),
    #[error("Parameter '{0}' is missing")]
    Missing(&'static str),
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(&'static str),
    #[error("File contains external, encrypted or compressed clusters.")]
    MapNotPlain,
    #[error("Invalid parameter '{0}'\nThis option is only supported for image creation")]
    CreationOnly(String),
    #[error("Format driver '{0}' does not support option amendment")]
    NotAmended(String),
    #[error("Unknown compatibility level {0}")]
    Compat(String),
    #[error("Operation {action} on bitmap {bitmap} failed: {reason}")]
    Bitmap { action: &'static str, bitmap: String, reason: String },
    #[error(
        "Cannot copy inconsistent bitmap '{0}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
    )]
    BrokenBitmap(String),
    #[error("Format driver '{0}' does not support bitmaps")]
    NoBitmaps(String),
    #[error("can't open device {name}: {reason}")]
    IoOpen { name: String, reason: String },
    #[error("can't open: {0}")]
    IoOpenOptions(String),
    #[error("unrecognized operand {0}")]
    DdOperand(String),
    #[error("Invalid aio option: {0}")]
    Aio(String),
    #[error("aio=native was specified, but it requires cache.direct=on, which was not specified.")]
    NativeNeedsDirect,
    #[error("Did not find '{base}' in the backing chain of '{name}'")]
    NotInChain { base: String, name: String },
    #[error("Invalid format name: '{0}'")]
    FormatName(String),
    #[error("Offset ({offset}) cannot be greater than size of the containing file ({have})")]
    SliceOffset { offset: u64, have: u64 },
    #[error(
        "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing \
         file ({have})"
    )]
    SliceEnd { offset: u64, size: u64, have: u64 },
    #[error("Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment")]
    Unaligned,
    #[error("Block node is read-only")]
    ReadOnly,
    #[error("{}", chain(.0))]
    RulesFile(RulesFileError),
    #[error("Could not read image for determining its format: {}", host(.0))]
    Probing(io::Error),
    #[error("filesystem does not support O_DIRECT")]
    NoDirect,
    #[error("{0}")]
    Requires(&'static str),
    #[error(
        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. Select 0 to \
         disable sparse detection (fully allocates output)."
    )]
    SparseSize,
    #[error("the sources together are larger than 2^63 bytes")]
    SourcesTooLarge,
    #[error("output file is smaller than input file")]
    TargetTooSmall,
    #[error("Use of backing file requires explicit backing format")]
    ConvertBackingFormat,
    #[error("This file format does not support {0}")]
    FormatLacks(&'static str),
}

impl ImgError {
    /// Reads a number as sizes are written; `what` names it in the error.
    pub fn number(text: &str, what: &'static str, range: RangeInclusive<u64>) -> Result<u64, ImgError> {
        ImgError::in_range(size::parse(text), text, what, range)
    }

    /// Reads a number without a suffix.
    pub fn count(text: &str, what: &'static str, range: RangeInclusive<u64>) -> Result<u64, ImgError> {
        ImgError::in_range(size::integer(text), text, what, range)
    }

    fn in_range(
        read: Result<u64, SizeError>,
        text: &str,
        what: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<u64, ImgError> {
        match read {
            Ok(number) if range.contains(&number) => Ok(number),
            Ok(_) | Err(SizeError::Range) => {
                Err(ImgError::NumberRange { what, min: *range.start(), max: *range.end() })
            }
            Err(SizeError::Text) => Err(ImgError::Number { what, found: text.to_owned() }),
        }
    }

    /// Reads a number of bytes of a disk.
    pub fn size(text: &str, what: &'static str) -> Result<u64, ImgError> {
        ImgError::number(text, what, 0..=i64::MAX as u64)
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            ImgError::NoChecks => 63,
            ImgError::WithCode { code, .. } => *code,
            _ => 1,
        }
    }

    /// The subcommand whose `--help` tells more, for wrong command lines: an empty one is the tool itself.
    pub fn usage_of(&self) -> Option<&'static str> {
        match self {
            ImgError::NoCommand | ImgError::NoSuchCommand(_) => Some(""),
            ImgError::WithCode { source, .. } => source.usage_of(),
            ImgError::Option { command, .. }
            | ImgError::OneFile { command }
            | ImgError::Expecting { command, .. }
            | ImgError::Extra { command, .. }
            | ImgError::OutputFormat { command, .. }
            | ImgError::RepairWhat { command, .. }
            | ImgError::MixedActions { command }
            | ImgError::Needed { command, .. } => Some(command),
            _ => None,
        }
    }
}

/// What the host said, without Rust's number behind it.
pub fn host(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text.get(..at).unwrap_or(&text).to_owned(),
        None => text,
    }
}

fn prefix(subject: &str) -> String {
    if subject.is_empty() { String::new() } else { format!("{subject}: ") }
}

fn spec(error: &SpecError) -> String {
    error.to_string()
}

/// Why the engine refused, in qemu-img's words where it has them, else in the engine's, causes behind colons.
pub fn why(error: &BlockError) -> String {
    match error {
        BlockError::Io { path, action: Action::Open, source } => {
            format!("Could not open '{}': {}", path.display(), host(source))
        }
        BlockError::Io { path, action: Action::Create, source } => {
            format!("Could not create '{}': {}", path.display(), host(source))
        }
        BlockError::IsDirectory { path } | BlockError::NotAFile { path } => {
            format!("'file' driver requires '{}' to be a regular file", path.display())
        }
        BlockError::Locked { path, access } => {
            let lock = if access.starts_with("write") {
                "Failed to get \"write\" lock"
            } else {
                "Failed to get shared \"write\" lock"
            };
            format!("{lock}\nIs another process using the image [{}]?", path.display())
        }
        BlockError::DataFile { source, .. } => why(source),
        BlockError::NoResize { .. } => "Image format driver does not support resize".to_owned(),
        BlockError::DataFileNotGiven { .. } => "'data-file' is required for this image".to_owned(),
        BlockError::KeyNeeded { parameter, .. } => format!("Parameter '{parameter}' is required for cipher"),
        BlockError::WrongKey { .. } => "Invalid password, cannot unlock any keyslot".to_owned(),
        BlockError::Luks { source: LuksError::PayloadOffset { .. }, .. } => {
            "LUKS payload is overlapping with the header".to_owned()
        }
        BlockError::Luks { source, .. } => source.to_string(),
        BlockError::KeySlot { source, .. } => source.to_string(),
        BlockError::IterTime { iterations, max, .. } => format!("PBKDF iterations {iterations} larger than {max}"),
        BlockError::Unread { source, .. } => source.to_string(),
        BlockError::Mismatch { source, .. } => format!("Image is not in {} format", source.declared),
        BlockError::BackingMissing { backing, .. } => {
            format!("Could not open backing file: Could not open '{}': No such file or directory", backing.display())
        }
        other => chain(other),
    }
}

/// An error and its causes, behind colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        let said = match below.downcast_ref::<io::Error>() {
            Some(io) => host(io),
            None => below.to_string(),
        };
        text = format!("{text}: {said}");
        cause = below.source();
    }
    text
}
