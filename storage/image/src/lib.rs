//! Disk image formats as pure functions over bytes: headers, tables, allocation decisions, checks.
//!
//! Invariant: this crate does no I/O and starts no thread. `block` reads the bytes, asks here what they
//! mean and what a write has to change, and does it. All input is hostile: every size is bounded before
//! anything is allocated, arithmetic is checked, and no byte of an image reaches a panic.
//!
//! Not modelled yet, and refused by name when an image needs it: external data files and encryption of qcow2. The
//! qcow2 specification meant below is "qcow2 image format", `docs/interop/qcow2.txt` of QEMU.
#![forbid(unsafe_code)]

mod bytes;
mod crc32c;
pub mod deflate;
mod foreign;
mod format;
pub mod qcow2;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

pub use bytes::NewFile;
pub use foreign::FormatError;
pub use format::{Format, FormatMismatch, PROBE_BYTES, check_declared, probe};

/// Big-endian u16 at `at`; `None` past the end.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(raw.try_into().ok()?))
}

/// Big-endian u32 at `at`; `None` past the end.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(raw.try_into().ok()?))
}

/// Big-endian u64 at `at`; `None` past the end.
pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(raw.try_into().ok()?))
}
