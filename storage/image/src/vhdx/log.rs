//! The log: a ring of entries, each with 4 KiB sectors to be written to the file. [MS-VHDX] 2.3.
//!
//! A writer logs a change, waits, makes it, waits. Whoever opens the image after a crash finds the newest
//! complete sequence of entries ([`active`]) and makes its changes again ([`Active::changes`]).

#[cfg(test)]
use super::ALIGN_BYTES;
use super::{Guid, Region, VhdxError};
use crate::bytes::{bytes16, le32, le64, put};
use crate::crc32c::crc32c_without;

/// The unit of entries and of changes.
pub const SECTOR_BYTES: usize = 4096;
/// Longest log that is replayed: it is held in memory. Hyper-V and qemu-img make logs of 1 MiB.
pub const REPLAY_MAX_BYTES: u64 = 32 << 20;

/// How much a replay may lengthen the file. More is a lie that would fill the host's disk.
const GROWTH_MAX_BYTES: u64 = 4 << 30;
const ENTRY_HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;

/// A change of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These bytes, a sector, belong at this offset.
    Sector {
        /// File offset, a multiple of 4096.
        offset: u64,
        /// 4096 bytes.
        bytes: Vec<u8>,
    },
    /// A range of zeroes.
    Zero {
        /// File offset, a multiple of 4096.
        offset: u64,
        /// Length, a multiple of 4096.
        bytes: u64,
    },
}

impl Change {
    fn range(&self) -> (u64, u64) {
        match self {
            Change::Sector { offset, .. } => (*offset, SECTOR_BYTES as u64),
            Change::Zero { offset, bytes } => (*offset, *bytes),
        }
    }
}

/// An entry that is whole.
#[derive(Clone, Debug)]
struct Entry {
    at: usize,
    bytes: usize,
    tail: usize,
    sequence: u64,
    flushed_bytes: u64,
    last_bytes: u64,
}

/// The newest complete sequence of entries, oldest first.
#[derive(Clone, Debug)]
pub struct Active<'a> {
    log: &'a [u8],
    entries: Vec<Entry>,
}

/// Copies `bytes` bytes of the ring from `at` on.
fn ring(log: &[u8], at: usize, bytes: usize) -> Option<Vec<u8>> {
    if bytes > log.len() {
        return None;
    }
    let first = log.get(at..)?;
    let first = first.get(..bytes.min(first.len()))?;
    let mut out = first.to_vec();
    out.extend(log.get(..bytes - first.len())?);
    Some(out)
}

/// The entry at `at`, if one of this log is there and is whole.
fn entry(log: &[u8], at: usize, guid: &Guid) -> Option<Entry> {
    let header = log.get(at..at + ENTRY_HEADER_BYTES)?;
    if !header.starts_with(b"loge") || bytes16(header, 32)? != *guid {
        return None;
    }
    let bytes = le32(header, 8)? as usize;
    let tail = le32(header, 12)? as usize;
    let sequence = le64(header, 16)?;
    let descriptors = le32(header, 24)? as usize;
    let aligned = bytes.is_multiple_of(SECTOR_BYTES) && tail.is_multiple_of(SECTOR_BYTES);
    if !aligned || bytes == 0 || bytes > log.len() || tail >= log.len() || sequence == 0 {
        return None;
    }
    let head_bytes = descriptors.checked_mul(DESCRIPTOR_BYTES)?.checked_add(ENTRY_HEADER_BYTES)?;
    let head_bytes = head_bytes.checked_next_multiple_of(SECTOR_BYTES)?;
    if head_bytes > bytes {
        return None;
    }
    // Signatures first: no sector can belong to two entries then, so that a log full of headers, each of which
    // claims all of it, costs one look at each sector and not a checksum of everything for each.
    for i in (SECTOR_BYTES..bytes).step_by(SECTOR_BYTES) {
        let sector = log.get((at + i) % log.len()..)?;
        let fits = if i < head_bytes {
            sector.starts_with(b"desc") || sector.starts_with(b"zero")
        } else {
            sector.starts_with(b"data")
        };
        if !fits {
            return None;
        }
    }
    let whole = ring(log, at, bytes)?;
    if crc32c_without(&whole, 4) != le32(header, 4)? {
        return None;
    }
    let found = Entry { at, bytes, tail, sequence, flushed_bytes: le64(header, 48)?, last_bytes: le64(header, 56)? };
    changes_of(&whole, sequence)?;
    Some(found)
}

