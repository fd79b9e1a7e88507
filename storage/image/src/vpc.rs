//! Virtual PC and Hyper-V disks (VHD): "Virtual Hard Disk Image Format Specification", October 2006. Big-endian.
//!
//! A footer of 512 bytes ends every file; a dynamic disk repeats it at the start, followed by a header and the
//! block allocation table (BAT). Each block has a bitmap in front. Not supported: differencing disks.
//!
//! Two fields give the size: the CHS geometry, to which Virtual PC rounds, and `current_size`, which newer
//! writers mean. The creator tag decides, as in QEMU.

use thiserror::Error;

use crate::bytes::{NewFile, put};
use crate::{be16, be32, be64};

/// Bytes of the footer.
pub const FOOTER_BYTES: usize = 512;
/// Bytes of the header of a dynamic disk.
pub const DYNAMIC_HEADER_BYTES: usize = 1024;
/// A BAT entry that says "no block".
pub const ENTRY_ABSENT: u32 = u32::MAX;

const SECTOR_BYTES: u64 = 512;
const COOKIE: &[u8] = b"conectix";
const DYNAMIC_COOKIE: &[u8] = b"cxsparse";
const TYPE_FIXED: u32 = 2;
const TYPE_DYNAMIC: u32 = 3;
const TYPE_DIFFERENCING: u32 = 4;
/// 2040 GiB: what 32 bits of sectors address, less the room of bitmaps and tables.
const SECTORS_MAX: u64 = 0xff00_0000;
const CHS_SECTORS_MAX: u64 = 65535 * 16 * 255;
const BLOCK_BYTES: u32 = 2 << 20;
const BAT_OFFSET: u64 = 3 * SECTOR_BYTES;
/// Creators that mean the geometry: Virtual PC, Virtual Server, QEMU without `force_size`. All others, such as
/// Hyper-V (`win `), Azure (`wa`), Disk2vhd (`d2v `) and QEMU with `force_size` (`qem2`), mean `current_size`.
const CHS_CREATORS: [&[u8; 4]; 3] = [b"vpc ", b"vs  ", b"qemu"];

/// Why a vpc image is refused. Field names are the specification's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum VpcError {
    #[error("the file is no vpc image: there is no cookie 'conectix' at its start or in its last 512 bytes")]
    Cookie,
    #[error("the {part} is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { part: &'static str, have_bytes: usize },
    #[error("the checksum of the {part} is {stored:#010x}, but its bytes give {computed:#010x}")]
    Checksum { part: &'static str, stored: u32, computed: u32 },
    #[error("file format version {0:#x} is not supported; 0x10000 is")]
    Version(u32),
    #[error("differencing disks are not supported; merge the disk with its parent first")]
    Differencing,
    #[error("disk type {0} is not supported; 2 (fixed) and 3 (dynamic) are")]
    DiskType(u32),
    #[error("the disk has {0} sectors; at most 2040 GiB are possible")]
    TooLarge(u64),
    #[error("the dynamic disk header does not start with 'cxsparse'")]
    DynamicCookie,
    #[error("the block size is {0}; it must be a power of two and at least 512")]
    BlockSize(u32),
    #[error("the block allocation table has {entries} entries, but a disk of {size_bytes} bytes needs {want}")]
    BatTooSmall { entries: u32, want: u64, size_bytes: u64 },
    #[error(
        "the block allocation table at {offset:#x} with {entries} entries does not lie inside the file of {file_bytes} bytes"
    )]
    BatPastEnd { offset: u64, entries: u32, file_bytes: u64 },
    #[error(
        "the fixed disk of {size_bytes} bytes and its footer are larger than the file of {file_bytes} bytes; the image was truncated"
    )]
    FixedTooShort { size_bytes: u64, file_bytes: u64 },
    #[error(
        "block {block} is said to be at sector {sector}, inside the tables of the image or past the end of the file ({file_bytes} bytes)"
    )]
    Entry { block: u64, sector: u32, file_bytes: u64 },
    #[error("the file would grow past 2 TiB, beyond what the block allocation table can address")]
    Full,
    #[error("a disk of {0} bytes is too large for a vpc image; at most 2040 GiB are possible")]
    Size(u64),
}

