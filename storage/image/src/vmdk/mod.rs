//! VMware disks: "Virtual Disk Format 5.0". A text descriptor names extents; an extent is flat or sparse.
//!
//! [`SparseHeader`] says where the tables of a sparse extent are, [`Grain`] what an entry means, `stream` holds
//! the pieces of a `streamOptimized` file, [`Descriptor`] is the text, [`layout`] lays out new images.
//! Sectors are 512 bytes everywhere. Refused by name: COWD (`VMFSSPARSE`) and `SESPARSE` extents of ESX.

mod descriptor;
mod header;
pub mod layout;
mod stream;

use thiserror::Error;

use descriptor::EXTENTS_MAX;
pub use descriptor::{Access, Descriptor, ExtentKind, ExtentLine, replace_cid};
pub use header::{
    FLAG_COMPRESSED, FLAG_LINE_ENDS, FLAG_MARKERS, FLAG_REDUNDANT, FLAG_ZERO_GRAINS, GD_ENTRIES_MAX, HEADER_BYTES,
    SparseHeader,
};
pub use stream::{
    FOOTER_AREA_BYTES, GRAIN_MARKER_BYTES, Marker, compressed_span, deflate_grain, grain_header, inflate_grain,
    pack_table, parse_footer, stream_end,
};

/// The unit of every offset and size in a header.
pub const SECTOR_BYTES: u64 = 512;
/// Value of the grain directory's sector when the footer has the real one.
pub const GD_AT_END: u64 = u64::MAX;
/// Longest descriptor that is read. QEMU's limit.
pub const DESCRIPTOR_MAX_BYTES: u64 = 1 << 20;

