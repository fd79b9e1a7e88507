//! Extended L2 entries: a descriptor as in plain ones, and a bitmap that maps 32 subclusters each on its own.

use super::{COPIED, EntryError, Freed, Geometry, L2Entry};

/// What each of the 32 subclusters of a cluster is; bit 0 is the first. No bit is set in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters {
    /// Subclusters with data in the host cluster.
    pub data: u32,
    /// Subclusters that read as zeroes.
    pub zero: u32,
}

impl Subclusters {
    /// All subclusters hold data.
    pub const ALL_DATA: Subclusters = Subclusters { data: u32::MAX, zero: 0 };
    /// All subclusters read as zeroes.
    pub const ALL_ZERO: Subclusters = Subclusters { data: 0, zero: u32::MAX };

    /// The bitmap as stored: data in bits 0 to 31, zeroes in bits 32 to 63.
    pub fn bitmap(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.data)
    }

    /// These subclusters, with data in those of `mask`.
    pub fn with_data(self, mask: u32) -> Subclusters {
        Subclusters { data: self.data | mask, zero: self.zero & !mask }
    }

    /// These subclusters, with zeroes in those of `mask`.
    pub fn with_zero(self, mask: u32) -> Subclusters {
        Subclusters { data: self.data & !mask, zero: self.zero | mask }
    }

    /// These subclusters, with nothing in those of `mask`: the backing file shows through.
    pub fn without(self, mask: u32) -> Subclusters {
        Subclusters { data: self.data & !mask, zero: self.zero & !mask }
    }
}

/// The subclusters `first..end` as bits; both at most 32.
pub fn subcluster_mask(first: u64, end: u64) -> u32 {
    let below = |count: u64| if count >= 32 { u32::MAX } else { (1u32 << count) - 1 };
    below(end) & !below(first)
}

/// An L2 entry with its subcluster bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendedEntry {
    /// A compressed cluster, which has no subclusters.
    Compressed {
        /// Host offset, byte granular.
        host: u64,
        /// Bytes up to the end of the last sector that holds the stream.
        bytes: u64,
    },
    /// Subclusters, in a host cluster where there is one.
    Standard {
        /// The host cluster; `None` means that no subcluster holds data.
        host: Option<u64>,
        /// Whether its refcount is one.
        copied: bool,
        /// What the subclusters are.
        subclusters: Subclusters,
    },
}

impl ExtendedEntry {
    /// Reads an entry. A bitmap with a compressed cluster is ignored, as QEMU does.
    pub fn decode(raw: u64, bitmap: u64, geometry: &Geometry) -> Result<ExtendedEntry, EntryError> {
        let subclusters = Subclusters { data: bitmap as u32, zero: (bitmap >> 32) as u32 };
        let (host, copied) = match L2Entry::decode(raw, geometry)? {
            L2Entry::Compressed { host, bytes } => return Ok(ExtendedEntry::Compressed { host, bytes }),
            L2Entry::Data { host, copied } => (Some(host), copied),
            L2Entry::Unallocated | L2Entry::Zero { .. } => (None, false),
        };
        if subclusters.data & subclusters.zero != 0 || (host.is_none() && subclusters.data != 0) {
            return Err(EntryError::Subclusters { raw, bitmap });
        }
        Ok(ExtendedEntry::Standard { host, copied, subclusters })
    }

    /// Descriptor and bitmap of subclusters in a cluster that belongs to this image alone, or in none.
    pub fn encode(host: Option<u64>, subclusters: Subclusters) -> [u64; 2] {
        [host.map_or(0, |host| host | COPIED), subclusters.bitmap()]
    }

    /// What loses its reference when this entry is replaced.
    pub fn freed(&self, geometry: &Geometry) -> Option<Freed> {
        match *self {
            _ if geometry.data_file => None,
            ExtendedEntry::Compressed { host, bytes } => Some(Freed { offset: host, bytes }),
            ExtendedEntry::Standard { host, .. } => {
                host.map(|offset| Freed { offset, bytes: geometry.cluster_bytes() })
            }
        }
    }

