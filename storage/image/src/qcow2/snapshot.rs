//! The snapshot table, as far as the block engine needs it: which L1 tables are alive besides the active one.

use thiserror::Error;

use super::{Header, L1_MAX_BYTES};
use crate::{be16, be32, be64};

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
        let bytes = 40usize + extra_bytes as usize + id_bytes as usize + name_bytes as usize;
        if bytes > entry.len() {
            return Err(cut);
        }
        at = at.saturating_add(bytes.next_multiple_of(8));
    }
    Ok((found, at as u64))
}
