//! The formats of other vendors against qemu-img, in both directions, and against images that lie.

#[path = "../../tests/support/rng.rs"]
mod rng;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use image::vmdk::layout::Subformat;

use crate::error::BlockError;
use crate::foreign::{ForeignImage, ForeignReport, open_foreign};
use crate::host_file::HostFile;
use crate::node::{ExtentKind, Node};
use crate::sys::{ReadBufs, WriteBufs};
use crate::vdi::{VdiOptions, create_vdi};
use crate::vhdx::{VhdxOptions, create_vhdx};
use crate::vmdk::{VmdkOptions, create_vmdk};
use crate::vpc::{VpcOptions, create_vpc};
pub(crate) use rng::Rng;

/// Text-like, random and empty stretches.
pub(crate) fn source(bytes: usize) -> Vec<u8> {
    let mut rng = Rng(42);
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        let run = 512 * (1 + rng.below(900)) as usize;
        match rng.below(4) {
            0 | 1 => out.resize(out.len() + run, 0),
            2 => out.extend((0..run).map(|i| b"the quick brown fox "[i % 20])),
            _ => out.extend((0..run / 8).flat_map(|_| rng.next().to_le_bytes())),
        }
    }
    out.truncate(bytes);
    out
}

/// Runs qemu-img and returns whether it succeeded, and its output.
pub(crate) fn qemu_img_status(args: &[&str]) -> (i32, String) {
    let run = Command::new("qemu-img").args(args).output();
    let run = run.unwrap_or_else(|e| panic!("qemu-img does not run ({e}): install the Debian package qemu-utils"));
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    (run.status.code().unwrap_or(-1), text)
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    let (status, text) = qemu_img_status(args);
    assert_eq!(status, 0, "qemu-img {}: {text}", args.join(" "));
    text
}

pub(crate) fn host_file(path: &Path, writable: bool) -> Arc<HostFile> {
    let file = File::options().read(true).write(writable).create(writable).truncate(false).open(path).unwrap();
    Arc::new(HostFile::new(file).unwrap())
}

/// An image with its extent files, which are in its directory.
pub(crate) fn image_at(format: &str, path: &Path, read_only: bool) -> Result<ForeignImage, BlockError> {
    let format = format.parse::<image::Format>().unwrap();
    let mut image = ForeignImage::new(host_file(path, !read_only), path, format);
    for name in image.extent_names()? {
        let path = path.with_file_name(name);
        image.extents.push((host_file(&path, !read_only), path));
    }
    Ok(image)
}

/// Opens an image. Nothing here crashes the host, so nothing waits for stable storage.
pub(crate) fn open(format: &str, path: &Path, read_only: bool) -> Result<Arc<dyn Node>, BlockError> {
    open_foreign(image_at(format, path, read_only)?, read_only, true)
}

/// Creates an empty image as our tool does it, from options in qemu-img's words.
pub(crate) fn create(format: &str, options: &str, path: &Path, size_bytes: u64) {
    let file = host_file(path, true);
    match format {
        "vdi" => create_vdi(&*file, path, size_bytes, &VdiOptions { is_static: options == "static=on" }),
        "vpc" => {
            let fixed = options.contains("subformat=fixed");
            create_vpc(&*file, path, size_bytes, &VpcOptions { fixed, force_size: options.contains("force_size") })
        }
        "vhdx" => {
            let fixed = options.contains("subformat=fixed");
            let block_bytes = if options.contains("block_size=1M") { 1 << 20 } else { 0 };
            let block_state_zero = !options.contains("block_state_zero=off");
            let options = VhdxOptions { fixed, block_bytes, block_state_zero, ..VhdxOptions::default() };
            create_vhdx(&*file, path, size_bytes, &options)
        }
        "vmdk" => {
            let zeroed_grain = options == "zeroed_grain=on";
            let subformat = if options.contains("streamOptimized") {
                Subformat::StreamOptimized
            } else {
                Subformat::MonolithicSparse
            };
            let options = VmdkOptions { zeroed_grain, subformat, ..VmdkOptions::default() };
            create_vmdk(&*file, path, size_bytes, &options)
        }
        other => panic!("{other}"),
    }
    .unwrap();
}

