//! Hyper-V disks: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format". Little-endian.
//!
//! [`header`] finds the current header and the regions, [`metadata`] the properties of the disk, [`Bat`] where its
//! blocks are, [`log`] what a writer had begun, [`layout`] lays out new images. Not supported: differencing disks.

mod bat;
pub mod header;
pub mod layout;
pub mod log;
pub mod metadata;

use thiserror::Error;

pub use bat::{Bat, Block};
pub use header::{HEADERS_BYTES, Header, Region, Regions};
pub use metadata::Metadata;

/// Everything of the format lies at multiples of this.
pub const ALIGN_BYTES: u64 = 1 << 20;
/// A GUID as its 16 bytes in the file.
pub type Guid = [u8; 16];

/// Why a vhdx is refused. Field names are the specification's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum VhdxError {
    #[error("the file is no vhdx image: it does not start with 'vhdxfile'")]
    Signature,
    #[error("the {part} is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { part: &'static str, have_bytes: usize },
    #[error("neither of the two headers is whole: {first}; {second}")]
    NoHeader { first: Box<VhdxError>, second: Box<VhdxError> },
    #[error("the {part} does not start with '{want}'")]
    PartSignature { part: &'static str, want: &'static str },
    #[error("the checksum of the {part} is {stored:#010x}, but its bytes give {computed:#010x}")]
    Checksum { part: &'static str, stored: u32, computed: u32 },
    #[error("version {0} is not supported; 1 is")]
    Version(u16),
    #[error("log version {0} is not supported; 0 is")]
    LogVersion(u16),
    #[error(
        "the {part} at {offset:#x} with {bytes} bytes is not at multiples of 1 MiB, behind the first MiB and inside the file of {file_bytes} bytes"
    )]
    Place { part: &'static str, offset: u64, bytes: u64, file_bytes: u64 },
    #[error("the {first} and the {second} overlap")]
    Overlap { first: &'static str, second: &'static str },
    #[error("the {part} has {count} entries; at most 2047 are allowed")]
    TooManyEntries { part: &'static str, count: u32 },
    #[error("the image needs a {part} with the GUID {guid} that is not known; a newer program wrote it")]
    UnknownRequired { part: &'static str, guid: String },
    #[error("the {part} is there twice")]
    Twice { part: &'static str },
    #[error("the image has no {part}")]
    Missing { part: &'static str },
    #[error(
        "the metadata item '{item}' at {offset:#x} with {bytes} bytes is outside its region, or has another length than {want_bytes} bytes"
    )]
    ItemPlace { item: &'static str, offset: u32, bytes: u32, want_bytes: u32 },
    #[error("the block size is {0}; it must be a power of two, 1 MiB to 256 MiB")]
    BlockSize(u32),
    #[error("the virtual disk size is {size_bytes}; it must be a multiple of {sector_bytes} and at most 64 TiB")]
    DiskSize { size_bytes: u64, sector_bytes: u32 },
    #[error("the logical sector size is {0}; it must be 512 or 4096")]
    SectorSize(u32),
    #[error("differencing disks are not supported; merge the disk with its parent first")]
    Differencing,
    #[error("the BAT has room for {have} entries, but the disk needs {want}")]
    BatTooSmall { have: u64, want: u64 },
    #[error("the BAT entry of block {block} is {raw:#018x}: its state is not one of a disk without a parent")]
    BlockState { block: u64, raw: u64 },
    #[error(
        "the BAT says that block {block} is at {offset:#x}, in the tables of the image or past the end of the file ({file_bytes} bytes)"
    )]
    BlockPlace { block: u64, offset: u64, file_bytes: u64 },
    #[error("a log of {bytes} bytes has to be replayed; at most {max} bytes are")]
    LogTooLarge { bytes: u64, max: u64 },
    #[error(
        "the log was written when the file had {flushed_bytes} bytes, but it has {file_bytes}; the image was truncated"
    )]
    FileShorterThanLog { flushed_bytes: u64, file_bytes: u64 },
    #[error("the log says that the file of {file_bytes} bytes has {last_bytes}; a replay adds at most 4 GiB")]
    LogGrowth { last_bytes: u64, file_bytes: u64 },
    #[error(
        "the log changes {bytes} bytes at {offset:#x}, outside the {last_bytes} bytes that it says the file has, or in its headers"
    )]
    LogTarget { offset: u64, bytes: u64, last_bytes: u64 },
    #[error("a disk of {0} bytes is too large for a vhdx; 64 TiB are possible")]
    Size(u64),
    #[error("a block size of {0} is not possible: it must be a power of two")]
    NewBlockSize(u64),
    #[error("a log of {0} bytes is not possible: it must be smaller than 4 GiB")]
    NewLogSize(u64),
}

/// A GUID in the usual notation.
fn guid_text(guid: &Guid) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = guid;
    let tail: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
    let (clock, node) = tail.split_at(4);
    format!("{d:02x}{c:02x}{b:02x}{a:02x}-{f:02x}{e:02x}-{h:02x}{g:02x}-{clock}-{node}")
}

/// Whether a part lies at multiples of 1 MiB, behind the first one, and ends inside the file.
fn check_place(part: &'static str, offset: u64, bytes: u64, file_bytes: u64) -> Result<(), VhdxError> {
    let aligned = offset.is_multiple_of(ALIGN_BYTES) && bytes.is_multiple_of(ALIGN_BYTES);
    match offset.checked_add(bytes) {
        Some(end) if aligned && offset >= ALIGN_BYTES && bytes > 0 && end <= file_bytes => Ok(()),
        _ => Err(VhdxError::Place { part, offset, bytes, file_bytes }),
    }
}

#[test]
fn guids_are_printed_as_the_specification_prints_them() {
    assert_eq!(guid_text(&header::BAT_GUID), "2dc27766-f623-4200-9d64-115e9bfd4a08");
    assert_eq!(guid_text(&header::METADATA_GUID), "8b7ca206-4790-4b9a-b8fe-575f050f886e");
}
