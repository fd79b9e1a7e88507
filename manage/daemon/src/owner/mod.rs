//! The task that owns a domain: the only place where its condition changes.
//!
//! It takes letters in order, listens to the monitor and to the end of the process, publishes snapshots and sends events.
//! It is there while there is something to own, and costs nothing afterwards.

use std::sync::Arc;

use monitor::{Command as MonitorCommand, Event};
use tokio::sync::{mpsc, oneshot};
use xml::{DomainConfig, DomainDefinition};

use crate::daemon::Daemon;
use crate::domain::{Domain, Snapshot};
use crate::error::DaemonError;
use crate::events::{DomainEvent, LifecycleEvent};
use crate::process::Process;
use crate::state_file::{RunFile, RunFiles};

mod definitions;
mod happenings;
mod machine;

pub use happenings::adopted_status;

/// A letter and where its answer goes.
#[derive(Debug)]
pub struct Letter {
    command: Command,
    reply: oneshot::Sender<Result<(), DaemonError>>,
}

/// What an owner can be asked to do.
pub enum Command {
    /// Store a definition for the next start.
    Define(Box<DomainDefinition>),
    /// Forget the definition.
    Undefine,
    /// Start by itself, or not.
    SetAutostart(bool),
    /// Take another name.
    Rename(String),
    /// Change the definition, the running document, or both.
    Edit(Edit),
    /// Run. A given definition is for this run only.
    Start {
        /// Leave it standing.
        paused: bool,
        /// In place of the stored definition.
        definition: Option<Box<DomainDefinition>>,
    },
    /// Stop at once; gracefully means never killing it.
    Destroy {
        /// Wait for it.
        graceful: bool,
    },
    /// Press the power button.
    PowerButton {
        /// Start again when the guest has powered off.
        reboot: bool,
    },
    /// Reset the machine.
    Reset,
    /// Stop the vCPUs.
    Suspend,
    /// Let them run.
    Resume,
    /// Interrupt every vCPU.
    InjectNmi,
    /// Change the size of a disk, named by target.
    ResizeDisk {
        /// Target name.
        target: String,
        /// New size.
        bytes: u64,
    },
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Command::Define(_) => "Define",
            Command::Undefine => "Undefine",
            Command::SetAutostart(_) => "SetAutostart",
            Command::Rename(_) => "Rename",
            Command::Edit(_) => "Edit",
            Command::Start { .. } => "Start",
            Command::Destroy { .. } => "Destroy",
            Command::PowerButton { .. } => "PowerButton",
            Command::Reset => "Reset",
            Command::Suspend => "Suspend",
            Command::Resume => "Resume",
            Command::InjectNmi => "InjectNmi",
            Command::ResizeDisk { .. } => "ResizeDisk",
        })
    }
}

/// What is done to a document.
pub type Change = Box<dyn Fn(&mut DomainDefinition) -> Result<(), DaemonError> + Send + Sync>;

/// A change of a document.
pub struct Edit {
    /// libvirt's AFFECT flags: 0 current, 1 live, 2 config.
    pub affect: u32,
    /// The change; it may be made twice.
    pub change: Change,
    /// What cannot be changed while the domain runs, where that is so.
    pub not_live: Option<&'static str>,
    /// Sent when it is done.
    pub event: Option<DomainEvent>,
    /// What a running machine has to do with it.
    pub machine: Option<MachineChange>,
}

/// The command that follows from a document.
pub type CommandOf = Box<dyn Fn(&DomainConfig) -> Result<MonitorCommand, DaemonError> + Send + Sync>;

/// What follows for a running machine from a change of its document.
pub struct MachineChange {
    /// The command that makes the change, from the new document; a refusal undoes the change.
    pub command: CommandOf,
    /// Sent when the machine has carried it out.
    pub event: Option<DomainEvent>,
}

/// AFFECT_LIVE.
pub const AFFECT_LIVE: u32 = 1;
/// AFFECT_CONFIG.
pub const AFFECT_CONFIG: u32 = 2;

/// Asks the owner of a domain, which is made where there is none.
pub async fn ask(daemon: &Arc<Daemon>, domain: &Arc<Domain>, command: Command) -> Result<(), DaemonError> {
    let (reply, answer) = oneshot::channel();
    post(daemon, domain, Letter { command, reply });
    answer.await.unwrap_or_else(|_| Err(DaemonError::OwnerGone { name: domain.snapshot().name.to_string() }))
}

