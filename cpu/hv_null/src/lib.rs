//! An engine without a CPU: what a vCPU would do comes from a program or a script.
//!
//! Two users: device tests, which run text scripts against one device ([`script`]), and machine tests, which hand a
//! closure to [`NullAccel`] that plays the vCPU on a whole board. Interrupts are not taken, they are written down.
//!
//! Invariant: no device is known here.
#![forbid(unsafe_code)]

mod engine;
pub mod golden;
pub mod script;

pub use engine::{NullAccel, NullVcpu, NullVm, Program};