pub(crate) fn read_all(node: &dyn Node) -> Result<Vec<u8>, BlockError> {
    let mut out = vec![0xa5; node.size_bytes() as usize];
    for (i, part) in out.chunks_mut(700 << 10).enumerate() {
        node.read(&[], (i * (700 << 10)) as u64, &ReadBufs::from_slice(part))?;
    }
    Ok(out)
}

pub(crate) fn write(node: &dyn Node, offset: usize, bytes: &[u8]) {
    node.write(&[], offset as u64, &WriteBufs::from_slice(bytes)).unwrap();
}

/// The extents cover the disk, and zeroes are zeroes.
pub(crate) fn check_extents(node: &dyn Node, contents: &[u8]) {
    let mut at = 0;
    while at < node.size_bytes() {
        let extent = node.extent(at, node.size_bytes() - at).unwrap();
        let end = at + extent.bytes;
        assert!(extent.bytes > 0 && end <= node.size_bytes());
        if extent.kind != ExtentKind::Data {
            assert!(contents[at as usize..end as usize].iter().all(|byte| *byte == 0), "{at} to {end}");
        }
        at = end;
    }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Format, options of qemu-img.
const KINDS: [(&str, &str); 12] = [
    ("vhdx", ""),
    ("vhdx", "block_size=1M"),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=1M,block_state_zero=off"),
    ("vmdk", ""),
    ("vmdk", "zeroed_grain=on"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
];
const SIZE_BYTES: usize = (11 << 20) + 512 * 5;

/// Random writes, zeroes and discards, on the image and on `shadow`.
pub(crate) fn change(node: &dyn Node, shadow: &mut [u8], seed: u64) {
    let mut rng = Rng(seed);
    for _ in 0..120 {
        let offset = rng.below(shadow.len() as u64 / 512) as usize * 512;
        let sectors = if rng.below(10) == 0 { 6000 } else { 1 + rng.below(200) };
        let end = shadow.len().min(offset + sectors as usize * 512);
        match rng.below(6) {
            0 => {
                node.write_zeroes(&[], offset as u64, (end - offset) as u64, rng.below(2) == 0).unwrap();
                shadow[offset..end].fill(0);
            }
            1 => {
                node.discard(offset as u64, (end - offset) as u64).unwrap();
                node.read(&[], offset as u64, &ReadBufs::from_slice(&mut shadow[offset..end])).unwrap();
            }
            2 => node.flush().unwrap(),
            _ => {
                let fill = rng.next() as u8;
                shadow[offset..end].fill(fill);
                write(node, offset, &shadow[offset..end]);
            }
        }
    }
}

/// Runs qemu-io commands on an image.
pub(crate) fn qemu_io(format: &str, path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", format];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(path.to_str().unwrap());
    let run = Command::new("qemu-io").args(&args).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && !text.contains("failed"), "{args:?}: {text}");
}

pub(crate) fn check_with_qemu(format: &str, path: &Path, want: &[u8], dir: &Path) {
    let name = path.to_str().unwrap();
    let ours = image_at(format, path, true).unwrap().check().unwrap();
    assert_eq!(ours, (format != "vpc").then(ForeignReport::default));
    if format != "vpc" {
        let text = qemu_img(&["check", "-f", format, name]);
        assert!(text.contains("No errors"), "{text}");
    }
    let flat = dir.join("flat.raw");
    std::fs::write(&flat, want).unwrap();
    let text = qemu_img(&["compare", "-f", format, "-F", "raw", name, flat.to_str().unwrap()]);
    assert!(text.contains("identical"), "{text}");
}

#[test]
fn images_of_qemu_img_are_read_and_then_changed() {
    let dir = Place::new();
    let raw = dir.at("source.raw");
    let source = source(SIZE_BYTES);
    std::fs::write(&raw, &source).unwrap();
    for (i, (format, options)) in KINDS.iter().enumerate() {
        let path = dir.at("image");
        let mut args = vec!["convert", "-f", "raw", "-O", format, raw.to_str().unwrap(), path.to_str().unwrap()];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        qemu_img(&args);
        let node = open(format, &path, true).unwrap();
        let mut shadow = read_all(&*node).unwrap();
        assert!(shadow[..source.len()] == source, "{format} {options}");
        assert!(shadow[source.len()..].iter().all(|byte| *byte == 0));
        check_extents(&*node, &shadow);
        assert!(matches!(node.write(&[], 0, &WriteBufs::from_slice(&[0; 512])), Err(BlockError::ReadOnly { .. })));
        drop(node);
        let node = open(format, &path, false).unwrap();
        change(&*node, &mut shadow, i as u64 + 1);
        check_extents(&*node, &shadow);
        drop(node);
        check_with_qemu(format, &path, &shadow, dir.dir.path());
    }
}

#[test]
fn images_of_ours_are_accepted_by_qemu_img() {
    let dir = Place::new();
    for (i, (format, options)) in KINDS.iter().enumerate() {
        let (ours, theirs) = (dir.at("ours"), dir.at("theirs"));
        let _ = std::fs::remove_file(&ours);
        create(format, options, &ours, SIZE_BYTES as u64);
        let size = SIZE_BYTES.to_string();
        let mut args = vec!["create", "-q", "-f", format, theirs.to_str().unwrap(), &size];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        qemu_img(&args);
        let length = |path: &Path| std::fs::metadata(path).unwrap().len();
        // qemu-img lets a vhdx begin with more free space than there is need for, and blocks of a vdi between pages.
        if !matches!(*format, "vhdx" | "vdi") {
            assert_eq!(length(&ours), length(&theirs), "{format} {options}");
        }
        let virtual_size = |path: &Path| {
            let text = qemu_img(&["info", "-f", format, path.to_str().unwrap()]);
            text.lines().find(|line| line.starts_with("virtual size")).unwrap().to_owned()
        };
        assert_eq!(virtual_size(&ours), virtual_size(&theirs), "{format} {options}");
        let node = open(format, &ours, false).unwrap();
        let mut shadow = vec![0; node.size_bytes() as usize];
        check_with_qemu(format, &ours, &shadow, dir.dir.path());
        change(&*node, &mut shadow, i as u64 + 100);
        assert!(read_all(&*node).unwrap() == shadow);
        drop(node);
        check_with_qemu(format, &ours, &shadow, dir.dir.path());
        // What qemu-img writes into it is read back.
        qemu_io(format, &ours, &["write -P 0x5a 1M 3M"]);
        shadow[1 << 20..4 << 20].fill(0x5a);
        assert!(read_all(&*open(format, &ours, true).unwrap()).unwrap() == shadow, "{format} {options}");
    }
}

#[test]
fn several_threads_write_one_image() {
    let dir = Place::new();
    for (format, options) in KINDS {
        let path = dir.at("image");
        let _ = std::fs::remove_file(&path);
        create(format, options, &path, SIZE_BYTES as u64);
        let node = open(format, &path, false).unwrap();
        let mut shadow = vec![0; node.size_bytes() as usize];
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let node = &node;
                // Sectors of all threads interleave in every block.
                scope.spawn(move || {
                    for sector in (thread..SIZE_BYTES as u64 / 512).step_by(4) {
                        write(&**node, sector as usize * 512, &[1 + thread as u8; 512]);
                        if sector % 4000 == thread {
                            node.flush().unwrap();
                        }
                    }
                });
            }
        });
        for (sector, bytes) in shadow[..SIZE_BYTES / 512 * 512].chunks_mut(512).enumerate() {
            bytes.fill(1 + (sector % 4) as u8);
        }
        assert!(read_all(&*node).unwrap() == shadow, "{format} {options}");
        drop(node);
        check_with_qemu(format, &path, &shadow, dir.dir.path());
        if (format, options) == ("vpc", "") {
            check_bitmaps(&std::fs::read(&path).unwrap());
        }
    }
}

