//! Compressed writes, read back by qemu-img; and what happens to clusters that several streams share.

mod support;

use block::{BlockError, Disk, Format, OpenOptions};
use support::{MemFile, Pages, Rng, open_disk, qemu_check, qemu_img, qemu_raw};

const SIZE_BYTES: u64 = (2 << 20) + 512;

const OPTIONS: [&str; 7] = [
    "cluster_size=64k",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,compat=0.10",
    "cluster_size=2M,compression_type=zstd,refcount_bits=64",
    "cluster_size=32k,extended_l2=on",
];

/// Text-like bytes, with noise in every seventh cluster of 4 KiB.
fn contents(seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let noisy = |at: u64| (at >> 12) % 7 == 3;
    (0..SIZE_BYTES).map(|at| if noisy(at) { rng.next() as u8 } else { (at / 31 + seed) as u8 & 0x3f }).collect()
}

/// Stores the clusters for which `take` says so; those that do not shrink as they are.
fn store(disk: &Disk, plain: &[u8], take: &(dyn Fn(u64) -> bool + Sync)) {
    let cluster_bytes = disk.cluster_bytes();
    let mut packed = Vec::new();
    for (index, cluster) in (0..).zip(plain.chunks(cluster_bytes as usize)) {
        let at = index * cluster_bytes;
        if !take(index) {
            continue;
        }
        if disk.pack(cluster, &mut packed).unwrap() {
            disk.write_packed(at, &packed, cluster.len() as u64).unwrap();
        } else {
            disk.write(at, cluster).unwrap();
        }
    }
}

#[test]
fn qemu_reads_what_several_threads_compress() {
    for (options, seed) in OPTIONS.iter().zip(3u64..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
        let plain = contents(seed);
        let disk = open_disk(&path);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (disk, plain) = (&disk, &plain);
                scope.spawn(move || store(disk, plain, &move |index| index % 4 == thread));
            }
        });
        disk.flush().unwrap();
        assert!(support::contents(&open_disk(&path)) == plain, "{options}");
        drop(disk);
        qemu_check(&path, options);
        assert!(qemu_raw(&path) == plain, "{options}");
        let stored = std::fs::metadata(&path).unwrap().len();
        if options.contains("64k") {
            assert!(stored < SIZE_BYTES / 2, "{options}: {stored} bytes");
        }
    }
}

#[test]
fn streams_are_replaced_written_over_and_given_back() {
    for (options, seed) in OPTIONS.iter().zip(30u64..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
        let disk = open_disk(&path);
        let mut model = contents(seed);
        store(&disk, &model, &|_| true);
        let mut rng = Rng(seed);
        for round in 0..6u64 {
            let other = contents(seed + round);
            let cluster = disk.cluster_bytes() as usize;
            let chosen = rng.below(3);
            store(&disk, &other, &|index| index % 3 == chosen);
            for (index, part) in model.chunks_mut(cluster).enumerate() {
                if index as u64 % 3 == chosen {
                    part.copy_from_slice(&other[index * cluster..][..part.len()]);
                }
            }
            let at = rng.below(SIZE_BYTES / 512) * 512;
            disk.write(at, &[7; 512]).unwrap();
            model[at as usize..at as usize + 512].fill(7);
            let bytes = (SIZE_BYTES - at).min(rng.below(400) * 512);
            disk.write_zeroes(at, bytes, true).unwrap();
            model[at as usize..(at + bytes) as usize].fill(0);
            if round % 2 == 0 {
                disk.flush().unwrap();
            }
        }
        drop(disk);
        qemu_check(&path, options);
        assert!(qemu_raw(&path) == model, "{options}");
    }
}

#[test]
fn a_cut_among_compressed_writes_damages_nothing() {
    for options in ["cluster_size=4k", "cluster_size=512,compression_type=zstd", "cluster_size=4k,refcount_bits=2"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "256k"]);
        let start = Pages::load(&path);
        let file = MemFile::of(start.clone());
        let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
        let plain = &contents(1)[..256 << 10];
        store(&disk, plain, &|index| index % 2 == 0);
        disk.flush().unwrap();
        let flushed = file.0.lock().unwrap().log.len();
        store(&disk, &contents(2)[..256 << 10], &|index| index % 3 != 0);
        drop(disk);
        let log = file.0.lock().unwrap().log.clone();
        let mut states = 0;
        support::every_cut(&start, &log, &mut |torn, what, _| {
            let report = torn.check();
            assert_eq!(report.corruptions, 0, "{options} {what}: {:?}", report.findings);
            states += 1;
            // What was flushed and not written since is there.
            if states > 3 * flushed && states % 7 == 0 {
                let file = MemFile::of(torn.clone());
                let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
                let cluster = disk.cluster_bytes() as usize;
                let now = support::contents(&disk);
                for index in (0..(256 << 10) / cluster).filter(|index| index % 6 == 0) {
                    let range = index * cluster..(index + 1) * cluster;
                    assert!(now[range.clone()] == plain[range], "{options} {what}: cluster {index}");
                }
            }
        });
    }
}

#[test]
fn a_part_of_a_cluster_is_not_packed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "131584"]);
    let disk = open_disk(&path);
    disk.write(0, &[5; 131584]).unwrap();
    let plain = [9; 65536];
    let mut packed = Vec::new();
    assert!(disk.pack(&plain[..512], &mut packed).unwrap());
    for (offset, bytes) in [(0, 512), (512, 65536), (0, 65535), (65536, 512)] {
        let ways = [disk.write_packed(offset, &packed, bytes as u64), disk.write_compressed(offset, &plain[..bytes])];
        for done in ways {
            assert!(matches!(done, Err(BlockError::PartialCluster { .. })), "{offset} {bytes}: {done:?}");
        }
    }
    let mut held = vec![0; 131584];
    disk.read(0, &mut held).unwrap();
    assert!(held == [5; 131584]);
    disk.write_compressed(65536, &plain).unwrap();
    disk.write_compressed(131072, &plain[..512]).unwrap();
    disk.read(0, &mut held).unwrap();
    assert!(held[..65536] == [5; 65536] && held[65536..].iter().all(|byte| *byte == 9));
}
