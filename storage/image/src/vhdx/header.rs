//! File identifier, the two headers, the region table. [MS-VHDX] 2.2.

#[cfg(test)]
use super::ALIGN_BYTES;
use super::{Guid, VhdxError, check_place, guid_text};
use crate::bytes::{bytes16, le16, le32, le64, put};
use crate::crc32c::crc32c_without;

/// How much of the file's start [`Header::current`] and [`Regions::parse`] look at: identifier, headers, tables.
pub const HEADERS_BYTES: u64 = 320 << 10;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;
/// Where the two headers are.
pub const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the two region tables are.
pub const REGION_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a region table.
pub const REGION_TABLE_BYTES: usize = 64 << 10;

pub(super) const FILE_SIGNATURE: &[u8] = b"vhdxfile";
pub(super) const BAT_GUID: Guid = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
pub(super) const METADATA_GUID: Guid = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const ENTRIES_MAX: u32 = 2047;

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The header with the larger number is the current one.
    pub sequence: u64,
    /// Changes with the first write after the file was opened.
    pub file_write_guid: Guid,
    /// Changes with the first change of what a guest sees.
    pub data_write_guid: Guid,
    /// Which log entries count; zero when the log is empty.
    pub log_guid: Guid,
    /// Where the log is.
    pub log: Region,
}

/// A range of the file at multiples of 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// File offset.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl Region {
    /// Whether the region shares bytes with a range.
    pub fn touches(&self, offset: u64, bytes: u64) -> bool {
        offset < self.offset.saturating_add(self.bytes) && self.offset < offset.saturating_add(bytes)
    }
}

/// Where the tables of the image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Region,
    /// The metadata region.
    pub metadata: Region,
}

fn part_of<'a>(start: &'a [u8], offset: u64, bytes: usize, part: &'static str) -> Result<&'a [u8], VhdxError> {
    let cut = VhdxError::Truncated { part, have_bytes: start.len() };
    start.get(offset as usize..offset as usize + bytes).ok_or(cut)
}

/// Checks signature and CRC-32C of a structure that has them in its first eight bytes.
fn check_part(bytes: &[u8], part: &'static str, want: &'static str) -> Result<(), VhdxError> {
    if !bytes.starts_with(want.as_bytes()) {
        return Err(VhdxError::PartSignature { part, want });
    }
    let stored = le32(bytes, 4).ok_or(VhdxError::Truncated { part, have_bytes: bytes.len() })?;
    let computed = crc32c_without(bytes, 4);
    if stored == computed { Ok(()) } else { Err(VhdxError::Checksum { part, stored, computed }) }
}

impl Header {
    /// The current header and its number (0 or 1), from the first [`HEADERS_BYTES`] of the file.
    pub fn current(start: &[u8], file_bytes: u64) -> Result<(Header, usize), VhdxError> {
        if !start.starts_with(FILE_SIGNATURE) {
            return Err(VhdxError::Signature);
        }
        let [first, second] = HEADER_OFFSETS.map(|offset| {
            let bytes = part_of(start, offset, HEADER_BYTES, "header")?;
            Header::parse(bytes, file_bytes)
        });
        match (first, second) {
            (Ok(first), Ok(second)) if first.sequence >= second.sequence => Ok((first, 0)),
            (_, Ok(second)) => Ok((second, 1)),
            (Ok(first), Err(_)) => Ok((first, 0)),
            (Err(first), Err(second)) => Err(VhdxError::NoHeader { first: Box::new(first), second: Box::new(second) }),
        }
    }

    fn parse(bytes: &[u8], file_bytes: u64) -> Result<Header, VhdxError> {
        check_part(bytes, "header", "head")?;
        let cut = || VhdxError::Truncated { part: "header", have_bytes: bytes.len() };
        let version = le16(bytes, 66).ok_or_else(cut)?;
        if version != 1 {
            return Err(VhdxError::Version(version));
        }
        let header = Header {
            sequence: le64(bytes, 8).ok_or_else(cut)?,
            file_write_guid: bytes16(bytes, 16).ok_or_else(cut)?,
            data_write_guid: bytes16(bytes, 32).ok_or_else(cut)?,
            log_guid: bytes16(bytes, 48).ok_or_else(cut)?,
            log: Region {
                offset: le64(bytes, 72).ok_or_else(cut)?,
                bytes: u64::from(le32(bytes, 68).ok_or_else(cut)?),
            },
        };
        let log_version = le16(bytes, 64).ok_or_else(cut)?;
        if header.needs_replay() && log_version != 0 {
            return Err(VhdxError::LogVersion(log_version));
        }
        check_place("log", header.log.offset, header.log.bytes, file_bytes)?;
        Ok(header)
    }

    /// Whether a writer left entries in the log.
    pub fn needs_replay(&self) -> bool {
        self.log_guid != [0; 16]
    }

