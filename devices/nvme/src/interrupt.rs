//! Interrupts: a vector per completion queue, or the pin while MSI-X is off.

use std::sync::Arc;

use hv_core::{IrqLine, MsiSink};
use parking_lot::{Mutex, MutexGuard};
use pci::Msix;

/// I/O queue pairs.
pub(crate) const IO_QUEUES: u16 = 16;
/// Queue pairs, the admin queue among them; one interrupt vector each.
pub(crate) const QUEUES: u16 = IO_QUEUES + 1;

/// State behind the lock; the register half uses it directly.
pub(crate) struct Wires {
    pub(crate) msix: Msix,
    /// INTMS and INTMC; only bit 0 has a meaning, for the pin.
    pub(crate) mask: u32,
    /// The command register forbids the pin.
    pub(crate) pin_off: bool,
    /// Some completion queue with interrupts has entries the driver has not taken.
    unseen: bool,
    pin: IrqLine,
}

impl Wires {
    /// Drives the pin as queues, mask and command say.
    pub(crate) fn drive_pin(&self) {
        self.pin.set(self.unseen && self.mask & 1 == 0 && !self.pin_off && !self.msix.enabled());
    }
}

/// Shared by both halves; locked for the moment of one interrupt or register access.
pub(crate) struct Interrupts(Mutex<Wires>);

impl Interrupts {
    pub(crate) fn new(messages: Arc<dyn MsiSink>, pin: IrqLine) -> Interrupts {
        let msix = Msix::new(QUEUES, messages);
        Interrupts(Mutex::new(Wires { msix, mask: 0, pin_off: false, unseen: false, pin }))
    }
    pub(crate) fn lock(&self) -> MutexGuard<'_, Wires> {
        self.0.lock()
    }
    /// A completion queue with `vector` has new entries.
    pub(crate) fn completed(&self, vector: u16) {
        let mut wires = self.0.lock();
        if wires.msix.enabled() {
            wires.msix.signal(vector);
        }
    }
    /// Whether the driver has completions to take.
    pub(crate) fn set_unseen(&self, unseen: bool) {
        let mut wires = self.0.lock();
        if wires.unseen != unseen {
            wires.unseen = unseen;
            wires.drive_pin();
        }
    }
}
