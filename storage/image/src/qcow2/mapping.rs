//! What a table entry means, and what an access must change: values in, decisions out.

use thiserror::Error;

use super::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, ZERO};

/// A table entry that cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EntryError {
    /// An L1 entry whose L2 table does not start on a cluster boundary.
    #[error("L1 entry {raw:#018x} points to an L2 table that is not aligned to {cluster_bytes} bytes")]
    UnalignedL2 {
        /// The entry.
        raw: u64,
        /// The cluster size.
        cluster_bytes: u64,
    },
    /// An L2 entry whose data does not start on a cluster boundary.
    #[error("L2 entry {raw:#018x} points to data that is not aligned to {cluster_bytes} bytes")]
    UnalignedData {
        /// The entry.
        raw: u64,
        /// The cluster size.
        cluster_bytes: u64,
    },
    /// An L2 entry that says that guest data of an external data file lies elsewhere in it than the guest sees it.
    #[error("L2 entry {raw:#018x} does not map the external data file as it is: {guest_offset:#x} belongs there")]
    DataFilePlace {
        /// The entry.
        raw: u64,
        /// Guest offset of the cluster.
        guest_offset: u64,
    },
    /// A compressed cluster in an image with an external data file.
    #[error("L2 entry {raw:#018x} is a compressed cluster, which an image with an external data file cannot have")]
    DataFileCompressed {
        /// The entry.
        raw: u64,
    },
    /// A subcluster that is said to hold data and to read as zeroes, or data in no cluster.
    #[error("extended L2 entry {raw:#018x} has the subcluster bitmap {bitmap:#018x}, which contradicts it or itself")]
    Subclusters {
        /// The descriptor.
        raw: u64,
        /// The bitmap.
        bitmap: u64,
    },
}

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Host offset of the L2 table; `None` when no cluster below it is mapped.
    pub table: Option<u64>,
    /// Whether the table's refcount is one, so that it may be changed in place.
    pub copied: bool,
}

impl L1Entry {
    /// Reads an entry.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L1Entry, EntryError> {
        let offset = raw & OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return Err(EntryError::UnalignedL2 { raw, cluster_bytes: geometry.cluster_bytes() });
        }
        Ok(L1Entry { table: (offset != 0).then_some(offset), copied: raw & COPIED != 0 })
    }
}

/// Host clusters that lose one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// First byte, not necessarily at a cluster boundary.
    pub offset: u64,
    /// Length; every host cluster that the range touches loses one reference.
    pub bytes: u64,
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Not mapped here: the backing file shows through, or zeroes where there is none.
    Unallocated,
    /// Reads as zeroes. A host cluster may be reserved for later writes.
    Zero {
        /// The reserved cluster.
        host: Option<u64>,
        /// Whether its refcount is one.
        copied: bool,
    },
    /// Plain data.
    Data {
        /// Host offset of the cluster.
        host: u64,
        /// Whether its refcount is one, so that it may be written in place.
        copied: bool,
    },
    /// A compressed stream of at most `bytes` at `host`, both from the descriptor.
    Compressed {
        /// Host offset, byte granular.
        host: u64,
        /// Bytes up to the end of the last sector that holds the stream; at most two clusters.
        bytes: u64,
    },
}

/// Bits of an L1 entry that must be zero. Readers ignore them.
pub const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);

/// Bits that must be zero of an L2 entry that is not a compressed cluster. Readers ignore them. Bit 0 is not among
/// them in any version, as in QEMU.
pub const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);

/// The reserved bits that are set in an L2 entry.
pub fn l2_reserved_bits(raw: u64) -> u64 {
    if raw & COMPRESSED != 0 { 0 } else { raw & L2_RESERVED }
}

