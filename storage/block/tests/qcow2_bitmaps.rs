//! Persistent bitmaps: what qemu-img adds records what is written here, and the reverse; a crash leaves none that lie.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use block::{Disk, Format, OpenOptions, Preallocation, Qcow2Image};
use support::{MemFile, Pages, open_disk, open_image, qemu_check, qemu_img};

const SIZE_BYTES: u64 = (8 << 20) + 512;

fn create(path: &Path, options: &str) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
}

/// Name, granularity and flags of each bitmap, as qemu-img tells.
fn qemu_bitmaps(path: &Path) -> Vec<(String, u64, String)> {
    let info = qemu_img(&["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()]);
    let Some(list) = info.split("\"bitmaps\": [").nth(1) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in list.split("\"flags\": [").skip(1) {
        let flags: String = entry.split(']').next().unwrap().split_whitespace().collect();
        let name = entry.split("\"name\": \"").nth(1).unwrap().split('"').next().unwrap().to_owned();
        let granularity = entry.split("\"granularity\": ").nth(1).unwrap();
        let granularity: String = granularity.chars().take_while(char::is_ascii_digit).collect();
        found.push((name, granularity.parse().unwrap(), flags));
        if entry.split(']').nth(1).is_some_and(|rest| rest.trim_start().starts_with('}') && rest.contains(']')) {
            break;
        }
    }
    found
}

/// The ranges that QEMU's NBD server says are dirty.
fn qemu_dirty(path: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    // A server that ends removes its socket, which must not be the next one's.
    static SERVERS: AtomicU32 = AtomicU32::new(0);
    let socket = path.with_extension(format!("sock{}", SERVERS.fetch_add(1, Ordering::Relaxed)));
    let args = ["-r", "-f", "qcow2", "-B", bitmap, "--fork", "-k", socket.to_str().unwrap(), path.to_str().unwrap()];
    let server = Command::new("qemu-nbd").args(args).stdout(Stdio::null()).status().unwrap();
    assert!(server.success());
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.to_str().unwrap()
    );
    let map = qemu_img(&["map", "--output=json", "--image-opts", &options]);
    let number = |line: &str, key: &str| -> u64 {
        let rest = line.split(&format!("\"{key}\": ")).nth(1).unwrap();
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    };
    let dirty = map.lines().filter(|line| line.contains("\"data\": false"));
    dirty.map(|line| (number(line, "start"), number(line, "length"))).collect()
}

#[test]
fn writes_here_are_seen_by_qemu() {
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=64k,extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        create(&path, options);
        qemu_img(&["bitmap", "--add", "-g", "64k", name, "on"]);
        qemu_img(&["bitmap", "--add", "-g", "4k", name, "fine"]);
        qemu_img(&["bitmap", "--add", "--disable", "-g", "64k", name, "off"]);
        let disk = open_disk(&path);
        disk.write(70_144, &[1; 512]).unwrap();
        disk.write_zeroes(1 << 20, 131_072, true).unwrap();
        disk.discard(2 << 20, 65_536).unwrap();
        disk.write(SIZE_BYTES - 512, &[2; 512]).unwrap();
        drop(disk);
        qemu_check(&path, options);
        let bitmaps = qemu_bitmaps(&path);
        let want = [("on", 65_536, "\"auto\""), ("fine", 4096, "\"auto\""), ("off", 65_536, "")];
        let want: Vec<_> =
            want.iter().map(|(name, bytes, flags)| (name.to_string(), *bytes, flags.to_string())).collect();
        assert_eq!(bitmaps, want, "{options}");
        let coarse = vec![(65_536, 65_536), (1 << 20, 131_072), (2 << 20, 65_536), (8 << 20, 512)];
        assert_eq!(qemu_dirty(&path, "on"), coarse, "{options}");
        assert_eq!(open_image(&path).bitmap_bits("on").unwrap().ranges(), coarse);
        let fine = vec![(69_632, 4096), (1 << 20, 131_072), (2 << 20, 65_536), (8 << 20, 512)];
        assert_eq!(qemu_dirty(&path, "fine"), fine, "{options}");
        assert_eq!(qemu_dirty(&path, "off"), [], "{options}");
    }
}

