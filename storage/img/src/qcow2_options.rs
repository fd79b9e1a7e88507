//! The options of a new qcow2 image, read and held against each other: what `create`, `convert` and `measure` share.

use block::Preallocation;

use crate::error::Rule;
use crate::optlist::OptList;

/// Options that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Cluster size, 512 bytes to 2 MiB.
    pub cluster_bytes: u64,
    /// 2 or 3.
    pub version: u32,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// What is allocated at once.
    pub preallocation: Preallocation,
    /// Refcounts may be behind.
    pub lazy_refcounts: bool,
    /// Width of a refcount, a power of two up to 64.
    pub refcount_bits: u64,
    /// zstd instead of zlib.
    pub zstd: bool,
}

/// Most bytes of an L1 table.
const L1_MAX_BYTES: u64 = 32 << 20;

impl Qcow2Options {
    /// Reads the options; the rules and their order are qemu-img's.
    pub fn read(list: &OptList) -> Result<Qcow2Options, Rule> {
        let value = |name: &'static str, option: &str| Rule::Value {
            name,
            found: list.text(option).unwrap_or_default().to_owned(),
        };
        let version = match list.text("compat") {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(_) => return Err(value("version", "compat")),
        };
        let preallocation = match list.text("preallocation") {
            None | Some("off") => Preallocation::Off,
            Some("metadata") => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            Some(_) => return Err(value("preallocation", "preallocation")),
        };
        let zstd = match list.text("compression_type") {
            None | Some("zlib") => false,
            Some("zstd") => true,
            Some(_) => return Err(value("compression-type", "compression_type")),
        };
        let options = Qcow2Options {
            cluster_bytes: list.number("cluster_size").unwrap_or(65536),
            version,
            extended_l2: list.switch("extended_l2").unwrap_or(false),
            preallocation,
            lazy_refcounts: list.switch("lazy_refcounts").unwrap_or(false),
            refcount_bits: list.number("refcount_bits").unwrap_or(16),
            zstd,
        };
        options.agree(list)?;
        Ok(options)
    }

    fn agree(&self, list: &OptList) -> Result<(), Rule> {
        let old = self.version < 3;
        if !self.cluster_bytes.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_bytes) {
            return Err(Rule::ClusterSize);
        }
        if self.extended_l2 && self.cluster_bytes < 16384 {
            return Err(Rule::ExtendedL2Cluster);
        }
        if self.extended_l2 && old {
            return Err(Rule::ExtendedL2Version);
        }
        if self.preallocation != Preallocation::Off && list.has("backing_file") && !self.extended_l2 {
            return Err(Rule::BackingPreallocation);
        }
        if self.lazy_refcounts && old {
            return Err(Rule::LazyVersion);
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(Rule::RefcountBits);
        }
        if self.refcount_bits != 16 && old {
            return Err(Rule::RefcountVersion);
        }
        if self.zstd && old {
            return Err(Rule::CompressionVersion);
        }
        let raw_data = list.switch("data_file_raw") == Some(true);
        if raw_data && !list.has("data_file") {
            return Err(Rule::DataFileRaw);
        }
        if list.has("data_file") && old {
            return Err(Rule::DataFileVersion);
        }
        if raw_data && list.has("backing_file") {
            return Err(Rule::DataFileRawBacking);
        }
        if list.has("backing_fmt") && !list.has("backing_file") {
            return Err(Rule::BackingFormatAlone);
        }
        Ok(())
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Whether a disk of this size has an L1 table within limits.
    pub fn can_map(&self, size_bytes: u64) -> bool {
        let per_table = self.cluster_bytes / self.l2_entry_bytes();
        let tables = size_bytes.div_ceil(self.cluster_bytes).div_ceil(per_table);
        tables <= L1_MAX_BYTES / 8
    }

    /// The length of a file whose disk of `size_bytes`, a multiple of the cluster size, is allocated to its last byte:
    /// header, refcount table and blocks, L1, L2, data, each in whole clusters.
    pub fn full_bytes(&self, size_bytes: u64) -> u64 {
        let cluster = self.cluster_bytes;
        let data_clusters = size_bytes.div_ceil(cluster);
        let l2_clusters = data_clusters.div_ceil(cluster / self.l2_entry_bytes());
        let l1_clusters = (l2_clusters * 8).div_ceil(cluster);
        let others = 1 + l2_clusters + l1_clusters + data_clusters;
        (others + self.refcount_clusters(others)) * cluster
    }

    /// Clusters that hold the refcounts of `others` clusters and of themselves.
    fn refcount_clusters(&self, others: u64) -> u64 {
        let per_block = self.cluster_bytes * 8 / self.refcount_bits;
        let per_table = self.cluster_bytes / 8;
        let mut own = 0;
        loop {
            let blocks = (others + own).div_ceil(per_block);
            let all = blocks + blocks.div_ceil(per_table);
            if all <= own {
                return own;
            }
            own = all;
        }
    }
}
