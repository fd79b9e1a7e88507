//! The arithmetic of clusters and tables: which index, which offset, how many.

/// L2 tables are cached in pieces of at most this many bytes, so that a random read loads 4 KiB, not 2 MiB.
pub const L2_SLICE_MAX_BYTES: u64 = 4096;

/// Subclusters of a cluster where L2 entries are extended.
pub const SUBCLUSTERS: u64 = 32;

/// Sizes that follow from a few header fields. Built by a parsed header, so the fields are in range:
/// `cluster_bits` 9 to 21 (14 to 21 with `extended_l2`), `refcount_order` 0 to 6, `version` 2 or 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the bits of a refcount.
    pub refcount_order: u32,
    /// 2 or 3.
    pub version: u32,
    /// Size of the guest disk.
    pub size_bytes: u64,
    /// L2 entries have 128 bits: a descriptor, and a bitmap of 32 subclusters.
    pub extended_l2: bool,
    /// Guest data lies in another file, each cluster where the guest sees it, without refcounts.
    pub data_file: bool,
}

impl Geometry {
    /// A disk of 1 GiB as `qemu-img create` lays it out, for tests.
    #[cfg(test)]
    pub(super) const PLAIN_V3: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        version: 3,
        size_bytes: 1 << 30,
        extended_l2: false,
        data_file: false,
    };

    /// Bytes of a cluster: 512 to 2 MiB.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry: 8, or 16 with extended L2 entries.
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3 - u32::from(self.extended_l2)
    }

    /// Bytes that are mapped on their own: a subcluster with extended L2 entries, else a cluster.
    pub fn subcluster_bytes(&self) -> u64 {
        if self.extended_l2 { self.cluster_bytes() / SUBCLUSTERS } else { self.cluster_bytes() }
    }

    /// Bytes of guest disk that one L2 table maps.
    pub fn l2_reach_bytes(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Entries the L1 table needs to map the whole disk.
    pub fn l1_entries(&self) -> u64 {
        self.size_bytes.div_ceil(self.l2_reach_bytes())
    }

    /// Index into the L1 table for a guest offset.
    pub fn l1_index(&self, offset: u64) -> u64 {
        offset >> (self.cluster_bits + self.l2_bits())
    }

    /// Index into the L2 table for a guest offset.
    pub fn l2_index(&self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) & ((1 << self.l2_bits()) - 1)
    }

    /// Bytes of one cached piece of a table.
    pub fn slice_bytes(&self) -> u64 {
        self.cluster_bytes().min(L2_SLICE_MAX_BYTES)
    }

    /// Distance of a byte from the start of its cluster.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Whether a host offset is the start of a cluster.
    pub fn is_aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// log2 of the refcounts in one refcount block.
    pub fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in one refcount block.
    pub fn refblock_entries(&self) -> u64 {
        1 << self.refblock_bits()
    }

    /// The largest refcount that can be stored.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }
}

#[test]
fn table_reach_as_the_specification_computes_it() {
    // The spec's example: 64 KiB clusters, 8192 entries an L2 table, 512 MiB a table.
    let g = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        version: 3,
        size_bytes: (1 << 30) + 1,
        extended_l2: false,
        data_file: false,
    };
    assert_eq!((g.l2_reach_bytes(), g.l1_entries(), g.refblock_entries()), (512 << 20, 3, 32768));
    assert_eq!((g.l1_index(512 << 20), g.l2_index((512 << 20) + 65536)), (1, 1));
    for (order, max) in [(0, 1), (1, 3), (4, 65535), (6, u64::MAX)] {
        assert_eq!(Geometry { refcount_order: order, ..g }.refcount_max(), max);
    }
    // "Extended L2 Entries": entries twice as long, so a table reaches half as far.
    let extended = Geometry { extended_l2: true, ..g };
    assert_eq!((extended.l2_reach_bytes(), extended.l1_entries(), extended.subcluster_bytes()), (256 << 20, 5, 2048));
    assert_eq!((extended.l1_index(256 << 20), extended.l2_index((256 << 20) + 65536)), (1, 1));
}
