//! The header cluster: fixed fields, header extensions, backing file name.

use thiserror::Error;

use super::{BACKING_NAME_MAX, CompressionType, Geometry, L1_MAX_BYTES, REFTABLE_MAX_BYTES, SNAPSHOTS_MAX};
use crate::{be32, be64};

/// Incompatible feature bit 0: refcounts may be wrong, rebuild them before the first write.
pub const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible feature bit 1: a writer found damage; read only.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Compatible feature bit: refcounts may be behind.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1;
/// Incompatible feature bit 2: guest data lies in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature bit 3: byte 104 says how clusters are compressed.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature bit 4: L2 entries have 128 bits.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// Autoclear feature bit 0: the bitmaps extension describes the image as it is.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature bit 1: the external data file is a raw image of the disk.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
/// Type of the extension that points to the LUKS header.
pub const EXT_CRYPTO_HEADER: u32 = 0x0537_be77;
/// Most bytes that a LUKS header with its key slots takes; QEMU writes 2 MiB at most.
pub const CRYPTO_HEADER_MAX_BYTES: u64 = 16 << 20;
const INCOMPAT_KNOWN: u64 =
    INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;

/// File offset of the incompatible feature bits (u64).
pub const INCOMPAT_OFFSET: u64 = 72;
/// File offset of the autoclear feature bits (u64).
pub const AUTOCLEAR_OFFSET: u64 = 88;
/// File offset of the refcount table's offset (u64), followed by its cluster count (u32).
pub const REFTABLE_POINTER_OFFSET: u64 = 48;

const MAGIC: &[u8] = b"QFI\xfb";
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the extension that names feature bits.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the extension that names the external data file.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Type of the extension that says where bitmaps are.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Smallest cluster with extended L2 entries is 16 KiB, so that a subcluster has a sector.
const EXTENDED_L2_CLUSTER_BITS_MIN: u32 = 14;
/// A record of the feature name table: type, bit, 46 bytes of name.
const FEATURE_NAME_BYTES: usize = 48;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// Why a header is refused. Field names are the specification's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum HeaderError {
    #[error("the file is no qcow2 image: it does not start with the magic 'QFI\\xfb'")]
    Magic,
    #[error("the qcow2 header is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { have_bytes: usize },
    #[error("qcow2 version {0} is not supported; versions 2 and 3 are")]
    Version(u32),
    #[error("cluster_bits is {0}; it must be 9 to 21 (512 bytes to 2 MiB)")]
    ClusterBits(u32),
    #[error("refcount_order is {0}; it must be 0 to 6 (1 to 64 bits)")]
    RefcountOrder(u32),
    #[error(
        "header_length is {got}; it must be a multiple of 8, at least 104 and at most the cluster size {cluster_bytes}"
    )]
    HeaderLength { got: u32, cluster_bytes: u64 },
    #[error("Unsupported encryption method {0}")]
    Encrypted(u32),
    #[error(
        "the pointer to the LUKS header has {extension_bytes} bytes and says {bytes} bytes at {offset:#x}; it must have 16, and point to at most {CRYPTO_HEADER_MAX_BYTES} bytes at a cluster, for crypt_method 2 and no other"
    )]
    CryptoHeader { extension_bytes: usize, offset: u64, bytes: u64 },
    #[error("the image uses an incompatible feature that is not supported: {name} (bit {bit})")]
    Feature { bit: u32, name: String },
    #[error("compression type {0} is not supported; 0 (zlib) and 1 (zstd) are")]
    Compression(u8),
    #[error("the L1 table has {entries} entries; at most {max} are allowed")]
    L1TooLarge { entries: u64, max: u64 },
    #[error("the L1 table has {got} entries, but a disk of {size_bytes} bytes needs {want}")]
    L1TooSmall { got: u64, want: u64, size_bytes: u64 },
    #[error("the {table} offset {offset:#x} is not aligned to {cluster_bytes} bytes, or lies beyond 2^56")]
    TableOffset { table: &'static str, offset: u64, cluster_bytes: u64 },
    #[error("the refcount table has {clusters} clusters; it must have at least 1 and at most 8 MiB")]
    ReftableSize { clusters: u32 },
    #[error("the image has {0} snapshots; at most 65536 are allowed")]
    TooManySnapshots(u32),
    #[error(
        "backing_file_size is {bytes} at offset {offset}; a name has at most 1023 bytes and lies in the first cluster"
    )]
    BackingName { offset: u64, bytes: u32 },
    #[error("the backing file name is not UTF-8")]
    BackingNameText,
    #[error(
        "the header extension of type {kind:#010x} at byte {at} has {bytes} bytes, past the end of the header area"
    )]
    Extension { kind: u32, at: usize, bytes: u32 },
    #[error("extended L2 entries need clusters of at least 16 KiB, not {cluster_bytes} bytes")]
    SmallExtendedClusters { cluster_bytes: u64 },
    #[error("{feature} needs version 3 (compat=1.1) of the format")]
    NeedsVersion3 { feature: &'static str },
    #[error("the virtual size {0} is larger than 2^63 bytes")]
    Size(u64),
    #[error("header and backing file name need {need} bytes, but the first cluster has {cluster_bytes}")]
    DoesNotFit { need: usize, cluster_bytes: u64 },
}

