//! `info`: what an image says about itself.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block::spec::ImageSpec;
use block::{BitmapInfo, BlockError, CompressionType, Disk, Format, ImageInfo, Snapshot, VmdkInfo, beside, inspect};
use serde_json::{Map, Value, json};

use crate::Command;
use crate::chain::{Found, Walk};
use crate::encryption;
use crate::error::ImgError;
use crate::facts::Facts;
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed, flag};
use crate::io::amount;
use crate::json::write_json;
use crate::layers;
use crate::open::{self, Access, Named};
use crate::output::stdout;
use crate::ova;
use crate::size::human;
use crate::snapshot::table;

/// `info`.
pub const COMMAND: Command =
    Command { name: "info", about: "Display information about an image", operands: "FILENAME", options: OPTIONS, run };

const OPTIONS: &[Opt] = &[
    FORMAT,
    IMAGE_OPTS,
    flag('b', &["backing-chain"], "go on with the backing file, and its backing file"),
    FORCE_SHARE,
    OBJECT,
    OUTPUT,
    JSON,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let json = parsed.json()?;
    if let Some(archive) = ova::of(parsed)? {
        let mut out = stdout();
        match (json, parsed.has("backing-chain")) {
            (true, true) => write_json(&mut out, &json!([archive.to_json()?]))?,
            (true, false) => write_json(&mut out, &archive.to_json()?)?,
            (false, _) => out.write_all(archive.to_text()?.as_bytes())?,
        }
        return Ok(0);
    }
    let named = Named::of(parsed, file, "format")?;
    if named.spec.plain_path().is_none() && !named.is_export() {
        return layered(&named, parsed, json);
    }
    let walk = Walk::new(named, parsed.has("force-share"));
    let images: Vec<Found> = match parsed.has("backing-chain") {
        true => walk.collect::<Result<_, _>>()?,
        false => walk.take(1).collect::<Result<_, _>>()?,
    };
    let mut out = stdout();
    if json {
        let mut values: Vec<Value> = images.iter().map(as_json).collect();
        let value = if parsed.has("backing-chain") { Value::Array(values) } else { values.remove(0) };
        write_json(&mut out, &value)?;
        return Ok(0);
    }
    for (i, found) in images.iter().enumerate() {
        if i > 0 {
            writeln!(out)?;
        }
        out.write_all(as_text(found).as_bytes())?;
    }
    Ok(0)
}

/// An image whose name has layers: what its disk is, and which file is at the bottom.
fn layered(named: &Named, parsed: &Parsed, json: bool) -> Result<u8, ImgError> {
    let disk = open::disk(named, Access::read(parsed))?;
    let format = layers::format_of(named)?;
    let name = ImageSpec { driver: Some(format), ..named.spec.clone() }.to_string();
    let bottom = layers::innermost(&named.spec.file).map(|path| measured("file".to_owned(), path));
    let allocated = disk.counters().allocated_bytes;
    let mut out = stdout();
    if json {
        let children: Vec<Value> = bottom.iter().map(child_json).collect();
        let value = json!({
            "children": children, "virtual-size": disk.size_bytes(), "filename": name, "format": format.name(),
            "actual-size": allocated, "dirty-flag": false,
        });
        let value = if parsed.has("backing-chain") { json!([value]) } else { value };
        write_json(&mut out, &value)?;
        return Ok(0);
    }
    writeln!(out, "image: {name}\nfile format: {format}")?;
    writeln!(out, "virtual size: {} ({} bytes)", human(disk.size_bytes()), disk.size_bytes())?;
    writeln!(out, "disk size: {}", human(allocated))?;
    if let Some(child) = &bottom {
        out.write_all(child_text(child).as_bytes())?;
    }
    Ok(0)
}

/// The file's length as qemu-img counts it, in whole sectors.
fn file_bytes(info: &ImageInfo) -> u64 {
    info.file_bytes.next_multiple_of(512)
}

fn compression(info: &ImageInfo) -> &'static str {
    match info.qcow2.map(|q| q.compression) {
        Some(CompressionType::Zstd) => "zstd",
        _ => "zlib",
    }
}

