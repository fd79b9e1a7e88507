//! The unsafe floor of the crate: guest memory as I/O vectors, and locks that libc alone offers.

mod lock;
mod memory;

pub use memory::{ReadBufs, WriteBufs};

pub(crate) use lock::{lock_byte_held_elsewhere, lock_shared, unlock};
pub(crate) use memory::{pread, pwrite};
