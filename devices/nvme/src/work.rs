//! The working half: queues and the disk.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use guest_ram::Memory;
use hv_core::{DiskBackend, Interest, Work};

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Outcome, Status};
use crate::identify::{BLOCK_SHIFT, EVENT_REQUESTS, NAMESPACE_NOTICES, clean_serial};
use crate::interrupt::QUEUES;
use crate::link::{AdminQueues, Link, Request, SHUTDOWN_COMPLETE};
use crate::queue::{CompletionQueue, NotMemory, SubmissionQueue, is_ring};
use crate::registers::MAX_ENTRIES;
use crate::state::{CompletionQueueStateV1, ControllerStateV1, SubmissionQueueStateV1};
use crate::{admin, io};

/// Commands of one queue carried out before the others get their turn.
const TURN_COMMANDS: usize = 64;

/// What commands act on.
pub(crate) struct Controller {
    pub(crate) disk: Box<dyn DiskBackend>,
    serial: String,
    link: Arc<Link>,
    submissions: [Option<SubmissionQueue>; QUEUES as usize],
    completions: [Option<CompletionQueue>; QUEUES as usize],
    features: Vec<(u8, u32)>,
    event_requests: Vec<u16>,
    /// The namespace is another than the driver knows. Not saved: what is left to tell is told by the notice, which goes
    /// out before queues can be given back.
    changed: bool,
    /// The driver has not been told.
    notice_due: bool,
}

impl Controller {
    pub(crate) fn blocks(&self) -> u64 {
        self.disk.size_bytes() >> BLOCK_SHIFT
    }
    pub(crate) fn serial(&self) -> &str {
        &self.serial
    }
    pub(crate) fn submission(&self, id: u16) -> Option<&SubmissionQueue> {
        self.submissions.get(usize::from(id))?.as_ref()
    }
    pub(crate) fn completion(&self, id: u16) -> Option<&CompletionQueue> {
        self.completions.get(usize::from(id))?.as_ref()
    }
    pub(crate) fn add_submission(&mut self, id: u16, queue: SubmissionQueue) {
        self.link.set_tail(id, 0);
        if let Some(place) = self.submissions.get_mut(usize::from(id)) {
            *place = Some(queue);
        }
    }
    pub(crate) fn add_completion(&mut self, id: u16, queue: CompletionQueue) {
        self.link.set_head(id, 0);
        if let Some(place) = self.completions.get_mut(usize::from(id)) {
            *place = Some(queue);
        }
    }
    /// False: there is no such queue.
    pub(crate) fn remove_submission(&mut self, id: u16) -> bool {
        self.submissions.get_mut(usize::from(id)).and_then(Option::take).is_some()
    }
    pub(crate) fn remove_completion(&mut self, id: u16) {
        self.completions.get_mut(usize::from(id)).and_then(Option::take);
    }
    pub(crate) fn completion_in_use(&self, id: u16) -> bool {
        self.submissions.iter().flatten().any(|queue| queue.completion == id)
    }
    pub(crate) fn has_io_queues(&self) -> bool {
        self.completions.iter().skip(1).any(Option::is_some)
    }
    pub(crate) fn feature(&self, number: u8) -> Option<u32> {
        self.features.iter().find(|(n, _)| *n == number).map(|(_, value)| *value)
    }
    /// False: there is no such feature.
    pub(crate) fn set_feature(&mut self, number: u8, value: u32) -> bool {
        let place = self.features.iter_mut().find(|(n, _)| *n == number);
        place.map(|(_, old)| *old = value).is_some()
    }
    pub(crate) fn write_cache(&self) -> bool {
        self.feature(admin::WRITE_CACHE).is_none_or(|value| value & 1 != 0)
    }
    pub(crate) fn event_requests(&self) -> usize {
        self.event_requests.len()
    }
    pub(crate) fn add_event_request(&mut self, id: u16) {
        self.event_requests.push(id);
    }

    /// Whether the namespace has changed since this was asked; asking with the event retained does not count. NVME 5.14
    pub(crate) fn take_changed(&mut self, command: &Command) -> bool {
        const RETAIN: u32 = 1 << 15;
        let changed = self.changed;
        self.changed &= command.dword10() & RETAIN != 0;
        changed
    }

