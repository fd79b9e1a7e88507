//! What is known of a domain without asking its machine: answered from its snapshot.

use std::sync::Arc;

use rpc_wire::DomainRef;
use rpc_wire::remote::*;
use rpc_wire::xdr::{CharList, List, Opaque};
use xml::DomainDefinition;

use crate::dispatch::Ctx;
use crate::domain::{Definition, Live, Snapshot};
use crate::error::DaemonError;
use crate::host;
use crate::owner::{AFFECT_CONFIG, AFFECT_LIVE};
use crate::process::Process;

/// XML flag: with passwords.
const XML_SECURE: u32 = 1;
/// XML flag: the definition for the next start.
const XML_INACTIVE: u32 = 2;
/// vcpu flag: the maximum.
const VCPU_MAXIMUM: u32 = 4;
/// vcpu flag: as the guest sees it.
const VCPU_GUEST: u32 = 8;

/// The condition of the domain a client means.
pub fn snapshot(ctx: &Ctx, dom: &DomainRef) -> Result<Arc<Snapshot>, DaemonError> {
    Ok(ctx.daemon.registry.find(dom)?.snapshot())
}

/// Its running machine.
pub fn live(snapshot: &Snapshot) -> Result<Arc<Live>, DaemonError> {
    snapshot.live.clone().ok_or(DaemonError::NotRunning)
}

/// The definition that AFFECT flags select.
pub fn affected(snapshot: &Snapshot, flags: u32) -> Result<&Definition, DaemonError> {
    match (flags & AFFECT_LIVE != 0, flags & AFFECT_CONFIG != 0) {
        (true, true) => Err(DaemonError::BothAffected),
        (true, false) => snapshot.live.as_ref().map(|live| &live.definition).ok_or(DaemonError::NotRunning),
        (false, true) => snapshot.config.as_deref().ok_or(DaemonError::NoPersistentConfig),
        (false, false) => snapshot.current().ok_or(DaemonError::NotRunning),
    }
}

pub fn get_os_type(ctx: &Ctx, args: domain_get_os_type::Args) -> Result<domain_get_os_type::Reply, DaemonError> {
    snapshot(ctx, &args.dom)?;
    Ok(domain_get_os_type::Reply { kind: "hvm".into() })
}

pub fn get_info(ctx: &Ctx, args: domain_get_info::Args) -> Result<domain_get_info::Reply, DaemonError> {
    let snapshot = snapshot(ctx, &args.dom)?;
    let config = &snapshot.current().ok_or(DaemonError::NotRunning)?.config;
    let times = snapshot.live.as_ref().and_then(|live| Process::cpu_times_ns(live.pid));
    Ok(domain_get_info::Reply {
        state: snapshot.status.state as u32,
        max_mem: config.memory_kib,
        memory: config.current_memory_kib,
        nr_virt_cpu: config.vcpus,
        cpu_time: times.map_or(0, |(user, system)| user.saturating_add(system)),
    })
}

pub fn get_state(ctx: &Ctx, args: domain_get_state::Args) -> Result<domain_get_state::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let status = snapshot(ctx, &args.dom)?.status;
    Ok(domain_get_state::Reply { state: status.state as i32, reason: status.reason })
}

pub fn get_control_info(
    ctx: &Ctx,
    args: domain_get_control_info::Args,
) -> Result<domain_get_control_info::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    live(&*snapshot(ctx, &args.dom)?)?;
    Ok(domain_get_control_info::Reply { state: 0, details: 0, state_time: 0 })
}

pub fn is_active(ctx: &Ctx, args: domain_is_active::Args) -> Result<domain_is_active::Reply, DaemonError> {
    Ok(domain_is_active::Reply { active: snapshot(ctx, &args.dom)?.live.is_some().into() })
}

pub fn is_persistent(ctx: &Ctx, args: domain_is_persistent::Args) -> Result<domain_is_persistent::Reply, DaemonError> {
    Ok(domain_is_persistent::Reply { persistent: snapshot(ctx, &args.dom)?.config.is_some().into() })
}

/// No definition changes by itself.
pub fn is_updated(ctx: &Ctx, args: domain_is_updated::Args) -> Result<domain_is_updated::Reply, DaemonError> {
    snapshot(ctx, &args.dom)?;
    Ok(domain_is_updated::Reply { updated: 0 })
}

pub fn get_autostart(ctx: &Ctx, args: domain_get_autostart::Args) -> Result<domain_get_autostart::Reply, DaemonError> {
    Ok(domain_get_autostart::Reply { autostart: snapshot(ctx, &args.dom)?.autostart.into() })
}

/// Starting once is not offered, so no domain is marked for it.
pub fn get_autostart_once(
    ctx: &Ctx,
    args: domain_get_autostart_once::Args,
) -> Result<domain_get_autostart_once::Reply, DaemonError> {
    snapshot(ctx, &args.dom)?;
    Ok(domain_get_autostart_once::Reply { autostart: 0 })
}

pub fn get_max_memory(
    ctx: &Ctx,
    args: domain_get_max_memory::Args,
) -> Result<domain_get_max_memory::Reply, DaemonError> {
    let snapshot = snapshot(ctx, &args.dom)?;
    Ok(domain_get_max_memory::Reply { memory: affected(&snapshot, 0)?.config.memory_kib })
}

pub fn get_max_vcpus(ctx: &Ctx, args: domain_get_max_vcpus::Args) -> Result<domain_get_max_vcpus::Reply, DaemonError> {
    let snapshot = snapshot(ctx, &args.dom)?;
    Ok(domain_get_max_vcpus::Reply { num: affected(&snapshot, 0)?.config.max_vcpus as i32 })
}

