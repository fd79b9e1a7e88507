//! libvirt's XML: a bounded parser and a writer in libvirt's style, and a typed view of domain definitions that keeps what
//! it does not interpret.
//!
//! A document is read into a tree ([`Element`]); [`DomainDefinition`] owns such a tree, brings it into the shape libvirt's
//! define gives it (units, defaults, canonical order), and reads from it what a machine needs ([`DomainConfig`]). Nobody
//! else's elements are lost: they stay in the tree and are written back. What would change the guest and is not built is
//! refused by name instead ([`DomainDefinition::check_buildable`]).
//!
//! Documents are hostile: size, depth and element count are bounded, document types and entities are refused, nothing is
//! fetched. Invariant: knows no runtime, no RPC, no file.
#![forbid(unsafe_code)]

mod config;
mod definition;
mod disk_driver;
mod edit;
mod error;
mod iotune;
mod live;
mod metadata;
mod normalise;
mod order;
mod parse;
mod support;
mod tree;
mod units;
mod write;

pub use config::{
    CharDevice, CharSource, ClockOffset, CpuMode, Disk, DiskSource, DomainConfig, Interface, LifecycleAction, Os,
    SerialTarget, VirtType,
};
pub use definition::{DefineContext, DomainDefinition};
pub use disk_driver::DiskDriver;
pub use edit::{LifecycleEvent, VcpuCount};
pub use error::{DomainXmlError, XmlErrorKind};
pub use iotune::{IO_TUNE_GROUP, IO_TUNE_LIMITS, IO_TUNE_MAX, IO_TUNE_SIZE, IoTune};
pub use live::{LiveDetails, LivePty};
pub use parse::{DOCUMENT_BYTES_MAX, SyntaxError, parse_document};
pub use tree::{Element, Node};
pub use write::{to_compact, to_document};
