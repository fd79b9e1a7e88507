//! From the words of a command line to images: names, declared formats, cache modes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use block::spec::{BackingSpec, FileSpec, ImageSpec};
use block::{
    BlockError, CacheMode, ChainFile, Disk, Format, LayerKey, MaintenanceError, OpenOptions, Qcow2Image, Snapshot,
    inspect, open_alone, resolve_chain_probing, use_direct_io,
};

use crate::error::{ImgError, Rule};
use crate::getopt::Parsed;
use crate::layers;
use crate::ova;
use crate::secret::Secrets;

/// An image as a command line names it.
#[derive(Clone, Debug)]
pub struct Named {
    /// The name as given, for messages.
    pub label: String,
    /// What it means.
    pub spec: ImageSpec,
    /// The secrets that it may name.
    pub secrets: Secrets,
}

impl Named {
    /// Reads a file name under `--image-opts` and the format that the option `format_option` declares.
    pub fn of(parsed: &Parsed, file: &OsStr, format_option: &'static str) -> Result<Named, ImgError> {
        parsed.check_image_opts(format_option)?;
        Ok(Named::new(file, parsed.has("image-opts"), parsed.value(format_option)?)?.with(Secrets::of(parsed)?))
    }

    /// The same name, with secrets.
    pub fn with(self, secrets: Secrets) -> Named {
        Named { secrets, ..self }
    }

    /// The ids of the secrets of the image and those below it, as far as the name tells them.
    pub fn key_ids(&self) -> Vec<Option<&str>> {
        let mut ids = vec![self.spec.key_secret.as_deref()];
        let mut backing = &self.spec.backing;
        while let BackingSpec::HeaderWithKey { key_secret, below } = backing {
            ids.push(key_secret.as_deref());
            backing = below;
        }
        ids
    }

    /// What opens the encryption of the image and of those below it.
    pub fn keys(&self) -> Result<Vec<LayerKey>, ImgError> {
        self.key_ids().into_iter().map(|id| key_of(&self.label, &self.secrets, id)).collect()
    }

    /// What opens the encryption of the image itself.
    pub fn key(&self) -> Result<LayerKey, ImgError> {
        key_of(&self.label, &self.secrets, self.spec.key_secret.as_deref())
    }

    /// Reads a name. `format` replaces what the name declares.
    pub fn new(file: &OsStr, image_opts: bool, format: Option<&str>) -> Result<Named, ImgError> {
        let label = file.to_string_lossy().into_owned();
        let archive = if image_opts { None } else { ova::at(file, format)? };
        if let Some(archive) = archive {
            return Ok(Named { spec: archive.image()?, label, secrets: Secrets::default() });
        }
        let refused = |source| ImgError::Spec { name: label.clone(), source };
        let mut spec = match (image_opts, file.to_str()) {
            (true, Some(text)) => ImageSpec::parse_options(text).map_err(refused)?,
            (true, None) => return Err(ImgError::NotText { option: "image-opts" }),
            (false, _) => ImageSpec::parse(file).map_err(refused)?,
        };
        if let Some(name) = format {
            spec.driver = Some(format_named(&label, name)?);
        }
        Ok(Named { label, spec, secrets: Secrets::default() })
    }

    /// Reads a name with options of its layers beside it.
    pub fn with_options(file: &OsStr, options: &str) -> Result<Named, ImgError> {
        let label = file.to_string_lossy().into_owned();
        let spec = ImageSpec::parse_with_options(file, options);
        let spec = spec.map_err(|source| ImgError::Spec { name: label.clone(), source })?;
        Ok(Named { label, spec, secrets: Secrets::default() })
    }

    /// Whether the name is a path and nothing else, so that the files say the rest.
    pub fn is_plain(&self) -> bool {
        self.spec.plain_path().is_some() && from_header(&self.spec) && self.spec.data_file.is_none()
    }

