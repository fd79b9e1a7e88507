//! Disks over the network: client and server of the NBD protocol, on Unix sockets and TCP.
//!
//! [`NbdFile`] is an export of a server as a [`crate::FileBackend`]; [`serve`] is a server of one [`crate::Disk`].
//! Both speak fixed newstyle negotiation, structured replies and block status (`base:allocation`, the server `qemu:dirty-bitmap:` too), with threads that
//! block and no runtime. `wire` has the bytes, as pure functions. What a peer sends is never trusted: it costs
//! bounded memory, and ends the connection when it breaks the protocol.
//!
//! TLS is demanded by whoever has credentials for it, [`TlsClient`] or [`TlsServer`], and nothing is said in the clear
//! then but that.
//!
//! Absent on purpose: resizing, the context `qemu:allocation-depth`, 64-bit headers. A peer that asks is told so.

mod client;
mod error;
mod server;
mod socket;
mod tls;
pub mod wire;

pub use client::{Export, NbdFile, list_exports};
pub use error::{NbdError, PeerError};
pub use server::{CLIENTS_UNLIMITED, Listener, ServeOptions, Stop, serve};
pub use tls::{TlsClient, TlsError, TlsServer};
