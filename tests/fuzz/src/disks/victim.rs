//! Sound images, and how an input damages them.

use std::ops::Range;

use block::{Format, LayerKey};
use image::vhdx::header::{HEADER_BYTES, HEADER_OFFSETS, REGION_OFFSETS, REGION_TABLE_BYTES};

use super::memory_file::MemoryFile;

/// Bytes of one change in an input: see [`Victim::damaged`].
const CHANGE_BYTES: usize = 8;
/// Changes of one input that are made.
const CHANGES_MAX: usize = 64;

/// A sound image.
pub struct Victim {
    pub format: Format,
    pub file: MemoryFile,
    /// The other files that it is made of.
    pub extents: Vec<MemoryFile>,
    /// What opens its encryption.
    pub key: LayerKey,
    /// The file below it.
    pub backing: Option<MemoryFile>,
    /// Where headers and tables are.
    pub tables: Vec<Range<u64>>,
}

impl Victim {
    /// An image in one file.
    pub fn new(format: Format, file: MemoryFile, tables: Vec<Range<u64>>) -> Victim {
        Victim { format, file, extents: Vec::new(), key: LayerKey::None, backing: None, tables }
    }

    /// A copy with the changes that `program` asks for, eight bytes each: what is done, in which table, two bytes
    /// where in it, four bytes of a value. Zeroes change nothing. Checksums are mended unless the change says otherwise.
    pub fn damaged(&self, program: &[u8]) -> MemoryFile {
        let file = self.file.copy();
        let pages = self.file.used_pages();
        let mut mended = Vec::new();
        for change in program.chunks_exact(CHANGE_BYTES).take(CHANGES_MAX) {
            let Ok([kind, table, at @ .., a, b, c, d]) = <[u8; CHANGE_BYTES]>::try_from(change) else { continue };
            let at = u64::from(u16::from_le_bytes(at));
            let value = u32::from_le_bytes([a, b, c, d]);
            let offset = match self.tables.get(usize::from(table) % (self.tables.len() + 1)) {
                Some(range) => range.start + at % (range.end - range.start).max(1),
                // Any byte of any page that is in use.
                None => {
                    let nth = at as usize % pages.len().max(1);
                    pages.get(nth).copied().unwrap_or(0) + u64::from(value >> 8) % 4096
                }
            };
            apply(&file, kind, offset, value);
            if kind & 0x80 == 0 {
                mended.push(offset);
            }
        }
        mended.iter().for_each(|offset| self.mend(&file, *offset));
        file
    }

    /// Sets the checksum of what holds `offset`, and makes its copy the same.
    fn mend(&self, file: &MemoryFile, offset: u64) {
        match self.format {
            Format::Vpc => mend_vpc(file, offset),
            Format::Vhdx => mend_vhdx(file, offset),
            _ => {}
        }
    }
}

/// Makes one change. Of `kind`, two bits are the width, three what happens.
fn apply(file: &MemoryFile, kind: u8, offset: u64, value: u32) {
    const EDGES: [u64; 8] = [0, 1, u64::MAX, 0x7fff_ffff, 1 << 31, 0xffff, i64::MAX as u64, 1 << 63];
    let width = 1 << (kind & 3);
    let edge = EDGES.get(value as usize % EDGES.len()).copied().unwrap_or(0);
    let old = file.get(offset, 8);
    let low = u64::from(value).to_le_bytes();
    let new: Vec<u8> = match kind >> 2 & 7 {
        0 | 1 => old.iter().zip(low).map(|(old, bits)| old ^ bits).collect(),
        2 => edge.to_le_bytes().to_vec(),
        // The low bytes of a big-endian number are its last ones.
        3 => edge.to_be_bytes().get(8 - width..).unwrap_or_default().to_vec(),
        4 => low.to_vec(),
        5 => u64::from(value).to_be_bytes().get(8 - width..).unwrap_or_default().to_vec(),
        // A piece from elsewhere: entries that repeat, tables that refer to themselves.
        6 => file.get(u64::from(value) % file.bytes().max(1), 16),
        _ => return file.truncate(u64::from(value) % (file.bytes() + 1)),
    };
    let bytes = if kind >> 2 & 7 == 6 { 16 } else { width };
    let inside = file.bytes().saturating_sub(offset).min(bytes as u64) as usize;
    file.put(offset, new.get(..inside.min(new.len())).unwrap_or_default());
}

/// The one's complement of the sum of all bytes, in footers and in the header of a dynamic disk.
fn mend_vpc(file: &MemoryFile, offset: u64) {
    let end = file.bytes().saturating_sub(512);
    for (range, sum_at) in [(0..512, 64), (512..1536, 36), (end..end + 512, 64)] {
        if range.contains(&offset) {
            file.put(range.start + sum_at, &[0; 4]);
            let bytes = file.get(range.start, (range.end - range.start) as usize);
            let sum = !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
            file.put(range.start + sum_at, &sum.to_be_bytes());
        }
    }
}

/// A CRC-32C in headers, region tables and log entries. The copy follows, so that the change counts.
fn mend_vhdx(file: &MemoryFile, offset: u64) {
    let [first, second] = HEADER_OFFSETS;
    let [regions, more] = REGION_OFFSETS;
    let log = 1 << 20;
    let parts = [
        (first, second, HEADER_BYTES as u64),
        (regions, more, REGION_TABLE_BYTES as u64),
        (log, log, LOG_ENTRY_BYTES),
        (log + LOG_ENTRY_BYTES, log + LOG_ENTRY_BYTES, LOG_ENTRY_BYTES),
    ];
    for (start, copy, bytes) in parts {
        if (start..start + bytes).contains(&offset) && file.bytes() >= start + bytes {
            let mut part = file.get(start, bytes as usize);
            part.get_mut(4..8).unwrap_or_default().fill(0);
            let crc = crc32c(&part);
            part.get_mut(4..8).unwrap_or_default().copy_from_slice(&crc.to_le_bytes());
            file.put(start, &part);
            file.put(copy, &part);
        }
    }
}

/// Bytes of a log entry that changes one sector.
pub const LOG_ENTRY_BYTES: u64 = 8192;

fn crc32c(bytes: &[u8]) -> u32 {
    const fn table() -> [u32; 256] {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    }
    const TABLE: [u32; 256] = table();
    !bytes.iter().fold(u32::MAX, |crc, byte| crc >> 8 ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

#[test]
fn crc_of_the_standard() {
    // RFC 3720, B.4 "CRC Examples".
    for (bytes, crc) in [([0; 32], 0x8a91_36aa), ([0xff; 32], 0x62a8_ab43)] {
        assert_eq!(crc32c(&bytes), crc);
    }
}
