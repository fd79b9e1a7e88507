//! How an image is named: a path, `json:{...}`, `--image-opts`, `nbd://`, `file:`. Pure text in, [`ImageSpec`] out.
//!
//! A name says which files it needs, but opens none: whoever holds the consent of the user does that. The spelling
//! is QEMU's (`docs/system/qemu-block-drivers.rst`, `qapi/block-core.json`), and so are the words of the errors that
//! callers of qemu-img match.

mod blkdebug;
mod nbd;
mod tree;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use image::Format;
use thiserror::Error;

use crate::blkdebug::{LimitError, RuleError};
pub use blkdebug::BlkdebugSpec;
pub use nbd::{NBD_PORT, NbdAddress, NbdSpec, NbdTls};
use tree::Tree;
pub use tree::split_commas;

/// Longest name that is taken apart, in bytes. A path has at most 4096.
const NAME_MAX_BYTES: usize = 64 << 10;
/// Deepest nesting of layers in one name.
const DEPTH_MAX: usize = 32;

/// One image and what is under it, as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Declared format; `None`: not said, so that a person's tool may probe.
    pub driver: Option<Format>,
    /// Where the image's bytes are.
    pub file: FileSpec,
    /// Which backing file it gets.
    pub backing: BackingSpec,
    /// `read-only`; `None`: as the command needs it.
    pub read_only: Option<bool>,
    /// The id of the secret (`--object secret,id=...`) that opens its encryption: `encrypt.key-secret` of qcow2,
    /// `key-secret` of luks.
    pub key_secret: Option<String>,
    /// External data file of a qcow2 image, in place of the one its header names.
    pub data_file: Option<FileSpec>,
    /// Other options of the layers that are known, with dotted names as given, such as `("file.locking", "off")`.
    pub options: Vec<(String, String)>,
}

/// Where bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileSpec {
    /// A file or block device of the host.
    Path(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdSpec),
    /// A part of another file.
    Slice {
        /// What it is a part of.
        below: Box<FileSpec>,
        /// Where it begins, in bytes.
        offset: u64,
        /// Its length in bytes, a multiple of 512; `None`: up to the end.
        size: Option<u64>,
    },
    /// A file whose requests fail by the rules of a file: QEMU's blkdebug.
    Blkdebug {
        /// The file of rules; `None`: there is none.
        rules: Option<PathBuf>,
        /// What stands in the name itself.
        own: BlkdebugSpec,
        /// What is under it.
        below: Box<FileSpec>,
    },
    /// The disk that another image holds: a format under a format.
    Image(Box<ImageSpec>),
}

/// Which backing file an image gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingSpec {
    /// The one its header names.
    FromHeader,
    /// None, whatever the header says.
    None,
    /// The one its header names, whose encryption a secret opens.
    HeaderWithKey {
        /// The id of its secret, if it has one.
        key_secret: Option<String>,
        /// Which backing file that one gets: its header's, with or without a key.
        below: Box<BackingSpec>,
    },
    /// This one, whatever the header says.
    Image(Box<ImageSpec>),
}

