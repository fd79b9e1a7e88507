//! Power cuts. Every write of a random workload is recorded; the file is rebuilt as a cut at any point could
//! have left it, and must then be consistent (leaks allowed) and hold everything that was flushed.

mod support;

use std::path::Path;

use block::{Disk, Format, OpenOptions};
use support::{MemFile, Op, Pages, Rng, apply_torn, qemu_img, qemu_img_status};

const SIZE_BYTES: u64 = 1 << 20;
const SECTORS: u64 = SIZE_BYTES / 512;

struct Case {
    create: &'static str,
    backing: bool,
    snapshot: bool,
    l2_cache_bytes: u64,
}

/// What one sector held over time: (log position when the write began, version). A sector of version v is
/// filled with v.
struct History {
    versions: Vec<Vec<(usize, u64)>>,
    /// Log positions at which a flush had returned.
    flushed: Vec<usize>,
}

impl History {
    /// Whether a cut at `cut` may leave this version: the last one before the last flush, or any after it.
    fn allows(&self, sector: u64, version: u64, cut: usize) -> bool {
        let flushed = self.flushed.iter().copied().filter(|at| *at <= cut).max().unwrap_or(0);
        let versions = &self.versions[sector as usize];
        let safe = versions.iter().rev().find(|(at, _)| *at < flushed || *at == 0).map_or(0, |(_, v)| *v);
        version == safe || versions.iter().any(|(at, v)| *v == version && *at >= flushed && *at <= cut)
    }
}

#[test]
fn any_cut_leaves_a_consistent_image() {
    let cases = [
        Case { create: "cluster_size=512", backing: false, snapshot: false, l2_cache_bytes: 1 << 20 },
        Case { create: "cluster_size=512,refcount_bits=64", backing: true, snapshot: false, l2_cache_bytes: 0 },
        Case { create: "cluster_size=4k,compat=0.10", backing: true, snapshot: false, l2_cache_bytes: 0 },
        Case { create: "cluster_size=1k,refcount_bits=8", backing: false, snapshot: true, l2_cache_bytes: 1 << 20 },
        Case { create: "cluster_size=4k,preallocation=metadata", backing: false, snapshot: true, l2_cache_bytes: 0 },
        Case { create: "cluster_size=64k", backing: true, snapshot: false, l2_cache_bytes: 1 << 20 },
        Case { create: "cluster_size=16k,extended_l2=on", backing: true, snapshot: false, l2_cache_bytes: 0 },
        Case { create: "cluster_size=16k,extended_l2=on", backing: false, snapshot: true, l2_cache_bytes: 1 << 20 },
    ];
    for (case, seed) in cases.iter().zip(0x51_7cc1u64..) {
        run(case, seed);
    }
}

fn version_bytes(version: u64) -> Vec<u8> {
    (0..64).flat_map(|_| version.to_le_bytes()).collect()
}

fn run(case: &Case, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top.qcow2");
    let name = path.to_str().unwrap().to_owned();
    let base = MemFile::default();
    let mut history = History { versions: vec![vec![(0, 0)]; SECTORS as usize], flushed: Vec::new() };
    let mut next_version = 1;
    let size = SIZE_BYTES.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", case.create];
    if case.backing {
        std::fs::write(dir.path().join("base.raw"), []).unwrap();
        args.extend(["-u", "-b", "base.raw", "-F", "raw"]);
        for (sector, versions) in (0..SECTORS).zip(&mut history.versions) {
            base.0.lock().unwrap().pages.write(sector * 512, &version_bytes(next_version));
            *versions = vec![(0, next_version)];
            next_version += 1;
        }
    }
    args.extend([name.as_str(), &size]);
    qemu_img(&args);
    if case.snapshot {
        let disk = support::open_chain(&[(&path, Format::Qcow2)], &OpenOptions::default());
        for sector in (0..SECTORS).step_by(3) {
            disk.write(sector * 512, &version_bytes(next_version)).unwrap();
            history.versions[sector as usize] = vec![(0, next_version)];
            next_version += 1;
        }
        drop(disk);
        qemu_img(&["snapshot", "-c", "s", &name]);
    }
    let start = Pages::load(&path);
    let file = MemFile::of(start.clone());
    let opts = OpenOptions { l2_cache_bytes: case.l2_cache_bytes, ..OpenOptions::default() };
    let mut layers = vec![file.layer(Format::Qcow2)];
    if case.backing {
        layers.push(base.layer(Format::Raw));
    }
    let disk = Disk::open_backends(layers, &opts).unwrap();
    let mut rng = Rng(seed);
    for step in 0..120 {
        request(&disk, &file, &mut history, &mut next_version, &mut rng);
        if step % 17 == 16 {
            disk.flush().unwrap();
            history.flushed.push(file.0.lock().unwrap().log.len());
        }
    }
    drop(disk);
    let log = file.0.lock().unwrap().log.clone();
    replay(case, &start, &log, &history, &base, seed, &path);
}