    /// Whether the name is that of an NBD export and nothing else.
    pub fn is_export(&self) -> bool {
        matches!(self.spec.file, FileSpec::Nbd(_)) && from_header(&self.spec)
    }

    /// The path, for commands that need a file of the host.
    pub fn plain_path(&self) -> Result<&Path, ImgError> {
        self.spec.plain_path().ok_or_else(|| ImgError::OpenRule { name: self.label.clone(), reason: Rule::NotAPath })
    }
}

/// Whether the headers say which files are below.
fn from_header(spec: &ImageSpec) -> bool {
    matches!(spec.backing, BackingSpec::FromHeader | BackingSpec::HeaderWithKey { .. })
}

/// What opens an encrypted layer: the secret of an id.
pub fn key_of(label: &str, secrets: &Secrets, id: Option<&str>) -> Result<LayerKey, ImgError> {
    let Some(id) = id else { return Ok(LayerKey::None) };
    match secrets.get(id) {
        Some(passphrase) => Ok(LayerKey::PassphraseOrLegacy(passphrase.clone())),
        None => Err(ImgError::OpenRule { name: label.to_owned(), reason: Rule::NoSecret(id.to_owned()) }),
    }
}

/// A format by name, for an image that is opened.
pub fn format_named(label: &str, name: &str) -> Result<Format, ImgError> {
    match name {
        // The protocols of files show their bytes as they are.
        "file" | "host_device" => Ok(Format::Raw),
        _ => name
            .parse()
            .map_err(|_| ImgError::OpenRule { name: label.to_owned(), reason: Rule::UnknownDriver(name.to_owned()) }),
    }
}

/// A cache mode by name; `which`, with a blank behind it, says in the message whose.
pub fn cache_named(which: &'static str, name: Option<&str>, default: CacheMode) -> Result<CacheMode, ImgError> {
    match name {
        None => Ok(default),
        Some("writeback") => Ok(CacheMode::Writeback),
        Some("writethrough") => Ok(CacheMode::Writethrough),
        Some("none" | "off") => Ok(CacheMode::None),
        Some("directsync") => Ok(CacheMode::DirectSync),
        Some("unsafe") => Ok(CacheMode::Unsafe),
        Some(other) => Err(ImgError::Cache { cache: which, found: other.to_owned() }),
    }
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// For writing too.
    pub write: bool,
    /// Without locks: `-U`.
    pub share: bool,
    /// How the host may cache.
    pub cache: CacheMode,
}

impl Access {
    /// For reading, with the locks that `-U` leaves out.
    pub fn read(parsed: &Parsed) -> Access {
        Access { write: false, share: parsed.has("force-share"), cache: CacheMode::Writeback }
    }

    /// For writing.
    pub fn write(cache: CacheMode) -> Access {
        Access { write: true, share: false, cache }
    }
}

/// Opens the files of an image, the top one first.
pub fn chain(named: &Named, access: Access) -> Result<Vec<ChainFile>, ImgError> {
    if access.write && access.share {
        return Err(ImgError::OpenRule { name: named.label.clone(), reason: Rule::ShareWrite });
    }
    if !from_header(&named.spec) {
        return Err(ImgError::NotSupported("an image name with 'backing'"));
    }
    let chain = resolve_chain_probing(named.plain_path()?, named.spec.driver, !access.write, !access.share);
    let chain = chain.map_err(|source| not_opened(named, source))?;
    if access.write && named.spec.driver.is_none() && chain.first().is_some_and(|top| top.format == Format::Raw) {
        warn_of_probing(&named.label);
    }
    Ok(chain)
}

/// A refusal of an image, or of one below it.
fn not_opened(named: &Named, source: BlockError) -> ImgError {
    let name = named.label.clone();
    match path_of(&source) {
        Some(path) if Some(path) != named.spec.plain_path() => ImgError::OpenBelow { name, source },
        _ => ImgError::Open { name, source },
    }
}

