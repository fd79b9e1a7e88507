//! `bitmap`: the persistent bitmaps of an image, which say what has changed since some time.

use block::{BitmapBits, BlockError, CacheMode, Disk, Format, MaintenanceError, Qcow2Image};

use crate::Command;
use crate::error::{ImgError, Rule, why};
use crate::getopt::{FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, flag, opt};
use crate::open::{self, Access, Named};
use crate::secret::Secrets;

/// `bitmap`.
pub const COMMAND: Command = Command {
    name: "bitmap",
    about: "Perform modifications of a persistent bitmap in an image",
    operands: "FILENAME BITMAP",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    FORMAT,
    IMAGE_OPTS,
    flag('\0', &["add"], "create BITMAP, which records changes from then on"),
    opt('g', &["granularity"], "SIZE", "bytes that one bit of it stands for"),
    flag('\0', &["remove"], "remove it"),
    flag('\0', &["clear"], "clear all its bits"),
    flag('\0', &["enable"], "let it record changes"),
    flag('\0', &["disable"], "let it record nothing"),
    opt('\0', &["merge"], "SOURCE", "mark in it what the bitmap SOURCE has marked"),
    opt('b', &["source-file"], "FILE", "the image SOURCE is in, if it is another one"),
    opt('F', &["source-format"], "FMT", "format of that image"),
    OBJECT,
];

const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];
/// Bytes that a bit stands for when nothing is said: the image's clusters, within these limits.
const GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65536;

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let rule = |text| Err(ImgError::Plain(Rule::Requires(text)));
    let actions: Vec<_> = parsed.in_order().filter(|(name, _)| ACTIONS.contains(name)).collect();
    if actions.is_empty() {
        return rule("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    }
    let has = |wanted: &str| actions.iter().any(|(name, _)| *name == wanted);
    if parsed.has("granularity") && !has("add") {
        return rule("granularity only supported with --add");
    }
    if parsed.has("source-file") && !has("merge") {
        return rule("Merge bitmap source file only supported with --merge");
    }
    let [file, bitmap] = parsed.words.as_slice() else {
        return rule("Expecting filename and bitmap name");
    };
    let bitmap = bitmap.to_str().ok_or(ImgError::NotText { option: "add" })?;
    let granularity = parsed.value("granularity")?.map(|text| ImgError::size(text, "granularity")).transpose()?;
    let granularity = granularity.filter(|bytes| *bytes > 0);
    let named = Named::of(parsed, file, "format")?;
    let top = open::top(&named, Access::write(CacheMode::Writeback))?;
    let failed = |action: &'static str, reason: String| {
        ImgError::Plain(Rule::Bitmap { action, bitmap: bitmap.to_owned(), reason })
    };
    if top.format != Format::Qcow2 {
        let action = actions.first().map_or("add", |(name, _)| name);
        return Err(failed(action, format!("the format {} has no persistent bitmaps", top.format)));
    }
    let image = open::qcow2(&named, top, false)?;
    for (action, value) in actions {
        let value = value.to_string_lossy();
        let done = match action {
            "add" => {
                let default = image.header().geometry.cluster_bytes().clamp(*GRANULARITY.start(), *GRANULARITY.end());
                add(&image, bitmap, granularity.unwrap_or(default))
            }
            "remove" => image.remove_bitmap(bitmap).map_err(reason),
            "clear" => image.clear_bitmap(bitmap).map_err(reason),
            "merge" => source_bits(parsed, &image, bitmap, &value)?
                .and_then(|bits| image.merge_bitmap(bitmap, &bits).map_err(reason)),
            other => image.enable_bitmap(bitmap, other == "enable").map_err(reason),
        };
        done.map_err(|reason| failed(action, reason))?;
    }
    Ok(0)
}

fn add(image: &Qcow2Image, name: &str, granularity: u64) -> Result<(), String> {
    if name.is_empty() {
        return Err("Bitmap name cannot be empty".to_owned());
    }
    if !granularity.is_power_of_two() || !(512..=1 << 31).contains(&granularity) {
        return Err("Granularity must be power of 2 and at least 512".to_owned());
    }
    image.add_bitmap(name, granularity, true).map_err(reason)
}