pub fn get_xml_desc(ctx: &Ctx, args: domain_get_xml_desc::Args) -> Result<domain_get_xml_desc::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0b1111)?;
    let secure = args.flags & XML_SECURE != 0;
    if secure && ctx.client.is_read_only() {
        return Err(DaemonError::SecureReadOnly { api: ctx.api });
    }
    let snapshot = snapshot(ctx, &args.dom)?;
    let text = match (args.flags & XML_INACTIVE != 0, &snapshot.config, &snapshot.live) {
        (true, Some(config), _) => config.xml.to_string(),
        (true, None, Some(live)) => ctx.daemon.definition_of_run(live)?.to_xml(),
        (true, None, None) | (false, ..) => affected(&snapshot, 0)?.xml.to_string(),
    };
    let xml = if secure { text } else { without_secrets(text)? };
    Ok(domain_get_xml_desc::Reply { xml: xml.into() })
}

fn without_secrets(text: String) -> Result<String, DaemonError> {
    // Few documents have any; the others are not read for nothing.
    if !text.contains("passwd=") {
        return Ok(text);
    }
    let mut definition = DomainDefinition::load(text.as_bytes())?;
    definition.remove_secrets()?;
    Ok(definition.to_xml())
}

pub fn get_vcpus_flags(
    ctx: &Ctx,
    args: domain_get_vcpus_flags::Args,
) -> Result<domain_get_vcpus_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG | VCPU_MAXIMUM | VCPU_GUEST)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    if args.flags & VCPU_GUEST != 0 {
        return Err(if snapshot.live.is_some() { DaemonError::NoAgent } else { DaemonError::NotRunning });
    }
    let config = &affected(&snapshot, args.flags)?.config;
    let count = if args.flags & VCPU_MAXIMUM != 0 { config.max_vcpus } else { config.vcpus };
    Ok(domain_get_vcpus_flags::Reply { num: count as i32 })
}

/// Bitmaps of one length, all set: nothing is pinned.
fn unpinned(maps: usize, bytes: i32) -> Result<Vec<u8>, DaemonError> {
    let limit = rpc_wire::types::CPUMAPS_MAX;
    let bytes = usize::try_from(bytes).ok().filter(|bytes| bytes.saturating_mul(maps) <= limit);
    let Some(bytes) = bytes else {
        return Err(DaemonError::HostArgument { detail: "the CPU maps asked for do not fit into a reply".into() });
    };
    Ok(host::every_cpu(bytes).repeat(maps))
}

pub fn get_vcpu_pin_info(
    ctx: &Ctx,
    args: domain_get_vcpu_pin_info::Args,
) -> Result<domain_get_vcpu_pin_info::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    let vcpus = affected(&snapshot, args.flags)?.config.max_vcpus as usize;
    let count = vcpus.min(usize::try_from(args.ncpumaps).unwrap_or(0));
    Ok(domain_get_vcpu_pin_info::Reply { cpumaps: Opaque(unpinned(count, args.maplen)?), num: count as i32 })
}

pub fn get_emulator_pin_info(
    ctx: &Ctx,
    args: domain_get_emulator_pin_info::Args,
) -> Result<domain_get_emulator_pin_info::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    affected(&snapshot, args.flags)?;
    Ok(domain_get_emulator_pin_info::Reply { cpumaps: Opaque(unpinned(1, args.maplen)?), ret: 1 })
}

/// There are no I/O threads that could be configured.
pub fn get_iothread_info(
    ctx: &Ctx,
    args: domain_get_iothread_info::Args,
) -> Result<domain_get_iothread_info::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    affected(&snapshot, args.flags)?;
    Ok(domain_get_iothread_info::Reply { info: List::default(), ret: 0 })
}

pub fn get_security_label(
    ctx: &Ctx,
    args: domain_get_security_label::Args,
) -> Result<domain_get_security_label::Reply, DaemonError> {
    snapshot(ctx, &args.dom)?;
    Ok(domain_get_security_label::Reply { label: CharList::default(), enforcing: 0 })
}

pub fn get_security_label_list(
    ctx: &Ctx,
    args: domain_get_security_label_list::Args,
) -> Result<domain_get_security_label_list::Reply, DaemonError> {
    snapshot(ctx, &args.dom)?;
    Ok(domain_get_security_label_list::Reply { labels: List::default(), ret: 0 })
}

/// Nothing taints a domain here, and nothing is deprecated yet.
pub fn get_messages(ctx: &Ctx, args: domain_get_messages::Args) -> Result<domain_get_messages::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0b111)?;
    snapshot(ctx, &args.dom)?;
    Ok(domain_get_messages::Reply { msgs: List::default() })
}

pub fn has_managed_save_image(
    ctx: &Ctx,
    args: domain_has_managed_save_image::Args,
) -> Result<domain_has_managed_save_image::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    snapshot(ctx, &args.dom)?;
    Ok(domain_has_managed_save_image::Reply { result: 0 })
}

/// There are no long jobs yet, so none is running.
pub fn get_job_info(ctx: &Ctx, args: domain_get_job_info::Args) -> Result<domain_get_job_info::Reply, DaemonError> {
    live(&*snapshot(ctx, &args.dom)?)?;
    Ok(domain_get_job_info::Reply {
        kind: 0,
        time_elapsed: 0,
        time_remaining: 0,
        data_total: 0,
        data_processed: 0,
        data_remaining: 0,
        mem_total: 0,
        mem_processed: 0,
        mem_remaining: 0,
        file_total: 0,
        file_processed: 0,
        file_remaining: 0,
    })
}

pub fn get_job_stats(ctx: &Ctx, args: domain_get_job_stats::Args) -> Result<domain_get_job_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0b11)?;
    live(&*snapshot(ctx, &args.dom)?)?;
    Ok(domain_get_job_stats::Reply { kind: 0, params: List::default() })
}
