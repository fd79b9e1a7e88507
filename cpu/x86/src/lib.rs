//! The backend-neutral x86-64: CPU state, CPUID leaves and models, MSR numbers, page-table formats.
//!
//! A guest saved by one engine resumes under another because both speak [`State`].
//!
//! Invariant: no thread, no device, no engine is known here.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod msr;
mod state;

pub use cpuid::{CpuidLeaf, CpuidTable};
pub use state::{Segment, State, Table, gpr};
