//! `convert`: copies images into a new one, of another format if asked.

use std::ffi::OsString;

use block::spec::{FileSpec, ImageSpec};
use block::{CacheMode, CopyOptions, Disk, OpenOptions};

use crate::Command;
use crate::bitmap;
use crate::create::Request;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::optlist::{self, Value};
use crate::ova;
use crate::progress::Progress;
use crate::salvage;
use crate::secret::Secrets;
use crate::stream;

/// `convert`.
pub const COMMAND: Command = Command {
    name: "convert",
    about: "Copy an image to another, with optional format conversion",
    operands: "FILENAME [FILENAME2 [...]] TARGET",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    opt('f', &["source-format"], "FMT", "format of the sources; without it the files are looked at"),
    flag('\0', &["source-image-opts", "image-opts"], "source names are driver=...,file.filename=..."),
    opt(
        'l',
        &["source-snapshot", "snapshot"],
        "SNAPSHOT",
        "copy this internal snapshot: snapshot.name=..., snapshot.id=..., or either",
    ),
    opt('T', &["source-cache"], "CACHE", "cache mode of the sources (writeback)"),
    opt('O', &["target-format", "output-format"], "FMT", "format of the target; raw if not given"),
    flag('\0', &["target-image-opts"], "the target's name is driver=...,file.filename=... (needs -n)"),
    opt('o', &["target-options", "options"], "NAME=VALUE,...", "options of the target; '-o help' lists them"),
    flag('c', &["compress"], "compress the target"),
    opt('t', &["target-cache", "output-cache"], "CACHE", "cache mode of the target (unsafe)"),
    opt('B', &["backing"], "FILE", "the target shows FILE where the source's top image holds nothing"),
    opt('F', &["backing-format"], "FMT", "format of the backing file"),
    flag('n', &["no-create"], "the target exists already"),
    flag('\0', &["target-is-zero"], "the target reads as zeroes everywhere (needs -n)"),
    opt('S', &["sparse-size"], "SIZE", "shortest run of zeroes that becomes a hole (4k); 0: none, all space is taken"),
    flag('\0', &["bitmaps"], "copy persistent bitmaps too"),
    flag('\0', &["skip-broken-bitmaps"], "leave out bitmaps that are not consistent"),
    FORCE_SHARE,
    opt('r', &["rate"], "RATE", "most bytes in a second"),
    opt('m', &["parallel"], "COUNT", "requests at once, 1 to 16 (8)"),
    flag('C', &["copy-range-offloading"], "let the host copy"),
    flag('\0', &["salvage"], "read errors are warnings, and zeroes in the target"),
    flag('W', &["oob-writes"], "let writes overtake each other"),
    OBJECT,
];

