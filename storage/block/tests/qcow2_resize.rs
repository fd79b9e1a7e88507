//! Growing and shrinking, with and without backing files and snapshots, against qemu-img and cut at every write.

mod support;

use std::path::Path;

use block::{Disk, Format, OpenOptions, Preallocation, Qcow2Image};
use support::{MemFile, Pages, Rng, open_chain, open_disk, open_image, qemu_check, qemu_img, qemu_raw};

const OPTIONS: [&str; 6] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,compat=0.10",
    "cluster_size=2M,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
];

const ROOMS: [Preallocation; 4] =
    [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];

fn create(path: &Path, options: &str, bytes: u64) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &bytes.to_string()]);
}

fn pattern(bytes: u64, seed: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i / 100 + seed) as u8 | 1).collect()
}

#[test]
fn data_stays_and_new_bytes_are_zero() {
    for (options, seed) in OPTIONS.iter().zip(1u64..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, options, 1 << 20);
        let disk = open_disk(&path);
        let mut model = pattern(1 << 20, seed);
        disk.write(0, &model).unwrap();
        let mut rng = Rng(seed);
        for round in 0..8usize {
            let to = (1 + rng.below(6000)) * 512;
            disk.resize(to, true, ROOMS[round % 4]).unwrap();
            model.resize(to as usize, 0);
            assert_eq!(disk.size_bytes(), to);
            assert!(support::contents(&disk) == model, "{options} round {round}");
            let at = rng.below(to / 512) * 512;
            disk.write(at, &[9; 512]).unwrap();
            model[at as usize..at as usize + 512].fill(9);
            disk.flush().unwrap();
            qemu_check(&path, &format!("{options} round {round}, {to} bytes"));
            assert!(qemu_raw(&path) == model, "{options} round {round}");
        }
    }
}

#[test]
fn growing_hides_what_a_longer_backing_file_holds() {
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10", "extended_l2=on"] {
        for room in [Preallocation::Off, Preallocation::Metadata] {
            let dir = tempfile::tempdir().unwrap();
            let (path, base) = (dir.path().join("a.qcow2"), dir.path().join("base.raw"));
            std::fs::write(&base, pattern(1 << 20, 3)).unwrap();
            let name = path.to_str().unwrap();
            let args = ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", name, "100000"];
            qemu_img(&args);
            let size = 100_352; // rounded up to sectors, inside a cluster
            let disk = open_chain(&[(&path, Format::Qcow2), (&base, Format::Raw)], &OpenOptions::default());
            assert_eq!(disk.size_bytes(), size);
            disk.resize(3 << 20, false, room).unwrap();
            let mut want = pattern(size, 3);
            want.resize(3 << 20, 0);
            assert!(support::contents(&disk) == want, "{options} {room:?}");
            drop(disk);
            qemu_check(&path, options);
            assert!(qemu_raw(&path) == want, "{options} {room:?}");
        }
    }
}

#[test]
fn snapshots_keep_their_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=4k", 1 << 20);
    let disk = open_disk(&path);
    let first = pattern(1 << 20, 1);
    disk.write(0, &first).unwrap();
    let image = disk.qcow2().unwrap();
    image.create_snapshot("whole", &Default::default()).unwrap();
    disk.resize(300_032, true, Preallocation::Off).unwrap();
    image.create_snapshot("short", &Default::default()).unwrap();
    disk.resize(4 << 20, false, Preallocation::Off).unwrap();
    drop(image);
    drop(disk);
    qemu_check(&path, "resized with snapshots");
    let mut want = first[..300_032].to_vec();
    want.resize(4 << 20, 0);
    assert!(qemu_raw(&path) == want);
    for (snapshot, size) in [("whole", 1 << 20), ("short", 300_032)] {
        let disk = open_disk(&path);
        disk.qcow2().unwrap().apply_snapshot(snapshot).unwrap();
        assert_eq!(disk.size_bytes(), size as u64);
        drop(disk);
        qemu_check(&path, snapshot);
        assert!(qemu_raw(&path) == first[..size]);
    }
    create(&path, "compat=0.10", 1 << 20);
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    assert!(open_image(&path).resize(2 << 20, false, Preallocation::Off).is_err());
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=512", 1 << 20);
    let image = open_image(&path);
    for (to, shrink) in [(512, false), (1 << 40, true), (u64::MAX, true), (1 << 63, true)] {
        assert!(image.resize(to, shrink, Preallocation::Off).is_err(), "{to}");
    }
    image.resize(1 << 20, false, Preallocation::Off).unwrap();
    drop(image);
    qemu_check(&path, "after refusals");
}

#[test]
fn any_cut_leaves_the_old_size_or_the_new() {
    for (options, to) in [
        ("cluster_size=512", 3 << 20),
        ("cluster_size=512", 70_144),
        ("cluster_size=4k,compat=0.10", 512),
        ("cluster_size=64k", 40 << 30),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, options, 1 << 20);
        open_disk(&path).write(0, &pattern(1 << 20, 1)).unwrap();
        let start = Pages::load(&path);
        let file = MemFile::of(start.clone());
        let image = Qcow2Image::open_backend(file.layer(Format::Qcow2), false).unwrap();
        image.resize(to, true, Preallocation::Off).unwrap();
        drop(image);
        let log = file.0.lock().unwrap().log.clone();
        support::every_cut(&start, &log, &mut |torn, what, closer| {
            let report = torn.check();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{options} {what}: {:?}", report.findings);
            let file = MemFile::of(torn.clone());
            let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
            let size = disk.size_bytes();
            assert!(size == 1 << 20 || size == to, "{options} {what}: {size}");
            let kept = (size.min(1 << 20).min(to)) as usize;
            let mut now = vec![0; kept];
            disk.read(0, &mut now).unwrap();
            assert!(now == pattern(1 << 20, 1)[..kept], "{options} {what}");
            if closer {
                torn.store(&path);
                qemu_check(&path, &format!("{options} {what}"));
            }
        });
    }
}

#[test]
fn the_file_of_a_shrunken_disk_is_as_short_as_with_qemu() {
    for options in OPTIONS {
        let dir = tempfile::tempdir().unwrap();
        let [ours, qemus] = ["ours", "qemus"].map(|name| dir.path().join(name));
        create(&ours, options, 8 << 20);
        open_disk(&ours).write(0, &pattern(8 << 20, 5)).unwrap();
        std::fs::copy(&ours, &qemus).unwrap();
        qemu_img(&["resize", "-q", "--shrink", "-f", "qcow2", qemus.to_str().unwrap(), "2M"]);
        let disk = open_disk(&ours);
        disk.resize(2 << 20, true, Preallocation::Off).unwrap();
        assert!(support::contents(&disk) == pattern(2 << 20, 5), "{options}");
        // What was free all along is taken first, and that may be a few clusters apart.
        let slack = 4 * disk.cluster_bytes();
        drop(disk);
        let [ours_bytes, qemus_bytes] = [&ours, &qemus].map(|path| std::fs::metadata(path).unwrap().len());
        qemu_check(&ours, options);
        assert!(ours_bytes <= qemus_bytes + slack, "{options}: {ours_bytes}, QEMU {qemus_bytes}");
    }
}
