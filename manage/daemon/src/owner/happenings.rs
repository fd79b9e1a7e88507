//! What the machine tells, and its end.

use std::sync::Arc;
use std::time::Duration;

use monitor::{Event, RunReason, RunState, ShutdownCause};
use tokio::time::timeout;

use super::{Ending, Owner};
use crate::domain::{Live, State, Status};
use crate::error::said;
use crate::events::{DomainEvent, LifecycleEvent};
use crate::launch;

/// How long the end of an ended process's socket may take.
const LAST_EVENTS_LIMIT: Duration = Duration::from_secs(2);

impl Owner {
    pub(super) fn set_paused(&self, status: Status, event: LifecycleEvent) {
        // The monitor's event for what we have just done ourselves finds it done.
        if self.domain.snapshot().status.state == State::Running {
            self.publish(|snapshot| snapshot.status = status);
            self.emit(event);
        }
    }

    pub(super) fn set_running(&self) {
        if self.domain.snapshot().status.state != State::Running {
            self.publish(|snapshot| {
                snapshot.status = Status::UNPAUSED;
                snapshot.failed_disks.clear();
            });
            self.emit(LifecycleEvent::ResumedUnpaused);
        }
    }

    pub(super) fn on_event(&mut self, event: Event) {
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

    pub(super) fn set_crashed(&self) {
        let state = self.domain.snapshot().status.state;
        if matches!(state, State::Running | State::Paused) {
            self.publish(|snapshot| snapshot.status = Status::CRASHED_PANICKED);
            self.emit(LifecycleEvent::CrashedPanicked);
        }
    }

    pub(super) fn on_shutdown(&mut self, cause: ShutdownCause) {
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

    pub(super) fn on_io_error(&self, target: &str, reason: String, paused: bool) {
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
    pub(super) async fn on_ended(&mut self) -> Option<Arc<Live>> {
        // What it said before it ended may still be in its socket, and says why it ended. The queue closes when the socket
        // has been read to its end.
        let read = async {
            while let Some(running) = &mut self.running
                && let Some(event) = running.events.recv().await
            {
                self.on_event(event);
            }
        };
        if timeout(LAST_EVENTS_LIMIT, read).await.is_err() {
            eprintln!("domain '{}': somebody else holds the monitor of its ended vireo-vmm", self.name());
        }
        let running = self.running.take()?;
        if let Ok(live) = self.live() {
            live.consoles.end();
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
    pub(super) fn publish_off(&self, status: Status, events: &[LifecycleEvent]) {
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
