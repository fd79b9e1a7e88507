//! vCPUs and the host CPUs they may use.

use client::{Affect, DomainRef};
use serde_json::{Value, json};

use crate::columns::table;
use crate::failure::Failure;
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, option};
use crate::shell::Shell;
use crate::verbs::config::affect;

const CONFIG: Opt = flag("config", "at the next start");
const LIVE: Opt = flag("live", "of the running domain");
const CURRENT: Opt = flag("current", "of whichever there is");
const CPULIST: Opt = option("cpulist", Kind::Text, "host CPUs to allow");

const COUNT: &[Opt] = &[
    DOMAIN,
    flag("maximum", "the most there may be"),
    flag("active", "those that are there"),
    LIVE,
    CONFIG,
    CURRENT,
    flag("guest", "as the guest sees it"),
];

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Domain, summary, options, shows: true, run }
}

pub const VERBS: &[Verb] = &[
    verb("vcpucount", "numbers of vCPUs", COUNT, vcpucount),
    verb("vcpuinfo", "every vCPU in detail", &[DOMAIN, flag("pretty", "affinities as ranges")], vcpuinfo),
    verb(
        "vcpupin",
        "host CPUs that vCPUs may use",
        &[DOMAIN, option("vcpu", Kind::Number, "the vCPU"), CPULIST, CONFIG, LIVE, CURRENT],
        vcpupin,
    ),
    verb(
        "emulatorpin",
        "host CPUs that the rest of the machine may use",
        &[DOMAIN, CPULIST, CONFIG, LIVE, CURRENT],
        emulatorpin,
    ),
];

const MAXIMUM: u32 = 4;
const GUEST: u32 = 8;

