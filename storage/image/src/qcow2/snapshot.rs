//! The snapshot table: the internal snapshots of an image, each with an L1 table of its own.

use thiserror::Error;

use super::{Header, L1_MAX_BYTES, SNAPSHOT_TABLE_MAX_BYTES, SNAPSHOTS_MAX};
use crate::{be16, be32, be64};

/// Largest extra data of a snapshot; QEMU's limit.
const EXTRA_MAX_BYTES: u32 = 1024;
/// Extra data that has a meaning here: VM state size, disk size, instruction count, 8 bytes each.
const EXTRA_KNOWN_BYTES: usize = 24;
/// Extra data that every entry of version 3 has: VM state size and disk size.
const EXTRA_V3_BYTES: u32 = 16;
/// Fixed fields of an entry.
const ENTRY_BYTES: usize = 40;
/// The instruction count of a snapshot that has none.
const NO_ICOUNT: u64 = u64::MAX;

/// The L1 table of one internal snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotL1 {
    /// Host offset.
    pub offset: u64,
    /// Entries, at most 32 MiB of them.
    pub entries: u32,
}

impl SnapshotL1 {
    /// Whether the table is aligned and within the format's limits.
    fn is_possible(self, header: &Header) -> bool {
        let bounded = u64::from(self.entries) * 8 <= L1_MAX_BYTES && self.offset < 1 << 56;
        bounded && header.geometry.is_aligned(self.offset)
    }
}

/// One internal snapshot. Identifier and name are bytes as stored: QEMU writes what it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table.
    pub l1: SnapshotL1,
    /// Unique identifier, a decimal number when QEMU chose it.
    pub id: Vec<u8>,
    /// Name; need not be unique.
    pub name: Vec<u8>,
    /// Time it was taken, seconds since 1970 in UTC.
    pub date_sec: u32,
    /// Nanoseconds of that time.
    pub date_nsec: u32,
    /// Time the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Length of the VM state that lies behind the disk in the L1 table; 0 without one.
    pub vm_state_bytes: u64,
    /// Size of the disk when the snapshot was taken.
    pub disk_bytes: u64,
    /// Instructions executed, where the machine counted them.
    pub icount: Option<u64>,
    /// Extra data behind the fields that are known, kept when the table is rewritten.
    pub unknown_extra: Vec<u8>,
}

/// A snapshot table as it is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// The snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Length of the table in bytes.
    pub bytes: u64,
    /// What is wrong with single entries.
    pub faults: Vec<SnapshotError>,
}

/// A snapshot table that cannot be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SnapshotError {
    /// The bytes end inside an entry.
    #[error("the snapshot table ends inside entry {index} of {count}")]
    CutOff {
        /// The entry, from 0.
        index: u32,
        /// Entries the header promises.
        count: u32,
    },
    /// Extra data out of limits.
    #[error("snapshot {index} has {extra_bytes} bytes of extra data; at most 1024 are allowed")]
    Extra {
        /// The snapshot, from 0.
        index: u32,
        /// Its length field.
        extra_bytes: u32,
    },
    /// An L1 table out of limits.
    #[error("snapshot {index} has an L1 table of {entries} entries at {offset:#x}: not aligned, or larger than 32 MiB")]
    L1 {
        /// The snapshot, from 0.
        index: u32,
        /// Its entries.
        entries: u32,
        /// Its offset.
        offset: u64,
    },
    /// Extra data that version 3 demands is missing.
    #[error("snapshot {index} has no sizes in its extra data, which version 3 demands")]
    Incomplete {
        /// The snapshot, from 0.
        index: u32,
    },
    /// More snapshots than the format allows.
    #[error("an image has at most 65536 snapshots; delete some first")]
    TooMany,
    /// The table would be longer than the format allows.
    #[error("the snapshot table would have {bytes} bytes; at most 64 MiB are allowed")]
    TableTooLarge {
        /// Its length.
        bytes: u64,
    },
    /// A name or identifier longer than its length field can say.
    #[error("a snapshot name of {bytes} bytes is too long; at most 65535 are allowed")]
    NameTooLong {
        /// Its length.
        bytes: u64,
    },
}

/// Reads the snapshot table in `table`, which may be longer than it. Every L1 table can be where it is said to be.
pub fn parse_snapshots(header: &Header, table: &[u8]) -> Result<SnapshotTable, SnapshotError> {
    let table = parse_damaged_snapshots(header, table)?;
    let fault = table.faults.iter().find(|fault| matches!(fault, SnapshotError::L1 { .. }));
    fault.map_or(Ok(()), |fault| Err(*fault)).map(|()| table)
}