/// Every block's bitmap says that all its sectors are in use, and the footer ends the file.
fn check_bitmaps(file: &[u8]) {
    for entry in file[0x600..0x600 + 6 * 4].chunks(4) {
        let at = u32::from_be_bytes(entry.try_into().unwrap()) as usize * 512;
        assert!(file[at..at + 512].iter().all(|byte| *byte == 0xff), "block at {at:#x}");
    }
    assert!(file[..512] == file[file.len() - 512..]);
}

#[test]
fn a_check_finds_what_qemu_img_finds() {
    let dir = Place::new();
    let (raw, path) = (dir.at("a.raw"), dir.at("image"));
    std::fs::write(&raw, source(5 << 20)).unwrap();
    // Entries of two blocks, their bytes, and a value that is no place in the file.
    for (format, options, first, second, bytes, wrong) in [
        ("vdi", "static=off", 512, 516, 4, 0x77u64),
        ("vhdx", "block_size=1M", 2 << 20, (2 << 20) + 8, 8, 6 | 1 << 40),
        ("vmdk", "subformat=monolithicSparse", 27 * 512, 27 * 512 + 4, 4, 0x7fff_ffff),
    ] {
        qemu_img(&["convert", "-O", format, "-o", options, raw.to_str().unwrap(), path.to_str().unwrap()]);
        let whole = std::fs::read(&path).unwrap();
        let report = |file: &[u8]| {
            std::fs::write(&path, file).unwrap();
            image_at(format, &path, true).unwrap().check().unwrap().unwrap()
        };
        assert_eq!(report(&whole), ForeignReport::default());
        let mut file = whole.clone();
        let at = (0..64)
            .map(|i| second + i * bytes)
            .find(|at| file[*at..*at + 4] != file[first..first + 4] && file[*at] != 0);
        file.copy_within(first..first + bytes, at.unwrap());
        assert!(report(&file).corruptions > 0, "{format}: two owners");
        let mut file = whole.clone();
        file[first..first + bytes].copy_from_slice(&wrong.to_le_bytes()[..bytes]);
        assert!(report(&file).corruptions > 0, "{format}: no place");
        if format != "vhdx" {
            assert_ne!(qemu_img_status(&["check", "-f", format, path.to_str().unwrap()]).0, 0);
        }
    }
}