/// Why a vmdk is refused. Field names are the specification's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum VmdkError {
    #[error("the file is no vmdk extent: it does not start with the magic 'KDMV'")]
    Magic,
    #[error("the vmdk header is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { have_bytes: usize },
    #[error("vmdk version {0} is not supported; versions 1 to 3 are")]
    Version(u32),
    #[error("the header has incompatible flags that are not known: {0:#x}")]
    Flags(u32),
    #[error("compressAlgorithm {0} is not supported, or contradicts the flags; 0 (none) and 1 (deflate) are known")]
    Compression(u16),
    #[error("the line-end bytes of the header were changed; the file was damaged by a transfer in text mode")]
    LineEnds,
    #[error("extents in the format of ESX 2 ('COWD') are not supported; clone the disk to a new one first")]
    Cowd,
    #[error("version 3 without compression has change tracking that is not known; it can only be read")]
    ReadOnlyVersion,
    #[error("the descriptor has no extents")]
    NoExtents,
    #[error("the grain size is {sectors} sectors; it must be 1 to {max}")]
    GrainSize { sectors: u64, max: u64 },
    #[error("numGTEsPerGT is {0}; it must be 1 to 512")]
    GtEntries(u32),
    #[error("the capacity of {0} sectors is larger than 2^63 bytes")]
    Capacity(u64),
    #[error("the grain directory has {entries} entries; at most {max} are allowed")]
    GdTooLarge { entries: u64, max: u64 },
    #[error(
        "the tables of the image need {overhead_sectors} sectors, but the file has {file_bytes} bytes; it was truncated"
    )]
    FileTooShort { overhead_sectors: u64, file_bytes: u64 },
    #[error("the {table} at sector {sector} does not lie inside the file of {file_bytes} bytes")]
    TablePastEnd { table: &'static str, sector: u64, file_bytes: u64 },
    #[error(
        "the grain for guest sector {guest_sector} is said to be at sector {sector}, outside the data of the file ({file_bytes} bytes)"
    )]
    GrainOutside { guest_sector: u64, sector: u64, file_bytes: u64 },
    #[error(
        "guest sector {guest_sector} has no grain table, and adding one is not supported; convert the image to a new one"
    )]
    NoGrainTable { guest_sector: u64 },
    #[error("the footer at the end of the stream is damaged: {what}; the image was truncated")]
    Footer { what: &'static str },
    #[error("the compressed grain for guest sector {guest_sector} claims {bytes} bytes; at most {max} are possible")]
    CompressedSize { guest_sector: u64, bytes: u64, max: u64 },
    #[error("the compressed grain for guest sector {guest_sector} is malformed, or does not unpack to a grain")]
    Inflate { guest_sector: u64 },
    #[error("the descriptor has {bytes} bytes; at most 1 MiB is allowed")]
    DescriptorTooLarge { bytes: u64 },
    #[error("the image has no descriptor")]
    NoDescriptor,
    #[error("the descriptor does not start with '# Disk DescriptorFile'")]
    DescriptorSignature,
    #[error("the descriptor is not text in UTF-8")]
    DescriptorText,
    #[error("line {line} of the descriptor: {what}")]
    DescriptorLine { line: usize, what: &'static str },
    #[error(
        "line {line} of the descriptor: extents of type '{kind}' are not supported; FLAT, VMFS, SPARSE and ZERO are"
    )]
    ExtentType { line: usize, kind: String },
    #[error(
        "line {line} of the descriptor: the extent file '{name}' is not a plain name beside the descriptor; \
             paths are refused, because an image could name any file of the host with them"
    )]
    ExtentName { line: usize, name: String },
    #[error("line {line} of the descriptor: the sparse extent '{name}' is there twice")]
    ExtentTwice { line: usize, name: String },
    #[error("the descriptor has more than {max} extents")]
    TooManyExtents { max: usize },
    #[error("the extents together are larger than 2^63 bytes")]
    ExtentSum,
    #[error("the extent '{name}' has {have_sectors} sectors, but the descriptor says {want_sectors}")]
    ExtentSize { name: String, have_sectors: u64, want_sectors: u64 },
    #[error(
        "createType '{0}' is not supported; monolithicSparse, streamOptimized, monolithicFlat, vmfs, twoGbMaxExtentSparse and twoGbMaxExtentFlat are"
    )]
    CreateType(String),
    #[error("the name '{0}' cannot be written into a descriptor: it has a quote or a line end, or it is too long")]
    Name(String),
    #[error("a disk of {size_bytes} bytes is too large for a vmdk; 256 TiB are possible")]
    Size { size_bytes: u64 },
    #[error("compat6 cannot be enabled with hwversion set")]
    Compat6HwVersion,
    #[error("Flat image can't enable zeroed grain")]
    FlatZeroedGrain,
    #[error("Flat image can't have backing file")]
    FlatParent,
    #[error("grains of a stream are written once, in ascending order: guest offset {offset:#x} comes after {after:#x}")]
    StreamOrder { offset: u64, after: u64 },
    #[error("a streamOptimized image takes only compressed, whole grains in ascending order; convert it to change it")]
    StreamOnly,
    #[error("the stream has grains already; a streamOptimized image is written once, from its beginning")]
    StreamNotEmpty,
    #[error("the file would grow past 2 TiB, beyond what grain tables can address")]
    Full,
}

/// What a grain table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Nothing was written: the parent's data, or zeroes.
    Absent,
    /// Reads as zeroes, whatever a parent has.
    Zero,
    /// Data, or a compressed grain, at this sector of the extent file.
    At(u32),
}

impl Grain {
    /// Reads an entry; 1 means zeroes only in an extent whose header says so.
    pub fn from_entry(raw: u32, header: &SparseHeader) -> Grain {
        match raw {
            0 => Grain::Absent,
            1 if header.has_zero_grains() => Grain::Zero,
            sector => Grain::At(sector),
        }
    }

    /// The entry as it is stored.
    pub fn to_entry(self) -> u32 {
        match self {
            Grain::Absent => 0,
            Grain::Zero => 1,
            Grain::At(sector) => sector,
        }
    }
}

#[test]
fn entry_one_is_zeroes_only_where_the_header_says_so() {
    let plain = header::sample();
    let zeroing = SparseHeader { flags: plain.flags | FLAG_ZERO_GRAINS, version: 2, ..plain.clone() };
    for (raw, header, want) in [
        (0, &plain, Grain::Absent),
        (1, &plain, Grain::At(1)),
        (1, &zeroing, Grain::Zero),
        (u32::MAX, &zeroing, Grain::At(u32::MAX)),
    ] {
        assert_eq!(Grain::from_entry(raw, header), want);
        assert_eq!(want.to_entry(), raw);
    }
}
