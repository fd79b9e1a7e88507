//! A new image: header, refcount table and blocks, L1 table, and with preallocation the L2 tables and the room for
//! all guest data.

use super::header::{
    AUTOCLEAR_RAW_DATA, EXT_DATA_FILE, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2, feature_names,
};
use super::{
    COMPAT_LAZY_REFCOUNTS, COPIED, CRYPTO_HEADER_MAX_BYTES, CompressionType, CryptMethod, CryptoHeader, Extension,
    Geometry, Header, HeaderError, L1_MAX_BYTES, REFTABLE_MAX_BYTES, ZERO, refcount,
};

/// Smallest clusters whose header gets the table of feature names; QEMU leaves it out of smaller ones too.
const FEATURE_NAMES_CLUSTER_BITS_MIN: u32 = 13;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the guest disk in bytes.
    pub size_bytes: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the refcount width, 0 to 6; version 2 has 4.
    pub refcount_order: u32,
    /// Backing file name and format, as stored in the header.
    pub backing: Option<(String, String)>,
}

impl Default for NewImage {
    /// An empty disk in version 3 with clusters of 64 KiB and refcounts of 16 bits: QEMU's defaults.
    fn default() -> NewImage {
        NewImage { size_bytes: 0, cluster_bits: 16, version: 3, refcount_order: 4, backing: None }
    }
}

/// What else a new image shall have; all of it needs version 3, except preallocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// How clusters will be compressed.
    pub compression: CompressionType,
    /// Writers may leave refcounts behind while they have the image open.
    pub lazy_refcounts: bool,
    /// L2 entries of 128 bits, with 32 subclusters a cluster.
    pub extended_l2: bool,
    /// Whether every guest cluster gets its host cluster now.
    pub preallocate: bool,
    /// Guest data goes to another file.
    pub data_file: Option<DataFile>,
    /// Room for a LUKS header with its key slots, whose caller writes it; 0: the image is not encrypted.
    pub crypto_header_bytes: u64,
}

/// An external data file, as the header says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name as it shall be stored.
    pub name: String,
    /// Whether it must stay a raw image of the disk, so that every cluster is mapped from the start.
    pub raw: bool,
}

impl Default for Features {
    /// What QEMU chooses: zlib, and nothing else.
    fn default() -> Features {
        Features {
            compression: CompressionType::Zlib,
            lazy_refcounts: false,
            extended_l2: false,
            preallocate: false,
            data_file: None,
            crypto_header_bytes: 0,
        }
    }
}

/// Where everything of a new image goes. The file is, in this order and in whole clusters: header, refcount table,
/// refcount blocks, L1 table, LUKS header, and when preallocated L2 tables and guest data.
#[derive(Clone, Debug)]
pub struct Plan {
    header: Header,
    header_bytes: Vec<u8>,
    table_clusters: u64,
    block_count: u64,
    l1_clusters: u64,
    crypto_clusters: u64,
    l2_count: u64,
    /// Guest clusters that L2 tables map.
    mapped: u64,
    /// Clusters of this file that hold them.
    data_clusters: u64,
}

