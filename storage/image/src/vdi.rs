//! VirtualBox disks, version 1.1: a header, one entry of 4 bytes for each MiB of the disk, the blocks.
//! Little-endian. Not supported: undo and differencing images, and blocks of other sizes, as in QEMU.

use thiserror::Error;

use crate::bytes::{NewFile, bytes16, le32, le64, put};

/// Bytes of the header, padded to a sector.
pub const HEADER_BYTES: usize = 512;
/// The one block size in use.
pub const BLOCK_BYTES: u64 = 1 << 20;
/// File offset of the number of allocated blocks (u32), which a writer keeps up to date.
pub const ALLOCATED_OFFSET: u64 = 0x184;

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
const SECTOR_BYTES: u64 = 512;
const PAGE_BYTES: u64 = 4096;
const TEXT: &[u8] = b"<<< Vireo VM Virtual Disk Image >>>\n";
const TYPE_DYNAMIC: u32 = 1;
const TYPE_STATIC: u32 = 2;
/// QEMU's limit, so that both open the same images.
const BLOCKS_MAX: u32 = 0x3fff_ffff;
/// The largest disk that QEMU creates and opens.
pub const DISK_BYTES_MAX: u64 = 0x1_ffff_f800_0000;
const ENTRY_ABSENT: u32 = u32::MAX;
const ENTRY_ZERO: u32 = u32::MAX - 1;

/// Why a vdi is refused. Field names are VirtualBox's and QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum VdiError {
    #[error("the file is no vdi image: its signature is {0:#010x}, not 0xbeda107f")]
    Signature(u32),
    #[error("the vdi header is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { have_bytes: usize },
    #[error("vdi version {major}.{minor} is not supported; 1.1 is", major = .0 >> 16, minor = .0 & 0xffff)]
    Version(u32),
    #[error("image type {0} is not supported; 1 (dynamic) and 2 (static) are")]
    ImageType(u32),
    #[error("the image has a parent or a link to another image, which is not supported; merge it in VirtualBox first")]
    Linked,
    #[error("the sector size is {0}; it must be 512")]
    SectorSize(u32),
    #[error("the block size is {0}; it must be 1 MiB")]
    BlockSize(u32),
    #[error("blocks with {0} extra bytes are not supported")]
    BlockExtra(u32),
    #[error("Unsupported VDI image size (size is {0:#x}, max supported is {DISK_BYTES_MAX:#x})")]
    NewSize(u64),
    #[error("the image has {0} blocks; at most 1073741823 are allowed")]
    TooManyBlocks(u32),
    #[error("the disk has {size_bytes} bytes, more than its {blocks} blocks hold")]
    SizeBeyondBlocks { size_bytes: u64, blocks: u32 },
    #[error(
        "the block map at {offset:#x} with {bytes} bytes does not lie between the header and the data at {data_offset:#x}, inside the file of {file_bytes} bytes"
    )]
    BlockMap { offset: u32, bytes: u64, data_offset: u32, file_bytes: u64 },
    #[error("{field} is {offset:#x}; it must be a multiple of 512")]
    Unaligned { field: &'static str, offset: u32 },
    #[error("block {block} is said to be at position {position}; the image has {blocks} blocks")]
    Entry { block: u64, position: u32, blocks: u32 },
    #[error(
        "block {block} is said to be at {host:#x}, past the end of the file ({file_bytes} bytes); the image was truncated"
    )]
    BlockPastEnd { block: u64, host: u64, file_bytes: u64 },
    #[error("a disk of {0} bytes is too large for a vdi")]
    Size(u64),
}

/// A checked header: the block map lies inside the file, before the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk, rounded up to 512.
    pub size_bytes: u64,
    /// Number of blocks of the disk.
    pub blocks: u32,
    /// Number of blocks in the file, as the header says.
    pub allocated: u32,
    /// File offset of the block map.
    pub map_offset: u32,
    /// File offset of the first block.
    pub data_offset: u32,
    /// All blocks were allocated when the image was made.
    pub is_static: bool,
}

