//! Who wants to hear of what, and the way an event takes to them.
//!
//! A registration's reply is queued before any event with its id, because both happen on the client's queue in the order
//! in which they are pushed and the registration pushes its reply first.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rpc_wire::events::{
    DomainEventKind, DomainOnly, IoError, IoErrorReason, Lifecycle, MetadataChange, Tunable, domain_event,
};
use rpc_wire::frame::{Header, QEMU_PROGRAM, REMOTE_PROGRAM, frame_of, write_frame};
use rpc_wire::qemu::{EVENT_MESSAGE, EventMessage, EventRegisterArgs};
use rpc_wire::xdr::List;
use rpc_wire::{DomainRef, TypedParam, Xdr};

use crate::client::Client;
use crate::error::DaemonError;

/// Registrations one client may hold.
const REGISTRATIONS_MAX: usize = 1024;

/// Types and details of lifecycle events that are sent, with libvirt's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the events' own names
pub enum LifecycleEvent {
    DefinedAdded,
    DefinedUpdated,
    DefinedRenamed,
    UndefinedRemoved,
    UndefinedRenamed,
    StartedBooted,
    SuspendedPaused,
    SuspendedIoError,
    ResumedUnpaused,
    StoppedShutdown,
    StoppedDestroyed,
    StoppedCrashed,
    StoppedFailed,
    ShutdownGuest,
    ShutdownHost,
    CrashedPanicked,
}

impl LifecycleEvent {
    fn numbers(self) -> (i32, i32) {
        match self {
            LifecycleEvent::DefinedAdded => (0, 0),
            LifecycleEvent::DefinedUpdated => (0, 1),
            LifecycleEvent::DefinedRenamed => (0, 2),
            LifecycleEvent::UndefinedRemoved => (1, 0),
            LifecycleEvent::UndefinedRenamed => (1, 1),
            LifecycleEvent::StartedBooted => (2, 0),
            LifecycleEvent::SuspendedPaused => (3, 0),
            LifecycleEvent::SuspendedIoError => (3, 2),
            LifecycleEvent::ResumedUnpaused => (4, 0),
            LifecycleEvent::StoppedShutdown => (5, 0),
            LifecycleEvent::StoppedDestroyed => (5, 1),
            LifecycleEvent::StoppedCrashed => (5, 2),
            LifecycleEvent::StoppedFailed => (5, 5),
            LifecycleEvent::ShutdownGuest => (6, 1),
            LifecycleEvent::ShutdownHost => (6, 2),
            LifecycleEvent::CrashedPanicked => (8, 0),
        }
    }
}

/// An event of a domain.
#[derive(Clone, Debug)]
pub enum DomainEvent {
    /// Its life.
    Lifecycle(LifecycleEvent),
    /// It was reset and goes on.
    Reboot,
    /// A disk failed.
    IoError {
        /// Path of the image.
        path: String,
        /// Alias of the disk.
        alias: String,
        /// 1 paused, 2 reported to the guest.
        action: i32,
        /// `enospc` or empty.
        reason: String,
    },
    /// Limits of a disk changed: the disk and what was set.
    Tunable {
        /// Names and values.
        params: Vec<TypedParam>,
    },
    /// Title (1), description (0) or an element (2) changed.
    Metadata {
        /// Which.
        kind: i32,
        /// Namespace of the element.
        uri: Option<String>,
    },
}

#[derive(Debug)]
struct Registration {
    client: Arc<Client>,
    /// `None` for clients from before callback ids.
    callback_id: Option<i32>,
    event_id: i32,
    domain: Option<[u8; 16]>,
}

#[derive(Debug)]
struct MonitorRegistration {
    client: Arc<Client>,
    callback_id: i32,
    domain: Option<[u8; 16]>,
    event: Option<String>,
}

/// Name of the monitor event that carries the last words of a vireo-vmm that ended by itself.
pub const VMM_ENDED: &str = "VIREO_VMM_ENDED";

/// All registrations.
#[derive(Debug, Default)]
pub struct Events {
    registrations: Mutex<Vec<Registration>>,
    monitor_registrations: Mutex<Vec<MonitorRegistration>>,
    next_callback: AtomicI32,
}

impl Events {
    /// Registers a client with a callback id of its own.
    pub fn register(
        &self,
        client: &Arc<Client>,
        event_id: i32,
        domain: Option<&DomainRef>,
    ) -> Result<i32, DaemonError> {
        let callback_id = self.next_callback.fetch_add(1, Ordering::Relaxed) & i32::MAX;
        self.add(client, event_id, Some(callback_id), domain.map(|domain| domain.uuid))?;
        Ok(callback_id)
    }

    /// Registers a client from before callback ids for an event of every domain.
    pub fn register_legacy(&self, client: &Arc<Client>, event_id: i32) -> Result<(), DaemonError> {
        if domain_event(event_id).is_none_or(|row| row.legacy_message.is_none()) {
            return Err(DaemonError::UnknownEvent { event_id });
        }
        self.add(client, event_id, None, None)
    }

    fn add(
        &self,
        client: &Arc<Client>,
        event_id: i32,
        callback_id: Option<i32>,
        domain: Option<[u8; 16]>,
    ) -> Result<(), DaemonError> {
        if domain_event(event_id).is_none() {
            return Err(DaemonError::UnknownEvent { event_id });
        }
        let mut registrations = self.registrations.lock();
        let held = registrations.iter().filter(|registration| registration.client.id == client.id).count();
        if held >= REGISTRATIONS_MAX {
            return Err(DaemonError::TooManyCallbacks { limit: REGISTRATIONS_MAX });
        }
        registrations.push(Registration { client: client.clone(), callback_id, event_id, domain });
        Ok(())
    }