/// A header extension that is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Type field.
    pub kind: u32,
    /// Contents without padding.
    pub data: Vec<u8>,
}

/// Where the LUKS header of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Where it starts in the file, at a cluster.
    pub offset: u64,
    /// Its length with the key slots.
    pub bytes: u64,
}

/// How guest data are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not at all.
    None,
    /// AES-128-CBC with the passphrase for a key: `crypt_method` 1.
    LegacyAes,
    /// LUKS: `crypt_method` 2. The extension that points to the header follows from it.
    Luks(CryptoHeader),
}

/// A checked header: every field is within its limits, tables are aligned, L1 covers the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size, refcount width, disk size.
    pub geometry: Geometry,
    /// Name of the backing file as stored: relative to the image's directory, at most 1023 bytes.
    pub backing_name: Option<String>,
    /// Name of the backing file's format as stored.
    pub backing_format: Option<String>,
    /// Host offset of the L1 table.
    pub l1_offset: u64,
    /// How guest data are encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Host offset of the refcount table.
    pub reftable_offset: u64,
    /// Length of the refcount table.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Host offset of the snapshot table; 0 without snapshots.
    pub snapshots_offset: u64,
    /// Feature bits; all zero in version 2.
    pub incompatible: u64,
    /// Feature bits a reader may ignore.
    pub compatible: u64,
    /// Feature bits a writer that does not know them must clear.
    pub autoclear: u64,
    /// How compressed clusters are packed.
    pub compression: CompressionType,
    /// Extensions other than the backing format, in order.
    pub extensions: Vec<Extension>,
    /// Header bytes past the fields that are known, kept when the header is rewritten.
    pub extra: Vec<u8>,
}

/// How many bytes of the file hold the header area (the first cluster), from its first 24 bytes.
/// The value is a file length to read, at most 2 MiB.
pub fn header_area_bytes(first: &[u8]) -> Result<u64, HeaderError> {
    if !first.starts_with(MAGIC) {
        return Err(HeaderError::Magic);
    }
    let bits = be32(first, 20).ok_or(HeaderError::Truncated { have_bytes: first.len() })?;
    if !(9..=21).contains(&bits) {
        return Err(HeaderError::ClusterBits(bits));
    }
    Ok(1 << bits)
}

impl Header {
    /// Parses the header area: the first [`header_area_bytes`] of the file, or fewer where the file ends.
    pub fn parse(area: &[u8]) -> Result<Header, HeaderError> {
        let cluster_bytes = header_area_bytes(area)?;
        let cut = || HeaderError::Truncated { have_bytes: area.len() };
        let u32_at = |at| be32(area, at).ok_or_else(cut);
        let u64_at = |at| be64(area, at).ok_or_else(cut);
        let version = u32_at(4)?;
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        let mut header = Header {
            geometry: Geometry {
                cluster_bits: u32_at(20)?,
                refcount_order: 4,
                version,
                size_bytes: u64_at(24)?,
                extended_l2: false,
                data_file: false,
            },
            backing_name: None,
            backing_format: None,
            crypt_method: CryptMethod::None,
            l1_entries: u32_at(36)?,
            l1_offset: u64_at(40)?,
            reftable_offset: u64_at(48)?,
            reftable_clusters: u32_at(56)?,
            snapshot_count: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: CompressionType::Zlib,
            extensions: Vec::new(),
            extra: Vec::new(),
        };
        let mut end = V2_BYTES;
        if version == 3 {
            end = header.parse_v3(area, cluster_bytes)?;
        }
        let area_end = header.parse_backing_name(area, cluster_bytes)?;
        header.parse_extensions(area, end, area_end)?;
        header.parse_crypt_method(u32_at(32)?)?;
        header.refuse_unknown_features()?;
        header.check_limits()?;
        Ok(header)
    }