impl L2Entry {
    /// Reads an entry. Bit 0 means zeroes in version 3 only; reserved bits are ignored, as QEMU does.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        if raw & COMPRESSED != 0 {
            // "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8) offset bits, then additional sectors.
            let offset_bits = 62 - (geometry.cluster_bits - 8);
            let host = raw & ((1 << offset_bits) - 1);
            let sectors = ((raw & (COMPRESSED - 1)) >> offset_bits) + 1;
            return Ok(L2Entry::Compressed { host, bytes: sectors * 512 - (host & 511) });
        }
        let host = raw & OFFSET_MASK;
        if !geometry.is_aligned(host) {
            return Err(EntryError::UnalignedData { raw, cluster_bytes: geometry.cluster_bytes() });
        }
        let copied = raw & COPIED != 0;
        // With extended entries the bitmap says what reads as zeroes; see `ExtendedEntry`.
        let zero_flag = geometry.version >= 3 && !geometry.extended_l2;
        Ok(match (zero_flag && raw & ZERO != 0, host) {
            (true, 0) => L2Entry::Zero { host: None, copied: false },
            (true, _) => L2Entry::Zero { host: Some(host), copied },
            // The first cluster of an external data file is at 0 like any other.
            (false, 0) if !(geometry.data_file && copied) => L2Entry::Unallocated,
            (false, _) => L2Entry::Data { host, copied },
        })
    }

    /// As [`L2Entry::decode`], for the cluster at a guest offset: in an external data file it can be in one place only.
    pub fn decode_at(raw: u64, guest_offset: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        let entry = L2Entry::decode(raw, geometry)?;
        if !geometry.data_file {
            return Ok(entry);
        }
        let guest_offset = guest_offset - geometry.in_cluster(guest_offset);
        match entry {
            L2Entry::Compressed { .. } => Err(EntryError::DataFileCompressed { raw }),
            L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } if host != guest_offset => {
                Err(EntryError::DataFilePlace { raw, guest_offset })
            }
            entry => Ok(entry),
        }
    }

    /// The entry of a compressed stream of `bytes` at a host offset. `None` where the descriptor has no room for them.
    pub fn compressed(host: u64, bytes: u64, geometry: &Geometry) -> Option<u64> {
        let offset_bits = 62 - (geometry.cluster_bits - 8);
        let sectors = ((host & 511) + bytes).div_ceil(512).max(1);
        let fits = host >> offset_bits == 0 && (sectors - 1) >> (62 - offset_bits) == 0;
        fits.then_some(COMPRESSED | (sectors - 1) << offset_bits | host)
    }

    /// The entry of freshly written data in a cluster of its own.
    pub fn fresh_data(host: u64) -> u64 {
        host | COPIED
    }

    /// What loses its reference when this entry is replaced. Clusters of an external data file have none.
    pub fn freed(&self, geometry: &Geometry) -> Option<Freed> {
        match *self {
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => None,
            _ if geometry.data_file => None,
            L2Entry::Zero { host: Some(host), .. } | L2Entry::Data { host, .. } => {
                Some(Freed { offset: host, bytes: geometry.cluster_bytes() })
            }
            L2Entry::Compressed { host, bytes } => Some(Freed { offset: host, bytes }),
        }
    }

    /// Whether the cluster reads as zeroes without looking further.
    pub fn reads_zero(&self, has_backing: bool) -> bool {
        match self {
            L2Entry::Zero { .. } => true,
            L2Entry::Unallocated => !has_backing,
            L2Entry::Data { .. } | L2Entry::Compressed { .. } => false,
        }
    }
}

/// How a guest write to one cluster goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritePlan {
    /// Into the cluster that is there; no table changes.
    InPlace {
        /// Host offset of the cluster.
        host: u64,
    },
    /// Into the cluster reserved behind a zero entry. The rest of it must be filled with zeroes, then the entry changes.
    Reserved {
        /// Host offset of the cluster.
        host: u64,
    },
    /// Into a new cluster. The rest is copied from what the guest sees now, then the entry changes, then the old
    /// reference goes.
    Allocate {
        /// What the old entry referred to.
        free: Option<Freed>,
    },
}

/// Decides how a write reaches one cluster.
pub fn plan_write(entry: L2Entry, geometry: &Geometry) -> WritePlan {
    match entry {
        L2Entry::Data { host, copied: true } => WritePlan::InPlace { host },
        L2Entry::Zero { host: Some(host), copied: true } => WritePlan::Reserved { host },
        _ => WritePlan::Allocate { free: entry.freed(geometry) },
    }
}

/// How one whole cluster becomes zeroes, or is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPlan {
    /// It is as wanted already.
    Keep,
    /// Store this entry; then drop the old reference.
    Set {
        /// The new entry.
        raw: u64,
        /// What the old entry referred to and the new one does not.
        free: Option<Freed>,
    },
    /// The format has no entry for it: write zeroes as data.
    WriteData,
}

/// Decides how a whole cluster becomes zeroes. `may_unmap` false keeps a reserved cluster, so that a later
/// write cannot run out of space.
pub fn plan_zero(entry: L2Entry, geometry: &Geometry, has_backing: bool, may_unmap: bool) -> ZeroPlan {
    let free = entry.freed(geometry);
    if entry.reads_zero(has_backing) && (free.is_none() || !may_unmap) {
        return ZeroPlan::Keep;
    }
    if geometry.version < 3 {
        // Version 2 has no zero clusters: absence reads as zeroes only where no backing file shows through.
        return if has_backing || !may_unmap { ZeroPlan::WriteData } else { ZeroPlan::Set { raw: 0, free } };
    }
    match entry {
        L2Entry::Data { host, copied: true } if !may_unmap => ZeroPlan::Set { raw: host | COPIED | ZERO, free: None },
        L2Entry::Data { .. } if !may_unmap => ZeroPlan::WriteData,
        _ => ZeroPlan::Set { raw: ZERO, free },
    }
}

/// Decides how a whole cluster is discarded. It reads as zeroes afterwards, whatever a backing file holds there, or is
/// kept where version 2 has no way to say so: a discard is a hint.
pub fn plan_discard(entry: L2Entry, geometry: &Geometry, has_backing: bool) -> ZeroPlan {
    match (entry, has_backing) {
        (L2Entry::Unallocated, false) | (L2Entry::Zero { host: None, .. }, _) => ZeroPlan::Keep,
        (_, false) => ZeroPlan::Set { raw: 0, free: entry.freed(geometry) },
        (_, true) if geometry.version >= 3 => ZeroPlan::Set { raw: ZERO, free: entry.freed(geometry) },
        (_, true) => ZeroPlan::Keep,
    }
}

