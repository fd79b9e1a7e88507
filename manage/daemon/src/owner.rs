//! The task that owns a domain: the only place where its condition changes.
//!
//! It takes letters in order, listens to the monitor and to the end of the process, publishes snapshots and sends events.
//! It is there while there is something to own, and costs nothing afterwards.

use std::sync::Arc;
use std::time::Duration;

use monitor::{Command as MonitorCommand, Event, RunReason, RunState, ShutdownCause};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use xml::DomainDefinition;

use crate::daemon::Daemon;
use crate::domain::{Definition, Domain, Live, Snapshot, State, Status};
use crate::error::{DaemonError, said};
use crate::events::{DomainEvent, LifecycleEvent};
use crate::launch;
use crate::monitor_link::MonitorLink;
use crate::process::Process;
use crate::state_file::{RunFile, RunFiles};

/// How long a destroyed machine has to flush its caches before it is killed. A destroy returns within 20 ms.
const DESTROY_GRACE: Duration = Duration::from_millis(12);
/// How long a gracefully destroyed machine has.
const GRACEFUL_LIMIT: Duration = Duration::from_secs(15);

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
                    if let Some(live) = self.on_ended() {
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

    async fn define(&mut self, definition: &DomainDefinition) -> Result<(), DaemonError> {
        let new = Arc::new(Definition::new(definition));
        self.daemon.save_definition(&new).await?;
        let was_persistent = self.domain.snapshot().config.is_some();
        self.publish(|snapshot| snapshot.config = Some(new));
        self.emit(if was_persistent { LifecycleEvent::DefinedUpdated } else { LifecycleEvent::DefinedAdded });
        Ok(())
    }

    async fn undefine(&mut self) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        if snapshot.config.is_none() {
            return Err(DaemonError::UndefineTransient);
        }
        self.daemon.delete_definition(&snapshot.name).await?;
        if snapshot.live.is_none() {
            self.daemon.registry.remove(&self.domain);
        }
        self.publish(|snapshot| {
            snapshot.config = None;
            snapshot.autostart = false;
        });
        self.emit(LifecycleEvent::UndefinedRemoved);
        Ok(())
    }

    async fn set_autostart(&mut self, autostart: bool) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        if snapshot.config.is_none() {
            return Err(DaemonError::AutostartTransient);
        }
        self.daemon.set_autostart(&snapshot.name, autostart).await?;
        self.publish(|snapshot| snapshot.autostart = autostart);
        Ok(())
    }

    async fn rename(&mut self, name: String) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        let Some(config) = &snapshot.config else { return Err(DaemonError::RenameTransient) };
        if snapshot.live.is_some() {
            return Err(DaemonError::RenameActive);
        }
        if name == *snapshot.name {
            return Ok(());
        }
        let claim = self.daemon.registry.claim_name(&name)?;
        let mut definition = DomainDefinition::load(config.xml.as_bytes())?;
        definition.rename(&name)?;
        let new = Arc::new(Definition::new(&definition));
        self.daemon.rename_definition(&snapshot.name, &new, snapshot.autostart).await?;
        let old = self.domain.reference();
        let shared: Arc<str> = name.into();
        self.daemon.registry.rename(&self.domain, shared.clone(), || {
            self.publish(|snapshot| {
                snapshot.name = shared.clone();
                snapshot.config = Some(new);
            });
        });
        drop(claim);
        self.daemon.events.emit(&old, &DomainEvent::Lifecycle(LifecycleEvent::UndefinedRenamed));
        self.emit(LifecycleEvent::DefinedRenamed);
        Ok(())
    }

    async fn edit(&mut self, edit: Edit) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        let live = edit.affect & AFFECT_LIVE != 0 || (edit.affect & AFFECT_CONFIG == 0 && snapshot.live.is_some());
        let config = edit.affect & AFFECT_CONFIG != 0 || (edit.affect & AFFECT_LIVE == 0 && snapshot.live.is_none());
        let changed = |xml: &str| {
            let mut definition = DomainDefinition::load(xml.as_bytes())?;
            (edit.change)(&mut definition)?;
            Ok::<_, DaemonError>(Definition::new(&definition))
        };
        let new_live = match (&snapshot.live, live) {
            (None, true) => return Err(DaemonError::NotRunning),
            (Some(_), true) if edit.not_live.is_some() => {
                return Err(DaemonError::LiveChange { what: edit.not_live.unwrap_or_default() });
            }
            (Some(old), true) => {
                let definition = changed(&old.definition.xml)?;
                Some(Live { id: old.id, definition, pid: old.pid, monitor: old.monitor.clone() })
            }
            (_, false) => None,
        };
        let new_config = match (&snapshot.config, config) {
            (None, true) => return Err(DaemonError::NoPersistentConfig),
            (Some(old), true) => Some(Arc::new(changed(&old.xml)?)),
            (_, false) => None,
        };
        if let Some(new) = &new_config {
            self.daemon.save_definition(new).await?;
        }
        if let (Some(new), Some(running)) = (&new_live, &mut self.running) {
            running.run_file.live_xml = new.definition.xml.to_string();
            let path = self.daemon.paths.state.clone();
            let wrong = |source| DaemonError::File { action: "write the state of the domain in", path, source };
            running.files.write(&running.run_file).map_err(wrong)?;
        }
        self.publish(|snapshot| {
            snapshot.config = new_config.or(snapshot.config.take());
            snapshot.live = new_live.map(Arc::new).or(snapshot.live.take());
        });
        if let Some(event) = &edit.event {
            self.daemon.events.emit(&self.domain.reference(), event);
        }
        Ok(())
    }

    async fn start(&mut self, paused: bool, given: Option<Box<DomainDefinition>>) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        if snapshot.live.is_some() {
            return Err(match given {
                Some(_) => DaemonError::AlreadyActive { name: snapshot.name.to_string() },
                None => DaemonError::AlreadyRunning,
            });
        }
        let result = match (given, &snapshot.config) {
            (Some(definition), _) => self.run_machine(&definition, paused, None).await,
            (None, Some(config)) => match DomainDefinition::load(config.xml.as_bytes()) {
                Ok(definition) => self.run_machine(&definition, paused, None).await,
                Err(error) => Err(error.into()),
            },
            (None, None) => Err(DaemonError::NotRunning),
        };
        if result.is_err() {
            self.publish(|snapshot| snapshot.status = Status::OFF_FAILED);
            if snapshot.config.is_none() {
                self.daemon.registry.remove(&self.domain);
            }
            self.emit(LifecycleEvent::StoppedFailed);
        }
        result
    }

    /// Builds the machine. A run that goes on after a reboot keeps its id.
    async fn run_machine(
        &mut self,
        definition: &DomainDefinition,
        paused: bool,
        id: Option<i32>,
    ) -> Result<(), DaemonError> {
        definition.check_buildable()?;
        let domain = definition.config();
        self.daemon.check_engine(domain.virt_type).await?;
        let files = RunFiles::new(&self.daemon.paths.state, &domain.name, domain.uuid);
        let log_path = self.daemon.log_path(&domain.name);
        let log_start = std::fs::metadata(&log_path).map_or(0, |found| found.len());
        let plan = launch::LaunchPlan {
            domain: domain.clone(),
            paused,
            program: self.daemon.vmm.clone(),
            monitor_path: files.monitor(),
            log_path,
        };
        let launched = self.daemon.blocking(move || launch::launch(&plan)).await?;
        let next_id = id.unwrap_or_else(|| self.daemon.registry.next_id());
        let connected = self.connect(definition, &files, launched, log_start, next_id).await;
        let (live, running) = connected.inspect_err(|_| files.remove())?;
        self.running = Some(running);
        let status = if paused { Status::PAUSED_BY_USER } else { Status::BOOTED };
        self.publish(|snapshot| {
            snapshot.live = Some(Arc::new(live));
            snapshot.status = status;
            snapshot.failed_disks.clear();
        });
        if id.is_some() {
            self.daemon.events.emit(&self.domain.reference(), &DomainEvent::Reboot);
        } else if paused {
            self.emit(LifecycleEvent::StartedBooted);
            self.emit(LifecycleEvent::SuspendedPaused);
        } else {
            // In this order, because that is how a stock libvirtd sends them.
            self.emit(LifecycleEvent::ResumedUnpaused);
            self.emit(LifecycleEvent::StartedBooted);
        }
        Ok(())
    }

    /// Takes hold of a process that has just built its machine; kills it where that fails.
    async fn connect(
        &self,
        definition: &DomainDefinition,
        files: &RunFiles,
        launched: launch::Launched,
        log_start: u64,
        id: i32,
    ) -> Result<(Live, Running), DaemonError> {
        let domain = definition.config();
        let watch_error = |source| DaemonError::File { action: "watch vireo-vmm in", path: "/proc".into(), source };
        let process = Process::of_child(launched.pid).map_err(watch_error)?;
        let connect = MonitorLink::connect(&files.monitor(), &domain.name, &domain.uuid.to_string()).await;
        let (monitor, events) = connect.inspect_err(|_| process.kill())?;
        let details = xml::LiveDetails { id, ptys: launched.ptys, backing: launched.backing };
        let live_definition = Definition::new(&definition.live(&details));
        let run_file = RunFile {
            name: domain.name.clone(),
            uuid: domain.uuid,
            id,
            process: process.id(),
            live_xml: live_definition.xml.to_string(),
            log_start,
        };
        files.write(&run_file).map_err(|source| {
            process.kill();
            DaemonError::File {
                action: "write the state of the domain in",
                path: self.daemon.paths.state.clone(),
                source,
            }
        })?;
        let live = Live { id, definition: live_definition, pid: launched.pid, monitor };
        Ok((live, Running { process, events, files: files.clone(), run_file, ending: None, reboot: false }))
    }

    fn live(&self) -> Result<Arc<Live>, DaemonError> {
        self.domain.snapshot().live.clone().ok_or(DaemonError::NotRunning)
    }

    async fn tell_machine(&mut self, command: MonitorCommand) -> Result<(), DaemonError> {
        self.live()?.monitor.ask(&self.name(), command).await.map(drop)
    }

    /// Presses the power button; a reboot starts the machine again when the guest has powered off.
    async fn power_button(&mut self, reboot: bool) -> Result<(), DaemonError> {
        self.tell_machine(MonitorCommand::SystemPowerdown).await?;
        if let Some(running) = &mut self.running {
            running.reboot = reboot;
        }
        Ok(())
    }

    /// The second half of a reboot: the same machine once more, under the same id.
    async fn start_again(&mut self, live: &Live) {
        let result = match self.daemon.definition_of_run(live) {
            Ok(definition) => self.run_machine(&definition, false, Some(live.id)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            eprintln!("domain '{}': not started again after its reboot: {error}", self.name());
            self.publish_off(Status::OFF_FAILED, &[LifecycleEvent::StoppedFailed]);
        }
    }

    async fn suspend(&mut self) -> Result<(), DaemonError> {
        let live = self.live()?;
        if self.domain.snapshot().status.state != State::Running {
            return Ok(());
        }
        live.monitor.ask(&self.name(), MonitorCommand::Stop).await?;
        self.set_paused(Status::PAUSED_BY_USER, LifecycleEvent::SuspendedPaused);
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), DaemonError> {
        let live = self.live()?;
        if self.domain.snapshot().status.state == State::Running {
            return Err(DaemonError::AlreadyRunning);
        }
        live.monitor.ask(&self.name(), MonitorCommand::Cont).await?;
        self.set_running();
        Ok(())
    }

    fn set_paused(&self, status: Status, event: LifecycleEvent) {
        // The monitor's event for what we have just done ourselves finds it done.
        if self.domain.snapshot().status.state == State::Running {
            self.publish(|snapshot| snapshot.status = status);
            self.emit(event);
        }
    }

    fn set_running(&self) {
        if self.domain.snapshot().status.state != State::Running {
            self.publish(|snapshot| {
                snapshot.status = Status::UNPAUSED;
                snapshot.failed_disks.clear();
            });
            self.emit(LifecycleEvent::ResumedUnpaused);
        }
    }

    async fn destroy(&mut self, graceful: bool) -> Result<(), DaemonError> {
        let live = self.live()?;
        let Some(running) = &mut self.running else { return Err(DaemonError::NotRunning) };
        running.ending = Some(Ending::Destroyed);
        running.reboot = false;
        live.monitor.tell(MonitorCommand::Quit);
        let limit = if graceful { GRACEFUL_LIMIT } else { DESTROY_GRACE };
        if timeout(limit, running.process.ended()).await.is_err() {
            if graceful {
                running.ending = None;
                let name = self.name();
                return Err(DaemonError::VmmSilent { name, seconds: limit.as_secs() });
            }
            running.process.kill();
            running.process.ended().await;
        }
        self.on_ended();
        Ok(())
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Stopped { reason: RunReason::IoError } => {
                self.set_paused(Status::PAUSED_IO_ERROR, LifecycleEvent::SuspendedIoError);
            }
            Event::Stopped { reason: RunReason::Crashed } => self.set_crashed(),
            Event::Stopped { reason: RunReason::GuestShutdown } => {
                self.publish(|snapshot| snapshot.status = Status::SHUTDOWN);
                self.emit(LifecycleEvent::ShutdownGuest);
            }
            Event::Stopped { .. } => self.set_paused(Status::PAUSED_BY_USER, LifecycleEvent::SuspendedPaused),
            Event::Resumed => self.set_running(),
            Event::Reset { .. } => self.daemon.events.emit(&self.domain.reference(), &DomainEvent::Reboot),
            Event::Shutdown { cause } => self.on_shutdown(cause),
            Event::IoError { target, operation: _, reason, paused } => self.on_io_error(&target, reason, paused),
            Event::Crashed { text } => {
                eprintln!("domain '{}': the guest crashed: {text}", self.name());
                self.set_crashed();
            }
        }
    }

    fn set_crashed(&self) {
        let state = self.domain.snapshot().status.state;
        if matches!(state, State::Running | State::Paused) {
            self.publish(|snapshot| snapshot.status = Status::CRASHED_PANICKED);
            self.emit(LifecycleEvent::CrashedPanicked);
        }
    }

    fn on_shutdown(&mut self, cause: ShutdownCause) {
        let Some(running) = &mut self.running else { return };
        let ending = match cause {
            ShutdownCause::PowerOff | ShutdownCause::Reset => Ending::Shutdown,
            ShutdownCause::Crash => Ending::Crashed,
            ShutdownCause::Quit => Ending::Destroyed,
        };
        if running.ending.is_none() {
            running.ending = Some(ending);
            if ending == Ending::Shutdown && !running.reboot {
                self.publish(|snapshot| snapshot.status = Status::SHUTDOWN);
                self.emit(LifecycleEvent::ShutdownGuest);
            }
        }
    }

    fn on_io_error(&self, target: &str, reason: String, paused: bool) {
        let Ok(live) = self.live() else { return };
        let disks = &live.definition.config.disks;
        let found = disks.iter().enumerate().find(|(_, disk)| disk.target == target);
        let (path, alias) = found.map_or((String::new(), target.to_owned()), |(index, disk)| {
            (disk.source.display().to_owned(), format!("{}-disk{index}", disk.bus))
        });
        let action = if paused { 1 } else { 2 };
        let full = reason == "enospc";
        let event = DomainEvent::IoError { path, alias, action, reason };
        self.daemon.events.emit(&self.domain.reference(), &event);
        if paused {
            let number = if full { 2 } else { 1 };
            self.publish(|snapshot| {
                snapshot.failed_disks.retain(|(failed, _)| failed != target);
                snapshot.failed_disks.push((target.to_owned(), number));
            });
            self.set_paused(Status::PAUSED_IO_ERROR, LifecycleEvent::SuspendedIoError);
        }
    }

    /// The process is gone: the domain is off, for the reason that is known. Returns the run that is to be started again.
    fn on_ended(&mut self) -> Option<Arc<Live>> {
        let mut running = self.running.take()?;
        // What it said before it ended is still in the queue.
        while let Ok(event) = running.events.try_recv() {
            if let Event::Shutdown { cause: ShutdownCause::PowerOff | ShutdownCause::Reset } = event {
                running.ending = running.ending.or(Some(Ending::Shutdown));
            }
        }
        running.files.remove();
        if running.reboot && running.ending == Some(Ending::Shutdown) {
            return self.domain.snapshot().live.clone();
        }
        let (status, events) = match running.ending {
            Some(Ending::Shutdown) => (Status::OFF_SHUTDOWN, &[LifecycleEvent::StoppedShutdown][..]),
            Some(Ending::Destroyed) => {
                (Status::OFF_DESTROYED, &[LifecycleEvent::ShutdownHost, LifecycleEvent::StoppedDestroyed][..])
            }
            Some(Ending::Crashed) => (Status::OFF_CRASHED, &[LifecycleEvent::StoppedCrashed][..]),
            None => {
                let words = launch::last_words(&self.daemon.log_path(&self.name()), running.run_file.log_start);
                eprintln!("domain '{}': vireo-vmm ended unexpectedly{}", self.name(), said(&words));
                self.daemon.events.emit_monitor_death(&self.domain.reference(), &words);
                (Status::OFF_CRASHED, &[LifecycleEvent::StoppedFailed][..])
            }
        };
        self.publish_off(status, events);
        None
    }

    /// Makes it known that the domain is off.
    fn publish_off(&self, status: Status, events: &[LifecycleEvent]) {
        let transient = self.domain.snapshot().config.is_none();
        if transient {
            self.daemon.registry.remove(&self.domain);
        }
        let reference = self.domain.reference();
        self.publish(|snapshot| {
            snapshot.live = None;
            snapshot.status = status;
            snapshot.failed_disks.clear();
        });
        for event in events {
            self.daemon.events.emit(&reference, &DomainEvent::Lifecycle(*event));
        }
    }
}

/// Status of a machine that ran before this daemon did.
pub fn adopted_status(status: monitor::Status) -> Status {
    match (status.state, status.reason) {
        (RunState::Running, RunReason::Booted) => Status::BOOTED,
        (RunState::Running, _) => Status::UNPAUSED,
        (RunState::Shutdown, RunReason::Crashed) => Status::CRASHED_PANICKED,
        (RunState::Shutdown, _) => Status::SHUTDOWN,
        (_, RunReason::IoError) => Status::PAUSED_IO_ERROR,
        (_, RunReason::Crashed) => Status::PAUSED_CRASHED,
        (RunState::Prelaunch | RunState::Paused, _) => Status::PAUSED_BY_USER,
    }
}