    /// Tells the driver that the namespace has changed, if it wants to know and waits for an event. The vector of the
    /// completion queue to interrupt. NVME 5.2
    fn send_notice(&mut self, memory: &Memory) -> Result<Option<u16>, NotMemory> {
        const NOTICE: u32 = 2;
        let wanted = self.feature(admin::EVENT_CONFIGURATION).is_some_and(|value| value & NAMESPACE_NOTICES != 0);
        let room = self.completion(0).is_some_and(|ring| ring.has_room(self.link.head(0)));
        if !self.notice_due || !wanted || !room || self.event_requests.is_empty() {
            return Ok(None);
        }
        let head = self.submission(0).map_or(0, |queue| queue.head);
        let id = self.event_requests.remove(0);
        self.notice_due = false;
        let Some(ring) = self.completions.first_mut().and_then(Option::as_mut) else { return Ok(None) };
        // Type, information (namespace attributes changed: 0), log page.
        ring.post(memory, (0, head), id, Status::SUCCESS, NOTICE | admin::CHANGED_NAMESPACES << 16)?;
        Ok(ring.vector)
    }

    fn clear(&mut self) {
        self.submissions = Default::default();
        self.completions = Default::default();
        self.features = admin::default_features();
        self.event_requests.clear();
        self.changed = false;
        self.notice_due = false;
    }

    fn save(&self) -> ControllerStateV1 {
        let ids = 0..QUEUES;
        let submissions = ids.clone().filter_map(|id| Some(self.submission(id)?.save(id, self.link.tail(id))));
        let completions = ids.filter_map(|id| Some(self.completion(id)?.save(id, self.link.head(id))));
        ControllerStateV1 {
            submissions: submissions.collect(),
            completions: completions.collect(),
            features: self.features.clone(),
            event_requests: self.event_requests.clone(),
        }
    }

    /// Takes saved queues, which are untrusted. False: they cannot be.
    fn restore(&mut self, state: ControllerStateV1, memory: &Memory) -> bool {
        self.clear();
        for queue in state.completions {
            let CompletionQueueStateV1 { id, base, size, tail, head, phase, vector } = queue;
            let sound = (2..=MAX_ENTRIES).contains(&size) && tail < size && id < QUEUES;
            if !sound || vector.is_some_and(|v| v >= QUEUES) || !is_ring(memory, base, size, COMPLETION_BYTES) {
                return false;
            }
            self.add_completion(id, CompletionQueue { base, size, tail, phase, vector });
            self.link.set_head(id, head);
        }
        for queue in state.submissions {
            let SubmissionQueueStateV1 { id, base, size, head, tail, completion } = queue;
            let sound = (2..=MAX_ENTRIES).contains(&size) && head < size && id < QUEUES;
            if !sound || self.completion(completion).is_none() || !is_ring(memory, base, size, COMMAND_BYTES) {
                return false;
            }
            self.add_submission(id, SubmissionQueue { base, size, head, completion });
            self.link.set_tail(id, tail);
        }
        for (number, value) in state.features {
            self.set_feature(number, value);
        }
        self.event_requests = state.event_requests;
        self.event_requests.truncate(EVENT_REQUESTS);
        true
    }
}

/// The working half.
pub(crate) struct Working {
    controller: Controller,
    link: Arc<Link>,
    memory: Memory,
    /// A command waits for the machine to resume.
    held: bool,
    /// A command waits for the disk's limits; its queue rests until then, others go on.
    waiting: bool,
}

impl Working {
    pub(crate) fn new(disk: Box<dyn DiskBackend>, serial: &str, link: Arc<Link>, memory: Memory) -> Working {
        let controller = Controller {
            disk,
            serial: clean_serial(serial),
            link: link.clone(),
            submissions: Default::default(),
            completions: Default::default(),
            features: admin::default_features(),
            event_requests: Vec::new(),
            changed: false,
            notice_due: false,
        };
        Working { controller, link, memory, held: false, waiting: false }
    }

    fn receive(&mut self) {
        for request in self.link.receive() {
            match request {
                Request::Enable(queues) => self.enable(queues),
                Request::Disable => {
                    self.disable();
                    self.link.set_fatal(false);
                }
                Request::Shutdown => {
                    // A flush that fails now has nobody to be reported to but the disk's owner, who hears of it.
                    let _ = self.controller.disk.flush();
                    self.link.set_shutdown(SHUTDOWN_COMPLETE);
                }
                Request::Park => {
                    let state = self.link.ready().then(|| self.controller.save());
                    self.disable();
                    self.link.park(state);
                }
                Request::Unpark(state) => match self.controller.restore(*state, &self.memory) {
                    true => self.link.set_ready(true),
                    false => self.fail(),
                },
            }
        }
    }