/// The file an error is about, where it could be one below the image that was named.
fn path_of(error: &BlockError) -> Option<&Path> {
    match error {
        BlockError::Io { path, .. }
        | BlockError::Locked { path, .. }
        | BlockError::IsDirectory { path }
        | BlockError::NotAFile { path }
        | BlockError::KeyNeeded { path, .. }
        | BlockError::WrongKey { path }
        | BlockError::Luks { path, .. }
        | BlockError::Unread { path, .. }
        | BlockError::Mismatch { path, .. } => Some(path),
        _ => None,
    }
}

/// Opens the top file only, for commands that do not look below it.
pub fn top(named: &Named, access: Access) -> Result<ChainFile, ImgError> {
    let failed = |source| ImgError::Open { name: named.label.clone(), source };
    if access.write && access.share {
        return Err(ImgError::OpenRule { name: named.label.clone(), reason: Rule::ShareWrite });
    }
    let path = named.plain_path()?;
    let file = open_alone(path, named.spec.driver, !access.write, !access.share).map_err(failed)?;
    if access.write && file.format == Format::Raw && named.spec.driver.is_none() {
        warn_of_probing(&named.label);
    }
    Ok(file)
}

/// Opens the top file as a qcow2 image on its own, with its key.
pub fn qcow2(named: &Named, top: ChainFile, read_only: bool) -> Result<Qcow2Image, ImgError> {
    Qcow2Image::open_with_key(top, read_only, &named.key()?)
        .map_err(|source| ImgError::Open { name: named.label.clone(), source })
}

/// Refuses an encrypted image that the key of its name does not open, for commands that look at no guest data: with
/// qemu-img, too, whoever cannot open an image cannot do anything with it.
pub fn require_key(named: &Named, top: &ChainFile) -> Result<(), ImgError> {
    let failed = |source| ImgError::Open { name: named.label.clone(), source };
    if inspect(&top.path_label, Some(top.format)).map_err(failed)?.encryption.is_none() {
        return Ok(());
    }
    let access = Access { write: false, share: true, cache: CacheMode::Writeback };
    let again = self::top(named, access)?;
    match top.format {
        Format::Qcow2 => qcow2(named, again, true).map(drop),
        _ => over(named, vec![again], access).map(drop),
    }
}

/// What qemu-img says before it writes to a raw image that nobody declared raw.
fn warn_of_probing(label: &str) {
    eprintln!(
        "WARNING: Image format was not specified for '{label}' and probing guessed raw.\n         Automatically \
         detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions."
    );
}

/// Makes a disk of open files.
pub fn over(named: &Named, chain: Vec<ChainFile>, access: Access) -> Result<Disk, ImgError> {
    over_with(named, chain, access, OpenOptions::default())
}

fn over_with(named: &Named, chain: Vec<ChainFile>, access: Access, options: OpenOptions) -> Result<Disk, ImgError> {
    let format = chain.first().map_or(Format::Raw, |top| top.format);
    if access.cache.is_direct() {
        for layer in &chain {
            use_direct_io(&layer.file).map_err(|_| ImgError::OpenRule {
                name: layer.path_label.display().to_string(),
                reason: Rule::NoDirect,
            })?;
        }
    }
    let keys = named.keys()?;
    let options = OpenOptions { read_only: !access.write, format, cache: access.cache, keys, ..options };
    Disk::open(chain, &options).map_err(|source| not_opened(named, source))
}

/// Opens an image and everything below it.
pub fn disk(named: &Named, access: Access) -> Result<Disk, ImgError> {
    disk_with_names(named, access).map(|(disk, _)| disk)
}

/// As [`disk`], with options of the disk that `access` does not decide.
pub fn disk_with(named: &Named, access: Access, options: OpenOptions) -> Result<Disk, ImgError> {
    disk_with_all(named, access, options).map(|(disk, _)| disk)
}

