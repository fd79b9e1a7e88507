//! What whole stack tests stand on: the built programs, a daemon of the test's own, tiny guests, a terminal.
//!
//! - [`programs`]: where `cargo build --workspace` has put vireod, vireo-vmm and vireo.
//! - [`host`]: a daemon whose files lie below a temporary directory, driven by an unmodified virsh.
//! - [`guest`]: a kernel of two hundred bytes that answers on its serial port and obeys the power button.
//! - [`screen`]: a program on a pseudo terminal, as a person sees it.
//! - [`process`]: what `/proc` shows of a process.
//!
//! Everything here panics with a sentence: it is part of tests. Invariant: knows the programs from outside only.
#![forbid(unsafe_code)]

pub mod guest;
pub mod host;
pub mod process;
pub mod programs;
pub mod screen;

use std::time::Duration;

/// Nothing in these tests takes so long unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(120);
