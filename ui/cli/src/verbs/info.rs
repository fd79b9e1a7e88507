//! Questions about one domain.

use client::{DomainRef, Lookup, uuid_text};
use serde_json::{Value, json};

use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, named, option};
use crate::names;
use crate::shell::Shell;

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Monitor, summary, options, shows: true, run }
}

const JOB: &[Opt] = &[
    DOMAIN,
    flag("completed", "the job that ended last"),
    flag("keep-completed", "and do not forget it"),
    flag("anystats", "even of a job that failed"),
    flag("rawstats", "figures as they come"),
];
const MEMSTAT: &[Opt] = &[
    DOMAIN,
    option("period", Kind::Number, "seconds between collections in the guest"),
    flag("config", "at the next start"),
    flag("live", "of the running domain"),
    flag("current", "of whichever there is"),
];
const DUMP: &[Opt] = &[
    DOMAIN,
    flag("inactive", "the definition for the next start"),
    flag("security-info", "with passwords"),
    flag("update-cpu", "with the CPU as it would be on this host"),
    flag("migratable", "as another host could take it"),
    named("xpath", Kind::Text, "only what a path selects"),
    flag("wrap", "what a path selects, in one root element"),
];
const CPU_STATS: &[Opt] = &[
    DOMAIN,
    flag("total", "the sum of all CPUs"),
    option("start", Kind::Number, "first host CPU"),
    option("count", Kind::Number, "how many host CPUs"),
];

pub const VERBS: &[Verb] = &[
    verb("dominfo", "basic facts about a domain", &[DOMAIN], dominfo),
    verb("domstate", "state of a domain", &[DOMAIN, flag("reason", "and why it is in it")], domstate),
    verb("domid", "id of a running domain", &[DOMAIN], domid),
    verb("domuuid", "uuid of a domain", &[DOMAIN], domuuid),
    verb("domname", "name of a domain", &[DOMAIN], domname),
    verb("domcontrol", "whether the machine answers", &[DOMAIN], domcontrol),
    verb("domjobinfo", "the job that runs on a domain", JOB, domjobinfo),
    verb("dommemstat", "memory figures of a running domain", MEMSTAT, dommemstat),
    verb("cpu-stats", "CPU time of a running domain", CPU_STATS, cpu_stats),
    verb("dumpxml", "the document of a domain", DUMP, dumpxml),
];

fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn id_text(domain: &DomainRef) -> String {
    if domain.id < 0 { "-".into() } else { domain.id.to_string() }
}

fn dominfo(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let connection = shell.connection()?;
    let os_type = connection.os_type(&domain)?;
    let info = connection.info(&domain)?;
    let persistent = connection.is_persistent(&domain)?;
    let autostart = connection.autostart(&domain)?;
    let saved = connection.has_managed_save(&domain, 0)?;
    let (model, doi) = connection.security_model()?;
    let messages = connection.messages(&domain, 0)?;
    let state = i32::try_from(info.state).unwrap_or(0);
    if shell.json {
        let id = if domain.id < 0 { Value::Null } else { domain.id.into() };
        shell.show(&json!({
            "id": id, "name": domain.name.lossy(), "uuid": uuid_text(&domain.uuid), "os_type": os_type,
            "state": names::state(state), "vcpus": info.vcpus, "cpu_time_ns": info.cpu_time_ns,
            "max_memory_kib": info.max_memory_kib, "memory_kib": info.memory_kib, "persistent": persistent,
            "autostart": autostart, "managed_save": saved, "security_model": model, "messages": messages,
        }));
        return Ok(());
    }
    let mut lines = vec![
        ("Id:", id_text(&domain)),
        ("Name:", domain.name.lossy().into_owned()),
        ("UUID:", uuid_text(&domain.uuid)),
        ("OS Type:", os_type),
        ("State:", names::state(state).into()),
        ("CPU(s):", info.vcpus.to_string()),
    ];
    if info.cpu_time_ns > 0 {
        lines.push(("CPU time:", format!("{:.1}s", info.cpu_time_ns as f64 / 1e9)));
    }
    lines.extend([
        ("Max memory:", format!("{} KiB", info.max_memory_kib)),
        ("Used memory:", format!("{} KiB", info.memory_kib)),
        ("Persistent:", yes_no(persistent).into()),
        ("Autostart:", if autostart { "enable" } else { "disable" }.into()),
        ("Managed save:", yes_no(saved).into()),
    ]);
    if !model.is_empty() {
        lines.extend([("Security model:", model), ("Security DOI:", doi)]);
    }
    for (label, value) in lines {
        shell.say(format!("{label:<15} {value}\n"));
    }
    for message in messages {
        shell.say(format!("{:<15} {message}\n", "Messages:"));
    }
    Ok(())
}