#[test]
fn writes_of_qemu_are_seen_here() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=64k");
    let image = open_image(&path);
    image.add_bitmap("b", 65_536, true).unwrap();
    image.add_bitmap("d", 1 << 31, false).unwrap();
    drop(image);
    let run =
        Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 1M 64k", "-c", "write 3M 1k"]).arg(&path).output();
    assert!(run.unwrap().status.success());
    let image = open_image(&path);
    assert_eq!(image.bitmap_bits("b").unwrap().ranges(), [(1 << 20, 65_536), (3 << 20, 65_536)]);
    assert_eq!(image.bitmap_bits("d").unwrap().ranges(), []);
    // Into a coarser one, and into a finer one.
    image.add_bitmap("fine", 512, false).unwrap();
    image.merge_bitmap("fine", &image.bitmap_bits("b").unwrap()).unwrap();
    image.merge_bitmap("d", &image.bitmap_bits("b").unwrap()).unwrap();
    assert_eq!(image.bitmap_bits("d").unwrap().ranges(), [(0, SIZE_BYTES)]);
    drop(image);
    qemu_check(&path, "merged");
    assert_eq!(qemu_dirty(&path, "fine"), [(1 << 20, 65_536), (3 << 20, 65_536)]);
    let image = open_image(&path);
    image.clear_bitmap("b").unwrap();
    image.enable_bitmap("b", false).unwrap();
    image.enable_bitmap("d", true).unwrap();
    image.remove_bitmap("fine").unwrap();
    drop(image);
    qemu_check(&path, "changed");
    let state: Vec<_> = qemu_bitmaps(&path).into_iter().map(|(name, _, flags)| (name, flags)).collect();
    assert_eq!(state, [("b".to_owned(), String::new()), ("d".to_owned(), "\"auto\"".to_owned())]);
    assert_eq!(qemu_dirty(&path, "b"), []);
    let image = open_image(&path);
    assert!(image.add_bitmap("b", 65_536, true).is_err(), "the name is taken");
    assert!(image.add_bitmap("x", 3000, true).is_err(), "no power of two");
    assert!(image.add_bitmap("x", 256, true).is_err());
    assert!(image.add_bitmap("", 65_536, true).is_err());
    assert!(image.add_bitmap(&"n".repeat(1024), 65_536, true).is_err());
    assert!(image.remove_bitmap("x").is_err());
    image.remove_bitmap("b").unwrap();
    image.remove_bitmap("d").unwrap();
    drop(image);
    qemu_check(&path, "removed");
    assert_eq!(qemu_bitmaps(&path), []);
    assert!(open_image(&path).bitmaps().unwrap().is_empty());
}

#[test]
fn bitmaps_follow_size_and_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=512");
    let disk = open_disk(&path);
    let image = disk.qcow2().unwrap();
    image.add_bitmap("b", 512, true).unwrap();
    disk.write(4096, &[1; 512]).unwrap();
    image.create_snapshot("s", &Default::default()).unwrap();
    disk.write(1 << 20, &[1; 512]).unwrap();
    disk.resize(64 << 20, false, Preallocation::Off).unwrap();
    disk.write(60 << 20, &[1; 512]).unwrap();
    assert_eq!(image.bitmap_bits("b").unwrap().ranges(), [(4096, 512), (1 << 20, 512), (60 << 20, 512)]);
    disk.resize(1 << 20, true, Preallocation::Off).unwrap();
    assert_eq!(image.bitmap_bits("b").unwrap().ranges(), [(4096, 512)]);
    image.apply_snapshot("s").unwrap();
    assert_eq!(image.bitmap_bits("b").unwrap().ranges(), [(0, SIZE_BYTES)]);
    drop(image);
    drop(disk);
    qemu_check(&path, "resized and applied");
    assert_eq!(qemu_dirty(&path, "b"), [(0, SIZE_BYTES)]);
}

#[test]
fn a_cut_leaves_no_bitmap_that_misses_a_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, "cluster_size=4k");
    let image = open_image(&path);
    image.add_bitmap("b", 65_536, true).unwrap();
    drop(image);
    let start = Pages::load(&path);
    let file = MemFile::of(start.clone());
    let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
    for at in [0u64, 1 << 20, 3 << 20] {
        disk.write(at, &[9; 4096]).unwrap();
        disk.flush().unwrap();
    }
    disk.qcow2().unwrap().add_bitmap("second", 4096, true).unwrap();
    disk.write(5 << 20, &[9; 4096]).unwrap();
    drop(disk);
    let log = file.0.lock().unwrap().log.clone();
    let mut trusted = 0;
    support::every_cut(&start, &log, &mut |torn, what, closer| {
        let report = torn.check();
        assert_eq!(report.corruptions, 0, "{what}: {:?}", report.findings);
        let layer = |pages: &Pages| MemFile::of(pages.clone()).layer(Format::Qcow2);
        let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
        let disk = Disk::open_backends(vec![layer(torn)], &opts).unwrap();
        let image = Qcow2Image::open_backend(layer(torn), true).unwrap();
        for bitmap in image.bitmaps().unwrap().iter().filter(|bitmap| bitmap.name == "b" && !bitmap.inconsistent) {
            trusted += 1;
            let ranges = image.bitmap_bits(&bitmap.name).unwrap().ranges();
            for at in [0u64, 1 << 20, 3 << 20, 5 << 20] {
                let mut now = [0; 1];
                disk.read(at, &mut now).unwrap();
                let marked = ranges.iter().any(|(start, bytes)| (*start..start + bytes).contains(&at));
                assert!(now[0] == 0 || marked, "{what}: {at} changed and is not marked");
            }
        }
        if closer {
            torn.store(&path);
            let (status, text) = support::qemu_img_status(&["check", "-f", "qcow2", path.to_str().unwrap()]);
            assert!(status == 0 || status == 3, "{what}: {text}");
        }
    });
    assert!(trusted > 0);
    // What was left inconsistent can only be removed.
    let mut pages = start;
    log[..log.len() / 3].iter().for_each(|op| pages.apply(op));
    let image = Qcow2Image::open_backend(MemFile::of(pages).layer(Format::Qcow2), false).unwrap();
    assert!(image.bitmaps().unwrap()[0].inconsistent);
    assert!(image.clear_bitmap("b").is_err() && image.bitmap_bits("b").is_err());
    image.remove_bitmap("b").unwrap();
    assert!(image.bitmaps().unwrap().is_empty());
}
