//! What other threads have to tell the owner of the machine.

use std::collections::VecDeque;
use std::io;

use parking_lot::Mutex;

use crate::event::Event;

/// Something the owner acts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A vCPU has returned from `run`.
    Vcpu,
    /// The board has a power event.
    Power,
    /// A disk request failed.
    Disk(DiskNote),
    /// The person at the terminal typed the key that leaves.
    LeaveKey,
    /// A signal asks the process to end.
    Signal(i32),
}

/// A disk request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskNote {
    /// Target name.
    pub target: String,
    /// `read`, `write`, `flush`, `discard`.
    pub operation: &'static str,
    /// The host's disk is full.
    pub no_space: bool,
    /// The request is held until the machine resumes.
    pub held: bool,
    /// What the block engine said.
    pub text: String,
}

/// Notes in the order they came.
#[derive(Debug)]
pub struct Notes {
    queue: Mutex<VecDeque<Note>>,
    bell: Event,
}

/// A guest whose disk fails on every request must not fill our memory: what is beyond is left out.
const MAX_NOTES: usize = 1024;

impl Notes {
    /// None yet.
    pub fn new() -> io::Result<Notes> {
        Ok(Notes { queue: Mutex::default(), bell: Event::new()? })
    }
    /// Leaves a note; from any thread.
    pub fn leave(&self, note: Note) {
        let mut queue = self.queue.lock();
        if queue.len() < MAX_NOTES || !matches!(note, Note::Disk(_)) {
            queue.push_back(note);
        }
        drop(queue);
        self.bell.set();
    }
    /// Takes all notes.
    pub fn take(&self) -> VecDeque<Note> {
        self.bell.clear();
        std::mem::take(&mut self.queue.lock())
    }
    /// Readable while there are notes.
    pub fn bell(&self) -> &Event {
        &self.bell
    }
}