#[cfg(test)]
const V3: Geometry = Geometry::PLAIN_V3;
#[cfg(test)]
const V2: Geometry = Geometry { version: 2, ..V3 };

#[test]
fn entries_mean_what_the_specification_says() {
    for (raw, geometry, want) in [
        (0, V3, Ok(L2Entry::Unallocated)),
        (COPIED, V3, Ok(L2Entry::Unallocated)),
        (1, V3, Ok(L2Entry::Zero { host: None, copied: false })),
        (1, V2, Ok(L2Entry::Unallocated)),
        (COPIED | 0x5_0001, V3, Ok(L2Entry::Zero { host: Some(0x5_0000), copied: true })),
        (COPIED | 0x5_0001, V2, Ok(L2Entry::Data { host: 0x5_0000, copied: true })),
        (0x5_0000, V3, Ok(L2Entry::Data { host: 0x5_0000, copied: false })),
        (0x5_0200, V3, Err(EntryError::UnalignedData { raw: 0x5_0200, cluster_bytes: 65536 })),
        // 64 KiB clusters: 54 offset bits. Two additional sectors, 100 bytes into the first.
        (COMPRESSED | (2 << 54) | 0x5_0064, V3, Ok(L2Entry::Compressed { host: 0x5_0064, bytes: 3 * 512 - 100 })),
    ] {
        assert_eq!(L2Entry::decode(raw, &geometry), want, "{raw:#x} v{}", geometry.version);
    }
    assert_eq!(L1Entry::decode(COPIED | 0x3_0000, &V3), Ok(L1Entry { table: Some(0x3_0000), copied: true }));
    assert!(L1Entry::decode(0x3_0200, &V3).is_err());
}

#[test]
fn descriptors_of_compressed_clusters_read_back() {
    for (cluster_bits, host, bytes, sectors) in
        [(16, 0x5_0064, 1000, 3), (9, 0x1_23ff, 1, 1), (9, 0x1_23ff, 511, 2), (21, 0x20_0000, (2 << 20) - 1, 4096)]
    {
        let geometry = Geometry { cluster_bits, ..V3 };
        let raw = L2Entry::compressed(host, bytes, &geometry).unwrap();
        let bytes = sectors * 512 - (host & 511);
        assert_eq!(L2Entry::decode(raw, &geometry), Ok(L2Entry::Compressed { host, bytes }));
    }
    // 2 MiB clusters leave 49 bits for the offset.
    assert_eq!(L2Entry::compressed(1 << 49, 512, &Geometry { cluster_bits: 21, ..V3 }), None);
}

#[test]
fn plans_never_change_a_shared_cluster_in_place() {
    let shared = L2Entry::Data { host: 0x5_0000, copied: false };
    let own = L2Entry::Data { host: 0x5_0000, copied: true };
    let reserved = L2Entry::Zero { host: Some(0x5_0000), copied: true };
    let free = Some(Freed { offset: 0x5_0000, bytes: 65536 });
    assert_eq!(plan_write(shared, &V3), WritePlan::Allocate { free });
    assert_eq!(plan_write(own, &V3), WritePlan::InPlace { host: 0x5_0000 });
    assert_eq!(plan_write(reserved, &V3), WritePlan::Reserved { host: 0x5_0000 });
    assert_eq!(plan_write(L2Entry::Unallocated, &V3), WritePlan::Allocate { free: None });
    for (entry, geometry, backing, unmap, want) in [
        (L2Entry::Unallocated, V3, false, true, ZeroPlan::Keep),
        (L2Entry::Unallocated, V3, true, true, ZeroPlan::Set { raw: 1, free: None }),
        (L2Entry::Unallocated, V2, true, true, ZeroPlan::WriteData),
        (own, V3, true, false, ZeroPlan::Set { raw: COPIED | 0x5_0001, free: None }),
        (own, V3, true, true, ZeroPlan::Set { raw: 1, free }),
        (shared, V3, true, false, ZeroPlan::WriteData),
        (own, V2, false, true, ZeroPlan::Set { raw: 0, free }),
        (reserved, V3, true, false, ZeroPlan::Keep),
        (reserved, V3, true, true, ZeroPlan::Set { raw: 1, free }),
    ] {
        assert_eq!(plan_zero(entry, &geometry, backing, unmap), want, "{entry:?} {backing} {unmap}");
    }
    assert_eq!(plan_discard(own, &V2, true), ZeroPlan::Keep);
    assert_eq!(plan_discard(L2Entry::Unallocated, &V2, true), ZeroPlan::Keep);
    assert_eq!(plan_discard(L2Entry::Unallocated, &V3, true), ZeroPlan::Set { raw: 1, free: None });
    assert_eq!(plan_discard(L2Entry::Unallocated, &V3, false), ZeroPlan::Keep);
    assert_eq!(plan_discard(own, &V3, true), ZeroPlan::Set { raw: 1, free });
    assert_eq!(plan_discard(own, &V3, false), ZeroPlan::Set { raw: 0, free });
}
