//! `commit`: moves what an image holds into a file below it.

use std::path::{Path, PathBuf};

use block::{CacheMode, ChainFile, CopyOptions, Format, Qcow2Image};

use crate::Command;
use crate::convert::default_workers;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORMAT, IMAGE_OPTS, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::output::say_line;
use block::spec::BackingSpec;

use crate::open::{self, Access, Named};
use crate::progress::Progress;

/// `commit`.
pub const COMMAND: Command = Command {
    name: "commit",
    about: "Commit an image to its backing file",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    opt('t', &["cache"], "CACHE", "cache mode (writeback)"),
    flag('d', &["drop"], "do not empty FILENAME afterwards"),
    opt('b', &["base"], "FILE", "the file of the chain to commit to, instead of the next one (implies -d)"),
    opt('r', &["rate"], "RATE", "most bytes in a second"),
    OBJECT,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let cache = open::cache_named("", parsed.value("cache")?, CacheMode::Writeback)?;
    let rate = parsed.value("rate")?.map(|text| ImgError::size(text, "rate limit"));
    let rate = rate.transpose()?;
    let named = Named::of(parsed, file, "format")?;
    // The lock of a writer on the image, and its chain for reading: the file below is about to be written.
    let top = open::top(&named, Access::write(cache))?;
    open::require_key(&named, &top)?;
    let read = Access { write: false, share: true, cache };
    let chain = open::chain(&named, read)?;
    let base = base_of(&named, &chain, parsed.value("base")?)?;
    let Some(layer) = chain.get(base) else { return Err(ImgError::Plain(Rule::NoBackingFile)) };
    let mut base_named =
        Named { label: layer.path_label.display().to_string(), spec: spec_of(layer), secrets: named.secrets.clone() };
    // The key of that one, and those of what is below it.
    let ids = named.key_ids();
    base_named.spec.key_secret = ids.get(base).copied().flatten().map(str::to_owned);
    base_named.spec.backing = BackingSpec::with_keys(ids.get(base + 1..).unwrap_or_default());
    let source = open::over(&named, chain, read)?;
    let target = open::disk(&base_named, Access::write(cache))?;
    let failed = |source| ImgError::Commit { name: named.label.clone(), source };
    if source.size_bytes() > target.size_bytes() {
        target.resize(source.size_bytes(), false, block::Preallocation::Off).map_err(failed)?;
    }
    let progress = Progress::of(parsed, rate);
    let options = CopyOptions { workers: default_workers(), layers: base, sparse_bytes: 0, ..CopyOptions::default() };
    block::copy(&source, &target, &options, &|done, total| {
        progress.report(done, total);
        true
    })
    .map_err(failed)?;
    // What is taken from the image must be in the other one for good.
    target.flush().map_err(failed)?;
    progress.end();
    drop((source, target));
    if !parsed.has("drop") && !parsed.has("base") {
        // Other formats keep what they hold, as with qemu-img.
        if top.format == Format::Qcow2 {
            empty(top).map_err(failed)?;
        }
    }
    if !parsed.has("quiet") {
        say_line("Image committed.");
    }
    Ok(0)
}

fn empty(top: ChainFile) -> Result<(), block::BlockError> {
    Qcow2Image::open(top, false)?.make_empty()
}

fn spec_of(layer: &ChainFile) -> block::spec::ImageSpec {
    block::spec::ImageSpec::path(layer.path_label.clone(), Some(layer.format))
}

/// How many layers are above the one to commit to.
fn base_of(named: &Named, chain: &[ChainFile], base: Option<&str>) -> Result<usize, ImgError> {
    let Some(name) = base else {
        return if chain.len() > 1 { Ok(1) } else { Err(ImgError::Plain(Rule::NoBackingFile)) };
    };
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| PathBuf::from(path));
    let wanted = real(Path::new(name));
    let found = chain.iter().skip(1).position(|layer| real(&layer.path_label) == wanted);
    let missing = || ImgError::Plain(Rule::NotInChain { base: name.to_owned(), name: named.label.clone() });
    found.map(|index| index + 1).ok_or_else(missing)
}