/// A checked footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Size of the disk in sectors, from the field that the creator means.
    pub sectors: u64,
    /// A dynamic disk's header offset; `None` for a fixed disk.
    pub dynamic_offset: Option<u64>,
    /// Which program made the image.
    pub creator: [u8; 4],
}

impl Footer {
    /// Parses a footer, or its copy at the start.
    pub fn parse(bytes: &[u8]) -> Result<Footer, VpcError> {
        if !bytes.starts_with(COOKIE) {
            return Err(VpcError::Cookie);
        }
        let bytes = sized(bytes, FOOTER_BYTES, "footer")?;
        let cut = || VpcError::Truncated { part: "footer", have_bytes: bytes.len() };
        let u32_at = |at| be32(bytes, at).ok_or_else(cut);
        check_sum(bytes, 64, "footer")?;
        if u32_at(12)? >> 16 != 1 {
            return Err(VpcError::Version(u32_at(12)?));
        }
        let dynamic_offset = match u32_at(60)? {
            TYPE_FIXED => None,
            TYPE_DYNAMIC => Some(be64(bytes, 16).ok_or_else(cut)?),
            TYPE_DIFFERENCING => return Err(VpcError::Differencing),
            other => return Err(VpcError::DiskType(other)),
        };
        let creator: [u8; 4] = bytes.get(28..32).and_then(|raw| raw.try_into().ok()).ok_or_else(cut)?;
        let by_bytes = be64(bytes, 48).ok_or_else(cut)? / SECTOR_BYTES;
        let by_chs = u64::from(be16(bytes, 56).ok_or_else(cut)?)
            * u64::from(*bytes.get(58).ok_or_else(cut)?)
            * u64::from(*bytes.get(59).ok_or_else(cut)?);
        // The largest geometry stands for everything above it.
        let sectors = if CHS_CREATORS.contains(&&creator) && by_chs != CHS_SECTORS_MAX { by_chs } else { by_bytes };
        if sectors > SECTORS_MAX {
            return Err(VpcError::TooLarge(sectors));
        }
        Ok(Footer { sectors, dynamic_offset, creator })
    }

    /// Size of the disk in bytes, at most 2040 GiB.
    pub fn size_bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// Checks that a fixed disk and its footer fit into the file.
    pub fn check_fixed(&self, file_bytes: u64) -> Result<(), VpcError> {
        if self.size_bytes() + FOOTER_BYTES as u64 <= file_bytes {
            return Ok(());
        }
        Err(VpcError::FixedTooShort { size_bytes: self.size_bytes(), file_bytes })
    }
}

/// The checked header of a dynamic disk: the table covers the disk and lies inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamicHeader {
    /// File offset of the table.
    pub bat_offset: u64,
    /// Entries of the table.
    pub entries: u32,
    /// Bytes of guest data in a block: a power of two, 512 to 2 GiB.
    pub block_bytes: u32,
}

