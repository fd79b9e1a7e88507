//! The header of a sparse extent: `SparseExtentHeader` of "Virtual Disk Format 5.0", 512 bytes, little-endian.

use super::{GD_AT_END, SECTOR_BYTES, VmdkError};
use crate::bytes::{le16, le32, le64, put};

/// Bytes of the header, and of the footer that repeats it.
pub const HEADER_BYTES: usize = 512;

/// Flag bit 0: the line-end bytes at offset 73 are valid.
pub const FLAG_LINE_ENDS: u32 = 1;
/// Flag bit 1: there is a second, redundant grain directory.
pub const FLAG_REDUNDANT: u32 = 1 << 1;
/// Flag bit 2: a grain table entry of 1 means a grain of zeroes.
pub const FLAG_ZERO_GRAINS: u32 = 1 << 2;
/// Flag bit 16: grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Flag bit 17: grains and tables are preceded by markers.
pub const FLAG_MARKERS: u32 = 1 << 17;
const FLAGS_KNOWN: u32 = FLAG_LINE_ENDS | FLAG_REDUNDANT | FLAG_ZERO_GRAINS | FLAG_COMPRESSED | FLAG_MARKERS;

const MAGIC: &[u8] = b"KDMV";
const LINE_ENDS: [u8; 4] = *b"\n \r\n";
const COMPRESS_NONE: u16 = 0;
const COMPRESS_DEFLATE: u16 = 1;

/// QEMU's limits, so that both open the same images.
const GRAIN_SECTORS_MAX: u64 = 0x20_0000;
const GTES_MAX: u32 = 512;
/// Most entries of a grain directory: 32 MiB.
pub const GD_ENTRIES_MAX: u64 = (32 << 20) / 4;
/// A compressed grain is unpacked whole in memory, so it gets a limit of its own. Every writer uses 128.
const COMPRESSED_GRAIN_SECTORS_MAX: u64 = 4096;

/// A checked header: sizes are within their limits, so the arithmetic of [`SparseHeader`] cannot overflow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseHeader {
    /// 1 to 3. Version 2 may have zeroed grains, 3 is for compressed streams.
    pub version: u32,
    /// The `FLAG_` bits.
    pub flags: u32,
    /// Size of the extent in sectors.
    pub capacity_sectors: u64,
    /// Size of a grain in sectors.
    pub grain_sectors: u64,
    /// Where the embedded descriptor is; 0 without one.
    pub descriptor_sector: u64,
    /// Length of the embedded descriptor.
    pub descriptor_sectors: u64,
    /// Entries of one grain table, 1 to 512.
    pub gt_entries: u32,
    /// Where the redundant grain directory is; valid with [`FLAG_REDUNDANT`].
    pub rgd_sector: u64,
    /// Where the grain directory is; [`GD_AT_END`] says that a footer knows.
    pub gd_sector: u64,
    /// Where grains may start.
    pub overhead_sectors: u64,
    /// A writer did not close the image.
    pub unclean: bool,
}

impl SparseHeader {
    /// Parses a header or footer. `file_bytes` is the length of the file, which the header may not exceed.
    pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<SparseHeader, VmdkError> {
        if !bytes.starts_with(MAGIC) {
            return Err(VmdkError::Magic);
        }
        let cut = || VmdkError::Truncated { have_bytes: bytes.len() };
        let u32_at = |at| le32(bytes, at).ok_or_else(cut);
        let u64_at = |at| le64(bytes, at).ok_or_else(cut);
        if bytes.len() < HEADER_BYTES {
            return Err(cut());
        }
        let header = SparseHeader {
            version: u32_at(4)?,
            flags: u32_at(8)?,
            capacity_sectors: u64_at(12)?,
            grain_sectors: u64_at(20)?,
            descriptor_sector: u64_at(28)?,
            descriptor_sectors: u64_at(36)?,
            gt_entries: u32_at(44)?,
            rgd_sector: u64_at(48)?,
            gd_sector: u64_at(56)?,
            overhead_sectors: u64_at(64)?,
            unclean: bytes.get(72).is_some_and(|byte| *byte != 0),
        };
        if header.flags & FLAG_LINE_ENDS != 0 && bytes.get(73..77) != Some(&LINE_ENDS) {
            return Err(VmdkError::LineEnds);
        }
        let compression = le16(bytes, 77).ok_or_else(cut)?;
        header.check(compression, file_bytes)?;
        Ok(header)
    }