    /// What the subcluster at a byte of the cluster is, in the words of a plain entry, and for how many bytes
    /// from there it stays so; at most to the end of the cluster. `host` is where the cluster starts.
    pub fn piece(&self, geometry: &Geometry, within: u64) -> (L2Entry, u64) {
        let rest = geometry.cluster_bytes().saturating_sub(within);
        let (host, copied, subclusters) = match *self {
            ExtendedEntry::Compressed { host, bytes } => return (L2Entry::Compressed { host, bytes }, rest),
            ExtendedEntry::Standard { host, copied, subclusters } => (host, copied, subclusters),
        };
        let first = (within / geometry.subcluster_bytes()).min(31);
        let shift = |bits: u32| bits >> first;
        let (entry, unlike) = match (shift(subclusters.data) & 1, shift(subclusters.zero) & 1, host) {
            (1, _, Some(host)) => (L2Entry::Data { host, copied }, !shift(subclusters.data)),
            (_, 1, _) => (L2Entry::Zero { host, copied }, !shift(subclusters.zero)),
            _ => (L2Entry::Unallocated, shift(subclusters.data | subclusters.zero)),
        };
        let end = (first + u64::from(unlike.trailing_zeros())).min(super::SUBCLUSTERS);
        (entry, (end * geometry.subcluster_bytes()).saturating_sub(within).min(rest))
    }
}

/// How a write inside one cluster goes, with extended entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterWrite {
    /// Into subclusters that hold data and belong to this image; no table changes.
    InPlace {
        /// Host offset of the cluster.
        host: u64,
    },
    /// Into the cluster that is there. The subclusters of the range `fill` are filled, with what the guest sees
    /// around its data, and then the entry changes.
    Fill {
        /// Host offset of the cluster.
        host: u64,
        /// First subcluster and the one behind the last.
        fill: (u64, u64),
        /// What the subclusters are afterwards.
        after: Subclusters,
    },
    /// Into a new cluster: as with `Fill`, and the old reference goes.
    Allocate {
        /// First subcluster and the one behind the last.
        fill: (u64, u64),
        /// What the subclusters are afterwards.
        after: Subclusters,
        /// What the old entry referred to.
        free: Option<Freed>,
    },
}

/// Decides how a write to the bytes `within..within + bytes` of one cluster goes. `table_owned`: the L2 table belongs
/// to this image alone; otherwise the flags in it mean nothing.
pub fn plan_subcluster_write(
    entry: ExtendedEntry,
    geometry: &Geometry,
    table_owned: bool,
    within: u64,
    bytes: u64,
) -> SubclusterWrite {
    let unit = geometry.subcluster_bytes();
    let touched = (within / unit, (within + bytes).div_ceil(unit));
    let mask = subcluster_mask(touched.0, touched.1);
    match entry {
        ExtendedEntry::Standard { host: Some(host), copied: true, subclusters } if table_owned => {
            if subclusters.data & mask == mask {
                return SubclusterWrite::InPlace { host };
            }
            SubclusterWrite::Fill { host, fill: touched, after: subclusters.with_data(mask) }
        }
        ExtendedEntry::Standard { subclusters, .. } => {
            // Data moves to the new cluster, so everything from the first to the last of it is filled.
            let data = subclusters.data | mask;
            let fill = (u64::from(data.trailing_zeros()), u64::from(32 - data.leading_zeros()));
            let after = subclusters.with_data(subcluster_mask(fill.0, fill.1));
            SubclusterWrite::Allocate { fill, after, free: entry.freed(geometry) }
        }
        ExtendedEntry::Compressed { .. } => SubclusterWrite::Allocate {
            fill: (0, super::SUBCLUSTERS),
            after: Subclusters::ALL_DATA,
            free: entry.freed(geometry),
        },
    }
}

#[cfg(test)]
const GEOMETRY: Geometry = Geometry {
    cluster_bits: 16,
    refcount_order: 4,
    version: 3,
    size_bytes: 1 << 30,
    extended_l2: true,
    data_file: false,
};

