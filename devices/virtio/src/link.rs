//! Where the two halves of a device meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_core::Ring;
use parking_lot::Mutex;
use virtio_queue::Queue;

use crate::interrupt::Interrupts;

/// A queue that goes over or comes back.
pub(crate) struct Moved {
    pub(crate) index: u16,
    pub(crate) queue: Queue,
}

/// What the register half asks of the working half.
pub(crate) enum Request {
    /// The driver is ready: here are its queues, and the features it took.
    Start { queues: Vec<Moved>, features: u64 },
    /// Give the queues back.
    Stop,
    /// The device is reset: forget the queues. What came back would be taken for the next driver's.
    Forget,
}

/// Messages, and what both halves may touch.
pub(crate) struct Link {
    inbox: Mutex<Vec<Request>>,
    returned: Mutex<Vec<Moved>>,
    sent: AtomicU64,
    done: AtomicU64,
    broken: AtomicBool,
    pub(crate) interrupts: Interrupts,
    bell: Arc<dyn Ring>,
}

impl Link {
    pub(crate) fn new(interrupts: Interrupts, bell: Arc<dyn Ring>) -> Link {
        Link {
            inbox: Mutex::default(),
            returned: Mutex::default(),
            sent: AtomicU64::new(0),
            done: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            interrupts,
            bell,
        }
    }

    pub(crate) fn bell(&self) -> &Arc<dyn Ring> {
        &self.bell
    }

    /// Register half: asks, and wakes the working half.
    pub(crate) fn send(&self, request: Request) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.inbox.lock().push(request);
        self.bell.ring();
    }
    /// Register half: everything asked has been done.
    pub(crate) fn idle(&self) -> bool {
        self.sent.load(Ordering::SeqCst) == self.done.load(Ordering::SeqCst)
    }
    /// Register half: the queues that came back.
    pub(crate) fn take_returned(&self) -> Vec<Moved> {
        std::mem::take(&mut self.returned.lock())
    }
    /// Register half: the working half has given up on what the driver put into a queue.
    pub(crate) fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
    /// Register half: the driver resets the device.
    pub(crate) fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    /// Working half: the oldest requests.
    pub(crate) fn receive(&self) -> Vec<Request> {
        std::mem::take(&mut self.inbox.lock())
    }
    /// Working half: a request has been carried out; `queues` come back.
    pub(crate) fn done(&self, queues: Vec<Moved>) {
        self.returned.lock().extend(queues);
        self.done.fetch_add(1, Ordering::SeqCst);
    }
    /// Working half: the driver broke a queue; the device needs a reset. VIRTIO 2.1.2
    pub(crate) fn give_up(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            self.interrupts.config_changed();
        }
    }
}
