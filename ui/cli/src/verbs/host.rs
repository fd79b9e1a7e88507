//! The host and the daemon.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, Done, Group, Kind, Opt, Verb, flag, option};
use crate::shell::Shell;
use crate::verbs::vcpus::map_letters;

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Host, summary, options, shows: true, run }
}

const DOMCAPS: &[Opt] = &[
    option("virttype", Kind::Text, "qemu or kvm"),
    option("emulatorbin", Kind::Text, "path of the machine's program"),
    option("arch", Kind::Text, "architecture"),
    option("machine", Kind::Text, "machine type"),
];

pub const VERBS: &[Verb] = &[
    verb("version", "versions", &[flag("daemon", "of the daemon too")], version),
    verb("uri", "URI of the connection", &[], uri),
    verb("hostname", "name of the host", &[], hostname),
    verb("sysinfo", "SMBIOS of the host", &[], sysinfo),
    verb("capabilities", "what the host can do", &[], capabilities),
    verb("domcapabilities", "what a domain can have", DOMCAPS, domcapabilities),
    verb("maxvcpus", "most vCPUs of a domain", &[option("type", Kind::Text, "domain type")], maxvcpus),
    verb("nodeinfo", "processors and memory of the host", &[], nodeinfo),
    verb(
        "nodecpustats",
        "how the host's CPUs spend their time",
        &[option("cpu", Kind::Number, "one CPU"), flag("percent", "within one second, in percent")],
        nodecpustats,
    ),
    verb("nodememstats", "memory of the host", &[option("cell", Kind::Number, "one NUMA cell")], nodememstats),
    verb("nodecpumap", "CPUs that run", &[flag("pretty", "as ranges")], nodecpumap),
    verb(
        "freecell",
        "free memory",
        &[option("cellno", Kind::Number, "one NUMA cell"), flag("all", "every NUMA cell")],
        freecell,
    ),
];

/// A version number as `major.minor.release`.
fn dotted(version: u64) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

fn version(shell: &mut Shell, args: &Args) -> Done {
    let version = shell.connection()?.version()?;
    let own = env!("CARGO_PKG_VERSION");
    let (hypervisor, library) = (dotted(version.hypervisor_version), dotted(version.library_version));
    if shell.json {
        shell.show(&json!({
            "vireo": own, "hypervisor": version.hypervisor, "hypervisor_version": hypervisor, "follows_libvirt": library,
        }));
        return Ok(());
    }
    shell.say(format!("Vireo: {own}\nRunning hypervisor: {} {hypervisor}\n", version.hypervisor));
    if args.has("daemon") {
        shell.say(format!("Running against daemon: {library}\n"));
    }
    Ok(())
}

fn answer(shell: &mut Shell, field: &str, text: String) -> Done {
    if shell.json {
        shell.show(&json!({ field: text }));
    } else {
        shell.say(text + "\n");
    }
    Ok(())
}

fn uri(shell: &mut Shell, _: &Args) -> Done {
    let uri = shell.connection()?.uri().to_owned();
    answer(shell, "uri", uri)
}

fn hostname(shell: &mut Shell, _: &Args) -> Done {
    let name = shell.connection()?.hostname()?;
    answer(shell, "hostname", name)
}

fn sysinfo(shell: &mut Shell, _: &Args) -> Done {
    let text = shell.connection()?.sysinfo().while_doing(|| "failed to get sysinfo".into())?;
    answer(shell, "xml", text)
}

fn capabilities(shell: &mut Shell, _: &Args) -> Done {
    let text = shell.connection()?.capabilities().while_doing(|| "failed to get capabilities".into())?;
    answer(shell, "xml", text)
}

fn domcapabilities(shell: &mut Shell, args: &Args) -> Done {
    let [emulator, arch, machine, kind] = ["emulatorbin", "arch", "machine", "virttype"].map(|name| args.text(name));
    let text = shell.connection()?.domain_capabilities(emulator, arch, machine, kind);
    let text = text.while_doing(|| "failed to get emulator capabilities".into())?;
    answer(shell, "xml", text)
}

fn maxvcpus(shell: &mut Shell, args: &Args) -> Done {
    let count = shell.connection()?.max_vcpus(args.text("type"))?;
    if shell.json {
        shell.show(&json!({ "max_vcpus": count }));
    } else {
        shell.say(format!("{count}\n"));
    }
    Ok(())
}

fn nodeinfo(shell: &mut Shell, _: &Args) -> Done {
    let info = shell.connection()?.node_info().while_doing(|| "failed to get node information".into())?;
    if shell.json {
        shell.show(&json!({
            "model": info.model, "cpus": info.cpus, "mhz": info.mhz, "sockets": info.sockets, "cores": info.cores,
            "threads": info.threads, "cells": info.nodes, "memory_kib": info.memory_kib,
        }));
        return Ok(());
    }
    for (label, value) in [
        ("CPU model:", info.model),
        ("CPU(s):", info.cpus.to_string()),
        ("CPU frequency:", format!("{} MHz", info.mhz)),
        ("CPU socket(s):", info.sockets.to_string()),
        ("Core(s) per socket:", info.cores.to_string()),
        ("Thread(s) per core:", info.threads.to_string()),
        ("NUMA cell(s):", info.nodes.to_string()),
        ("Memory size:", format!("{} KiB", info.memory_kib)),
    ] {
        shell.say(format!("{label:<20} {value}\n"));
    }
    Ok(())
}

