//! libvirt's wire protocol as pure functions over bytes: XDR (RFC 4506), frames, the procedure table, arguments and
//! replies of every call that is served, events, error numbers.
//!
//! The daemon and the client share this crate; neither finds a socket here. What arrives is hostile: every length is
//! checked against its limit and against the bytes that are left before anything is allocated, and no input panics.
//!
//! - [`xdr`]: the encoding and its bounded types. [`frame`]: packets in and out of a byte stream.
//! - [`procs`]: number, name and API name of every procedure. [`remote`], [`qemu`]: the calls we give types to.
//! - [`events`]: what the server sends unasked. [`errors`]: codes, domains, and the body of a failed reply.
//!
//! Invariant: knows no driver, no socket, no runtime.
#![forbid(unsafe_code)]

pub mod errors;
pub mod events;
pub mod frame;
pub mod procs;
pub mod qemu;
pub mod remote;
pub mod types;
pub mod xdr;

pub use errors::{ErrorBody, ErrorCode, ErrorDomain};
pub use frame::{Frame, FrameError, FrameReader, Header, MessageType, Status};
pub use types::{DomainRef, ParamValue, TypedParam};
pub use xdr::{Xdr, XdrError};

/// One remote procedure: its number and the shapes of its two payloads.
pub trait Call {
    /// Program the number belongs to ([`frame::REMOTE_PROGRAM`] or [`frame::QEMU_PROGRAM`]).
    const PROGRAM: u32;
    /// Procedure number.
    const NUMBER: u32;
    /// Payload of the call.
    type Args: Xdr;
    /// Payload of a successful reply.
    type Reply: Xdr;
}
