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
    /// Heads of chains that were taken from the queue and are to be served again, the oldest first.
    pub(crate) unfinished: Vec<u16>,
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

/// Device-specific configuration. VIRTIO 2.5
struct Config {
    bytes: Vec<u8>,
    /// Counts changes, so that a driver knows that what it has read belongs together. Not saved: a machine stands while
    /// it changes, and the interrupt for it is not lost.
    generation: u8,
}

/// What all lanes of a device share.
pub(crate) struct Shared {
    config: Mutex<Config>,
    pub(crate) interrupts: Interrupts,
}

impl Shared {
    pub(crate) fn new(config: Vec<u8>, interrupts: Interrupts) -> Arc<Shared> {
        Arc::new(Shared { config: Mutex::new(Config { bytes: config, generation: 0 }), interrupts })
    }
}

/// Messages between the register half and one lane, and what both may touch.
pub(crate) struct Link {
    inbox: Mutex<Vec<Request>>,
    returned: Mutex<Vec<Moved>>,
    sent: AtomicU64,
    done: AtomicU64,
    broken: AtomicBool,
    shared: Arc<Shared>,
    bell: Arc<dyn Ring>,
}

impl Link {
    pub(crate) fn new(shared: Arc<Shared>, bell: Arc<dyn Ring>) -> Link {
        Link {
            inbox: Mutex::default(),
            returned: Mutex::default(),
            sent: AtomicU64::new(0),
            done: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            shared,
            bell,
        }
    }

    pub(crate) fn bell(&self) -> &Arc<dyn Ring> {
        &self.bell
    }
    pub(crate) fn interrupts(&self) -> &Interrupts {
        &self.shared.interrupts
    }

    /// Working half: the configuration is another now; a driver that is ready is told.
    pub(crate) fn change_config(&self, bytes: Vec<u8>, tell: bool) {
        let mut config = self.shared.config.lock();
        if config.bytes != bytes {
            config.bytes = bytes;
            config.generation = config.generation.wrapping_add(1);
            drop(config);
            if tell {
                self.shared.interrupts.config_changed();
            }
        }
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
            self.shared.interrupts.config_changed();
        }
    }
}

/// The lanes of a device, as the register half has them: queue `n` is served by lane `n` modulo their number. Each lane is
/// a working half of its own, with a bell and a back end of its own, so that different threads serve different queues.
pub(crate) struct Lanes {
    shared: Arc<Shared>,
    links: Vec<Arc<Link>>,
}

impl Lanes {
    /// There is at least one of `links`; they were made with `shared`.
    pub(crate) fn new(shared: Arc<Shared>, links: Vec<Arc<Link>>) -> Lanes {
        Lanes { shared, links }
    }
    pub(crate) fn interrupts(&self) -> &Interrupts {
        &self.shared.interrupts
    }
    /// `count` bytes of the configuration, little-endian; what lies behind its end is 0.
    pub(crate) fn config(&self, offset: u64, count: u8) -> u64 {
        let config = self.shared.config.lock();
        (0..u64::from(count.min(8))).fold(0, |value, i| {
            let byte = usize::try_from(offset + i).ok().and_then(|at| config.bytes.get(at)).copied();
            value | u64::from(byte.unwrap_or(0)) << (8 * i)
        })
    }
    /// Changes with the configuration.
    pub(crate) fn config_generation(&self) -> u8 {
        self.shared.config.lock().generation
    }
    /// The bell of a queue's lane.
    pub(crate) fn bell(&self, queue: usize) -> Option<&Arc<dyn Ring>> {
        self.links.get(queue % self.links.len().max(1)).map(|link| link.bell())
    }
    pub(crate) fn ring_all(&self) {
        self.links.iter().for_each(|link| link.bell().ring());
    }
    /// Gives every lane its queues.
    pub(crate) fn start(&self, queues: Vec<Moved>, features: u64) {
        let mut shares: Vec<Vec<Moved>> = self.links.iter().map(|_| Vec::new()).collect();
        let count = shares.len().max(1);
        for moved in queues {
            if let Some(share) = shares.get_mut(usize::from(moved.index) % count) {
                share.push(moved);
            }
        }
        for (link, queues) in self.links.iter().zip(shares) {
            link.send(Request::Start { queues, features });
        }
    }
    pub(crate) fn stop(&self) {
        self.links.iter().for_each(|link| link.send(Request::Stop));
    }
    pub(crate) fn forget(&self) {
        self.links.iter().for_each(|link| link.send(Request::Forget));
    }
    pub(crate) fn idle(&self) -> bool {
        self.links.iter().all(|link| link.idle())
    }
    pub(crate) fn take_returned(&self) -> Vec<Moved> {
        self.links.iter().flat_map(|link| link.take_returned()).collect()
    }
    pub(crate) fn broken(&self) -> bool {
        self.links.iter().any(|link| link.broken())
    }
    pub(crate) fn mend(&self) {
        self.links.iter().for_each(|link| link.mend());
    }
    /// The driver has set up what cannot be.
    pub(crate) fn give_up(&self) {
        if let Some(link) = self.links.first() {
            link.give_up();
        }
    }
}
