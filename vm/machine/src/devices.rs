//! The PCI devices that a machine may have.

use std::sync::Arc;

use guest_ram::GuestRam;
use hv_core::{DiskBackend, IrqLine, MsiSink};
use pci::SharedFunction;

use crate::bell::{Bell, SharedWork};

/// A device to put on the bus.
pub enum DeviceSpec {
    /// A virtio disk.
    VirtioBlk {
        /// The disk.
        disk: Box<dyn DiskBackend>,
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

/// A device as the machine uses it.
pub(crate) struct Made {
    pub(crate) function: SharedFunction,
    pub(crate) work: SharedWork,
}

/// Makes the device that `spec` describes.
pub(crate) fn make(
    spec: DeviceSpec,
    ram: &GuestRam,
    messages: Arc<dyn MsiSink>,
    interrupt_pin: IrqLine,
    bell: Arc<Bell>,
) -> Made {
    let memory = ram.memory().clone();
    let (function, work) = match spec {
        DeviceSpec::Nvme { disk, serial } => {
            nvme::controller(disk, &serial, nvme::Lent { memory, messages, interrupt_pin, bell })
        }
        DeviceSpec::VirtioBlk { disk, serial } => {
            virtio::blk(disk, &serial, virtio::Lent { memory, messages, interrupt_pin, bell })
        }
        DeviceSpec::VirtioConsole { backend } => {
            virtio::console(backend, virtio::Lent { memory, messages, interrupt_pin, bell })
        }
        DeviceSpec::VirtioRng { source } => virtio::rng(source, virtio::Lent { memory, messages, interrupt_pin, bell }),
    };
    Made { function, work }
}