    /// The header's bytes.
    pub fn serialise(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        put(&mut out, 0, b"head");
        put(&mut out, 8, &self.sequence.to_le_bytes());
        put(&mut out, 16, &self.file_write_guid);
        put(&mut out, 32, &self.data_write_guid);
        put(&mut out, 48, &self.log_guid);
        put(&mut out, 66, &1u16.to_le_bytes());
        put(&mut out, 68, &(self.log.bytes as u32).to_le_bytes());
        put(&mut out, 72, &self.log.offset.to_le_bytes());
        let crc = crc32c_without(&out, 4);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }
}

impl Regions {
    /// Finds the regions in the first [`HEADERS_BYTES`] of the file. The second table serves when the first one is
    /// damaged.
    pub fn parse(start: &[u8], log: Region, file_bytes: u64) -> Result<Regions, VhdxError> {
        let [first, second] = REGION_OFFSETS.map(|offset| {
            let bytes = part_of(start, offset, REGION_TABLE_BYTES, "region table")?;
            check_part(bytes, "region table", "regi")?;
            Ok(bytes)
        });
        let table = first.or_else(|error: VhdxError| second.map_err(|_: VhdxError| error))?;
        let regions = Regions::from_table(table, file_bytes)?;
        let parts = [("log", log), ("BAT", regions.bat), ("metadata region", regions.metadata)];
        for (i, (first, a)) in parts.iter().enumerate() {
            if let Some((second, _)) = parts.iter().skip(i + 1).find(|(_, b)| a.touches(b.offset, b.bytes)) {
                return Err(VhdxError::Overlap { first, second });
            }
        }
        Ok(regions)
    }

