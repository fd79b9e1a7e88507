//! Registering for domain events.

use rpc_wire::remote::*;

use crate::dispatch::Ctx;
use crate::error::DaemonError;

/// Event id of the lifecycle, which the oldest clients have a call of its own for.
const LIFECYCLE: i32 = 0;

pub fn event_register(
    ctx: &Ctx,
    _: connect_domain_event_register::Args,
) -> Result<connect_domain_event_register::Reply, DaemonError> {
    ctx.daemon.events.register_legacy(&ctx.client, LIFECYCLE)?;
    Ok(connect_domain_event_register::Reply { cb_registered: 1 })
}

pub fn event_deregister(
    ctx: &Ctx,
    _: connect_domain_event_deregister::Args,
) -> Result<connect_domain_event_deregister::Reply, DaemonError> {
    ctx.daemon.events.deregister_legacy(&ctx.client, LIFECYCLE)?;
    Ok(connect_domain_event_deregister::Reply { cb_registered: 0 })
}

pub fn event_register_any(
    ctx: &Ctx,
    args: connect_domain_event_register_any::Args,
) -> Result<connect_domain_event_register_any::Reply, DaemonError> {
    ctx.daemon.events.register_legacy(&ctx.client, args.event_id)?;
    Ok(connect_domain_event_register_any::Reply {})
}

pub fn event_deregister_any(
    ctx: &Ctx,
    args: connect_domain_event_deregister_any::Args,
) -> Result<connect_domain_event_deregister_any::Reply, DaemonError> {
    ctx.daemon.events.deregister_legacy(&ctx.client, args.event_id)?;
    Ok(connect_domain_event_deregister_any::Reply {})
}

pub fn callback_register_any(
    ctx: &Ctx,
    args: connect_domain_event_callback_register_any::Args,
) -> Result<connect_domain_event_callback_register_any::Reply, DaemonError> {
    if let Some(dom) = &args.dom {
        ctx.daemon.registry.find(dom)?;
    }
    let callback_id = ctx.daemon.events.register(&ctx.client, args.event_id, args.dom.as_ref())?;
    Ok(connect_domain_event_callback_register_any::Reply { callback_id })
}

pub fn callback_deregister_any(
    ctx: &Ctx,
    args: connect_domain_event_callback_deregister_any::Args,
) -> Result<connect_domain_event_callback_deregister_any::Reply, DaemonError> {
    ctx.daemon.events.deregister(&ctx.client, args.callback_id)?;
    Ok(connect_domain_event_callback_deregister_any::Reply {})
}
