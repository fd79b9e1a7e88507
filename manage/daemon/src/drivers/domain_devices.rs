//! Disks and interfaces of a domain.

use std::path::Path;

use monitor::DiskStats;
use rpc_wire::remote::*;
use rpc_wire::xdr::{List, XStr};
use rpc_wire::{ParamValue, TypedParam};
use xml::{Disk, DiskSource, DomainConfig};

use crate::dispatch::Ctx;
use crate::drivers::domain_info::{affected, live, snapshot};
use crate::drivers::stats::machine_stats;
use crate::error::DaemonError;
use crate::image_chain;
use crate::owner::{self, Command};

/// Address source: the guest's agent.
const ADDRESSES_FROM_AGENT: u32 = 1;

/// Resize flag: the size is in bytes.
const RESIZE_BYTES: u32 = 1;
/// Resize flag: to what the block device has.
const RESIZE_CAPACITY: u32 = 2;

/// The disk that a client names by target or by path.
fn find_disk<'a>(config: &'a DomainConfig, path: &XStr) -> Result<&'a Disk, DaemonError> {
    let path = path.lossy();
    let named = |disk: &&Disk| disk.target == path || disk.source.path() == Some(&*path);
    config.disks.iter().find(named).ok_or_else(|| DaemonError::NoSuchDisk { path: path.into_owned() })
}

pub async fn get_block_info(
    ctx: Ctx,
    args: domain_get_block_info::Args,
) -> Result<domain_get_block_info::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let snapshot = snapshot(&ctx, &args.dom)?;
    let config = &affected(&snapshot, 0)?.config;
    let disk = find_disk(config, &args.path)?;
    if let Some(live) = &snapshot.live {
        let stats = machine_stats(&snapshot.name, live).await?;
        if let Some(found) = stats.disks.iter().find(|found| found.target == disk.target) {
            let (allocation, capacity, physical) = (found.allocation_bytes, found.capacity_bytes, found.physical_bytes);
            return Ok(domain_get_block_info::Reply { allocation, capacity, physical });
        }
    }
    let Some(path) = disk.source.path().map(str::to_owned) else {
        return Err(DaemonError::NoSuchDisk { path: args.path.lossy().into_owned() });
    };
    let format = image_chain::format_named(&disk.format);
    let (capacity, allocation, physical) =
        ctx.daemon.blocking(move || image_chain::sizes(Path::new(&path), format)).await.map_err(opened_for_sizes)?;
    Ok(domain_get_block_info::Reply { allocation, capacity, physical })
}

/// An image of a domain that does not run, in the words for it.
fn opened_for_sizes(error: DaemonError) -> DaemonError {
    match error {
        DaemonError::StorageFile { path, source } => DaemonError::ImageOpen { path, source },
        other => other,
    }
}

