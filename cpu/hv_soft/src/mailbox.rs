//! What other threads may do to a vCPU: set bits, and wake it. The APIC's registers stay the vCPU thread's own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread::Thread;
use std::time::Duration;

use guest_ram::{CodeWatcher, Gpa};
use hv_core::{Kick, Msi};
use parking_lot::Mutex;

/// Someone wants the vCPU to look at its stop token.
pub(crate) const KICK: u32 = 1;
/// Interrupt requests are in the mailbox.
pub(crate) const IRQ: u32 = 2;
/// The 8259's output changed.
pub(crate) const EXTINT: u32 = 4;
/// A device wrote to a page with decoded code.
pub(crate) const CODE: u32 = 8;

/// The part of a vCPU that other threads see.
#[derive(Default)]
pub(crate) struct Mailbox {
    /// KICK, IRQ, EXTINT, CODE: taken by the vCPU once per block.
    pub events: AtomicU32,
    requests: [AtomicU32; 8],
    level: [AtomicU32; 8],
    nmi: AtomicBool,
    extint: AtomicBool,
    apic_id: AtomicU32,
    logical_id: AtomicU32,
    x2apic: AtomicBool,
    written_code: Mutex<Vec<u64>>,
    sleeper: Mutex<Option<Thread>>,
}

impl Mailbox {
    pub fn new(apic_id: u32) -> Mailbox {
        Mailbox { apic_id: AtomicU32::new(apic_id), ..Mailbox::default() }
    }

    /// The thread that runs the vCPU; it is the one to wake.
    pub fn runs_on(&self, thread: Thread) {
        *self.sleeper.lock() = Some(thread);
    }

    fn post(&self, event: u32) {
        self.events.fetch_or(event, SeqCst);
        if let Some(thread) = &*self.sleeper.lock() {
            thread.unpark();
        }
    }

    /// Sleeps until an event is posted or `timeout` has passed. Only on the vCPU's thread.
    pub fn sleep(&self, timeout: Option<Duration>) {
        if self.events.load(SeqCst) != 0 {
            return;
        }
        match timeout {
            Some(timeout) => std::thread::park_timeout(timeout),
            None => std::thread::park(),
        }
    }

    /// Requests an interrupt.
    pub fn request(&self, vector: u8, level: bool) {
        let (word, bit) = (vector as usize / 32, 1 << (vector % 32));
        if level {
            self.level[word].fetch_or(bit, SeqCst);
        } else {
            self.level[word].fetch_and(!bit, SeqCst);
        }
        self.requests[word].fetch_or(bit, SeqCst);
        self.post(IRQ);
    }

    /// Takes the requests: (requested, level-triggered) per 32 vectors.
    pub fn take_requests(&self) -> [(u32, u32); 8] {
        std::array::from_fn(|i| (self.requests[i].swap(0, SeqCst), self.level[i].load(SeqCst)))
    }

    pub fn post_nmi(&self) {
        self.nmi.store(true, SeqCst);
        self.post(IRQ);
    }
    pub fn nmi_pending(&self) -> bool {
        self.nmi.load(SeqCst)
    }
    pub fn take_nmi(&self) -> bool {
        self.nmi.swap(false, SeqCst)
    }

    pub fn set_extint(&self, high: bool) {
        if self.extint.swap(high, SeqCst) != high {
            self.post(EXTINT);
        }
    }
    pub fn extint(&self) -> bool {
        self.extint.load(SeqCst)
    }

    /// The APIC's identity has changed.
    pub fn set_identity(&self, apic_id: u32, logical_id: u32, x2apic: bool) {
        self.apic_id.store(apic_id, SeqCst);
        self.logical_id.store(logical_id, SeqCst);
        self.x2apic.store(x2apic, SeqCst);
    }

    /// Whether a message for `dest` is for this vCPU. SDM 3A 11.6.2 "Determining IPI Destination".
    pub fn is_destination(&self, dest: u32, logical: bool) -> bool {
        if dest == 0xff || dest == u32::MAX {
            return true;
        }
        let id = self.apic_id.load(SeqCst);
        if !logical {
            return dest == id;
        }
        let own = self.logical_id.load(SeqCst);
        if self.x2apic.load(SeqCst) {
            // Cluster in the upper half, member bits in the lower; an 8-bit MSI destination addresses cluster 0.
            own >> 16 == dest >> 16 && own & dest & 0xffff != 0
        } else {
            own >> 24 & dest != 0
        }
    }

    /// The pages that devices wrote to while they held decoded code.
    pub fn take_written_code(&self) -> Vec<u64> {
        std::mem::take(&mut *self.written_code.lock())
    }
}

/// Delivers an MSI to the mailboxes it addresses. SDM 3A 11.11.1.
pub(crate) fn deliver_msi(boxes: &[std::sync::Arc<Mailbox>], msi: Msi) {
    let dest = (msi.address >> 12 & 0xff) as u32 | ((msi.address >> 40) as u32) << 8;
    deliver(boxes, dest, msi.address & 4 != 0, (msi.data >> 8 & 7) as u8, msi.data as u8, msi.data & 1 << 15 != 0);
}

/// Delivers an interrupt message by delivery mode. SMI, INIT and start-up messages go nowhere: there is one vCPU and
/// no SMM.
pub(crate) fn deliver(boxes: &[std::sync::Arc<Mailbox>], dest: u32, logical: bool, mode: u8, vector: u8, level: bool) {
    for target in boxes.iter().filter(|b| b.is_destination(dest, logical)) {
        match mode {
            0 | 1 => target.request(vector, level),
            4 => target.post_nmi(),
            _ => {}
        }
        if mode == 1 {
            return;
        }
    }
}

/// Wakes a vCPU so that it looks at its stop token.
pub(crate) struct Kicker(pub std::sync::Arc<Mailbox>);
impl Kick for Kicker {
    fn kick(&self) {
        self.0.post(KICK);
    }
}

/// Hears of device writes to pages with decoded code.
pub(crate) struct Watcher(pub Vec<std::sync::Arc<Mailbox>>);
impl CodeWatcher for Watcher {
    fn code_written(&self, page: Gpa) {
        for mailbox in &self.0 {
            mailbox.written_code.lock().push(page.0);
            mailbox.post(CODE);
        }
    }
}