/// Smallest run of zeroes looked for in data when `-S` is not given.
const SPARSE_BYTES: u64 = 4096;
/// Largest `-S`.
const SPARSE_MAX_BYTES: u64 = 16 << 20;
/// Memory for L2 tables of a target; each 4 KiB of it map 32 MiB in clusters of 64 KiB.
const TARGET_L2_CACHE_BYTES: u64 = 32 << 10;

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let format = parsed.value("target-format")?;
    let lists = parsed.values("target-options")?;
    if optlist::wants_help(&lists) {
        return crate::create::print_help(format.unwrap_or("raw"), parsed.words.last().is_some());
    }
    check_options(parsed)?;
    let options = copy_options(parsed)?;
    let rate = parsed.value("rate")?.map(|text| ImgError::size(text, "rate limit")).transpose()?;
    let target_cache = open::cache_named("", parsed.value("target-cache")?, CacheMode::Unsafe)?;
    let source_cache = open::cache_named("source ", parsed.value("source-cache")?, CacheMode::Writeback)?;
    let Some((target, sources)) = parsed.words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(ImgError::Plain(Rule::Requires("Must specify image file name")));
    };
    let access = Access { cache: source_cache, ..Access::read(parsed) };
    let sources = open_sources(parsed, sources, access)?;
    if let Some(snapshot) = parsed.value("source-snapshot")? {
        let [only] = sources.as_slice() else {
            return Err(ImgError::Plain(Rule::Requires("No support for concatenating multiple snapshot")));
        };
        open::show_snapshot(only, snapshot)?;
    }
    let total = sources.iter().try_fold(0u64, |sum, disk| sum.checked_add(disk.size_bytes()));
    let total = total.ok_or(ImgError::Plain(Rule::SourcesTooLarge))?;
    if parsed.has("bitmaps") {
        let name = format.unwrap_or("raw");
        if name != "qcow2" && !parsed.has("target-image-opts") {
            return Err(ImgError::Plain(Rule::NoBitmaps(name.to_owned())));
        }
        bitmap::check_copy(&sources, parsed.has("skip-broken-bitmaps"))?;
    }
    if stream::is_stream(target) {
        return to_stream(parsed, &sources, target, total, rate);
    }
    let (target, created) = open_target(parsed, target, format, (sources.len(), total), target_cache)?;
    if total > target.size_bytes() {
        return Err(ImgError::Plain(Rule::TargetTooSmall));
    }
    let options = CopyOptions {
        target_is_zero: (created.is_zero && options.sparse_bytes > 0) || parsed.has("target-is-zero"),
        layers: if created.has_backing { 1 } else { usize::MAX },
        ..options
    };
    let progress = Progress::of(parsed, rate);
    let mut before = 0;
    for source in &sources {
        let options = CopyOptions { target_offset: before, ..options.clone() };
        if parsed.has("salvage") {
            salvage::copy(source, &target, &options, &progress, (before, total))?;
            before += source.size_bytes();
            continue;
        }
        block::copy(source, &target, &options, &|done, _| {
            progress.report(before + done, total);
            true
        })
        .map_err(|source| ImgError::Incomplete { target: created.label.clone(), source })?;
        before += source.size_bytes();
    }
    if let (true, [source]) = (parsed.has("bitmaps"), sources.as_slice()) {
        bitmap::copy(source, &target)?;
    }
    finish(target, created)?;
    progress.end();
    Ok(0)
}

/// Closes a target that has all its data, and the archive around it.
fn finish(target: Disk, created: Target) -> Result<(), ImgError> {
    let Target { label: name, archive, .. } = created;
    target.flush().map_err(|source| ImgError::Incomplete { target: name.clone(), source })?;
    drop(target);
    let finished = archive.map_or(Ok(()), ova::Writer::finish);
    finished.map_err(|source| ImgError::Converting { name, format: "ova".to_owned(), source })
}

/// Options that need or exclude each other, in qemu-img's order.
fn check_options(parsed: &Parsed) -> Result<(), ImgError> {
    let rule = |rule| Err(ImgError::Plain(rule));
    let has = |name| parsed.has(name);
    if has("source-image-opts") && has("source-format") {
        return Err(ImgError::ImageOptsAndFormat);
    }
    if has("target-image-opts") && !has("no-create") {
        return rule(Rule::Requires("--target-image-opts requires use of -n flag"));
    }
    if has("target-image-opts") && has("target-format") {
        return Err(ImgError::ImageOptsAndFormat);
    }
    if has("target-is-zero") && !has("no-create") {
        return rule(Rule::Requires("--target-is-zero requires use of -n flag"));
    }
    if has("skip-broken-bitmaps") && !has("bitmaps") {
        return rule(Rule::Requires("Use of --skip-broken-bitmaps requires --bitmaps"));
    }
    if has("copy-range-offloading") && has("compress") {
        return rule(Rule::Requires("Cannot enable copy offloading when -c is used"));
    }
    if has("copy-range-offloading") && has("sparse-size") {
        return rule(Rule::Requires("Cannot enable copy offloading when -S is used"));
    }
    if has("copy-range-offloading") && has("salvage") {
        return rule(Rule::Requires("Cannot use copy offloading in salvaging mode"));
    }
    if has("no-create") && has("target-options") {
        return rule(Rule::Requires("-o has no effect when skipping image creation"));
    }
    Ok(())
}

