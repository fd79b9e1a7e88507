//! vmdk against qemu-img: streams, extents in several files, parents, descriptors.

use std::sync::Arc;

use image::vmdk::VmdkError;
use image::vmdk::layout::Subformat;

use super::{VmdkOptions, create_vmdk, vmdk_descriptor};
use crate::error::BlockError;
use crate::mapped::tests::{
    change, check_extents, check_with_qemu, host_file, open, qemu_img, qemu_img_status, qemu_io, read_all, source,
    write,
};
use crate::node::Node;
use crate::sys::{ReadBufs, WriteBufs};

/// Two grain tables and a bit; the last grain is short.
const SIZE_BYTES: usize = (70 << 20) + 512 * 3;

fn cause(error: BlockError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(next) = source {
        text += ": ";
        text += &next.to_string();
        source = next.source();
    }
    text
}

fn new_stream(path: &std::path::Path, size_bytes: u64) {
    let options = VmdkOptions { subformat: Subformat::StreamOptimized, ..VmdkOptions::default() };
    create_vmdk(&*host_file(path, true), path, size_bytes, &options).unwrap();
}

#[test]
fn streams_of_qemu_img_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("a.raw"), dir.path().join("a.vmdk"));
    let want = source(SIZE_BYTES);
    std::fs::write(&raw, &want).unwrap();
    let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, name]);
    let node = open("vmdk", &path, true).unwrap();
    assert!(read_all(&*node).unwrap() == want);
    check_extents(&*node, &want);
    let error = open("vmdk", &path, false).err().unwrap();
    assert!(cause(error).contains("written once"));
}

#[test]
fn streams_of_ours_are_read_by_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    let want = source(SIZE_BYTES);
    new_stream(&path, SIZE_BYTES as u64);
    check_with_qemu("vmdk", &path, &vec![0; SIZE_BYTES], dir.path());
    let node = open("vmdk", &path, false).unwrap();
    let mut packed = Vec::new();
    for (i, grain) in want.chunks(65536).enumerate() {
        if i == 700 {
            // A flush in the middle leaves a whole image, and the stream goes on.
            node.flush().unwrap();
            let mut half = want.clone();
            half[700 * 65536..].fill(0);
            assert!(read_all(&*open("vmdk", &path, true).unwrap()).unwrap() == half);
            assert!(read_all(&*node).unwrap() == half);
        }
        if grain.iter().all(|byte| *byte == 0) {
            node.write_zeroes(&[], (i * 65536) as u64, grain.len() as u64, true).unwrap();
            continue;
        }
        let mut whole = grain.to_vec();
        whole.resize(65536, 0);
        assert!(node.pack(&whole, &mut packed).unwrap());
        node.write_packed((i * 65536) as u64, &packed).unwrap();
    }
    assert!(read_all(&*node).unwrap() == want);
    check_extents(&*node, &want);
    let error = node.write_packed(65536, &packed).unwrap_err();
    assert!(cause(error).contains("ascending order"));
    assert!(node.write(&[], 512, &WriteBufs::from_slice(&[1; 512])).is_err());
    assert!(node.write_zeroes(&[], 0, 65536, true).is_err());
    node.flush().unwrap();
    drop(node);
    check_with_qemu("vmdk", &path, &want, dir.path());
    assert!(read_all(&*open("vmdk", &path, true).unwrap()).unwrap() == want);
    let text = qemu_img(&["info", "-f", "vmdk", path.to_str().unwrap()]);
    assert!(text.contains("create type: streamOptimized"), "{text}");
}

#[test]
fn plain_writes_of_whole_grains_are_packed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    new_stream(&path, SIZE_BYTES as u64);
    let want = source(SIZE_BYTES);
    let node = open("vmdk", &path, false).unwrap();
    for (i, piece) in want.chunks(3 << 20).enumerate() {
        write(&*node, i * (3 << 20), piece);
    }
    drop(node);
    check_with_qemu("vmdk", &path, &want, dir.path());
}

#[test]
fn extents_in_files_beside_the_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let mib = 1 << 20;
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"] {
        let path = dir.path().join(format!("{subformat}.vmdk"));
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "vmdk", "-o", &format!("subformat={subformat}"), name, "2100M"]);
        qemu_io("vmdk", &path, &["write -P 1 0 64k", "write -P 2 2046M 4M", "write -P 3 2099M 1M"]);
        let cid = || vmdk_descriptor(host_file(&path, false), &path).unwrap().unwrap().cid;
        let before = cid();
        let node = open("vmdk", &path, false).unwrap();
        assert_eq!((node.size_bytes(), before == cid()), (2100 * mib, true));
        let byte = |at: u64| {
            let mut out = [9; 2];
            node.read(&[], at, &ReadBufs::from_slice(&mut out)).unwrap();
            out
        };
        for (at, want) in
            [(0, 1), (65535, 1), (100 * mib, 0), (2048 * mib - 1, 2), (2048 * mib, 2), (2100 * mib - 2, 3)]
        {
            assert_eq!(byte(at)[0], want, "{subformat} {at}");
        }
        // Across the border of two files.
        write(&*node, (2048 * mib) as usize - 65536 * 3, &[7; 65536 * 5]);
        assert_eq!((byte(2048 * mib - 1), byte(2048 * mib + 2 * 65536 - 1)), ([7, 7], [7, 2]));
        drop(node);
        assert_ne!(before, cid());
        qemu_io(
            "vmdk",
            &path,
            &[
                "read -P 1 0 64k",
                "read -P 2 2046M 1856k",
                &format!("read -P 7 {} 320k", 2048 * mib - 65536 * 3),
                "read -P 3 2099M 1M",
            ],
        );
    }
}