/// Why a name is no image. The texts are QEMU's where it has one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum SpecError {
    #[error("Unknown driver '{0}'")]
    Driver(String),
    #[error("Unknown protocol '{0}'")]
    Protocol(String),
    #[error("'{0}' is not supported here; copy the image to a local file, or serve it over NBD")]
    NotHere(String),
    #[error("A block device must be specified for \"{0}\"")]
    NoChild(&'static str),
    #[error("Must specify either driver or file")]
    NoDriverOrFile,
    #[error("The 'file' block driver requires a file name")]
    NoFileName,
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    Node(String),
    #[error("Block format '{driver}' does not support the option '{option}'")]
    FormatOption { driver: String, option: String },
    #[error("Block protocol '{driver}' doesn't support the option '{option}'")]
    ProtocolOption { driver: String, option: String },
    #[error(
        "Parameter '{option}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
         kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
    )]
    Number { option: String },
    #[error("Value '{found}' is out of range for parameter '{option}'")]
    Range { option: String, found: String },
    #[error("Parameter '{option}' expects 'on' or 'off'")]
    Switch { option: String },
    #[error("Parameter '{option}' does not accept value '{found}'")]
    Value { option: String, found: String },
    #[error("Specified size is not multiple of 512")]
    SliceSize,
    #[error("Could not parse the JSON options: {0}")]
    Json(String),
    #[error("Invalid JSON object given")]
    NotAnObject,
    #[error("the option '{0}' is given both as a value and as a group of options")]
    Twice(String),
    #[error("Can't specify 'file' and 'filename' options at the same time")]
    FileTwice,
    #[error("Invalid parameter '{0}'")]
    Parameter(String),
    #[error("No valid URL specified")]
    Url,
    #[error("blkdebug requires both config file and image path")]
    BlkdebugName,
    #[error(transparent)]
    Rule(#[from] RuleError),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("List indices are not contiguous, saw {seen} elements but {largest} largest index")]
    ListIndices { seen: usize, largest: usize },
    #[error("Invalid parameter type for '{place}', expected: {expected}")]
    Type { place: String, expected: &'static str },
    #[error("NBD server address missing")]
    NbdAddress,
    #[error("error parsing address '{0}'")]
    NbdHostPort(String),
    #[error("the name has {bytes} bytes; at most {NAME_MAX_BYTES} are read")]
    TooLong { bytes: usize },
    #[error("the name nests more than {DEPTH_MAX} layers")]
    TooDeep,
}

impl ImageSpec {
    /// An image at a path, of a declared format or to be probed.
    pub fn path(path: impl Into<PathBuf>, driver: Option<Format>) -> ImageSpec {
        ImageSpec::over(FileSpec::Path(path.into()), driver)
    }

    fn over(file: FileSpec, driver: Option<Format>) -> ImageSpec {
        ImageSpec {
            driver,
            file,
            backing: BackingSpec::FromHeader,
            read_only: None,
            key_secret: None,
            data_file: None,
            options: Vec::new(),
        }
    }

    /// Reads a name as a person writes it on a command line, or as an image stores it: a path, or a protocol before
    /// the first colon that no slash precedes.
    pub fn parse(name: &OsStr) -> Result<ImageSpec, SpecError> {
        if name.len() > NAME_MAX_BYTES {
            return Err(SpecError::TooLong { bytes: name.len() });
        }
        if name.is_empty() {
            return Err(SpecError::NoFileName);
        }
        let Some((protocol, rest)) = split_protocol(name) else {
            return Ok(ImageSpec::path(name, None));
        };
        if protocol == "json" {
            return ImageSpec::from_tree(tree::from_json(text_of(rest)?)?, 0);
        }
        Ok(ImageSpec::over(file_by_protocol(&protocol, name, rest, 0)?, None))
    }

    /// Reads the argument of a command with `--image-opts`: `driver=qcow2,file.filename=a.qcow2`. `,,` stands for a
    /// comma inside a value.
    pub fn parse_options(text: &str) -> Result<ImageSpec, SpecError> {
        if text.len() > NAME_MAX_BYTES {
            return Err(SpecError::TooLong { bytes: text.len() });
        }
        ImageSpec::from_tree(tree::from_options(text, "file")?, 0)
    }

    /// Reads a name with options of its layers beside it: `file.align=4k` with `blkdebug::a.img`.
    pub fn parse_with_options(name: &OsStr, text: &str) -> Result<ImageSpec, SpecError> {
        if text.len() > NAME_MAX_BYTES {
            return Err(SpecError::TooLong { bytes: text.len() });
        }
        let (Tree::Map(mut map), Tree::Map(more)) =
            (ImageSpec::parse(name)?.to_tree(), tree::from_options(text, "file")?)
        else {
            return Err(SpecError::NotAnObject);
        };
        if !tree::merge(&mut map, more) {
            return Err(SpecError::FileTwice);
        }
        ImageSpec::from_tree(Tree::Map(map), 0)
    }

    fn from_tree(tree: Tree, depth: usize) -> Result<ImageSpec, SpecError> {
        if depth > DEPTH_MAX {
            return Err(SpecError::TooDeep);
        }
        let mut map = match tree {
            Tree::Map(map) => map,
            Tree::Leaf(node) => return Err(SpecError::Node(node)),
            Tree::Null => return Err(SpecError::NotAnObject),
        };
        let driver = tree::take_leaf(&mut map, "driver")?;
        if driver.as_deref().is_some_and(is_protocol) {
            // A protocol is an image whose bytes are the disk.
            let file = file_from_map(driver, map, depth)?;
            return Ok(ImageSpec::over(file, Some(Format::Raw)));
        }
        let format = driver.as_deref().map(format_named).transpose()?;
        let Some(below) = map.remove("file") else {
            return Err(if driver.is_some() { SpecError::NoChild("file") } else { SpecError::NoDriverOrFile });
        };
        let mut file = file_from_tree(below, depth + 1)?;
        if format == Some(Format::Raw) {
            file = sliced(file, &mut map)?;
        }
        let mut spec = ImageSpec::over(file, format);
        spec.backing = match map.remove("backing") {
            None => BackingSpec::FromHeader,
            Some(Tree::Null) => BackingSpec::None,
            Some(Tree::Leaf(text)) if text.is_empty() => BackingSpec::None,
            Some(Tree::Map(below)) if is_key_alone(&below) => BackingSpec::with_key(below, depth + 1)?,
            Some(below) => BackingSpec::Image(Box::new(ImageSpec::from_tree(below, depth + 1)?)),
        };
        spec.data_file = map.remove("data-file").map(|below| file_from_tree(below, depth + 1)).transpose()?;
        spec.read_only = tree::take_leaf(&mut map, "read-only")?.map(|v| switch("read-only", &v)).transpose()?;
        spec.key_secret = take_key(&mut map)?;
        let name = driver.unwrap_or_else(|| "raw".to_owned());
        for (option, value) in tree::flatten(map) {
            if !FORMAT_OPTIONS.contains(&option.as_str()) {
                return Err(SpecError::FormatOption { driver: name, option });
            }
            spec.options.push((option, value));
        }
        Ok(spec)
    }

    /// The value of an option of this layer, the last one given.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The path, if the image is one file of the host from its first byte to its last.
    pub fn plain_path(&self) -> Option<&Path> {
        match &self.file {
            FileSpec::Path(path) => Some(path),
            _ => None,
        }
    }
}

impl BackingSpec {
    /// Backing files that headers name, with the ids of their secrets from the first on, as far as there are some.
    pub fn with_keys(ids: &[Option<&str>]) -> BackingSpec {
        match ids.split_first() {
            Some((id, rest)) => {
                let below = Box::new(BackingSpec::with_keys(rest));
                BackingSpec::HeaderWithKey { key_secret: id.map(str::to_owned), below }
            }
            None => BackingSpec::FromHeader,
        }
    }

    fn with_key(mut map: tree::Map, depth: usize) -> Result<BackingSpec, SpecError> {
        if depth > DEPTH_MAX {
            return Err(SpecError::TooDeep);
        }
        let key_secret = take_key(&mut map)?;
        let below = match map.remove("backing") {
            Some(Tree::Map(below)) if is_key_alone(&below) => BackingSpec::with_key(below, depth + 1)?,
            Some(_) => return Err(SpecError::NoDriverOrFile),
            None => BackingSpec::FromHeader,
        };
        match tree::flatten(map).into_iter().find(|(option, _)| option != "encrypt.format") {
            Some((option, _)) => Err(SpecError::Parameter(option)),
            None => Ok(BackingSpec::HeaderWithKey { key_secret, below: Box::new(below) }),
        }
    }
}

/// Whether options of a backing file leave what it is to the header above it.
fn is_key_alone(map: &tree::Map) -> bool {
    let has = |name: &str| map.contains_key(name);
    !has("driver") && !has("file") && (has("encrypt") || has("key-secret") || has("backing"))
}

/// Takes the id of a layer's secret.
fn take_key(map: &mut tree::Map) -> Result<Option<String>, SpecError> {
    let of_group = match map.get_mut("encrypt") {
        Some(Tree::Map(encrypt)) => tree::take_leaf(encrypt, "key-secret")?,
        _ => None,
    };
    Ok(tree::take_leaf(map, "key-secret")?.or(of_group))
}

/// How the image is called in outputs: its path or URL if that says it all, else `json:{...}`.
impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, &self.backing) {
            (FileSpec::Slice { .. } | FileSpec::Image(_), _) | (_, BackingSpec::Image(_)) => {
                write!(f, "json:{}", tree::print(&self.to_tree()))
            }
            (FileSpec::Blkdebug { own, .. }, _) if !own.is_empty() => {
                write!(f, "json:{}", tree::print(&self.to_tree()))
            }
            _ if self.key_secret.is_some() => write!(f, "json:{}", tree::print(&self.to_tree())),
            (file, _) => write!(f, "{file}"),
        }
    }
}