/// As [`parse_snapshots`], with entries whose L1 table cannot be right: for a look at an image, not for a change.
pub fn parse_damaged_snapshots(header: &Header, table: &[u8]) -> Result<SnapshotTable, SnapshotError> {
    let count = header.snapshot_count;
    let mut at = 0usize;
    let mut out = SnapshotTable::default();
    for index in 0..count {
        let cut = SnapshotError::CutOff { index, count };
        let entry = table.get(at..).ok_or(cut)?;
        let (snapshot, bytes) = parse_entry(header, entry, index)?;
        let SnapshotL1 { offset, entries } = snapshot.l1;
        if !snapshot.l1.is_possible(header) {
            out.faults.push(SnapshotError::L1 { index, entries, offset });
        }
        if header.geometry.version >= 3 && be32(entry, 36).is_some_and(|extra_bytes| extra_bytes < EXTRA_V3_BYTES) {
            out.faults.push(SnapshotError::Incomplete { index });
        }
        out.snapshots.push(snapshot);
        at = at.saturating_add(bytes.next_multiple_of(8));
        if at as u64 > SNAPSHOT_TABLE_MAX_BYTES {
            return Err(SnapshotError::TableTooLarge { bytes: at as u64 });
        }
    }
    out.bytes = at as u64;
    Ok(out)
}

/// Reads one entry at the start of `entry`; returns its length without padding too.
fn parse_entry(header: &Header, entry: &[u8], index: u32) -> Result<(Snapshot, usize), SnapshotError> {
    let cut = SnapshotError::CutOff { index, count: header.snapshot_count };
    let u64_at = |at| be64(entry, at).ok_or(cut);
    let u32_at = |at| be32(entry, at).ok_or(cut);
    let l1 = SnapshotL1 { offset: u64_at(0)?, entries: u32_at(8)? };
    let id_bytes = usize::from(be16(entry, 12).ok_or(cut)?);
    let name_bytes = usize::from(be16(entry, 14).ok_or(cut)?);
    let extra_bytes = u32_at(36)?;
    if extra_bytes > EXTRA_MAX_BYTES {
        return Err(SnapshotError::Extra { index, extra_bytes });
    }
    let id_at = ENTRY_BYTES + extra_bytes as usize;
    let name_at = id_at + id_bytes;
    let end = name_at + name_bytes;
    let extra = entry.get(ENTRY_BYTES..id_at).ok_or(cut)?;
    let snapshot = Snapshot {
        l1,
        id: entry.get(id_at..name_at).ok_or(cut)?.to_vec(),
        name: entry.get(name_at..end).ok_or(cut)?.to_vec(),
        date_sec: u32_at(16)?,
        date_nsec: u32_at(20)?,
        vm_clock_nsec: u64_at(24)?,
        // The field in the extra data is wider, and replaces the one in the entry where it exists.
        vm_state_bytes: be64(extra, 0).unwrap_or(u64::from(u32_at(32)?)),
        disk_bytes: be64(extra, 8).unwrap_or(header.geometry.size_bytes),
        icount: be64(extra, 16).filter(|count| *count != NO_ICOUNT),
        unknown_extra: extra.get(EXTRA_KNOWN_BYTES..).unwrap_or_default().to_vec(),
    };
    Ok((snapshot, end))
}

