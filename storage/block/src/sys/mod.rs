//! The unsafe floor of the crate: guest memory as I/O vectors, locks that libc alone offers, inherited descriptors.

mod descriptor;
mod huge;
mod lock;
mod memory;
mod ring;

pub use memory::{ReadBufs, WriteBufs};

pub(crate) use descriptor::duplicate;
pub(crate) use huge::advise_huge_pages;
pub(crate) use lock::{lock_byte_held_elsewhere, lock_shared, unlock};
pub(crate) use memory::{pread, pwrite};
pub(crate) use ring::GuestRing;
