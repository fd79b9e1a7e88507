//! Persistent dirty bitmaps: the header extension, the directory, the tables that say where the bits are.

use thiserror::Error;

use super::{EXT_BITMAPS, Geometry, Header, OFFSET_MASK};
use crate::{be16, be32, be64};

/// Most bitmaps of an image; the limits below are QEMU's.
pub const BITMAPS_MAX: u32 = 65535;
/// Longest directory in bytes.
pub const BITMAP_DIRECTORY_MAX_BYTES: u64 = 65535 * 1024;
/// Longest name of a bitmap in bytes.
pub const BITMAP_NAME_MAX: usize = 1023;
/// Most bits of a bitmap as bytes in the file.
const BITMAP_MAX_BYTES: u64 = 512 << 20;
const EXTENSION_BYTES: usize = 24;
const ENTRY_BYTES: usize = 24;
/// Flag: a writer had the bitmap in memory and has not stored it since.
const IN_USE: u32 = 1;
/// Flag: writers record changes in it.
const AUTO: u32 = 1 << 1;
/// Flag: a writer that does not know the extra data may still use the bitmap.
const EXTRA_COMPATIBLE: u32 = 1 << 2;
const TYPE_DIRTY: u8 = 1;

/// A bitmap directory that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum BitmapError {
    #[error("the bitmaps extension has {bytes} bytes; it must have 24")]
    Extension { bytes: usize },
    #[error("the image has {count} bitmaps; 1 to 65535 are allowed")]
    Count { count: u32 },
    #[error("the bitmap directory has {bytes} bytes at {offset:#x}: not aligned, or longer than its limit")]
    Directory { offset: u64, bytes: u64 },
    #[error("the bitmap directory has {bytes} bytes; its entries have {entries_bytes}")]
    DirectoryLength { bytes: u64, entries_bytes: u64 },
    #[error("the bitmap directory ends inside entry {index} of {count}")]
    CutOff { index: u32, count: u32 },
    #[error("bitmap {index} has type {kind}; only dirty bitmaps (type 1) are known")]
    Type { index: u32, kind: u8 },
    #[error("bitmap {index} has a granularity of 2^{bits} bytes; 2^9 to 2^31 are allowed")]
    Granularity { index: u32, bits: u8 },
    #[error("bitmap {index} has a name of {bytes} bytes; 1 to 1023 are allowed")]
    Name { index: u32, bytes: usize },
    #[error("bitmap {index} has a table of {entries} entries at {offset:#x}, but the disk needs {want}")]
    Table { index: u32, entries: u32, offset: u64, want: u64 },
    #[error("bitmap {index} has reserved flags {flags:#x}")]
    Flags { index: u32, flags: u32 },
    #[error("bitmap table entry {raw:#018x} is not aligned or has reserved bits")]
    Entry { raw: u64 },
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Host offset of the directory.
    pub directory_offset: u64,
    /// Length of the directory.
    pub directory_bytes: u64,
}

impl BitmapExtension {
    /// Reads the extension of a header; `None` when the image has no bitmaps, or when a writer that does not know them
    /// has changed the image since.
    pub fn of(header: &Header) -> Result<Option<BitmapExtension>, BitmapError> {
        let Some(data) = header.extension(EXT_BITMAPS) else { return Ok(None) };
        if header.autoclear & super::AUTOCLEAR_BITMAPS == 0 {
            return Ok(None);
        }
        let wrong = BitmapError::Extension { bytes: data.len() };
        if data.len() != EXTENSION_BYTES {
            return Err(wrong);
        }
        let (Some(count), Some(bytes), Some(offset)) = (be32(data, 0), be64(data, 8), be64(data, 16)) else {
            return Err(wrong);
        };
        if count == 0 || count > BITMAPS_MAX {
            return Err(BitmapError::Count { count });
        }
        let in_range = offset != 0 && offset < 1 << 56 && bytes != 0 && bytes <= BITMAP_DIRECTORY_MAX_BYTES;
        if !in_range || !header.geometry.is_aligned(offset) {
            return Err(BitmapError::Directory { offset, bytes });
        }
        Ok(Some(BitmapExtension { count, directory_offset: offset, directory_bytes: bytes }))
    }

