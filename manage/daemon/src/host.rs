//! Facts about the host, read from where the kernel shows them. What is missing reads as nothing rather than as an error:
//! containers hide some of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

/// Most bytes of a CPU bitmap that the protocol carries.
const CPUMAP_MAX: usize = rpc_wire::types::CPUMAP_MAX;

/// Name of the host.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// How the host's processors are arranged. `nodes * sockets * cores * threads` is at least the number of CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Machine name of the kernel (`x86_64`).
    pub arch: String,
    /// CPUs that exist, in order.
    pub present: Vec<u32>,
    /// CPUs that run.
    pub online: Vec<u32>,
    /// Clock of the first CPU; 0 where unknown.
    pub mhz: i32,
    /// NUMA nodes.
    pub nodes: i32,
    /// Sockets per node.
    pub sockets: i32,
    /// Cores per socket.
    pub cores: i32,
    /// Threads per core.
    pub threads: i32,
    /// Per node: its number and CPUs.
    pub cells: Vec<(u32, Vec<u32>)>,
}

/// The topology, read once: CPUs that come and go later do not change what was said.
pub fn topology() -> &'static Topology {
    static TOPOLOGY: OnceLock<Topology> = OnceLock::new();
    TOPOLOGY.get_or_init(|| read_topology(Path::new("/sys/devices/system"), &read("/proc/cpuinfo")))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn read_topology(system: &Path, cpuinfo: &str) -> Topology {
    let list = |name: &str| parse_ranges(&read(system.join("cpu").join(name)));
    let mut online = list("online");
    if online.is_empty() {
        online = (0..std::thread::available_parallelism().map_or(1, |count| count.get() as u32)).collect();
    }
    let mut present = list("present");
    if present.is_empty() {
        present.clone_from(&online);
    }
    let cells = read_cells(system, &online);
    let mut packages = BTreeSet::new();
    let mut cores = BTreeSet::new();
    for cpu in &online {
        let directory = system.join(format!("cpu/cpu{cpu}/topology"));
        let number = |name: &str| read(directory.join(name)).trim().parse::<i64>().unwrap_or(0);
        let package = number("physical_package_id");
        packages.insert(package);
        cores.insert((package, number("core_id")));
    }
    let count = online.len().max(1);
    let (nodes, sockets) = (cells.len().max(1), packages.len().max(1));
    let (sockets_per_node, cores_per_socket) = (sockets / nodes, cores.len() / sockets);
    let threads = count / cores.len().max(1);
    // Where the division leaves something over the arrangement is irregular, and said to be flat.
    let regular = nodes * sockets_per_node * cores_per_socket * threads == count;
    let (nodes, sockets, cores, threads) =
        if regular { (nodes, sockets_per_node, cores_per_socket, threads) } else { (1, 1, count, 1) };
    let mhz =
        cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    Topology {
        arch: rustix::system::uname().machine().to_string_lossy().into_owned(),
        present,
        online,
        mhz: mhz.unwrap_or(0.0) as i32,
        nodes: nodes as i32,
        sockets: sockets as i32,
        cores: cores as i32,
        threads: threads as i32,
        cells,
    }
}

fn read_cells(system: &Path, online: &[u32]) -> Vec<(u32, Vec<u32>)> {
    let nodes = parse_ranges(&read(system.join("node/online")));
    let cells: Vec<_> = nodes
        .into_iter()
        .map(|node| (node, parse_ranges(&read(system.join(format!("node/node{node}/cpulist"))))))
        .collect();
    if cells.is_empty() { vec![(0, online.to_vec())] } else { cells }
}

/// Numbers of a kernel list such as `0-3,8`.
fn parse_ranges(text: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else { continue };
        // The kernel's own limit is 8192 CPUs; a longer range is not one of its lists.
        numbers.extend(first..=last.min(first.saturating_add(65_535)));
    }
    numbers
}

/// A bitmap with one bit per CPU, least significant first, as long as needed for every present CPU.
pub fn cpumap(cpus: &[u32]) -> Vec<u8> {
    let highest = topology().present.last().copied().unwrap_or(0);
    let mut map = vec![0u8; (highest as usize / 8 + 1).min(CPUMAP_MAX)];
    for cpu in cpus {
        if let Some(byte) = map.get_mut(*cpu as usize / 8) {
            *byte |= 1 << (cpu % 8);
        }
    }
    map
}

/// The map of every CPU that runs, cut or filled to `bytes`.
pub fn every_cpu(bytes: usize) -> Vec<u8> {
    let mut map = cpumap(&topology().online);
    map.resize(bytes, 0);
    map
}

/// Memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total_kib: u64,
    /// Not used for anything.
    pub free_kib: u64,
    /// Block buffers.
    pub buffers_kib: u64,
    /// Page cache.
    pub cached_kib: u64,
}

/// The host's memory.
pub fn memory() -> Memory {
    parse_memory(&read("/proc/meminfo"))
}

/// Memory of one NUMA node; `None` where there is no such node.
pub fn cell_memory(cell: u32) -> Option<Memory> {
    if !topology().cells.iter().any(|(id, _)| *id == cell) {
        return None;
    }
    let text = read(format!("/sys/devices/system/node/node{cell}/meminfo"));
    // A kernel without NUMA shows no nodes: the one there is has everything.
    Some(if text.is_empty() { memory() } else { parse_memory(&text) })
}

/// Reads `MemTotal: 1 kB` and `Node 0 MemTotal: 1 kB` alike.
fn parse_memory(text: &str) -> Memory {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.split_whitespace().next_back() == Some(name)).then_some(value)
            })
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let total_kib = field("MemTotal");
    Memory { total_kib, free_kib: field("MemFree"), buffers_kib: field("Buffers"), cached_kib: field("Cached") }
}

/// Time of all CPUs together or of one, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTimes {
    /// In the kernel, interrupts included.
    pub kernel_ns: u64,
    /// In programs.
    pub user_ns: u64,
    /// With nothing to do.
    pub idle_ns: u64,
    /// Waiting for disks.
    pub iowait_ns: u64,
}

/// Times of CPU `cpu`, or of all of them; `None` where there is no such CPU.
pub fn cpu_times(cpu: Option<u32>) -> Option<CpuTimes> {
    let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    parse_cpu_times(&read("/proc/stat"), cpu, tick_ns)
}

fn parse_cpu_times(stat: &str, cpu: Option<u32>, tick_ns: u64) -> Option<CpuTimes> {
    let name = cpu.map_or_else(|| "cpu".to_owned(), |cpu| format!("cpu{cpu}"));
    let line = stat.lines().find(|line| line.split_whitespace().next() == Some(&name))?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect();
    // proc(5): user nice system idle iowait irq softirq
    let ns = |index: usize| fields.get(index).copied().unwrap_or(0).saturating_mul(tick_ns);
    Some(CpuTimes { kernel_ns: ns(2) + ns(5) + ns(6), user_ns: ns(0) + ns(1), idle_ns: ns(3), iowait_ns: ns(4) })
}

/// Free pages of `size_kib` on a node, or on the whole host; `None` where the host has no pages of that size.
pub fn free_pages(cell: Option<u32>, size_kib: u32) -> Option<u64> {
    let base_kib = rustix::param::page_size() as u64 / 1024;
    if u64::from(size_kib) == base_kib {
        let memory = cell.map_or_else(|| Some(memory()), cell_memory)?;
        return Some(memory.free_kib / base_kib);
    }
    let directory = match cell {
        Some(cell) => format!("/sys/devices/system/node/node{cell}/hugepages"),
        None => "/sys/kernel/mm/hugepages".to_owned(),
    };
    fs::read_to_string(format!("{directory}/hugepages-{size_kib}kB/free_hugepages")).ok()?.trim().parse().ok()
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(pid: i32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * (rustix::param::page_size() as u64 / 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_lists() {
        for (text, expected) in [("0-3,8\n", &[0, 1, 2, 3, 8][..]), ("5", &[5]), ("", &[]), ("x-3", &[]), ("3-1", &[])]
        {
            assert_eq!(parse_ranges(text), expected, "{text:?}");
        }
    }

    #[test]
    fn memory_of_host_and_node() {
        let expected = Memory { total_kib: 100, free_kib: 40, buffers_kib: 0, cached_kib: 7 };
        assert_eq!(parse_memory("MemTotal:  100 kB\nMemFree:  40 kB\nCached: 7 kB\nSwapCached: 9 kB\n"), expected);
        assert_eq!(parse_memory("Node 0 MemTotal: 100 kB\nNode 0 MemFree: 40 kB\nNode 0 Cached: 7 kB\n"), expected);
    }

    #[test]
    fn processor_times() {
        let stat = "cpu  1 2 3 4 5 6 7 8 0 0\ncpu0 10 20 30 40 50 60 70 0 0 0\nintr 1\n";
        let expected = CpuTimes { kernel_ns: 16, user_ns: 3, idle_ns: 4, iowait_ns: 5 };
        assert_eq!(parse_cpu_times(stat, None, 1), Some(expected));
        assert_eq!(parse_cpu_times(stat, Some(0), 2).map(|times| times.kernel_ns), Some(320));
        assert_eq!(parse_cpu_times(stat, Some(1), 1), None);
    }
}
