//! What an owner does to definitions.

use std::sync::Arc;

use xml::DomainDefinition;

use super::{AFFECT_CONFIG, AFFECT_LIVE, Edit, Owner};
use crate::domain::{Definition, Live};
use crate::error::DaemonError;
use crate::events::{DomainEvent, LifecycleEvent};

impl Owner {
    pub(super) async fn define(&mut self, definition: &DomainDefinition) -> Result<(), DaemonError> {
        let new = Arc::new(Definition::new(definition));
        self.daemon.save_definition(&new).await?;
        let was_persistent = self.domain.snapshot().config.is_some();
        self.publish(|snapshot| snapshot.config = Some(new));
        self.emit(if was_persistent { LifecycleEvent::DefinedUpdated } else { LifecycleEvent::DefinedAdded });
        Ok(())
    }

    pub(super) async fn undefine(&mut self) -> Result<(), DaemonError> {
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

    pub(super) async fn set_autostart(&mut self, autostart: bool) -> Result<(), DaemonError> {
        let snapshot = self.domain.snapshot();
        if snapshot.config.is_none() {
            return Err(DaemonError::AutostartTransient);
        }
        self.daemon.set_autostart(&snapshot.name, autostart).await?;
        self.publish(|snapshot| snapshot.autostart = autostart);
        Ok(())
    }

    pub(super) async fn rename(&mut self, name: String) -> Result<(), DaemonError> {
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

    pub(super) async fn edit(&mut self, edit: Edit) -> Result<(), DaemonError> {
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
                let (monitor, consoles) = (old.monitor.clone(), old.consoles.clone());
                Some(Live { id: old.id, definition, pid: old.pid, monitor, consoles })
            }
            (_, false) => None,
        };
        let new_config = match (&snapshot.config, config) {
            (None, true) => return Err(DaemonError::NoPersistentConfig),
            (Some(old), true) => Some(Arc::new(changed(&old.xml)?)),
            (_, false) => None,
        };
        if let (Some(new), Some(change)) = (&new_live, &edit.machine) {
            let command = (change.command)(&new.definition.config)?;
            new.monitor.ask(&snapshot.name, command).await?;
        }
        if let Some(new) = &new_config {
            self.daemon.save_definition(new).await?;
        }
        if let (Some(new), Some(running)) = (&new_live, &mut self.running) {
            running.run_file.live_xml = new.definition.xml.to_string();
            let path = self.daemon.paths.state.clone();
            let wrong = |source| DaemonError::File { action: "write the state of the domain in", path, source };
            running.files.write(&running.run_file).map_err(wrong)?;
        }
        let machine_event = edit.machine.and_then(|change| change.event).filter(|_| new_live.is_some());
        self.publish(|snapshot| {
            snapshot.config = new_config.or(snapshot.config.take());
            snapshot.live = new_live.map(Arc::new).or(snapshot.live.take());
        });
        for event in edit.event.iter().chain(&machine_event) {
            self.daemon.events.emit(&self.domain.reference(), event);
        }
        Ok(())
    }
}
