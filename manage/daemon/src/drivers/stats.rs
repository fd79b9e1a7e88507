//! Statistics that the machine or its process is asked for.

use std::sync::Arc;

use monitor::{Reply, Stats};
use rpc_wire::remote::*;
use rpc_wire::types::OBJECT_LIST_MAX;
use rpc_wire::xdr::{List, Opaque};
use rpc_wire::{ParamValue, TypedParam};
use tokio::task::JoinSet;

use crate::dispatch::Ctx;
use crate::domain::{Domain, Live, Snapshot};
use crate::drivers::domain_info::{live, snapshot};
use crate::drivers::domain_list;
use crate::error::DaemonError;
use crate::host;
use crate::process::Process;

/// Groups of statistics.
const STATE: u32 = 1;
const CPU: u32 = 2;
const BALLOON: u32 = 4;
const VCPU: u32 = 8;
const INTERFACE: u32 = 16;
const BLOCK: u32 = 32;
/// Groups that exist in the protocol.
const KNOWN_GROUPS: u32 = 0x7ff;
/// Groups that are filled.
const FILLED_GROUPS: u32 = STATE | CPU | BALLOON | VCPU | INTERFACE | BLOCK;
/// Bulk flags: do not wait, show backing files.
const BULK_HINTS: u32 = 1 << 29 | 1 << 30;
/// Bulk flag: an unfilled group is an error.
const ENFORCE: u32 = 1 << 31;

/// Memory statistics, by tag: balloon size and resident set.
const MEMORY_ACTUAL: i32 = 6;
const MEMORY_RSS: i32 = 7;

/// Asks a machine for its counters.
pub async fn machine_stats(name: &str, live: &Live) -> Result<Stats, DaemonError> {
    match live.monitor.ask(name, monitor::Command::QueryStats).await? {
        Reply::Stats(stats) => Ok(stats),
        Reply::Done | Reply::Status(_) => {
            Err(DaemonError::Monitor { name: name.into(), detail: "no counters in the answer to query-stats".into() })
        }
    }
}

pub async fn get_all_domain_stats(
    ctx: Ctx,
    args: connect_get_all_domain_stats::Args,
) -> Result<connect_get_all_domain_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0xff | BULK_HINTS | ENFORCE)?;
    let enforced = args.flags & ENFORCE != 0;
    if enforced && args.stats & !FILLED_GROUPS != 0 {
        let unknown = args.stats & !FILLED_GROUPS;
        return Err(DaemonError::StatsGroups { groups: unknown });
    }
    let groups = if args.stats == 0 { FILLED_GROUPS } else { args.stats & KNOWN_GROUPS };
    let mut domains = if args.doms.0.is_empty() {
        ctx.daemon.registry.all()
    } else {
        args.doms.0.iter().map(|dom| ctx.daemon.registry.find(dom)).collect::<Result<_, _>>()?
    };
    domains.retain(|domain| domain_list::matches(&domain.snapshot(), args.flags & 0xff));
    if domains.len() > OBJECT_LIST_MAX {
        return Err(DaemonError::TooManyDomains { count: domains.len(), limit: OBJECT_LIST_MAX });
    }
    Ok(connect_get_all_domain_stats::Reply { ret_stats: List(collect(domains, groups).await) })
}

/// One record per domain, in order. Machines are asked all at once: one that does not answer delays nobody else's.
async fn collect(domains: Vec<Arc<Domain>>, groups: u32) -> Vec<StatsRecord> {
    let mut asked = JoinSet::new();
    let mut records = Vec::with_capacity(domains.len());
    for (index, domain) in domains.iter().enumerate() {
        let snapshot = domain.snapshot();
        if snapshot.live.is_some() && groups & (VCPU | BLOCK) != 0 {
            let waiting = snapshot.clone();
            asked.spawn(async move {
                let Some(live) = &waiting.live else { return (index, None) };
                (index, machine_stats(&waiting.name, live).await.ok())
            });
        }
        records.push((domain, snapshot, None));
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok((index, stats)) = answer
            && let Some((_, _, place)) = records.get_mut(index)
        {
            *place = stats;
        }
    }
    let record = |(domain, snapshot, stats): (&Arc<Domain>, Arc<Snapshot>, Option<Stats>)| StatsRecord {
        dom: domain.reference(),
        params: List(params(&snapshot, stats.as_ref(), groups)),
    };
    records.into_iter().map(record).collect()
}

