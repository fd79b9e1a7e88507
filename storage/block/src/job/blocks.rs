//! Which blocks of a disk a job has still to deal with.

use std::ops::Range;

/// A bit for each block of a disk.
pub(super) struct Blocks {
    block_bytes: u64,
    disk_bytes: u64,
    words: Vec<u64>,
    set: u64,
}

/// Most blocks that are told apart: 2 MiB of bits.
const BLOCKS_MAX: u64 = 1 << 24;

impl Blocks {
    /// None of a disk's blocks is set. Blocks are `block_bytes`, a power of two, or larger on a huge disk.
    pub(super) fn new(disk_bytes: u64, block_bytes: u64) -> Blocks {
        let mut block_bytes = block_bytes.max(512).next_power_of_two();
        while disk_bytes.div_ceil(block_bytes) > BLOCKS_MAX {
            block_bytes *= 2;
        }
        let words = vec![0; disk_bytes.div_ceil(block_bytes).div_ceil(64) as usize];
        Blocks { block_bytes, disk_bytes, words, set: 0 }
    }

    /// Size of a block.
    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Blocks that are set, in bytes, the last one counted as whole.
    pub(super) fn set_bytes(&self) -> u64 {
        self.set * self.block_bytes
    }

    /// The blocks that a range touches.
    pub(super) fn touched(&self, offset: u64, bytes: u64) -> Range<u64> {
        let end = offset.saturating_add(bytes).min(self.disk_bytes);
        if bytes == 0 || offset >= end { 0..0 } else { offset / self.block_bytes..end.div_ceil(self.block_bytes) }
    }

    /// The bytes of some blocks.
    pub(super) fn bytes_of(&self, blocks: &Range<u64>) -> (u64, u64) {
        let start = blocks.start * self.block_bytes;
        (start, (blocks.end * self.block_bytes).min(self.disk_bytes).saturating_sub(start))
    }

    pub(super) fn is_set(&self, block: u64) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Sets blocks; returns how many were not.
    pub(super) fn set(&mut self, blocks: Range<u64>) -> u64 {
        let before = self.set;
        for block in blocks {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                self.set += u64::from(*word >> (block % 64) & 1 == 0);
                *word |= 1 << (block % 64);
            }
        }
        self.set - before
    }

    /// Clears a block.
    pub(super) fn clear(&mut self, block: u64) {
        if let Some(word) = self.words.get_mut((block / 64) as usize) {
            self.set -= *word >> (block % 64) & 1;
            *word &= !(1 << (block % 64));
        }
    }

    /// The first run of blocks that are set, at most `max` of them, from block `from` on.
    pub(super) fn first_run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let mut at = (from / 64) as usize;
        let mut word = self.words.get(at)? & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        let first = at as u64 * 64 + u64::from(word.trailing_zeros());
        let mut end = first + 1;
        while end - first < max && self.is_set(end) {
            end += 1;
        }
        Some(first..end)
    }
}

#[test]
fn blocks_are_found_as_they_were_set() {
    let mut blocks = Blocks::new(100 * 4096 + 512, 4096);
    assert_eq!(blocks.first_run(0, 10), None);
    assert_eq!(blocks.touched(4095, 2), 0..2);
    assert_eq!(blocks.touched(100 * 4096, u64::MAX), 100..101);
    assert_eq!((blocks.touched(5, 0), blocks.touched(1 << 40, 5)), (0..0, 0..0));
    assert_eq!(blocks.set(60..70), 10);
    assert_eq!(blocks.set(65..101), 31);
    assert_eq!(blocks.set_bytes(), 41 * 4096);
    assert_eq!(blocks.first_run(0, 3), Some(60..63));
    assert_eq!(blocks.first_run(64, 100), Some(64..101));
    (60..100).for_each(|block| blocks.clear(block));
    assert_eq!(blocks.first_run(0, 9), Some(100..101));
    assert_eq!(blocks.bytes_of(&(100..101)), (100 * 4096, 512));
    blocks.clear(100);
    assert_eq!((blocks.first_run(0, 9), blocks.set_bytes()), (None, 0));
}

#[test]
fn huge_disks_have_larger_blocks() {
    assert_eq!(Blocks::new(1 << 40, 65_536).block_bytes(), 65_536);
    assert_eq!(Blocks::new(1 << 44, 65_536).block_bytes(), 1 << 20);
}