impl fmt::Display for FileSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileSpec::Path(path) => write!(f, "{}", path.display()),
            FileSpec::Nbd(nbd) => write!(f, "{nbd}"),
            FileSpec::Blkdebug { rules, below, own } if own.is_empty() => {
                write!(f, "blkdebug:{}:{below}", rules.as_deref().unwrap_or(Path::new("")).display())
            }
            FileSpec::Slice { .. } | FileSpec::Image(_) | FileSpec::Blkdebug { .. } => {
                write!(f, "json:{}", tree::print(&self.to_tree()))
            }
        }
    }
}

impl ImageSpec {
    fn to_tree(&self) -> Tree {
        let mut map = tree::Map::new();
        if let Some(driver) = self.driver {
            map.insert("driver".into(), Tree::Leaf(driver.name().into()));
        }
        if let Some(id) = &self.key_secret {
            let key = if self.driver == Some(Format::Luks) { "key-secret" } else { "encrypt.key-secret" };
            map.insert(key.into(), Tree::Leaf(id.clone()));
        }
        match &self.file {
            FileSpec::Slice { below, offset, size } if self.driver == Some(Format::Raw) => {
                put_slice(&mut map, *offset, *size);
                map.insert("file".into(), below.to_tree());
            }
            file => {
                map.insert("file".into(), file.to_tree());
            }
        }
        match &self.backing {
            BackingSpec::FromHeader | BackingSpec::HeaderWithKey { .. } => {}
            BackingSpec::None => {
                map.insert("backing".into(), Tree::Null);
            }
            BackingSpec::Image(below) => {
                map.insert("backing".into(), below.to_tree());
            }
        }
        Tree::Map(map)
    }
}

