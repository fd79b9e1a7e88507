//! virtio devices behind the modern PCI transport. "VIRTIO" is the OASIS virtio specification 1.2.
//!
//! A device has two halves that meet in a [`link::Link`]: the register half ([`VirtioPci`], called by vCPU threads) and
//! the working half ([`work::Working`], owned by one I/O thread), which has the queues while the driver is ready and
//! gives them back, with their indices, when the register half asks. A disk with several queues has several working halves
//! ([`link::Lanes`]), which different threads may own. Queue contents are hostile: chains are gathered
//! once, bounded, and checked after the copy.
//!
//! Invariant: no file and no thread is known here; back ends are traits.
#![forbid(unsafe_code)]

mod blk;
mod chain;
mod console;
mod interrupt;
mod link;
mod model;
mod pci_device;
mod rng;
mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod transport_tests;
mod work;

use std::sync::Arc;

use guest_ram::Memory;
use hv_core::{DiskBackend, IrqLine, MsiSink, Ring, Work};
use parking_lot::Mutex;
use pci::SharedFunction;

pub use blk::BlkQueues;
pub use console::ConsoleBackend;
pub use pci_device::VirtioPci;
pub use rng::RandomSource;
pub use state::{QueueStateV1, VirtioStateV1};

/// What the machine lends a device.
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

/// The two halves of a device.
pub type Halves = (SharedFunction, Arc<Mutex<dyn Work>>);

/// A further lane of a disk: a back end of the same disk, and what wakes the lane.
pub type MoreLane = (Box<dyn DiskBackend>, Arc<dyn Ring>);

/// A disk. Each of its lanes serves a share of the queues over a back end of its own; the first one is woken by the bell of
/// `lent`. `serial` is cut to 20 bytes.
pub fn blk(
    disk: Box<dyn DiskBackend>,
    queues: BlkQueues,
    serial: &str,
    lent: Lent,
    more: Vec<MoreLane>,
) -> (SharedFunction, Vec<Arc<Mutex<dyn Work>>>) {
    let model = blk::model(&*disk, queues);
    let (disks, bells): (Vec<_>, Vec<_>) = more.into_iter().unzip();
    let disks = std::iter::once(disk).chain(disks);
    let devices = disks.map(|disk| blk::Blk::new(disk, queues, serial)).collect();
    let (function, lanes) = pci_device::build_lanes(model, devices, lent, bells);
    let lanes = lanes.into_iter().map(|lane| Arc::new(Mutex::new(lane)) as Arc<Mutex<dyn Work>>);
    (Arc::new(Mutex::new(function)), lanes.collect())
}

/// A console with one port.
pub fn console(backend: Box<dyn ConsoleBackend>, lent: Lent) -> Halves {
    halves(console::model(&*backend), console::Console::new(backend), lent)
}

/// A source of random bytes.
pub fn rng(source: Box<dyn RandomSource>, lent: Lent) -> Halves {
    halves(rng::model(), rng::Rng::new(source), lent)
}

fn halves<D: work::Device + 'static>(model: model::Model, device: D, lent: Lent) -> Halves {
    let (function, working) = pci_device::build(model, device, lent);
    (Arc::new(Mutex::new(function)), Arc::new(Mutex::new(working)))
}
