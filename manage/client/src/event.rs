//! Events of domains, decoded.

use rpc_wire::DomainRef;
use rpc_wire::events::{DomainOnly, IoErrorReason, Lifecycle, MetadataChange, domain_event, domain_event_of_message};
use rpc_wire::remote::{
    connect_domain_event_callback_deregister_any as deregister, connect_domain_event_callback_register_any as register,
};
use rpc_wire::xdr::{Decoder, Xdr, XdrError};

use crate::connection::Connection;
use crate::error::ClientError;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The life of a domain went on: libvirt's type and detail.
    Lifecycle {
        /// `virDomainEventType`.
        event: i32,
        /// Its detail.
        detail: i32,
    },
    /// It was reset and goes on.
    Reboot,
    /// A disk failed.
    IoError {
        /// Path of the image.
        path: String,
        /// Alias of the device.
        alias: String,
        /// 0 nothing, 1 paused, 2 reported to the guest.
        action: i32,
        /// `enospc` or empty.
        reason: String,
    },
    /// A description (0), title (1) or element (2) changed.
    Metadata {
        /// Which.
        kind: i32,
        /// Namespace of an element.
        uri: Option<String>,
    },
    /// Something that this client has no words for.
    Other,
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Identifier of its kind: index into [`rpc_wire::events::DOMAIN_EVENTS`].
    pub id: i32,
    /// Whom it concerns.
    pub domain: DomainRef,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// libvirt's name of the event.
    pub fn name(&self) -> &'static str {
        domain_event(self.id).map_or("unknown", |row| row.name)
    }
}

/// Reads a message; `None` where it is no event of a domain.
pub(crate) fn decode(procedure: u32, payload: &[u8]) -> Result<Option<Event>, XdrError> {
    let Some((row, has_callback)) = domain_event_of_message(procedure) else { return Ok(None) };
    let mut input = Decoder::new(payload);
    if has_callback {
        i32::decode(&mut input)?;
    }
    let event = |domain, kind| Ok(Some(Event { id: row.id, domain, kind }));
    match row.id {
        0 => {
            let Lifecycle { dom, event: number, detail } = Xdr::decode(&mut input)?;
            event(dom, EventKind::Lifecycle { event: number, detail })
        }
        1 => event(DomainOnly::decode(&mut input)?.dom, EventKind::Reboot),
        6 => {
            let IoErrorReason { dom, src_path, dev_alias, action, reason } = Xdr::decode(&mut input)?;
            let (path, alias) = (src_path.lossy().into_owned(), dev_alias.lossy().into_owned());
            event(dom, EventKind::IoError { path, alias, action, reason: reason.lossy().into_owned() })
        }
        23 => {
            let MetadataChange { dom, kind, nsuri } = Xdr::decode(&mut input)?;
            event(dom, EventKind::Metadata { kind, uri: nsuri.map(|uri| uri.lossy().into_owned()) })
        }
        // Every event of a domain begins with the domain.
        _ => event(DomainRef::decode(&mut input)?, EventKind::Other),
    }
}

impl Connection {
    /// Asks for events of one kind, of one domain or all. Returns what [`Connection::deregister_event`] takes.
    pub fn register_event(&mut self, id: i32, domain: Option<&DomainRef>) -> Result<i32, ClientError> {
        let args = register::Args { event_id: id, dom: domain.cloned() };
        Ok(self.call::<register::Proc>(&args)?.callback_id)
    }

    /// Ends it.
    pub fn deregister_event(&mut self, callback_id: i32) -> Result<(), ClientError> {
        self.call::<deregister::Proc>(&deregister::Args { callback_id }).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_wire::xdr::to_bytes;

    #[test]
    fn events_are_read_with_and_without_a_callback() {
        let dom = DomainRef { name: "vm".into(), uuid: [7; 16], id: 3 };
        let payload = to_bytes(&Lifecycle { dom: dom.clone(), event: 2, detail: 0 });
        let expected = Event { id: 0, domain: dom, kind: EventKind::Lifecycle { event: 2, detail: 0 } };
        assert_eq!(decode(107, &payload), Ok(Some(expected.clone())));
        assert_eq!(decode(318, &[&[0, 0, 0, 9], &payload[..]].concat()), Ok(Some(expected)));
        assert_eq!(decode(1, &payload), Ok(None));
        assert!(decode(318, &payload[..6]).is_err());
    }
}