fn copy_options(parsed: &Parsed) -> Result<CopyOptions, ImgError> {
    let mut options = CopyOptions {
        workers: default_workers(),
        out_of_order: parsed.has("oob-writes"),
        compressed: parsed.has("compress"),
        sparse_bytes: SPARSE_BYTES,
        offload: parsed.has("copy-range-offloading"),
        ..CopyOptions::default()
    };
    if let Some(text) = parsed.value("parallel")? {
        let count = ImgError::count(text, "number of coroutines", 1..=16)?;
        options.workers = options.workers.min(count as usize);
    }
    if let Some(text) = parsed.value("sparse-size")? {
        let bytes = ImgError::size(text, "buffer size for sparse output")?;
        if bytes % 512 != 0 || bytes > SPARSE_MAX_BYTES {
            return Err(ImgError::Plain(Rule::SparseSize));
        }
        options.sparse_bytes = bytes;
        options.allocate_all = bytes == 0;
    }
    Ok(options)
}

/// One thread for each processor: more would only take turns.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 16)
}

fn open_sources(parsed: &Parsed, names: &[OsString], access: Access) -> Result<Vec<Disk>, ImgError> {
    let format = parsed.value("source-format")?;
    let secrets = Secrets::of(parsed)?;
    let open = |name: &OsString| {
        if !parsed.has("source-image-opts")
            && let Some(archive) = ova::at(name, format)?
        {
            archive.verify()?;
        }
        let named = Named::new(name, parsed.has("source-image-opts"), format)?.with(secrets.clone());
        open::disk(&named, access)
    };
    names.iter().map(open).collect()
}

/// What the target is before the copy.
struct Target {
    label: String,
    /// It reads as zeroes.
    is_zero: bool,
    /// It shows a backing file.
    has_backing: bool,
    /// The archive around it.
    archive: Option<ova::Writer>,
}

/// Makes or finds the target for so many sources, which have so many bytes together.
fn open_target(
    parsed: &Parsed,
    name: &OsString,
    format: Option<&str>,
    (sources, total): (usize, u64),
    cache: CacheMode,
) -> Result<(Disk, Target), ImgError> {
    let label = name.to_string_lossy().into_owned();
    let many =
        Rule::Requires("Having a backing file for the target makes no sense when concatenating multiple input images");
    if parsed.has("no-create") {
        if parsed.has("backing") && sources > 1 {
            return Err(ImgError::Plain(many));
        }
        let image_opts = parsed.has("target-image-opts");
        let format = if image_opts { format } else { Some(format.unwrap_or("raw")) };
        let named = Named::new(name, image_opts, format)?.with(Secrets::of(parsed)?);
        let disk = open::disk(&named, Access::write(cache))?;
        let has_backing = parsed.has("backing");
        return Ok((disk, Target { label, is_zero: false, has_backing, archive: None }));
    }
    let format = format.unwrap_or("raw");
    if format == "ova" {
        return create_archive(parsed, name, total, cache);
    }
    if let Some(found) = open_export(parsed, name, format, cache)? {
        return Ok(found);
    }
    let mut request = Request::unnamed(name, format, &parsed.values("target-options")?, Secrets::of(parsed)?)?;
    request.add_backing(parsed.value("backing")?, parsed.value("backing-format")?)?;
    let has_backing = request.list.has("backing_file");
    if has_backing && sources > 1 {
        return Err(ImgError::Plain(many));
    }
    if has_backing && !request.list.has("backing_fmt") {
        return Err(ImgError::Plain(Rule::ConvertBackingFormat));
    }
    if parsed.has("compress") {
        check_compressible(&request, format)?;
    }
    // Whatever -o says: qemu-img takes the source's too.
    request.set("size", Value::Number(total));
    let converting = |source| ImgError::Converting { name: label.clone(), format: format.to_owned(), source };
    request.make(false).map_err(converting)?;
    let is_file = request.path().is_file();
    // A copy goes from the start to the end: few tables are in use at a time. Where a flush waits for the host, each one
    // that makes room for another would, too.
    let default = OpenOptions::default();
    let l2_cache_bytes = if cache == CacheMode::Unsafe { TARGET_L2_CACHE_BYTES } else { default.l2_cache_bytes };
    let disk = open::disk_with(&request.made(name)?, Access::write(cache), OpenOptions { l2_cache_bytes, ..default })?;
    // What a hole of a LUKS volume decrypts to is no zeroes.
    let is_zero = is_file && !has_backing && format != "luks";
    Ok((disk, Target { label, is_zero, has_backing, archive: None }))
}

