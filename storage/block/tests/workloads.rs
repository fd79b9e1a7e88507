//! Random requests against a shadow in memory; then qemu-img judges the image.

mod support;

use std::path::Path;

use block::{CacheMode, DetectZeroes, Discard, Disk, Format, OpenOptions, Qcow2Create, create_qcow2, create_raw};
use support::{Rng, contents, open_chain, qemu_img};

/// One run: how the top image is made, what is below it, how it is opened.
struct Case {
    name: &'static str,
    /// Arguments of `qemu-img create` before the file name; empty means our own `create_qcow2` or `create_raw`.
    create: &'static str,
    format: Format,
    size_bytes: u64,
    /// Bytes of a random raw backing file; 0 for none.
    backing_bytes: u64,
    /// Take an internal snapshot after a first round.
    snapshot: bool,
    l2_cache_bytes: u64,
}

const BASE: Case = Case {
    name: "",
    create: "",
    format: Format::Qcow2,
    size_bytes: 8 << 20,
    backing_bytes: 0,
    snapshot: false,
    l2_cache_bytes: 1 << 20,
};

#[test]
fn random_requests_leave_what_they_wrote() {
    let cases = [
        Case { name: "raw", format: Format::Raw, ..BASE },
        Case { name: "own", ..BASE },
        Case { name: "own over backing", backing_bytes: 5 << 20, ..BASE },
        Case { name: "tiny cache", create: "-o cluster_size=512", l2_cache_bytes: 0, ..BASE },
        Case { name: "512 over short backing", create: "-o cluster_size=512", backing_bytes: 1_000_448, ..BASE },
        Case { name: "512, 64-bit refcounts: the table grows", create: "-o cluster_size=512,refcount_bits=64", ..BASE },
        Case { name: "1-bit refcounts", create: "-o cluster_size=4k,refcount_bits=1", backing_bytes: 3 << 20, ..BASE },
        Case { name: "v2", create: "-o cluster_size=4k,compat=0.10", ..BASE },
        Case { name: "v2 over backing", create: "-o cluster_size=4k,compat=0.10", backing_bytes: 6 << 20, ..BASE },
        Case { name: "2 MiB clusters", create: "-o cluster_size=2M", backing_bytes: 3 << 20, ..BASE },
        Case { name: "odd size", size_bytes: (5 << 20) + 512 * 77, backing_bytes: 9 << 20, ..BASE },
        Case { name: "preallocated", create: "-o preallocation=metadata,cluster_size=4k", ..BASE },
        Case { name: "lazy refcounts", create: "-o lazy_refcounts=on,cluster_size=4k", ..BASE },
        Case { name: "snapshot", create: "-o cluster_size=4k", snapshot: true, ..BASE },
        Case {
            name: "snapshot v2, tiny",
            create: "-o cluster_size=512,compat=0.10",
            snapshot: true,
            l2_cache_bytes: 0,
            ..BASE
        },
    ];
    for (case, seed) in cases.iter().zip(0x9e37_79b9u64..) {
        run(case, seed);
    }
}

