//! Submission and completion queues: rings in guest memory.

use std::sync::atomic::Ordering;

use guest_ram::{Memory, PAGE_BYTES};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Status};
use crate::state::{CompletionQueueStateV1, SubmissionQueueStateV1};

/// A ring that is not in guest memory any more, or never was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotMemory;

/// Whether a ring of `entries` at `base` is page-aligned guest memory.
pub(crate) fn is_ring(memory: &Memory, base: u64, entries: u32, entry_bytes: u64) -> bool {
    let bytes = u64::from(entries) * entry_bytes;
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    base.is_multiple_of(PAGE_BYTES) && memory.check_range(GuestAddress(base), length)
}

/// A submission queue.
#[derive(Clone, Debug)]
pub(crate) struct SubmissionQueue {
    pub(crate) base: u64,
    /// Entries; one is always free.
    pub(crate) size: u32,
    pub(crate) head: u32,
    /// Number of the completion queue.
    pub(crate) completion: u16,
}

impl SubmissionQueue {
    /// The command at the head, if the driver's `tail` says there is one. A tail outside the queue says nothing.
    pub(crate) fn peek(&self, memory: &Memory, tail: u32) -> Result<Option<Command>, NotMemory> {
        if tail == self.head || tail >= self.size {
            return Ok(None);
        }
        let mut bytes = [0; COMMAND_BYTES as usize];
        let at = self.base.saturating_add(u64::from(self.head) * COMMAND_BYTES);
        memory.read_slice(&mut bytes, GuestAddress(at)).map_err(|_| NotMemory)?;
        Ok(Some(Command::parse(&bytes)))
    }
    pub(crate) fn advance(&mut self) {
        self.head = (self.head + 1) % self.size;
    }
    pub(crate) fn save(&self, id: u16, tail: u32) -> SubmissionQueueStateV1 {
        let SubmissionQueue { base, size, head, completion } = self;
        SubmissionQueueStateV1 { id, base: *base, size: *size, head: *head, tail, completion: *completion }
    }
}

/// A completion queue.
#[derive(Clone, Debug)]
pub(crate) struct CompletionQueue {
    pub(crate) base: u64,
    /// Entries; one is always free.
    pub(crate) size: u32,
    pub(crate) tail: u32,
    /// Phase of the entries written now.
    pub(crate) phase: bool,
    /// Interrupt vector; `None`: interrupts are off.
    pub(crate) vector: Option<u16>,
}

impl CompletionQueue {
    pub(crate) fn has_room(&self, head: u32) -> bool {
        (self.tail + 1) % self.size != head
    }
    /// The driver has not taken everything.
    pub(crate) fn has_unseen(&self, head: u32) -> bool {
        head != self.tail
    }
    /// Writes a completion: the phase last, so that the driver never sees half an entry.
    pub(crate) fn post(
        &mut self,
        memory: &Memory,
        submission: (u16, u32),
        command_id: u16,
        status: Status,
        dword0: u32,
    ) -> Result<(), NotMemory> {
        let at = self.base.saturating_add(u64::from(self.tail) * COMPLETION_BYTES);
        let (queue, head) = submission;
        let mut entry = [0; 12];
        let words = [dword0, 0, head & 0xffff | u32::from(queue) << 16];
        entry.as_chunks_mut::<4>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
        memory.write_slice(&entry, GuestAddress(at)).map_err(|_| NotMemory)?;
        let status = u32::from(status.field()) << 17 | u32::from(self.phase) << 16;
        let last = status | u32::from(command_id);
        memory.store(last.to_le(), GuestAddress(at.saturating_add(12)), Ordering::Release).map_err(|_| NotMemory)?;
        self.tail = (self.tail + 1) % self.size;
        if self.tail == 0 {
            self.phase = !self.phase;
        }
        Ok(())
    }
    pub(crate) fn save(&self, id: u16, head: u32) -> CompletionQueueStateV1 {
        let CompletionQueue { base, size, tail, phase, vector } = self;
        CompletionQueueStateV1 { id, base: *base, size: *size, tail: *tail, head, phase: *phase, vector: *vector }
    }
}
