//! Saved state of a controller.

use minicbor::{Decode, Encode};
use pci::{ConfigStateV1, MsixStateV1};

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[allow(missing_docs)] // field names of NVME 4.1
pub struct SubmissionQueueStateV1 {
    #[n(0)]
    pub id: u16,
    #[n(1)]
    pub base: u64,
    #[n(2)]
    pub size: u32,
    #[n(3)]
    pub head: u32,
    #[n(4)]
    pub tail: u32,
    #[n(5)]
    pub completion: u16,
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[allow(missing_docs)] // field names of NVME 4.1
pub struct CompletionQueueStateV1 {
    #[n(0)]
    pub id: u16,
    #[n(1)]
    pub base: u64,
    #[n(2)]
    pub size: u32,
    #[n(3)]
    pub tail: u32,
    #[n(4)]
    pub head: u32,
    #[n(5)]
    pub phase: bool,
    #[n(6)]
    pub vector: Option<u16>,
}

/// The working half of an enabled controller.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ControllerStateV1 {
    /// Submission queues, the admin queue among them.
    #[n(0)]
    pub submissions: Vec<SubmissionQueueStateV1>,
    /// Completion queues.
    #[n(1)]
    pub completions: Vec<CompletionQueueStateV1>,
    /// Values of the features that can be set, by number.
    #[n(2)]
    pub features: Vec<(u8, u32)>,
    /// Commands that wait for an asynchronous event.
    #[n(3)]
    pub event_requests: Vec<u16>,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct NvmeStateV1 {
    /// Configuration space.
    #[n(0)]
    pub config: ConfigStateV1,
    /// MSI-X structures.
    #[n(1)]
    pub msix: MsixStateV1,
    /// Interrupt mask.
    #[n(2)]
    pub interrupt_mask: u32,
    /// Controller configuration.
    #[n(3)]
    pub cc: u32,
    /// Admin queue attributes.
    #[n(4)]
    pub aqa: u32,
    /// Admin submission queue.
    #[n(5)]
    pub asq: u64,
    /// Admin completion queue.
    #[n(6)]
    pub acq: u64,
    /// The controller met something it cannot go on from.
    #[n(7)]
    pub fatal: bool,
    /// Shutdown status: 0, 2 complete.
    #[n(8)]
    pub shutdown: u8,
    /// The working half, if the controller was ready.
    #[n(9)]
    pub controller: Option<ControllerStateV1>,
}