    fn from_table(table: &[u8], file_bytes: u64) -> Result<Regions, VhdxError> {
        let part = "region table";
        let cut = || VhdxError::Truncated { part, have_bytes: table.len() };
        let count = le32(table, 8).ok_or_else(cut)?;
        if count > ENTRIES_MAX {
            return Err(VhdxError::TooManyEntries { part, count });
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in table.get(16..).unwrap_or_default().chunks_exact(32).take(count as usize) {
            let guid = bytes16(entry, 0).ok_or_else(cut)?;
            let region =
                Region { offset: le64(entry, 16).ok_or_else(cut)?, bytes: u64::from(le32(entry, 24).ok_or_else(cut)?) };
            let required = le32(entry, 28).ok_or_else(cut)? & 1 != 0;
            let (slot, part) = match guid {
                BAT_GUID => (&mut bat, "BAT"),
                METADATA_GUID => (&mut metadata, "metadata region"),
                _ if required => return Err(VhdxError::UnknownRequired { part: "region", guid: guid_text(&guid) }),
                _ => continue,
            };
            check_place(part, region.offset, region.bytes, file_bytes)?;
            if slot.replace(region).is_some() {
                return Err(VhdxError::Twice { part });
            }
        }
        let bat = bat.ok_or(VhdxError::Missing { part: "BAT" })?;
        let metadata = metadata.ok_or(VhdxError::Missing { part: "metadata region" })?;
        Ok(Regions { bat, metadata })
    }

    /// The bytes of a region table.
    pub(super) fn serialise(&self) -> Vec<u8> {
        let mut out = vec![0; REGION_TABLE_BYTES];
        put(&mut out, 0, b"regi");
        put(&mut out, 8, &2u32.to_le_bytes());
        for (at, guid, region) in [(16, BAT_GUID, self.bat), (48, METADATA_GUID, self.metadata)] {
            put(&mut out, at, &guid);
            put(&mut out, at + 16, &region.offset.to_le_bytes());
            put(&mut out, at + 24, &(region.bytes as u32).to_le_bytes());
            put(&mut out, at + 28, &1u32.to_le_bytes());
        }
        let crc = crc32c_without(&out, 4);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }
}

#[cfg(test)]
const FILE_BYTES: u64 = 16 * ALIGN_BYTES;

#[cfg(test)]
pub(super) fn sample_header(sequence: u64) -> Header {
    let log = Region { offset: ALIGN_BYTES, bytes: ALIGN_BYTES };
    Header { sequence, file_write_guid: [1; 16], data_write_guid: [2; 16], log_guid: [0; 16], log }
}

#[cfg(test)]
fn start_of(first: &[u8], second: &[u8]) -> Vec<u8> {
    let mut start = vec![0; HEADERS_BYTES as usize];
    put(&mut start, 0, FILE_SIGNATURE);
    put(&mut start, HEADER_OFFSETS[0] as usize, first);
    put(&mut start, HEADER_OFFSETS[1] as usize, second);
    let region = |mib| Region { offset: mib * ALIGN_BYTES, bytes: ALIGN_BYTES };
    let table = Regions { bat: region(2), metadata: region(3) }.serialise();
    put(&mut start, REGION_OFFSETS[0] as usize, &table);
    put(&mut start, REGION_OFFSETS[1] as usize, &table);
    start
}

/// Changes bytes of a part and mends its checksum, so that the field itself is what is tested.
#[cfg(test)]
pub(super) fn patched(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    put(&mut out, at, patch);
    let crc = crc32c_without(&out, 4);
    put(&mut out, 4, &crc.to_le_bytes());
    out
}

#[test]
fn the_whole_header_with_the_larger_number_counts() {
    let (low, high) = (sample_header(4).serialise(), sample_header(5).serialise());
    let torn = |bytes: &[u8]| {
        let mut torn = bytes.to_vec();
        torn[16] ^= 1;
        torn
    };
    for (first, second, want) in [
        (low.clone(), high.clone(), (5, 1)),
        (high.clone(), low.clone(), (5, 0)),
        (low.clone(), torn(&high), (4, 0)),
        (torn(&high), low.clone(), (4, 1)),
        (low.clone(), low.clone(), (4, 0)),
    ] {
        let (header, index) = Header::current(&start_of(&first, &second), FILE_BYTES).unwrap();
        assert_eq!((header.sequence, index), want);
    }
    let error = Header::current(&start_of(&torn(&low), &torn(&high)), FILE_BYTES).unwrap_err();
    assert!(matches!(error, VhdxError::NoHeader { .. }), "{error}");
    assert_eq!(Header::current(b"vhdxfil", FILE_BYTES), Err(VhdxError::Signature));
    for cut in (0..HEADERS_BYTES as usize).step_by(4093) {
        let start = start_of(&low, &high);
        let parsed = Header::current(&start[..cut], FILE_BYTES);
        assert!(
            parsed.is_err()
                || Regions::parse(&start[..cut], sample_header(0).log, FILE_BYTES).is_err()
                || cut >= 256 << 10
        );
    }
}

#[test]
fn header_fields_are_held_to_their_limits() {
    let place = |offset, bytes| VhdxError::Place { part: "log", offset, bytes, file_bytes: FILE_BYTES };
    let cases: &[(usize, &[u8], VhdxError)] = &[
        (0, b"hea?", VhdxError::PartSignature { part: "header", want: "head" }),
        (66, &[2], VhdxError::Version(2)),
        (48, &[1; 18], VhdxError::LogVersion(0x101)),
        (68, &[0; 4], place(ALIGN_BYTES, 0)),
        (68, &[1], place(ALIGN_BYTES, ALIGN_BYTES + 1)),
        (68, &[0, 0, 0xf0, 0xff], place(ALIGN_BYTES, 0xfff0_0000)),
        (72, &[0; 8], place(0, ALIGN_BYTES)),
        (72, &[0xff; 8], place(u64::MAX, ALIGN_BYTES)),
    ];
    for (at, patch, want) in cases {
        let bytes = patched(&sample_header(1).serialise(), *at, patch);
        assert_eq!(Header::parse(&bytes, FILE_BYTES).as_ref(), Err(want), "patch at {at}");
    }
}

#[test]
fn regions_are_found_and_do_not_overlap() {
    let header = sample_header(1).serialise();
    let start = start_of(&header, &header);
    let log = sample_header(1).log;
    let regions = Regions::parse(&start, log, FILE_BYTES).unwrap();
    assert_eq!((regions.bat.offset, regions.metadata.offset), (2 << 20, 3 << 20));
    let table = regions.serialise();
    let place = |part, offset, bytes| VhdxError::Place { part, offset, bytes, file_bytes: FILE_BYTES };
    let unknown = "05050505-0505-0505-0505-050505050505".to_owned();
    let cases: &[(usize, &[u8], VhdxError)] = &[
        (8, &[0], VhdxError::Missing { part: "BAT" }),
        (8, &[1], VhdxError::Missing { part: "metadata region" }),
        (8, &2048u32.to_le_bytes(), VhdxError::TooManyEntries { part: "region table", count: 2048 }),
        (8, &[0xff; 4], VhdxError::TooManyEntries { part: "region table", count: u32::MAX }),
        (16, &[5; 16], VhdxError::UnknownRequired { part: "region", guid: unknown }),
        (48, &BAT_GUID, VhdxError::Twice { part: "BAT" }),
        (32, &[1], place("BAT", (2 << 20) + 1, 1 << 20)),
        (32, &[0xff; 8], place("BAT", u64::MAX, 1 << 20)),
        (40, &[0, 0, 0xf0, 0xff], place("BAT", 2 << 20, 0xfff0_0000)),
        (64, &[0, 0, 0x20], VhdxError::Overlap { first: "BAT", second: "metadata region" }),
        (32, &[0, 0, 0x10], VhdxError::Overlap { first: "log", second: "BAT" }),
    ];
    for (at, patch, want) in cases {
        let mut start = start.clone();
        let table = patched(&table, *at, patch);
        put(&mut start, REGION_OFFSETS[0] as usize, &table);
        assert_eq!(Regions::parse(&start, log, FILE_BYTES).as_ref(), Err(want), "patch at {at}");
    }
    let mut torn = start.clone();
    torn[REGION_OFFSETS[0] as usize + 100] ^= 1;
    assert_eq!(Regions::parse(&torn, log, FILE_BYTES), Ok(regions));
    torn[REGION_OFFSETS[1] as usize + 100] ^= 1;
    assert!(matches!(Regions::parse(&torn, log, FILE_BYTES), Err(VhdxError::Checksum { .. })));
}
