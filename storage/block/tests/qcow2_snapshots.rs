//! Internal snapshots against qemu-img in both directions, and power cuts in the middle of each operation.

mod support;

use std::path::Path;

use block::{Disk, Format, OpenOptions, Qcow2Image, SnapshotTime};
use support::{MemFile, Pages, Rng, open_disk as disk, open_image, qemu_check as check, qemu_img};

const SIZE_BYTES: u64 = 1 << 20;
const TIME: SnapshotTime = SnapshotTime { date_sec: 1_700_000_000, date_nsec: 5, vm_clock_nsec: 0 };

/// What qemu-img is asked to create: kinds of tables that differ.
const OPTIONS: [&str; 7] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=4k,compat=0.10",
    "cluster_size=1k,refcount_bits=64,lazy_refcounts=on",
    "cluster_size=2M,refcount_bits=2",
    "cluster_size=16k,extended_l2=on",
];

fn create(path: &Path, options: &str) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
}

/// Writes a few runs that depend on the seed.
fn scribble(disk: &Disk, model: &mut [u8], seed: u64) {
    let mut rng = Rng(seed);
    for _ in 0..12 {
        let bytes = ((1 + rng.below(300)) * 512).min(SIZE_BYTES);
        let offset = rng.below((SIZE_BYTES - bytes) / 512 + 1) * 512;
        let range = offset as usize..(offset + bytes) as usize;
        match rng.below(5) {
            0 => {
                disk.write_zeroes(offset, bytes, rng.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            _ => {
                let data: Vec<u8> = (0..bytes).map(|i| (i / 97 + seed) as u8).collect();
                disk.write(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
}

fn raw_of(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let out = path.with_extension("raw");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    let option = snapshot.map(|name| format!("snapshot.name={name}"));
    if let Some(option) = &option {
        args.extend(["-l", option]);
    }
    args.extend([path.to_str().unwrap(), out.to_str().unwrap()]);
    qemu_img(&args);
    std::fs::read(&out).unwrap()
}

#[test]
fn snapshots_made_here_are_what_qemu_sees() {
    for (options, seed) in OPTIONS.iter().zip(0x1111u64..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, options);
        let mut model = vec![0; SIZE_BYTES as usize];
        let mut states = Vec::new();
        // Three references to a cluster fill a refcount of two bits.
        for round in 0..2 {
            let disk = disk(&path);
            scribble(&disk, &mut model, seed * 10 + round);
            disk.qcow2().unwrap().create_snapshot(&format!("s{round}"), &TIME).unwrap();
            states.push(model.clone());
            scribble(&disk, &mut model, seed * 100 + round);
            drop(disk);
            check(&path, &format!("{options} round {round}"));
        }
        let list = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]);
        assert!(list.contains("s0") && list.contains("s1") && list.contains("2023-11-14"), "{list}");
        assert!(raw_of(&path, None) == model, "{options}");
        for (round, state) in states.iter().enumerate() {
            assert!(raw_of(&path, Some(&format!("s{round}"))) == *state, "{options} s{round}");
        }
        // Applying, by identifier and by name; then what is written must not reach the snapshot.
        open_image(&path).apply_snapshot("1").unwrap();
        check(&path, options);
        assert!(raw_of(&path, None) == states[0], "{options} applied");
        let mut now = states[0].clone();
        scribble(&disk(&path), &mut now, seed);
        assert!(raw_of(&path, Some("s0")) == states[0] && raw_of(&path, None) == now, "{options} written after");
        open_image(&path).delete_snapshot("s0").unwrap();
        check(&path, options);
        assert!(raw_of(&path, Some("s1")) == states[1] && raw_of(&path, None) == now, "{options} deleted");
        open_image(&path).delete_snapshot("s1").unwrap();
        check(&path, options);
        assert!(raw_of(&path, None) == now, "{options} all deleted");
        assert!(open_image(&path).snapshots().unwrap().is_empty());
    }
}

#[test]
fn a_snapshot_is_shown_without_a_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=4k");
    let mut model = vec![0; SIZE_BYTES as usize];
    scribble(&disk(&path), &mut model, 1);
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    let at_snapshot = model.clone();
    let changed = disk(&path);
    scribble(&changed, &mut model, 2);
    changed.resize(SIZE_BYTES / 2, true, block::Preallocation::Off).unwrap();
    assert!(changed.qcow2().unwrap().show_snapshot("s").is_err(), "open for writing");
    drop(changed);
    let before = std::fs::read(&path).unwrap();
    let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
    let shown = support::open_chain(&[(&path, Format::Qcow2)], &opts);
    assert!(shown.qcow2().unwrap().show_snapshot("t").is_err());
    shown.qcow2().unwrap().show_snapshot("s").unwrap();
    assert!(support::contents(&shown) == at_snapshot);
    drop(shown);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn an_emptied_image_shows_its_backing_file() {
    for snapshot in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (path, base) = (dir.path().join("a.qcow2"), dir.path().join("base.raw"));
        let below: Vec<u8> = (0..SIZE_BYTES).map(|i| (i / 999) as u8).collect();
        std::fs::write(&base, &below).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path.to_str().unwrap()]);
        let disk = support::open_chain(&[(&path, Format::Qcow2), (&base, Format::Raw)], &OpenOptions::default());
        let mut model = below.clone();
        scribble(&disk, &mut model, 4);
        if snapshot {
            disk.qcow2().unwrap().create_snapshot("s", &TIME).unwrap();
        }
        disk.qcow2().unwrap().make_empty().unwrap();
        assert!(support::contents(&disk) == below);
        drop(disk);
        check(&path, "emptied");
        assert!(raw_of(&path, None) == below);
        if snapshot {
            assert!(raw_of(&path, Some("s")) == model);
        }
    }
}