fn run(case: &Case, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let (top, base) = (dir.path().join("top.img"), dir.path().join("base.raw"));
    let mut rng = Rng(seed);
    let mut shadow = vec![0u8; case.size_bytes as usize];
    if case.backing_bytes > 0 {
        let mut bytes: Vec<u8> = (0..case.backing_bytes / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
        bytes.resize(case.backing_bytes as usize, 7);
        std::fs::write(&base, &bytes).unwrap();
        let shown = bytes.len().min(shadow.len());
        shadow[..shown].copy_from_slice(&bytes[..shown]);
    }
    make(case, &top);
    let mut files = vec![(top.as_path(), case.format)];
    if case.backing_bytes > 0 {
        files.push((base.as_path(), Format::Raw));
    }
    let rounds = 4;
    for round in 0..rounds {
        let opts = OpenOptions {
            format: case.format,
            l2_cache_bytes: case.l2_cache_bytes,
            detect_zeroes: if round % 2 == 1 { DetectZeroes::Unmap } else { DetectZeroes::Off },
            cache: if round == 2 { CacheMode::Unsafe } else { CacheMode::Writeback },
            discard: if round == 3 { Discard::Ignore } else { Discard::Unmap },
            ..OpenOptions::default()
        };
        let disk = open_chain(&files, &opts);
        assert_eq!(disk.size_bytes(), case.size_bytes);
        for step in 0..250 {
            request(&disk, &mut shadow, &mut rng, opts.discard);
            if step % 50 == 0 {
                disk.flush().unwrap();
            }
        }
        assert!(contents(&disk) == shadow, "{} (seed {seed:#x}, round {round}): contents differ", case.name);
        drop(disk);
        judge(case, &top, &shadow, seed);
        if case.snapshot && round == 0 {
            qemu_img(&["snapshot", "-c", "s1", top.to_str().unwrap()]);
        }
    }
}

fn make(case: &Case, top: &Path) {
    let backing = (case.backing_bytes > 0).then(|| ("base.raw".to_owned(), "raw".to_owned()));
    match (case.format, case.create) {
        (Format::Raw, _) => create_raw(top, case.size_bytes).unwrap(),
        (_, "") => create_qcow2(top, case.size_bytes, &Qcow2Create { backing, ..Qcow2Create::default() }).unwrap(),
        (_, args) => {
            let mut all = vec!["create", "-q", "-f", "qcow2"];
            all.extend(args.split(' '));
            if backing.is_some() {
                all.extend(["-b", "base.raw", "-F", "raw"]);
            }
            let size = case.size_bytes.to_string();
            all.extend([top.to_str().unwrap(), &size]);
            qemu_img(&all);
        }
    }
}

fn request(disk: &Disk, shadow: &mut [u8], rng: &mut Rng, discard: Discard) {
    let sectors = shadow.len() as u64 / 512;
    let start = rng.below(sectors);
    let longest = if rng.below(8) == 0 { 1500 } else { 24 };
    let count = (1 + rng.below(longest)).min(sectors - start);
    let (offset, bytes) = (start * 512, count * 512);
    let range = offset as usize..(offset + bytes) as usize;
    match rng.below(10) {
        0..=4 => {
            let fill = rng.below(4) as u8; // 0 is a write of zeroes
            let mut data = vec![fill; bytes as usize];
            if fill > 1 {
                data.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&rng.next().to_le_bytes()));
            }
            disk.write(offset, &data).unwrap();
            shadow[range].copy_from_slice(&data);
        }
        5 | 6 => {
            let mut out = vec![0xee; bytes as usize];
            disk.read(offset, &mut out).unwrap();
            assert!(out == shadow[range], "read at {offset}");
        }
        7 | 8 => {
            disk.write_zeroes(offset, bytes, rng.below(2) == 0).unwrap();
            shadow[range].fill(0);
        }
        _ => {
            let before = shadow[range.clone()].to_vec();
            disk.discard(offset, bytes).unwrap();
            let mut after = vec![0; bytes as usize];
            disk.read(offset, &mut after).unwrap();
            // A discard is a hint: each sector is as it was, or zeroes.
            for (old, new) in before.chunks(512).zip(after.chunks(512)) {
                assert!(
                    new == old || (discard == Discard::Unmap && new.iter().all(|b| *b == 0)),
                    "discard at {offset}"
                );
            }
            shadow[range].copy_from_slice(&after);
        }
    }
}

fn judge(case: &Case, top: &Path, shadow: &[u8], seed: u64) {
    let flat = top.with_file_name("shadow.raw");
    std::fs::write(&flat, shadow).unwrap();
    let (top, flat) = (top.to_str().unwrap(), flat.to_str().unwrap());
    if case.format == Format::Qcow2 {
        let text = qemu_img(&["check", "-f", "qcow2", top]);
        assert!(text.contains("No errors"), "{} (seed {seed:#x}): {text}", case.name);
        let report = support::Pages::load(Path::new(top)).check();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{}: {:?}", case.name, report.findings);
    }
    qemu_img(&["compare", "-f", case.format.name(), "-F", "raw", top, flat]);
}

#[test]
fn a_snapshot_keeps_what_it_saw() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top.qcow2");
    let name = top.to_str().unwrap();
    create_qcow2(&top, 4 << 20, &Qcow2Create { cluster_bits: 12, ..Qcow2Create::default() }).unwrap();
    let files = [(top.as_path(), Format::Qcow2)];
    let disk = open_chain(&files, &OpenOptions::default());
    disk.write(0, &[1; 1 << 20]).unwrap();
    drop(disk);
    qemu_img(&["snapshot", "-c", "before", name]);
    let disk = open_chain(&files, &OpenOptions::default());
    disk.write(512, &[2; 100 * 512]).unwrap();
    disk.discard(512 << 10, 256 << 10).unwrap();
    drop(disk);
    assert!(qemu_img(&["check", "-f", "qcow2", name]).contains("No errors"));
    qemu_img(&["snapshot", "-a", "before", name]);
    let disk = open_chain(&files, &OpenOptions::default());
    let all = contents(&disk);
    assert!(all[..1 << 20].iter().all(|b| *b == 1) && all[1 << 20..].iter().all(|b| *b == 0));
}
