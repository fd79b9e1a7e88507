//! Images that qemu-img made are read as qemu-img reads them, and survive our writes.

mod support;

use std::path::Path;

use block::{BlockError, ChainFile, Disk, ErrorKind, Format, OpenOptions, inspect};
use support::{Rng, contents, open_chain, open_file, qemu_img, qemu_img_status};

const SIZE_BYTES: usize = (3 << 20) + 512 * 5;

/// Text-like, random and empty stretches, so that compression has something to do and to fail at.
fn source(path: &Path) -> Vec<u8> {
    let mut rng = Rng(42);
    let mut out = Vec::with_capacity(SIZE_BYTES);
    while out.len() < SIZE_BYTES {
        let bytes = 512 * (1 + rng.below(300)) as usize;
        match rng.below(3) {
            0 => out.resize(out.len() + bytes, 0),
            1 => out.extend((0..bytes).map(|i| b"the quick brown fox "[i % 20])),
            _ => out.extend((0..bytes / 8).flat_map(|_| rng.next().to_le_bytes())),
        }
    }
    out.truncate(SIZE_BYTES);
    std::fs::write(path, &out).unwrap();
    out
}

#[test]
fn every_kind_of_image_is_read_and_then_written() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("source.raw");
    let want = source(&raw);
    let mut kinds: Vec<String> = Vec::new();
    for bits in 9..=21 {
        kinds.push(format!("cluster_size={}", 1u32 << bits));
        kinds.push(format!("-c cluster_size={}", 1u32 << bits));
        kinds.push(format!("-c compression_type=zstd,cluster_size={}", 1u32 << bits));
    }
    kinds.extend([1, 2, 4, 8, 16, 32, 64].map(|bits| format!("refcount_bits={bits},cluster_size=4k")));
    kinds.extend(["metadata", "falloc", "full"].map(|mode| format!("preallocation={mode}")));
    kinds.extend(
        ["compat=0.10", "-c compat=0.10,cluster_size=8k", "lazy_refcounts=on", "compat=1.1"].map(str::to_owned),
    );
    for kind in kinds {
        check(&kind, dir.path(), &raw, &want);
    }
}

fn check(kind: &str, dir: &Path, raw: &Path, want: &[u8]) {
    let image = dir.join("image.qcow2");
    let (name, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    let options = match kind.strip_prefix("-c ") {
        Some(options) => {
            args.push("-c");
            options
        }
        None => kind,
    };
    args.extend(["-o", options, raw, name]);
    qemu_img(&args);
    let opts = OpenOptions::default();
    let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions { read_only: true, ..opts.clone() });
    assert!(contents(&disk) == want, "{kind}: contents differ");
    assert_eq!(disk.write(0, &[0; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    drop(disk);

    let mut shadow = want.to_vec();
    let disk = open_chain(&[(&image, Format::Qcow2)], &opts);
    let mut rng = Rng(kind.len() as u64 + 1);
    for _ in 0..60 {
        let start = rng.below(shadow.len() as u64 / 512 - 9) as usize * 512;
        let data = vec![rng.next() as u8; 512 * (1 + rng.below(8) as usize)];
        disk.write(start as u64, &data).unwrap();
        shadow[start..start + data.len()].copy_from_slice(&data);
    }
    disk.write_zeroes(1 << 20, 300 << 10, true).unwrap();
    shadow[1 << 20..(1 << 20) + (300 << 10)].fill(0);
    drop(disk);
    let text = qemu_img(&["check", "-f", "qcow2", name]);
    assert!(text.contains("No errors"), "{kind}: {text}");
    let flat = dir.join("shadow.raw");
    std::fs::write(&flat, &shadow).unwrap();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name, flat.to_str().unwrap()]);
    let info = inspect(&image, Some(Format::Qcow2)).unwrap();
    assert_eq!(info.virtual_size_bytes, SIZE_BYTES as u64);
}

#[test]
fn an_image_whose_data_file_was_not_given_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let name = image.to_str().unwrap();
    let data = format!("data_file={}", dir.path().join("data.raw").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, name, "1M"]);
    let file = ChainFile {
        file: open_file(&image, true),
        path_label: image.clone(),
        format: Format::Qcow2,
        extents: Vec::new(),
    };
    let error = Disk::open(vec![file], &OpenOptions::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(matches!(error, BlockError::DataFileNotGiven { .. }), "{error}");
}

/// Changes header bytes 72 to 79, the incompatible feature bits.
fn set_incompatible(image: &Path, bits: u64) {
    use std::os::unix::fs::FileExt;
    open_file(image, true).write_all_at(&bits.to_be_bytes(), 72).unwrap();
}