/// What `--merge` reads: of this image, or of the one `-b` names.
fn source_bits(
    parsed: &Parsed,
    image: &Qcow2Image,
    target: &str,
    source: &str,
) -> Result<Result<BitmapBits, String>, ImgError> {
    // The target is looked for first.
    if let Err(missing) = image.bitmap_bits(target) {
        return Ok(Err(reason(missing)));
    }
    let Some(file) = parsed.os_value("source-file") else {
        return Ok(image.bitmap_bits(source).map_err(reason));
    };
    let named = Named::new(file, false, parsed.value("source-format")?)?.with(Secrets::of(parsed)?);
    let access = Access { write: false, share: false, cache: CacheMode::Writeback };
    let top = open::top(&named, access)?;
    if top.format != Format::Qcow2 {
        return Ok(Err(format!("Dirty bitmap '{source}' not found")));
    }
    let other = open::qcow2(&named, top, true)?;
    Ok(other.bitmap_bits(source).map_err(reason))
}

/// A refusal in qemu-img's words.
fn reason(error: BlockError) -> String {
    match &error {
        BlockError::Maintenance { source, .. } => match source {
            MaintenanceError::BitmapNotFound { name } => format!("Dirty bitmap '{name}' not found"),
            MaintenanceError::BitmapExists { name } => format!("Bitmap already exists: {name}"),
            MaintenanceError::BitmapInconsistent { name } => format!(
                "Bitmap '{name}' is inconsistent and cannot be used\nTry block-dirty-bitmap-remove to delete this bitmap \
                 from disk"
            ),
            MaintenanceError::BitmapSizes { have, other, .. } => format!(
                "Bitmaps are of different sizes (destination size is {have}, source size is {other}) and can't be merged"
            ),
            _ => why(&error),
        },
        _ => why(&error),
    }
}

/// Refuses what `convert --bitmaps` cannot copy, before anything is written.
pub fn check_copy(sources: &[Disk], skip_broken: bool) -> Result<(), ImgError> {
    let rule = |text| Err(ImgError::Plain(Rule::Requires(text)));
    let [source] = sources else { return rule("Copying bitmaps only possible with single source") };
    let Some(image) = source.qcow2() else { return rule("Source lacks bitmap support") };
    let all = image.bitmaps().map_err(|source| ImgError::Bitmaps { source })?;
    match all.iter().find(|bitmap| bitmap.inconsistent).filter(|_| !skip_broken) {
        Some(broken) => Err(ImgError::Plain(Rule::BrokenBitmap(broken.name.clone()))),
        None => Ok(()),
    }
}

/// Copies the bitmaps of a disk to another one of the same contents.
pub fn copy(source: &Disk, target: &Disk) -> Result<(), ImgError> {
    let failed = |source| ImgError::Bitmaps { source };
    let (Some(from), Some(to)) = (source.qcow2(), target.qcow2()) else { return Ok(()) };
    for bitmap in from.bitmaps().map_err(failed)? {
        if bitmap.inconsistent {
            crate::warn(&format!("Skipping inconsistent bitmap '{}'", bitmap.name));
            continue;
        }
        let bits = from.bitmap_bits(&bitmap.name).map_err(failed)?;
        to.add_bitmap(&bitmap.name, bitmap.granularity_bytes, bitmap.enabled).map_err(failed)?;
        to.merge_bitmap(&bitmap.name, &bits).map_err(failed)?;
    }
    Ok(())
}

/// Space that the bitmaps of an image take in a new one of the cluster size `cluster`, were all their bits data.
pub fn space(disk: &Disk, cluster: u64) -> Result<u64, ImgError> {
    let Some(image) = disk.qcow2() else { return Ok(0) };
    let (mut all, mut directory) = (0u64, 0u64);
    for bitmap in image.bitmaps().map_err(|source| ImgError::Bitmaps { source })? {
        let bytes = disk.size_bytes().div_ceil(bitmap.granularity_bytes.max(512)).div_ceil(8);
        let clusters = bytes.div_ceil(cluster);
        all += (clusters + (clusters * 8).div_ceil(cluster)) * cluster;
        // qcow2 specification, "Bitmap directory": 24 bytes of fields, the name, padding to 8.
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(all + directory.div_ceil(cluster) * cluster)
}