/// What an entry of the block map says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Never written: zeroes.
    Absent,
    /// Discarded: zeroes.
    Zero,
    /// Data at this position among the blocks of the file.
    At(u32),
}

impl Header {
    /// Parses the first [`HEADER_BYTES`] of a file of `file_bytes`.
    pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<Header, VdiError> {
        let cut = || VdiError::Truncated { have_bytes: bytes.len() };
        let u32_at = |at| le32(bytes, at).ok_or_else(cut);
        if u32_at(0x40)? != SIGNATURE {
            return Err(VdiError::Signature(u32_at(0x40)?));
        }
        if bytes.len() < HEADER_BYTES {
            return Err(cut());
        }
        if u32_at(0x44)? != VERSION {
            return Err(VdiError::Version(u32_at(0x44)?));
        }
        let image_type = u32_at(0x4c)?;
        if !matches!(image_type, TYPE_DYNAMIC | TYPE_STATIC) {
            return Err(VdiError::ImageType(image_type));
        }
        for (at, want, error) in [
            (0x168, SECTOR_BYTES as u32, VdiError::SectorSize as fn(u32) -> VdiError),
            (0x178, BLOCK_BYTES as u32, VdiError::BlockSize),
            (0x17c, 0, VdiError::BlockExtra),
        ] {
            if u32_at(at)? != want {
                return Err(error(u32_at(at)?));
            }
        }
        // UUIDs of the link and of the parent.
        if bytes16(bytes, 0x1a8) != Some([0; 16]) || bytes16(bytes, 0x1b8) != Some([0; 16]) {
            return Err(VdiError::Linked);
        }
        let size_bytes = le64(bytes, 0x170).ok_or_else(cut)?;
        let header = Header {
            size_bytes: size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or(VdiError::Size(size_bytes))?,
            blocks: u32_at(0x180)?,
            allocated: u32_at(ALLOCATED_OFFSET as usize)?,
            map_offset: u32_at(0x154)?,
            data_offset: u32_at(0x158)?,
            is_static: image_type == TYPE_STATIC,
        };
        header.check(file_bytes)?;
        Ok(header)
    }

    fn check(&self, file_bytes: u64) -> Result<(), VdiError> {
        if self.blocks > BLOCKS_MAX {
            return Err(VdiError::TooManyBlocks(self.blocks));
        }
        if self.size_bytes > u64::from(self.blocks) * BLOCK_BYTES {
            return Err(VdiError::SizeBeyondBlocks { size_bytes: self.size_bytes, blocks: self.blocks });
        }
        for (field, offset) in [("offset_bmap", self.map_offset), ("offset_data", self.data_offset)] {
            if !u64::from(offset).is_multiple_of(SECTOR_BYTES) {
                return Err(VdiError::Unaligned { field, offset });
            }
        }
        let bytes = u64::from(self.blocks) * 4;
        let end = u64::from(self.map_offset) + bytes;
        if (self.map_offset as usize) < HEADER_BYTES || end > u64::from(self.data_offset) || end > file_bytes {
            let (offset, data_offset) = (self.map_offset, self.data_offset);
            return Err(VdiError::BlockMap { offset, bytes, data_offset, file_bytes });
        }
        Ok(())
    }

    /// What the map says about `block`. A position must be one that the disk can have.
    pub fn block(&self, block: u64, raw: u32) -> Result<Block, VdiError> {
        match raw {
            ENTRY_ABSENT => Ok(Block::Absent),
            ENTRY_ZERO => Ok(Block::Zero),
            position if position < self.blocks => Ok(Block::At(position)),
            position => Err(VdiError::Entry { block, position, blocks: self.blocks }),
        }
    }

    /// File offset of the block at a position.
    pub fn host_offset(&self, position: u32) -> u64 {
        u64::from(self.data_offset) + u64::from(position) * BLOCK_BYTES
    }
}

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes; rounded up to 512.
    pub size_bytes: u64,
    /// Allocate all blocks.
    pub is_static: bool,
    /// Random identities of the image and of its last snapshot.
    pub uuids: [[u8; 16]; 2],
}

