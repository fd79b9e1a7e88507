//! New images: headers, log, BAT, metadata, each at a multiple of 1 MiB, as qemu-img lays them out.

use super::bat::{ZERO, chunk_ratio};
use super::header::{FILE_SIGNATURE, HEADER_OFFSETS, REGION_OFFSETS};
use super::metadata::DISK_BYTES_MAX;
use super::{ALIGN_BYTES, Bat, Guid, Header, Metadata, Region, Regions, VhdxError};
use crate::bytes::{NewFile, put};

const CREATOR: &str = "Vireo";
const SECTOR_BYTES: u32 = 512;
const BLOCK_BYTES_MAX: u64 = 256 << 20;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes; rounded up to 512.
    pub size_bytes: u64,
    /// All blocks have their place in the file.
    pub fixed: bool,
    /// Bytes of a block: rounded up to 1 MiB, at most 256 MiB; 0 chooses by the disk's size.
    pub block_bytes: u64,
    /// Bytes of the log, rounded up to 1 MiB.
    pub log_bytes: u64,
    /// Blocks of a dynamic disk are marked as zeroes, not as absent.
    pub block_state_zero: bool,
    /// Random identities: of the file, of its contents, of the disk.
    pub guids: [Guid; 3],
}

/// The block size that qemu-img chooses.
fn default_block_bytes(size_bytes: u64) -> u64 {
    match size_bytes {
        size if size > 32 << 40 => 64 << 20,
        size if size > 100 << 30 => 32 << 20,
        size if size > 1 << 30 => 16 << 20,
        _ => 8 << 20,
    }
}

fn align(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(ALIGN_BYTES)
}

/// Lays out an empty image.
pub fn lay_out(new: &NewImage) -> Result<NewFile, VhdxError> {
    if new.size_bytes > DISK_BYTES_MAX {
        return Err(VhdxError::Size(new.size_bytes));
    }
    let size_bytes = new.size_bytes.next_multiple_of(SECTOR_BYTES.into());
    if new.log_bytes >= 4 << 30 || align(new.log_bytes) >= 4 << 30 {
        return Err(VhdxError::NewLogSize(new.log_bytes));
    }
    let block_bytes = match new.block_bytes {
        0 => default_block_bytes(size_bytes),
        asked if !asked.is_power_of_two() => return Err(VhdxError::NewBlockSize(asked)),
        asked => align(asked).min(BLOCK_BYTES_MAX),
    };
    let blocks = size_bytes.div_ceil(block_bytes);
    let ratio = chunk_ratio(SECTOR_BYTES, block_bytes as u32);
    // QEMU subtracts in 32 bits, and opens no disk without blocks whose BAT is shorter than that makes it. It is a
    // hole of the file.
    let entries = blocks + if blocks == 0 { u64::from(u32::MAX) / ratio } else { (blocks - 1) / ratio };
    let log = Region { offset: ALIGN_BYTES, bytes: align(new.log_bytes) };
    let bat = Region { offset: log.offset + log.bytes, bytes: align(entries * 8) };
    let metadata_region = Region { offset: bat.offset + bat.bytes, bytes: ALIGN_BYTES };
    let data_offset = metadata_region.offset + metadata_region.bytes;
    let [file_write_guid, data_write_guid, disk_id] = new.guids;
    let metadata = Metadata {
        block_bytes: block_bytes as u32,
        leave_blocks_allocated: new.fixed,
        size_bytes,
        logical_sector_bytes: SECTOR_BYTES,
        physical_sector_bytes: SECTOR_BYTES,
        disk_id,
    };
    let header = |sequence| Header { sequence, file_write_guid, data_write_guid, log_guid: [0; 16], log }.serialise();
    let regions = Regions { bat, metadata: metadata_region }.serialise();
    let [first, second] = HEADER_OFFSETS;
    let [regions_first, regions_second] = REGION_OFFSETS;
    let mut pieces = vec![
        (0, identifier()),
        (first, header(1)),
        (second, header(2)),
        (regions_first, regions.clone()),
        (regions_second, regions),
    ];
    let entry = |block: u64| match (new.fixed, new.block_state_zero) {
        (true, _) => Bat::entry_at(data_offset + block * block_bytes),
        (false, true) => ZERO,
        (false, false) => 0,
    };
    if new.fixed || new.block_state_zero {
        pieces.push((bat.offset, bat_bytes(blocks, ratio, &entry)));
    }
    pieces.push((metadata_region.offset, metadata.serialise()));
    let data_bytes = if new.fixed { blocks * block_bytes } else { 0 };
    Ok(NewFile { pieces, file_bytes: data_offset + data_bytes })
}

