//! The working half of any device: queues come and go, the device serves them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use guest_ram::Memory;
use hv_core::{Interest, Work};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::Chain;
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
    /// The device keeps it: [`Device::next_over`] returns it.
    UnderWay,
}

/// A chain that was under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Its queue.
    pub(crate) index: u16,
    /// Its head.
    pub(crate) head: u16,
    /// Bytes written; `None`: it is to be served again.
    pub(crate) used: Option<u32>,
}

/// What a device does with chains.
pub(crate) trait Device: Send {
    /// Something has happened: a bell, a message, or what [`Device::fd`] waits for.
    fn woken(&mut self) {}
    /// Serves one chain of queue `index`. One that is served again does not go under way.
    fn serve(&mut self, index: u16, memory: &Memory, chain: Chain, again: bool) -> Served;
    /// What was begun starts now at the latest.
    fn submit(&mut self) {}
    /// The next chain that was under way and is over.
    fn next_over(&mut self, _memory: &Memory) -> Option<Ended> {
        None
    }
    /// Waits until a chain that is under way is over. False: none is.
    fn wait(&mut self) -> bool {
        false
    }
    /// Queues will work on this memory.
    fn attach(&mut self, _memory: &Memory) {}
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
    /// See [`Work::over_fd`].
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
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
    queues: Vec<Serving>,
}

/// A queue that is being served.
struct Serving {
    moved: Moved,
    /// Chains went back to the driver, and it has not been told.
    used: bool,
}

impl Serving {
    fn give_back(&mut self, memory: &Memory, head: u16, bytes: u32) -> Result<(), Broken> {
        self.moved.queue.add_used(memory, head, bytes).map_err(|_| Broken)?;
        self.used = true;
        Ok(())
    }
    fn chain(&self, head: u16) -> Chain {
        let queue = &self.moved.queue;
        Chain { table: GuestAddress(queue.desc_table()), entries: queue.size(), head }
    }
}

/// The driver has put into a ring what cannot be there.
struct Broken;

impl<D: Device> Working<D> {
    pub(crate) fn new(mut device: D, link: Arc<Link>, memory: Memory) -> Working<D> {
        device.attach(&memory);
        Working { device, link, memory, queues: Vec::new() }
    }

    fn receive(&mut self) {
        for request in self.link.receive() {
            match request {
                Request::Start { queues, features } => {
                    self.device.start(features);
                    self.queues = queues.into_iter().map(|moved| Serving { moved, used: false }).collect();
                    self.link.done(Vec::new());
                }
                Request::Stop => {
                    self.settle();
                    self.device.stop();
                    self.link.done(self.queues.drain(..).map(|serving| serving.moved).collect());
                }
                Request::Forget => {
                    self.queues.clear();
                    self.settle();
                    self.device.stop();
                    self.link.done(Vec::new());
                }
            }
        }
    }

    /// Everything that there is to do. True: there is more than one turn allows.
    fn pass(&mut self) -> Result<bool, Broken> {
        self.take_over()?;
        let mut more = false;
        for place in 0..self.queues.len() {
            more |= self.turn(place)?;
        }
        self.device.submit();
        // Some were over at once.
        self.take_over()?;
        for Serving { moved, .. } in &self.queues {
            more |= !moved.unfinished.is_empty() && self.device.ready(moved.index);
        }
        self.tell()?;
        Ok(more)
    }

    /// Gives chains that were under way and are over back to the driver.
    fn take_over(&mut self) -> Result<(), Broken> {
        while let Some(Ended { index, head, used }) = self.device.next_over(&self.memory) {
            // The queues of a driver that broke one are gone.
            let Some(serving) = self.queues.iter_mut().find(|serving| serving.moved.index == index) else { continue };
            match used {
                Some(bytes) => serving.give_back(&self.memory, head, bytes)?,
                None => serving.moved.unfinished.push(head),
            }
        }
        Ok(())
    }

    /// Serves one queue. True: there is more than its turn allowed.
    fn turn(&mut self, place: usize) -> Result<bool, Broken> {
        let Working { device, memory, queues, .. } = self;
        let memory: &Memory = memory;
        let Some(serving) = queues.get_mut(place) else { return Ok(false) };
        let index = serving.moved.index;
        while let Some(&head) = serving.moved.unfinished.first()
            && device.ready(index)
        {
            let Served::Used(bytes) = device.serve(index, memory, serving.chain(head), true) else { break };
            serving.moved.unfinished.remove(0);
            serving.give_back(memory, head, bytes)?;
        }
        let mut left = TURN_CHAINS;
        while device.ready(index) {
            serving.moved.queue.disable_notification(memory).map_err(|_| Broken)?;
            while device.ready(index) {
                if left == 0 {
                    return Ok(true);
                }
                left -= 1;
                let Some(head) = next_head(&mut serving.moved.queue, memory)? else { break };
                match device.serve(index, memory, serving.chain(head), false) {
                    Served::Used(bytes) => serving.give_back(memory, head, bytes)?,
                    Served::UnderWay => {}
                    Served::Later => {
                        serving.moved.queue.go_to_previous_position();
                        return Ok(false);
                    }
                }
            }
            if !serving.moved.queue.enable_notification(memory).map_err(|_| Broken)? {
                break;
            }
        }
        Ok(false)
    }

    /// Tells the driver what went back to it.
    fn tell(&mut self) -> Result<(), Broken> {
        for Serving { moved, used } in &mut self.queues {
            if std::mem::take(used) && wants_interrupt(&mut moved.queue, &self.memory)? {
                self.link.interrupts().queue_used(moved.index);
            }
        }
        Ok(())
    }

    /// What is in the queues means nothing any more; the driver resets the device to go on.
    fn give_up(&mut self) {
        self.queues.clear();
        self.link.give_up();
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

fn next_head(queue: &mut Queue, memory: &Memory) -> Result<Option<u16>, Broken> {
    Ok(queue.iter(memory).map_err(|_| Broken)?.next().map(|chain| chain.head_index()))
}

impl<D: Device> Work for Working<D> {
    fn work(&mut self) {
        self.receive();
        self.device.woken();
        match self.pass() {
            Ok(true) => self.link.bell().ring(),
            Ok(false) => {}
            Err(Broken) => self.give_up(),
        }
    }
    fn settle(&mut self) {
        while self.device.wait() {
            if self.take_over().is_err() {
                self.give_up();
            }
        }
        if self.tell().is_err() {
            self.give_up();
        }
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.fd()
    }
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.over_fd()
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