    /// The contents of the header extension.
    pub fn serialise(&self) -> Vec<u8> {
        let mut out = self.count.to_be_bytes().to_vec();
        out.extend([0; 4]);
        out.extend(self.directory_bytes.to_be_bytes());
        out.extend(self.directory_offset.to_be_bytes());
        out
    }
}

/// One bitmap of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Name, unique in the image; bytes as stored.
    pub name: Vec<u8>,
    /// log2 of the guest bytes that one bit stands for, 9 to 31.
    pub granularity_bits: u8,
    /// A writer may have changed the disk without recording it here: the bits are not to be trusted.
    pub in_use: bool,
    /// Writers record changes in it; otherwise it is kept as it is.
    pub enabled: bool,
    /// Host offset of the table.
    pub table_offset: u64,
    /// Entries of the table.
    pub table_entries: u32,
    /// Extra data, kept; a bitmap that has some is only kept, never changed, unless its flag allows it.
    pub extra: Vec<u8>,
    /// A writer that does not know the extra data may change the bitmap.
    pub extra_compatible: bool,
}

/// Bytes of a directory with these entries.
pub fn bitmap_directory_bytes(bitmaps: &[Bitmap]) -> u64 {
    let bytes = bitmaps.iter().map(|bitmap| ENTRY_BYTES + bitmap.extra.len() + bitmap.name.len());
    bytes.map(|bytes| bytes.next_multiple_of(8) as u64).sum()
}

/// Entries a bitmap's table needs for a disk: one for each cluster of bits. `None` beyond the limit.
pub fn bitmap_table_entries(geometry: &Geometry, granularity_bits: u8) -> Option<u64> {
    let bits = geometry.size_bytes.div_ceil(1u64.checked_shl(u32::from(granularity_bits))?);
    let bytes = bits.div_ceil(8);
    (bytes <= BITMAP_MAX_BYTES).then(|| bytes.div_ceil(geometry.cluster_bytes()))
}

/// Reads the directory, whose length the extension gave. A bitmap whose table does not fit the disk is refused unless it
/// is in use: then nobody reads its bits.
pub fn parse_bitmaps(header: &Header, count: u32, directory: &[u8]) -> Result<Vec<Bitmap>, BitmapError> {
    let mut bitmaps = Vec::new();
    let mut at = 0usize;
    for index in 0..count {
        let cut = BitmapError::CutOff { index, count };
        let entry = directory.get(at..).ok_or_else(|| cut.clone())?;
        let (bitmap, bytes) = parse_entry(header, entry, index, &cut)?;
        bitmaps.push(bitmap);
        at = at.saturating_add(bytes.next_multiple_of(8));
    }
    Ok(bitmaps)
}

fn parse_entry(header: &Header, entry: &[u8], index: u32, cut: &BitmapError) -> Result<(Bitmap, usize), BitmapError> {
    let cut = || cut.clone();
    let table_offset = be64(entry, 0).ok_or_else(cut)?;
    let table_entries = be32(entry, 8).ok_or_else(cut)?;
    let flags = be32(entry, 12).ok_or_else(cut)?;
    let kind = *entry.get(16).ok_or_else(cut)?;
    let bits = *entry.get(17).ok_or_else(cut)?;
    let name_bytes = usize::from(be16(entry, 18).ok_or_else(cut)?);
    let extra_bytes = be32(entry, 20).ok_or_else(cut)? as usize;
    if kind != TYPE_DIRTY {
        return Err(BitmapError::Type { index, kind });
    }
    if !(9..=31).contains(&bits) {
        return Err(BitmapError::Granularity { index, bits });
    }
    if name_bytes == 0 || name_bytes > BITMAP_NAME_MAX {
        return Err(BitmapError::Name { index, bytes: name_bytes });
    }
    if flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
        return Err(BitmapError::Flags { index, flags });
    }
    let name_at = ENTRY_BYTES.saturating_add(extra_bytes);
    let end = name_at.saturating_add(name_bytes);
    let in_use = flags & IN_USE != 0;
    let want = bitmap_table_entries(&header.geometry, bits).unwrap_or(u64::MAX);
    let placed = header.geometry.is_aligned(table_offset) && table_offset < 1 << 56 && table_offset != 0;
    let bounded = u64::from(table_entries) <= BITMAP_MAX_BYTES / header.geometry.cluster_bytes();
    if !bounded || (table_entries > 0 && !placed) || (!in_use && u64::from(table_entries) != want) {
        return Err(BitmapError::Table { index, entries: table_entries, offset: table_offset, want });
    }
    let bitmap = Bitmap {
        name: entry.get(name_at..end).ok_or_else(cut)?.to_vec(),
        granularity_bits: bits,
        in_use,
        enabled: flags & AUTO != 0,
        table_offset,
        table_entries,
        extra: entry.get(ENTRY_BYTES..name_at).ok_or_else(cut)?.to_vec(),
        extra_compatible: flags & EXTRA_COMPATIBLE != 0,
    };
    Ok((bitmap, end))
}