#[test]
fn images_are_described_as_qemu_img_describes_them() {
    let dir = Place::new();
    let path = dir.at("a.img");
    for (format, options) in KINDS.iter().copied().chain([
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ]) {
        let mut args = vec!["create", "-q", "-f", format, path.to_str().unwrap(), "2100M"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if !options.contains("fixed") && !options.contains("static") {
            qemu_img(&args);
        } else {
            args[5] = "3M";
            qemu_img(&args);
        }
        let text = qemu_img(&["info", "-f", format, path.to_str().unwrap()]);
        let field = |name: &str| {
            let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.strip_prefix(": ")).map(str::to_owned)
        };
        let info = image_at(format, &path, true).unwrap().inspect().unwrap();
        assert!(field("virtual size").unwrap().ends_with(&format!("({} bytes)", info.size_bytes)), "{text}");
        let cluster_bytes = (info.cluster_bytes != 0).then(|| info.cluster_bytes.to_string());
        assert_eq!(field("cluster_size"), cluster_bytes, "{format} {options}");
        if let Some(vmdk) = info.vmdk {
            assert_eq!(field("cid"), Some(vmdk.cid.to_string()));
            assert_eq!(field("parent cid"), Some(vmdk.parent_cid.to_string()));
            assert_eq!(field("create type"), Some(vmdk.create_type));
            let names = text.lines().filter_map(|line| line.strip_prefix("            filename: "));
            let names: Vec<PathBuf> = names.map(PathBuf::from).collect();
            let paths: Vec<PathBuf> = vmdk.extents.iter().filter_map(|extent| extent.path.clone()).collect();
            assert_eq!(names, paths);
            let kinds = text.lines().filter_map(|line| line.strip_prefix("            format: "));
            assert_eq!(kinds.collect::<Vec<_>>(), vmdk.extents.iter().map(|extent| extent.kind).collect::<Vec<_>>());
            assert_eq!(text.contains("compressed: true"), vmdk.extents[0].compressed);
        }
    }
}