impl Plan {
    /// Computes the layout. The errors are those a reader would find in the header.
    pub fn new(new: &NewImage, features: &Features) -> Result<Plan, HeaderError> {
        let geometry = new_geometry(new, features)?;
        let cluster_bytes = geometry.cluster_bytes();
        let l1_entries = geometry.l1_entries();
        if l1_entries > L1_MAX_BYTES / 8 {
            return Err(HeaderError::L1TooLarge { entries: l1_entries, max: L1_MAX_BYTES / 8 });
        }
        // An empty disk still gets a table, so that the header never holds offset 0.
        let l1_entries = l1_entries.max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster_bytes);
        let raw = features.data_file.as_ref().is_some_and(|file| file.raw);
        let (l2_count, mapped) = match features.preallocate || raw {
            true => (geometry.l1_entries(), geometry.size_bytes.div_ceil(cluster_bytes)),
            false => (0, 0),
        };
        let data_clusters = if geometry.data_file { 0 } else { mapped };
        let crypto_bytes = features.crypto_header_bytes;
        if crypto_bytes > CRYPTO_HEADER_MAX_BYTES {
            return Err(HeaderError::CryptoHeader { extension_bytes: 16, offset: 0, bytes: crypto_bytes });
        }
        let crypto_clusters = crypto_bytes.div_ceil(cluster_bytes);
        let others = 1 + l1_clusters + crypto_clusters + l2_count + data_clusters;
        let (table_clusters, block_count) = refcount_clusters(&geometry, others);
        if table_clusters * cluster_bytes > REFTABLE_MAX_BYTES.max(cluster_bytes) {
            return Err(HeaderError::ReftableSize { clusters: u32::try_from(table_clusters).unwrap_or(u32::MAX) });
        }
        let zstd = features.compression == CompressionType::Zstd;
        let mut extra = if new.version == 3 { vec![0; 8] } else { Vec::new() };
        if let Some(kind) = extra.first_mut() {
            *kind = u8::from(zstd);
        }
        let data_file = features.data_file.iter();
        let data_file = data_file.map(|file| Extension { kind: EXT_DATA_FILE, data: file.name.clone().into_bytes() });
        let bit = |on: bool, bits: u64| if on { bits } else { 0 };
        let named = new.version == 3 && new.cluster_bits >= FEATURE_NAMES_CLUSTER_BITS_MIN;
        let header = Header {
            geometry,
            backing_name: new.backing.as_ref().map(|(name, _)| name.clone()),
            backing_format: new.backing.as_ref().map(|(_, format)| format.clone()).filter(|format| !format.is_empty()),
            crypt_method: crypt_method((1 + table_clusters + block_count + l1_clusters) * cluster_bytes, crypto_bytes),
            l1_offset: (1 + table_clusters + block_count) * cluster_bytes,
            l1_entries: l1_entries as u32,
            reftable_offset: cluster_bytes,
            reftable_clusters: table_clusters as u32,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: bit(zstd, INCOMPAT_COMPRESSION)
                | bit(features.extended_l2, INCOMPAT_EXTENDED_L2)
                | bit(geometry.data_file, INCOMPAT_DATA_FILE),
            compatible: bit(features.lazy_refcounts, COMPAT_LAZY_REFCOUNTS),
            autoclear: bit(raw, AUTOCLEAR_RAW_DATA),
            compression: features.compression,
            extensions: data_file.chain(named.then(feature_names)).collect(),
            extra,
        };
        let header_bytes = header.serialise()?;
        Ok(Plan {
            header,
            header_bytes,
            table_clusters,
            block_count,
            l1_clusters,
            crypto_clusters,
            l2_count,
            mapped,
            data_clusters,
        })
    }

    /// The header of the new image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn first_l2(&self) -> u64 {
        1 + self.table_clusters + self.block_count + self.l1_clusters + self.crypto_clusters
    }

    /// Length of the file: a whole number of clusters.
    pub fn file_bytes(&self) -> u64 {
        (self.first_l2() + self.l2_count + self.data_clusters) << self.header.geometry.cluster_bits
    }

    /// The preallocated guest data as a range of the file; empty without preallocation.
    pub fn data_range(&self) -> std::ops::Range<u64> {
        self.file_bytes() - (self.data_clusters << self.header.geometry.cluster_bits)..self.file_bytes()
    }

    /// What is written, offset and bytes, in ascending order; everything else is zero. Made one by one, so that
    /// the tables of a large image need not be in memory together.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let cluster_bytes = self.header.geometry.cluster_bytes();
        let first_block = 1 + self.table_clusters;
        let table = (0..self.block_count).flat_map(|i| ((first_block + i) * cluster_bytes).to_be_bytes()).collect();
        let l1 = (self.l2_count > 0).then(|| {
            let entry = |i: u64| (((self.first_l2() + i) * cluster_bytes) | COPIED).to_be_bytes();
            (self.header.l1_offset, (0..self.l2_count).flat_map(entry).collect())
        });
        [(0, self.header_bytes.clone()), (cluster_bytes, table)]
            .into_iter()
            .chain((0..self.block_count).map(move |i| ((first_block + i) * cluster_bytes, self.refcount_block(i))))
            .chain(l1)
            .chain((0..self.l2_count).map(move |i| ((self.first_l2() + i) * cluster_bytes, self.l2_table(i))))
    }

    fn refcount_block(&self, index: u64) -> Vec<u8> {
        let geometry = &self.header.geometry;
        let total = self.file_bytes() >> geometry.cluster_bits;
        let mut block = vec![0; geometry.cluster_bytes() as usize];
        let used = (total - (index << geometry.refblock_bits())).min(geometry.refblock_entries());
        for index in 0..used {
            let fits = refcount::set(&mut block, geometry.refcount_order, index as usize, 1);
            debug_assert!(fits);
        }
        block
    }

    /// Entries of data clusters behind each other. With extended entries the subclusters stay unallocated: the
    /// room is there, and the backing file or zeroes show until it is written. In an encrypted image the zeroes of
    /// the file are none of the disk: the entries say so, where the version has a bit for it.
    fn l2_table(&self, index: u64) -> Vec<u8> {
        let geometry = &self.header.geometry;
        let first = index << geometry.l2_bits();
        let count = (self.mapped - first).min(1 << geometry.l2_bits());
        let data = if geometry.data_file { 0 } else { self.data_range().start };
        let is_zero = self.crypto_clusters > 0 && geometry.version >= 3 && !geometry.extended_l2;
        let flags = COPIED | if is_zero { ZERO } else { 0 };
        let mut table = Vec::with_capacity((count * geometry.l2_entry_bytes()) as usize);
        for cluster in first..first + count {
            table.extend(((data + (cluster << geometry.cluster_bits)) | flags).to_be_bytes());
            table.resize(table.len() + geometry.l2_entry_bytes() as usize - 8, 0);
        }
        table
    }
}