    fn check(&self, compression: u16, file_bytes: u64) -> Result<(), VmdkError> {
        if !(1..=3).contains(&self.version) {
            return Err(VmdkError::Version(self.version));
        }
        let unknown = self.flags & !FLAGS_KNOWN;
        // The low half of the flags may be ignored by a reader, the high half may not.
        if unknown >> 16 != 0 {
            return Err(VmdkError::Flags(unknown & 0xffff_0000));
        }
        let known = match compression {
            COMPRESS_NONE => !self.is_compressed(),
            COMPRESS_DEFLATE => self.is_compressed(),
            _ => false,
        };
        if !known {
            return Err(VmdkError::Compression(compression));
        }
        let grain_max = if self.is_compressed() { COMPRESSED_GRAIN_SECTORS_MAX } else { GRAIN_SECTORS_MAX };
        if self.grain_sectors == 0 || self.grain_sectors > grain_max {
            return Err(VmdkError::GrainSize { sectors: self.grain_sectors, max: grain_max });
        }
        if self.gt_entries == 0 || self.gt_entries > GTES_MAX {
            return Err(VmdkError::GtEntries(self.gt_entries));
        }
        if self.capacity_sectors > i64::MAX as u64 / SECTOR_BYTES {
            return Err(VmdkError::Capacity(self.capacity_sectors));
        }
        if self.gd_entries() > GD_ENTRIES_MAX {
            return Err(VmdkError::GdTooLarge { entries: self.gd_entries(), max: GD_ENTRIES_MAX });
        }
        let overhead = self.overhead_sectors.checked_mul(SECTOR_BYTES);
        match overhead {
            Some(bytes) if bytes <= file_bytes => Ok(()),
            _ => Err(VmdkError::FileTooShort { overhead_sectors: self.overhead_sectors, file_bytes }),
        }
    }

    /// The 512 bytes of the header.
    pub fn serialise(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        put(&mut out, 0, MAGIC);
        put(&mut out, 4, &self.version.to_le_bytes());
        put(&mut out, 8, &self.flags.to_le_bytes());
        put(&mut out, 12, &self.capacity_sectors.to_le_bytes());
        put(&mut out, 20, &self.grain_sectors.to_le_bytes());
        put(&mut out, 28, &self.descriptor_sector.to_le_bytes());
        put(&mut out, 36, &self.descriptor_sectors.to_le_bytes());
        put(&mut out, 44, &self.gt_entries.to_le_bytes());
        put(&mut out, 48, &self.rgd_sector.to_le_bytes());
        put(&mut out, 56, &self.gd_sector.to_le_bytes());
        put(&mut out, 64, &self.overhead_sectors.to_le_bytes());
        put(&mut out, 72, &[u8::from(self.unclean)]);
        put(&mut out, 73, &LINE_ENDS);
        let compression = if self.is_compressed() { COMPRESS_DEFLATE } else { COMPRESS_NONE };
        put(&mut out, 77, &compression.to_le_bytes());
        out
    }

    /// Whether grains are deflate streams.
    pub fn is_compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }

    /// Whether there are redundant tables.
    pub fn has_redundant(&self) -> bool {
        self.flags & FLAG_REDUNDANT != 0
    }

    /// Whether an entry may say "zeroes".
    pub fn has_zero_grains(&self) -> bool {
        self.flags & FLAG_ZERO_GRAINS != 0
    }

    /// Whether a footer at the end of the file says where the grain directory is.
    pub fn has_footer(&self) -> bool {
        self.gd_sector == GD_AT_END
    }

    /// Size of a grain in bytes, at most 1 GiB.
    pub fn grain_bytes(&self) -> u64 {
        self.grain_sectors * SECTOR_BYTES
    }

    /// Sectors that one grain table maps.
    pub fn gt_reach_sectors(&self) -> u64 {
        self.grain_sectors * u64::from(self.gt_entries)
    }

    /// Entries of the grain directory, at most 2^23.
    pub fn gd_entries(&self) -> u64 {
        self.capacity_sectors.div_ceil(self.gt_reach_sectors())
    }

    /// Bytes of a grain table, at most 2 KiB.
    pub fn gt_bytes(&self) -> u64 {
        u64::from(self.gt_entries) * 4
    }

    /// Sectors that a grain table takes in the file.
    pub fn gt_sectors(&self) -> u64 {
        self.gt_bytes().div_ceil(SECTOR_BYTES)
    }

    /// Where a directory at `sector` lies: offset and length in bytes, wholly inside the file.
    pub fn directory_range(&self, sector: u64, file_bytes: u64) -> Result<(u64, u64), VmdkError> {
        let bytes = self.gd_entries() * 4;
        let range = sector.checked_mul(SECTOR_BYTES).filter(|offset| *offset != 0 && *offset <= file_bytes);
        match range {
            Some(offset) if bytes <= file_bytes - offset => Ok((offset, bytes)),
            _ => Err(VmdkError::TablePastEnd { table: "grain directory", sector, file_bytes }),
        }
    }

    /// Where the embedded descriptor lies: offset and length in bytes, at most 1 MiB, wholly inside the file.
    /// `None` without one.
    pub fn descriptor_range(&self, file_bytes: u64) -> Result<Option<(u64, u64)>, VmdkError> {
        if self.descriptor_sector == 0 || self.descriptor_sectors == 0 {
            return Ok(None);
        }
        let past_end = VmdkError::TablePastEnd { table: "descriptor", sector: self.descriptor_sector, file_bytes };
        let offset = self.descriptor_sector.checked_mul(SECTOR_BYTES).ok_or(past_end.clone())?;
        let bytes = self.descriptor_sectors.checked_mul(SECTOR_BYTES).ok_or(past_end.clone())?;
        if bytes > super::DESCRIPTOR_MAX_BYTES {
            return Err(VmdkError::DescriptorTooLarge { bytes });
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= file_bytes => Ok(Some((offset, bytes))),
            _ => Err(past_end),
        }
    }
}

