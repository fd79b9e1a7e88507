//! Failures in the middle of operations on an image, and images whose refcounts do not fit in memory at once.

mod support;

use block::{Amend, BlockError, Disk, ErrorKind, Format, OpenOptions, Preallocation, Qcow2Image};
use support::{MemFile, Pages, open_disk, open_image, qemu_check, qemu_img};

const SIZE_BYTES: u64 = 1 << 20;

type Operation = (&'static str, fn(&Qcow2Image) -> Result<(), BlockError>);

const OPERATIONS: &[Operation] = &[
    ("create", |image| image.create_snapshot("new", &Default::default()).map(|_| ())),
    ("create with state", |image| {
        image.create_snapshot_with_state("new", &Default::default(), &mut [5; 20_000].as_slice()).map(|_| ())
    }),
    ("apply", |image| image.apply_snapshot("s")),
    ("delete", |image| image.delete_snapshot("s")),
    ("grow", |image| image.resize(5 << 20, false, Preallocation::Metadata)),
    ("shrink", |image| image.resize(300_032, true, Preallocation::Off)),
    ("empty", |image| image.make_empty()),
    ("refcounts", |image| image.amend(&Amend { refcount_order: Some(5), ..Amend::default() })),
    ("bitmap", |image| image.add_bitmap("new", 65_536, true)),
    ("clear", |image| image.clear_bitmap("b")),
];

fn pattern(seed: u64) -> Vec<u8> {
    (0..SIZE_BYTES).map(|i| (i / 80 + seed) as u8 | 1).collect()
}

/// An image with a snapshot, data of its own, and a bitmap.
fn image(options: &str) -> Pages {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
    open_disk(&path).write(0, &pattern(1)).unwrap();
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    let disk = open_disk(&path);
    disk.write(100_352, &pattern(2)[..200_704]).unwrap();
    disk.write_zeroes(500_224, 100_352, true).unwrap();
    disk.qcow2().unwrap().add_bitmap("b", 65_536, true).unwrap();
    drop(disk);
    Pages::load(&path)
}

/// Disk, names of snapshots, names of bitmaps.
fn state(disk: &Disk) -> (Vec<u8>, Vec<Vec<u8>>, Vec<String>) {
    let image = disk.qcow2().unwrap();
    let snapshots = image.snapshots().unwrap().into_iter().map(|snapshot| snapshot.name).collect();
    let bitmaps = image.bitmaps().unwrap().into_iter().map(|bitmap| bitmap.name).collect();
    (support::contents(disk), snapshots, bitmaps)
}

fn open(file: &MemFile, read_only: bool) -> Result<Disk, BlockError> {
    let opts = OpenOptions { read_only, ..OpenOptions::default() };
    Disk::open_backends(vec![file.layer(Format::Qcow2)], &opts)
}

#[test]
fn an_operation_that_fails_has_not_happened() {
    for options in ["cluster_size=4k", "cluster_size=512"] {
        let start = image(options);
        for (name, operate) in OPERATIONS {
            let whole = MemFile::of(start.clone());
            let disk = open(&whole, false).unwrap();
            let before = state(&disk);
            operate(&disk.qcow2().unwrap()).unwrap();
            drop(disk);
            let after = state(&open(&whole, true).unwrap());
            let mut failed = 0;
            for seed in 1..40u64 {
                let what = format!("{options} {name} seed {seed}");
                let file = MemFile::of(start.clone());
                let disk = open(&file, false).unwrap();
                file.0.lock().unwrap().fail_one_in = Some((1 + seed % 12, seed * 77));
                let result = operate(&disk.qcow2().unwrap());
                file.0.lock().unwrap().fail_one_in = None;
                let on_disk = state(&open(&file, true).unwrap());
                if let Err(error) = &result {
                    failed += 1;
                    assert_eq!(error.kind(), ErrorKind::Io, "{what}: {error}");
                    // A write of the header may fail and be there all the same.
                    assert!(on_disk == before || on_disk == after, "{what}: on disk");
                } else {
                    assert!(on_disk == after, "{what}: on disk");
                }
                assert!(state(&disk) == on_disk, "{what}: the open disk shows another state than the file");
                // The image goes on, or refuses every write.
                match disk.write(4096, &[9; 8192]) {
                    Ok(()) => disk.flush().unwrap(),
                    Err(error) => assert!(matches!(error, BlockError::FlushFailed { .. }), "{what}: {error}"),
                }
                drop(disk);
                let report = file.0.lock().unwrap().pages.check();
                assert_eq!(report.corruptions, 0, "{what}: {:?}", report.findings);
            }
            assert!(failed > 5, "{options} {name}: only {failed} failures");
        }
    }
}

#[test]
fn without_space_nothing_has_happened() {
    let start = image("cluster_size=4k");
    for (name, operate) in OPERATIONS {
        for room in [0, 3, 9, 20, 40] {
            let what = format!("{name} with room for {room} sectors");
            let file = MemFile::of(start.clone());
            let disk = open(&file, false).unwrap();
            let before = state(&disk);
            file.0.lock().unwrap().room = Some(room);
            let result = operate(&disk.qcow2().unwrap());
            file.0.lock().unwrap().room = None;
            if let Err(error) = &result {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
                assert!(state(&disk) == before, "{what}");
                // With space, the same operation goes through.
                operate(&disk.qcow2().unwrap()).unwrap();
            }
            let now = state(&disk);
            drop(disk);
            assert!(state(&open(&file, true).unwrap()) == now, "{what}");
            let report = file.0.lock().unwrap().pages.check();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {:?}", report.findings);
        }
    }
}

#[test]
fn a_failed_barrier_ends_writing() {
    let start = image("cluster_size=4k");
    let file = MemFile::of(start);
    let disk = open(&file, false).unwrap();
    file.0.lock().unwrap().sync_fails = true;
    assert!(disk.qcow2().unwrap().create_snapshot("new", &Default::default()).is_err());
    file.0.lock().unwrap().sync_fails = false;
    assert!(matches!(disk.write(0, &[1; 512]), Err(BlockError::FlushFailed { .. })));
    assert!(disk.qcow2().unwrap().create_snapshot("new", &Default::default()).is_err());
}

#[test]
fn refcounts_beyond_memory_wait_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    // 96 refcount blocks for 48 GiB, 12 MiB of them before and after.
    let options = "cluster_size=64k,refcount_bits=64,preallocation=metadata";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "48G"]);
    let disk = open_disk(&path);
    let marks: Vec<u64> = (0..48).map(|gib| (gib << 30) + 4096).collect();
    for at in &marks {
        disk.write(*at, &[1; 512]).unwrap();
    }
    drop(disk);
    open_image(&path).create_snapshot("s", &Default::default()).unwrap();
    qemu_check(&path, "created");
    let disk = open_disk(&path);
    for at in &marks {
        disk.write(*at, &[2; 512]).unwrap();
    }
    let read = |disk: &Disk, want: u8| {
        for at in &marks {
            let mut now = [0; 512];
            disk.read(*at, &mut now).unwrap();
            assert_eq!(now, [want; 512], "at {at}");
        }
    };
    read(&disk, 2);
    drop(disk);
    open_image(&path).apply_snapshot("s").unwrap();
    qemu_check(&path, "applied");
    read(&open_disk(&path), 1);
    open_image(&path).delete_snapshot("s").unwrap();
    qemu_check(&path, "deleted");
    read(&open_disk(&path), 1);
}
