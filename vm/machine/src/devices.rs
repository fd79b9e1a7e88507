//! The PCI devices that a machine may have.

use std::sync::Arc;

use guest_ram::GuestRam;
use hv_core::{DiskBackend, IrqLine, MsiSink, Ring};
use pci::SharedFunction;

use crate::bell::{Bell, SharedWork};

/// A device to put on the bus.
pub enum DeviceSpec {
    /// A virtio disk.
    VirtioBlk {
        /// The disk.
        disk: Box<dyn DiskBackend>,
        /// The same disk once more for each further lane, which serves a share of the queues.
        more_lanes: Vec<Box<dyn DiskBackend>>,
        /// Its queues.
        queues: virtio::BlkQueues,
        /// Shown to the guest, at most 20 bytes.
        serial: String,
    },
    /// An NVMe controller with one disk.
    Nvme {
        /// The disk.
        disk: Box<dyn DiskBackend>,
        /// At most 20 bytes, different for every controller.
        serial: String,
    },
    /// A virtio console with one port.
    VirtioConsole {
        /// The host's end.
        backend: Box<dyn virtio::ConsoleBackend>,
    },
    /// A source of random bytes.
    VirtioRng {
        /// Fills a buffer.
        source: Box<dyn virtio::RandomSource>,
    },
}

impl DeviceSpec {
    /// Working halves that the device has: one, and one for each further lane.
    pub(crate) fn lanes(&self) -> usize {
        match self {
            DeviceSpec::VirtioBlk { more_lanes, .. } => 1 + more_lanes.len(),
            _ => 1,
        }
    }
}

/// A device as the machine uses it, its lanes in the order of their bells.
pub(crate) struct Made {
    pub(crate) function: SharedFunction,
    pub(crate) lanes: Vec<SharedWork>,
}

/// Makes the device that `spec` describes; there is a bell for each of its [`DeviceSpec::lanes`].
pub(crate) fn make(
    spec: DeviceSpec,
    ram: &GuestRam,
    messages: Arc<dyn MsiSink>,
    interrupt_pin: IrqLine,
    bell: Arc<Bell>,
    more_bells: &[Arc<Bell>],
) -> Made {
    let memory = ram.memory().clone();
    let (function, work) = match spec {
        DeviceSpec::Nvme { disk, serial } => {
            nvme::controller(disk, &serial, nvme::Lent { memory, messages, interrupt_pin, bell })
        }
        DeviceSpec::VirtioBlk { disk, more_lanes, queues, serial } => {
            let bells = more_bells.iter().map(|bell| bell.clone() as Arc<dyn Ring>);
            let more = more_lanes.into_iter().zip(bells).collect();
            let lent = virtio::Lent { memory, messages, interrupt_pin, bell };
            let (function, lanes) = virtio::blk(disk, queues, &serial, lent, more);
            return Made { function, lanes };
        }
        DeviceSpec::VirtioConsole { backend } => {
            virtio::console(backend, virtio::Lent { memory, messages, interrupt_pin, bell })
        }
        DeviceSpec::VirtioRng { source } => virtio::rng(source, virtio::Lent { memory, messages, interrupt_pin, bell }),
    };
    Made { function, lanes: vec![work] }
}