/// What only the image's format has, and the name of that.
fn specific(info: &ImageInfo, bitmaps: &[BitmapInfo]) -> Option<(&'static str, Facts)> {
    if let Some(vmdk) = &info.vmdk {
        return Some(("vmdk", vmdk_facts(vmdk)));
    }
    if let (Format::Luks, Some(encryption)) = (info.format, &info.encryption) {
        return Some(("luks", encryption::facts(encryption, false)));
    }
    let q = info.qcow2?;
    let new = q.version > 2;
    let mut facts = vec![
        ("compat", Facts::from(if new { "1.1" } else { "0.10" })),
        ("compression-type", Facts::from(compression(info))),
    ];
    if new {
        facts.push(("lazy-refcounts", Facts::from(q.lazy_refcounts)));
    }
    if !bitmaps.is_empty() {
        facts.push(("bitmaps", Facts::List(bitmaps.iter().map(bitmap_facts).collect())));
    }
    facts.push(("refcount-bits", Facts::from(u64::from(q.refcount_bits))));
    if let Some(data) = &info.data_file {
        facts.extend(data.name.as_deref().map(|name| ("data-file", Facts::from(name))));
        facts.push(("data-file-raw", Facts::from(data.raw)));
    }
    if let Some(encryption) = &info.encryption {
        facts.push(("encrypt", encryption::facts(encryption, true)));
    }
    if new {
        facts.push(("corrupt", Facts::from(info.corrupt)));
        facts.push(("extended-l2", Facts::from(q.extended_l2)));
    }
    Some(("qcow2", Facts::Group(facts)))
}

fn vmdk_facts(vmdk: &VmdkInfo) -> Facts {
    let extents = vmdk.extents.iter().map(|extent| {
        let mut facts = Vec::new();
        if extent.compressed {
            facts.push(("compressed", Facts::from(true)));
        }
        facts.push(("virtual-size", Facts::from(extent.size_bytes)));
        let name = extent.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        facts.push(("filename", Facts::from(name.as_str())));
        if extent.cluster_bytes > 0 {
            facts.push(("cluster-size", Facts::from(extent.cluster_bytes)));
        }
        facts.push(("format", Facts::from(extent.kind)));
        Facts::Group(facts)
    });
    Facts::Group(vec![
        ("cid", Facts::from(u64::from(vmdk.cid))),
        ("parent-cid", Facts::from(u64::from(vmdk.parent_cid))),
        ("create-type", Facts::from(vmdk.create_type.as_str())),
        ("extents", Facts::List(extents.collect())),
    ])
}

/// A file that an image is in.
struct Child {
    name: String,
    path: PathBuf,
    protocol: &'static str,
    file_bytes: u64,
    /// Of space on its host a server says nothing.
    allocated_bytes: Option<u64>,
}

fn shown(allocated_bytes: Option<u64>) -> String {
    allocated_bytes.map_or_else(|| "unavailable".to_owned(), human)
}

fn measured(name: String, path: &Path) -> Child {
    let meta = std::fs::metadata(path).ok();
    Child {
        name,
        path: path.to_owned(),
        protocol: "file",
        file_bytes: meta.as_ref().map_or(0, |meta| meta.len().next_multiple_of(512)),
        allocated_bytes: Some(meta.as_ref().map_or(0, |meta| meta.blocks() * 512)),
    }
}

/// The files of an image as QEMU lists them: those beside it that belong to it, the last one first, then its own.
fn children(found: &Found) -> Vec<Child> {
    let own = &found.path;
    let beside = found.info.vmdk.iter().flat_map(|vmdk| &vmdk.extents).filter_map(|extent| extent.path.as_ref());
    let mut all: Vec<Child> = beside
        .filter(|path| *path != own)
        .enumerate()
        .map(|(index, path)| measured(format!("extents.{index}"), path))
        .collect();
    all.reverse();
    let file_bytes = file_bytes(&found.info);
    let file = match found.protocol {
        "file" => Child { file_bytes, ..measured("file".to_owned(), own) },
        protocol => Child { name: "file".to_owned(), path: own.clone(), protocol, file_bytes, allocated_bytes: None },
    };
    all.push(file);
    all
}

fn bitmap_facts(bitmap: &BitmapInfo) -> Facts {
    let flags = [("in-use", bitmap.inconsistent), ("auto", bitmap.enabled)];
    let flags = flags.into_iter().filter(|(_, on)| *on).map(|(name, _)| Facts::from(name)).collect();
    Facts::Group(vec![
        ("flags", Facts::List(flags)),
        ("name", Facts::from(bitmap.name.as_str())),
        ("granularity", Facts::from(bitmap.granularity_bytes)),
    ])
}

/// What `io`'s `info` tells of an open disk.
pub fn of_disk(disk: &Disk, format: Format) -> Result<String, BlockError> {
    let path = disk.path();
    let Some(image) = disk.qcow2() else {
        let cluster = amount(disk.cluster_bytes() as f64);
        let mut said = format!("format name: {}\ncluster size: {cluster}\nvm state offset: 0 bytes\n", format);
        if format == Format::Luks
            && let Some((_, facts)) = specific(&inspect(path, Some(Format::Luks))?, &[])
        {
            said += &format!("Format specific information:\n{}", facts.to_text(1));
        }
        return Ok(said);
    };
    let info = inspect(path, Some(Format::Qcow2))?;
    let bitmaps = image.bitmaps()?;
    let geometry = image.header().geometry;
    let vm_state = geometry.l1_entries().saturating_mul(geometry.l2_reach_bytes());
    let mut said = format!(
        "format name: {}\ncluster size: {}\nvm state offset: {}\n",
        info.format.name(),
        amount(geometry.cluster_bytes() as f64),
        amount(vm_state as f64)
    );
    if let Some((_, facts)) = specific(&info, &bitmaps) {
        said += &format!("Format specific information:\n{}", facts.to_text(1));
    }
    Ok(said)
}