impl FileSpec {
    fn to_tree(&self) -> Tree {
        let mut map = tree::Map::new();
        let mut put = |key: &str, value: String| map.insert(key.to_owned(), Tree::Leaf(value));
        match self {
            FileSpec::Path(path) => {
                put("driver", "file".into());
                put("filename", path.display().to_string());
            }
            FileSpec::Nbd(nbd) => {
                put("driver", "nbd".into());
                put("export", nbd.export.clone());
                if let Some(tls) = &nbd.tls {
                    tls.creds.iter().for_each(|id| drop(put("tls-creds", id.clone())));
                    tls.hostname.iter().for_each(|name| drop(put("tls-hostname", name.clone())));
                }
                map.insert("server".into(), nbd.address.to_tree());
            }
            FileSpec::Slice { below, offset, size } => {
                put("driver", "raw".into());
                put_slice(&mut map, *offset, *size);
                map.insert("file".into(), below.to_tree());
            }
            FileSpec::Blkdebug { rules, below, own } => {
                own.given.iter().for_each(|(option, value)| drop(put(option, value.clone())));
                put("driver", "blkdebug".into());
                if let Some(rules) = rules {
                    put("config", rules.display().to_string());
                }
                map.insert("image".into(), below.to_tree());
            }
            FileSpec::Image(image) => return image.to_tree(),
        }
        Tree::Map(map)
    }
}

fn put_slice(map: &mut tree::Map, offset: u64, size: Option<u64>) {
    if offset > 0 {
        map.insert("offset".into(), Tree::Leaf(offset.to_string()));
    }
    if let Some(size) = size {
        map.insert("size".into(), Tree::Leaf(size.to_string()));
    }
}

