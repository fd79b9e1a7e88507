//! What an owner does to its machine: start, tell, stop.

use std::sync::Arc;
use std::time::Duration;

use monitor::Command as MonitorCommand;
use tokio::time::timeout;
use xml::{DomainConfig, DomainDefinition};

use super::{Ending, Owner, Running};
use crate::console_hold::ConsoleHold;
use crate::domain::{Definition, Live, State, Status};
use crate::drivers::connect::VCPUS_MAX;
use crate::error::DaemonError;
use crate::events::{DomainEvent, LifecycleEvent};
use crate::host;
use crate::launch;
use crate::monitor_link::MonitorLink;
use crate::process::Process;
use crate::state_file::{RunFile, RunFiles};

/// How long a destroyed machine has to flush its caches before it is killed. A destroy returns within 20 ms.
const DESTROY_GRACE: Duration = Duration::from_millis(8);
/// How long a gracefully destroyed machine has.
const GRACEFUL_LIMIT: Duration = Duration::from_secs(15);

/// How long the event of a carried out command may take.
const EVENT_LIMIT: Duration = Duration::from_secs(2);

/// Refuses what this host cannot give.
fn check_host(domain: &DomainConfig) -> Result<(), DaemonError> {
    let (wanted_kib, host_kib) = (domain.memory_kib, host::memory().total_kib);
    // A host that does not say how much it has is not guessed at.
    if host_kib != 0 && wanted_kib > host_kib {
        return Err(DaemonError::HostMemory { wanted_kib, host_kib });
    }
    let limit = VCPUS_MAX.unsigned_abs();
    if domain.vcpus > limit {
        return Err(DaemonError::HostVcpus { wanted: domain.vcpus, limit });
    }
    Ok(())
}

impl Owner {
    pub(super) async fn start(
        &mut self,
        paused: bool,
        given: Option<Box<DomainDefinition>>,
    ) -> Result<(), DaemonError> {
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
    pub(super) async fn run_machine(
        &mut self,
        definition: &DomainDefinition,
        paused: bool,
        id: Option<i32>,
    ) -> Result<(), DaemonError> {
        definition.check_buildable()?;
        let domain = definition.config();
        self.daemon.check_engine(domain.virt_type).await?;
        check_host(domain)?;
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
    pub(super) async fn connect(
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
        let consoles = ConsoleHold::new(launched.controllers);
        let live = Live { id, definition: live_definition, pid: launched.pid, monitor, consoles };
        Ok((live, Running { process, events, files: files.clone(), run_file, ending: None, reboot: false }))
    }

    pub(super) fn live(&self) -> Result<Arc<Live>, DaemonError> {
        self.domain.snapshot().live.clone().ok_or(DaemonError::NotRunning)
    }

    pub(super) async fn tell_machine(&mut self, command: MonitorCommand) -> Result<(), DaemonError> {
        self.live()?.monitor.ask(&self.name(), command).await.map(drop)
    }

    /// Presses the power button; a reboot starts the machine again when the guest has powered off.
    pub(super) async fn power_button(&mut self, reboot: bool) -> Result<(), DaemonError> {
        self.tell_machine(MonitorCommand::SystemPowerdown).await?;
        if let Some(running) = &mut self.running {
            running.reboot = reboot;
        }
        Ok(())
    }

    /// The second half of a reboot: the same machine once more, under the same id.
    pub(super) async fn start_again(&mut self, live: &Live) {
        let result = match self.daemon.definition_of_run(live) {
            Ok(definition) => self.run_machine(&definition, false, Some(live.id)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            eprintln!("domain '{}': not started again after its reboot: {error}", self.name());
            self.publish_off(Status::OFF_FAILED, &[LifecycleEvent::StoppedFailed]);
        }
    }

    pub(super) async fn suspend(&mut self) -> Result<(), DaemonError> {
        let live = self.live()?;
        if self.domain.snapshot().status.state != State::Running {
            return Ok(());
        }
        live.monitor.ask(&self.name(), MonitorCommand::Stop).await?;
        self.follow_events(|state| state != State::Running).await;
        self.set_paused(Status::PAUSED_BY_USER, LifecycleEvent::SuspendedPaused);
        Ok(())
    }

    pub(super) async fn resume(&mut self) -> Result<(), DaemonError> {
        let live = self.live()?;
        if self.domain.snapshot().status.state == State::Running {
            return Err(DaemonError::AlreadyRunning);
        }
        live.monitor.ask(&self.name(), MonitorCommand::Cont).await?;
        self.follow_events(|state| state == State::Running).await;
        self.set_running();
        Ok(())
    }

    /// Takes the machine's events until one has brought about what a command was for, so that none of them is mistaken for
    /// news after the next command.
    pub(super) async fn follow_events(&mut self, reached: impl Fn(State) -> bool) {
        while !reached(self.domain.snapshot().status.state) {
            let Some(running) = &mut self.running else { return };
            match timeout(EVENT_LIMIT, running.events.recv()).await {
                Ok(Some(event)) => self.on_event(event),
                Ok(None) | Err(_) => return,
            }
        }
    }

    pub(super) async fn destroy(&mut self, graceful: bool) -> Result<(), DaemonError> {
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
        self.on_ended().await;
        Ok(())
    }
}