/// Payload entries with an empty bitmap entry between chunks.
fn bat_bytes(blocks: u64, ratio: u64, entry: &dyn Fn(u64) -> u64) -> Vec<u8> {
    let mut out = Vec::new();
    for block in 0..blocks {
        if block > 0 && block % ratio == 0 {
            out.extend([0; 8]);
        }
        out.extend(entry(block).to_le_bytes());
    }
    out
}

/// The file identifier: signature, and the creator in UTF-16.
fn identifier() -> Vec<u8> {
    let mut out = vec![0; 8 + 512];
    put(&mut out, 0, FILE_SIGNATURE);
    let creator: Vec<u8> = CREATOR.encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut out, 8, &creator);
    out
}

#[cfg(test)]
fn plain(size_bytes: u64) -> NewImage {
    NewImage {
        size_bytes,
        fixed: false,
        block_bytes: 0,
        log_bytes: 1 << 20,
        block_state_zero: true,
        guids: [[1; 16], [2; 16], [3; 16]],
    }
}

#[test]
fn a_new_image_parses_and_covers_its_disk() {
    // Block sizes that qemu-img 10 chose.
    for (size_bytes, block_mib) in
        [(1 << 20, 8), (100 << 20, 8), (16u64 << 30, 16), (100 << 30, 16), (2 << 40, 32), (64 << 40, 64)]
    {
        for fixed in [false, true] {
            let file = lay_out(&NewImage { fixed, ..plain(size_bytes) }).unwrap();
            let mut start = vec![0; super::HEADERS_BYTES as usize];
            for (offset, bytes) in file.pieces.iter().take(5) {
                put(&mut start, *offset as usize, bytes);
            }
            let (header, index) = Header::current(&start, file.file_bytes).unwrap();
            assert_eq!((header.sequence, index, header.needs_replay()), (2, 1, false));
            let regions = Regions::parse(&start, header.log, file.file_bytes).unwrap();
            let metadata = Metadata::parse(&file.pieces.last().unwrap().1).unwrap();
            assert_eq!((metadata.block_bytes, metadata.size_bytes), (block_mib << 20, size_bytes));
            assert_eq!(metadata.leave_blocks_allocated, fixed);
            let bat = Bat::new(&metadata, &regions, header.log).unwrap();
            let entries = &file.pieces[5].1;
            let last = size_bytes.div_ceil(u64::from(metadata.block_bytes)) - 1;
            assert_eq!(entries.len() as u64, (bat.index(last) + 1) * 8);
            let raw = u64::from_le_bytes(entries[entries.len() - 8..].try_into().unwrap());
            let last_block = file.file_bytes.saturating_sub(metadata.block_bytes.into());
            let want = if fixed { super::Block::At(last_block) } else { super::Block::Zero };
            assert_eq!(bat.block(last, raw, file.file_bytes), Ok(want));
        }
    }
}

#[test]
fn options_are_rounded_and_refused_as_qemu_img_does_it() {
    let block_bytes = |asked| {
        let file = lay_out(&NewImage { block_bytes: asked, ..plain(1 << 30) });
        file.map(|file| Metadata::parse(&file.pieces.last().unwrap().1).unwrap().block_bytes)
    };
    assert_eq!(block_bytes(1), Ok(1 << 20));
    assert_eq!(block_bytes(32 << 20), Ok(32 << 20));
    assert_eq!(block_bytes(512 << 20), Ok(256 << 20));
    assert_eq!(block_bytes(3 << 20), Err(VhdxError::NewBlockSize(3 << 20)));
    let metadata_at = |log_bytes| lay_out(&NewImage { log_bytes, ..plain(1 << 20) }).map(|file| file.pieces[6].0);
    assert_eq!((metadata_at(0), metadata_at(1_000_000), metadata_at(5 << 20)), (Ok(3 << 20), Ok(3 << 20), Ok(7 << 20)));
    assert_eq!(metadata_at(4 << 30), Err(VhdxError::NewLogSize(4 << 30)));
    assert_eq!(lay_out(&plain(DISK_BYTES_MAX + 1)), Err(VhdxError::Size(DISK_BYTES_MAX + 1)));
}