/// The directory's bytes for a file.
pub fn serialise_bitmaps(bitmaps: &[Bitmap]) -> Result<Vec<u8>, BitmapError> {
    let count = u32::try_from(bitmaps.len()).unwrap_or(u32::MAX);
    if count > BITMAPS_MAX {
        return Err(BitmapError::Count { count });
    }
    let mut out = Vec::new();
    for (index, bitmap) in (0..).zip(bitmaps) {
        let bytes = bitmap.name.len();
        if bytes == 0 || bytes > BITMAP_NAME_MAX {
            return Err(BitmapError::Name { index, bytes });
        }
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let extra_compatible = flag(bitmap.extra_compatible, EXTRA_COMPATIBLE);
        out.extend(bitmap.table_offset.to_be_bytes());
        out.extend(bitmap.table_entries.to_be_bytes());
        out.extend((flag(bitmap.in_use, IN_USE) | flag(bitmap.enabled, AUTO) | extra_compatible).to_be_bytes());
        out.extend([TYPE_DIRTY, bitmap.granularity_bits]);
        out.extend((bytes as u16).to_be_bytes());
        out.extend((bitmap.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&bitmap.extra);
        out.extend_from_slice(&bitmap.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    if out.len() as u64 > BITMAP_DIRECTORY_MAX_BYTES {
        return Err(BitmapError::Directory { offset: 0, bytes: out.len() as u64 });
    }
    Ok(out)
}

/// What one entry of a bitmap's table says about a cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are 0.
    Clear,
    /// All bits are 1.
    Set,
    /// The bits are in the cluster at this host offset, the first in the lowest bit of the first byte.
    At(u64),
}

impl BitmapTableEntry {
    /// Reads an entry.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<BitmapTableEntry, BitmapError> {
        let offset = raw & OFFSET_MASK;
        if raw & !(OFFSET_MASK | 1) != 0 || !geometry.is_aligned(offset) || (offset != 0 && raw & 1 != 0) {
            return Err(BitmapError::Entry { raw });
        }
        Ok(match (offset, raw & 1) {
            (0, 0) => BitmapTableEntry::Clear,
            (0, _) => BitmapTableEntry::Set,
            (offset, _) => BitmapTableEntry::At(offset),
        })
    }

    /// The entry as stored.
    pub fn encode(self) -> u64 {
        match self {
            BitmapTableEntry::Clear => 0,
            BitmapTableEntry::Set => 1,
            BitmapTableEntry::At(offset) => offset,
        }
    }
}

#[cfg(test)]
fn header() -> Header {
    let new = super::layout::NewImage { size_bytes: 1 << 30, ..super::layout::NewImage::default() };
    super::layout::Plan::new(&new, &super::layout::Features::default()).unwrap().header().clone()
}

#[cfg(test)]
fn bitmap(name: &str) -> Bitmap {
    Bitmap {
        name: name.into(),
        granularity_bits: 16,
        in_use: false,
        enabled: true,
        table_offset: 0x9_0000,
        table_entries: 1,
        extra: Vec::new(),
        extra_compatible: false,
    }
}

#[test]
fn a_directory_reads_back_and_is_laid_out_as_the_specification_says() {
    let bitmaps = vec![bitmap("b0"), Bitmap { in_use: true, enabled: false, extra: vec![7; 3], ..bitmap("longer") }];
    let bytes = serialise_bitmaps(&bitmaps).unwrap();
    // "Bitmap directory entry": table offset, table size, flags, type, granularity, name and extra lengths, name, padding.
    assert_eq!(
        bytes[..32],
        [0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 16, 0, 2, 0, 0, 0, 0, b'b', b'0', 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(parse_bitmaps(&header(), 2, &bytes), Ok(bitmaps));
    for cut in 0..bytes.len() - 8 {
        assert!(parse_bitmaps(&header(), 2, &bytes[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn fields_out_of_range_are_refused() {
    let good = serialise_bitmaps(&[bitmap("b0")]).unwrap();
    for (at, patch, want) in [
        (16, &[2u8][..], BitmapError::Type { index: 0, kind: 2 }),
        (17, &[8], BitmapError::Granularity { index: 0, bits: 8 }),
        (17, &[32], BitmapError::Granularity { index: 0, bits: 32 }),
        (17, &[9], BitmapError::Table { index: 0, entries: 1, offset: 0x9_0000, want: 4 }),
        (18, &[0, 0], BitmapError::Name { index: 0, bytes: 0 }),
        (15, &[8], BitmapError::Flags { index: 0, flags: 8 }),
        (20, &[0xff; 4], BitmapError::CutOff { index: 0, count: 1 }),
        (6, &[2], BitmapError::Table { index: 0, entries: 1, offset: 0x9_0200, want: 1 }),
        (8, &[0xff; 4], BitmapError::Table { index: 0, entries: u32::MAX, offset: 0x9_0000, want: 1 }),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        assert_eq!(parse_bitmaps(&header(), 1, &bytes), Err(want), "patch at {at}");
    }
    let long = bitmap(&"n".repeat(1024));
    assert_eq!(serialise_bitmaps(&[long]), Err(BitmapError::Name { index: 0, bytes: 1024 }));
}

#[test]
fn the_extension_counts_only_with_its_autoclear_bit() {
    let extension = BitmapExtension { count: 1, directory_offset: 0x8_0000, directory_bytes: 32 };
    let mut header = header();
    header.set_extension(EXT_BITMAPS, Some(extension.serialise()));
    assert_eq!(BitmapExtension::of(&header), Ok(None));
    header.autoclear = super::AUTOCLEAR_BITMAPS;
    assert_eq!(BitmapExtension::of(&header), Ok(Some(extension)));
    for (extension, want) in [
        (BitmapExtension { count: 0, ..extension }, BitmapError::Count { count: 0 }),
        (BitmapExtension { count: 65536, ..extension }, BitmapError::Count { count: 65536 }),
        (
            BitmapExtension { directory_offset: 0x8_0200, ..extension },
            BitmapError::Directory { offset: 0x8_0200, bytes: 32 },
        ),
        (
            BitmapExtension { directory_bytes: u64::MAX, ..extension },
            BitmapError::Directory { offset: 0x8_0000, bytes: u64::MAX },
        ),
    ] {
        header.set_extension(EXT_BITMAPS, Some(extension.serialise()));
        assert_eq!(BitmapExtension::of(&header), Err(want));
    }
    header.set_extension(EXT_BITMAPS, Some(vec![0; 23]));
    assert_eq!(BitmapExtension::of(&header), Err(BitmapError::Extension { bytes: 23 }));
}

#[test]
fn table_entries_and_sizes() {
    let geometry = header().geometry;
    for (raw, want) in [
        (0, Ok(BitmapTableEntry::Clear)),
        (1, Ok(BitmapTableEntry::Set)),
        (0x5_0000, Ok(BitmapTableEntry::At(0x5_0000))),
        (0x5_0001, Err(BitmapError::Entry { raw: 0x5_0001 })),
        (0x5_0200, Err(BitmapError::Entry { raw: 0x5_0200 })),
        (1 << 63, Err(BitmapError::Entry { raw: 1 << 63 })),
    ] {
        assert_eq!(BitmapTableEntry::decode(raw, &geometry), want);
        if let Ok(entry) = want {
            assert_eq!(entry.encode(), raw);
        }
    }
    // 1 GiB at 512 bytes a bit: 256 KiB of bits, four clusters. 2^60 bytes at 512 would be more than the limit.
    assert_eq!(bitmap_table_entries(&geometry, 9), Some(4));
    assert_eq!(bitmap_table_entries(&Geometry { size_bytes: 1 << 60, ..geometry }, 9), None);
}
