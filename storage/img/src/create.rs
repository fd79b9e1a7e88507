//! `create`: an empty image.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use block::spec::{FileSpec, ImageSpec};
use block::{
    BlockError, CompressionType, FileBackend, Format, HostFile, Preallocation, Qcow2Create, format_qcow2, format_raw,
    inspect, open_for_new,
};

use crate::Command;
use crate::error::{ImgError, MakeError, Rule};
use crate::getopt::{OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::optlist::{self, Def, OptList, Value};
use crate::qcow2_options::Qcow2Options;
use crate::size;

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
        return print_help(format, parsed.words.first().is_some());
    }
    let (file, size_word) = match parsed.words.as_slice() {
        [] => return Err(ImgError::Expecting { command: "create", expected: "image file name" }),
        [file] => (file, None),
        [file, size] => (file, Some(size)),
        [_, _, extra, ..] => {
            return Err(ImgError::Extra { command: "create", found: extra.to_string_lossy().into_owned() });
        }
    };
    let size_word = size_word.map(|word| image_size(&word.to_string_lossy())).transpose()?;
    let mut request = Request::new(file, format, &lists)?;
    request.add_backing(parsed.value("backing")?, parsed.value("backing-format")?)?;
    request.settle_size(size_word, parsed.has("backing-unsafe"))?;
    if !parsed.has("quiet") {
        println!("{}", request.announcement());
    }
    request.make(true).map_err(|source| ImgError::Create { name: request.label.clone(), source })?;
    Ok(0)
}

/// The positional size of `create`.
fn image_size(word: &str) -> Result<u64, ImgError> {
    size::disk_bytes(word).map_err(|error| ImgError::size(error, "image size", word))
}

/// `-o help`.
pub fn print_help(format: &str, with_file: bool) -> Result<u8, ImgError> {
    let defs = optlist::names_of(format).ok_or_else(|| ImgError::Plain(Rule::UnknownFormat(format.to_owned())))?;
    if with_file {
        print!("{}", optlist::help("Supported options", &defs));
        return Ok(0);
    }
    let own: Vec<&Def> = defs.into_iter().filter(|def| !optlist::is_of_file(format, def)).collect();
    print!("{}", optlist::help(&format!("Supported {format} options"), &own));
    println!(
        "\nThe protocol level may support further options.\nSpecify the target filename to include those options."
    );
    Ok(0)
}

/// An image that is to be created: what `create` and `convert` share.
pub struct Request {
    label: String,
    path: PathBuf,
    format: Format,
    defs: Vec<&'static Def>,
    /// Options of the format as given.
    pub list: OptList,
}

impl Request {
    /// Reads the name, the format and the lists of options. Errors begin with the name.
    pub fn new(file: &OsStr, format: &str, lists: &[&str]) -> Result<Request, ImgError> {
        Request::read(file, file.to_string_lossy().into_owned(), format, lists)
    }

    /// The same; errors do not name the file.
    pub fn unnamed(file: &OsStr, format: &str, lists: &[&str]) -> Result<Request, ImgError> {
        Request::read(file, String::new(), format, lists)
    }

    fn read(file: &OsStr, label: String, format: &str, lists: &[&str]) -> Result<Request, ImgError> {
        let rule = |rule| ImgError::Rule { subject: label.clone(), rule };
        let known = optlist::names_of(format).zip(format.parse().ok());
        let (defs, format) = known.ok_or_else(|| rule(Rule::UnknownFormat(format.to_owned())))?;
        let spec =
            ImageSpec::parse(file).map_err(|e| ImgError::Rule { subject: label.clone(), rule: Rule::Name(e) })?;
        let FileSpec::Path(path) = spec.file else {
            return Err(rule(Rule::CreateThere(label.clone())));
        };
        let list = OptList::parse(&label, &defs, lists)?;
        Ok(Request { label, path, format, defs, list })
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
                    "backing_file" => Rule::NoBacking(self.format.name().to_owned()),
                    _ => Rule::NoBackingFormatOption(self.format.name().to_owned()),
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
            let at = beside(&self.path, backing);
            if !unchecked {
                let info = inspect(&at, format).map_err(|source| self.rule(Rule::BackingOpen(source)))?;
                if self.list.text("backing_fmt").is_none() {
                    return Err(self.rule(Rule::NoBackingFormat(info.format.name().to_owned())));
                }
                size = size.or(Some(info.virtual_size_bytes));
            } else if self.list.text("backing_fmt").is_none() {
                return Err(self.rule(Rule::NoBackingFormat("an unknown format".to_owned())));
            }
        }
        let size = size.ok_or_else(|| self.rule(Rule::NoSize))?;
        self.list.put(&self.defs, "size", Value::Number(size));
        Ok(())
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
        match self.format {
            Format::Raw => {
                let mode = match self.list.text("preallocation") {
                    None | Some("off") => Preallocation::Off,
                    Some("falloc") => Preallocation::Falloc,
                    Some("full") => Preallocation::Full,
                    Some(other) => return Err(MakeError::Rule(Rule::Preallocation(other.to_owned()))),
                };
                self.put(durable, |file| format_raw(file, &self.path, size, mode))
            }
            Format::Qcow2 => {
                let options = self.qcow2_options(size).map_err(MakeError::Rule)?;
                self.put(durable, |file| format_qcow2(file, &self.path, size, &options))
            }
        }
    }

    fn qcow2_options(&self, size: u64) -> Result<Qcow2Create, Rule> {
        let options = Qcow2Options::read(&self.list)?;
        if !options.can_map(size) {
            return Err(Rule::TooLarge(self.format.name().to_owned()));
        }
        for (name, given) in [
            ("data_file", self.list.has("data_file")),
            ("encrypt.format", options.luks || self.list.switch("encryption") == Some(true)),
        ] {
            if given {
                return Err(Rule::Option(name.to_owned()));
            }
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
        })
    }

    fn put(&self, durable: bool, format: impl FnOnce(&HostFile) -> Result<(), BlockError>) -> Result<(), MakeError> {
        if self.path.is_dir() {
            return Err(MakeError::Rule(Rule::Directory(self.path.display().to_string())));
        }
        let stands = self.path.exists();
        let file = HostFile::new(open_for_new(&self.path).map_err(MakeError::Block)?).map_err(MakeError::Host)?;
        let mut done = format(&file).map_err(MakeError::Block);
        if durable {
            done = done.and_then(|()| file.sync_data().map_err(MakeError::Host));
        }
        if done.is_err() && !stands {
            // The first error is what matters; a file that cannot be removed is there to be seen.
            let _ = std::fs::remove_file(&self.path);
        }
        done
    }
}

/// A stored name counts from the directory of the image that stores it.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}
