//! The machine type `vireo-q35-1`: devices and an engine wired into a PC, its ACPI tables, its loaders, its reset.
//!
//! [`Machine::build`] makes one on any [`hv_core::Accel`]. vCPU threads run with [`Board`] as their
//! [`hv_core::VcpuIo`]; one I/O thread runs [`Worker`]s and deadlines; the owner of [`Machine`] stops and resets.
//!
//! Invariant: no XML, no RPC, no path and no thread is known here.
#![forbid(unsafe_code)]

mod acpi;
mod bell;
mod board;
mod boot;
mod counters;
mod deadlines;
mod devices;
pub mod layout;
mod lines;
mod machine;
mod map;
mod power;

pub use bell::{Bell, SharedWork};
pub use board::{Board, SERIAL_PORTS};
pub use boot::{BootError, BootSource, Entry};
pub use counters::Exits;
pub use deadlines::Alarm;
pub use devices::DeviceSpec;
pub use machine::{Machine, MachineConfig, MachineError, Stopper, Worker};
pub use power::PowerLatch;