fn as_text(found: &Found) -> String {
    let Found { name, path, info, snapshots, bitmaps, protocol } = found;
    let disk_size = shown((*protocol == "file").then_some(info.allocated_bytes));
    let mut lines = vec![
        format!("image: {name}"),
        format!("file format: {}", info.format.name()),
        format!("virtual size: {} ({} bytes)", human(info.virtual_size_bytes), info.virtual_size_bytes),
        format!("disk size: {disk_size}"),
    ];
    if info.encryption.is_some() {
        lines.push("encrypted: yes".into());
    }
    if info.dirty {
        lines.push("cleanly shut down: no".into());
    }
    if let Some(bytes) = info.cluster_bytes {
        lines.push(format!("cluster_size: {bytes}"));
    }
    if let Some(name) = &info.backing_name {
        let actual = beside(path, name);
        let differs = actual != Path::new(name);
        let actual = if differs { format!(" (actual path: {})", actual.display()) } else { String::new() };
        lines.push(format!("backing file: {name}{actual}"));
        lines.extend(info.backing_format.iter().map(|format| format!("backing file format: {format}")));
    }
    if !snapshots.is_empty() {
        lines.push("Snapshot list:".into());
        lines.push(table(snapshots).trim_end().to_owned());
    }
    if let Some((_, facts)) = specific(info, bitmaps) {
        lines.push("Format specific information:".into());
        lines.push(facts.to_text(1).trim_end().to_owned());
    }
    for child in children(found) {
        lines.push(child_text(&child).trim_end().to_owned());
    }
    lines.join("\n") + "\n"
}

fn as_json(found: &Found) -> Value {
    let Found { name, path, info, snapshots, bitmaps, protocol } = found;
    let mut all = Map::new();
    let children: Vec<Value> = children(found).iter().map(child_json).collect();
    all.insert("children".into(), json!(children));
    all.insert("virtual-size".into(), json!(info.virtual_size_bytes));
    all.insert("filename".into(), json!(name));
    all.insert("format".into(), json!(info.format.name()));
    if *protocol == "file" {
        all.insert("actual-size".into(), json!(info.allocated_bytes));
    }
    if *protocol == "file" || info.format != Format::Raw {
        all.insert("dirty-flag".into(), json!(info.dirty));
    }
    if info.encryption.is_some() {
        all.insert("encrypted".into(), json!(true));
    }
    if let Some(bytes) = info.cluster_bytes {
        all.insert("cluster-size".into(), json!(bytes));
    }
    if !snapshots.is_empty() {
        all.insert("snapshots".into(), snapshots.iter().map(snapshot_json).collect());
    }
    if let Some((kind, facts)) = specific(info, bitmaps) {
        all.insert("format-specific".into(), json!({"type": kind, "data": facts.to_json()}));
    }
    if let Some(backing) = &info.backing_name {
        all.insert("backing-filename".into(), json!(backing));
        all.insert("full-backing-filename".into(), json!(beside(path, backing).display().to_string()));
        all.extend(info.backing_format.iter().map(|f| ("backing-filename-format".to_owned(), json!(f))));
    }
    Value::Object(all)
}

fn child_text(child: &Child) -> String {
    let Child { name, path, protocol, file_bytes, allocated_bytes } = child;
    format!(
        "Child node '/{name}':\n    filename: {}\n    protocol type: {protocol}\n    file length: {} ({file_bytes} bytes)\n    \
         disk size: {}\n",
        path.display(),
        human(*file_bytes),
        shown(*allocated_bytes)
    )
}

fn child_json(child: &Child) -> Value {
    let Child { name, path, protocol, file_bytes, allocated_bytes } = child;
    let path = path.display().to_string();
    let mut info = json!({"children": [], "virtual-size": file_bytes, "filename": path, "format": protocol});
    if let Some(bytes) = allocated_bytes {
        info["actual-size"] = json!(bytes);
        info["format-specific"] = json!({"type": "file", "data": {}});
        info["dirty-flag"] = json!(false);
    }
    json!({"name": name, "info": info})
}

pub fn snapshot_json(snapshot: &Snapshot) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut value = json!({
        "id": text(&snapshot.id), "name": text(&snapshot.name), "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.date_sec, "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000, "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
    });
    if let Some(count) = snapshot.icount {
        value["icount"] = json!(count);
    }
    value
}