fn domstate(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let (state, reason) = shell.connection()?.state(&domain, 0)?;
    let (state, reason) = (names::state(state), names::reason(state, reason));
    if shell.json {
        shell.show(&json!({ "state": state, "reason": reason }));
    } else if args.has("reason") {
        shell.say(format!("{state} ({reason})\n"));
    } else {
        shell.say(format!("{state}\n"));
    }
    Ok(())
}

fn answer(shell: &mut Shell, field: &str, value: Value, text: String) -> Done {
    if shell.json {
        shell.show(&json!({ field: value }));
    } else {
        shell.say(text + "\n");
    }
    Ok(())
}

fn domid(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain_named(args.need("domain"), Lookup::UuidOrName)?;
    let id = if domain.id < 0 { Value::Null } else { domain.id.into() };
    answer(shell, "id", id, id_text(&domain))
}

fn domuuid(shell: &mut Shell, args: &Args) -> Done {
    let uuid = uuid_text(&shell.domain(args)?.uuid);
    answer(shell, "uuid", uuid.clone().into(), uuid)
}

fn domname(shell: &mut Shell, args: &Args) -> Done {
    let name = shell.domain(args)?.name.lossy().into_owned();
    answer(shell, "name", name.clone().into(), name)
}

fn domcontrol(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let state = match shell.connection()?.control_info(&domain, 0)?.0 {
        0 => "ok",
        1 => "background job",
        2 => "occupied",
        _ => "error",
    };
    answer(shell, "control", state.into(), state.into())
}

fn domjobinfo(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let flags = u32::from(args.has("completed")) | if args.has("keep-completed") { 2 } else { 0 };
    let kind = match shell.connection()?.job(&domain, flags)? {
        0 => "None",
        1 => "Bounded",
        2 => "Unbounded",
        3 => "Completed",
        4 => "Failed",
        _ => "Cancelled",
    };
    if shell.json {
        shell.show(&json!({ "job": kind.to_lowercase() }));
    } else {
        shell.say(format!("{:<17} {kind:<12}\n", "Job type:"));
    }
    Ok(())
}

fn dommemstat(shell: &mut Shell, args: &Args) -> Done {
    if args.has("period") {
        return Err(Failure::new("guests have no balloon driver yet that could collect figures; leave out --period"));
    }
    let domain = shell.domain(args)?;
    let stats = shell.connection()?.memory_stats(&domain, 1024, 0);
    let stats = stats.while_doing(|| format!("Failed to get memory statistics for domain {}", args.need("domain")))?;
    let named: Vec<_> = stats.iter().filter_map(|(tag, value)| Some((names::memory_stat(*tag)?, *value))).collect();
    if shell.json {
        let object = named.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect();
        shell.show(&Value::Object(object));
    } else {
        named.iter().for_each(|(name, value)| shell.say(format!("{name} {value}\n")));
    }
    Ok(())
}

fn cpu_stats(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let failed = || format!("Failed to retrieve CPU statistics for domain '{}'", domain.name.lossy());
    let connection = shell.connection()?;
    if !args.has("total") {
        // The daemon knows totals only and says so.
        connection.cpu_stats(&domain, 0, 0, 0, 0).while_doing(failed)?;
    }
    let (count, _) = connection.cpu_stats(&domain, 0, -1, 1, 0).while_doing(failed)?;
    let (_, params) = connection.cpu_stats(&domain, count.max(0) as u32, -1, 1, 0).while_doing(failed)?;
    if shell.json {
        let object =
            params.iter().map(|p| (format!("{}_ns", p.field.lossy()), super::list::param_json(&p.value))).collect();
        shell.show(&Value::Object(object));
        return Ok(());
    }
    shell.say("Total:\n");
    for param in &params {
        let ns: u64 = super::list::param_text(&param.value).parse().unwrap_or(0);
        let (seconds, rest) = (ns / 1_000_000_000, ns % 1_000_000_000);
        shell.say(format!("\t{:<12} {seconds:>9}.{rest:09} seconds\n", param.field.lossy()));
    }
    Ok(())
}

fn dumpxml(shell: &mut Shell, args: &Args) -> Done {
    if args.has("xpath") {
        return Err(Failure::new(
            "paths are not evaluated here; `vireo dumpxml DOMAIN | xmllint --xpath PATH -` does it",
        ));
    }
    let domain = shell.domain(args)?;
    let mut flags = 0;
    for (name, flag) in [("security-info", 1), ("inactive", 2), ("update-cpu", 4), ("migratable", 8)] {
        if args.has(name) {
            flags |= flag;
        }
    }
    let xml = shell.connection()?.xml(&domain, flags)?;
    if shell.json {
        shell.show(&json!({ "xml": xml }));
    } else {
        shell.say(xml);
    }
    Ok(())
}