    fn parse_v3(&mut self, area: &[u8], cluster_bytes: u64) -> Result<usize, HeaderError> {
        let cut = || HeaderError::Truncated { have_bytes: area.len() };
        self.incompatible = be64(area, 72).ok_or_else(cut)?;
        self.compatible = be64(area, 80).ok_or_else(cut)?;
        self.autoclear = be64(area, 88).ok_or_else(cut)?;
        let order = be32(area, 96).ok_or_else(cut)?;
        if order > 6 {
            return Err(HeaderError::RefcountOrder(order));
        }
        self.geometry.refcount_order = order;
        self.geometry.extended_l2 = self.incompatible & INCOMPAT_EXTENDED_L2 != 0;
        self.geometry.data_file = self.incompatible & INCOMPAT_DATA_FILE != 0;
        let length = be32(area, 100).ok_or_else(cut)?;
        if (length as usize) < V3_BYTES || u64::from(length) > cluster_bytes || length % 8 != 0 {
            return Err(HeaderError::HeaderLength { got: length, cluster_bytes });
        }
        let length = length as usize;
        self.extra = area.get(V3_BYTES..length).ok_or_else(cut)?.to_vec();
        // Byte 104 counts only with its feature bit; without it the type is zlib.
        let stored = self.extra.first().copied().unwrap_or(0);
        self.compression = match (self.incompatible & INCOMPAT_COMPRESSION != 0, stored) {
            (_, 0) => CompressionType::Zlib,
            (true, 1) => CompressionType::Zstd,
            (_, other) => return Err(HeaderError::Compression(other)),
        };
        Ok(length)
    }

    /// Returns where the extension area ends: at the name, or at the end of the cluster.
    fn parse_backing_name(&mut self, area: &[u8], cluster_bytes: u64) -> Result<usize, HeaderError> {
        let cut = || HeaderError::Truncated { have_bytes: area.len() };
        let offset = be64(area, 8).ok_or_else(cut)?;
        let bytes = be32(area, 16).ok_or_else(cut)?;
        if offset == 0 {
            return Ok(area.len());
        }
        let refused = HeaderError::BackingName { offset, bytes };
        let end = offset.checked_add(u64::from(bytes)).filter(|end| *end <= cluster_bytes);
        let Some(end) = end.filter(|_| bytes as usize <= BACKING_NAME_MAX && offset >= V2_BYTES as u64) else {
            return Err(refused);
        };
        let name = area.get(offset as usize..end as usize).ok_or_else(cut)?;
        let name = std::str::from_utf8(name).map_err(|_| HeaderError::BackingNameText)?;
        self.backing_name = (!name.is_empty()).then(|| name.to_owned());
        Ok(offset as usize)
    }

    fn parse_extensions(&mut self, area: &[u8], start: usize, end: usize) -> Result<(), HeaderError> {
        let mut at = start;
        while at.saturating_add(8) <= end {
            let (Some(kind), Some(bytes)) = (be32(area, at), be32(area, at + 4)) else { break };
            if kind == EXT_END {
                break;
            }
            let body = at + 8;
            let Some(stop) = body.checked_add(bytes as usize).filter(|stop| *stop <= end) else {
                return Err(HeaderError::Extension { kind, at, bytes });
            };
            let data = area.get(body..stop).unwrap_or_default().to_vec();
            if kind == EXT_BACKING_FORMAT {
                self.backing_format = Some(String::from_utf8_lossy(&data).into_owned());
            } else {
                self.extensions.push(Extension { kind, data });
            }
            at = stop.next_multiple_of(8);
        }
        Ok(())
    }

    /// The pointer to the LUKS header becomes a part of the method.
    fn parse_crypt_method(&mut self, method: u32) -> Result<(), HeaderError> {
        let pointer = self.extension(EXT_CRYPTO_HEADER).map(<[u8]>::to_vec);
        let data = pointer.clone().unwrap_or_default();
        let (offset, bytes) = (be64(&data, 0).unwrap_or(0), be64(&data, 8).unwrap_or(0));
        let refused = HeaderError::CryptoHeader { extension_bytes: data.len(), offset, bytes };
        self.crypt_method = match (method, pointer) {
            (0, None) => CryptMethod::None,
            (1, None) => CryptMethod::LegacyAes,
            (2, Some(_)) => {
                let fits = (1..=CRYPTO_HEADER_MAX_BYTES).contains(&bytes) && offset > 0 && offset < 1 << 56;
                if data.len() != 16 || !fits || !self.geometry.is_aligned(offset) {
                    return Err(refused);
                }
                CryptMethod::Luks(CryptoHeader { offset, bytes })
            }
            (0..=2, _) => return Err(refused),
            (other, _) => return Err(HeaderError::Encrypted(other)),
        };
        self.set_extension(EXT_CRYPTO_HEADER, None);
        Ok(())
    }