impl DynamicHeader {
    /// Parses the header that `footer` points to.
    pub fn parse(bytes: &[u8], footer: &Footer, file_bytes: u64) -> Result<DynamicHeader, VpcError> {
        if !bytes.starts_with(DYNAMIC_COOKIE) {
            return Err(VpcError::DynamicCookie);
        }
        let bytes = sized(bytes, DYNAMIC_HEADER_BYTES, "dynamic disk header")?;
        let cut = || VpcError::Truncated { part: "dynamic disk header", have_bytes: bytes.len() };
        let u32_at = |at| be32(bytes, at).ok_or_else(cut);
        check_sum(bytes, 36, "dynamic disk header")?;
        if u32_at(24)? >> 16 != 1 {
            return Err(VpcError::Version(u32_at(24)?));
        }
        let header = DynamicHeader {
            bat_offset: be64(bytes, 16).ok_or_else(cut)?,
            entries: u32_at(28)?,
            block_bytes: u32_at(32)?,
        };
        if !header.block_bytes.is_power_of_two() || u64::from(header.block_bytes) < SECTOR_BYTES {
            return Err(VpcError::BlockSize(header.block_bytes));
        }
        let want = footer.size_bytes().div_ceil(u64::from(header.block_bytes));
        if want > u64::from(header.entries) {
            let (entries, size_bytes) = (header.entries, footer.size_bytes());
            return Err(VpcError::BatTooSmall { entries, want, size_bytes });
        }
        match header.bat_offset.checked_add(u64::from(header.entries) * 4) {
            Some(end) if end <= file_bytes => Ok(header),
            _ => Err(VpcError::BatPastEnd { offset: header.bat_offset, entries: header.entries, file_bytes }),
        }
    }

    /// Bytes of the bitmap in front of each block: whole sectors.
    pub fn bitmap_bytes(&self) -> u64 {
        (u64::from(self.block_bytes) / (8 * SECTOR_BYTES)).next_multiple_of(SECTOR_BYTES).max(SECTOR_BYTES)
    }

    /// Where the first block may start.
    pub fn data_offset(&self) -> u64 {
        (self.bat_offset + u64::from(self.entries) * 4).next_multiple_of(SECTOR_BYTES)
    }
}

fn sized<'a>(bytes: &'a [u8], want: usize, part: &'static str) -> Result<&'a [u8], VpcError> {
    bytes.get(..want).ok_or(VpcError::Truncated { part, have_bytes: bytes.len() })
}

/// The one's complement of the sum of all bytes, the checksum field itself taken as zero.
fn sum_of(bytes: &[u8], field_at: usize) -> u32 {
    let outside = |at: &usize| !(field_at..field_at + 4).contains(at);
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| outside(at))
        .fold(0u32, |sum, (_, b)| sum.wrapping_add(u32::from(*b)));
    !sum
}

fn check_sum(bytes: &[u8], at: usize, part: &'static str) -> Result<(), VpcError> {
    let stored = be32(bytes, at).ok_or(VpcError::Truncated { part, have_bytes: bytes.len() })?;
    let computed = sum_of(bytes, at);
    if stored == computed { Ok(()) } else { Err(VpcError::Checksum { part, stored, computed }) }
}

/// Cylinders, heads, sectors a track.
type Chs = (u64, u64, u64);

/// The geometry for a number of sectors: appendix "CHS Calculation". It holds at most that many.
fn geometry(sectors: u64) -> Chs {
    let sectors = sectors.min(CHS_SECTORS_MAX);
    if sectors > 65535 * 16 * 63 {
        return (sectors / 255 / 16, 16, 255);
    }
    let mut track_sectors = 17;
    let mut cylinder_heads = sectors / track_sectors;
    let mut heads = cylinder_heads.div_ceil(1024).max(4);
    if cylinder_heads >= heads * 1024 || heads > 16 {
        (track_sectors, heads) = (31, 16);
        cylinder_heads = sectors / track_sectors;
    }
    if cylinder_heads >= heads * 1024 {
        (track_sectors, heads) = (63, 16);
        cylinder_heads = sectors / track_sectors;
    }
    (cylinder_heads / heads, heads, track_sectors)
}

/// The first geometry that holds at least `sectors`, or the largest there is.
fn geometry_at_least(sectors: u64) -> Chs {
    let want = sectors.min(CHS_SECTORS_MAX);
    let mut probe = want;
    loop {
        let (cylinders, heads, track_sectors) = geometry(probe);
        if cylinders * heads * track_sectors >= want {
            return (cylinders, heads, track_sectors);
        }
        probe += 1;
    }
}

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes. Without `force_size` it grows to a CHS geometry.
    pub size_bytes: u64,
    /// Data and footer only.
    pub fixed: bool,
    /// Keep the size as it is, rounded up to 512.
    pub force_size: bool,
    /// Random identity.
    pub uuid: [u8; 16],
    /// Seconds since 2000-01-01 00:00 UTC.
    pub timestamp_s: u32,
}