/// Lays out an empty image. Blocks start at a page of the host, so that writing one touches no page twice and
/// direct I/O needs no copy; qemu-img starts them right behind the map.
pub fn lay_out(new: &NewImage) -> Result<NewFile, VdiError> {
    if new.size_bytes > DISK_BYTES_MAX {
        return Err(VdiError::NewSize(new.size_bytes));
    }
    let too_large = VdiError::Size(new.size_bytes);
    let size_bytes = new.size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or(too_large.clone())?;
    let blocks = size_bytes.div_ceil(BLOCK_BYTES);
    let blocks = u32::try_from(blocks).ok().filter(|blocks| *blocks <= BLOCKS_MAX).ok_or(too_large.clone())?;
    let data_offset = (HEADER_BYTES as u64 + u64::from(blocks) * 4).next_multiple_of(PAGE_BYTES);
    let data_offset = u32::try_from(data_offset).map_err(|_| too_large)?;
    let mut header = vec![0; HEADER_BYTES];
    put(&mut header, 0, TEXT);
    let [image, snapshot] = new.uuids;
    for (at, field) in [
        (0x40, SIGNATURE),
        (0x44, VERSION),
        (0x48, 0x180), // header size, as VirtualBox counts it
        (0x4c, if new.is_static { TYPE_STATIC } else { TYPE_DYNAMIC }),
        (0x154, HEADER_BYTES as u32),
        (0x158, data_offset),
        (0x168, SECTOR_BYTES as u32),
        (0x178, BLOCK_BYTES as u32),
        (0x180, blocks),
        (0x184, if new.is_static { blocks } else { 0 }),
    ] {
        put(&mut header, at, &field.to_le_bytes());
    }
    put(&mut header, 0x170, &size_bytes.to_le_bytes());
    put(&mut header, 0x188, &image);
    put(&mut header, 0x198, &snapshot);
    let entry = |block: u32| if new.is_static { block } else { ENTRY_ABSENT };
    let map = (0..blocks).flat_map(|block| entry(block).to_le_bytes()).collect();
    let data_bytes = if new.is_static { u64::from(blocks) * BLOCK_BYTES } else { 0 };
    Ok(NewFile {
        pieces: vec![(0, header), (HEADER_BYTES as u64, map)],
        file_bytes: u64::from(data_offset) + data_bytes,
    })
}

#[cfg(test)]
fn sample(size_bytes: u64, is_static: bool) -> NewFile {
    lay_out(&NewImage { size_bytes, is_static, uuids: [[1; 16], [2; 16]] }).unwrap()
}

#[test]
fn a_new_image_has_the_fields_of_qemu_img() {
    // From hex dumps of qemu-img 10: 3000000 bytes, static and dynamic.
    let file = sample(3_000_000, true);
    assert_eq!(file.file_bytes, (3 << 20) + 4096);
    let want =
        Header { size_bytes: 3_000_320, blocks: 3, allocated: 3, map_offset: 512, data_offset: 4096, is_static: true };
    assert_eq!(Header::parse(&file.pieces[0].1, file.file_bytes), Ok(want));
    assert_eq!(file.pieces[1].1, b"\0\0\0\0\x01\0\0\0\x02\0\0\0");
    let file = sample(3 << 20, false);
    assert_eq!((file.file_bytes, file.pieces[1].1.as_slice()), (4096, &[0xff; 12][..]));
    assert_eq!(sample(0, false).file_bytes, 4096);
    for size_bytes in [u64::MAX, 1 << 60] {
        let new = NewImage { size_bytes, is_static: false, uuids: [[0; 16]; 2] };
        assert_eq!(lay_out(&new), Err(VdiError::NewSize(size_bytes)));
    }
    // The message is qemu-img's.
    let new = NewImage { size_bytes: 600 << 40, is_static: false, uuids: [[0; 16]; 2] };
    let want = "Unsupported VDI image size (size is 0x2580000000000, max supported is 0x1fffff8000000)";
    assert_eq!(lay_out(&new).unwrap_err().to_string(), want);
    assert!(lay_out(&NewImage { size_bytes: DISK_BYTES_MAX, ..new.clone() }).is_ok());
    assert!(lay_out(&NewImage { size_bytes: DISK_BYTES_MAX + 1, ..new }).is_err());
}

