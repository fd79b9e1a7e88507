//! Interrupts of one device: a vector per queue and one for configuration changes, or the shared pin with its status
//! register. VIRTIO 4.1.4.5, 4.1.5.1.2

use std::sync::Arc;

use hv_core::{IrqLine, MsiSink};
use parking_lot::{Mutex, MutexGuard};
use pci::Msix;

/// "This event has no vector."
pub(crate) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// State behind the lock; the register half uses it directly.
pub(crate) struct Wires {
    pub(crate) msix: Msix,
    pub(crate) isr: u8,
    pub(crate) config_vector: u16,
    pub(crate) queue_vectors: Vec<u16>,
    /// The command register forbids the pin.
    pub(crate) pin_off: bool,
    pin: IrqLine,
}

impl Wires {
    /// Drives the pin as status and command say.
    pub(crate) fn drive_pin(&self) {
        self.pin.set(self.isr != 0 && !self.pin_off && !self.msix.enabled());
    }
    /// A vector number as a driver may set it: one that does not exist becomes "none".
    pub(crate) fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }
    fn raise(&mut self, vector: u16, status: u8) {
        if self.msix.enabled() {
            if vector != NO_VECTOR {
                self.msix.signal(vector);
            }
        } else {
            self.isr |= status;
            self.drive_pin();
        }
    }
}

/// Shared by both halves; locked for the moment of one interrupt or register access.
pub(crate) struct Interrupts(Mutex<Wires>);

impl Interrupts {
    pub(crate) fn new(queues: u16, messages: Arc<dyn MsiSink>, pin: IrqLine) -> Interrupts {
        Interrupts(Mutex::new(Wires {
            msix: Msix::new(queues + 1, messages),
            isr: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues.into()],
            pin_off: false,
            pin,
        }))
    }
    pub(crate) fn lock(&self) -> MutexGuard<'_, Wires> {
        self.0.lock()
    }
    /// Buffers of queue `index` were used.
    pub(crate) fn queue_used(&self, index: u16) {
        let mut wires = self.0.lock();
        let vector = wires.queue_vectors.get(usize::from(index)).copied().unwrap_or(NO_VECTOR);
        wires.raise(vector, ISR_QUEUE);
    }
    /// Configuration or status changed by themselves.
    pub(crate) fn config_changed(&self) {
        let mut wires = self.0.lock();
        let vector = wires.config_vector;
        wires.raise(vector, ISR_CONFIG);
    }
    /// Vectors and status as after a device reset; MSI-X itself belongs to the function and stays.
    pub(crate) fn reset_device(&self) {
        let mut wires = self.0.lock();
        wires.isr = 0;
        wires.config_vector = NO_VECTOR;
        wires.queue_vectors.fill(NO_VECTOR);
        wires.drive_pin();
    }
}