/// Lays out an empty image, as qemu-img does.
pub fn lay_out(new: &NewImage) -> Result<NewFile, VpcError> {
    let asked = new.size_bytes.div_ceil(SECTOR_BYTES);
    let chs = if new.force_size { (65535, 16, 255) } else { geometry_at_least(asked) };
    let by_chs = chs.0 * chs.1 * chs.2;
    let sectors = if by_chs == CHS_SECTORS_MAX { asked } else { by_chs };
    if sectors > SECTORS_MAX {
        return Err(VpcError::Size(new.size_bytes));
    }
    let size_bytes = sectors * SECTOR_BYTES;
    let footer = footer_bytes(new, size_bytes, chs);
    if new.fixed {
        let file_bytes = size_bytes + FOOTER_BYTES as u64;
        return Ok(NewFile { pieces: vec![(size_bytes, footer)], file_bytes });
    }
    let entries = size_bytes.div_ceil(u64::from(BLOCK_BYTES)).max(1);
    let bat_bytes = (entries * 4).next_multiple_of(SECTOR_BYTES);
    let end = BAT_OFFSET + bat_bytes;
    let mut header = vec![0; DYNAMIC_HEADER_BYTES];
    put(&mut header, 0, DYNAMIC_COOKIE);
    put(&mut header, 8, &u64::MAX.to_be_bytes());
    put(&mut header, 16, &BAT_OFFSET.to_be_bytes());
    put(&mut header, 24, &0x1_0000u32.to_be_bytes());
    put(&mut header, 28, &(entries as u32).to_be_bytes());
    put(&mut header, 32, &BLOCK_BYTES.to_be_bytes());
    let sum = sum_of(&header, 36);
    put(&mut header, 36, &sum.to_be_bytes());
    let pieces =
        vec![(0, footer.clone()), (SECTOR_BYTES, header), (BAT_OFFSET, vec![0xff; bat_bytes as usize]), (end, footer)];
    Ok(NewFile { pieces, file_bytes: end + FOOTER_BYTES as u64 })
}

fn footer_bytes(new: &NewImage, size_bytes: u64, (cylinders, heads, track_sectors): Chs) -> Vec<u8> {
    let mut out = vec![0; FOOTER_BYTES];
    put(&mut out, 0, COOKIE);
    put(&mut out, 8, &2u32.to_be_bytes()); // features: the reserved bit, always set
    put(&mut out, 12, &0x1_0000u32.to_be_bytes());
    let dynamic_offset = if new.fixed { u64::MAX } else { SECTOR_BYTES };
    put(&mut out, 16, &dynamic_offset.to_be_bytes());
    put(&mut out, 24, &new.timestamp_s.to_be_bytes());
    // The tags of QEMU, because readers take the size from them.
    put(&mut out, 28, if new.force_size { b"qem2" } else { b"qemu" });
    put(&mut out, 32, &5u16.to_be_bytes());
    put(&mut out, 34, &3u16.to_be_bytes());
    put(&mut out, 36, b"Wi2k");
    put(&mut out, 40, &size_bytes.to_be_bytes());
    put(&mut out, 48, &size_bytes.to_be_bytes());
    put(&mut out, 56, &(cylinders as u16).to_be_bytes());
    put(&mut out, 58, &[heads as u8, track_sectors as u8]);
    put(&mut out, 60, &if new.fixed { TYPE_FIXED } else { TYPE_DYNAMIC }.to_be_bytes());
    put(&mut out, 68, &new.uuid);
    let sum = sum_of(&out, 64);
    put(&mut out, 64, &sum.to_be_bytes());
    out
}

#[cfg(test)]
fn new_image(size_bytes: u64, fixed: bool, force_size: bool) -> NewImage {
    NewImage { size_bytes, fixed, force_size, uuid: [7; 16], timestamp_s: 0x329a_92f2 }
}