#[test]
fn a_dirty_image_gets_its_refcounts_rebuilt() {
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
        "lazy_refcounts=on,cluster_size=4k",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("source.raw");
        let want = source(&raw);
        let image = dir.path().join("image.qcow2");
        let name = image.to_str().unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, raw.to_str().unwrap(), name]);
        // Some refcounts of the first block become 0, as after a crash of a lazy writer.
        let pages = support::Pages::load(&image);
        let mut table = [0; 8];
        pages.read(48, &mut table);
        let mut block = [0; 8];
        pages.read(u64::from_be_bytes(table), &mut block);
        use std::os::unix::fs::FileExt;
        open_file(&image, true).write_all_at(&[0; 64], u64::from_be_bytes(block) + 24).unwrap();
        assert_eq!(qemu_img_status(&["check", "-f", "qcow2", name]).0, 2, "the damage is real");
        set_incompatible(&image, 1);
        // Read only, a dirty image needs no repair.
        let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions { read_only: true, ..OpenOptions::default() });
        assert!(contents(&disk) == want);
        drop(disk);
        let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
        disk.write(0, &[1; 512]).unwrap();
        drop(disk);
        let text = qemu_img(&["check", "-f", "qcow2", name]);
        assert!(text.contains("No errors"), "{options}: {text}");
        assert!(!inspect(&image, Some(Format::Qcow2)).unwrap().dirty);
    }
}

#[test]
fn unknown_autoclear_bits_go_and_corrupt_images_stay_read_only() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1M"]);
    let file = open_file(&image, true);
    file.write_all_at(&0x8000_0000_0000_0005u64.to_be_bytes(), 88).unwrap();
    let autoclear = || {
        let mut bits = [0; 8];
        file.read_exact_at(&mut bits, 88).unwrap();
        u64::from_be_bytes(bits)
    };
    drop(open_chain(&[(&image, Format::Qcow2)], &OpenOptions { read_only: true, ..OpenOptions::default() }));
    assert_eq!(autoclear(), 0x8000_0000_0000_0005);
    drop(open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default()));
    assert_eq!(autoclear(), 0);

    set_incompatible(&image, 2);
    let chain = |writable| {
        vec![ChainFile {
            file: open_file(&image, writable),
            path_label: image.clone(),
            format: Format::Qcow2,
            extents: Vec::new(),
        }]
    };
    let error = Disk::open(chain(true), &OpenOptions::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let disk = Disk::open(chain(false), &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
    disk.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn damage_found_while_writing_marks_the_image() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    block::create_qcow2(&image, 1 << 20, &block::Qcow2Create::default()).unwrap();
    let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
    disk.write(0, &[1; 512]).unwrap();
    drop(disk);
    // The L1 entry (table at cluster 3) now points between clusters.
    open_file(&image, true).write_all_at(&0x8000_0000_0004_0200u64.to_be_bytes(), 3 << 16).unwrap();
    let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
    assert_eq!(disk.write(0, &[2; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(disk.write(0, &[2; 512]).unwrap_err().to_string().contains("marked corrupt"));
    drop(disk);
    assert!(inspect(&image, Some(Format::Qcow2)).unwrap().corrupt);
}

#[test]
fn an_entry_that_claims_a_table_as_data_is_not_written_through() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    // Cluster 1 is the refcount table, 2 the first refcount block, 3 the L1 table, 4 the L2 table made here.
    for table in 1..=4u64 {
        block::create_qcow2(&image, 1 << 20, &block::Qcow2Create::default()).unwrap();
        let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
        disk.write(0, &[1; 512]).unwrap();
        drop(disk);
        for flags in [1u64 << 63, 1 << 63 | 1] {
            let file = open_file(&image, true);
            file.write_all_at(&(table << 16 | flags).to_be_bytes(), 4 << 16).unwrap();
            file.write_all_at(&[0; 8], 72).unwrap(); // not marked corrupt by the round before
            let mut before = [0; 512];
            file.read_exact_at(&mut before, table << 16).unwrap();
            let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
            assert_eq!(disk.write(0, &[0x66; 512]).unwrap_err().kind(), ErrorKind::Corrupt, "table in cluster {table}");
            drop(disk);
            let mut after = [0; 512];
            file.read_exact_at(&mut after, table << 16).unwrap();
            assert!(before == after, "table in cluster {table} was overwritten");
        }
        std::fs::remove_file(&image).unwrap();
    }
}