fn request(disk: &Disk, file: &MemFile, history: &mut History, next_version: &mut u64, rng: &mut Rng) {
    let began = file.0.lock().unwrap().log.len();
    let start = rng.below(SECTORS);
    let longest = if rng.below(6) == 0 { 300 } else { 20 };
    let count = (1 + rng.below(longest)).min(SECTORS - start);
    let sectors = start..start + count;
    match rng.below(6) {
        0..=3 => {
            let first = *next_version;
            let data: Vec<u8> = sectors.clone().flat_map(|s| version_bytes(first + s - start)).collect();
            disk.write(start * 512, &data).unwrap();
            for sector in sectors {
                history.versions[sector as usize].push((began, first + sector - start));
            }
            *next_version += count;
        }
        4 => {
            disk.write_zeroes(start * 512, count * 512, rng.below(2) == 0).unwrap();
            for sector in sectors {
                history.versions[sector as usize].push((began, 0));
            }
        }
        _ => {
            disk.discard(start * 512, count * 512).unwrap();
            let mut now = vec![0; (count * 512) as usize];
            disk.read(start * 512, &mut now).unwrap();
            for (sector, bytes) in sectors.zip(now.chunks(512)) {
                let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                if history.versions[sector as usize].last().unwrap().1 != version {
                    history.versions[sector as usize].push((began, version));
                }
            }
        }
    }
}

/// Cuts at every position of the log: once with everything before it in the file, once with what followed the
/// last barrier present in part and torn.
fn replay(case: &Case, start: &Pages, log: &[Op], history: &History, base: &MemFile, seed: u64, path: &Path) {
    let mut rng = Rng(seed ^ 0xabcdef);
    let mut all = start.clone();
    let mut synced = start.clone();
    let mut since = 0;
    for cut in 0..=log.len() {
        judge(case, &all, history, base, cut, &format!("{} seed {seed:#x} cut {cut}", case.create));
        for variant in 0..2 {
            let mut torn = synced.clone();
            for op in &log[since..cut] {
                apply_torn(&mut torn, op, &mut rng);
            }
            judge(case, &torn, history, base, cut, &format!("{} seed {seed:#x} cut {cut} torn {variant}", case.create));
            if cut % 97 == 50 && variant == 0 {
                torn.store(path);
                let (status, text) = qemu_img_status(&["check", "-f", "qcow2", path.to_str().unwrap()]);
                assert!(status == 0 || status == 3, "{} cut {cut}: {text}", case.create);
            }
        }
        if let Some(op) = log.get(cut) {
            all.apply(op);
            if matches!(op, Op::Sync) {
                synced = all.clone();
                since = cut + 1;
            }
        }
    }
}

fn judge(case: &Case, pages: &Pages, history: &History, base: &MemFile, cut: usize, what: &str) {
    let report = pages.check();
    assert_eq!(report.corruptions, 0, "{what}: {:?}", report.findings);
    let file = MemFile::of(pages.clone());
    let mut layers = vec![file.layer(Format::Qcow2)];
    if case.backing {
        layers.push(base.layer(Format::Raw));
    }
    let disk = Disk::open_backends(layers, &OpenOptions::default()).unwrap();
    let all = support::contents(&disk);
    for (sector, bytes) in (0..).zip(all.chunks(512)) {
        let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(bytes.chunks(8).all(|chunk| chunk == version.to_le_bytes()), "{what}: sector {sector} is torn");
        assert!(history.allows(sector, version, cut), "{what}: sector {sector} holds version {version}");
    }
    if cut % 31 == 7 {
        // Life goes on after the cut: writes may not hit anything that is in use.
        for sector in (0..SECTORS).step_by(5) {
            disk.write(sector * 512, &[0xee; 512]).unwrap();
        }
        disk.flush().unwrap();
        let all = support::contents(&disk);
        for (sector, bytes) in (0..).zip(all.chunks(512)) {
            let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if sector % 5 == 0 {
                assert_eq!(bytes, [0xee; 512], "{what}: sector {sector} after the cut");
            } else {
                assert!(history.allows(sector, version, cut), "{what}: sector {sector} changed after the cut");
            }
        }
        drop(disk);
        let report = file.0.lock().unwrap().pages.check();
        assert_eq!(report.corruptions, 0, "{what}, after more writes: {:?}", report.findings);
    }
}

#[test]
fn a_cut_while_refcounts_are_rebuilt_loses_nothing() {
    for options in ["lazy_refcounts=on,cluster_size=512,refcount_bits=64", "lazy_refcounts=on,cluster_size=4k"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "1M"]);
        let disk = support::open_chain(&[(&path, Format::Qcow2)], &OpenOptions::default());
        let data: Vec<u8> = (0..SECTORS / 2).flat_map(|sector| version_bytes(sector + 1)).collect();
        disk.write(0, &data).unwrap();
        drop(disk);
        let mut start = Pages::load(&path);
        start.write(72, &1u64.to_be_bytes());
        let mut block = [0; 8];
        start.read(48, &mut block);
        start.read(u64::from_be_bytes(block), &mut block);
        start.zero(u64::from_be_bytes(block), 256);
        let file = MemFile::of(start.clone());
        drop(Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap());
        let log = file.0.lock().unwrap().log.clone();
        assert!(log.len() > 4);
        let (mut synced, mut since, mut rng) = (start, 0, Rng(3));
        for cut in 0..=log.len() {
            let mut torn = synced.clone();
            for op in &log[since..cut] {
                apply_torn(&mut torn, op, &mut rng);
            }
            let file = MemFile::of(torn);
            let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
            disk.write(SIZE_BYTES - 4096, &[7; 4096]).unwrap();
            assert!(support::contents(&disk)[..data.len()] == data, "{options} cut {cut}");
            drop(disk);
            let report = file.0.lock().unwrap().pages.check();
            assert_eq!(report.corruptions, 0, "{options} cut {cut}: {:?}", report.findings);
            if matches!(log.get(cut), Some(Op::Sync)) {
                log[since..cut].iter().for_each(|op| synced.apply(op));
                since = cut + 1;
            }
        }
    }
}