fn vcpucount(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let (maximum, active) = (args.has("maximum"), args.has("active"));
    if maximum && active {
        return Err(Failure::new("Options --maximum and --active are mutually exclusive"));
    }
    let connection = shell.connection()?;
    let one = maximum || active || args.has("live") || args.has("config") || args.has("current") || args.has("guest");
    if one {
        let guest = if args.has("guest") { GUEST } else { 0 };
        let flags = affect(args)?.flags() | if maximum { MAXIMUM } else { 0 } | guest;
        let count = connection.vcpus(&domain, flags)?;
        if shell.json {
            shell.show(&json!({ "vcpus": count }));
        } else {
            shell.say(format!("{count}\n"));
        }
        return Ok(());
    }
    let mut rows = Vec::new();
    for (kind, kind_flag) in [("maximum", MAXIMUM), ("current", 0)] {
        for (which, affect) in [("config", Affect::Config), ("live", Affect::Live)] {
            match connection.vcpus(&domain, affect.flags() | kind_flag) {
                Ok(count) => rows.push((kind, which, count)),
                // One of the two is not there.
                Err(error) if error.code() == Some(client::ErrorCode::OperationInvalid) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    if shell.json {
        let rows = rows.iter().map(|(kind, which, count)| json!({ "kind": kind, "of": which, "vcpus": count }));
        shell.show(&Value::Array(rows.collect()));
    } else {
        for (kind, which, count) in rows {
            shell.say(format!("{kind:<12} {which:<12} {count:>3}\n"));
        }
    }
    Ok(())
}

fn has_cpu(map: &[u8], cpu: usize) -> bool {
    map.get(cpu / 8).is_some_and(|byte| byte >> (cpu % 8) & 1 == 1)
}

/// A map as `yy-y`.
pub fn map_letters(map: &[u8], cpus: usize) -> String {
    (0..cpus).map(|cpu| if has_cpu(map, cpu) { 'y' } else { '-' }).collect()
}

/// A map as `0-3,8`.
fn map_ranges(map: &[u8], cpus: usize) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for cpu in (0..cpus).filter(|cpu| has_cpu(map, *cpu)) {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let shown =
        ranges.iter().map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
    shown.collect::<Vec<_>>().join(",")
}

fn host_cpus(shell: &mut Shell) -> Result<usize, Failure> {
    Ok(usize::try_from(shell.connection()?.node_cpu_map()?.0).unwrap_or(0))
}

fn vcpuinfo(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let cpus = host_cpus(shell)?;
    let bytes = cpus.div_ceil(8);
    let connection = shell.connection()?;
    let count = connection.info(&domain)?.vcpus;
    let running = match connection.vcpu_info(&domain, count as i32, bytes as i32) {
        Ok((info, maps)) => Some((info, maps)),
        Err(error) if error.code() == Some(client::ErrorCode::OperationInvalid) => None,
        Err(error) => return Err(error.into()),
    };
    let mut vcpus = Vec::new();
    match running {
        Some((info, maps)) => {
            for (index, vcpu) in info.iter().enumerate() {
                let map = maps.get(index * bytes..(index + 1) * bytes).unwrap_or_default().to_vec();
                let state = match vcpu.state {
                    0 => "offline",
                    1 => "running",
                    _ => "blocked",
                };
                vcpus.push((vcpu.number, Some((vcpu.cpu, state, vcpu.cpu_time)), map));
            }
        }
        None => {
            let (found, maps) = connection.vcpu_pins(&domain, count as i32, bytes as i32, Affect::Config.flags())?;
            for index in 0..usize::try_from(found).unwrap_or(0) {
                vcpus.push((
                    index as u32,
                    None,
                    maps.get(index * bytes..(index + 1) * bytes).unwrap_or_default().to_vec(),
                ));
            }
        }
    }
    if shell.json {
        let list = vcpus.iter().map(|(number, live, map)| {
            json!({
                "vcpu": number, "host_cpu": live.map(|live| live.0), "state": live.map(|live| live.1),
                "cpu_time_ns": live.map(|live| live.2), "affinity": map_ranges(map, cpus),
            })
        });
        shell.show(&Value::Array(list.collect()));
        return Ok(());
    }
    for (index, (number, live, map)) in vcpus.iter().enumerate() {
        if index > 0 {
            shell.say("\n");
        }
        shell.say(format!("{:<15} {number}\n", "VCPU:"));
        match live {
            Some((cpu, state, time)) => {
                if *cpu >= 0 {
                    shell.say(format!("{:<15} {cpu}\n", "CPU:"));
                }
                shell.say(format!("{:<15} {state}\n{:<15} {:.1}s\n", "State:", "CPU time:", *time as f64 / 1e9));
            }
            None => shell.say(format!("{:<15} N/A\n{:<15} N/A\n{:<15} N/A\n", "CPU:", "State:", "CPU time")),
        }
        let shown = if args.has("pretty") {
            format!("{} (out of {cpus})", map_ranges(map, cpus))
        } else {
            map_letters(map, cpus)
        };
        shell.say(format!("{:<15} {shown}\n", "CPU Affinity:"));
    }
    Ok(())
}

fn refuse_pinning(args: &Args) -> Result<(), Failure> {
    if args.has("cpulist") {
        return Err(Failure::new("vCPUs cannot be pinned to host CPUs yet; taskset on the vireo-vmm process can"));
    }
    Ok(())
}

fn pin_flags(args: &Args, domain: &DomainRef) -> Result<u32, Failure> {
    let affect = affect(args)?;
    let present = if domain.id < 0 { Affect::Config } else { Affect::Live };
    Ok(if affect == Affect::Current { present } else { affect }.flags())
}

fn vcpupin(shell: &mut Shell, args: &Args) -> Done {
    refuse_pinning(args)?;
    let domain = shell.domain(args)?;
    if args.has("live") && domain.id < 0 {
        return Err(Failure::new("cannot get vcpupin for offline domain"));
    }
    let cpus = host_cpus(shell)?;
    let bytes = cpus.div_ceil(8);
    let only = args.number("vcpu")?;
    let flags = pin_flags(args, &domain)?;
    let connection = shell.connection()?;
    let count = connection.vcpus(&domain, flags | MAXIMUM)?;
    let (found, maps) = connection.vcpu_pins(&domain, count, bytes as i32, flags)?;
    let rows: Vec<Vec<String>> = (0..usize::try_from(found).unwrap_or(0))
        .filter(|index| only.is_none_or(|only| only as usize == *index))
        .map(|index| {
            let map = maps.get(index * bytes..(index + 1) * bytes).unwrap_or_default();
            vec![index.to_string(), map_ranges(map, cpus)]
        })
        .collect();
    if shell.json {
        let list = rows.iter().map(|row| json!({ "vcpu": row[0].parse::<u32>().ok(), "affinity": row[1] }));
        shell.show(&Value::Array(list.collect()));
    } else {
        let text = table(&["VCPU", "CPU Affinity"], &rows, shell.quiet);
        shell.say(text);
    }
    Ok(())
}

fn emulatorpin(shell: &mut Shell, args: &Args) -> Done {
    refuse_pinning(args)?;
    let domain = shell.domain(args)?;
    let cpus = host_cpus(shell)?;
    let flags = pin_flags(args, &domain)?;
    let map = shell.connection()?.emulator_pin(&domain, cpus.div_ceil(8) as i32, flags)?;
    let ranges = map_ranges(&map, cpus);
    if shell.json {
        shell.show(&json!({ "affinity": ranges }));
    } else {
        shell.remark("emulator: CPU Affinity\n----------------------------------\n");
        shell.say(format!("       *: {ranges}\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_read_both_ways() {
        let map = [0b0100_1101, 0b1];
        assert_eq!(map_letters(&map, 9), "y-yy--y-y");
        assert_eq!(map_ranges(&map, 9), "0,2-3,6,8");
        assert_eq!(map_ranges(&[], 4), "");
    }
}
