//! A blocking client of libvirt's protocol, for programs that end soon: no runtime, no threads, one socket.
//!
//! [`Connection::open`] finds the daemon by its URI; [`Connection::call`] makes any call of `rpc_wire` and the methods in
//! [`domain`](Connection) make the common ones. Events and stream packets that arrive in between are kept and handed out
//! by [`Connection::next_event`] and [`Connection::next_stream_packet`]; the daemon's keepalive is answered whenever
//! something is read.
//!
//! Invariant: knows nothing of the daemon's insides.
#![forbid(unsafe_code)]

mod connection;
mod domain;
mod error;
mod event;
mod host;
mod spawn;
mod uri;

pub use connection::{Connection, StreamId, StreamPacket};
pub use domain::{Affect, DomainInfo, DomainStats, Lookup, Metadata, uuid_text};
pub use error::ClientError;
pub use event::{Event, EventKind};
pub use host::{NodeInfo, Version};
pub use rpc_wire::{DomainRef, ErrorCode, ParamValue, TypedParam};
/// Identifiers and names of events; the calls that [`Connection::call`] makes.
pub use rpc_wire::{events, remote};
pub use uri::{Target, UriError};
