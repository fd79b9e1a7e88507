//! The QEMU program: arguments that name a domain, so that a refusal can name it too, and monitor events.

use crate::types::DomainRef;
use crate::xdr::{XStr, xdr_struct};

/// Registers for monitor events.
pub const EVENT_REGISTER: u32 = 4;
/// Ends such a registration.
pub const EVENT_DEREGISTER: u32 = 5;
/// The message that carries one.
pub const EVENT_MESSAGE: u32 = 6;

xdr_struct! {
    /// Arguments of procedure 1 (a monitor command).
    pub struct MonitorCommandArgs { dom: DomainRef, cmd: XStr, flags: u32 }
    /// Arguments of procedure 3 (a guest agent command).
    pub struct AgentCommandArgs { dom: DomainRef, cmd: XStr, timeout: i32, flags: u32 }
    /// Arguments of [`EVENT_REGISTER`]; flags 1 and 2 make `event` a regular expression.
    pub struct EventRegisterArgs { dom: Option<DomainRef>, event: Option<XStr>, flags: u32 }
    /// Reply of [`EVENT_REGISTER`], arguments of [`EVENT_DEREGISTER`].
    pub struct EventCallback { callback_id: i32 }
    /// Payload of [`EVENT_MESSAGE`].
    pub struct EventMessage {
        callback_id: i32, dom: DomainRef, event: XStr, seconds: i64, micros: u32, details: Option<XStr>,
    }
}
