//! `amend`: changes options an image was created with.

use block::{Amend, BlockError, CacheMode, ChainFile, CryptMethod, Format, LayerKey, Preallocation, Qcow2Image};

use crate::Command;
use crate::encryption;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORMAT, IMAGE_OPTS, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::optlist::{self, OptList};
use crate::output::say;
use crate::progress::Progress;

/// `amend`.
pub const COMMAND: Command = Command {
    name: "amend",
    about: "Update format-specific options of an image",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    opt('o', &["options"], "NAME=VALUE,...", "what to change; '-o help' lists it"),
    opt('t', &["cache"], "CACHE", "cache mode of the image (writeback)"),
    flag('\0', &["force"], "allow what can lose access to the data"),
    OBJECT,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let lists = parsed.values("options")?;
    if lists.is_empty() {
        return Err(ImgError::Needed { command: "amend", what: "Must specify options (-o)" });
    }
    if optlist::wants_help(&lists) && parsed.has("format") {
        return print_help(parsed.value("format")?.unwrap_or_default());
    }
    let [file] = parsed.words.as_slice() else {
        return Err(ImgError::Plain(Rule::Requires("Expecting one image file name")));
    };
    let cache = open::cache_named("", parsed.value("cache")?, CacheMode::Writeback)?;
    let named = Named::of(parsed, file, "format")?;
    let top = open::top(&named, Access::write(cache))?;
    let format = top.format;
    if optlist::wants_help(&lists) {
        return print_help(format.name());
    }
    let defs = optlist::amendable(format.name()).ok_or_else(|| not_amended(format.name()))?;
    let list = OptList::parse("", &defs, &lists).map_err(|error| match error {
        ImgError::Parameter { name, .. } if created_only(format, &name) => ImgError::Plain(Rule::CreationOnly(name)),
        other => other,
    })?;
    if format == Format::Luks {
        return amend_luks(parsed, &named, top, &list);
    }
    // A disk that grows must go on showing zeroes where its backing file has bytes, so the whole chain is needed.
    let mut resized = None;
    let image = if list.has("size") {
        drop(top);
        let disk = open::disk(&named, Access::write(cache))?;
        let image = disk.qcow2().ok_or_else(|| not_amended(format.name()))?;
        resized = list.number("size").map(|bytes| (disk, bytes));
        image
    } else {
        open::qcow2(&named, top, false)?
    };
    let wanted = wanted(&list, &image)?;
    let slots = encryption::slot_change(&list, "encrypt.", &named.secrets).map_err(ImgError::Plain)?;
    if slots.is_some() && !matches!(image.header().crypt_method, CryptMethod::Luks(_)) {
        return Err(ImgError::Plain(Rule::Requires("Can't amend encryption options - encryption not present")));
    }
    let progress = Progress::of(parsed, None);
    let failed =
        |source| ImgError::Failed { doing: format!("Error while amending options of '{}'", named.label), source };
    if let Some(change) = slots {
        image.change_key_slots(&named.key()?, &change, parsed.has("force")).map_err(slots_refused)?;
    }
    if let Some((disk, bytes)) = &resized {
        disk.resize(*bytes, true, Preallocation::Off).map_err(failed)?;
    }
    image.amend(&wanted).map_err(failed)?;
    progress.end();
    Ok(0)
}

/// The key slots of a raw volume.
fn amend_luks(parsed: &Parsed, named: &Named, top: ChainFile, list: &OptList) -> Result<u8, ImgError> {
    let change = encryption::slot_change(list, "", &named.secrets);
    let key = named.key()?;
    if !matches!(key, LayerKey::PassphraseOrLegacy(_)) {
        return Err(ImgError::OpenRule { name: named.label.clone(), reason: Rule::KeySecret("key-secret") });
    }
    let Some(change) = change.map_err(ImgError::Plain)? else { return Err(ImgError::Plain(Rule::Missing("state"))) };
    let progress = Progress::of(parsed, None);
    block::change_key_slots(top, &key, &change, parsed.has("force")).map_err(|source| match source {
        BlockError::WrongKey { .. } | BlockError::Luks { .. } => ImgError::Open { name: named.label.clone(), source },
        source => slots_refused(source),
    })?;
    progress.end();
    Ok(0)
}

/// What qemu-img says of key slots that are not changed has no words before it.
fn slots_refused(source: BlockError) -> ImgError {
    ImgError::Plain(Rule::Block(source))
}

fn not_amended(format: &str) -> ImgError {
    ImgError::Plain(Rule::NotAmended(format.to_owned()))
}

fn created_only(format: Format, name: &str) -> bool {
    optlist::names_of(format.name()).is_some_and(|defs| defs.iter().any(|def| def.name == name))
}

fn print_help(format: &str) -> Result<u8, ImgError> {
    let defs = optlist::amendable(format).ok_or_else(|| not_amended(format))?;
    say(optlist::help(&format!("Amend options for '{format}'"), &defs));
    Ok(0)
}

/// What is to change, as far as it can; the rules are qemu-img's.
fn wanted(list: &OptList, image: &Qcow2Image) -> Result<Amend, ImgError> {
    let rule = |rule| Err(ImgError::Plain(rule));
    let header = image.header();
    let version = match list.text("compat") {
        None => None,
        Some("0.10" | "v2") => Some(2),
        Some("1.1" | "v3") => Some(3),
        Some(other) => return rule(Rule::Compat(other.to_owned())),
    };
    let given = (list.text("backing_file"), list.text("backing_fmt"));
    let there = (header.backing_name.as_deref(), header.backing_format.as_deref());
    if given != (None, None) && given != there {
        return rule(Rule::Requires("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."));
    }
    if list.has("data_file") && !header.geometry.data_file {
        return rule(Rule::Requires("data-file can only be set for images that use an external data file"));
    }
    let raw_data = list.switch("data_file_raw");
    if raw_data == Some(true) && !header.is_data_file_raw() {
        return rule(Rule::Requires("data-file-raw cannot be set on existing images"));
    }
    if version == Some(2) && header.geometry.data_file {
        return rule(Rule::Requires("Cannot downgrade an image with a data file"));
    }
    let after = version.unwrap_or(header.geometry.version);
    let bits = list.number("refcount_bits");
    if bits.is_some_and(|bits| !bits.is_power_of_two() || bits > 64) {
        return rule(Rule::RefcountBits);
    }
    if after < 3 && bits.unwrap_or(1 << header.geometry.refcount_order) != 16 {
        return rule(Rule::Requires(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
        ));
    }
    let lazy = list.switch("lazy_refcounts");
    if after < 3 && lazy == Some(true) {
        return rule(Rule::Requires(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ));
    }
    Ok(Amend {
        version,
        lazy_refcounts: lazy,
        refcount_order: bits.map(u64::trailing_zeros),
        data_file: list.text("data_file").map(str::to_owned),
        data_file_not_raw: raw_data == Some(false),
    })
}
