//! Operations on an image while other threads use its disk: what a snapshot holds is one moment of the disk, and no
//! write is lost or reaches a snapshot.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{ChainBackend, Disk, Format, OpenOptions, Preallocation};
use support::{Rng, open_chain, qemu_check, qemu_img, qemu_raw, slow};

const THREADS: u64 = 4;
/// Each thread has a share of the disk.
const SHARE_BYTES: u64 = 1 << 20;

/// What a snapshot in the file holds.
fn snapshot(path: &Path, name: &str) -> Vec<u8> {
    let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
    let shown = open_chain(&[(path, Format::Qcow2)], &opts);
    shown.qcow2().unwrap().show_snapshot(name).unwrap();
    support::contents(&shown)
}

/// Writes rounds of numbers over the share of a thread: block after block holds the round's number. At any moment the
/// blocks up to some one hold a round, those behind it the round before.
fn write_rounds(disk: &Disk, thread: u64, block: u64, stop: &AtomicBool) -> u64 {
    let mut round = 0u64;
    let mut rng = Rng(thread + 1);
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let data: Vec<u8> = round.to_le_bytes().repeat(block as usize / 8);
        for at in (0..SHARE_BYTES).step_by(block as usize) {
            disk.write(thread * SHARE_BYTES + at, &data).unwrap();
            if rng.below(40) == 0 {
                disk.flush().unwrap();
            }
        }
    }
    round
}

/// Whether a share is one moment of its rounds; returns the last round seen in it.
fn moment(share: &[u8], block: usize, what: &str) -> u64 {
    let mut last: Option<u64> = None;
    let mut steps = 0;
    let mut first = 0;
    for part in share.chunks(block) {
        let round = u64::from_le_bytes(part[..8].try_into().unwrap());
        assert!(part.chunks(8).all(|word| word == round.to_le_bytes()), "{what}: a block is torn");
        match last {
            None => first = round,
            Some(before) if before == round => {}
            Some(before) => {
                assert_eq!(before, round + 1, "{what}: block of round {round} behind one of {before}");
                steps += 1;
            }
        }
        last = Some(round);
    }
    assert!(steps <= 1, "{what}: {steps} steps");
    first
}

#[test]
fn snapshots_of_a_busy_disk_are_moments_of_it() {
    for (options, block) in
        [("cluster_size=4k", 4096), ("cluster_size=64k", 512), ("cluster_size=16k,extended_l2=on", 2048)]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let size = (THREADS * SHARE_BYTES).to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size]);
        let file = Box::new(slow(&path, 13, false));
        let layer = ChainBackend { file, extents: Vec::new(), path_label: path.clone(), format: Format::Qcow2 };
        let disk = Disk::open_backends(vec![layer], &OpenOptions::default()).unwrap();
        let mut taken = Vec::new();
        let stop = AtomicBool::new(false);
        let image = disk.qcow2().unwrap();
        image.add_bitmap("b", 65_536, true).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (disk, stop) = (&disk, &stop);
                scope.spawn(move || write_rounds(disk, thread, block, stop));
            }
            for index in 0..12u64 {
                let name = format!("s{index}");
                image.create_snapshot(&name, &Default::default()).unwrap();
                taken.push((snapshot(&path, &name), name));
                if index % 3 == 2 {
                    image.delete_snapshot(&format!("s{}", index - 1)).unwrap();
                }
                let larger = THREADS * SHARE_BYTES + (index % 2) * 65_536;
                disk.resize(larger, true, Preallocation::Off).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        disk.flush().unwrap();
        let now = support::contents(&disk);
        drop(image);
        drop(disk);
        qemu_check(&path, options);
        assert!(qemu_raw(&path) == now, "{options}");
        let names = support::open_image(&path).snapshots().unwrap();
        assert_eq!(names.len(), 8, "{options}");
        taken.retain(|(_, name)| names.iter().any(|snapshot| snapshot.name == name.as_bytes()));
        let mut before = vec![0; THREADS as usize];
        for (at_first, name) in taken {
            let all = snapshot(&path, &name);
            assert!(all == at_first, "{options} {name}: changed after it was taken");
            for (share, before) in all.chunks(SHARE_BYTES as usize).zip(&mut before) {
                let round = moment(share, block as usize, &format!("{options} {name}"));
                assert!(round >= *before, "{options} {name}: time goes backwards");
                *before = round;
            }
        }
    }
}