/// Names the protocol gives CPU times, in the order they are shown.
const CPU_TIMES: [(&str, &str); 4] =
    [("user", "user:"), ("kernel", "system:"), ("idle", "idle:"), ("iowait", "iowait:")];

fn nodecpustats(shell: &mut Shell, args: &Args) -> Done {
    let cpu = args.number("cpu")?.map_or(-1, |cpu| i32::try_from(cpu).unwrap_or(i32::MAX));
    let failed = || "Unable to get node cpu stats".to_owned();
    let mut stats = shell.connection()?.node_cpu_stats(cpu).while_doing(failed)?;
    let value =
        |stats: &[(String, u64)], name: &str| stats.iter().find(|(field, _)| field == name).map_or(0, |(_, v)| *v);
    if args.has("percent") {
        // The option asks for what happens within one second.
        std::thread::sleep(Duration::from_secs(1));
        let later = shell.connection()?.node_cpu_stats(cpu).while_doing(failed)?;
        for (name, before) in &mut stats {
            *before = value(&later, name).saturating_sub(*before);
        }
        let total = stats.iter().map(|(_, ns)| *ns).sum::<u64>().max(1) as f64;
        let percent = |name: &str| value(&stats, name) as f64 / total * 100.0;
        let usage = 100.0 - percent("idle") - percent("iowait");
        let lines = std::iter::once(("usage", "usage:", usage))
            .chain(CPU_TIMES.iter().map(|(name, label)| (*name, *label, percent(name))));
        if shell.json {
            let object: Map<String, Value> = lines.map(|(name, _, value)| (name.to_owned(), value.into())).collect();
            shell.show(&Value::Object(object));
        } else {
            lines.for_each(|(_, label, value)| shell.say(format!("{label:<15} {value:>5.1}%\n")));
        }
        return Ok(());
    }
    if shell.json {
        let object = stats.iter().map(|(name, ns)| (format!("{name}_ns"), (*ns).into())).collect();
        shell.show(&Value::Object(object));
    } else {
        CPU_TIMES.iter().for_each(|(name, label)| shell.say(format!("{label:<15} {:>20}\n", value(&stats, name))));
    }
    Ok(())
}

fn nodememstats(shell: &mut Shell, args: &Args) -> Done {
    let cell = args.number("cell")?.map_or(-1, |cell| i32::try_from(cell).unwrap_or(i32::MAX));
    let stats = shell.connection()?.node_memory_stats(cell).while_doing(|| "Unable to get memory stats".into())?;
    if shell.json {
        let object = stats.iter().map(|(name, kib)| (format!("{name}_kib"), (*kib).into())).collect();
        shell.show(&Value::Object(object));
    } else {
        stats.iter().for_each(|(name, kib)| shell.say(format!("{name:<7}: {kib:>20} KiB\n")));
    }
    Ok(())
}

fn nodecpumap(shell: &mut Shell, _: &Args) -> Done {
    let (present, online, map) = shell.connection()?.node_cpu_map().while_doing(|| "Unable to get cpu map".into())?;
    let letters = map_letters(&map, usize::try_from(present).unwrap_or(0));
    if shell.json {
        shell.show(&json!({ "present": present, "online": online, "map": letters }));
        return Ok(());
    }
    for (label, value) in
        [("CPUs present:", present.to_string()), ("CPUs online:", online.to_string()), ("CPU map:", letters)]
    {
        shell.say(format!("{label:<15} {value}\n"));
    }
    Ok(())
}

fn freecell(shell: &mut Shell, args: &Args) -> Done {
    let cell = args.number("cellno")?;
    if args.has("all") && cell.is_some() {
        return Err(Failure::new("Options --all and --cellno are mutually exclusive"));
    }
    if args.has("all") {
        let cells = shell.connection()?.node_cells_free_memory(0, 1024)?;
        let kib: Vec<u64> = cells.iter().map(|bytes| bytes / 1024).collect();
        if shell.json {
            shell.show(&json!({ "cells_free_kib": kib }));
            return Ok(());
        }
        for (index, free) in kib.iter().enumerate() {
            shell.say(format!("{index:>5}: {free:>10} KiB\n"));
        }
        shell.say(format!("{}\n{:>5}: {:>10} KiB\n", "-".repeat(20), "Total", kib.iter().sum::<u64>()));
        return Ok(());
    }
    let (label, bytes) = match cell {
        Some(cell) => {
            let start = i32::try_from(cell).unwrap_or(i32::MAX);
            let found = shell.connection()?.node_cells_free_memory(start, 1)?;
            (cell.to_string(), found.first().copied().unwrap_or(0))
        }
        None => ("Total".to_owned(), shell.connection()?.node_free_memory()?),
    };
    if shell.json {
        shell.show(&json!({ "free_kib": bytes / 1024 }));
    } else {
        shell.say(format!("{label}: {} KiB\n", bytes / 1024));
    }
    Ok(())
}