/// What an entry, whole and in one piece, changes; `None` when it contradicts itself.
fn changes_of(whole: &[u8], sequence: u64) -> Option<Vec<Change>> {
    let count = le32(whole, 24)? as usize;
    let head_bytes = (ENTRY_HEADER_BYTES + count * DESCRIPTOR_BYTES).next_multiple_of(SECTOR_BYTES);
    let mut data = whole.get(head_bytes..)?.chunks_exact(SECTOR_BYTES);
    let mut changes = Vec::new();
    for descriptor in whole.get(ENTRY_HEADER_BYTES..)?.chunks_exact(DESCRIPTOR_BYTES).take(count) {
        let offset = le64(descriptor, 16)?;
        if le64(descriptor, 24)? != sequence || !offset.is_multiple_of(SECTOR_BYTES as u64) {
            return None;
        }
        if descriptor.starts_with(b"zero") {
            let bytes = le64(descriptor, 8)?;
            if !bytes.is_multiple_of(SECTOR_BYTES as u64) {
                return None;
            }
            changes.push(Change::Zero { offset, bytes });
            continue;
        }
        let sector = data.next()?;
        let numbers = (u64::from(le32(sector, 4)?) << 32) | u64::from(le32(sector, SECTOR_BYTES - 4)?);
        if !descriptor.starts_with(b"desc") || !sector.starts_with(b"data") || numbers != sequence {
            return None;
        }
        // The sector gave its first 8 and last 4 bytes to signature and number; the descriptor has them.
        let mut bytes = sector.to_vec();
        put(&mut bytes, 0, descriptor.get(8..16)?);
        put(&mut bytes, SECTOR_BYTES - 4, descriptor.get(4..8)?);
        changes.push(Change::Sector { offset, bytes });
    }
    Some(changes)
}

/// Finds the sequence to be replayed: of the sequences that reach back to where their last entry says that they
/// start, the one with the largest number. `None` when the log holds none. [MS-VHDX] 2.3.3 "Log Replay".
pub fn active<'a>(log: &'a [u8], guid: &Guid) -> Option<Active<'a>> {
    let mut best: Option<Vec<Entry>> = None;
    let mut start = 0;
    while start < log.len() {
        let mut run: Vec<Entry> = Vec::new();
        let mut at = start;
        let mut used = 0;
        while let Some(next) = entry(log, at, guid) {
            let follows = run.last().is_none_or(|last| last.sequence.checked_add(1) == Some(next.sequence));
            used += next.bytes;
            if !follows || used > log.len() {
                break;
            }
            at = (at + next.bytes) % log.len();
            run.push(next);
        }
        // The next search starts behind this run, unless the run wrapped around the end.
        let run_bytes: usize = run.iter().map(|entry| entry.bytes).sum();
        start += run_bytes.max(SECTOR_BYTES);
        let Some(head) = run.last() else { continue };
        let newer = best.as_ref().and_then(|best| best.last()).is_none_or(|best| head.sequence > best.sequence);
        let tail = run.iter().position(|entry| entry.at == head.tail);
        if let (true, Some(tail)) = (newer, tail) {
            best = Some(run.split_off(tail));
        }
    }
    best.map(|entries| Active { log, entries })
}

