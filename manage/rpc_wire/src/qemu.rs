//! The QEMU program: only what names a domain, so that a refusal can name it too.

use crate::types::DomainRef;
use crate::xdr::{XStr, xdr_struct};

xdr_struct! {
    /// Arguments of procedure 1 (a monitor command).
    pub struct MonitorCommandArgs { dom: DomainRef, cmd: XStr, flags: u32 }
    /// Arguments of procedure 3 (a guest agent command).
    pub struct AgentCommandArgs { dom: DomainRef, cmd: XStr, timeout: i32, flags: u32 }
}
