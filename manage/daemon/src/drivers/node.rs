//! The host's processors and memory.

use rpc_wire::remote::*;
use rpc_wire::types::NodeStat;
use rpc_wire::xdr::{CharArray, CharList, List, Opaque};

use crate::dispatch::Ctx;
use crate::error::DaemonError;
use crate::host;

/// Statistics of all CPUs or all cells.
const ALL: i32 = -1;

fn invalid<T>(detail: String) -> Result<T, DaemonError> {
    Err(DaemonError::HostArgument { detail })
}

pub fn get_info(_: &Ctx, _: node_get_info::Args) -> Result<node_get_info::Reply, DaemonError> {
    let topology = host::topology();
    Ok(node_get_info::Reply {
        model: CharArray(topology.arch.clone().into_bytes()),
        memory: host::memory().total_kib,
        cpus: topology.online.len() as i32,
        mhz: topology.mhz,
        nodes: topology.nodes,
        sockets: topology.sockets,
        cores: topology.cores,
        threads: topology.threads,
    })
}

/// Statistics in the two steps of the protocol: asked for none, the reply says how many there are.
fn counted(stats: &[(&str, u64)], wanted: i32) -> Result<(List<NodeStat, 16>, i32), DaemonError> {
    let count = stats.len() as i32;
    if wanted == 0 {
        return Ok((List::default(), count));
    }
    if wanted < count {
        return invalid(format!("nparams in this call must be 0 or {count}, not {wanted}"));
    }
    let params = stats.iter().map(|(field, value)| NodeStat { field: (*field).into(), value: *value });
    Ok((List(params.collect()), count))
}

pub fn get_cpu_stats(ctx: &Ctx, args: node_get_cpu_stats::Args) -> Result<node_get_cpu_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let cpu = if args.cpu_num == ALL { Some(None) } else { u32::try_from(args.cpu_num).ok().map(Some) };
    let Some(times) = cpu.and_then(host::cpu_times) else {
        return invalid(format!("Invalid cpuNum in virNodeGetCPUStats: there is no CPU {}", args.cpu_num));
    };
    let stats =
        [("kernel", times.kernel_ns), ("user", times.user_ns), ("idle", times.idle_ns), ("iowait", times.iowait_ns)];
    let (params, nparams) = counted(&stats, args.nparams)?;
    Ok(node_get_cpu_stats::Reply { params, nparams })
}

pub fn get_memory_stats(
    ctx: &Ctx,
    args: node_get_memory_stats::Args,
) -> Result<node_get_memory_stats::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let (params, nparams) = if args.cell_num == ALL {
        let memory = host::memory();
        let stats = [
            ("total", memory.total_kib),
            ("free", memory.free_kib),
            ("buffers", memory.buffers_kib),
            ("cached", memory.cached_kib),
        ];
        counted(&stats, args.nparams)?
    } else {
        let Some(memory) = u32::try_from(args.cell_num).ok().and_then(host::cell_memory) else {
            return invalid(format!("cellNum in virNodeGetMemoryStats: there is no cell {}", args.cell_num));
        };
        counted(&[("total", memory.total_kib), ("free", memory.free_kib)], args.nparams)?
    };
    Ok(node_get_memory_stats::Reply { params, nparams })
}

pub fn get_cells_free_memory(
    _: &Ctx,
    args: node_get_cells_free_memory::Args,
) -> Result<node_get_cells_free_memory::Reply, DaemonError> {
    let cells = &host::topology().cells;
    let start = usize::try_from(args.start_cell).ok().filter(|start| *start < cells.len());
    let (Some(start), Ok(count)) = (start, usize::try_from(args.maxcells)) else {
        let last = cells.len().saturating_sub(1);
        return invalid(format!("start cell {} out of range (0-{last})", args.start_cell));
    };
    let free = cells
        .iter()
        .skip(start)
        .take(count)
        .map(|(id, _)| host::cell_memory(*id).unwrap_or_default().free_kib.saturating_mul(1024));
    Ok(node_get_cells_free_memory::Reply { cells: List(free.take(1024).collect()) })
}

pub fn get_free_memory(_: &Ctx, _: node_get_free_memory::Args) -> Result<node_get_free_memory::Reply, DaemonError> {
    Ok(node_get_free_memory::Reply { free_mem: host::memory().free_kib.saturating_mul(1024) })
}

pub fn get_cpu_map(ctx: &Ctx, args: node_get_cpu_map::Args) -> Result<node_get_cpu_map::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let topology = host::topology();
    let map = if args.need_map != 0 { host::cpumap(&topology.online) } else { Vec::new() };
    let online = if args.need_online != 0 { topology.online.len() as u32 } else { 0 };
    Ok(node_get_cpu_map::Reply { cpumap: Opaque(map), online, ret: topology.present.len() as i32 })
}

pub fn get_free_pages(ctx: &Ctx, args: node_get_free_pages::Args) -> Result<node_get_free_pages::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let cells: Vec<Option<u32>> = if args.start_cell == ALL {
        vec![None]
    } else {
        let ids = host::topology().cells.iter().map(|(id, _)| *id);
        let wanted = ids.filter(|id| i64::from(*id) >= i64::from(args.start_cell)).take(args.cell_count as usize);
        wanted.map(Some).collect()
    };
    if cells.is_empty() {
        return invalid(format!("start cell {} is out of range", args.start_cell));
    }
    let mut counts = Vec::new();
    for cell in cells {
        for size in &args.pages.0 {
            let Some(free) = host::free_pages(cell, *size) else {
                return invalid(format!("page size {size} KiB is not available on this host"));
            };
            counts.push(free);
        }
    }
    // A reply carries 1024 numbers; sixteen sizes of a host's pages on sixty-four nodes.
    counts.truncate(1024);
    Ok(node_get_free_pages::Reply { counts: List(counts) })
}

/// There is no security driver: guests are separated by their sandboxes.
pub fn get_security_model(
    _: &Ctx,
    _: node_get_security_model::Args,
) -> Result<node_get_security_model::Reply, DaemonError> {
    Ok(node_get_security_model::Reply { model: CharList(b"none".to_vec()), doi: CharList(b"0".to_vec()) })
}