    fn refuse_unknown_features(&self) -> Result<(), HeaderError> {
        let unknown = self.incompatible & !INCOMPAT_KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros();
        let name = self.feature_name(bit).unwrap_or_else(|| "unknown feature".to_owned());
        Err(HeaderError::Feature { bit, name })
    }

    /// The name the image itself gives an incompatible bit: 48-byte records of type, bit, 46 bytes of name.
    fn feature_name(&self, bit: u32) -> Option<String> {
        let table = self.extensions.iter().find(|ext| ext.kind == EXT_FEATURE_NAMES)?;
        let record = table
            .data
            .chunks_exact(FEATURE_NAME_BYTES)
            .find(|r| r.first() == Some(&0) && r.get(1).map(|b| u32::from(*b)) == Some(bit))?;
        let name: String = String::from_utf8_lossy(record.get(2..)?).chars().filter(|c| !c.is_control()).collect();
        Some(name)
    }

    fn check_limits(&self) -> Result<(), HeaderError> {
        let geometry = &self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        if geometry.extended_l2 && geometry.cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN {
            return Err(HeaderError::SmallExtendedClusters { cluster_bytes });
        }
        if geometry.size_bytes > i64::MAX as u64 {
            return Err(HeaderError::Size(geometry.size_bytes));
        }
        let entries = u64::from(self.l1_entries);
        if entries > L1_MAX_BYTES / 8 {
            return Err(HeaderError::L1TooLarge { entries, max: L1_MAX_BYTES / 8 });
        }
        let want = geometry.l1_entries();
        if entries < want {
            return Err(HeaderError::L1TooSmall { got: entries, want, size_bytes: geometry.size_bytes });
        }
        let clusters = self.reftable_clusters;
        if clusters == 0 || u64::from(clusters) * cluster_bytes > REFTABLE_MAX_BYTES.max(cluster_bytes) {
            return Err(HeaderError::ReftableSize { clusters });
        }
        if self.snapshot_count > SNAPSHOTS_MAX {
            return Err(HeaderError::TooManySnapshots(self.snapshot_count));
        }
        let tables = [
            ("L1 table", self.l1_offset, entries > 0),
            ("refcount table", self.reftable_offset, true),
            ("snapshot table", self.snapshots_offset, self.snapshot_count > 0),
        ];
        for (table, offset, used) in tables {
            if used && (offset == 0 || !geometry.is_aligned(offset) || offset >= 1 << 56) {
                return Err(HeaderError::TableOffset { table, offset, cluster_bytes });
            }
        }
        Ok(())
    }

