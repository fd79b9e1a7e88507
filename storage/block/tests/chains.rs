//! Opening by path: backing chains, every way they can be wrong, and locks that QEMU understands.

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use block::{
    BlockError, Disk, Format, OpenOptions, Qcow2Create, create_qcow2, create_raw, inspect, resolve_chain,
    resolve_chain_probing,
};
use support::{contents, qemu_img, qemu_img_status};

fn overlay(path: &Path, backing: &str, format: Format) {
    let opts = Qcow2Create { backing: Some((backing.to_owned(), format.name().to_owned())), ..Qcow2Create::default() };
    create_qcow2(path, 1 << 20, &opts).unwrap();
}

#[test]
fn a_chain_is_opened_top_first_and_reads_through() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), vec![1; 700]).unwrap(); // short: rounded up to 1024
    std::fs::create_dir(at("sub")).unwrap();
    overlay(&at("sub/middle.qcow2"), "../base.raw", Format::Raw);
    overlay(&at("top.qcow2"), "sub/middle.qcow2", Format::Qcow2);
    let chain = resolve_chain(&at("top.qcow2"), Some(Format::Qcow2), false, true).unwrap();
    assert_eq!(chain.iter().map(|f| f.format).collect::<Vec<_>>(), [Format::Qcow2, Format::Qcow2, Format::Raw]);
    let disk = Disk::open(chain, &OpenOptions::default()).unwrap();
    disk.write(512, &[2; 512]).unwrap();
    let all = contents(&disk);
    let runs = [(0..512, 1), (512..1024, 2), (1024..1 << 20, 0)];
    for (range, byte) in runs {
        assert!(all[range.clone()].iter().all(|b| *b == byte), "{range:?}");
    }
    drop(disk);
    assert!(qemu_img(&["check", at("top.qcow2").to_str().unwrap()]).contains("No errors"));
}

#[test]
fn wrong_chains_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create_raw(&at("plain.raw"), 1 << 20).unwrap();
    overlay(&at("orphan.qcow2"), "gone.raw", Format::Raw);
    overlay(&at("a.qcow2"), "b.qcow2", Format::Qcow2);
    overlay(&at("b.qcow2"), "a.qcow2", Format::Qcow2);
    overlay(&at("self.qcow2"), "self.qcow2", Format::Qcow2);
    overlay(&at("liar.qcow2"), "plain.raw", Format::Qcow2);
    overlay(&at("json.qcow2"), "json:{\"driver\":\"raw\"}", Format::Raw);
    overlay(&at("nbd.qcow2"), "nbd:localhost:10809", Format::Raw);
    overlay(&at("dir.qcow2"), ".", Format::Raw);
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "plain.raw",
        "-F",
        "vmdk",
        at("vmdk.qcow2").to_str().unwrap(),
        "1M",
    ]);
    let unsaid = at("unsaid.qcow2");
    overlay(&unsaid, "plain.raw", Format::Raw);
    forget_backing_format(&unsaid);
    type Is = fn(&BlockError) -> bool;
    let cases: [(&str, Format, Is); 12] = [
        ("none.qcow2", Format::Qcow2, |e| matches!(e, BlockError::Io { .. })),
        (".", Format::Raw, |e| matches!(e, BlockError::IsDirectory { .. })),
        ("plain.raw", Format::Qcow2, |e| matches!(e, BlockError::Mismatch { .. })),
        ("orphan.qcow2", Format::Qcow2, |e| matches!(e, BlockError::BackingMissing { .. })),
        ("a.qcow2", Format::Qcow2, |e| matches!(e, BlockError::Loop { .. })),
        ("self.qcow2", Format::Qcow2, |e| matches!(e, BlockError::Loop { .. })),
        ("liar.qcow2", Format::Qcow2, |e| matches!(e, BlockError::Mismatch { .. })),
        ("json.qcow2", Format::Qcow2, |e| matches!(e, BlockError::BackingProtocol { .. })),
        ("nbd.qcow2", Format::Qcow2, |e| matches!(e, BlockError::BackingProtocol { .. })),
        ("dir.qcow2", Format::Qcow2, |e| matches!(e, BlockError::IsDirectory { .. })),
        ("vmdk.qcow2", Format::Qcow2, |e| matches!(e, BlockError::BackingFormat { .. })),
        ("unsaid.qcow2", Format::Qcow2, |e| matches!(e, BlockError::BackingFormatMissing { .. })),
    ];
    for (name, format, is) in cases {
        let error = resolve_chain(&at(name), Some(format), true, true).unwrap_err();
        assert!(is(&error), "{name}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(dir.path().to_str().unwrap()), "{name}: the message names no file: {text}");
    }
    assert_eq!(resolve_chain_probing(&unsaid, None, true, true).unwrap()[1].format, Format::Raw);
    let device = resolve_chain(Path::new("/dev/null"), Some(Format::Raw), true, false).unwrap_err();
    assert!(matches!(device, BlockError::NotAFile { .. }));
}