/// Counters of one disk, or of all together where `path` is empty.
async fn disk_stats(ctx: &Ctx, dom: &rpc_wire::DomainRef, path: &XStr) -> Result<DiskStats, DaemonError> {
    let snapshot = snapshot(ctx, dom)?;
    let live = live(&snapshot)?;
    let wanted = if path.0.is_empty() { None } else { Some(find_disk(&live.definition.config, path)?.target.clone()) };
    let stats = machine_stats(&snapshot.name, &live).await?;
    let mut sum = DiskStats::default();
    for disk in stats.disks.iter().filter(|disk| wanted.as_ref().is_none_or(|target| *target == disk.target)) {
        sum.reads = sum.reads.saturating_add(disk.reads);
        sum.read_bytes = sum.read_bytes.saturating_add(disk.read_bytes);
        sum.read_ns = sum.read_ns.saturating_add(disk.read_ns);
        sum.writes = sum.writes.saturating_add(disk.writes);
        sum.write_bytes = sum.write_bytes.saturating_add(disk.write_bytes);
        sum.write_ns = sum.write_ns.saturating_add(disk.write_ns);
        sum.flushes = sum.flushes.saturating_add(disk.flushes);
        sum.flush_ns = sum.flush_ns.saturating_add(disk.flush_ns);
    }
    Ok(sum)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub async fn block_stats(ctx: Ctx, args: domain_block_stats::Args) -> Result<domain_block_stats::Reply, DaemonError> {
    let stats = disk_stats(&ctx, &args.dom, &args.path).await?;
    Ok(domain_block_stats::Reply {
        rd_req: signed(stats.reads),
        rd_bytes: signed(stats.read_bytes),
        wr_req: signed(stats.writes),
        wr_bytes: signed(stats.write_bytes),
        // libvirt has no such number either.
        errs: -1,
    })
}

pub async fn block_stats_flags(
    ctx: Ctx,
    args: domain_block_stats_flags::Args,
) -> Result<domain_block_stats_flags::Reply, DaemonError> {
    // 4: the client takes strings.
    ctx.check_flags(args.flags, 4)?;
    let stats = disk_stats(&ctx, &args.dom, &args.path).await?;
    let values = [
        ("wr_bytes", stats.write_bytes),
        ("wr_operations", stats.writes),
        ("rd_bytes", stats.read_bytes),
        ("rd_operations", stats.reads),
        ("flush_operations", stats.flushes),
        ("wr_total_times", stats.write_ns),
        ("rd_total_times", stats.read_ns),
        ("flush_total_times", stats.flush_ns),
    ];
    let nparams = values.len() as i32;
    let wanted = usize::try_from(args.nparams).unwrap_or(0);
    let params =
        values.iter().take(wanted).map(|(field, value)| TypedParam::new(*field, ParamValue::Llong(signed(*value))));
    Ok(domain_block_stats_flags::Reply { params: List(params.collect()), nparams })
}

/// Size is in KiB without `RESIZE_BYTES`.
pub async fn block_resize(
    ctx: Ctx,
    args: domain_block_resize::Args,
) -> Result<domain_block_resize::Reply, DaemonError> {
    ctx.check_flags(args.flags, RESIZE_BYTES | RESIZE_CAPACITY)?;
    let domain = ctx.daemon.registry.find(&args.dom)?;
    let unit = if args.flags & RESIZE_BYTES == 0 { 1024 } else { 1 };
    let bytes = args.size.checked_mul(unit).ok_or(DaemonError::SizeOverflow { limit: u64::MAX / unit })?;
    let snapshot = domain.snapshot();
    let live = live(&snapshot)?;
    let disk = find_disk(&live.definition.config, &args.disk)
        .map_err(|_| DaemonError::DiskNotInConfig { path: args.disk.lossy().into_owned() })?;
    if args.flags & RESIZE_CAPACITY != 0 {
        let DiskSource::Block(device) = &disk.source else {
            return Err(DaemonError::ResizeToCapacity { target: disk.target.clone() });
        };
        let detail =
            format!("block device '{device}' has the size that its host gives it; restart the domain to see it");
        return Err(DaemonError::Unsupported { detail });
    }
    // A part of a sector is refused by formats that count in sectors.
    let bytes = if disk.format == "raw" { bytes } else { bytes.checked_next_multiple_of(512).unwrap_or(u64::MAX) };
    owner::ask(&ctx.daemon, &domain, Command::ResizeDisk { target: disk.target.clone(), bytes }).await?;
    Ok(domain_block_resize::Reply {})
}

/// Disks that stopped the machine and have not been tried again.
pub fn get_disk_errors(
    ctx: &Ctx,
    args: domain_get_disk_errors::Args,
) -> Result<domain_get_disk_errors::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    let live = live(&snapshot)?;
    if args.maxerrors == 0 {
        let nerrors = live.definition.config.disks.len() as i32;
        return Ok(domain_get_disk_errors::Reply { errors: List::default(), nerrors });
    }
    let most = (args.maxerrors as usize).min(256);
    let errors: Vec<DiskError> = snapshot
        .failed_disks
        .iter()
        .take(most)
        .map(|(disk, error)| DiskError { disk: disk.as_str().into(), error: *error })
        .collect();
    let nerrors = errors.len() as i32;
    Ok(domain_get_disk_errors::Reply { errors: List(errors), nerrors })
}

/// No interface can be attached yet, so no name is known.
pub fn interface_stats(
    ctx: &Ctx,
    args: domain_interface_stats::Args,
) -> Result<domain_interface_stats::Reply, DaemonError> {
    live(&*snapshot(ctx, &args.dom)?)?;
    Err(DaemonError::NoSuchInterface { device: args.device.lossy().into_owned() })
}

pub fn interface_addresses(
    ctx: &Ctx,
    args: domain_interface_addresses::Args,
) -> Result<domain_interface_addresses::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    live(&*snapshot(ctx, &args.dom)?)?;
    if args.source == ADDRESSES_FROM_AGENT {
        return Err(DaemonError::NoAgent);
    }
    Ok(domain_interface_addresses::Reply { ifaces: List::default() })
}