    /// Whether refcounts must be rebuilt before the first write.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Contents of the first extension of a type.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|ext| ext.kind == kind).map(|ext| ext.data.as_slice())
    }

    /// Replaces the extension of a type, adds it, or with `None` removes it.
    pub fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let at = self.extensions.iter().position(|ext| ext.kind == kind);
        match (at.and_then(|at| self.extensions.get_mut(at)), data) {
            (Some(ext), Some(data)) => ext.data = data,
            (Some(_), None) => self.extensions.retain(|ext| ext.kind != kind),
            (None, Some(data)) => self.extensions.push(Extension { kind, data }),
            (None, None) => {}
        }
    }

    /// The name of the external data file as stored. `None`: guest data lies in the image, or the name is kept
    /// elsewhere. It may be anything; whoever opens it needs consent.
    pub fn data_file_name(&self) -> Option<String> {
        let name = self.extension(EXT_DATA_FILE).filter(|_| self.geometry.data_file)?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// Whether the external data file must stay a raw image of the disk.
    pub fn is_data_file_raw(&self) -> bool {
        self.geometry.data_file && self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// Whether a writer found damage.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// The header area up to the end of the backing file name. Fields, extensions, then the name.
    pub fn serialise(&self) -> Result<Vec<u8>, HeaderError> {
        self.serialise_with_name_at(self.fields_and_extensions().len())
    }

    /// As [`Header::serialise`], with the backing file name at a byte of the caller's choice behind the extensions.
    pub(super) fn serialise_with_name_at(&self, name_at: usize) -> Result<Vec<u8>, HeaderError> {
        let mut out = self.fields_and_extensions();
        if let Some(name) = &self.backing_name {
            if name.len() > BACKING_NAME_MAX {
                return Err(HeaderError::BackingName { offset: name_at as u64, bytes: name.len() as u32 });
            }
            out[8..16].copy_from_slice(&(name_at as u64).to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.resize(name_at.max(out.len()), 0);
            out.extend_from_slice(name.as_bytes());
        }
        if out.len() as u64 > self.geometry.cluster_bytes() {
            return Err(HeaderError::DoesNotFit { need: out.len(), cluster_bytes: self.geometry.cluster_bytes() });
        }
        Ok(out)
    }

    /// The header area up to and with the end marker of the extensions, without a backing file name.
    pub(super) fn fields_and_extensions(&self) -> Vec<u8> {
        let geometry = &self.geometry;
        let mut out = Vec::with_capacity(512);
        out.extend_from_slice(MAGIC);
        out.extend(geometry.version.to_be_bytes());
        out.extend([0; 12]); // backing file offset and size
        out.extend(geometry.cluster_bits.to_be_bytes());
        out.extend(geometry.size_bytes.to_be_bytes());
        let method: u32 = match self.crypt_method {
            CryptMethod::None => 0,
            CryptMethod::LegacyAes => 1,
            CryptMethod::Luks(_) => 2,
        };
        out.extend(method.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        out.extend(self.snapshot_count.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if geometry.version >= 3 {
            for bits in [self.incompatible, self.compatible, self.autoclear] {
                out.extend(bits.to_be_bytes());
            }
            out.extend(geometry.refcount_order.to_be_bytes());
            let length = V3_BYTES + self.extra.len();
            out.extend((length as u32).to_be_bytes());
            out.extend_from_slice(&self.extra);
        }
        if let Some(format) = &self.backing_format {
            push_extension(&mut out, EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let CryptMethod::Luks(CryptoHeader { offset, bytes }) = self.crypt_method {
            push_extension(&mut out, EXT_CRYPTO_HEADER, &[offset.to_be_bytes(), bytes.to_be_bytes()].concat());
        }
        for ext in &self.extensions {
            push_extension(&mut out, ext.kind, &ext.data);
        }
        push_extension(&mut out, EXT_END, &[]);
        out
    }
}

/// The extension that names the feature bits of version 3, for readers that do not know one of them. The bytes are
/// those that QEMU writes.
pub fn feature_names() -> Extension {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(NAMES.len() * FEATURE_NAME_BYTES);
    for (kind, bit, name) in NAMES {
        data.extend([kind, bit]);
        data.extend_from_slice(name.as_bytes());
        data.resize(data.len().next_multiple_of(FEATURE_NAME_BYTES), 0);
    }
    Extension { kind: EXT_FEATURE_NAMES, data }
}

fn push_extension(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
fn sample() -> Header {
    Header {
        geometry: Geometry::PLAIN_V3,
        backing_name: Some("base.raw".to_owned()),
        backing_format: Some("raw".to_owned()),
        crypt_method: CryptMethod::None,
        l1_offset: 0x3_0000,
        l1_entries: 2,
        reftable_offset: 0x1_0000,
        reftable_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 1,
        autoclear: 0,
        compression: CompressionType::Zlib,
        extensions: vec![Extension { kind: 0x1234_5678, data: vec![1, 2, 3] }],
        extra: vec![0; 8],
    }
}

#[test]
fn serialising_and_parsing_agree() {
    let header = sample();
    let bytes = header.serialise().unwrap();
    assert_eq!(Header::parse(&bytes), Ok(header));
    let luks = CryptMethod::Luks(CryptoHeader { offset: 0x4_0000, bytes: 2_068_480 });
    for crypt_method in [CryptMethod::LegacyAes, luks] {
        let header = Header { crypt_method, ..sample() };
        assert_eq!(Header::parse(&header.serialise().unwrap()), Ok(header));
    }
    let v2 =
        Header { geometry: Geometry { version: 2, ..sample().geometry }, compatible: 0, extra: Vec::new(), ..sample() };
    assert_eq!(Header::parse(&v2.serialise().unwrap()), Ok(v2));
}

#[test]
fn every_limit_is_refused_by_name() {
    // (offset, bytes, the refusal): each is one change to a header that parses.
    let cases: &[(usize, &[u8], HeaderError)] = &[
        (0, b"QFI\x00", HeaderError::Magic),
        (4, &[0, 0, 0, 4], HeaderError::Version(4)),
        (20, &[0, 0, 0, 8], HeaderError::ClusterBits(8)),
        (20, &[0, 0, 0, 22], HeaderError::ClusterBits(22)),
        (20, &[0xff; 4], HeaderError::ClusterBits(u32::MAX)),
        (24, &[0x80, 0, 0, 0, 0, 0, 0, 0], HeaderError::Size(1 << 63)),
        (32, &[0, 0, 0, 3], HeaderError::Encrypted(3)),
        (32, &[0, 0, 0, 2], HeaderError::CryptoHeader { extension_bytes: 0, offset: 0, bytes: 0 }),
        (36, &[0, 0x40, 0, 1], HeaderError::L1TooLarge { entries: 0x40_0001, max: 0x40_0000 }),
        (36, &[0, 0, 0, 1], HeaderError::L1TooSmall { got: 1, want: 2, size_bytes: 1 << 30 }),
        (
            40,
            &[0, 0, 0, 0, 0, 3, 2, 0],
            HeaderError::TableOffset { table: "L1 table", offset: 0x3_0200, cluster_bytes: 65536 },
        ),
        (40, &[0; 8], HeaderError::TableOffset { table: "L1 table", offset: 0, cluster_bytes: 65536 }),
        (
            48,
            &[1, 0, 0, 0, 0, 0, 0, 0],
            HeaderError::TableOffset { table: "refcount table", offset: 1 << 56, cluster_bytes: 65536 },
        ),
        (56, &[0, 0, 0, 0], HeaderError::ReftableSize { clusters: 0 }),
        (56, &[0, 0, 0, 129], HeaderError::ReftableSize { clusters: 129 }),
        (60, &[0, 1, 0, 1], HeaderError::TooManySnapshots(65537)),
        (72, &[0, 0, 0, 0, 0, 0, 1, 0], HeaderError::Feature { bit: 8, name: "unknown feature".to_owned() }),
        (96, &[0, 0, 0, 7], HeaderError::RefcountOrder(7)),
        (100, &[0, 0, 0, 103], HeaderError::HeaderLength { got: 103, cluster_bytes: 65536 }),
        (100, &[0, 1, 0, 8], HeaderError::HeaderLength { got: 65544, cluster_bytes: 65536 }),
        (104, &[1], HeaderError::Compression(1)),
        (16, &[0, 0, 4, 0], HeaderError::BackingName { offset: 152, bytes: 1024 }),
        (8, &[0xff; 8], HeaderError::BackingName { offset: u64::MAX, bytes: 8 }),
        (116, &[0xff, 0xff, 0xff, 0xf0], HeaderError::Extension { kind: 0xe279_2aca, at: 112, bytes: 0xffff_fff0 }),
    ];
    for (at, patch, want) in cases {
        let mut bytes = sample().serialise().unwrap();
        bytes[*at..at + patch.len()].copy_from_slice(patch);
        assert_eq!(Header::parse(&bytes).as_ref(), Err(want), "patch at {at}");
    }
    let small = Header {
        geometry: Geometry { cluster_bits: 13, extended_l2: true, ..sample().geometry },
        incompatible: INCOMPAT_EXTENDED_L2,
        l1_entries: 1024,
        ..sample()
    };
    let refusal = HeaderError::SmallExtendedClusters { cluster_bytes: 8192 };
    assert_eq!(Header::parse(&small.serialise().unwrap()), Err(refusal));
    let bytes = sample().serialise().unwrap();
    for cut in 0..bytes.len() - 1 {
        assert!(Header::parse(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn an_unknown_bit_is_named_by_the_image_itself() {
    let mut record = vec![0, 9];
    record.extend(b"time travel");
    record.resize(48, 0);
    let header = Header {
        incompatible: 1 << 9,
        extensions: vec![Extension { kind: EXT_FEATURE_NAMES, data: record }],
        ..sample()
    };
    assert_eq!(
        Header::parse(&header.serialise().unwrap()),
        Err(HeaderError::Feature { bit: 9, name: "time travel".to_owned() })
    );
}