/// Turns the first header extension (the backing format) of one of our images into an unknown one.
fn forget_backing_format(image: &Path) {
    use std::os::unix::fs::FileExt;
    support::open_file(image, true).write_all_at(&0x7777_7777u32.to_be_bytes(), 112).unwrap();
}

#[test]
fn a_chain_of_201_files_is_too_deep() {
    let dir = tempfile::tempdir().unwrap();
    create_raw(&dir.path().join("0"), 1 << 20).unwrap();
    for i in 1..=200 {
        let format = if i == 1 { Format::Raw } else { Format::Qcow2 };
        let opts = Qcow2Create {
            cluster_bits: 9,
            backing: Some(((i - 1).to_string(), format.name().to_owned())),
            ..Qcow2Create::default()
        };
        create_qcow2(&dir.path().join(i.to_string()), 1 << 20, &opts).unwrap();
    }
    let open = |top: &str| resolve_chain(&dir.path().join(top), Some(Format::Qcow2), true, false);
    assert!(matches!(open("200"), Err(BlockError::TooDeep { max: 200, .. })));
    let chain = open("199").unwrap();
    let disk = Disk::open(chain, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
    disk.read(0, &mut [0; 4096]).unwrap();
}

#[test]
fn a_chain_and_its_headers_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create_raw(&at("plain.raw"), 1 << 20).unwrap();
    overlay(&at("top.qcow2"), "plain.raw", Format::Raw);
    create_qcow2(&at("alone.qcow2"), 1 << 20, &Qcow2Create::default()).unwrap();
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let open = |names: &[&str]| {
        let chain = names.iter().map(|name| block::ChainFile {
            file: support::open_file(&at(name), false),
            path_label: at(name),
            format: if name.ends_with("raw") { Format::Raw } else { Format::Qcow2 },
            extents: Vec::new(),
        });
        Disk::open(chain.collect(), &read_only).err()
    };
    assert!(matches!(open(&[]), Some(BlockError::EmptyChain)));
    assert!(matches!(open(&["top.qcow2"]), Some(BlockError::BackingNotGiven { .. })));
    assert!(matches!(open(&["alone.qcow2", "plain.raw"]), Some(BlockError::UnexpectedBacking { .. })));
    assert!(matches!(open(&["plain.raw"]), Some(BlockError::FormatDisagrees { .. })));
    assert!(open(&["top.qcow2", "plain.raw"]).is_none());
}

#[test]
fn qemu_and_this_engine_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
    create_raw(&base, 1 << 20).unwrap();
    overlay(&top, "base.raw", Format::Raw);
    let name = top.to_str().unwrap();
    let open = |read_only| resolve_chain(&top, Some(Format::Qcow2), read_only, true);
    let writer = open(false).unwrap();
    // QEMU sees our locks, on the image and on its backing file; -U looks without locks.
    let (status, text) = qemu_img_status(&["info", name]);
    assert!(status == 1 && text.contains("Failed to get shared \"write\" lock"), "{text}");
    assert_eq!(qemu_img_status(&["info", "-U", name]).0, 0);
    let (status, text) = qemu_img_status(&["resize", "-q", "-f", "raw", base.to_str().unwrap(), "2M"]);
    assert!(status == 1 && text.contains("lock"), "{text}");
    for read_only in [true, false] {
        assert!(matches!(open(read_only), Err(BlockError::Locked { .. })));
    }
    drop(writer);
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(matches!(open(false), Err(BlockError::Locked { .. })));
    assert_eq!(qemu_img_status(&["info", name]).0, 0, "readers do not exclude readers");
    drop(readers);

    // And we see QEMU's.
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "qcow2", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 7];
    qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    qemu.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap(); // it answers, so the image is open
    for read_only in [true, false] {
        let error = open(read_only).unwrap_err();
        assert!(matches!(error, BlockError::Locked { .. }), "{error}");
    }
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    open(false).unwrap();
}

