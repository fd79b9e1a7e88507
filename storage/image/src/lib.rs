//! Disk image formats as pure functions over bytes: headers, tables, allocation decisions, checks.
//!
//! Invariant: this crate does no I/O and starts no thread. `block` reads the bytes, asks here what they
//! mean and what a write has to change, and does it. All input is hostile: every size is bounded before
//! anything is allocated, arithmetic is checked, and no byte of an image reaches a panic.
//!
//! The qcow2 specification meant below is "qcow2 image format", `docs/interop/qcow2.txt` of QEMU.
#![forbid(unsafe_code)]

mod bytes;
mod crc32c;
pub mod deflate;
mod foreign;
mod format;
pub mod luks;
pub mod ova;
pub mod qcow2;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

pub use bytes::NewFile;
pub(crate) use bytes::{be16, be32, be64};
pub use foreign::FormatError;
pub use format::{Format, FormatMismatch, PROBE_BYTES, UnreadFormat, check_declared, probe};
