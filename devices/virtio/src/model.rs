//! What kind of device the transport presents.

/// Either side may use buffers as descriptor tables. VIRTIO 6
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides tell the index at which they want to be notified.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// The most queues a device of this crate has.
pub(crate) const MAX_QUEUES: u16 = 16;

/// The constant part of a device.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// VIRTIO 5: 2 block, 3 console, 4 entropy.
    pub(crate) device_type: u16,
    /// PCI class code.
    pub(crate) class: u32,
    /// Device feature bits; the transport adds its own.
    pub(crate) features: u64,
    /// Largest size of each queue, powers of two.
    pub(crate) queue_sizes: Vec<u16>,
    /// Device-specific configuration at the start; read-only to the driver.
    pub(crate) config: Vec<u8>,
}

impl Model {
    /// All features offered.
    pub(crate) fn offered(&self) -> u64 {
        self.features | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
    }
}
