//! A domain as everyone but its owner sees it: an immutable snapshot that is swapped whole, and a mailbox.
//!
//! Reads load the snapshot and never wait. Changes are messages to the domain's owner ([`crate::owner`]), a task that
//! exists while there is something to own: a running machine or an unanswered message.

use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rpc_wire::DomainRef;
use tokio::sync::mpsc;
use uuid::Uuid;
use xml::{DomainConfig, DomainDefinition};

use crate::console_hold::ConsoleHold;
use crate::monitor_link::MonitorLink;
use crate::owner::Letter;

/// Run states with libvirt's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum State {
    /// vCPUs execute.
    Running = 1,
    /// They stand.
    Paused = 3,
    /// The guest has powered off, its process has not ended.
    Shutdown = 4,
    /// Not running.
    Shutoff = 5,
    /// The guest crashed and is kept.
    Crashed = 6,
}

/// A state and libvirt's number of the reason for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// State.
    pub state: State,
    /// Reason, in the enumeration that belongs to the state.
    pub reason: i32,
}

#[allow(missing_docs)] // the reasons' own names
impl Status {
    pub const BOOTED: Status = Status { state: State::Running, reason: 1 };
    pub const UNPAUSED: Status = Status { state: State::Running, reason: 5 };
    pub const PAUSED_BY_USER: Status = Status { state: State::Paused, reason: 1 };
    pub const PAUSED_IO_ERROR: Status = Status { state: State::Paused, reason: 5 };
    pub const PAUSED_CRASHED: Status = Status { state: State::Paused, reason: 10 };
    pub const CRASHED_PANICKED: Status = Status { state: State::Crashed, reason: 1 };
    pub const SHUTDOWN: Status = Status { state: State::Shutdown, reason: 1 };
    pub const OFF: Status = Status { state: State::Shutoff, reason: 0 };
    pub const OFF_SHUTDOWN: Status = Status { state: State::Shutoff, reason: 1 };
    pub const OFF_DESTROYED: Status = Status { state: State::Shutoff, reason: 2 };
    pub const OFF_CRASHED: Status = Status { state: State::Shutoff, reason: 3 };
    pub const OFF_FAILED: Status = Status { state: State::Shutoff, reason: 6 };
}

/// A definition as it is served: the text clients get and what was read from it.
#[derive(Debug)]
pub struct Definition {
    /// The document.
    pub xml: Box<str>,
    /// What was read from it.
    pub config: DomainConfig,
}

impl Definition {
    /// From the tree, which is not kept: it is ten times the size of the text, and few calls need it.
    pub fn new(definition: &DomainDefinition) -> Definition {
        Definition { xml: definition.to_xml().into(), config: definition.config().clone() }
    }
}

/// A running machine, as readers need it.
#[derive(Debug)]
pub struct Live {
    /// Domain id.
    pub id: i32,
    /// The document with what the run added.
    pub definition: Definition,
    /// vireo-vmm's process id.
    pub pid: i32,
    /// The way to ask it.
    pub monitor: MonitorLink,
    /// Its consoles.
    pub consoles: ConsoleHold,
}

/// Everything about a domain at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Name.
    pub name: Arc<str>,
    /// State.
    pub status: Status,
    /// The definition for the next start; `None` for a transient domain.
    pub config: Option<Arc<Definition>>,
    /// The running machine.
    pub live: Option<Arc<Live>>,
    /// Starts by itself.
    pub autostart: bool,
    /// Disks that stopped the machine, with libvirt's number of the error (1 any, 2 no space), until it goes on.
    pub failed_disks: Vec<(String, i32)>,
}

impl Snapshot {
    /// A domain that has neither a definition nor a machine yet.
    pub fn unborn(name: &str) -> Snapshot {
        Snapshot {
            name: name.into(),
            status: Status::OFF,
            config: None,
            live: None,
            autostart: false,
            failed_disks: Vec::new(),
        }
    }

    /// Domain id, -1 when inactive.
    pub fn id(&self) -> i32 {
        self.live.as_ref().map_or(-1, |live| live.id)
    }

    /// The definition that describes the present: the live one, else the persistent one. A domain has one of them at
    /// least until it is gone.
    pub fn current(&self) -> Option<&Definition> {
        match (&self.live, &self.config) {
            (Some(live), _) => Some(&live.definition),
            (None, Some(config)) => Some(config),
            (None, None) => None,
        }
    }
}

/// A domain.
#[derive(Debug)]
pub struct Domain {
    /// UUID.
    pub uuid: Uuid,
    snapshot: ArcSwap<Snapshot>,
    /// Where its owner is reached, while there is one.
    pub(crate) mailbox: Mutex<Option<mpsc::UnboundedSender<Letter>>>,
}

impl Domain {
    /// A domain in the given condition.
    pub fn new(uuid: Uuid, snapshot: Snapshot) -> Domain {
        Domain { uuid, snapshot: ArcSwap::from_pointee(snapshot), mailbox: Mutex::new(None) }
    }

    /// Its condition now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Replaces its condition. Only its owner does, and whoever makes it.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
    }

    /// The domain by value, as calls pass it.
    pub fn reference(&self) -> DomainRef {
        let snapshot = self.snapshot.load();
        DomainRef { name: (&*snapshot.name).into(), uuid: *self.uuid.as_bytes(), id: snapshot.id() }
    }
}