    /// Ends a registration of the client.
    pub fn deregister(&self, client: &Client, callback_id: i32) -> Result<(), DaemonError> {
        let matches = |r: &Registration| r.client.id == client.id && r.callback_id == Some(callback_id);
        self.remove_one(matches).ok_or(DaemonError::NoCallback { callback_id })
    }

    /// Ends a registration without a callback id.
    pub fn deregister_legacy(&self, client: &Client, event_id: i32) -> Result<(), DaemonError> {
        let matches = |r: &Registration| r.client.id == client.id && r.callback_id.is_none() && r.event_id == event_id;
        self.remove_one(matches).ok_or(DaemonError::NoCallback { callback_id: event_id })
    }

    fn remove_one(&self, matches: impl Fn(&Registration) -> bool) -> Option<()> {
        let mut registrations = self.registrations.lock();
        let at = registrations.iter().position(matches)?;
        registrations.remove(at);
        Some(())
    }

    /// Ends every registration of a client that is gone.
    pub fn forget_client(&self, id: u64) {
        self.registrations.lock().retain(|registration| registration.client.id != id);
        self.monitor_registrations.lock().retain(|registration| registration.client.id != id);
    }

    /// Registers a client for monitor events: of one domain or all, of one name or all.
    pub fn register_monitor(&self, client: &Arc<Client>, args: &EventRegisterArgs) -> Result<i32, DaemonError> {
        let api = "virConnectDomainQemuMonitorEventRegister";
        if args.flags != 0 {
            return Err(DaemonError::UnsupportedFlags { flags: args.flags, api });
        }
        let mut registrations = self.monitor_registrations.lock();
        let held = registrations.iter().filter(|registration| registration.client.id == client.id).count();
        if held >= REGISTRATIONS_MAX {
            return Err(DaemonError::TooManyCallbacks { limit: REGISTRATIONS_MAX });
        }
        let callback_id = self.next_callback.fetch_add(1, Ordering::Relaxed) & i32::MAX;
        let domain = args.dom.as_ref().map(|dom| dom.uuid);
        let event = args.event.as_ref().map(|event| event.lossy().into_owned());
        registrations.push(MonitorRegistration { client: client.clone(), callback_id, domain, event });
        Ok(callback_id)
    }

    /// Ends such a registration.
    pub fn deregister_monitor(&self, client: &Client, callback_id: i32) -> Result<(), DaemonError> {
        let mut registrations = self.monitor_registrations.lock();
        let at = registrations.iter().position(|r| r.client.id == client.id && r.callback_id == callback_id);
        registrations.remove(at.ok_or(DaemonError::NoCallback { callback_id })?);
        Ok(())
    }

    /// Tells whoever listens what a vireo-vmm said before it ended by itself.
    pub fn emit_monitor_death(&self, dom: &DomainRef, last_words: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let details = serde_json::json!({ "last-words": last_words }).to_string();
        for registration in self.monitor_registrations.lock().iter() {
            let wanted = registration.domain.is_none_or(|uuid| uuid == dom.uuid)
                && registration.event.as_deref().is_none_or(|event| event == VMM_ENDED);
            if wanted {
                let message = EventMessage {
                    callback_id: registration.callback_id,
                    dom: dom.clone(),
                    event: VMM_ENDED.into(),
                    seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
                    micros: now.subsec_micros(),
                    details: Some(details.as_str().into()),
                };
                registration.client.send_event(frame_of(Header::event(QEMU_PROGRAM, EVENT_MESSAGE), &message));
            }
        }
    }

    /// Sends an event to everyone who wants it.
    pub fn emit(&self, dom: &DomainRef, event: &DomainEvent) {
        match event {
            DomainEvent::Lifecycle(lifecycle) => {
                let (event, detail) = lifecycle.numbers();
                self.send(0, dom, &Lifecycle { dom: dom.clone(), event, detail });
            }
            DomainEvent::Reboot => self.send(1, dom, &DomainOnly { dom: dom.clone() }),
            DomainEvent::IoError { path, alias, action, reason } => {
                let (src_path, dev_alias) = (path.as_str().into(), alias.as_str().into());
                let plain = IoError { dom: dom.clone(), src_path, dev_alias, action: *action };
                self.send(4, dom, &plain);
                let IoError { dom: domain, src_path, dev_alias, action } = plain;
                let reason = reason.as_str().into();
                self.send(6, dom, &IoErrorReason { dom: domain, src_path, dev_alias, action, reason });
            }
            DomainEvent::Tunable { params } => {
                self.send(17, dom, &Tunable { dom: dom.clone(), params: List(params.clone()) });
            }
            DomainEvent::Metadata { kind, uri } => {
                let nsuri = uri.as_deref().map(Into::into);
                self.send(23, dom, &MetadataChange { dom: dom.clone(), kind: *kind, nsuri });
            }
        }
    }

    fn send<T: Xdr>(&self, event_id: i32, dom: &DomainRef, payload: &T) {
        let Some(kind) = domain_event(event_id) else { return };
        for registration in self.registrations.lock().iter() {
            let wanted = registration.event_id == event_id && registration.domain.is_none_or(|uuid| uuid == dom.uuid);
            if wanted && let Some(packet) = packet(kind, registration.callback_id, payload) {
                registration.client.send_event(packet);
            }
        }
    }
}

fn packet<T: Xdr>(kind: &DomainEventKind, callback_id: Option<i32>, payload: &T) -> Option<Vec<u8>> {
    let message = if callback_id.is_some() { kind.callback_message } else { kind.legacy_message? };
    let mut packet = Vec::with_capacity(128);
    write_frame(&mut packet, Header::event(REMOTE_PROGRAM, message), |out| {
        if let Some(callback_id) = callback_id {
            callback_id.encode(out);
        }
        payload.encode(out);
    });
    Some(packet)
}