fn post(daemon: &Arc<Daemon>, domain: &Arc<Domain>, letter: Letter) {
    let mut mailbox = domain.mailbox.lock();
    let unsent = match mailbox.as_ref() {
        Some(sender) => match sender.send(letter) {
            Ok(()) => return,
            // The owner ended without retiring: it panicked. Another one takes over.
            Err(mpsc::error::SendError(letter)) => letter,
        },
        None => letter,
    };
    let (sender, inbox) = mpsc::unbounded_channel();
    // The receiver is alive: it is right here.
    let _ = sender.send(unsent);
    *mailbox = Some(sender);
    tokio::spawn(Owner { daemon: daemon.clone(), domain: domain.clone(), inbox, running: None }.run());
}

/// Gives a domain that already runs its owner: after a restart of the daemon.
pub fn adopt(daemon: &Arc<Daemon>, domain: &Arc<Domain>, running: Running) {
    let (sender, inbox) = mpsc::unbounded_channel();
    *domain.mailbox.lock() = Some(sender);
    let owner = Owner { daemon: daemon.clone(), domain: domain.clone(), inbox, running: Some(running) };
    tokio::spawn(owner.run());
}

/// A machine that runs, as its owner holds it.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub process: Process,
    /// What it tells.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// Its files.
    pub files: RunFiles,
    /// What was written to its state file.
    pub run_file: RunFile,
    /// The guest or a command has brought about its end.
    pub ending: Option<Ending>,
    /// When the guest powers off it is started again.
    pub reboot: bool,
}

/// Why a machine is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off or was reset for good.
    Shutdown,
    /// A destroy.
    Destroyed,
    /// A crash that ends it.
    Crashed,
}

struct Owner {
    daemon: Arc<Daemon>,
    domain: Arc<Domain>,
    inbox: mpsc::UnboundedReceiver<Letter>,
    running: Option<Running>,
}

enum Happening {
    Letter(Option<Letter>),
    Event(Event),
    Ended,
}

impl Owner {
    async fn run(mut self) {
        loop {
            match self.next().await {
                Happening::Letter(Some(letter)) => {
                    let result = self.carry_out(letter.command).await;
                    // Nobody may be waiting any more: the client is gone.
                    let _ = letter.reply.send(result);
                }
                Happening::Letter(None) => return,
                Happening::Event(event) => self.on_event(event),
                Happening::Ended => {
                    if let Some(live) = self.on_ended().await {
                        self.start_again(&live).await;
                    }
                }
            }
            if self.running.is_none() {
                let mut mailbox = self.domain.mailbox.lock();
                if self.inbox.is_empty() {
                    *mailbox = None;
                    return;
                }
            }
        }
    }

    async fn next(&mut self) -> Happening {
        let Some(running) = &mut self.running else {
            return Happening::Letter(self.inbox.recv().await);
        };
        tokio::select! {
            biased;
            Some(event) = running.events.recv() => Happening::Event(event),
            () = running.process.ended() => Happening::Ended,
            letter = self.inbox.recv() => Happening::Letter(letter),
        }
    }

    async fn carry_out(&mut self, command: Command) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        let begins = matches!(command, Command::Define(_) | Command::Start { definition: Some(_), .. });
        if snapshot.current().is_none() && !begins {
            let (uuid, name) = (self.domain.uuid, snapshot.name.to_string());
            return Err(DaemonError::NoDomain { uuid, name });
        }
        match command {
            Command::Define(definition) => self.define(&definition).await,
            Command::Undefine => self.undefine().await,
            Command::SetAutostart(autostart) => self.set_autostart(autostart).await,
            Command::Rename(name) => self.rename(name).await,
            Command::Edit(edit) => self.edit(edit).await,
            Command::Start { paused, definition } => self.start(paused, definition).await,
            Command::Destroy { graceful } => self.destroy(graceful).await,
            Command::PowerButton { reboot } => self.power_button(reboot).await,
            Command::Reset => self.tell_machine(MonitorCommand::SystemReset).await,
            Command::InjectNmi => self.tell_machine(MonitorCommand::InjectNmi).await,
            Command::ResizeDisk { target, bytes } => {
                self.tell_machine(MonitorCommand::ResizeDisk { target, bytes }).await
            }
            Command::Suspend => self.suspend().await,
            Command::Resume => self.resume().await,
        }
    }

    fn publish(&self, change: impl FnOnce(&mut Snapshot)) {
        let mut snapshot = (*self.domain.snapshot()).clone();
        change(&mut snapshot);
        self.domain.publish(snapshot);
    }

    fn emit(&self, event: LifecycleEvent) {
        self.daemon.events.emit(&self.domain.reference(), &DomainEvent::Lifecycle(event));
    }

    fn name(&self) -> String {
        self.domain.snapshot().name.to_string()
    }
}
