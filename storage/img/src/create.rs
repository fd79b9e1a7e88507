//! `vireo-img create`.

use std::path::{Path, PathBuf};

use block::{BlockError, CreateOptions, Format, create_qcow2, create_raw, inspect};

use crate::error::ImgError;
use crate::options::{Known, Parsed, format_named, parse};
use crate::size;

const KNOWN: Known = &[
    (&["-f", "--format"], true),
    (&["-b", "--backing"], true),
    (&["-F", "--backing-format"], true),
    (&["-o", "--options"], true),
    (&["-q", "--quiet"], false),
    (&["-u", "--backing-unsafe"], false),
];

/// What is to be created.
struct Plan {
    format: Format,
    size: Option<u64>,
    options: CreateOptions,
    backing: Option<(String, Option<String>)>,
    /// `compat` as it was given.
    compat: Option<String>,
}

pub fn run(args: Vec<String>) -> Result<u8, ImgError> {
    let parsed = parse("create", KNOWN, args)?;
    let (file, size_word) = match parsed.words.as_slice() {
        [] => return Err(ImgError::OneFile),
        [file] => (file, None),
        [file, size] => (file, Some(size)),
        [_, _, extra, ..] => return Err(ImgError::Extra(extra.clone())),
    };
    let path = Path::new(file);
    let mut plan = plan(&parsed, file)?;
    if let Some(word) = size_word {
        plan.size = Some(size::parse(word)?);
    }
    let unchecked = parsed.has("-u");
    let bytes = settle(&mut plan, path, unchecked)?;
    if !parsed.has("-q") {
        announce(&plan, file, bytes);
    }
    put(path, |new| match plan.format {
        Format::Raw => create_raw(new, bytes),
        Format::Qcow2 => create_qcow2(new, bytes, &plan.options),
    })?;
    Ok(0)
}

fn plan(parsed: &Parsed, file: &str) -> Result<Plan, ImgError> {
    let format = parsed.format(file)?.unwrap_or(Format::Raw);
    let mut plan = Plan { format, size: None, options: CreateOptions::default(), backing: None, compat: None };
    let mut backing = parsed.value("-b").map(str::to_owned);
    let mut backing_format = parsed.value("-F").map(str::to_owned);
    for pair in parsed.values("-o").flat_map(|o| o.split(',')) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, "on"));
        let unknown = || ImgError::Parameter { path: file.into(), name: name.to_owned() };
        match (name, format) {
            ("size", _) => plan.size = Some(size::parse(value)?),
            ("cluster_size", Format::Qcow2) => plan.options.cluster_bits = cluster_bits(value)?,
            ("compat", Format::Qcow2) => {
                plan.options.version = version(value)?;
                plan.compat = Some(value.to_owned());
            }
            ("backing_file", Format::Qcow2) => backing = Some(value.to_owned()),
            ("backing_fmt", Format::Qcow2) => backing_format = Some(value.to_owned()),
            _ => return Err(unknown()),
        }
    }
    plan.backing = backing.map(|name| (name, backing_format));
    Ok(plan)
}

fn cluster_bits(value: &str) -> Result<u32, ImgError> {
    let bytes = size::parse(value)?;
    if bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) {
        return Ok(bytes.trailing_zeros());
    }
    Err(ImgError::Value { option: "cluster_size", found: value.to_owned(), possible: "a power of two from 512 to 2M" })
}

fn version(value: &str) -> Result<u32, ImgError> {
    match value {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        _ => Err(ImgError::Value { option: "compat", found: value.to_owned(), possible: "0.10 or 1.1" }),
    }
}

/// Looks at the backing file and finds the size; the result is in bytes.
fn settle(plan: &mut Plan, path: &Path, unchecked: bool) -> Result<u64, ImgError> {
    if let Some((name, format)) = &plan.backing {
        if plan.format == Format::Raw {
            return Err(ImgError::RawBacking(path.to_owned()));
        }
        let format = format.as_ref().ok_or_else(|| ImgError::NoBackingFormat(path.to_owned()))?;
        let format = format_named(&path.display().to_string(), format)?;
        if !(unchecked && plan.size.is_some()) {
            let at = beside(path, name);
            let info = inspect(&at, Some(format)).map_err(|source| ImgError::Open { path: at.clone(), source })?;
            plan.size = plan.size.or(Some(info.virtual_size_bytes));
        }
        plan.options.backing = Some((PathBuf::from(name), format));
    }
    plan.size.ok_or_else(|| ImgError::NoSize(path.to_owned()))
}

/// A stored name counts from the directory of the image that stores it.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

fn announce(plan: &Plan, file: &str, bytes: u64) {
    if plan.format == Format::Raw {
        return println!("Formatting '{file}', fmt=raw size={bytes}");
    }
    let options = &plan.options;
    let backing = match &options.backing {
        Some((name, format)) => format!(" backing_file={} backing_fmt={}", name.display(), format.name()),
        None => String::new(),
    };
    let compat = plan.compat.as_ref().map(|value| format!(" compat={value}")).unwrap_or_default();
    println!(
        "Formatting '{file}', fmt=qcow2 cluster_size={} extended_l2=off compression_type=zlib size={bytes}{backing}{compat} \
         lazy_refcounts=off refcount_bits=16",
        1u64 << options.cluster_bits,
    );
}

/// An existing image is replaced, as qemu-img does, but only by a complete one: it is made beside and renamed.
fn put(path: &Path, make: impl FnOnce(&Path) -> Result<(), BlockError>) -> Result<(), ImgError> {
    let place = |source| ImgError::Place { path: path.to_owned(), source };
    let Ok(real) = path.canonicalize() else {
        return make(path).map_err(ImgError::Block);
    };
    if !real.is_file() {
        return make(path).map_err(ImgError::Block);
    }
    let mut name = real.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = real.with_file_name(name);
    make(&new).map_err(ImgError::Block)?;
    std::fs::rename(&new, &real).map_err(|source| {
        // What matters is that the old image stands as it was.
        let _ = std::fs::remove_file(&new);
        place(source)
    })
}
