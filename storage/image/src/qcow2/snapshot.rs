//! The snapshot table, as far as the block engine needs it: which L1 tables are alive besides the active one.

use thiserror::Error;

use super::{Header, L1_MAX_BYTES};
use crate::{be16, be32, be64};

/// Largest extra data of a snapshot; QEMU's limit.
const EXTRA_MAX_BYTES: u32 = 1024;

/// The L1 table of one internal snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotL1 {
    /// Host offset.
    pub offset: u64,
    /// Entries, at most 32 MiB of them.
    pub entries: u32,
}

/// A snapshot table that cannot be read.
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
}

/// Walks the snapshot table in `table`, which may be longer than it. Returns the L1 tables and the table's length in bytes.
pub fn parse_snapshots(header: &Header, table: &[u8]) -> Result<(Vec<SnapshotL1>, u64), SnapshotError> {
    let count = header.snapshot_count;
    let mut at = 0usize;
    let mut found = Vec::new();
    for index in 0..count {
        let cut = SnapshotError::CutOff { index, count };
        let entry = table.get(at..).ok_or(cut)?;
        let offset = be64(entry, 0).ok_or(cut)?;
        let entries = be32(entry, 8).ok_or(cut)?;
        let id_bytes = be16(entry, 12).ok_or(cut)?;
        let name_bytes = be16(entry, 14).ok_or(cut)?;
        let extra_bytes = be32(entry, 36).ok_or(cut)?;
        if !header.geometry.is_aligned(offset) || u64::from(entries) * 8 > L1_MAX_BYTES || offset >= 1 << 56 {
            return Err(SnapshotError::L1 { index, entries, offset });
        }
        found.push(SnapshotL1 { offset, entries });
        if extra_bytes > EXTRA_MAX_BYTES {
            return Err(SnapshotError::Extra { index, extra_bytes });
        }
        let bytes = 40usize + extra_bytes as usize + id_bytes as usize + name_bytes as usize;
        if bytes > entry.len() {
            return Err(cut);
        }
        at = at.saturating_add(bytes.next_multiple_of(8));
    }
    Ok((found, at as u64))
}

#[test]
fn entries_are_walked_by_their_lengths() {
    let geometry = super::Geometry { cluster_bits: 16, refcount_order: 4, version: 3, size_bytes: 1 << 20 };
    let new =
        super::layout::NewImage { size_bytes: 1 << 20, cluster_bits: 16, version: 3, refcount_order: 4, backing: None };
    let first = super::layout::lay_out(&new).unwrap().pieces.remove(0).1;
    let header = Header { geometry, snapshot_count: 2, ..Header::parse(&first).unwrap() };
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
    let table = [entry(0x5_0000, 24), entry(0x6_0000, 16)].concat();
    let want = [0x5_0000, 0x6_0000].map(|offset| SnapshotL1 { offset, entries: 5 });
    assert_eq!(parse_snapshots(&header, &table), Ok((want.to_vec(), 72 + 64)));
    for (table, want) in [
        (table[..100].to_vec(), SnapshotError::CutOff { index: 1, count: 2 }),
        (entry(0x5_0200, 16), SnapshotError::L1 { index: 0, entries: 5, offset: 0x5_0200 }),
        (entry(0x5_0000, 1032), SnapshotError::Extra { index: 0, extra_bytes: 1032 }),
    ] {
        assert_eq!(parse_snapshots(&header, &table), Err(want));
    }
}
