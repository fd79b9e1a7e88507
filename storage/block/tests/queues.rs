//! Eight queues on one image: writes that share clusters, discards, zeroes and flushes at once. Every thread knows
//! what its own blocks hold and looks all the time. In a last region all threads write, discard and read the same
//! blocks: what they find is zeroes or bytes that belong there. A cluster that went to a new owner too early would
//! show as bytes that belong elsewhere.

mod support;

use std::path::Path;

use block::{ChainBackend, Disk, Format, OpenOptions};
use support::{Rng, open_chain, qemu_img, slow};

const QUEUES: u64 = 8;
const BLOCK: u64 = 4096;
/// Blocks of one region.
const BLOCKS: u64 = 512;

/// The blocks of one queue with what they hold: a number repeated.
struct Queue {
    index: u64,
    rng: Rng,
    held: Vec<u64>,
}

impl Queue {
    /// Regions: in the first, neighbouring blocks belong to different queues, so that clusters are shared; in the
    /// second a queue has blocks in a row.
    fn offset(&self, slot: u64) -> u64 {
        let per_queue = BLOCKS / QUEUES;
        match slot < per_queue {
            true => (slot * QUEUES + self.index) * BLOCK,
            false => (BLOCKS + self.index * per_queue + slot - per_queue) * BLOCK,
        }
    }

    fn check(&self, disk: &Disk, slot: u64) {
        let mut bytes = vec![0; BLOCK as usize];
        disk.read(self.offset(slot), &mut bytes).unwrap();
        let want = self.held[slot as usize];
        let wrong = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).find(|word| *word != want);
        assert_eq!(wrong, None, "queue {} slot {slot} holds {want:#x}", self.index);
    }

    /// A request to the region where all queues do as they like.
    fn wild(&mut self, disk: &Disk) {
        let block = 2 * BLOCKS + self.rng.below(BLOCKS);
        let at = block * BLOCK;
        match self.rng.below(4) {
            0 => disk.write(at, &(block << 48 | 0xabcd).to_le_bytes().repeat(BLOCK as usize / 8)).unwrap(),
            1 => disk.discard(at, (64 * BLOCK).min(3 * BLOCKS * BLOCK - at)).unwrap(),
            _ => {
                let mut bytes = vec![0; BLOCK as usize];
                disk.read(at, &mut bytes).unwrap();
                let mut words = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
                let foreign = words.find(|word| *word != 0 && *word != (block << 48 | 0xabcd));
                assert_eq!(foreign, None, "block {block}");
            }
        }
    }

    fn step(&mut self, disk: &Disk, step: u64) {
        let per_queue = BLOCKS / QUEUES;
        let slot = self.rng.below(2 * per_queue);
        match self.rng.below(20) {
            0..=6 => {
                let value = (self.index + 1) << 32 | step << 8 | 1;
                disk.write(self.offset(slot), &value.to_le_bytes().repeat(BLOCK as usize / 8)).unwrap();
                self.held[slot as usize] = value;
            }
            7 => {
                disk.write_zeroes(self.offset(slot), BLOCK, self.rng.below(2) == 0).unwrap();
                self.held[slot as usize] = 0;
            }
            // In a row of blocks: whole clusters go.
            8 | 9 => {
                let first = per_queue + self.rng.below(per_queue);
                let count = (1 + self.rng.below(48)).min(2 * per_queue - first);
                disk.write_zeroes(self.offset(first), count * BLOCK, true).unwrap();
                disk.discard(self.offset(first), count * BLOCK).unwrap();
                self.held[first as usize..(first + count) as usize].fill(0);
            }
            10 if self.rng.below(4) == 0 => disk.flush().unwrap(),
            11..=16 => self.wild(disk),
            _ => self.check(disk, slot),
        }
    }
}

fn run(path: &Path, options: &str, steps: u64, seed: u64) {
    let size = (3 * BLOCKS * BLOCK).to_string();
    let _ = std::fs::remove_file(path);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size]);
    // A small cache, so that tables go and come.
    let file = Box::new(slow(path, 11, true));
    let layer = ChainBackend { file, path_label: path.to_owned(), format: Format::Qcow2, extents: Vec::new() };
    let disk = Disk::open_backends(vec![layer], &OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() }).unwrap();
    let queues: Vec<Queue> = (0..QUEUES)
        .map(|index| Queue { index, rng: Rng(seed + index), held: vec![0; (2 * BLOCKS / QUEUES) as usize] })
        .collect();
    let queues = std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .into_iter()
            .map(|mut queue| {
                let disk = &disk;
                scope.spawn(move || {
                    (0..steps).for_each(|step| queue.step(disk, step));
                    queue
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    disk.flush().unwrap();
    drop(disk);
    qemu_img(&["check", path.to_str().unwrap()]);
    let disk = open_chain(&[(path, Format::Qcow2)], &OpenOptions { read_only: true, ..OpenOptions::default() });
    for queue in &queues {
        (0..2 * BLOCKS / QUEUES).for_each(|slot| queue.check(&disk, slot));
    }
}

#[test]
fn no_queue_ever_sees_anothers_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let steps = if std::env::var_os("VIREO_TEST_LONG").is_some() { 50_000 } else { 2_000 };
    for (options, seed) in
        [("cluster_size=64k", 1), ("cluster_size=4k", 100), ("cluster_size=512,refcount_bits=8", 200)]
    {
        run(&dir.path().join("a.qcow2"), options, steps, seed);
    }
}
