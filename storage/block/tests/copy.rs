//! Copies against qemu-img: whatever the formats, cluster sizes and options, the target holds what the source holds.

mod support;

use std::path::Path;

use block::{CacheMode, CopyOptions, Disk, Format, OpenOptions, compare, copy, create_raw};
use support::{Rng, open_chain, qemu_img};

const SIZE_BYTES: u64 = (8 << 20) + 512;

fn open(path: &Path, format: Format, read_only: bool) -> Disk {
    let cache = CacheMode::Unsafe;
    open_chain(&[(path, format)], &OpenOptions { format, read_only, cache, ..OpenOptions::default() })
}

fn make(path: &Path, format: Format, options: &str) {
    match format {
        Format::Raw => create_raw(path, SIZE_BYTES).unwrap(),
        _ => {
            let size = SIZE_BYTES.to_string();
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size]);
        }
    }
}

/// Ragged pieces of data, of zeroes and of data that is zero.
fn fill(disk: &Disk, rng: &mut Rng) {
    for _ in 0..60 {
        let offset = rng.below(SIZE_BYTES / 512) * 512;
        let bytes = (512 * (1 + rng.below(900))).min(SIZE_BYTES - offset);
        match rng.below(4) {
            0 => disk.write_zeroes(offset, bytes, rng.below(2) == 0).unwrap(),
            1 => disk.write(offset, &vec![0; bytes as usize]).unwrap(),
            _ => {
                let data: Vec<u8> = (0..bytes / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
                disk.write(offset, &data).unwrap();
            }
        }
    }
    disk.flush().unwrap();
}

#[test]
fn a_copy_holds_what_its_source_holds() {
    let formats = [
        (Format::Raw, ""),
        (Format::Qcow2, "cluster_size=512"),
        (Format::Qcow2, "cluster_size=64k"),
        (Format::Qcow2, "cluster_size=2M"),
        (Format::Qcow2, "cluster_size=4k,compat=0.10"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(0x7_1e55);
    for (from, (source_format, source_options)) in formats.iter().enumerate() {
        let source = dir.path().join(format!("s{from}"));
        make(&source, *source_format, source_options);
        fill(&open(&source, *source_format, false), &mut rng);
        for (to, (target_format, target_options)) in formats.iter().enumerate() {
            for (workers, out_of_order, sparse_bytes, old, offload) in [
                (1, false, 4096, false, false),
                (1, false, 512, true, true),
                (3, false, 0, true, false),
                (2, true, 4096, true, true),
                (4, false, 512, false, true),
            ] {
                let target = dir.path().join(format!("t{from}-{to}"));
                make(&target, *target_format, target_options);
                let disk = open(&target, *target_format, false);
                if old {
                    fill(&disk, &mut rng);
                }
                let target_is_zero = !old;
                let opts = CopyOptions {
                    workers,
                    out_of_order,
                    sparse_bytes,
                    target_is_zero,
                    offload,
                    ..CopyOptions::default()
                };
                copy(&open(&source, *source_format, true), &disk, &opts, &|_, _| true).unwrap();
                disk.flush().unwrap();
                let original = open(&source, *source_format, true);
                assert_eq!(compare(&original, &disk, workers, &|_, _| {}).unwrap(), None);
                drop(disk);
                let (a, b) = (source.to_str().unwrap(), target.to_str().unwrap());
                let said = qemu_img(&["compare", "-f", source_format.name(), "-F", target_format.name(), a, b]);
                assert_eq!(said.trim(), "Images are identical.", "{opts:?} {source_options} -> {target_options}");
                if *target_format == Format::Qcow2 {
                    qemu_img(&["check", "-q", b]);
                }
                std::fs::remove_file(&target).unwrap();
            }
        }
    }
}

#[test]
fn a_copy_stops_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("s"), dir.path().join("t"));
    make(&source, Format::Raw, "");
    fill(&open(&source, Format::Raw, false), &mut Rng(5));
    make(&target, Format::Qcow2, "cluster_size=64k");
    let disk = open(&target, Format::Qcow2, false);
    let result = copy(&open(&source, Format::Raw, true), &disk, &CopyOptions::default(), &|done, _| done < 1 << 20);
    assert_eq!(result.unwrap_err().to_string(), "stopped on request");
    drop(disk);
    qemu_img(&["check", "-q", target.to_str().unwrap()]);
}

#[test]
fn the_first_sector_that_differs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a"), dir.path().join("b"));
    make(&first, Format::Raw, "");
    make(&second, Format::Qcow2, "cluster_size=64k");
    let (first, second) = (open(&first, Format::Raw, false), open(&second, Format::Qcow2, false));
    for (at, workers) in [(SIZE_BYTES - 1, 1), (5 << 20, 4), ((1 << 20) + 700, 2), (3, 3)] {
        first.write(at / 512 * 512, &[0; 512]).unwrap(); // data, but zero
        assert_eq!(compare(&first, &second, workers, &|_, _| {}).unwrap(), None);
        let mut sector = [0; 512];
        sector[(at % 512) as usize] = 1;
        for (write, clear) in [(&first, &second), (&second, &first)] {
            write.write(at / 512 * 512, &sector).unwrap();
            clear.write(SIZE_BYTES - 512, &[7; 512]).unwrap(); // a later difference does not hide it
            let found = compare(&first, &second, workers, &|_, _| {}).unwrap();
            assert_eq!(found, Some(at / 512 * 512), "{workers}");
            write.write(at / 512 * 512, &[0; 512]).unwrap();
            clear.write(SIZE_BYTES - 512, &[0; 512]).unwrap();
        }
    }
}