#[test]
fn bitmaps_mean_what_the_specification_says() {
    let standard = |host, copied, data, zero| {
        Ok(ExtendedEntry::Standard { host, copied, subclusters: Subclusters { data, zero } })
    };
    for (raw, bitmap, want) in [
        (0, 0, standard(None, false, 0, 0)),
        (0, 0xffff_ffff_0000_0000, standard(None, false, 0, u32::MAX)),
        (COPIED | 0x5_0000, 0x8000_0000_0000_0001, standard(Some(0x5_0000), true, 1, 1 << 31)),
        // "the all zeroes flag [...] reserved" with extended entries: bit 0 says nothing.
        (0x5_0001, 3, standard(Some(0x5_0000), false, 3, 0)),
        (
            COPIED | 0x5_0000,
            0x1_0000_0001,
            Err(EntryError::Subclusters { raw: COPIED | 0x5_0000, bitmap: 0x1_0000_0001 }),
        ),
        (0, 1, Err(EntryError::Subclusters { raw: 0, bitmap: 1 })),
        (super::COMPRESSED | 0x5_0000, 1, Ok(ExtendedEntry::Compressed { host: 0x5_0000, bytes: 512 })),
    ] {
        assert_eq!(ExtendedEntry::decode(raw, bitmap, &GEOMETRY), want, "{raw:#x} {bitmap:#x}");
    }
    assert_eq!(
        ExtendedEntry::encode(Some(0x5_0000), Subclusters { data: 1, zero: 2 }),
        [COPIED | 0x5_0000, 0x2_0000_0001]
    );
}

#[test]
fn pieces_end_where_the_meaning_changes() {
    let subclusters = Subclusters { data: 0b0111, zero: 0b1000 };
    let entry = ExtendedEntry::Standard { host: Some(0x5_0000), copied: true, subclusters };
    let data = L2Entry::Data { host: 0x5_0000, copied: true };
    let zero = L2Entry::Zero { host: Some(0x5_0000), copied: true };
    for (within, want) in [
        (0, (data, 3 * 2048)),
        (100, (data, 3 * 2048 - 100)),
        (3 * 2048, (zero, 2048)),
        (4 * 2048, (L2Entry::Unallocated, 28 * 2048)),
        (65535, (L2Entry::Unallocated, 1)),
    ] {
        assert_eq!(entry.piece(&GEOMETRY, within), want, "at {within}");
    }
    let all = ExtendedEntry::Standard { host: None, copied: false, subclusters: Subclusters::ALL_ZERO };
    assert_eq!(all.piece(&GEOMETRY, 512), (L2Entry::Zero { host: None, copied: false }, 65024));
}

#[test]
fn writes_fill_what_they_touch_and_what_moves() {
    let entry = |copied, data, zero| ExtendedEntry::Standard {
        host: Some(0x5_0000),
        copied,
        subclusters: Subclusters { data, zero },
    };
    let free = Some(Freed { offset: 0x5_0000, bytes: 65536 });
    let host = 0x5_0000;
    for (entry, within, bytes, want) in [
        (entry(true, 0b11, 0), 100, 3000, SubclusterWrite::InPlace { host }),
        (
            entry(true, 0b01, 0b10),
            2048,
            1,
            SubclusterWrite::Fill { host, fill: (1, 2), after: Subclusters { data: 0b11, zero: 0 } },
        ),
        (
            entry(false, 0b1000, 0b0111),
            2048,
            2048,
            SubclusterWrite::Allocate { fill: (1, 4), after: Subclusters { data: 0b1110, zero: 1 }, free },
        ),
        (
            ExtendedEntry::Standard { host: None, copied: false, subclusters: Subclusters::default() },
            65535,
            1,
            SubclusterWrite::Allocate { fill: (31, 32), after: Subclusters { data: 1 << 31, zero: 0 }, free: None },
        ),
        (
            ExtendedEntry::Compressed { host: 0x5_0200, bytes: 512 },
            0,
            1,
            SubclusterWrite::Allocate {
                fill: (0, 32),
                after: Subclusters::ALL_DATA,
                free: Some(Freed { offset: 0x5_0200, bytes: 512 }),
            },
        ),
    ] {
        assert_eq!(plan_subcluster_write(entry, &GEOMETRY, true, within, bytes), want, "{entry:?}");
    }
    // A table that a snapshot shares: its flags are not to be trusted.
    let shared = plan_subcluster_write(entry(true, 1, 0), &GEOMETRY, false, 0, 512);
    assert_eq!(shared, SubclusterWrite::Allocate { fill: (0, 1), after: Subclusters { data: 1, zero: 0 }, free });
}