/// With a LUKS header of so many bytes, if any.
fn crypt_method(offset: u64, bytes: u64) -> CryptMethod {
    if bytes == 0 { CryptMethod::None } else { CryptMethod::Luks(CryptoHeader { offset, bytes }) }
}

fn new_geometry(new: &NewImage, features: &Features) -> Result<Geometry, HeaderError> {
    if !(9..=21).contains(&new.cluster_bits) {
        return Err(HeaderError::ClusterBits(new.cluster_bits));
    }
    if !matches!(new.version, 2 | 3) {
        return Err(HeaderError::Version(new.version));
    }
    if new.refcount_order > 6 || (new.version == 2 && new.refcount_order != 4) {
        return Err(HeaderError::RefcountOrder(new.refcount_order));
    }
    let needs_version_3 = [
        (features.compression == CompressionType::Zstd, "compression with zstd"),
        (features.lazy_refcounts, "lazy refcounts"),
        (features.extended_l2, "extended L2 entries"),
        (features.data_file.is_some(), "an external data file"),
    ];
    if let Some((_, feature)) = needs_version_3.iter().find(|(on, _)| *on && new.version < 3) {
        return Err(HeaderError::NeedsVersion3 { feature });
    }
    if features.extended_l2 && new.cluster_bits < 14 {
        return Err(HeaderError::SmallExtendedClusters { cluster_bytes: 1 << new.cluster_bits });
    }
    if new.size_bytes > i64::MAX as u64 {
        return Err(HeaderError::Size(new.size_bytes));
    }
    Ok(Geometry {
        cluster_bits: new.cluster_bits,
        refcount_order: new.refcount_order,
        version: new.version,
        size_bytes: new.size_bytes,
        extended_l2: features.extended_l2,
        data_file: features.data_file.is_some(),
    })
}

/// Clusters of the refcount table and number of refcount blocks that cover `others` clusters and themselves.
pub fn refcount_clusters(geometry: &Geometry, others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let want_blocks = (others + table + blocks).div_ceil(geometry.refblock_entries());
        let want_table = (want_blocks * 8).div_ceil(geometry.cluster_bytes());
        if (want_table, want_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (want_table.max(table), want_blocks.max(blocks));
    }
}

