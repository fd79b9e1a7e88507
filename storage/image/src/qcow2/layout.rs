//! The first bytes of a new image: header, refcount table, refcount blocks, an empty L1 table.

use super::{CompressionType, Geometry, Header, HeaderError, L1_MAX_BYTES, refcount};

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

/// A new image as writes: `pieces` at their offsets, everything else zero up to `file_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Offset and bytes, in ascending order.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Length of the file.
    pub file_bytes: u64,
}

/// Lays out an empty image. The errors are those a reader would find in the header.
pub fn lay_out(new: &NewImage) -> Result<Layout, HeaderError> {
    if !(9..=21).contains(&new.cluster_bits) {
        return Err(HeaderError::ClusterBits(new.cluster_bits));
    }
    if !matches!(new.version, 2 | 3) {
        return Err(HeaderError::Version(new.version));
    }
    if new.refcount_order > 6 || (new.version == 2 && new.refcount_order != 4) {
        return Err(HeaderError::RefcountOrder(new.refcount_order));
    }
    let geometry = Geometry {
        cluster_bits: new.cluster_bits,
        refcount_order: new.refcount_order,
        version: new.version,
        size_bytes: new.size_bytes,
    };
    let cluster_bytes = geometry.cluster_bytes();
    // An empty disk still gets a table, so that the header never holds offset 0.
    let l1_entries = geometry.l1_entries().max(1);
    if l1_entries > L1_MAX_BYTES / 8 {
        return Err(HeaderError::L1TooLarge { entries: l1_entries, max: L1_MAX_BYTES / 8 });
    }
    let l1_clusters = (l1_entries * 8).div_ceil(cluster_bytes);
    let (table_clusters, block_count) = refcount_clusters(&geometry, 1 + l1_clusters);
    let total = 1 + table_clusters + block_count + l1_clusters;
    let first_block = 1 + table_clusters;
    let header = Header {
        geometry,
        backing_name: new.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: new.backing.as_ref().map(|(_, format)| format.clone()),
        l1_offset: (first_block + block_count) * cluster_bytes,
        l1_entries: l1_entries as u32,
        reftable_offset: cluster_bytes,
        reftable_clusters: table_clusters as u32,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: CompressionType::Zlib,
        extensions: Vec::new(),
        extra: if new.version == 3 { vec![0; 8] } else { Vec::new() },
    };
    let mut pieces = vec![(0, header.serialise()?)];
    let table = (0..block_count).flat_map(|i| ((first_block + i) * cluster_bytes).to_be_bytes()).collect();
    pieces.push((cluster_bytes, table));
    for i in 0..block_count {
        let mut block = vec![0; cluster_bytes as usize];
        let used = (total - (i << geometry.refblock_bits())).min(geometry.refblock_entries());
        for index in 0..used {
            let fits = refcount::set(&mut block, geometry.refcount_order, index as usize, 1);
            debug_assert!(fits);
        }
        pieces.push(((first_block + i) * cluster_bytes, block));
    }
    Ok(Layout { pieces, file_bytes: total * cluster_bytes })
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
        let layout = lay_out(&new).unwrap();
        let mut file = vec![0; layout.file_bytes as usize];
        for (offset, bytes) in &layout.pieces {
            file[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        }
        let header = Header::parse(&file[..file.len().min(1 << cluster_bits)]).unwrap();
        assert_eq!(header.geometry.size_bytes, size_bytes);
        let report = super::check::check(&header, layout.file_bytes, &mut |offset, out: &mut [u8]| {
            out.copy_from_slice(&file[offset as usize..offset as usize + out.len()]);
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{new:?}: {:?}", report.findings);
    }
}

#[test]
fn sizes_no_l1_table_can_map_are_refused() {
    let new = NewImage { size_bytes: 1 << 50, cluster_bits: 9, version: 3, refcount_order: 4, backing: None };
    assert!(matches!(lay_out(&new), Err(HeaderError::L1TooLarge { .. })));
}