#[test]
fn each_field_is_held_to_its_limits() {
    let map = |offset, bytes, data_offset| VdiError::BlockMap { offset, bytes, data_offset, file_bytes: 4096 };
    let cases: &[(usize, &[u8], VdiError)] = &[
        (0x40, &[0x7e], VdiError::Signature(0xbeda_107e)),
        (0x44, &[2], VdiError::Version(0x0001_0002)),
        (0x4c, &[4], VdiError::ImageType(4)),
        (0x4c, &[0], VdiError::ImageType(0)),
        (0x154, &[1, 2], VdiError::Unaligned { field: "offset_bmap", offset: 513 }),
        (0x154, &[0, 0], map(0, 12, 4096)),
        (0x154, &[0, 0x10], map(4096, 12, 4096)),
        (0x158, &[1], VdiError::Unaligned { field: "offset_data", offset: 4097 }),
        (0x158, &[0, 0], map(512, 12, 0)),
        (0x168, &[0, 4], VdiError::SectorSize(1024)),
        (0x17c, &[1], VdiError::BlockExtra(1)),
        (0x1a8, &[1], VdiError::Linked),
        (0x1c7, &[1], VdiError::Linked),
        (0x170, &[0xff; 8], VdiError::Size(u64::MAX)),
        (0x170, &[1, 0, 0x30], VdiError::SizeBeyondBlocks { size_bytes: (3 << 20) + 512, blocks: 3 }),
    ];
    let file = sample(3 << 20, false);
    for (at, patch, want) in cases {
        let mut bytes = file.to_bytes();
        bytes[*at..*at + patch.len()].copy_from_slice(patch);
        assert_eq!(Header::parse(&bytes, file.file_bytes).as_ref(), Err(want), "patch at {at:#x}");
    }
    for cut in 0..HEADER_BYTES {
        assert!(Header::parse(&file.to_bytes()[..cut], file.file_bytes).is_err(), "cut at {cut}");
    }
}

#[test]
fn cve_2014_0144_block_size_and_block_count() {
    let file = sample(3 << 20, false);
    for (at, value, want) in [
        (0x178, 0u32, VdiError::BlockSize(0)),
        (0x178, 1 << 19, VdiError::BlockSize(1 << 19)),
        (0x180, 0x4000_0000, VdiError::TooManyBlocks(0x4000_0000)),
        (0x180, u32::MAX, VdiError::TooManyBlocks(u32::MAX)),
        // A map of almost 4 GiB, in a file of 4 KiB: refused before anything is allocated.
        (
            0x180,
            BLOCKS_MAX,
            VdiError::BlockMap { offset: 512, bytes: u64::from(BLOCKS_MAX) * 4, data_offset: 4096, file_bytes: 4096 },
        ),
    ] {
        let mut bytes = file.to_bytes();
        put(&mut bytes, at, &value.to_le_bytes());
        assert_eq!(Header::parse(&bytes, file.file_bytes), Err(want));
    }
}

#[test]
fn entries_stay_below_the_number_of_blocks() {
    let header = Header::parse(&sample(3 << 20, false).to_bytes(), 4096).unwrap();
    for (raw, want) in [
        (0, Ok(Block::At(0))),
        (2, Ok(Block::At(2))),
        (3, Err(VdiError::Entry { block: 7, position: 3, blocks: 3 })),
        (u32::MAX - 2, Err(VdiError::Entry { block: 7, position: u32::MAX - 2, blocks: 3 })),
        (u32::MAX - 1, Ok(Block::Zero)),
        (u32::MAX, Ok(Block::Absent)),
    ] {
        assert_eq!(header.block(7, raw), want, "{raw:#x}");
    }
    assert_eq!(header.host_offset(2), 4096 + (2 << 20));
}