/// The table's bytes for a file. Every entry gets the extra data that version 3 demands.
pub fn serialise_snapshots(snapshots: &[Snapshot]) -> Result<Vec<u8>, SnapshotError> {
    if snapshots.len() > SNAPSHOTS_MAX as usize {
        return Err(SnapshotError::TooMany);
    }
    let mut out = Vec::new();
    for snapshot in snapshots {
        let length = |text: &[u8]| {
            u16::try_from(text.len()).map_err(|_| SnapshotError::NameTooLong { bytes: text.len() as u64 })
        };
        out.extend(snapshot.l1.offset.to_be_bytes());
        out.extend(snapshot.l1.entries.to_be_bytes());
        out.extend(length(&snapshot.id)?.to_be_bytes());
        out.extend(length(&snapshot.name)?.to_be_bytes());
        out.extend(snapshot.date_sec.to_be_bytes());
        out.extend(snapshot.date_nsec.to_be_bytes());
        out.extend(snapshot.vm_clock_nsec.to_be_bytes());
        // A reader that knows only this field shall rather see no VM state than a part of it.
        out.extend(u32::try_from(snapshot.vm_state_bytes).unwrap_or(0).to_be_bytes());
        let extra_bytes = EXTRA_KNOWN_BYTES + snapshot.unknown_extra.len();
        out.extend((extra_bytes as u32).to_be_bytes());
        out.extend(snapshot.vm_state_bytes.to_be_bytes());
        out.extend(snapshot.disk_bytes.to_be_bytes());
        out.extend(snapshot.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend_from_slice(&snapshot.unknown_extra);
        out.extend_from_slice(&snapshot.id);
        out.extend_from_slice(&snapshot.name);
        out.resize(out.len().next_multiple_of(8), 0);
        if out.len() as u64 > SNAPSHOT_TABLE_MAX_BYTES {
            return Err(SnapshotError::TableTooLarge { bytes: out.len() as u64 });
        }
    }
    Ok(out)
}

/// The identifier of the next snapshot: one more than the largest number there is, as QEMU counts.
pub fn next_snapshot_id(snapshots: &[Snapshot]) -> Vec<u8> {
    let number = |id: &[u8]| {
        let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |sum, byte| sum.saturating_mul(10).saturating_add(u64::from(byte - b'0')))
    };
    let largest = snapshots.iter().map(|snapshot| number(&snapshot.id)).max().unwrap_or(0);
    let mut next = largest.saturating_add(1).to_string().into_bytes();
    // Only an image that was made to reach the end of the numbers gets here more than once.
    while snapshots.iter().any(|snapshot| snapshot.id == next) {
        next.push(b'0');
    }
    next
}

/// Index of the snapshot that `text` means where QEMU takes an identifier or a name: `snapshot -a`, `convert -l`.
pub fn find_by_id_or_name(snapshots: &[Snapshot], text: &[u8]) -> Option<usize> {
    let by_id = snapshots.iter().position(|snapshot| snapshot.id == text);
    by_id.or_else(|| find_by_name(snapshots, text))
}

/// Index of the first snapshot of a name: what `snapshot -d` takes.
pub fn find_by_name(snapshots: &[Snapshot], name: &[u8]) -> Option<usize> {
    snapshots.iter().position(|snapshot| snapshot.name == name)
}

#[cfg(test)]
fn header_with(snapshot_count: u32) -> Header {
    let new = super::layout::NewImage { size_bytes: 1 << 20, ..super::layout::NewImage::default() };
    let plan = super::layout::Plan::new(&new, &super::layout::Features::default()).unwrap();
    Header { snapshot_count, ..plan.header().clone() }
}

#[test]
fn entries_are_walked_by_their_lengths() {
    // "Snapshot table entry": l1_offset, l1_size, id and name lengths, 20 bytes, extra length, extra, id, name, padding.
    let entry = |l1: u64, extra: u32| {
        let mut out = l1.to_be_bytes().to_vec();
        out.extend([0, 0, 0, 5, 0, 1, 0, 3]);
        out.extend([0; 20]);
        out.extend(extra.to_be_bytes());
        out.resize(out.len() + extra as usize, 0);
        out.extend(b"1abc");
        out.resize(out.len().next_multiple_of(8), 0);
        out
    };
    let header = header_with(2);
    let table = [entry(0x5_0000, 24), entry(0x6_0000, 16)].concat();
    let parsed = parse_snapshots(&header, &table).unwrap();
    let l1s: Vec<SnapshotL1> = parsed.snapshots.iter().map(|snapshot| snapshot.l1).collect();
    assert_eq!(l1s, [0x5_0000, 0x6_0000].map(|offset| SnapshotL1 { offset, entries: 5 }));
    assert_eq!(parsed.bytes, 72 + 64);
    for (table, want) in [
        (table[..100].to_vec(), SnapshotError::CutOff { index: 1, count: 2 }),
        (
            [entry(0x5_0200, 16), entry(0x6_0000, 16)].concat(),
            SnapshotError::L1 { index: 0, entries: 5, offset: 0x5_0200 },
        ),
        (entry(0x5_0000, 1032), SnapshotError::Extra { index: 0, extra_bytes: 1032 }),
    ] {
        assert_eq!(parse_snapshots(&header, &table), Err(want));
    }
    let damaged = parse_damaged_snapshots(&header, &[entry(0x5_0200, 8), entry(0x6_0000, 16)].concat()).unwrap();
    assert_eq!((damaged.snapshots.len(), damaged.bytes), (2, 56 + 64));
    let l1 = SnapshotError::L1 { index: 0, entries: 5, offset: 0x5_0200 };
    assert_eq!(damaged.faults, [l1, SnapshotError::Incomplete { index: 0 }]);
}

