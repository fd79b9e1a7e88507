//! An NVMe controller with one namespace. "NVME" is the NVM Express base specification 1.4.
//!
//! Two halves meet in a [`link::Link`]: the register half ([`NvmePci`], called by vCPU threads) keeps registers and
//! doorbells, the working half ([`work::Working`], owned by one I/O thread) has every queue, the admin queue too. Queue
//! and list contents are hostile: a command is copied once, list walks are bounded by the largest transfer.
//!
//! Not offered: firmware updates, formatting, namespace management, SGLs, more than one namespace, metadata.
//!
//! Invariant: no file and no thread is known here; the disk is a trait.
#![forbid(unsafe_code)]

mod admin;
mod command;
mod identify;
mod interrupt;
mod io;
mod link;
mod prp;
mod queue;
mod registers;
mod state;
mod work;

use std::sync::Arc;

use guest_ram::Memory;
use hv_core::{DiskBackend, IrqLine, MsiSink, Ring, Work};
use parking_lot::Mutex;
use pci::SharedFunction;

pub use registers::NvmePci;
pub use state::{CompletionQueueStateV1, ControllerStateV1, NvmeStateV1, SubmissionQueueStateV1};

/// What the machine lends a controller.
#[derive(Clone)]
pub struct Lent {
    /// Guest memory.
    pub memory: Memory,
    /// Where message interrupts go.
    pub messages: Arc<dyn MsiSink>,
    /// The function's interrupt pin.
    pub interrupt_pin: IrqLine,
    /// Wakes the working half.
    pub bell: Arc<dyn Ring>,
}

/// Bytes of a serial number. NVME figure 247
pub const SERIAL_BYTES: usize = 20;

/// A controller with one disk. `serial` is cut to [`SERIAL_BYTES`]; it must differ between the controllers of a machine.
pub fn controller(disk: Box<dyn DiskBackend>, serial: &str, lent: Lent) -> (SharedFunction, Arc<Mutex<dyn Work>>) {
    let (function, working) = halves(disk, serial, lent);
    (Arc::new(Mutex::new(function)), Arc::new(Mutex::new(working)))
}

fn halves(disk: Box<dyn DiskBackend>, serial: &str, lent: Lent) -> (NvmePci, work::Working) {
    let Lent { memory, messages, interrupt_pin, bell } = lent;
    let link = Arc::new(link::Link::new(interrupt::Interrupts::new(messages, interrupt_pin), bell));
    let working = work::Working::new(disk, serial, link.clone(), memory);
    (NvmePci::new(link), working)
}

#[cfg(test)]
mod tests;