    fn enable(&mut self, queues: AdminQueues) {
        let AdminQueues { submission, submission_size, completion, completion_size } = queues;
        let rings = is_ring(&self.memory, submission, submission_size, COMMAND_BYTES)
            && is_ring(&self.memory, completion, completion_size, COMPLETION_BYTES);
        if !rings || submission_size < 2 || completion_size < 2 {
            return self.fail();
        }
        self.controller.clear();
        let ring = CompletionQueue { base: completion, size: completion_size, tail: 0, phase: true, vector: Some(0) };
        self.controller.add_completion(0, ring);
        let ring = SubmissionQueue { base: submission, size: submission_size, head: 0, completion: 0 };
        self.controller.add_submission(0, ring);
        self.link.set_ready(true);
    }

    fn disable(&mut self) {
        self.controller.clear();
        self.held = false;
        self.link.set_ready(false);
        self.link.interrupts.set_unseen(false);
    }

    /// The driver has put rings where they cannot be: nothing goes on before it resets the controller.
    fn fail(&mut self) {
        self.controller.clear();
        self.link.set_fatal(true);
        self.link.interrupts.set_unseen(false);
    }

    /// Serves one submission queue. True: there is more than its turn allowed.
    fn turn(&mut self, id: u16) -> Result<bool, NotMemory> {
        let mut completed = None;
        let mut more = true;
        for _ in 0..TURN_COMMANDS {
            let Some(queue) = self.controller.submission(id) else { break };
            let completion = queue.completion;
            let room = self.controller.completion(completion).is_some_and(|c| c.has_room(self.link.head(completion)));
            let command = queue.peek(&self.memory, self.link.tail(id))?;
            let Some(command) = command.filter(|_| room && !self.held) else {
                more = false;
                break;
            };
            let outcome = match id {
                0 => admin::execute(&mut self.controller, &self.memory, &command),
                _ => io::execute(&mut self.controller, &self.memory, &command),
            };
            if matches!(outcome, Outcome::Later | Outcome::Wait) {
                self.held |= outcome == Outcome::Later;
                self.waiting |= outcome == Outcome::Wait;
                more = false;
                break;
            }
            let Some(queue) = self.controller.submissions.get_mut(usize::from(id)).and_then(Option::as_mut) else {
                break;
            };
            queue.advance();
            let head = queue.head;
            if let Outcome::Done(status, dword0) = outcome
                && let Some(ring) =
                    self.controller.completions.get_mut(usize::from(completion)).and_then(Option::as_mut)
            {
                ring.post(&self.memory, (id, head), command.id, status, dword0)?;
                completed = Some(ring.vector);
            }
        }
        if let Some(Some(vector)) = completed {
            self.link.interrupts.completed(vector);
        }
        Ok(more && self.controller.submission(id).is_some())
    }

    /// For the pin, which follows the queues' contents.
    fn show_unseen(&self) {
        let unseen = (0..QUEUES).any(|id| {
            let queue = self.controller.completion(id);
            queue.is_some_and(|queue| queue.vector.is_some() && queue.has_unseen(self.link.head(id)))
        });
        self.link.interrupts.set_unseen(unseen);
    }
}

impl Work for Working {
    fn work(&mut self) {
        self.waiting = false;
        self.receive();
        if !self.link.ready() || self.link.fatal() {
            return;
        }
        let mut more = false;
        for id in 0..QUEUES {
            match self.turn(id) {
                Ok(unfinished) => more |= unfinished,
                Err(NotMemory) => return self.fail(),
            }
        }
        match self.controller.send_notice(&self.memory) {
            Ok(vector) => vector.into_iter().for_each(|vector| self.link.interrupts.completed(vector)),
            Err(NotMemory) => return self.fail(),
        }
        self.show_unseen();
        if more {
            self.link.bell().ring();
        }
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.controller.disk.wait_fd()
    }
    fn interest(&self) -> Interest {
        Interest { readable: self.waiting, writable: false }
    }
    fn resumed(&mut self) {
        self.held = false;
    }
    fn back_end_changed(&mut self) {
        self.controller.changed = true;
        self.controller.notice_due = true;
        self.link.bell().ring();
    }
}