fn params(snapshot: &Snapshot, stats: Option<&Stats>, groups: u32) -> Vec<TypedParam> {
    let mut out = Vec::with_capacity(24);
    let wants = |group: u32| groups & group != 0;
    if wants(STATE) {
        out.push(TypedParam::new("state.state", ParamValue::Int(snapshot.status.state as i32)));
        out.push(TypedParam::new("state.reason", ParamValue::Int(snapshot.status.reason)));
    }
    let pid = snapshot.live.as_ref().map(|live| live.pid);
    if wants(CPU)
        && let Some((user, system)) = pid.and_then(Process::cpu_times_ns)
    {
        for (field, value) in [("cpu.time", user.saturating_add(system)), ("cpu.user", user), ("cpu.system", system)] {
            out.push(TypedParam::new(field, ParamValue::Ullong(value)));
        }
    }
    let Some(definition) = snapshot.current() else { return out };
    let config = &definition.config;
    if wants(BALLOON) {
        out.push(TypedParam::new("balloon.current", ParamValue::Ullong(config.current_memory_kib)));
        out.push(TypedParam::new("balloon.maximum", ParamValue::Ullong(config.memory_kib)));
        if let Some(resident) = pid.and_then(host::resident_kib) {
            out.push(TypedParam::new("balloon.rss", ParamValue::Ullong(resident)));
        }
    }
    if wants(VCPU) {
        out.push(TypedParam::new("vcpu.current", ParamValue::Uint(config.vcpus)));
        out.push(TypedParam::new("vcpu.maximum", ParamValue::Uint(config.max_vcpus)));
        for (index, vcpu) in stats.iter().flat_map(|stats| &stats.vcpus).enumerate() {
            out.push(TypedParam::new(format!("vcpu.{index}.state"), ParamValue::Int(1)));
            out.push(TypedParam::new(format!("vcpu.{index}.time"), ParamValue::Ullong(vcpu.cpu_ns)));
            let halted = ParamValue::Boolean(vcpu.halted);
            out.push(TypedParam::new(format!("vcpu.{index}.halted"), halted));
        }
    }
    if wants(INTERFACE) {
        out.push(TypedParam::new("net.count", ParamValue::Uint(0)));
    }
    if wants(BLOCK) {
        block_params(config, stats, &mut out);
    }
    out
}

fn block_params(config: &xml::DomainConfig, stats: Option<&Stats>, out: &mut Vec<TypedParam>) {
    out.push(TypedParam::new("block.count", ParamValue::Uint(config.disks.len() as u32)));
    for (index, disk) in config.disks.iter().enumerate() {
        let name = ParamValue::String(disk.target.as_str().into());
        out.push(TypedParam::new(format!("block.{index}.name"), name));
        if let Some(path) = disk.source.path() {
            out.push(TypedParam::new(format!("block.{index}.path"), ParamValue::String(path.into())));
        }
        let Some(found) = stats.and_then(|stats| stats.disks.iter().find(|found| found.target == disk.target)) else {
            continue;
        };
        let values = [
            ("rd.reqs", found.reads),
            ("rd.bytes", found.read_bytes),
            ("rd.times", found.read_ns),
            ("wr.reqs", found.writes),
            ("wr.bytes", found.write_bytes),
            ("wr.times", found.write_ns),
            ("fl.reqs", found.flushes),
            ("fl.times", found.flush_ns),
            ("allocation", found.allocation_bytes),
            ("capacity", found.capacity_bytes),
            ("physical", found.physical_bytes),
        ];
        for (field, value) in values {
            out.push(TypedParam::new(format!("block.{index}.{field}"), ParamValue::Ullong(value)));
        }
    }
}

pub async fn get_vcpus(ctx: Ctx, args: domain_get_vcpus::Args) -> Result<domain_get_vcpus::Reply, DaemonError> {
    let snapshot = snapshot(&ctx, &args.dom)?;
    let live = live(&snapshot)?;
    let stats = machine_stats(&snapshot.name, &live).await?;
    let most = usize::try_from(args.maxinfo).unwrap_or(0).min(OBJECT_LIST_MAX);
    let info: Vec<VcpuInfo> = stats
        .vcpus
        .iter()
        .take(most)
        .enumerate()
        .map(|(index, vcpu)| VcpuInfo {
            number: index as u32,
            state: 1,
            cpu_time: vcpu.cpu_ns,
            cpu: Process::last_cpu(live.pid, vcpu.thread_id).unwrap_or(-1),
        })
        .collect();
    let bytes = usize::try_from(args.maplen).unwrap_or(0).min(rpc_wire::types::CPUMAP_MAX);
    let cpumaps = host::every_cpu(bytes).repeat(info.len());
    if cpumaps.len() > rpc_wire::types::CPUMAPS_MAX {
        return Err(DaemonError::HostArgument { detail: "the CPU maps asked for do not fit into a reply".into() });
    }
    Ok(domain_get_vcpus::Reply { info: List(info), cpumaps: Opaque(cpumaps) })
}

/// Totals only: the kernel does not tell by host CPU.
pub async fn get_cpu_stats(
    ctx: Ctx,
    args: domain_get_cpu_stats::Args,
) -> Result<domain_get_cpu_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 4)?;
    let snapshot = snapshot(&ctx, &args.dom)?;
    let live = live(&snapshot)?;
    if args.start_cpu != -1 {
        return Err(DaemonError::PerCpuStats);
    }
    let (user, system) = Process::cpu_times_ns(live.pid).unwrap_or_default();
    let values = [("cpu_time", user.saturating_add(system)), ("user_time", user), ("system_time", system)];
    let nparams = values.len() as i32;
    let wanted = args.nparams as usize;
    let params = values.iter().take(wanted).map(|(field, value)| TypedParam::new(*field, ParamValue::Ullong(*value)));
    Ok(domain_get_cpu_stats::Reply { params: List(params.collect()), nparams })
}

pub async fn memory_stats(
    ctx: Ctx,
    args: domain_memory_stats::Args,
) -> Result<domain_memory_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let snapshot = snapshot(&ctx, &args.dom)?;
    let live = live(&snapshot)?;
    let mut stats = vec![MemoryStat { tag: MEMORY_ACTUAL, val: live.definition.config.current_memory_kib }];
    if let Some(resident) = host::resident_kib(live.pid) {
        stats.push(MemoryStat { tag: MEMORY_RSS, val: resident });
    }
    stats.truncate(args.max_stats as usize);
    Ok(domain_memory_stats::Reply { stats: List(stats) })
}