/// The same, with the names of the files of each layer, the top one first: the image, then its extents.
pub fn disk_with_names(named: &Named, access: Access) -> Result<(Disk, Vec<Vec<String>>), ImgError> {
    disk_with_all(named, access, OpenOptions::default())
}

fn disk_with_all(named: &Named, access: Access, options: OpenOptions) -> Result<(Disk, Vec<Vec<String>>), ImgError> {
    if access.write && access.share {
        return Err(ImgError::OpenRule { name: named.label.clone(), reason: Rule::ShareWrite });
    }
    if named.is_plain() {
        let chain = chain(named, access)?;
        let names_of =
            |layer: &ChainFile| layers::file_names(&layer.path_label, layer.extents.iter().map(|(_, path)| path));
        let names = chain.iter().map(names_of).collect();
        return Ok((over_with(named, chain, access, options)?, names));
    }
    layers::disk_with_names(named, access, options)
}

/// The same. With `scratch`, what is written goes to an image on top that ends with the disk (`-s`); the image itself is
/// opened for reading only.
pub fn disk_with_scratch(named: &Named, access: Access, options: OpenOptions, scratch: bool) -> Result<Disk, ImgError> {
    if !scratch || !access.write {
        return disk_with(named, access, options);
    }
    let disk = disk_with(named, Access { write: false, ..access }, options)?;
    // Where QEMU puts it: more than memory holds may be written.
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let file = tempfile::tempfile_in(&dir).map_err(|source| ImgError::Scratch { dir, source })?;
    disk.with_scratch(file).map_err(|source| ImgError::Open { name: named.label.clone(), source })
}

/// Makes a disk show one of its internal snapshots: `snapshot.name=...`, `snapshot.id=...`, both, or either's value.
pub fn show_snapshot(disk: &Disk, params: &str) -> Result<(), ImgError> {
    let missing = || ImgError::Plain(Rule::Requires("Failed to load snapshot: Can't find snapshot"));
    let failed = |source| match source {
        BlockError::Maintenance { source: MaintenanceError::SnapshotNotFound { .. }, .. } => missing(),
        source => ImgError::Failed { doing: "Failed to load snapshot".to_owned(), source },
    };
    let wanted = if params.starts_with("snapshot.") { Some(SnapshotParams::read(params)?) } else { None };
    let image = disk.qcow2().ok_or_else(missing)?;
    let Some(wanted) = wanted else { return image.show_snapshot(params).map_err(failed) };
    let all = image.snapshots().map_err(failed)?;
    let found = all.iter().find(|snapshot| wanted.fits(snapshot)).ok_or_else(missing)?;
    image.show_snapshot(&String::from_utf8_lossy(&found.id)).map_err(failed)
}

/// What `snapshot.id=...,snapshot.name=...` asks for.
#[derive(Default)]
struct SnapshotParams {
    id: Option<String>,
    name: Option<String>,
}

impl SnapshotParams {
    fn read(params: &str) -> Result<SnapshotParams, ImgError> {
        let mut read = SnapshotParams::default();
        for item in block::spec::split_commas(params) {
            let (key, value) = item.split_once('=').unwrap_or((&item, "on"));
            if !item.contains('=') {
                crate::warn(&format!("short-form boolean option '{key}' deprecated\nPlease use {key}=on instead"));
            }
            match key {
                "snapshot.id" => read.id = Some(value.to_owned()),
                "snapshot.name" => read.name = Some(value.to_owned()),
                other => {
                    let (name, params) = (other.to_owned(), params.to_owned());
                    return Err(ImgError::Plain(Rule::SnapshotParameter { name, params }));
                }
            }
        }
        Ok(read)
    }

    fn fits(&self, snapshot: &Snapshot) -> bool {
        let same = |wanted: &Option<String>, found: &[u8]| wanted.as_ref().is_none_or(|text| text.as_bytes() == found);
        same(&self.id, &snapshot.id) && same(&self.name, &snapshot.name)
    }
}
