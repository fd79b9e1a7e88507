//! What a server sends unasked: message numbers and payloads of domain events, and their identifiers.
//!
//! A client registers for an event id and gets a callback id of its own; every message of that registration carries it
//! first. Clients from before that scheme get the same payload without it, under the older number.

use crate::types::{DomainRef, TypedParam};
use crate::xdr::{List, XStr, xdr_struct};

/// Message that tells a client that the server's connection to the hypervisor ended.
pub const CONNECTION_CLOSED: u32 = 362;

/// One kind of domain event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainEventKind {
    /// Identifier clients register for.
    pub id: i32,
    /// What virsh calls it.
    pub name: &'static str,
    /// Message number with a callback id.
    pub callback_message: u32,
    /// Message number without, where one exists.
    pub legacy_message: Option<u32>,
}

const fn kind(id: i32, name: &'static str, callback_message: u32, legacy: u32) -> DomainEventKind {
    DomainEventKind { id, name, callback_message, legacy_message: if legacy == 0 { None } else { Some(legacy) } }
}

/// Every domain event of libvirt 11.3; the index is the identifier.
#[rustfmt::skip] // an event per line
pub const DOMAIN_EVENTS: [DomainEventKind; 28] = [
    kind(0, "lifecycle", 318, 107),
    kind(1, "reboot", 319, 169),
    kind(2, "rtc-change", 320, 170),
    kind(3, "watchdog", 321, 171),
    kind(4, "io-error", 322, 172),
    kind(5, "graphics", 323, 173),
    kind(6, "io-error-reason", 324, 195),
    kind(7, "control-error", 325, 224),
    kind(8, "block-job", 326, 241),
    kind(9, "disk-change", 327, 248),
    kind(10, "tray-change", 328, 268),
    kind(11, "pm-wakeup", 329, 269),
    kind(12, "pm-suspend", 330, 270),
    kind(13, "balloon-change", 331, 276),
    kind(14, "pm-suspend-disk", 332, 292),
    kind(15, "device-removed", 333, 311),
    kind(16, "block-job-2", 339, 0),
    kind(17, "tunable", 346, 0),
    kind(18, "agent-lifecycle", 348, 0),
    kind(19, "device-added", 354, 0),
    kind(20, "migration-iteration", 359, 0),
    kind(21, "job-completed", 363, 0),
    kind(22, "device-removal-failed", 367, 0),
    kind(23, "metadata-change", 379, 0),
    kind(24, "block-threshold", 385, 0),
    kind(25, "memory-failure", 423, 0),
    kind(26, "memory-device-size-change", 438, 0),
    kind(27, "nic-mac-change", 453, 0),
];

/// The row of a domain event id.
pub fn domain_event(id: i32) -> Option<&'static DomainEventKind> {
    DOMAIN_EVENTS.get(usize::try_from(id).ok()?)
}

/// The row whose messages have this number, and whether they start with a callback id.
pub fn domain_event_of_message(message: u32) -> Option<(&'static DomainEventKind, bool)> {
    DOMAIN_EVENTS.iter().find_map(|row| {
        let callback = row.callback_message == message;
        (callback || row.legacy_message == Some(message)).then_some((row, callback))
    })
}

xdr_struct! {
    /// Event 0. Types and details: `virDomainEventType` and its detail enumerations.
    pub struct Lifecycle { dom: DomainRef, event: i32, detail: i32 }
    /// Events 1, 7: only the domain.
    pub struct DomainOnly { dom: DomainRef }
    /// Event 2: seconds off UTC.
    pub struct RtcChange { dom: DomainRef, offset: i64 }
    /// Event 3.
    pub struct Watchdog { dom: DomainRef, action: i32 }
    /// Event 4: `action` 0 none, 1 pause, 2 report.
    pub struct IoError { dom: DomainRef, src_path: XStr, dev_alias: XStr, action: i32 }
    /// Event 6: as 4, with `enospc` or nothing as reason.
    pub struct IoErrorReason { dom: DomainRef, src_path: XStr, dev_alias: XStr, action: i32, reason: XStr }
    /// Event 13: new balloon size in KiB.
    pub struct BalloonChange { dom: DomainRef, actual: u64 }
    /// Events 15, 19, 22: the device's alias.
    pub struct DeviceAlias { dom: DomainRef, dev_alias: XStr }
    /// Event 17.
    pub struct Tunable { dom: DomainRef, params: List<TypedParam, 2048> }
    /// Event 23: `kind` 0 description, 1 title, 2 element.
    pub struct MetadataChange { dom: DomainRef, kind: i32, nsuri: Option<XStr> }
    /// Payload of [`CONNECTION_CLOSED`].
    pub struct ConnectionClosed { reason: i32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procs::{self, Flow};

    #[test]
    fn every_event_number_is_an_event_of_the_procedure_table() {
        for (index, row) in DOMAIN_EVENTS.iter().enumerate() {
            assert_eq!(row.id as usize, index);
            for message in [Some(row.callback_message), row.legacy_message].into_iter().flatten() {
                let found = procs::remote(message).unwrap();
                assert_eq!(found.flow, Flow::Event, "{}", row.name);
                let words: Vec<&str> = row.name.split(['-', ' ']).filter(|word| *word != "pm").collect();
                assert!(
                    words.iter().all(|word| found.name.to_lowercase().contains(word)),
                    "{message} is {}, not {}",
                    found.name,
                    row.name
                );
            }
        }
        assert_eq!(domain_event(28), None);
        assert_eq!(domain_event_of_message(107).map(|(row, callback)| (row.id, callback)), Some((0, false)));
        assert_eq!(domain_event_of_message(318).map(|(row, callback)| (row.id, callback)), Some((0, true)));
    }
}
