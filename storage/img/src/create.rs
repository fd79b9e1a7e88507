//! `create`: an empty image.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use block::spec::{FileSpec, ImageSpec, SpecError, has_protocol};
use block::{
    AdapterType, BlockError, CacheMode, CompressionType, DataFile, FileBackend, Format, HostFile, Preallocation,
    Qcow2Create, Subformat, VDI_BYTES_MAX, VdiOptions, VhdxOptions, VmdkOptions, VpcOptions, beside, create_luks,
    create_vdi, create_vhdx, create_vmdk, create_vmdk_extent, create_vpc, format_data_file, format_qcow2, format_raw,
    inspect, open_for_new, vmdk_extents,
};

use crate::Command;
use crate::encryption;
use crate::error::{ImgError, MakeError, Rule};
use crate::getopt::{OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::optlist::{self, Def, OptList, Value};
use crate::output::{say, say_line};
use crate::qcow2_options::Qcow2Options;
use crate::secret::Secrets;

/// `create`.
pub const COMMAND: Command = Command {
    name: "create",
    about: "Create and format a new image file",
    operands: "FILENAME [SIZE]",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    opt('f', &["format"], "FMT", "format of the new image; raw if not given"),
    opt('o', &["options"], "NAME=VALUE,...", "options of the format; '-o help' lists them"),
    opt('b', &["backing"], "FILE", "the new image shows FILE where nothing is written to it"),
    opt('F', &["backing-format"], "FMT", "format of the backing file"),
    flag('u', &["backing-unsafe"], "do not look at the backing file"),
    OBJECT,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let format = parsed.value("format")?.unwrap_or("raw");
    let lists = parsed.values("options")?;
    if optlist::wants_help(&lists) {
        return print_help(format, !parsed.words.is_empty());
    }
    let (file, size_word) = match parsed.words.as_slice() {
        [] => return Err(ImgError::Expecting { command: "create", expected: "image file name" }),
        [file] => (file, None),
        [file, size] => (file, Some(size)),
        [_, _, extra, ..] => {
            return Err(ImgError::Extra { command: "create", found: extra.to_string_lossy().into_owned() });
        }
    };
    let size_word = size_word.map(|word| ImgError::size(&word.to_string_lossy(), "image size")).transpose()?;
    let mut request = Request::new(file, format, &lists, Secrets::of(parsed)?)?;
    request.add_backing(parsed.value("backing")?, parsed.value("backing-format")?)?;
    request.settle_size(size_word, parsed.has("backing-unsafe"))?;
    if !parsed.has("quiet") {
        say_line(request.announcement());
    }
    request.make(true).map_err(|source| ImgError::Create { name: request.label.clone(), source })?;
    Ok(0)
}

/// `-o help`.
pub fn print_help(format: &str, with_file: bool) -> Result<u8, ImgError> {
    let defs = optlist::names_of(format).ok_or_else(|| ImgError::Plain(Rule::UnknownFormat(format.to_owned())))?;
    if with_file {
        say(optlist::help("Supported options", &defs));
        return Ok(0);
    }
    let own: Vec<&Def> = defs.into_iter().filter(|def| !optlist::is_of_file(format, def)).collect();
    say(optlist::help(&format!("Supported {format} options"), &own));
    say_line(
        "\nThe protocol level may support further options.\nSpecify the target filename to include those options.",
    );
    Ok(0)
}

/// An image that is to be created: what `create` and `convert` share.
pub struct Request {
    label: String,
    path: PathBuf,
    format: &'static str,
    defs: Vec<&'static Def>,
    /// Options of the format as given.
    pub list: OptList,
    secrets: Secrets,
}

impl Request {
    /// Reads the name, the format and the lists of options. Errors begin with the name.
    pub fn new(file: &OsStr, format: &str, lists: &[&str], secrets: Secrets) -> Result<Request, ImgError> {
        Request::read(file, file.to_string_lossy().into_owned(), format, lists, secrets)
    }

    /// The same; errors do not name the file.
    pub fn unnamed(file: &OsStr, format: &str, lists: &[&str], secrets: Secrets) -> Result<Request, ImgError> {
        Request::read(file, String::new(), format, lists, secrets)
    }

    fn read(file: &OsStr, label: String, format: &str, lists: &[&str], secrets: Secrets) -> Result<Request, ImgError> {
        let rule = |rule| ImgError::Rule { subject: label.clone(), rule };
        let format = optlist::known(format).ok_or_else(|| rule(Rule::UnknownFormat(format.to_owned())))?;
        let defs = optlist::names_of(format).unwrap_or_default();
        if crate::program() == "qemu-img" && file.as_encoded_bytes().starts_with(b"json:") {
            // qemu-img reads such names only of images that are there.
            return Err(rule(Rule::Name(SpecError::Protocol("json".to_owned()))));
        }
        let spec =
            ImageSpec::parse(file).map_err(|e| ImgError::Rule { subject: label.clone(), rule: Rule::Name(e) })?;
        let FileSpec::Path(path) = spec.file else {
            return Err(rule(Rule::CreateThere(label.clone())));
        };
        let list = OptList::parse(&label, &defs, lists)?;
        Ok(Request { label, path, format, defs, list, secrets })
    }

    fn rule(&self, rule: Rule) -> ImgError {
        ImgError::Rule { subject: self.label.clone(), rule }
    }

    /// Adds what `-b` and `-F` say; they win over the lists.
    pub fn add_backing(&mut self, file: Option<&str>, format: Option<&str>) -> Result<(), ImgError> {
        for (name, value) in [("backing_file", file), ("backing_fmt", format)] {
            let Some(value) = value else { continue };
            if !self.list.put(&self.defs, name, Value::Text(value.to_owned())) {
                return Err(self.rule(match name {
                    "backing_file" => Rule::NoBacking(self.format.to_owned()),
                    _ => Rule::NoBackingFormatOption(self.format.to_owned()),
                }));
            }
        }
        let Some(backing) = self.list.text("backing_file") else { return Ok(()) };
        if backing.is_empty() {
            return Err(self.rule(Rule::EmptyBacking));
        }
        if Path::new(backing) == self.path {
            return Err(self.rule(Rule::OwnBacking));
        }
        Ok(())
    }

    /// Finds the size: the word behind the file name, the option, or the backing file's.
    pub fn settle_size(&mut self, word: Option<u64>, unchecked: bool) -> Result<(), ImgError> {
        if word.is_some() && self.list.has("size") {
            return Err(self.rule(Rule::SizeTwice));
        }
        let mut size = word.or(self.list.number("size"));
        if let Some(backing) = self.list.text("backing_file") {
            let format = self.backing_format()?;
            if !unchecked {
                let (found, bytes) = self.look_at_backing(backing, format)?;
                if self.list.text("backing_fmt").is_none() {
                    return Err(self.rule(Rule::NoBackingFormat(found)));
                }
                size = size.or(Some(bytes));
            } else if self.list.text("backing_fmt").is_none() {
                return Err(self.rule(Rule::NoBackingFormat("an unknown format".to_owned())));
            }
        }
        let size = size.ok_or_else(|| self.rule(Rule::NoSize))?;
        self.list.put(&self.defs, "size", Value::Number(size));
        Ok(())
    }

    /// Name of the backing file's format, and size of its disk in bytes.
    fn look_at_backing(&self, name: &str, format: Option<Format>) -> Result<(String, u64), ImgError> {
        if !has_protocol(name) {
            let info = inspect(&beside(&self.path, name), format);
            let info = info.map_err(|source| self.rule(Rule::BackingOpen(source)))?;
            return Ok((info.format.name().to_owned(), info.virtual_size_bytes));
        }
        // The caller names it here and now, so it may be more than a file beside the image.
        let named = Named::new(OsStr::new(name), false, format.map(Format::name))?.with(self.secrets.clone());
        let access = Access { write: false, share: false, cache: CacheMode::Writeback };
        let disk = open::disk(&named, access)?;
        Ok((format.unwrap_or(Format::Raw).name().to_owned(), disk.size_bytes()))
    }

    fn backing_format(&self) -> Result<Option<Format>, ImgError> {
        let Some(name) = self.list.text("backing_fmt") else { return Ok(None) };
        name.parse().map(Some).map_err(|_| self.rule(Rule::BackingDriver(name.to_owned())))
    }

    /// The line that tells what is about to be created.
    pub fn announcement(&self) -> String {
        format!("Formatting '{}', fmt={} {}", self.label, self.format, self.list.echo(&self.defs))
    }

    /// Where the image will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image that was made, under the name that the command line has for it, with its key.
    pub fn made(&self, name: &OsStr) -> Result<Named, ImgError> {
        let mut named = Named::new(name, false, Some(self.format))?.with(self.secrets.clone());
        let key = if self.format == "luks" { "key-secret" } else { "encrypt.key-secret" };
        named.spec.key_secret = self.list.text(key).map(str::to_owned);
        Ok(named)
    }

    /// Sets an option.
    pub fn set(&mut self, name: &str, value: Value) {
        self.list.put(&self.defs, name, value);
    }

    /// Creates the image. The contents of a file that is there are lost once nothing but the host can fail. With
    /// `durable` it is on stable storage when this returns.
    pub fn make(&self, durable: bool) -> Result<(), MakeError> {
        let size = self.list.number("size").unwrap_or(0);
        if size > i64::MAX as u64 - 511 {
            return Err(MakeError::Rule(Rule::Negative));
        }
        let path = &self.path;
        match self.format {
            "raw" => {
                let room = self.room()?;
                self.put(durable, |file| format_raw(file, path, size, room))
            }
            "qcow2" => {
                let options = self.qcow2_options(size).map_err(MakeError::Rule)?;
                let _data = self.put_data_file(durable, size, &options)?;
                self.put(durable, |file| format_qcow2(file, path, size, &options))
            }
            "luks" => {
                let luks = encryption::of_luks(&self.list, &self.secrets).map_err(MakeError::Rule)?;
                let room = match self.list.text("preallocation") {
                    Some("metadata") => Preallocation::Metadata,
                    _ => self.room()?,
                };
                self.put(durable, |file| create_luks(file, path, size, &luks, room))
            }
            "vdi" => {
                self.no_room()?;
                let sectors = size.next_multiple_of(512);
                if sectors > VDI_BYTES_MAX {
                    return Err(MakeError::Rule(Rule::VdiSize { size: sectors, max: VDI_BYTES_MAX }));
                }
                let options = VdiOptions { is_static: self.list.switch("static").unwrap_or(false) };
                self.put(durable, |file| create_vdi(file, path, size, &options))
            }
            "vpc" => {
                self.no_room()?;
                let options =
                    VpcOptions { fixed: self.is_fixed()?, force_size: self.list.switch("force_size").unwrap_or(false) };
                self.put(durable, |file| create_vpc(file, path, size, &options))
            }
            "vhdx" => {
                self.no_room()?;
                let list = &self.list;
                let options = VhdxOptions {
                    fixed: self.is_fixed()?,
                    block_bytes: list.number("block_size").unwrap_or(0),
                    log_bytes: log_bytes(list.number("log_size"))?,
                    block_state_zero: list.switch("block_state_zero").unwrap_or(true),
                };
                self.put(durable, |file| create_vhdx(file, path, size, &options))
            }
            "vmdk" => {
                let options = self.vmdk_options().map_err(MakeError::Rule)?;
                let room = self.room()?;
                for extent in vmdk_extents(path, size, &options).map_err(MakeError::Block)? {
                    let beside = beside(path, &extent.name);
                    put(&beside, durable, |file| create_vmdk_extent(file, &beside, &extent, &options, room))?;
                }
                self.put(durable, |file| create_vmdk(file, path, size, &options))
            }
            other => Err(MakeError::Rule(Rule::NotCreated(other.to_owned()))),
        }
    }

    /// How a file takes its space.
    fn room(&self) -> Result<Preallocation, MakeError> {
        match self.list.text("preallocation") {
            None | Some("off") => Ok(Preallocation::Off),
            Some("falloc") => Ok(Preallocation::Falloc),
            Some("full") => Ok(Preallocation::Full),
            Some(other) => Err(MakeError::Rule(Rule::Preallocation(other.to_owned()))),
        }
    }

    /// For formats that take their space by options of their own.
    fn no_room(&self) -> Result<(), MakeError> {
        match self.room()? {
            Preallocation::Off => Ok(()),
            _ => Err(MakeError::Rule(Rule::Option("preallocation".to_owned()))),
        }
    }

    fn is_fixed(&self) -> Result<bool, MakeError> {
        match self.list.text("subformat") {
            None | Some("dynamic") => Ok(false),
            Some("fixed") => Ok(true),
            Some(other) => Err(MakeError::Rule(Rule::Value { name: "subformat", found: other.to_owned() })),
        }
    }

    fn vmdk_options(&self) -> Result<VmdkOptions, Rule> {
        let list = &self.list;
        let subformat = match list.text("subformat") {
            None | Some("monolithicSparse") => Subformat::MonolithicSparse,
            Some("streamOptimized") => Subformat::StreamOptimized,
            Some("monolithicFlat") => Subformat::MonolithicFlat,
            Some("twoGbMaxExtentSparse") => Subformat::TwoGbMaxExtentSparse,
            Some("twoGbMaxExtentFlat") => Subformat::TwoGbMaxExtentFlat,
            Some(other) => return Err(Rule::EnumValue(other.to_owned())),
        };
        let adapter_type = match list.text("adapter_type") {
            None | Some("ide") => AdapterType::Ide,
            Some("lsilogic") => AdapterType::LsiLogic,
            Some("buslogic") => AdapterType::BusLogic,
            Some("legacyESX") => AdapterType::LegacyEsx,
            Some(other) => return Err(Rule::EnumValue(other.to_owned())),
        };
        let compat6 = list.switch("compat6").unwrap_or(false);
        let hw_version = list.text("hwversion").filter(|version| *version != "undefined").map(str::to_owned);
        if compat6 && hw_version.is_some() {
            return Err(Rule::Requires("compat6 cannot be enabled with hwversion set"));
        }
        let zeroed_grain = list.switch("zeroed_grain").unwrap_or(false);
        if subformat.is_flat() && list.has("backing_file") {
            return Err(Rule::Requires("Flat image can't have backing file"));
        }
        if subformat.is_flat() && zeroed_grain {
            return Err(Rule::Requires("Flat image can't enable zeroed grain"));
        }
        if list.has("backing_file") {
            return Err(Rule::Option("backing_file of a vmdk".to_owned()));
        }
        Ok(VmdkOptions {
            subformat,
            adapter_type,
            hw_version,
            tools_version: list.text("toolsversion").map(str::to_owned),
            compat6,
            zeroed_grain,
            backing: None,
        })
    }

    fn qcow2_options(&self, size: u64) -> Result<Qcow2Create, Rule> {
        let options = Qcow2Options::read(&self.list)?;
        if !options.can_map(size) {
            return Err(Rule::TooLarge(self.format.to_owned()));
        }
        let data_file = self.list.text("data_file").filter(|name| !name.is_empty());
        if let Some(name) = data_file.filter(|name| has_protocol(name)) {
            return Err(Rule::CreateThere(name.to_owned()));
        }
        let raw = self.list.switch("data_file_raw") == Some(true);
        let data_file = data_file.map(|name| DataFile { name: name.to_owned(), raw });
        let encryption = encryption::of_qcow2(&self.list, &self.secrets)?;
        if data_file.is_some() && encryption.is_some() {
            return Err(Rule::Option("data_file with encrypt.format".to_owned()));
        }
        let backing = self
            .list
            .text("backing_file")
            .map(|name| (name.to_owned(), self.list.text("backing_fmt").unwrap_or_default().to_owned()));
        Ok(Qcow2Create {
            cluster_bits: options.cluster_bytes.trailing_zeros(),
            version: options.version,
            refcount_order: options.refcount_bits.trailing_zeros(),
            backing,
            compression: if options.zstd { CompressionType::Zstd } else { CompressionType::Zlib },
            lazy_refcounts: options.lazy_refcounts,
            extended_l2: options.extended_l2,
            preallocation: options.preallocation,
            data_file,
            encryption,
        })
    }

    /// Creates the external data file where its name says, as QEMU does: a relative one counts from where the tool runs.
    /// It stays open, so that the image cannot take its place.
    fn put_data_file(&self, durable: bool, size: u64, options: &Qcow2Create) -> Result<Option<HostFile>, MakeError> {
        let Some(data) = &options.data_file else { return Ok(None) };
        let path = PathBuf::from(&data.name);
        let file = HostFile::new(open_for_new(&path).map_err(MakeError::Block)?).map_err(MakeError::Host)?;
        format_data_file(&file, &path, size, options).map_err(MakeError::Block)?;
        if durable {
            file.sync_data().map_err(MakeError::Host)?;
        }
        Ok(Some(file))
    }

    fn put(&self, durable: bool, format: impl FnOnce(&HostFile) -> Result<(), BlockError>) -> Result<(), MakeError> {
        put(&self.path, durable, format)
    }
}

/// The log of a VHDX: whole MiB, rounded up.
fn log_bytes(given: Option<u64>) -> Result<u64, MakeError> {
    let bytes = given.unwrap_or(1 << 20).checked_next_multiple_of(1 << 20).unwrap_or(u64::MAX);
    match bytes {
        0 => Err(MakeError::Rule(Rule::Requires("Log size must be a multiple of 1 MB"))),
        bytes if bytes > u64::from(u32::MAX) => {
            Err(MakeError::Rule(Rule::Requires("Log size must be smaller than 4 GB")))
        }
        bytes => Ok(bytes),
    }
}

/// Makes a file, or has `format` empty and fill the one that stands there.
fn put(path: &Path, durable: bool, format: impl FnOnce(&HostFile) -> Result<(), BlockError>) -> Result<(), MakeError> {
    if path.is_dir() {
        return Err(MakeError::Rule(Rule::Directory(path.display().to_string())));
    }
    let stands = path.exists();
    let file = HostFile::new(open_for_new(path).map_err(MakeError::Block)?).map_err(MakeError::Host)?;
    let mut done = format(&file).map_err(MakeError::Block);
    if durable {
        done = done.and_then(|()| file.sync_data().map_err(MakeError::Host));
    }
    if done.is_err() && !stands {
        // The first error is what matters; a file that cannot be removed is there to be seen.
        let _ = std::fs::remove_file(path);
    }
    done
}
