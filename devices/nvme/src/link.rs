//! Where the two halves meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use hv_core::Ring;
use parking_lot::Mutex;

use crate::interrupt::{Interrupts, QUEUES};
use crate::state::ControllerStateV1;

/// The admin queues, as registers name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AdminQueues {
    pub(crate) submission: u64,
    pub(crate) submission_size: u32,
    pub(crate) completion: u64,
    pub(crate) completion_size: u32,
}

/// What the register half asks of the working half.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// CC.EN was set.
    Enable(AdminQueues),
    /// CC.EN was cleared, or the function was reset: forget everything.
    Disable,
    /// CC.SHN was set: make everything durable.
    Shutdown,
    /// Give the queues back, for a snapshot.
    Park,
    /// Go on with these queues.
    Unpark(Box<ControllerStateV1>),
}

/// Shutdown status. NVME 3.1.6
pub(crate) const SHUTDOWN_BUSY: u8 = 1;
pub(crate) const SHUTDOWN_COMPLETE: u8 = 2;

/// Messages, and what both halves may touch.
pub(crate) struct Link {
    inbox: Mutex<Vec<Request>>,
    parked: Mutex<Option<ControllerStateV1>>,
    ready: AtomicBool,
    fatal: AtomicBool,
    shutdown: AtomicU8,
    /// Tails of submission queues and heads of completion queues as last written, alternating.
    doorbells: [AtomicU32; 2 * QUEUES as usize],
    pub(crate) interrupts: Interrupts,
    bell: Arc<dyn Ring>,
}

impl Link {
    pub(crate) fn new(interrupts: Interrupts, bell: Arc<dyn Ring>) -> Link {
        Link {
            inbox: Mutex::default(),
            parked: Mutex::default(),
            ready: AtomicBool::new(false),
            fatal: AtomicBool::new(false),
            shutdown: AtomicU8::new(0),
            doorbells: std::array::from_fn(|_| AtomicU32::new(0)),
            interrupts,
            bell,
        }
    }

    pub(crate) fn bell(&self) -> &Arc<dyn Ring> {
        &self.bell
    }
    /// Register half: asks, and wakes the working half.
    pub(crate) fn send(&self, request: Request) {
        self.inbox.lock().push(request);
        self.bell.ring();
    }
    /// Register half: a doorbell register was written.
    pub(crate) fn ring(&self, index: usize, value: u32) {
        if let Some(doorbell) = self.doorbells.get(index) {
            doorbell.store(value, Ordering::SeqCst);
            self.bell.ring();
        }
    }
    pub(crate) fn take_parked(&self) -> Option<ControllerStateV1> {
        self.parked.lock().take()
    }

    /// Working half: the oldest requests.
    pub(crate) fn receive(&self) -> Vec<Request> {
        std::mem::take(&mut self.inbox.lock())
    }
    pub(crate) fn park(&self, state: Option<ControllerStateV1>) {
        *self.parked.lock() = state;
    }
    /// Tail of submission queue `id`, as last written.
    pub(crate) fn tail(&self, id: u16) -> u32 {
        self.doorbell(2 * usize::from(id))
    }
    /// Head of completion queue `id`, as last written.
    pub(crate) fn head(&self, id: u16) -> u32 {
        self.doorbell(2 * usize::from(id) + 1)
    }
    fn doorbell(&self, index: usize) -> u32 {
        self.doorbells.get(index).map_or(0, |doorbell| doorbell.load(Ordering::SeqCst))
    }
    pub(crate) fn set_tail(&self, id: u16, value: u32) {
        self.set_doorbell(2 * usize::from(id), value);
    }
    pub(crate) fn set_head(&self, id: u16, value: u32) {
        self.set_doorbell(2 * usize::from(id) + 1, value);
    }
    fn set_doorbell(&self, index: usize, value: u32) {
        if let Some(doorbell) = self.doorbells.get(index) {
            doorbell.store(value, Ordering::SeqCst);
        }
    }

    pub(crate) fn ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }
    pub(crate) fn fatal(&self) -> bool {
        self.fatal.load(Ordering::SeqCst)
    }
    pub(crate) fn set_fatal(&self, fatal: bool) {
        self.fatal.store(fatal, Ordering::SeqCst);
    }
    pub(crate) fn shutdown(&self) -> u8 {
        self.shutdown.load(Ordering::SeqCst)
    }
    pub(crate) fn set_shutdown(&self, status: u8) {
        self.shutdown.store(status, Ordering::SeqCst);
    }
}