/// Options of format layers that change how an image is accessed and never what it is. The engine reads those it has
/// a use for; the others are promises it keeps anyway.
const FORMAT_OPTIONS: [&str; 17] = [
    "node-name",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "auto-read-only",
    "force-share",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "refcount-cache-size",
    "encrypt.format",
];

/// The same for files.
const FILE_OPTIONS: [&str; 10] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "force-share",
    "locking",
    "aio",
];

/// Protocols that QEMU has and this engine does not.
const PROTOCOLS_ELSEWHERE: [&str; 20] = [
    "ftp",
    "ftps",
    "http",
    "https",
    "ssh",
    "rbd",
    "gluster",
    "gluster+tcp",
    "iscsi",
    "iser",
    "nfs",
    "nvme",
    "vvfat",
    "fat",
    "null-co",
    "null-aio",
    "blklogwrites",
    "blkverify",
    "quorum",
    "host_cdrom",
];

fn is_protocol(driver: &str) -> bool {
    matches!(driver, "file" | "host_device" | "nbd" | "blkdebug") || PROTOCOLS_ELSEWHERE.contains(&driver)
}

fn format_named(name: &str) -> Result<Format, SpecError> {
    name.parse().map_err(|_| SpecError::Driver(name.to_owned()))
}

fn switch(option: &str, value: &str) -> Result<bool, SpecError> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(SpecError::Switch { option: option.to_owned() }),
    }
}

/// QEMU's rule: the text before a colon that stands before the first slash.
fn split_protocol(name: &OsStr) -> Option<(String, &OsStr)> {
    let bytes = name.as_bytes();
    let at = bytes.iter().position(|b| matches!(b, b':' | b'/'))?;
    if bytes.get(at) != Some(&b':') {
        return None;
    }
    let protocol = String::from_utf8_lossy(bytes.get(..at)?).into_owned();
    Some((protocol, OsStr::from_bytes(bytes.get(at + 1..)?)))
}

/// Whether a stored name is more than a path, by QEMU's rule.
pub fn has_protocol(name: &str) -> bool {
    split_protocol(OsStr::new(name)).is_some()
}

fn text_of(name: &OsStr) -> Result<&str, SpecError> {
    name.to_str().ok_or_else(|| SpecError::Json("JSON parse error, invalid UTF-8".to_owned()))
}

fn file_by_protocol(protocol: &str, name: &OsStr, rest: &OsStr, depth: usize) -> Result<FileSpec, SpecError> {
    match protocol {
        "file" | "host_device" if rest.is_empty() => Err(SpecError::NoFileName),
        "file" | "host_device" => Ok(FileSpec::Path(rest.into())),
        "nbd" | "nbd+tcp" | "nbd+unix" | "nbds" | "nbds+tcp" | "nbds+unix" => {
            let text = name.to_str().ok_or(SpecError::Url)?;
            nbd::parse(text).map(FileSpec::Nbd)
        }
        "blkdebug" => blkdebug(rest, depth),
        other if PROTOCOLS_ELSEWHERE.contains(&other) => Err(SpecError::NotHere(other.to_owned())),
        other => Err(SpecError::Protocol(other.to_owned())),
    }
}

/// `RULES:IMAGE` behind `blkdebug:`.
fn blkdebug(rest: &OsStr, depth: usize) -> Result<FileSpec, SpecError> {
    if depth > DEPTH_MAX {
        return Err(SpecError::TooDeep);
    }
    let bytes = rest.as_bytes();
    let at = bytes.iter().position(|b| *b == b':').ok_or(SpecError::BlkdebugName)?;
    let rules = bytes.get(..at).filter(|rules| !rules.is_empty());
    let image = OsString::from_vec(bytes.get(at + 1..).unwrap_or_default().to_vec());
    if image.is_empty() {
        return Err(SpecError::NoFileName);
    }
    let below = match split_protocol(&image) {
        None => FileSpec::Path(PathBuf::from(&image)),
        Some((protocol, rest)) => file_by_protocol(&protocol, &image, rest, depth + 1)?,
    };
    let rules = rules.map(|rules| PathBuf::from(OsStr::from_bytes(rules)));
    Ok(FileSpec::Blkdebug { rules, own: BlkdebugSpec::default(), below: Box::new(below) })
}

