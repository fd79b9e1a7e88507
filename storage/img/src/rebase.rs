//! `rebase`: another backing file.

use block::{CacheMode, Format, Qcow2Image};

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named, format_named};

/// `rebase`.
pub const COMMAND: Command = Command {
    name: "rebase",
    about: "Change the backing file of an image",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    opt('t', &["cache"], "CACHE", "cache mode of FILENAME (writeback)"),
    opt('b', &["backing"], "FILE|\"\"", "the new backing file; \"\" for none"),
    opt('F', &["backing-format"], "FMT", "format of the new backing file"),
    opt('T', &["backing-cache"], "CACHE", "cache mode of the backing files (writeback)"),
    flag('u', &["backing-unsafe"], "change the name only: the new file must hold what the old one held"),
    flag('c', &["compress"], "store compressed what is copied into the image"),
    FORCE_SHARE,
    OBJECT,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let backing = parsed.value("backing")?;
    let unsafe_mode = parsed.has("backing-unsafe");
    if backing.is_none() && !unsafe_mode {
        return Err(ImgError::Needed {
            command: "rebase",
            what: "Must specify backing file (-b) or use unsafe mode (-u)",
        });
    }
    let cache = open::cache_named("destination ", parsed.value("cache")?, CacheMode::Writeback)?;
    open::cache_named("source ", parsed.value("backing-cache")?, CacheMode::Writeback)?;
    let named = Named::of(parsed, file, "format")?;
    if !unsafe_mode {
        return Err(ImgError::NotSupported("rebase without -u"));
    }
    let access = Access { share: parsed.has("force-share"), ..Access::write(cache) };
    let top = open::top(&named, access)?;
    let name = backing.unwrap_or_default();
    let refused = |reason| ImgError::Plain(Rule::Backing { name: name.to_owned(), reason });
    if top.format != Format::Qcow2 {
        return Err(refused("Operation not supported"));
    }
    let format = parsed.value("backing-format")?;
    if let Some(format) = format {
        format_named(&named.label, format)?;
    }
    if !name.is_empty() && format.is_none() {
        return Err(refused("backing format must be specified"));
    }
    let image = Qcow2Image::open(top, false).map_err(|source| ImgError::Open { name: named.label.clone(), source })?;
    let new = (!name.is_empty()).then_some(name);
    image.set_backing(new, new.and(format)).map_err(|source| ImgError::Failed {
        doing: format!("Could not change the backing file to '{name}'"),
        source,
    })?;
    Ok(0)
}
