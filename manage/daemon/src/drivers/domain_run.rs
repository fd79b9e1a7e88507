//! Starting, stopping and everything between.

use std::sync::Arc;

use rpc_wire::DomainRef;
use rpc_wire::remote::*;

use crate::dispatch::Ctx;
use crate::domain::{Domain, Snapshot};
use crate::drivers::domain_config::read_definition;
use crate::error::DaemonError;
use crate::owner::{self, Command};
use crate::registry::Claimed;

/// Start flag: leave it standing.
const START_PAUSED: u32 = 1;
/// Start flag: destroy it when this client goes away.
const START_AUTODESTROY: u32 = 2;
/// Start flags that speak of saved states and NVRAM, which no domain has: bypass cache, force boot, reset NVRAM.
const START_IRRELEVANT: u32 = 4 | 8 | 32;
/// Start flag: check the document against the format.
const START_VALIDATE: u32 = 16;
/// Destroy flag: never kill it.
const DESTROY_GRACEFUL: u32 = 1;
/// Destroy flag: remove its logs.
const DESTROY_REMOVE_LOGS: u32 = 2;
/// Shutdown and reboot flag: by ACPI.
const BY_ACPI: u32 = 1;
/// Shutdown and reboot flag: by the guest's agent.
const BY_AGENT: u32 = 2;

async fn ask(ctx: &Ctx, dom: &DomainRef, command: Command) -> Result<Arc<Domain>, DaemonError> {
    let domain = ctx.daemon.registry.find(dom)?;
    owner::ask(&ctx.daemon, &domain, command).await?;
    Ok(domain)
}

/// Ties a run to the client that asked for it, where it wished so.
fn tie(ctx: &Ctx, domain: &Domain, flags: u32) {
    if flags & START_AUTODESTROY != 0 {
        ctx.client.tie_run(domain.uuid, domain.snapshot().id());
    }
}

pub async fn create_xml(ctx: Ctx, args: domain_create_xml::Args) -> Result<domain_create_xml::Reply, DaemonError> {
    ctx.check_flags(args.flags, START_PAUSED | START_AUTODESTROY | START_VALIDATE | START_IRRELEVANT)?;
    let definition = read_definition(&ctx, &args.xml_desc, args.flags & START_VALIDATE != 0)?;
    let (name, uuid) = (definition.config().name.clone(), definition.config().uuid);
    let command = Command::Start { paused: args.flags & START_PAUSED != 0, definition: Some(Box::new(definition)) };
    let domain = match ctx.daemon.registry.claim(&name, uuid)? {
        Claimed::Existing(domain) => {
            owner::ask(&ctx.daemon, &domain, command).await?;
            domain
        }
        Claimed::New(claim) => {
            let domain = Arc::new(Domain::new(uuid, Snapshot::unborn(&name)));
            owner::ask(&ctx.daemon, &domain, command).await?;
            ctx.daemon.registry.insert(domain.clone());
            drop(claim);
            // It may have ended before it was entered; then its owner could not take it out.
            if domain.snapshot().current().is_none() {
                ctx.daemon.registry.remove(&domain);
            }
            domain
        }
    };
    tie(&ctx, &domain, args.flags);
    Ok(domain_create_xml::Reply { dom: domain.reference() })
}

pub async fn create(ctx: Ctx, args: domain_create::Args) -> Result<domain_create::Reply, DaemonError> {
    ask(&ctx, &args.dom, Command::Start { paused: false, definition: None }).await?;
    Ok(domain_create::Reply {})
}

pub async fn create_with_flags(
    ctx: Ctx,
    args: domain_create_with_flags::Args,
) -> Result<domain_create_with_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, START_PAUSED | START_AUTODESTROY | START_IRRELEVANT)?;
    let command = Command::Start { paused: args.flags & START_PAUSED != 0, definition: None };
    let domain = ask(&ctx, &args.dom, command).await?;
    tie(&ctx, &domain, args.flags);
    Ok(domain_create_with_flags::Reply { dom: domain.reference() })
}

pub async fn suspend(ctx: Ctx, args: domain_suspend::Args) -> Result<domain_suspend::Reply, DaemonError> {
    ask(&ctx, &args.dom, Command::Suspend).await?;
    Ok(domain_suspend::Reply {})
}

pub async fn resume(ctx: Ctx, args: domain_resume::Args) -> Result<domain_resume::Reply, DaemonError> {
    ask(&ctx, &args.dom, Command::Resume).await?;
    Ok(domain_resume::Reply {})
}

/// Refuses ways that need the guest's agent and nothing else.
fn check_ways(ctx: &Ctx, dom: &DomainRef, flags: u32) -> Result<(), DaemonError> {
    ctx.check_flags(flags, BY_ACPI | BY_AGENT)?;
    if flags == BY_AGENT {
        let running = ctx.daemon.registry.find(dom)?.snapshot().live.is_some();
        return Err(if running { DaemonError::NoAgent } else { DaemonError::NotRunning });
    }
    Ok(())
}

pub async fn shutdown(ctx: Ctx, args: domain_shutdown::Args) -> Result<domain_shutdown::Reply, DaemonError> {
    ask(&ctx, &args.dom, Command::PowerButton { reboot: false }).await?;
    Ok(domain_shutdown::Reply {})
}

pub async fn shutdown_flags(
    ctx: Ctx,
    args: domain_shutdown_flags::Args,
) -> Result<domain_shutdown_flags::Reply, DaemonError> {
    check_ways(&ctx, &args.dom, args.flags)?;
    ask(&ctx, &args.dom, Command::PowerButton { reboot: false }).await?;
    Ok(domain_shutdown_flags::Reply {})
}

pub async fn reboot(ctx: Ctx, args: domain_reboot::Args) -> Result<domain_reboot::Reply, DaemonError> {
    check_ways(&ctx, &args.dom, args.flags)?;
    ask(&ctx, &args.dom, Command::PowerButton { reboot: true }).await?;
    Ok(domain_reboot::Reply {})
}

pub async fn reset(ctx: Ctx, args: domain_reset::Args) -> Result<domain_reset::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    ask(&ctx, &args.dom, Command::Reset).await?;
    Ok(domain_reset::Reply {})
}

pub async fn destroy(ctx: Ctx, args: domain_destroy::Args) -> Result<domain_destroy::Reply, DaemonError> {
    ask(&ctx, &args.dom, Command::Destroy { graceful: false }).await?;
    Ok(domain_destroy::Reply {})
}

pub async fn destroy_flags(
    ctx: Ctx,
    args: domain_destroy_flags::Args,
) -> Result<domain_destroy_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, DESTROY_GRACEFUL | DESTROY_REMOVE_LOGS)?;
    let domain = ask(&ctx, &args.dom, Command::Destroy { graceful: args.flags & DESTROY_GRACEFUL != 0 }).await?;
    if args.flags & DESTROY_REMOVE_LOGS != 0 {
        let path = ctx.daemon.log_path(&domain.snapshot().name);
        // A log that is not there is as good as removed.
        let _ = std::fs::remove_file(path);
    }
    Ok(domain_destroy_flags::Reply {})
}

pub async fn inject_nmi(ctx: Ctx, args: domain_inject_nmi::Args) -> Result<domain_inject_nmi::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    ask(&ctx, &args.dom, Command::InjectNmi).await?;
    Ok(domain_inject_nmi::Reply {})
}