/// A new archive with a disk in it.
fn create_archive(parsed: &Parsed, name: &OsString, total: u64, cache: CacheMode) -> Result<(Disk, Target), ImgError> {
    let label = name.to_string_lossy().into_owned();
    if ["target-options", "backing", "bitmaps"].into_iter().any(|option| parsed.has(option)) {
        return Err(ImgError::Plain(Rule::FormatLacks("options, backing files or bitmaps")));
    }
    let spec = ImageSpec::parse(name).map_err(|source| ImgError::Spec { name: label.clone(), source })?;
    let path = spec.plain_path().ok_or_else(|| ImgError::Plain(Rule::CreateThere(label.clone())))?;
    let made = ova::Writer::create(path, total, cache);
    let made = made.map_err(|source| ImgError::Converting { name: label.clone(), format: "ova".to_owned(), source });
    let (disk, writer) = made?;
    Ok((disk, Target { label, is_zero: true, has_backing: false, archive: Some(writer) }))
}

/// An export of an NBD server is there already: a raw image in it needs no making. `None`: it is something else.
fn open_export(
    parsed: &Parsed,
    name: &OsString,
    format: &str,
    cache: CacheMode,
) -> Result<Option<(Disk, Target)>, ImgError> {
    let is_special = ["target-options", "backing", "compress"].into_iter().any(|option| parsed.has(option));
    let is_export = || ImageSpec::parse(name).is_ok_and(|spec| matches!(spec.file, FileSpec::Nbd(_)));
    if format != "raw" || is_special || !is_export() {
        return Ok(None);
    }
    let disk = open::disk(&Named::new(name, false, Some(format))?, Access::write(cache))?;
    let label = name.to_string_lossy().into_owned();
    Ok(Some((disk, Target { label, is_zero: false, has_backing: false, archive: None })))
}

fn check_compressible(request: &Request, format: &str) -> Result<(), ImgError> {
    if format != "qcow2" && format != "vmdk" {
        return Err(ImgError::Plain(Rule::Requires("Compression not supported for this file format")));
    }
    if request.list.text("preallocation").is_some_and(|mode| mode != "off") {
        return Err(ImgError::Plain(Rule::Requires("Compression and preallocation not supported at the same time")));
    }
    if request.list.has("data_file") {
        return Err(ImgError::Plain(Rule::Requires("Compression and an external data file exclude each other")));
    }
    if request.list.has("encrypt.format") {
        return Err(ImgError::Plain(Rule::Requires("Compression and encryption not supported at the same time")));
    }
    Ok(())
}

/// Into a pipe: from the first byte to the last, raw.
fn to_stream(
    parsed: &Parsed,
    sources: &[Disk],
    target: &OsString,
    total: u64,
    rate: Option<u64>,
) -> Result<u8, ImgError> {
    if parsed.value("target-format")?.unwrap_or("raw") != "raw" {
        return Err(ImgError::Plain(Rule::Requires("only a raw image can be written to a pipe")));
    }
    let progress = Progress::of(parsed, rate);
    let mut out = stream::open(target)?;
    let mut before = 0;
    for source in sources {
        stream::copy(source, &mut out, &mut |done| progress.report(before + done, total))?;
        before += source.size_bytes();
    }
    progress.end();
    Ok(0)
}