impl Active<'_> {
    /// How long the file must be when all changes are made.
    pub fn last_bytes(&self) -> u64 {
        self.entries.last().map_or(0, |head| head.last_bytes)
    }

    /// The changes, in order. A change outside the file that the log describes is refused, as are changes of the
    /// file identifier, the headers and the log itself; so is a file that has become shorter.
    pub fn changes(&self, log: Region, file_bytes: u64) -> Result<Vec<Change>, VhdxError> {
        let Some(head) = self.entries.last() else { return Ok(Vec::new()) };
        if file_bytes < head.flushed_bytes {
            return Err(VhdxError::FileShorterThanLog { flushed_bytes: head.flushed_bytes, file_bytes });
        }
        let last_bytes = head.last_bytes.max(file_bytes);
        if last_bytes - file_bytes > GROWTH_MAX_BYTES {
            return Err(VhdxError::LogGrowth { last_bytes, file_bytes });
        }
        let headers = Region { offset: 0, bytes: super::header::REGION_OFFSETS[0] };
        let mut out = Vec::new();
        for entry in &self.entries {
            let whole = ring(self.log, entry.at, entry.bytes).unwrap_or_default();
            out.extend(changes_of(&whole, entry.sequence).unwrap_or_default());
        }
        for (offset, bytes) in out.iter().map(Change::range) {
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= last_bytes);
            if !inside || headers.touches(offset, bytes) || log.touches(offset, bytes) {
                return Err(VhdxError::LogTarget { offset, bytes, last_bytes });
            }
        }
        Ok(out)
    }
}

/// A new entry that changes whole sectors of the file.
pub struct NewEntry<'a> {
    /// The header's log GUID.
    pub guid: &'a Guid,
    /// Larger than of every entry before; not 0.
    pub sequence: u64,
    /// Where in the log it will be, and where its sequence starts.
    pub at: u32,
    /// Length of the file, which is on stable storage.
    pub file_bytes: u64,
    /// Offsets and 4096 bytes each.
    pub sectors: &'a [(u64, &'a [u8])],
}

/// How many sectors an entry of at most `bytes` can change.
pub fn sectors_that_fit(bytes: u64) -> usize {
    let sectors = (bytes as usize / SECTOR_BYTES).saturating_sub(1);
    sectors.min((SECTOR_BYTES - ENTRY_HEADER_BYTES) / DESCRIPTOR_BYTES)
}

impl NewEntry<'_> {
    /// The entry's bytes: a sequence of its own.
    pub fn serialise(&self) -> Vec<u8> {
        let head_bytes = (ENTRY_HEADER_BYTES + self.sectors.len() * DESCRIPTOR_BYTES).next_multiple_of(SECTOR_BYTES);
        let bytes = head_bytes + self.sectors.len() * SECTOR_BYTES;
        let mut out = vec![0; bytes];
        put(&mut out, 0, b"loge");
        put(&mut out, 8, &(bytes as u32).to_le_bytes());
        put(&mut out, 12, &self.at.to_le_bytes());
        put(&mut out, 16, &self.sequence.to_le_bytes());
        put(&mut out, 24, &(self.sectors.len() as u32).to_le_bytes());
        put(&mut out, 32, self.guid);
        put(&mut out, 48, &self.file_bytes.to_le_bytes());
        put(&mut out, 56, &self.file_bytes.to_le_bytes());
        for (i, (offset, sector)) in self.sectors.iter().enumerate() {
            let at = ENTRY_HEADER_BYTES + i * DESCRIPTOR_BYTES;
            put(&mut out, at, b"desc");
            put(&mut out, at + 4, sector.get(SECTOR_BYTES - 4..).unwrap_or_default());
            put(&mut out, at + 8, sector.get(..8).unwrap_or_default());
            put(&mut out, at + 16, &offset.to_le_bytes());
            put(&mut out, at + 24, &self.sequence.to_le_bytes());
            let at = head_bytes + i * SECTOR_BYTES;
            put(&mut out, at, sector);
            put(&mut out, at, b"data");
            put(&mut out, at + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut out, at + SECTOR_BYTES - 4, &(self.sequence as u32).to_le_bytes());
        }
        let crc = crc32c_without(&out, 4);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }
}

#[cfg(test)]
const GUID: Guid = [7; 16];
#[cfg(test)]
const LOG: Region = Region { offset: ALIGN_BYTES, bytes: ALIGN_BYTES };
#[cfg(test)]
const FILE_BYTES: u64 = 16 << 20;

