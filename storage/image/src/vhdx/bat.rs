//! The block allocation table: payload entries, with an entry for a sector bitmap behind each chunk of them.
//! [MS-VHDX] 2.5.

use super::{ALIGN_BYTES, Metadata, Region, Regions, VhdxError};

const STATE_MASK: u64 = 7;
const OFFSET_MASK: u64 = !(ALIGN_BYTES - 1);
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
pub(super) const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULLY_PRESENT: u64 = 6;

/// What a BAT entry says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Nothing was written; it reads as zeroes.
    Absent,
    /// Zeroes were written.
    Zero,
    /// Its data is at this file offset, a multiple of 1 MiB.
    At(u64),
}

/// The arithmetic and the rules of a disk's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bat {
    /// Where the table is; all entries that the disk needs lie inside.
    pub region: Region,
    block_bytes: u64,
    /// Payload entries in front of each sector bitmap entry.
    chunk_ratio: u64,
    /// Parts of the file where no block can be.
    occupied: [Region; 3],
}

impl Bat {
    /// The table of a disk. It must have room for every block.
    pub fn new(metadata: &Metadata, regions: &Regions, log: Region) -> Result<Bat, VhdxError> {
        let block_bytes = u64::from(metadata.block_bytes);
        let chunk_ratio = chunk_ratio(metadata.logical_sector_bytes, metadata.block_bytes);
        let bat = Bat { region: regions.bat, block_bytes, chunk_ratio, occupied: [log, regions.bat, regions.metadata] };
        let blocks = metadata.size_bytes.div_ceil(block_bytes);
        let want = blocks.checked_sub(1).map_or(0, |last| bat.index(last) + 1);
        let have = regions.bat.bytes / 8;
        if want > have { Err(VhdxError::BatTooSmall { have, want }) } else { Ok(bat) }
    }

    /// Number of the entry for a block, counting sector bitmap entries.
    pub fn index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// What an entry says.
    pub fn block(&self, block: u64, raw: u64, file_bytes: u64) -> Result<Block, VhdxError> {
        match raw & STATE_MASK {
            NOT_PRESENT | UNDEFINED | UNMAPPED => Ok(Block::Absent),
            ZERO => Ok(Block::Zero),
            FULLY_PRESENT => {
                let offset = raw & OFFSET_MASK;
                let clash = self.occupied.iter().any(|region| region.touches(offset, self.block_bytes));
                if offset < ALIGN_BYTES || offset >= file_bytes || clash {
                    return Err(VhdxError::BlockPlace { block, offset, file_bytes });
                }
                Ok(Block::At(offset))
            }
            _ => Err(VhdxError::BlockState { block, raw }),
        }
    }

    /// The entry that says where a block is: `offset` is a multiple of 1 MiB.
    pub fn entry_at(offset: u64) -> u64 {
        offset & OFFSET_MASK | FULLY_PRESENT
    }

    /// The entry that says that a block reads as zeroes.
    pub fn entry_zero() -> u64 {
        ZERO
    }
}

/// Payload entries in a chunk: 2^23 sectors divided by the block size.
pub(super) fn chunk_ratio(logical_sector_bytes: u32, block_bytes: u32) -> u64 {
    (u64::from(logical_sector_bytes) << 23) / u64::from(block_bytes)
}

#[cfg(test)]
fn sample(block_bytes: u32, logical_sector_bytes: u32, size_bytes: u64, bat_bytes: u64) -> Result<Bat, VhdxError> {
    let metadata = Metadata { block_bytes, logical_sector_bytes, size_bytes, ..super::metadata::sample() };
    let region = |mib: u64, bytes| Region { offset: mib << 20, bytes };
    let regions = Regions { bat: region(2, bat_bytes), metadata: region(1000, 1 << 20) };
    Bat::new(&metadata, &regions, region(1, 1 << 20))
}

#[test]
fn bitmap_entries_are_between_chunks() {
    // 2^23 * 512 / 1 MiB = 4096 blocks a chunk; 2^23 * 4096 / 256 MiB = 128.
    for (block_bytes, sector_bytes, block, index) in [
        (1 << 20, 512, 0, 0),
        (1 << 20, 512, 4095, 4095),
        (1 << 20, 512, 4096, 4097),
        (1 << 20, 512, 8192, 8194),
        (256 << 20, 4096, 127, 127),
        (256 << 20, 4096, 128, 129),
        (256 << 20, 512, 16, 17),
    ] {
        assert_eq!(sample(block_bytes, sector_bytes, 1 << 40, 16 << 20).unwrap().index(block), index);
    }
}

#[test]
fn cve_2014_0148_tables_that_do_not_cover_the_disk() {
    assert_eq!(
        sample(1 << 20, 512, 64 << 40, 1 << 20),
        Err(VhdxError::BatTooSmall { have: 131_072, want: (1 << 26) + (1 << 14) - 1 })
    );
    // 131072 entries: 31 chunks of 4096 with a bitmap each, and 4065 blocks.
    let most = ((31 << 12) + 4065u64) << 20;
    assert!(sample(1 << 20, 512, most, 1 << 20).is_ok());
    assert!(sample(1 << 20, 512, most + 512, 1 << 20).is_err());
    assert!(sample(1 << 20, 512, 0, 1 << 20).is_ok());
}

#[test]
fn entries() {
    let bat = sample(8 << 20, 512, 100 << 20, 1 << 20).unwrap();
    let file_bytes = 100 << 20;
    let place = |offset| Err(VhdxError::BlockPlace { block: 3, offset, file_bytes });
    for (raw, want) in [
        (0, Ok(Block::Absent)),
        (1, Ok(Block::Absent)),
        (2, Ok(Block::Zero)),
        (3 | 5 << 20, Ok(Block::Absent)),
        (6 | 4 << 20, Ok(Block::At(4 << 20))),
        (6 | 0xfff8 | 99 << 20, Ok(Block::At(99 << 20))),
        (6 | 100 << 20, place(100 << 20)),
        (6, place(0)),
        (6 | 2 << 20, place(2 << 20)),
        (!1, place(!0 << 20)),
        (7 | 4 << 20, Err(VhdxError::BlockState { block: 3, raw: 7 | 4 << 20 })),
        (4, Err(VhdxError::BlockState { block: 3, raw: 4 })),
        (5, Err(VhdxError::BlockState { block: 3, raw: 5 })),
    ] {
        assert_eq!(bat.block(3, raw, file_bytes), want, "{raw:#x}");
    }
    assert_eq!(bat.block(0, Bat::entry_at(4 << 20), file_bytes), Ok(Block::At(4 << 20)));
}
