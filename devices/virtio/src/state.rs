//! Saved state of a device: the transport's registers and the indices of its queues.

use hv_core::StateError;
use minicbor::{Decode, Encode};
use pci::{ConfigStateV1, MsixStateV1};

/// One queue.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
#[allow(missing_docs)] // register names of VIRTIO 4.1.4.3
pub struct QueueStateV1 {
    #[n(0)]
    pub size: u16,
    #[n(1)]
    pub enabled: bool,
    #[n(2)]
    pub descriptors: u64,
    #[n(3)]
    pub driver: u64,
    #[n(4)]
    pub device: u64,
    #[n(5)]
    pub vector: u16,
    /// Next entry of the available ring.
    #[n(6)]
    pub next_avail: u16,
    /// Next entry of the used ring.
    #[n(7)]
    pub next_used: u16,
    /// Heads of chains that were taken from the available ring and are to be served again.
    #[n(8)]
    #[cbor(default, skip_if = "Vec::is_empty")]
    pub unfinished: Vec<u16>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[allow(missing_docs)] // register names of VIRTIO 4.1.4.3
pub struct VirtioStateV1 {
    #[n(0)]
    pub config: ConfigStateV1,
    #[n(1)]
    pub msix: MsixStateV1,
    #[n(2)]
    pub isr: u8,
    #[n(3)]
    pub config_vector: u16,
    #[n(4)]
    pub status: u8,
    #[n(5)]
    pub device_feature_select: u32,
    #[n(6)]
    pub driver_feature_select: u32,
    #[n(7)]
    pub driver_features: u64,
    #[n(8)]
    pub queue_select: u16,
    #[n(9)]
    pub queues: Vec<QueueStateV1>,
}

/// Checks that a queue size is one the device offers.
pub(crate) fn check_size(size: u16, max: u16) -> Result<u16, StateError> {
    if size.is_power_of_two() && size <= max {
        return Ok(size);
    }
    Err(StateError::Value { field: "virtio.queue.size", got: size.into() })
}