#[test]
fn the_bytes_of_an_entry_are_those_qemu_writes() {
    // Taken from an image of qemu-img 10.0.2: `create -f qcow2 d.qcow2 3M`, `snapshot -c s d.qcow2`.
    let bytes: [u8; 72] = [
        0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0x6b, 0x07, 0xd6, 0xd1, 0x03, 0x8f, 0xe1, 0x68, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        b'1', b's', 0, 0, 0, 0, 0, 0,
    ];
    let want = Snapshot {
        l1: SnapshotL1 { offset: 0x4_0000, entries: 1 },
        id: b"1".to_vec(),
        name: b"s".to_vec(),
        date_sec: 0x6b07_d6d1,
        date_nsec: 0x038f_e168,
        vm_clock_nsec: 0,
        vm_state_bytes: 0,
        disk_bytes: 3 << 20,
        icount: Some(0),
        unknown_extra: Vec::new(),
    };
    let table = SnapshotTable { snapshots: vec![want], bytes: 72, faults: Vec::new() };
    assert_eq!(parse_snapshots(&header_with(1), &bytes).as_ref(), Ok(&table));
    assert_eq!(serialise_snapshots(&table.snapshots).unwrap(), bytes);
}

#[test]
fn what_is_written_reads_back() {
    let odd = Snapshot {
        l1: SnapshotL1 { offset: 0x9_0000, entries: 7 },
        id: b"weird id".to_vec(),
        name: vec![0xff, 0xfe],
        date_sec: u32::MAX,
        date_nsec: 999_999_999,
        vm_clock_nsec: 1 << 60,
        vm_state_bytes: 5 << 32,
        disk_bytes: 77 << 20,
        icount: None,
        unknown_extra: vec![1, 2, 3],
    };
    let second = Snapshot { id: b"12x".to_vec(), icount: Some(9), unknown_extra: Vec::new(), ..odd.clone() };
    let snapshots = vec![odd, second];
    let bytes = serialise_snapshots(&snapshots).unwrap();
    assert_eq!(bytes[32..36], [0; 4], "five times 4 GiB of VM state do not fit the old field");
    assert_eq!(
        parse_snapshots(&header_with(2), &bytes).unwrap(),
        SnapshotTable { snapshots, bytes: bytes.len() as u64, faults: Vec::new() }
    );
}

#[test]
fn names_and_numbers_are_looked_up_as_qemu_does() {
    let named = |id: &str, name: &str| Snapshot {
        l1: SnapshotL1 { offset: 0, entries: 0 },
        id: id.into(),
        name: name.into(),
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        vm_state_bytes: 0,
        disk_bytes: 0,
        icount: None,
        unknown_extra: Vec::new(),
    };
    let snapshots = [named("1", "3"), named("3", "s"), named("7z", "s")];
    assert_eq!(find_by_id_or_name(&snapshots, b"3"), Some(1));
    assert_eq!(find_by_name(&snapshots, b"3"), Some(0));
    assert_eq!(find_by_id_or_name(&snapshots, b"s"), Some(1));
    assert_eq!(find_by_id_or_name(&snapshots, b"8"), None);
    assert_eq!(next_snapshot_id(&snapshots), b"8");
    assert_eq!(next_snapshot_id(&[]), b"1");
    let end = [named("18446744073709551615", "end")];
    assert_ne!(next_snapshot_id(&end), end[0].id);
}

#[test]
fn limits_hold_when_writing_too() {
    let long = |bytes: usize| Snapshot {
        l1: SnapshotL1 { offset: 0, entries: 0 },
        id: b"1".to_vec(),
        name: vec![b'n'; bytes],
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        vm_state_bytes: 0,
        disk_bytes: 0,
        icount: None,
        unknown_extra: Vec::new(),
    };
    assert_eq!(serialise_snapshots(&[long(65536)]), Err(SnapshotError::NameTooLong { bytes: 65536 }));
    assert!(matches!(serialise_snapshots(&vec![long(65535); 1100]), Err(SnapshotError::TableTooLarge { .. })));
    assert_eq!(serialise_snapshots(&vec![long(1); 65537]), Err(SnapshotError::TooMany));
}