#[test]
fn grains_of_a_parent_show_through() {
    let dir = tempfile::tempdir().unwrap();
    for zeroed_grain in [false, true] {
        let (base, top) = (dir.path().join("base.vmdk"), dir.path().join("top.vmdk"));
        let want = source(SIZE_BYTES);
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, &want).unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "vmdk", raw.to_str().unwrap(), base.to_str().unwrap()]);
        let cid = vmdk_descriptor(host_file(&base, false), &base).unwrap().unwrap().cid;
        let backing = Some(("base.vmdk".to_owned(), cid));
        let options = VmdkOptions { backing, zeroed_grain, ..VmdkOptions::default() };
        create_vmdk(&*host_file(&top, true), &top, SIZE_BYTES as u64, &options).unwrap();
        let below: [Arc<dyn Node>; 1] = [open("vmdk", &base, true).unwrap()];
        let node = open("vmdk", &top, false).unwrap();
        assert_eq!(node.backing_name().as_deref(), Some("base.vmdk"));
        let mut shadow = want.clone();
        for (at, len, fill) in [(1000 * 512, 512, 1), (65536 * 9 + 512, 65536 * 2, 2), (SIZE_BYTES - 512, 512, 3)] {
            shadow[at..at + len].fill(fill);
            node.write(&below, at as u64, &WriteBufs::from_slice(&vec![fill; len])).unwrap();
        }
        for (at, len) in
            [(65536 * 20, 65536 * 3), (65536 * 30 + 512, 65536 * 2), (65536 * 9, 512), (SIZE_BYTES - 65536, 65536)]
        {
            shadow[at..at + len].fill(0);
            node.write_zeroes(&below, at as u64, len as u64, true).unwrap();
        }
        let mut got = vec![0; SIZE_BYTES];
        node.read(&below, 0, &ReadBufs::from_slice(&mut got)).unwrap();
        assert!(got == shadow);
        drop(node);
        check_with_qemu("vmdk", &top, &shadow, dir.path());
    }
}

#[test]
fn a_changed_image_has_a_new_identity() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    qemu_img(&["create", "-q", "-f", "vmdk", path.to_str().unwrap(), "8M"]);
    let cid = || vmdk_descriptor(host_file(&path, false), &path).unwrap().unwrap().cid;
    let before = cid();
    drop(open("vmdk", &path, false).unwrap());
    assert_eq!(cid(), before);
    let node = open("vmdk", &path, false).unwrap();
    change(&*node, &mut vec![0; 8 << 20], 3);
    drop(node);
    assert_ne!(cid(), before);
    assert!(qemu_img(&["check", "-f", "vmdk", path.to_str().unwrap()]).contains("No errors"));
}

#[test]
fn what_is_not_supported_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    for (bytes, want) in [
        (&b"COWD\x01\0\0\0"[..], "'COWD'"),
        (b"nothing", "'# Disk DescriptorFile'"),
        (b"# Disk DescriptorFile\ncreateType=\"fullDevice\"\nRW 1 ZERO\n", "'fullDevice' is not supported"),
        (b"# Disk DescriptorFile\ncreateType=\"custom\"\n", "no extents"),
        (b"# Disk DescriptorFile\ncreateType=\"vmfs\"\nRW 1 FLAT \"/etc/passwd\" 0\n", "paths are refused"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        assert!(cause(open("vmdk", &path, true).err().unwrap()).contains(want));
        assert_ne!(qemu_img_status(&["info", "-f", "vmdk", path.to_str().unwrap()]).0, 0);
    }
    std::fs::write(&path, b"# Disk DescriptorFile\ncreateType=\"vmfs\"\nRW 8 FLAT \"b\" 1\n").unwrap();
    std::fs::write(dir.path().join("b"), [0; 4096]).unwrap();
    let error = cause(open("vmdk", &path, true).err().unwrap());
    let want = VmdkError::ExtentSize { name: "b".to_owned(), have_sectors: 7, want_sectors: 8 };
    assert!(error.ends_with(&want.to_string()), "{error}");
}