/// Changes bytes and mends the checksum, so that the field itself is what is tested.
#[cfg(test)]
fn patched(bytes: &[u8], sum_at: usize, at: usize, patch: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    put(&mut out, at, patch);
    let sum = sum_of(&out, sum_at);
    put(&mut out, sum_at, &sum.to_be_bytes());
    out
}

/// Asked, got.
#[cfg(test)]
const GEOMETRY_CASES: &[(u64, u64)] = &[
    (512, 34816),
    (1000, 34816),
    (1048576, 1079296),
    (3145728, 3168256),
    (35616768, 35616768),
    (104857600, 104865792),
    (528482304, 528482304),
    (535822336, 536223744),
    (537919488, 538288128),
    (1073741824, 1073995776),
    (2147483648, 2147991552),
    (4294967296, 4295467008),
    (10737418240, 10737893376),
    (33822350848, 33822351360),
    (33822351360, 33822351360),
    (33822351872, 33824440320),
    (33285996544, 33286127616),
    (67645734912, 67646791680),
    (136365211648, 136365219840),
    (136899993088, 136899993088),
    (136899993600, 136899993600),
    (136899994112, 136899994112),
    (214748364800, 214748364800),
];

#[test]
fn sizes_grow_to_a_geometry() {
    // Sizes that qemu-img 10 gives: `create -f vpc FILE SIZE`, then `info`.
    for (size_bytes, want) in GEOMETRY_CASES {
        let file = lay_out(&new_image(*size_bytes, true, false)).unwrap();
        assert_eq!(file.file_bytes - 512, *want, "{size_bytes}");
        assert_eq!(Footer::parse(&file.pieces[0].1).unwrap().size_bytes(), *want);
        let file = lay_out(&new_image(*size_bytes, true, true)).unwrap();
        assert_eq!(Footer::parse(&file.pieces[0].1).unwrap().size_bytes(), size_bytes.next_multiple_of(512));
    }
    for force_size in [false, true] {
        assert_eq!(lay_out(&new_image(u64::MAX, false, force_size)), Err(VpcError::Size(u64::MAX)));
        let most = 0xff00_0000u64 * 512;
        assert!(lay_out(&new_image(most, false, force_size)).is_ok());
        assert_eq!(lay_out(&new_image(most + 1, false, force_size)), Err(VpcError::Size(most + 1)));
    }
}

#[test]
fn a_dynamic_disk_is_laid_out_as_qemu_img_does_it() {
    let file = lay_out(&new_image(3 << 20, false, false)).unwrap();
    let bytes = file.to_bytes();
    // From a hex dump: geometry 91/4/17, and the table at 0x600.
    assert_eq!(
        &bytes[..64],
        b"conectix\0\0\0\x02\0\x01\0\0\0\0\0\0\0\0\x02\0\x32\x9a\x92\xf2qemu\0\x05\0\x03Wi2k\
        \0\0\0\0\0\x30\x58\0\0\0\0\0\0\x30\x58\0\0\x5b\x04\x11\0\0\0\x03"
    );
    assert_eq!(
        &bytes[512..552],
        b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\x06\0\0\x01\0\0\0\0\0\x02\
        \0\x20\0\0\xff\xff\xf4\x75"
    );
    assert_eq!(bytes[..512], bytes[bytes.len() - 512..]);
    let footer = Footer::parse(&bytes).unwrap();
    let header = DynamicHeader::parse(&bytes[512..], &footer, file.file_bytes).unwrap();
    assert_eq!((header.bitmap_bytes(), header.data_offset()), (512, 0x800));
}