/// An entry that fills the sector at `target` with its number.
#[cfg(test)]
fn numbered(sequence: u64, at: u32, target: u64) -> Vec<u8> {
    let sector = vec![sequence as u8; SECTOR_BYTES];
    let sectors = [(target, sector.as_slice())];
    NewEntry { guid: &GUID, sequence, at, file_bytes: FILE_BYTES, sectors: &sectors }.serialise()
}

/// Places a sequence of entries of two sectors; the tail of each is its second number, in sectors.
#[cfg(test)]
fn log_of(entries: &[(usize, usize, u64)]) -> Vec<u8> {
    let mut log = vec![0; 16 * SECTOR_BYTES];
    for (at, tail, sequence) in entries {
        let bytes =
            super::header::patched(&numbered(*sequence, 0, 8 << 20), 12, &((tail * SECTOR_BYTES) as u32).to_le_bytes());
        for (i, byte) in bytes.iter().enumerate() {
            let log_bytes = log.len();
            log[(at * SECTOR_BYTES + i) % log_bytes] = *byte;
        }
    }
    log
}

#[test]
fn the_newest_sequence_that_is_whole_is_found() {
    // Entries as (place, tail, number), and the numbers that are to be replayed.
    type Case<'a> = (&'a [(usize, usize, u64)], &'a [u64]);
    let cases: &[Case<'_>] = &[
        (&[], &[]),
        (&[(0, 0, 5)], &[5]),
        (&[(0, 0, 5), (2, 0, 6), (4, 0, 7)], &[5, 6, 7]),
        (&[(0, 0, 5), (2, 0, 6), (4, 4, 7)], &[7]),
        (&[(0, 0, 5), (2, 2, 6), (4, 2, 7)], &[6, 7]),
        // Not consecutive: two sequences, the newer one counts.
        (&[(0, 0, 5), (2, 2, 9)], &[9]),
        (&[(0, 0, 9), (2, 2, 5)], &[9]),
        // The newer one does not reach back to its tail.
        (&[(0, 0, 5), (4, 2, 9)], &[5]),
        (&[(4, 8, 9)], &[]),
        // Around the end of the ring, by sequence and by a single entry.
        (&[(14, 14, 5), (0, 14, 6)], &[5, 6]),
        (&[(15, 15, 5), (1, 15, 6)], &[5, 6]),
    ];
    for (entries, want) in cases {
        let log = log_of(entries);
        let found = active(&log, &GUID);
        let got: Vec<u64> = found.iter().flat_map(|found| found.entries.iter().map(|entry| entry.sequence)).collect();
        assert_eq!(&got, want, "{entries:?}");
        assert!(active(&log, &[8; 16]).is_none(), "entries of another log");
    }
}

#[test]
fn changes_come_back_in_order() {
    let sector: Vec<u8> = (0..SECTOR_BYTES).map(|i| (i % 251) as u8).collect();
    let other = vec![0xee; SECTOR_BYTES];
    let sectors = [(8 << 20, sector.as_slice()), ((8 << 20) + 4096, other.as_slice())];
    let sequence = 0x1_2345_6789;
    let mut log = NewEntry { guid: &GUID, sequence, at: 0, file_bytes: FILE_BYTES, sectors: &sectors }.serialise();
    assert_eq!(log.len(), 3 * SECTOR_BYTES);
    log.resize(ALIGN_BYTES as usize, 0);
    let found = active(&log, &GUID).unwrap();
    let want =
        [Change::Sector { offset: 8 << 20, bytes: sector }, Change::Sector { offset: (8 << 20) + 4096, bytes: other }];
    assert_eq!(found.changes(LOG, FILE_BYTES).unwrap(), want);
    assert_eq!(
        found.changes(LOG, FILE_BYTES - 1),
        Err(VhdxError::FileShorterThanLog { flushed_bytes: FILE_BYTES, file_bytes: FILE_BYTES - 1 })
    );
    assert_eq!((sectors_that_fit(512 << 10), sectors_that_fit(8192), sectors_that_fit(4096)), (126, 1, 0));
}

