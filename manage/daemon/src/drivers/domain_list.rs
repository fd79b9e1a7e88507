//! Listing domains and finding one.

use std::sync::Arc;

use rpc_wire::DomainRef;
use rpc_wire::remote::*;
use rpc_wire::types::OBJECT_LIST_MAX;
use rpc_wire::xdr::{List, XStr};
use uuid::Uuid;

use crate::dispatch::Ctx;
use crate::domain::{Domain, Snapshot, State};
use crate::error::DaemonError;

/// A pair or set of filter flags and which of them a domain has. Of each set that is asked for at all, a domain must
/// have one that is asked for.
type FilterGroup = (u32, fn(&Snapshot) -> u32);

/// Every filter of virConnectListAllDomains.
const GROUPS: [FilterGroup; 7] = [
    (1 | 2, |s| if s.live.is_some() { 1 } else { 2 }),
    (4 | 8, |s| if s.config.is_some() { 4 } else { 8 }),
    (16 | 32 | 64 | 128, |s| match s.status.state {
        State::Running => 16,
        State::Paused => 32,
        State::Shutoff => 64,
        State::Shutdown | State::Crashed => 128,
    }),
    // Nothing is saved, and there are no snapshots and no checkpoints.
    (256 | 512, |_| 512),
    (1024 | 2048, |s| if s.autostart { 1024 } else { 2048 }),
    (4096 | 8192, |_| 8192),
    (16384 | 32768, |_| 32768),
];

/// All flags that filter.
pub const FILTERS: u32 = 0xffff;

/// Whether a domain passes the filters in `flags`.
pub fn matches(snapshot: &Snapshot, flags: u32) -> bool {
    GROUPS.iter().all(|(group, has)| flags & group == 0 || flags & has(snapshot) != 0)
}

fn bounded<T>(items: Vec<T>) -> Result<List<T, OBJECT_LIST_MAX>, DaemonError> {
    match items.len() {
        count if count > OBJECT_LIST_MAX => Err(DaemonError::TooManyDomains { count, limit: OBJECT_LIST_MAX }),
        _ => Ok(List(items)),
    }
}

pub fn list_all_domains(
    ctx: &Ctx,
    args: connect_list_all_domains::Args,
) -> Result<connect_list_all_domains::Reply, DaemonError> {
    ctx.check_flags(args.flags, FILTERS)?;
    let all = ctx.daemon.registry.all();
    let found = all.iter().filter(|domain| matches(&domain.snapshot(), args.flags));
    if args.need_results == 0 {
        return Ok(connect_list_all_domains::Reply { domains: List::default(), ret: found.count() as u32 });
    }
    let domains: Vec<DomainRef> = found.map(|domain| domain.reference()).collect();
    let ret = domains.len() as u32;
    Ok(connect_list_all_domains::Reply { domains: bounded(domains)?, ret })
}

fn count(ctx: &Ctx, flags: u32) -> i32 {
    ctx.daemon.registry.all().iter().filter(|domain| matches(&domain.snapshot(), flags)).count() as i32
}

/// Filter flag: running or paused.
const ACTIVE: u32 = 1;
/// Filter flag: neither.
const INACTIVE: u32 = 2;

pub fn num_of_domains(
    ctx: &Ctx,
    _: connect_num_of_domains::Args,
) -> Result<connect_num_of_domains::Reply, DaemonError> {
    Ok(connect_num_of_domains::Reply { num: count(ctx, ACTIVE) })
}

pub fn num_of_defined_domains(
    ctx: &Ctx,
    _: connect_num_of_defined_domains::Args,
) -> Result<connect_num_of_defined_domains::Reply, DaemonError> {
    Ok(connect_num_of_defined_domains::Reply { num: count(ctx, INACTIVE) })
}

pub fn list_domains(ctx: &Ctx, args: connect_list_domains::Args) -> Result<connect_list_domains::Reply, DaemonError> {
    let most = usize::try_from(args.maxids).unwrap_or(0).min(OBJECT_LIST_MAX);
    let ids = ctx
        .daemon
        .registry
        .all()
        .iter()
        .map(|domain| domain.snapshot().id())
        .filter(|id| *id >= 0)
        .take(most)
        .collect();
    Ok(connect_list_domains::Reply { ids: List(ids) })
}

pub fn list_defined_domains(
    ctx: &Ctx,
    args: connect_list_defined_domains::Args,
) -> Result<connect_list_defined_domains::Reply, DaemonError> {
    let most = usize::try_from(args.maxnames).unwrap_or(0).min(OBJECT_LIST_MAX);
    let all = ctx.daemon.registry.all();
    let names = all.iter().map(|domain| domain.snapshot()).filter(|snapshot| matches(snapshot, INACTIVE));
    let names = names.map(|snapshot| XStr::from(&*snapshot.name)).take(most).collect();
    Ok(connect_list_defined_domains::Reply { names: List(names) })
}

fn found(domain: Option<Arc<Domain>>, missing: DaemonError) -> Result<DomainRef, DaemonError> {
    domain.map(|domain| domain.reference()).ok_or(missing)
}

pub fn lookup_by_id(ctx: &Ctx, args: domain_lookup_by_id::Args) -> Result<domain_lookup_by_id::Reply, DaemonError> {
    let id = args.id;
    let domain = if id < 0 { None } else { ctx.daemon.registry.by_id(id) };
    Ok(domain_lookup_by_id::Reply { dom: found(domain, DaemonError::NoDomainWithId { id })? })
}

pub fn lookup_by_uuid(
    ctx: &Ctx,
    args: domain_lookup_by_uuid::Args,
) -> Result<domain_lookup_by_uuid::Reply, DaemonError> {
    let uuid = Uuid::from_bytes(args.uuid);
    let dom = found(ctx.daemon.registry.by_uuid(uuid), DaemonError::NoDomainWithUuid { uuid })?;
    Ok(domain_lookup_by_uuid::Reply { dom })
}

pub fn lookup_by_name(
    ctx: &Ctx,
    args: domain_lookup_by_name::Args,
) -> Result<domain_lookup_by_name::Reply, DaemonError> {
    let name = args.name.lossy().into_owned();
    let dom = found(ctx.daemon.registry.by_name(&name), DaemonError::NoDomainNamed { name })?;
    Ok(domain_lookup_by_name::Reply { dom })
}