fn file_from_tree(tree: Tree, depth: usize) -> Result<FileSpec, SpecError> {
    if depth > DEPTH_MAX {
        return Err(SpecError::TooDeep);
    }
    let mut map = match tree {
        Tree::Map(map) => map,
        Tree::Leaf(node) => return Err(SpecError::Node(node)),
        Tree::Null => return Err(SpecError::NoChild("file")),
    };
    let driver = tree::take_leaf(&mut map, "driver")?;
    file_from_map(driver, map, depth)
}

fn file_from_map(driver: Option<String>, mut map: tree::Map, depth: usize) -> Result<FileSpec, SpecError> {
    match driver.as_deref() {
        Some("nbd") => {
            let nbd = nbd::from_map(&mut map)?;
            only_file_options("nbd", map)?;
            Ok(FileSpec::Nbd(nbd))
        }
        Some("file" | "host_device") => plain_file(map),
        // Without a driver a file name may carry a protocol.
        None if map.contains_key("filename") => {
            let name = OsString::from(tree::take_leaf(&mut map, "filename")?.unwrap_or_default());
            only_file_options("file", map)?;
            match split_protocol(&name) {
                Some((protocol, rest)) => file_by_protocol(&protocol, &name, rest, depth),
                None if name.is_empty() => Err(SpecError::NoFileName),
                None => Ok(FileSpec::Path(name.into())),
            }
        }
        None if !map.contains_key("file") => Err(SpecError::NoFileName),
        Some("blkdebug") => {
            let rules = tree::take_leaf(&mut map, "config")?.map(PathBuf::from);
            let below = map.remove("image").ok_or(SpecError::NoChild("image"))?;
            let own = BlkdebugSpec::take(&mut map)?;
            only_file_options("blkdebug", map)?;
            Ok(FileSpec::Blkdebug { rules, own, below: Box::new(file_from_tree(below, depth + 1)?) })
        }
        Some(other) if is_protocol(other) => Err(SpecError::NotHere(other.to_owned())),
        // A raw layer below another one shifts and cuts; any other format is an image of its own.
        None | Some("raw") => {
            let below = map.remove("file").ok_or(SpecError::NoChild("file"))?;
            let file = sliced(file_from_tree(below, depth + 1)?, &mut map)?;
            only_file_options("raw", map)?;
            Ok(file)
        }
        Some(_) => {
            map.insert("driver".into(), Tree::Leaf(driver.unwrap_or_default()));
            Ok(FileSpec::Image(Box::new(ImageSpec::from_tree(Tree::Map(map), depth)?)))
        }
    }
}

fn plain_file(mut map: tree::Map) -> Result<FileSpec, SpecError> {
    let name = tree::take_leaf(&mut map, "filename")?.filter(|name| !name.is_empty()).ok_or(SpecError::NoFileName)?;
    only_file_options("file", map)?;
    // `filename` of the file driver is a path, but QEMU strips its own prefix there too.
    let path = name.strip_prefix("file:").unwrap_or(&name);
    Ok(FileSpec::Path(path.into()))
}

fn only_file_options(driver: &str, map: tree::Map) -> Result<(), SpecError> {
    match tree::flatten(map).into_iter().find(|(option, _)| !FILE_OPTIONS.contains(&option.as_str())) {
        None => Ok(()),
        Some((option, _)) => Err(SpecError::ProtocolOption { driver: driver.to_owned(), option }),
    }
}

/// Applies `offset` and `size` of a raw layer.
fn sliced(below: FileSpec, map: &mut tree::Map) -> Result<FileSpec, SpecError> {
    let number = |option: &str, map: &mut tree::Map| {
        tree::take_leaf(map, option)?.map(|value| tree::number(option, &value)).transpose()
    };
    let offset = number("offset", map)?;
    let size = number("size", map)?;
    if size.is_some_and(|size| size % 512 != 0) {
        return Err(SpecError::SliceSize);
    }
    if offset.unwrap_or(0) == 0 && size.is_none() {
        return Ok(below);
    }
    Ok(FileSpec::Slice { below: Box::new(below), offset: offset.unwrap_or(0), size })
}

#[cfg(test)]
mod tests;
