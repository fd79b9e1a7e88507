//! `measure`: how large a new image will be.

use std::io::Write;

use block::{Disk, ExtentKind, LuksHeader, Preallocation};
use serde_json::json;

use crate::Command;
use crate::bitmap;
use crate::encryption;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed, opt};
use crate::json::write_json;
use crate::open::{self, Access, Named};
use crate::optlist::{self, OptList};
use crate::output::stdout;
use crate::qcow2_options::Qcow2Options;
use crate::secret::Secrets;

/// `measure`.
pub const COMMAND: Command = Command {
    name: "measure",
    about: "Calculate the file size required for a new image",
    operands: "(--size SIZE | FILENAME)",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    opt('O', &["target-format"], "FMT", "format of the new image; raw if not given"),
    opt('o', &["options"], "NAME=VALUE,...", "options of the new image"),
    opt('s', &["size"], "SIZE", "size of the new disk"),
    FORMAT,
    IMAGE_OPTS,
    opt('l', &["snapshot"], "SNAPSHOT", "measure this internal snapshot of FILENAME"),
    FORCE_SHARE,
    OBJECT,
    OUTPUT,
    JSON,
];

/// The answer, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Measured {
    required: u64,
    fully_allocated: u64,
    /// Bitmaps that `convert --bitmaps` would copy; `None` where there can be none.
    bitmaps: Option<u64>,
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let json = parsed.json()?;
    let format = parsed.value("target-format")?.unwrap_or("raw");
    let size = parsed.value("size")?.map(|text| ImgError::size(text, "image size")).transpose()?;
    if parsed.words.is_empty() && ["image-opts", "format", "snapshot"].iter().any(|name| parsed.has(name)) {
        return Err(ImgError::Plain(Rule::MeasureNeedsFile));
    }
    let defs = optlist::names_of(format).ok_or_else(|| ImgError::Plain(Rule::UnknownFormat(format.to_owned())))?;
    let list = OptList::parse("", &defs, &parsed.values("options")?)
        .map_err(|error| ImgError::OptionsOf { format: format.to_owned(), source: Box::new(error) })?;
    let secrets = Secrets::of(parsed)?;
    let measured = match (parsed.words.as_slice(), size) {
        ([], Some(size)) => measure(format, &list, &secrets, Input::Size(size))?,
        ([file], None) => {
            let named = Named::of(parsed, file, "format")?;
            let disk = open::disk(&named, Access::read(parsed))?;
            if let Some(snapshot) = parsed.value("snapshot")? {
                open::show_snapshot(&disk, snapshot)?;
            }
            measure(format, &list, &secrets, Input::Disk(&disk))?
        }
        ([_, _, ..], _) => return Err(ImgError::Plain(Rule::MeasureOne)),
        ([], None) => return Err(ImgError::Plain(Rule::MeasureWhat)),
        (_, Some(_)) => return Err(ImgError::Plain(Rule::MeasureBoth)),
    };
    let mut out = stdout();
    if json {
        let mut value = json!({"required": measured.required, "fully-allocated": measured.fully_allocated});
        if let Some(bytes) = measured.bitmaps {
            value["bitmaps"] = json!(bytes);
        }
        write_json(&mut out, &value)?;
        return Ok(0);
    }
    writeln!(out, "required size: {}\nfully allocated size: {}", measured.required, measured.fully_allocated)?;
    if let Some(bytes) = measured.bitmaps {
        writeln!(out, "bitmaps size: {bytes}")?;
    }
    Ok(0)
}

/// What is measured.
enum Input<'a> {
    /// An empty disk.
    Size(u64),
    /// What this disk holds.
    Disk(&'a Disk),
}

fn measure(format: &str, list: &OptList, secrets: &Secrets, input: Input<'_>) -> Result<Measured, ImgError> {
    let bytes = match &input {
        Input::Size(size) => size.checked_next_multiple_of(512).unwrap_or(u64::MAX),
        Input::Disk(disk) => disk.size_bytes(),
    };
    match format {
        "raw" => Ok(Measured { required: bytes, fully_allocated: bytes, bitmaps: None }),
        "luks" => {
            let luks = encryption::of_luks(list, secrets).map_err(ImgError::Plain)?;
            let all = bytes.saturating_add(LuksHeader::new_bytes(&luks.cipher));
            Ok(Measured { required: all, fully_allocated: all, bitmaps: None })
        }
        "qcow2" => measure_qcow2(&Qcow2Options::read(list).map_err(ImgError::Plain)?, list, secrets, input, bytes),
        other => Err(ImgError::Plain(Rule::NotMeasured(other.to_owned()))),
    }
}

fn measure_qcow2(
    options: &Qcow2Options,
    list: &OptList,
    secrets: &Secrets,
    input: Input<'_>,
    bytes: u64,
) -> Result<Measured, ImgError> {
    let cluster = options.cluster_bytes;
    if !options.can_map(bytes) {
        return Err(ImgError::Plain(Rule::MeasureTooLarge));
    }
    let disk_bytes = bytes.div_ceil(cluster) * cluster;
    // With a backing file every cluster may differ from it; and what is preallocated is there.
    let all = list.has("backing_file") || matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    let data_bytes = match (&input, all) {
        (Input::Disk(_), true) => disk_bytes,
        (Input::Size(_), true) if !list.has("backing_file") => disk_bytes,
        (Input::Size(_), _) => 0,
        (Input::Disk(disk), false) => data_bytes(disk, cluster)?,
    };
    let header = match encryption::of_qcow2(list, secrets).map_err(ImgError::Plain)? {
        Some(luks) => LuksHeader::new_bytes(&luks.cipher).div_ceil(cluster) * cluster,
        None => 0,
    };
    let fully_allocated = options.full_bytes(disk_bytes) + header;
    let bitmaps = match input {
        Input::Disk(disk) if options.version >= 3 && disk.qcow2().is_some() => Some(bitmap::space(disk, cluster)?),
        _ => None,
    };
    Ok(Measured { required: fully_allocated - disk_bytes + data_bytes, fully_allocated, bitmaps })
}

/// Bytes of the clusters that hold data.
fn data_bytes(disk: &Disk, cluster: u64) -> Result<u64, ImgError> {
    let mut found = 0;
    let mut at = 0;
    while at < disk.size_bytes() {
        let run = disk.extent(at, disk.size_bytes() - at).map_err(|source| ImgError::BlockStatus { source })?.extent;
        let mut end = at + run.bytes;
        if run.kind == ExtentKind::Data {
            // The rest of the last cluster comes with it.
            end = end.div_ceil(cluster) * cluster;
            found += at % cluster + (end - at);
        }
        at = end;
    }
    Ok(found)
}
