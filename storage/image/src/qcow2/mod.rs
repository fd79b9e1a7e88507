//! qcow2, versions 2 and 3.
//!
//! [`Header`] says where the tables are, [`Geometry`] does the index arithmetic, [`L2Entry`] and the plans in
//! `mapping` say what an access means and must change, [`refcount`] reads and writes refcount blocks,
//! [`check`] walks a whole image, [`layout`] lays out a new one, [`parse_snapshots`] reads the internal snapshots,
//! [`ExtendedEntry`] is an L2 entry with subclusters, [`header_steps`] replaces a header, [`bitmaps`] reads dirty bitmaps.

pub mod bitmaps;
pub mod check;
mod compressed;
mod geometry;
mod header;
mod header_update;
pub mod layout;
mod mapping;
pub mod refcount;
mod snapshot;
mod subclusters;

pub use compressed::{CompressionType, Compressor, DecompressError, decompress};
pub use geometry::{Geometry, L2_SLICE_MAX_BYTES, SUBCLUSTERS};
pub use header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_OFFSET, AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, CRYPTO_HEADER_MAX_BYTES,
    CryptMethod, CryptoHeader, EXT_BITMAPS, EXT_CRYPTO_HEADER, EXT_DATA_FILE, EXT_FEATURE_NAMES, Extension, Header,
    HeaderError, INCOMPAT_COMPRESSION, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY, INCOMPAT_EXTENDED_L2,
    INCOMPAT_OFFSET, REFTABLE_POINTER_OFFSET, feature_names, header_area_bytes,
};
pub use header_update::{HeaderSteps, header_steps};
pub use mapping::{
    EntryError, Freed, L1_RESERVED, L1Entry, L2_RESERVED, L2Entry, WritePlan, ZeroPlan, l2_reserved_bits, plan_discard,
    plan_write, plan_zero,
};
pub use snapshot::{
    Snapshot, SnapshotError, SnapshotL1, SnapshotTable, find_by_id_or_name, find_by_name, next_snapshot_id,
    parse_damaged_snapshots, parse_snapshots, serialise_snapshots,
};
pub use subclusters::{ExtendedEntry, SubclusterWrite, Subclusters, plan_subcluster_write, subcluster_mask};

/// Bit 63 of an L1 or L2 entry: the refcount is exactly one, so the cluster may be changed in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry of version 3: the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits 9 to 55 of an entry: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Longest backing file name in bytes.
pub const BACKING_NAME_MAX: usize = 1023;
/// Largest L1 table in bytes. The limits below are QEMU's, so that both accept the same images.
pub const L1_MAX_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub const REFTABLE_MAX_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const SNAPSHOTS_MAX: u32 = 65536;
/// Largest snapshot table in bytes.
pub const SNAPSHOT_TABLE_MAX_BYTES: u64 = 64 << 20;
