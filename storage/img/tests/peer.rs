//! Held against qemu-img on the same images: outputs, exit codes, what is created.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn ours(dir: &Path, line: &str) -> Output {
    run(env!("CARGO_BIN_EXE_vireo-img"), dir, line)
}
fn theirs(dir: &Path, line: &str) -> Output {
    run("qemu-img", dir, line)
}
fn run(program: &str, dir: &Path, line: &str) -> Output {
    let mut command = Command::new(program);
    command.args(line.split_whitespace()).current_dir(dir).env("LC_ALL", "C");
    command.output().unwrap_or_else(|error| panic!("{program} (package qemu-utils) does not start: {error}"))
}
fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Where qemu-img begins to tell of the file.
const CHILD: &str = "Child node";

/// A directory with images of every kind that is known, made by qemu-img.
fn images() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for line in [
        "create -q -f qcow2 base.qcow2 1G",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "create -q -f qcow2 -o compat=0.10,cluster_size=4k old.qcow2 10M",
        "create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64,compression_type=zstd new.qcow2 33M",
        "create -q -f raw raw.img 10M",
    ] {
        assert!(theirs(dir.path(), line).status.success(), "{line}");
    }
    fs::create_dir(dir.path().join("sub")).unwrap();
    assert!(theirs(dir.path(), "create -q -f qcow2 -b ../base.qcow2 -F qcow2 sub/far.qcow2").status.success());
    dir
}

const IMAGES: [&str; 6] = ["base.qcow2", "top.qcow2", "old.qcow2", "new.qcow2", "raw.img", "sub/far.qcow2"];

#[test]
fn info_reads_as_qemu_img_prints_it() {
    let dir = images();
    for image in IMAGES {
        let line = format!("info {image}");
        let (said, wanted) = (text(&ours(dir.path(), &line)), text(&theirs(dir.path(), &line)));
        // qemu-img before 8.1 does not tell of the file below the format.
        let said = if wanted.contains(CHILD) { said } else { said.split(CHILD).next().unwrap_or_default().to_owned() };
        assert_eq!(said, wanted, "{line}");
        let line = format!("info --output=json -U {image}");
        let [a, b]: [Value; 2] =
            [ours(dir.path(), &line), theirs(dir.path(), &line)].map(|o| serde_json::from_slice(&o.stdout).unwrap());
        for (field, value) in b.as_object().unwrap() {
            assert_eq!(&a[field], value, "{line}: {field}");
        }
    }
    let line = "info --output json --backing-chain sub/far.qcow2";
    let [a, b]: [Value; 2] =
        [ours(dir.path(), line), theirs(dir.path(), line)].map(|o| serde_json::from_slice(&o.stdout).unwrap());
    assert_eq!(a.as_array().map(Vec::len), b.as_array().map(Vec::len));
    assert_eq!(a[1]["virtual-size"], b[1]["virtual-size"]);
}

#[test]
fn check_agrees_with_qemu_img() {
    let dir = images();
    let path = |name: &str| dir.path().join(name);
    // A refcount too many: cluster 3 of a new image is the L1 table; cluster 9 is nobody's.
    let mut leaking = fs::read(path("base.qcow2")).unwrap();
    leaking.resize(10 * 65536, 0);
    leaking[2 * 65536 + 18..2 * 65536 + 20].copy_from_slice(&1u16.to_be_bytes());
    fs::write(path("leaking.qcow2"), &leaking).unwrap();
    // A refcount too few: the L1 table counts as free.
    let mut broken = fs::read(path("base.qcow2")).unwrap();
    broken[2 * 65536 + 6..2 * 65536 + 8].copy_from_slice(&0u16.to_be_bytes());
    fs::write(path("broken.qcow2"), &broken).unwrap();
    for (image, code) in IMAGES
        .map(|i| (i, if i == "raw.img" { 63 } else { 0 }))
        .into_iter()
        .chain([("leaking.qcow2", 3), ("broken.qcow2", 2)])
    {
        let line = format!("check --output=json {image}");
        let (a, b) = (ours(dir.path(), &line), theirs(dir.path(), &line));
        assert_eq!((a.status.code(), b.status.code()), (Some(code), Some(code)), "{line}");
        if code != 63 {
            let [a, b]: [Value; 2] = [a, b].map(|o| serde_json::from_slice(&o.stdout).unwrap());
            for field in ["total-clusters", "check-errors", "corruptions", "leaks", "filename", "format"] {
                assert_eq!(a[field], b[field], "{line}: {field}");
            }
        }
    }
    assert_eq!(text(&ours(dir.path(), "check top.qcow2")), text(&theirs(dir.path(), "check top.qcow2")));
}

#[test]
fn what_is_created_is_what_qemu_img_would_create() {
    let dir = images();
    for line in [
        "create -f qcow2 IMAGE 1G",
        "create -f qcow2 IMAGE -b base.qcow2 -F qcow2",
        "create -f qcow2 -o cluster_size=2M,compat=1.1 IMAGE 1.5G",
        "create IMAGE 10M",
        "create -fqcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 -- IMAGE 2G",
    ] {
        let said = ours(dir.path(), &line.replace("IMAGE", "a.img"));
        let wanted = theirs(dir.path(), &line.replace("IMAGE", "b.img"));
        assert!(said.status.success(), "{line}: {}", String::from_utf8_lossy(&said.stderr));
        assert_eq!(text(&said).replace("a.img", "b.img"), text(&wanted), "{line}");
        let [a, b] = ["a.img", "b.img"].map(|image| {
            let info = theirs(dir.path(), &format!("info --output=json {image}"));
            serde_json::from_slice::<Value>(&info.stdout).unwrap()
        });
        for field in
            ["virtual-size", "format", "cluster-size", "format-specific", "backing-filename", "backing-filename-format"]
        {
            assert_eq!(a[field], b[field], "{line}: {field}");
        }
        assert!(matches!(theirs(dir.path(), "check a.img").status.code(), Some(0 | 63)), "{line}");
    }
}

#[test]
fn nothing_is_lost_on_the_way_to_an_error() {
    let dir = images();
    let before = fs::read(dir.path().join("base.qcow2")).unwrap();
    for (line, code, message) in [
        ("create -f qcow2 -b nope.qcow2 -F qcow2 base.qcow2", 1, "Could not open 'nope.qcow2'"),
        ("create -f qcow2 -b top.qcow2 base.qcow2", 1, "without backing format"),
        ("create -f qcow2 base.qcow2", 1, "needs a size parameter"),
        ("create -f qcow2 base.qcow2 abc", 1, "Invalid image size specified: 'abc'"),
        ("create -f dmg base.qcow2 1G", 1, "Unknown file format 'dmg'"),
        ("create -f qcow2 -o cluster_size=3k base.qcow2 1G", 1, "a power of two between 512 and 2048k"),
        ("create -f qcow2 -o foo=1 base.qcow2 1G", 1, "Invalid parameter 'foo'"),
        ("info nope.qcow2", 1, "Could not open 'nope.qcow2'"),
        ("info -f qcow2 raw.img", 1, "Could not open 'raw.img'"),
        ("convert top.qcow2 base.qcow2", 1, "Failed to get \"write\" lock"),
        ("frobnicate", 1, "Command not found: frobnicate"),
        ("", 1, "Not enough arguments"),
    ] {
        let output = ours(dir.path(), line);
        assert_eq!(output.status.code(), Some(code), "{line}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(message), "{line}: {said}");
        assert_eq!(fs::read(dir.path().join("base.qcow2")).unwrap(), before, "{line}");
    }
}
