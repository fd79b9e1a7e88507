//! Where code and data are, in the guest and in the traced child alike.

/// The code page.
pub const CODE: u64 = 0x2000_0000;
/// Writable data; the page before it is absent.
pub const DATA: u64 = 0x3000_0000;
/// Bytes of writable data.
pub const DATA_BYTES: usize = 4 * 4096;
/// Bytes of read-only data behind it; the page behind those is absent.
pub const RO_BYTES: usize = 4096;
/// Code, data and read-only data, one behind the other.
pub const SHARED_BYTES: usize = 4096 + DATA_BYTES + RO_BYTES;
/// Base of FS.
pub const FS_BASE: u64 = 0x140;
/// Base of GS: high, so that carries show.
pub const GS_BASE: u64 = 0x7fff_fff0_0000;