#[test]
fn snapshots_of_qemu_are_used_here() {
    for (options, seed) in OPTIONS.iter().zip(0x2222u64..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        create(&path, options);
        let mut model = vec![0; SIZE_BYTES as usize];
        scribble(&disk(&path), &mut model, seed);
        qemu_img(&["snapshot", "-c", "from qemu", name]);
        let first = model.clone();
        scribble(&disk(&path), &mut model, seed + 1);
        let image = open_image(&path);
        let list = image.snapshots().unwrap();
        assert_eq!((list.len(), list[0].name.as_slice(), list[0].disk_bytes), (1, &b"from qemu"[..], SIZE_BYTES));
        image.create_snapshot("ours", &TIME).unwrap();
        image.apply_snapshot("from qemu").unwrap();
        drop(image);
        check(&path, options);
        assert!(raw_of(&path, None) == first, "{options}");
        qemu_img(&["snapshot", "-a", "ours", name]);
        assert!(support::contents(&disk(&path)) == model, "{options}");
        qemu_img(&["snapshot", "-d", "ours", name]);
        open_image(&path).delete_snapshot("from qemu").unwrap();
        check(&path, options);
        assert!(raw_of(&path, None) == model, "{options}");
    }
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "refcount_bits=1");
    let mut model = vec![0; SIZE_BYTES as usize];
    scribble(&disk(&path), &mut model, 5);
    let before = std::fs::read(&path).unwrap();
    let image = open_image(&path);
    for (result, want) in [
        (image.create_snapshot("s", &TIME).map(|_| ()), "refcounts of this width"),
        (image.apply_snapshot("nothing"), "no snapshot has the name or number 'nothing'"),
        (image.delete_snapshot("nothing"), "no snapshot has the name or number 'nothing'"),
    ] {
        let error = result.unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(want), "{cause}");
    }
    drop(image);
    // An attempt may leave unused bytes behind the end, nothing else.
    assert_eq!(std::fs::read(&path).unwrap()[..before.len()], before);
    check(&path, "after refusals");
    assert!(raw_of(&path, None) == model);
    let long = "n".repeat(65536);
    create(&path, "cluster_size=64k");
    assert!(open_image(&path).create_snapshot(&long, &TIME).is_err());
    open_image(&path).create_snapshot(&long[..65535], &TIME).unwrap();
    check(&path, "a name of 65535 bytes");
}

#[test]
fn a_disk_of_no_bytes_has_snapshots_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "0"]);
    let image = open_image(&path);
    image.create_snapshot("s", &TIME).unwrap();
    image.create_snapshot_with_state("t", &TIME, &mut [].as_slice()).unwrap();
    assert!(image.add_bitmap("b", 65_536, true).is_err());
    drop(image);
    check(&path, "created");
    disk(&path).resize(1 << 20, false, block::Preallocation::Off).unwrap();
    disk(&path).write(4096, &[1; 512]).unwrap();
    check(&path, "grown");
    let image = open_image(&path);
    image.apply_snapshot("s").unwrap();
    image.delete_snapshot("t").unwrap();
    image.delete_snapshot("s").unwrap();
    image.make_empty().unwrap();
    drop(image);
    check(&path, "deleted");
    assert_eq!(disk(&path).size_bytes(), 0);
}