#[cfg(test)]
fn check_plan(new: &NewImage, features: &Features) {
    let plan = Plan::new(new, features).unwrap();
    let mut file = vec![0; plan.file_bytes() as usize];
    for (offset, bytes) in plan.pieces() {
        file[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
    }
    let header = Header::parse(&file[..file.len().min(1 << new.cluster_bits)]).unwrap();
    assert_eq!(&header, plan.header());
    let report = super::check::check(&header, plan.file_bytes(), &mut |offset, out: &mut [u8]| {
        out.copy_from_slice(&file[offset as usize..offset as usize + out.len()]);
        Ok::<(), ()>(())
    })
    .unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{new:?}: {:?}", report.findings);
    let clusters = new.size_bytes.div_ceil(1 << new.cluster_bits);
    assert_eq!(report.allocated_clusters, if features.preallocate { clusters } else { 0 }, "{new:?}");
}

#[test]
fn a_layout_parses_and_its_refcounts_cover_it() {
    for (cluster_bits, version, refcount_order, size_bytes) in [
        (16, 3, 4, 1 << 30),
        (9, 2, 4, 64 << 20),
        (9, 3, 6, 100 << 20),
        (9, 3, 0, 1),
        (21, 3, 4, 1 << 40),
        (16, 3, 4, 0),
    ] {
        let new = NewImage { size_bytes, cluster_bits, version, refcount_order, backing: None };
        check_plan(&new, &Features::default());
    }
}

#[test]
fn preallocated_layouts_map_every_cluster() {
    for (cluster_bits, version, refcount_order, size_bytes) in
        [(16, 3, 4, 3 << 20), (9, 2, 4, 3 << 20), (9, 3, 6, 5000), (12, 3, 0, (1 << 20) + 1), (16, 3, 4, 0)]
    {
        let new = NewImage { size_bytes, cluster_bits, version, refcount_order, backing: None };
        check_plan(&new, &Features { preallocate: true, ..Features::default() });
        check_plan(&new, &Features { preallocate: true, crypto_header_bytes: 70_000, ..Features::default() });
    }
}

#[test]
fn sizes_no_l1_table_can_map_are_refused() {
    let new = NewImage { size_bytes: 1 << 50, cluster_bits: 9, ..NewImage::default() };
    assert!(matches!(Plan::new(&new, &Features::default()), Err(HeaderError::L1TooLarge { .. })));
    let prealloc = Features { preallocate: true, ..Features::default() };
    let new = NewImage { size_bytes: 1 << 42, cluster_bits: 14, refcount_order: 6, ..NewImage::default() };
    assert!(Plan::new(&new, &Features::default()).is_ok());
    // 2^28 clusters, 2048 refcounts a block: 131072 blocks make a table of 1 MiB, so this still fits.
    assert!(Plan::new(&new, &prealloc).is_ok());
    let new = NewImage { size_bytes: 1 << 37, cluster_bits: 9, refcount_order: 6, ..NewImage::default() };
    assert!(matches!(
        Plan::new(&new, &prealloc),
        Err(HeaderError::L1TooLarge { .. } | HeaderError::ReftableSize { .. })
    ));
}

#[test]
fn what_only_version_3_has_is_refused_in_version_2() {
    let v2 = NewImage { version: 2, ..NewImage::default() };
    let base = Features::default();
    for features in [
        Features { compression: CompressionType::Zstd, ..base.clone() },
        Features { lazy_refcounts: true, ..base.clone() },
        Features { extended_l2: true, ..base.clone() },
        Features { data_file: Some(DataFile { name: "x".to_owned(), raw: false }), ..base.clone() },
    ] {
        assert!(matches!(Plan::new(&v2, &features), Err(HeaderError::NeedsVersion3 { .. })), "{features:?}");
    }
    let small = NewImage { cluster_bits: 13, ..NewImage::default() };
    let extended = Features { extended_l2: true, ..base };
    assert_eq!(Plan::new(&small, &extended).err(), Some(HeaderError::SmallExtendedClusters { cluster_bytes: 8192 }));
}