#[test]
fn a_zero_descriptor_needs_no_sector() {
    let mut bytes = vec![0; SECTOR_BYTES];
    put(&mut bytes, 0, b"loge");
    put(&mut bytes, 8, &(SECTOR_BYTES as u32).to_le_bytes());
    put(&mut bytes, 16, &3u64.to_le_bytes());
    put(&mut bytes, 24, &1u32.to_le_bytes());
    put(&mut bytes, 32, &GUID);
    put(&mut bytes, 64, b"zero");
    put(&mut bytes, 72, &8192u64.to_le_bytes());
    put(&mut bytes, 80, &(8u64 << 20).to_le_bytes());
    put(&mut bytes, 88, &3u64.to_le_bytes());
    let bytes = super::header::patched(&bytes, 0, b"loge");
    let found = active(&bytes, &GUID).unwrap();
    assert_eq!(found.changes(LOG, FILE_BYTES).unwrap(), [Change::Zero { offset: 8 << 20, bytes: 8192 }]);
    for (at, patch) in [(72, 1u64), (80, 1), (88, 4)] {
        let bytes = super::header::patched(&bytes, at, &patch.to_le_bytes());
        assert!(active(&bytes, &GUID).is_none(), "{at}");
    }
    let huge = super::header::patched(&bytes, 72, &(1u64 << 62).to_le_bytes());
    let refused = active(&huge, &GUID).unwrap().changes(LOG, FILE_BYTES);
    assert!(matches!(refused, Err(VhdxError::LogTarget { .. })));
}

#[test]
fn a_log_full_of_headers_is_searched_in_one_pass() {
    // Each sector claims the whole ring; 8192 checksums of 32 MiB would take minutes.
    let mut log = vec![0; REPLAY_MAX_BYTES as usize];
    let ring_bytes = log.len() as u32;
    for sector in log.chunks_mut(SECTOR_BYTES) {
        sector[..64].copy_from_slice(&numbered(1, 0, 8 << 20)[..64]);
        put(sector, 8, &ring_bytes.to_le_bytes());
    }
    assert!(active(&log, &GUID).is_none());
}

#[test]
fn entries_that_lie_are_not_replayed() {
    let whole = log_of(&[(0, 0, 5)]);
    let used = 2 * SECTOR_BYTES;
    for at in (0..used).step_by(7) {
        let mut log = whole.clone();
        log[at] ^= 0x40;
        assert!(active(&log, &GUID).is_none(), "byte {at}");
    }
    // Checksum mended: length, tail, number, descriptor count, descriptor and sector signatures and numbers.
    for (at, patch) in [
        (8, 0u32),
        (8, 4097),
        (8, u32::MAX),
        (12, 1),
        (12, 1 << 20),
        (16, 0),
        (24, 2),
        (24, u32::MAX),
        (64, 0),
        (80, 1),
        (88, 4),
        (4096, 0),
        (4100, 1),
        (8188, 4),
    ] {
        let entry = super::header::patched(&whole[..used], at, &patch.to_le_bytes());
        let mut log = whole.clone();
        log[..used].copy_from_slice(&entry);
        assert!(active(&log, &GUID).is_none(), "{at} {patch}");
    }
    let grown = super::header::patched(&whole[..used], 56, &(FILE_BYTES + (4 << 30) + 1).to_le_bytes());
    let refused = active(&grown, &GUID).unwrap().changes(LOG, FILE_BYTES);
    assert!(matches!(refused, Err(VhdxError::LogGrowth { .. })));
    for target in [0, 64 << 10, 1 << 20, (2 << 20) - 4096, FILE_BYTES, u64::MAX - 4095] {
        let mut log = numbered(1, 0, target);
        log.resize(16 * SECTOR_BYTES, 0);
        let refused = active(&log, &GUID).unwrap().changes(LOG, FILE_BYTES);
        assert!(matches!(refused, Err(VhdxError::LogTarget { .. })), "{target:#x}");
    }
}