#[test]
fn created_images_are_what_qemu_sees() {
    let dir = tempfile::tempdir().unwrap();
    for (bits, version) in [(9, 2), (9, 3), (16, 2), (16, 3), (21, 3)] {
        let path = dir.path().join(format!("{bits}-{version}.qcow2"));
        create_qcow2(&path, (10 << 20) - 100, &Qcow2Create { cluster_bits: bits, version, ..Qcow2Create::default() })
            .unwrap();
        let name = path.to_str().unwrap();
        assert!(qemu_img(&["check", "-f", "qcow2", name]).contains("No errors"));
        let info = qemu_img(&["info", "-f", "qcow2", name]);
        assert!(info.contains("(10485760 bytes)"), "the size is rounded up to a sector: {info}");
        let ours = inspect(&path, None).unwrap();
        assert_eq!((ours.format, ours.cluster_bytes), (Format::Qcow2, Some(1 << bits)));
        assert!(info.contains(&format!("({} bytes)", ours.virtual_size_bytes)), "{info}");
        assert!(create_qcow2(&path, 512, &Qcow2Create::default()).is_err(), "an existing file must not be overwritten");
    }
}

#[test]
fn a_disk_of_no_bytes_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    create_qcow2(&ours, 0, &Qcow2Create::default()).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", theirs.to_str().unwrap(), "0"]);
    for image in [ours, theirs] {
        assert!(qemu_img(&["check", "-f", "qcow2", image.to_str().unwrap()]).contains("No errors"));
        let chain = resolve_chain(&image, Some(Format::Qcow2), false, true).unwrap();
        let disk = Disk::open(chain, &OpenOptions::default()).unwrap();
        assert_eq!(disk.size_bytes(), 0);
        disk.write(0, &[]).unwrap();
        assert!(disk.write(0, &[0; 512]).is_err());
        disk.discard(0, 0).unwrap();
        disk.flush().unwrap();
    }
}

#[test]
fn what_is_discarded_reads_as_zeroes_over_a_backing_file() {
    // The whole disk has no tables yet in the first, a cluster of its own in the second.
    for (version, extended_l2, own) in [(3, false, false), (3, false, true), (3, true, false), (2, false, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
        std::fs::write(&base, vec![5; 1 << 20]).unwrap();
        let backing = Some(("base.raw".to_owned(), "raw".to_owned()));
        create_qcow2(&top, 1 << 20, &Qcow2Create { backing, version, extended_l2, ..Qcow2Create::default() }).unwrap();
        let disk = Disk::open(resolve_chain(&top, None, false, true).unwrap(), &OpenOptions::default()).unwrap();
        if own {
            disk.write(128 << 10, &[6; 64 << 10]).unwrap();
        }
        disk.discard(100 << 10, 400 << 10).unwrap();
        disk.flush().unwrap();
        let all = contents(&disk);
        // Whole clusters; version 2 has no entry for zeroes.
        let gone = if version == 3 { 128 << 10..448 << 10 } else { 0..0 };
        for (at, byte) in all.iter().enumerate() {
            assert_eq!(
                *byte,
                if gone.contains(&at) { 0 } else { 5 },
                "{at} in version {version}, {extended_l2}, {own}"
            );
        }
        drop(disk);
        assert!(qemu_img(&["check", top.to_str().unwrap()]).contains("No errors"));
    }
}
