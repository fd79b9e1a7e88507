//! The chips of a q35 PC that are not on the PCI bus, one per file.
//!
//! Every chip is a register model: it answers port or memory accesses, drives [`hv_core::IrqLine`]s, and tells deadlines
//! ([`hv_core::TimedDevice`]) instead of owning timers. Each has a saved state with numbered fields; restoring constructs.
//!
//! Invariant: no PCI, no thread, no file and no back end is known here.
#![forbid(unsafe_code)]

mod civil;
pub mod debug;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod serial;
mod ticks;
