//! PCI as a q35 machine has it: configuration space, MSI-X, interrupt pins, the host bridge and the LPC bridge.
//!
//! A function ([`PciFunction`]) answers configuration and BAR accesses and says where its windows are; the machine maps
//! them. "PCI" is the PCI Local Bus specification 3.0, "PCIe" the PCI Express base specification.
//!
//! Invariant: no kind of device behind a function is known here, and no engine.
#![forbid(unsafe_code)]

pub mod config;
mod function;
pub mod host_bridge;
mod intx;
pub mod lpc;
mod msix;
mod root;

pub use config::{BarKind, ConfigSpace, ConfigStateV1, Identity};
pub use function::{PciFunction, SharedFunction, Window};
pub use intx::{Pirqs, gsi};
pub use msix::{Msix, MsixStateV1};
pub use root::{Root, RootStateV1};