#[test]
fn the_creator_decides_which_size_counts() {
    let footer = lay_out(&new_image(3 << 20, true, false)).unwrap().pieces.remove(0).1;
    let current = patched(&footer, 64, 48, &(100u64 << 20).to_be_bytes());
    for (creator, sectors) in [
        (b"qemu", 6188),
        (b"vpc ", 6188),
        (b"vs  ", 6188),
        (b"win ", 204_800),
        (b"qem2", 204_800),
        (b"d2v ", 204_800),
        (b"tap\0", 204_800),
        (b"CTXS", 204_800),
        (b"wa\0\0", 204_800),
    ] {
        assert_eq!(Footer::parse(&patched(&current, 64, 28, creator)).unwrap().sectors, sectors, "{creator:?}");
    }
    let largest = patched(&current, 64, 56, &[0xff, 0xff, 16, 255]);
    assert_eq!(Footer::parse(&largest).unwrap().sectors, 204_800);
    let beyond = patched(&largest, 64, 48, &(0xff00_0001u64 * 512).to_be_bytes());
    assert_eq!(Footer::parse(&beyond), Err(VpcError::TooLarge(0xff00_0001)));
}

#[test]
fn each_footer_field_is_held_to_its_limits() {
    let footer = lay_out(&new_image(3 << 20, false, false)).unwrap().pieces.remove(0).1;
    let cases: &[(usize, &[u8], VpcError)] = &[
        (0, b"k", VpcError::Cookie),
        (12, &[0, 2], VpcError::Version(0x2_0000)),
        (60, &[0, 0, 0, 4], VpcError::Differencing),
        (60, &[0, 0, 0, 0], VpcError::DiskType(0)),
    ];
    for (at, patch, want) in cases {
        assert_eq!(Footer::parse(&patched(&footer, 64, *at, patch)).as_ref(), Err(want), "patch at {at}");
    }
    for at in 8..FOOTER_BYTES {
        let mut bytes = footer.clone();
        bytes[at] ^= 0x10;
        assert!(matches!(Footer::parse(&bytes), Err(VpcError::Checksum { .. })), "byte {at}");
    }
    for cut in 0..FOOTER_BYTES {
        assert!(Footer::parse(&footer[..cut]).is_err(), "cut at {cut}");
    }
    let fixed = Footer::parse(&lay_out(&new_image(3 << 20, true, false)).unwrap().pieces[0].1).unwrap();
    assert!(fixed.check_fixed(3_168_768).is_ok());
    assert!(matches!(fixed.check_fixed(3_168_767), Err(VpcError::FixedTooShort { .. })));
}

#[test]
fn cve_2014_0142_block_size_and_table_of_dynamic_disks() {
    let bytes = lay_out(&new_image(3 << 20, false, false)).unwrap().to_bytes();
    let footer = Footer::parse(&bytes).unwrap();
    let too_small = |entries, want| VpcError::BatTooSmall { entries, want, size_bytes: 3_168_256 };
    let past_end = |offset, entries| VpcError::BatPastEnd { offset, entries, file_bytes: 2560 };
    let cases: &[(usize, &[u8], VpcError)] = &[
        (0, b"d", VpcError::DynamicCookie),
        (32, &[0, 0, 0, 0], VpcError::BlockSize(0)),
        (32, &[0, 0, 1, 0], VpcError::BlockSize(256)),
        (32, &[0, 0x30, 0, 0], VpcError::BlockSize(0x30_0000)),
        (32, &[0, 0, 2, 0], too_small(2, 6188)),
        (28, &[0, 0, 0, 1], too_small(1, 2)),
        (28, &[0xff; 4], past_end(0x600, u32::MAX)),
        (16, &[0xff; 8], past_end(u64::MAX, 2)),
        (16, &2556u64.to_be_bytes(), past_end(2556, 2)),
        (24, &[0, 2], VpcError::Version(0x2_0000)),
    ];
    for (at, patch, want) in cases {
        let header = patched(&bytes[512..1536], 36, *at, patch);
        assert_eq!(DynamicHeader::parse(&header, &footer, 2560).as_ref(), Err(want), "patch at {at}");
    }
    for cut in 0..DYNAMIC_HEADER_BYTES {
        assert!(DynamicHeader::parse(&bytes[512..512 + cut], &footer, 2560).is_err(), "cut at {cut}");
    }
}