#[test]
fn the_state_of_a_machine_comes_back() {
    for options in OPTIONS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, options);
        let mut model = vec![0; SIZE_BYTES as usize];
        scribble(&disk(&path), &mut model, 7);
        // Data, zeroes in whole clusters, and an end inside one.
        let mut state: Vec<u8> = (0..400_000u32).map(|i| (i / 70) as u8).collect();
        state[70_000..340_000].fill(0);
        let image = open_image(&path);
        image.create_snapshot("plain", &TIME).unwrap();
        let time = SnapshotTime { vm_clock_nsec: 3_723_000_000_000, ..TIME };
        let id = image.create_snapshot_with_state("running", &time, &mut state.as_slice()).unwrap();
        assert_eq!(id, "2", "{options}");
        drop(image);
        check(&path, options);
        let list = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]);
        assert!(list.contains("391 KiB") && list.contains("0001:02:03.000"), "{options}: {list}");
        assert!(raw_of(&path, Some("running")) == model && raw_of(&path, None) == model, "{options}");
        let read = |image: &Qcow2Image| {
            let mut back = vec![1; state.len() + 100];
            assert_eq!(image.read_vm_state("running", 0, &mut back).unwrap(), state.len(), "{options}");
            assert!(back[..state.len()] == state, "{options}");
            let mut part = [0; 10];
            assert_eq!(image.read_vm_state("running", 399_995, &mut part).unwrap(), 5);
            assert_eq!(part[..5], state[399_995..]);
            assert_eq!(image.read_vm_state("running", 1 << 40, &mut part).unwrap(), 0);
            assert_eq!(image.read_vm_state("plain", 0, &mut part).unwrap(), 0);
            assert!(image.read_vm_state("nothing", 0, &mut part).is_err());
        };
        read(&open_image(&path));
        scribble(&disk(&path), &mut model, 8);
        qemu_img(&["snapshot", "-a", "running", path.to_str().unwrap()]);
        check(&path, options);
        // The disk carries the state now; it stays out of sight, also when the disk grows.
        let disk = disk(&path);
        let now = support::contents(&disk);
        if !options.contains("0.10") {
            disk.resize(SIZE_BYTES * 2, false, block::Preallocation::Off).unwrap();
            let grown = support::contents(&disk);
            assert!(grown[..now.len()] == now && grown[now.len()..].iter().all(|byte| *byte == 0), "{options}");
        }
        drop(disk);
        check(&path, options);
        read(&open_image(&path));
        let image = open_image(&path);
        image.delete_snapshot("running").unwrap();
        image.delete_snapshot("plain").unwrap();
        drop(image);
        check(&path, options);
    }
}

/// One operation on an image in memory, cut at every write: the disk and the list of snapshots are those from before
/// or those from after, and no refcount or flag is wrong, not even by a leak.
fn cut_everywhere(options: &str, prepare: &dyn Fn(&Qcow2Image), operate: &dyn Fn(&Qcow2Image)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, options);
    let mut model = vec![0; SIZE_BYTES as usize];
    scribble(&disk(&path), &mut model, 77);
    let image = open_image(&path);
    prepare(&image);
    drop(image);
    scribble(&disk(&path), &mut model, 78);
    let start = Pages::load(&path);
    let file = MemFile::of(start.clone());
    let image = Qcow2Image::open_backend(file.layer(Format::Qcow2), false).unwrap();
    operate(&image);
    drop(image);
    let log = file.0.lock().unwrap().log.clone();
    let (before, after) = (state(&start), state(&file.0.lock().unwrap().pages));
    assert!(before != after, "{options}: nothing happened");
    support::every_cut(&start, &log, &mut |torn, what, closer| {
        let report = torn.check();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options} {what}: {:?}", report.findings);
        let now = state(torn);
        assert!(now == before || now == after, "{options} {what}");
        if closer {
            torn.store(&path);
            check(&path, &format!("{options} {what}"));
        }
    });
}

/// Disk and snapshots.
fn state(pages: &Pages) -> (Vec<u8>, Vec<Vec<u8>>) {
    let file = MemFile::of(pages.clone());
    let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
    let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &opts).unwrap();
    let names = disk.qcow2().unwrap().snapshots().unwrap().into_iter().map(|snapshot| snapshot.name).collect();
    (support::contents(&disk), names)
}

#[test]
fn any_cut_leaves_the_state_before_or_after() {
    for options in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=1k,refcount_bits=64"]
    {
        let snapshot = |image: &Qcow2Image| {
            image.create_snapshot("first", &TIME).unwrap();
        };
        cut_everywhere(options, &|_| {}, &snapshot);
        cut_everywhere(options, &snapshot, &|image| {
            image.create_snapshot("second", &TIME).unwrap();
        });
        cut_everywhere(options, &snapshot, &|image| image.apply_snapshot("first").unwrap());
        cut_everywhere(options, &snapshot, &|image| {
            image.create_snapshot_with_state("running", &TIME, &mut [7; 9000].as_slice()).unwrap();
        });
        cut_everywhere(options, &snapshot, &|image| image.delete_snapshot("first").unwrap());
    }
}
