//! The working half of any device: queues come and go, the device serves them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use guest_ram::Memory;
use hv_core::{Interest, Work};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::link::{Link, Moved, Request};

/// Chains served before other devices get their turn.
const TURN_CHAINS: usize = 256;

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Return it to the driver with this many bytes written.
    Used(u32),
    /// Not now: it is offered again. The queue rests until the back end is ready or the machine resumes.
    Later,
}

/// What a device does with chains.
pub(crate) trait Device: Send {
    /// Something has happened: a bell, a message, or what [`Device::fd`] waits for.
    fn woken(&mut self) {}
    /// Serves one chain of queue `index`.
    fn serve(&mut self, index: u16, memory: &Memory, chain: DescriptorChain<&Memory>) -> Served;
    /// Whether queue `index` has something to do now; a queue that waits for its back end has not.
    fn ready(&mut self, _index: u16) -> bool {
        true
    }
    /// The driver is ready with these features.
    fn start(&mut self, _features: u64) {}
    /// Queues went back; what belongs to half-served chains is forgotten.
    fn stop(&mut self) {}
    /// The machine resumes.
    fn resumed(&mut self) {}
    /// The back end is another: the device's configuration from now on, if it follows from that.
    fn back_end_changed(&mut self) -> Option<Vec<u8>> {
        None
    }
    /// See [`Work::fd`].
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// See [`Work::interest`]; asked while queues are here.
    fn interest(&self) -> Interest {
        Interest::default()
    }
}

/// The working half, or one lane of it.
pub(crate) struct Working<D> {
    device: D,
    link: Arc<Link>,
    memory: Memory,
    queues: Vec<Moved>,
}

/// The driver has put into a ring what cannot be there.
struct Broken;

impl<D: Device> Working<D> {
    pub(crate) fn new(device: D, link: Arc<Link>, memory: Memory) -> Working<D> {
        Working { device, link, memory, queues: Vec::new() }
    }

    fn receive(&mut self) {
        for request in self.link.receive() {
            match request {
                Request::Start { queues, features } => {
                    self.device.start(features);
                    self.queues = queues;
                    self.link.done(Vec::new());
                }
                Request::Stop => {
                    self.device.stop();
                    self.link.done(std::mem::take(&mut self.queues));
                }
                Request::Forget => {
                    self.device.stop();
                    self.queues.clear();
                    self.link.done(Vec::new());
                }
            }
        }
    }

    /// Serves one queue. True: there is more than its turn allowed.
    fn turn(&mut self, place: usize) -> Result<bool, Broken> {
        let Working { device, link, memory, queues } = self;
        let memory: &Memory = memory;
        let Some(Moved { index, queue }) = queues.get_mut(place) else { return Ok(false) };
        let (mut used, mut left, mut more) = (false, TURN_CHAINS, false);
        'turn: while device.ready(*index) {
            queue.disable_notification(memory).map_err(|_| Broken)?;
            while device.ready(*index) {
                if left == 0 {
                    more = true;
                    break 'turn;
                }
                left -= 1;
                let Some(chain) = next_chain(queue, memory)? else { break };
                let head = chain.head_index();
                match device.serve(*index, memory, chain) {
                    Served::Used(bytes) => {
                        queue.add_used(memory, head, bytes).map_err(|_| Broken)?;
                        used = true;
                    }
                    Served::Later => {
                        queue.go_to_previous_position();
                        break 'turn;
                    }
                }
            }
            if !queue.enable_notification(memory).map_err(|_| Broken)? {
                break;
            }
        }
        if used && wants_interrupt(queue, memory)? {
            link.interrupts().queue_used(*index);
        }
        Ok(more)
    }
}

/// Whether the driver wants to hear of used buffers. VIRTIO 2.7.7.2
fn wants_interrupt(queue: &mut Queue, memory: &Memory) -> Result<bool, Broken> {
    /// VIRTQ_AVAIL_F_NO_INTERRUPT, which the queue leaves to its user. VIRTIO 2.7.6
    const NO_INTERRUPT: u16 = 1;
    if queue.event_idx_enabled() {
        return queue.needs_notification(memory).map_err(|_| Broken);
    }
    // The used index must be visible before the flags are looked at, or a driver that has just switched interrupts on
    // could miss this one.
    fence(Ordering::SeqCst);
    let flags: u16 = memory.load(GuestAddress(queue.avail_ring()), Ordering::Acquire).map_err(|_| Broken)?;
    Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
}

fn next_chain<'m>(queue: &mut Queue, memory: &'m Memory) -> Result<Option<DescriptorChain<&'m Memory>>, Broken> {
    Ok(queue.iter(memory).map_err(|_| Broken)?.next())
}

impl<D: Device> Work for Working<D> {
    fn work(&mut self) {
        self.receive();
        self.device.woken();
        let mut more = false;
        for place in 0..self.queues.len() {
            match self.turn(place) {
                Ok(unfinished) => more |= unfinished,
                Err(Broken) => {
                    // What is in the queues means nothing any more; the driver resets the device to go on.
                    self.queues.clear();
                    self.link.give_up();
                    return;
                }
            }
        }
        if more {
            self.link.bell().ring();
        }
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.fd()
    }
    fn interest(&self) -> Interest {
        if self.queues.is_empty() { Interest::default() } else { self.device.interest() }
    }
    fn resumed(&mut self) {
        self.device.resumed();
    }
    fn back_end_changed(&mut self) {
        if let Some(config) = self.device.back_end_changed() {
            self.link.change_config(config, !self.queues.is_empty());
        }
    }
}