#[cfg(test)]
pub(super) fn sample() -> SparseHeader {
    // As qemu-img 10 creates a disk of 100 MiB.
    SparseHeader {
        version: 1,
        flags: FLAG_LINE_ENDS | FLAG_REDUNDANT,
        capacity_sectors: 204_800,
        grain_sectors: 128,
        descriptor_sector: 1,
        descriptor_sectors: 20,
        gt_entries: 512,
        rgd_sector: 21,
        gd_sector: 38,
        overhead_sectors: 128,
        unclean: false,
    }
}

#[test]
fn a_header_survives_the_round_trip() {
    let bytes = sample().serialise();
    // Offsets and values from a hex dump of qemu-img's file.
    assert_eq!(&bytes[..16], b"KDMV\x01\0\0\0\x03\0\0\0\0\x20\x03\0");
    assert_eq!(&bytes[64..80], b"\x80\0\0\0\0\0\0\0\0\n \r\n\0\0\0");
    assert_eq!(SparseHeader::parse(&bytes, 65536), Ok(sample()));
    assert_eq!((sample().gd_entries(), sample().gt_bytes(), sample().grain_bytes()), (4, 2048, 65536));
}

#[test]
fn each_field_is_held_to_its_limits() {
    let cases: &[(usize, &[u8], VmdkError)] = &[
        (0, b"X", VmdkError::Magic),
        (4, &[4], VmdkError::Version(4)),
        (4, &[0], VmdkError::Version(0)),
        (10, &[4], VmdkError::Flags(1 << 18)),
        (10, &[1], VmdkError::Compression(0)),
        (77, &[2], VmdkError::Compression(2)),
        (75, b" ", VmdkError::LineEnds),
        (20, &[0], VmdkError::GrainSize { sectors: 0, max: 0x20_0000 }),
        (20, &[1, 0, 0x20], VmdkError::GrainSize { sectors: 0x20_0001, max: 0x20_0000 }),
        (44, &[0, 0], VmdkError::GtEntries(0)),
        (44, &[1, 2], VmdkError::GtEntries(513)),
        (12, &[0xff; 8], VmdkError::Capacity(u64::MAX)),
        (64, &[129], VmdkError::FileTooShort { overhead_sectors: 129, file_bytes: 65536 }),
        (64, &[0xff; 8], VmdkError::FileTooShort { overhead_sectors: u64::MAX, file_bytes: 65536 }),
    ];
    for (at, patch, want) in cases {
        let mut bytes = sample().serialise();
        bytes[*at..at + patch.len()].copy_from_slice(patch);
        assert_eq!(SparseHeader::parse(&bytes, 65536).as_ref(), Err(want), "patch at {at}");
    }
    for cut in 0..HEADER_BYTES {
        assert!(SparseHeader::parse(&sample().serialise()[..cut], 65536).is_err(), "cut at {cut}");
    }
}

#[test]
fn cve_2014_0144_huge_grain_tables_are_refused() {
    // One sector a grain and one entry a table: a directory entry for each sector of the disk.
    let header = SparseHeader { grain_sectors: 1, gt_entries: 1, capacity_sectors: 1 << 30, ..sample() };
    let want = VmdkError::GdTooLarge { entries: 1 << 30, max: 1 << 23 };
    assert_eq!(SparseHeader::parse(&header.serialise(), 65536), Err(want));
    // Within the limit, but not within the file.
    let header = SparseHeader { capacity_sectors: 1 << 32, ..sample() };
    let header = SparseHeader::parse(&header.serialise(), 65536).unwrap();
    assert!(matches!(header.directory_range(38, 65536), Err(VmdkError::TablePastEnd { .. })));
    let compressed = SparseHeader { flags: FLAG_COMPRESSED, grain_sectors: 4097, ..sample() };
    let want = VmdkError::GrainSize { sectors: 4097, max: 4096 };
    assert_eq!(SparseHeader::parse(&compressed.serialise(), 65536), Err(want));
}

#[test]
fn tables_lie_inside_the_file() {
    let header = sample();
    assert_eq!(header.directory_range(38, 65536), Ok((38 * 512, 16)));
    for sector in [0, 128, 129, u64::MAX, GD_AT_END] {
        assert!(header.directory_range(sector, 65536).is_err(), "{sector}");
    }
    assert_eq!(header.descriptor_range(65536), Ok(Some((512, 20 * 512))));
    for (sector, sectors) in [(1, 2049), (1, u64::MAX), (u64::MAX, 1), (127, 2)] {
        let header = SparseHeader { descriptor_sector: sector, descriptor_sectors: sectors, ..sample() };
        assert!(header.descriptor_range(65536).is_err(), "{sector} {sectors}");
    }
}
