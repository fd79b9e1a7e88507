//! Tiny guests in assembly that prove what an engine does, run on every engine and, for comparison, on QEMU.
//!
//! A [`Guest`] is an image of 64 KiB that stands where firmware stands ([`layout`]), prints what happens to it, and stops.
//! What it must print is written down beside it, from the manual; "SDM" is Intel's Software Developer's Manual. The same
//! bytes run on `hv_soft`, on `hv_kvm` ([`engine`]) and in `qemu-system-x86_64` ([`qemu`]).
//!
//! Invariant: no device and no machine is known here.
#![forbid(unsafe_code)]

mod asm;
pub mod engine;
mod guests;
mod image;
pub mod layout;
mod library;
pub mod qemu;
mod suite;

pub use asm::{Asm, Emit, Lib};
pub use guests::all;
pub use image::{BuildError, Image, gate, system};
pub use suite::{End, Guest, Need, Outcome, Peer, Ran, Verdict, judge};
