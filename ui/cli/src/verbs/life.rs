//! Starting, stopping and everything between.

use std::fs;
use std::path::Path;

use client::{Connection, DomainRef};

use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, need, option};
use crate::shell::Shell;
use crate::verbs::console::attach;

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Domain, summary, options, shows: false, run }
}

const FILE: Opt = need("file", Kind::Text, "file with the domain's XML; - is standard input");
const MODE: Opt =
    option("mode", Kind::Text, "ways to ask the guest, by commas: acpi, agent, initctl, signal, paravirt");

const START: &[Opt] = &[
    DOMAIN,
    flag("console", "attach to the console"),
    flag("paused", "leave it standing"),
    flag("autodestroy", "end it when this program ends"),
    flag("bypass-cache", "read a saved state past the page cache"),
    flag("force-boot", "forget a saved state"),
    flag("reset-nvram", "begin with fresh firmware variables"),
];
const CREATE: &[Opt] = &[
    FILE,
    flag("console", "attach to the console"),
    flag("paused", "leave it standing"),
    flag("autodestroy", "end it when this program ends"),
    flag("validate", "refuse elements that the format does not have"),
    flag("reset-nvram", "begin with fresh firmware variables"),
];
const UNDEFINE: &[Opt] = &[
    DOMAIN,
    flag("managed-save", "and its saved state"),
    option("storage", Kind::Text, "and these of its disks"),
    flag("remove-all-storage", "and all of its disks"),
    flag("delete-storage-volume-snapshots", "and the snapshots of those disks"),
    flag("wipe-storage", "overwrite the disks first"),
    flag("snapshots-metadata", "and what is known of its snapshots"),
    flag("checkpoints-metadata", "and what is known of its checkpoints"),
    flag("nvram", "and its firmware variables"),
    flag("keep-nvram", "but keep its firmware variables"),
    flag("tpm", "and its TPM's state"),
    flag("keep-tpm", "but keep its TPM's state"),
];

pub const VERBS: &[Verb] = &[
    verb("create", "run a domain that is forgotten when it ends", CREATE, create),
    verb("start", "run a defined domain", START, start),
    verb("shutdown", "ask the guest to power off", &[DOMAIN, MODE], shutdown),
    verb("reboot", "ask the guest to power off, and start it again", &[DOMAIN, MODE], reboot),
    verb("reset", "press the reset button", &[DOMAIN], reset),
    verb(
        "destroy",
        "stop a domain at once",
        &[DOMAIN, flag("graceful", "wait for it rather than kill it"), flag("remove-logs", "and remove its logs")],
        destroy,
    ),
    verb("suspend", "stop a domain's vCPUs", &[DOMAIN], suspend),
    verb("resume", "let them run again", &[DOMAIN], resume),
    verb("inject-nmi", "interrupt every vCPU", &[DOMAIN], inject_nmi),
    verb(
        "define",
        "store a definition",
        &[FILE, flag("validate", "refuse elements that the format does not have")],
        define,
    ),
    verb("undefine", "forget a definition", UNDEFINE, undefine),
    verb("autostart", "start a domain with the daemon", &[DOMAIN, flag("disable", "no longer")], autostart),
    verb("domrename", "give a domain another name", &[DOMAIN, need("new-name", Kind::Text, "the name")], rename),
];

/// Flags of the switches that were given.
pub fn flags_of(args: &Args, table: &[(&str, u32)]) -> u32 {
    table.iter().filter(|(name, _)| args.has(name)).fold(0, |flags, (_, flag)| flags | flag)
}

/// The text of a file that a person names.
pub fn read_file(path: &str) -> Result<String, Failure> {
    let path = if path == "-" { Path::new("/dev/stdin") } else { Path::new(path) };
    fs::read_to_string(path).map_err(|error| {
        let text = error.to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        Failure::new(format!("Failed to open file '{}': {text}", path.display()))
    })
}

fn create(shell: &mut Shell, args: &Args) -> Done {
    let file = args.need("file");
    let xml = read_file(file)?;
    let flags = flags_of(args, &[("paused", 1), ("autodestroy", 2), ("validate", 16), ("reset-nvram", 32)]);
    let created = shell.connection()?.create(&xml, flags);
    let domain = created.while_doing(|| format!("Failed to create domain from {file}"))?;
    shell.remark(format!("Domain '{}' created from {file}\n", domain.name.lossy()));
    if args.has("console") { attach(shell, &domain, None, 0) } else { Ok(()) }
}

fn start(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    if domain.id >= 0 {
        return Err(Failure::new("Domain is already active"));
    }
    let table = [("paused", 1), ("autodestroy", 2), ("bypass-cache", 4), ("force-boot", 8), ("reset-nvram", 32)];
    let started = shell.connection()?.start(&domain, flags_of(args, &table));
    let domain = started.while_doing(|| format!("Failed to start domain '{}'", domain.name.lossy()))?;
    shell.remark(format!("Domain '{}' started\n", domain.name.lossy()));
    if args.has("console") { attach(shell, &domain, None, 0) } else { Ok(()) }
}

/// Runs a command on the domain and says so.
fn command(
    shell: &mut Shell,
    args: &Args,
    verb: &str,
    done: &str,
    run: impl FnOnce(&mut Connection, &DomainRef) -> Result<(), client::ClientError>,
) -> Done {
    let domain = shell.domain(args)?;
    let name = domain.name.lossy().into_owned();
    run(shell.connection()?, &domain).while_doing(|| format!("Failed to {verb} domain '{name}'"))?;
    shell.remark(format!("Domain '{name}' {done}\n"));
    Ok(())
}

fn modes(args: &Args) -> Result<u32, Failure> {
    let mut flags = 0;
    for mode in args.text("mode").into_iter().flat_map(|modes| modes.split(',')) {
        flags |= match mode {
            "acpi" => 1,
            "agent" => 2,
            "initctl" => 4,
            "signal" => 8,
            "paravirt" => 16,
            _ => {
                let known = "'acpi', 'agent', 'initctl', 'signal', or 'paravirt'";
                return Err(Failure::new(format!("Unknown mode {mode} value, expecting {known}")));
            }
        };
    }
    Ok(flags)
}

fn shutdown(shell: &mut Shell, args: &Args) -> Done {
    let flags = modes(args)?;
    command(shell, args, "shutdown", "is being shutdown", |connection, domain| connection.shutdown(domain, flags))
}

fn reboot(shell: &mut Shell, args: &Args) -> Done {
    let flags = modes(args)?;
    command(shell, args, "reboot", "is being rebooted", |connection, domain| connection.reboot(domain, flags))
}

fn reset(shell: &mut Shell, args: &Args) -> Done {
    command(shell, args, "reset", "was reset", |connection, domain| connection.reset(domain, 0))
}

fn destroy(shell: &mut Shell, args: &Args) -> Done {
    let flags = flags_of(args, &[("graceful", 1), ("remove-logs", 2)]);
    command(shell, args, "destroy", "destroyed", |connection, domain| connection.destroy(domain, flags))
}

fn suspend(shell: &mut Shell, args: &Args) -> Done {
    command(shell, args, "suspend", "suspended", Connection::suspend)
}

fn resume(shell: &mut Shell, args: &Args) -> Done {
    command(shell, args, "resume", "resumed", Connection::resume)
}

fn inject_nmi(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    Ok(shell.connection()?.inject_nmi(&domain, 0)?)
}

fn define(shell: &mut Shell, args: &Args) -> Done {
    let file = args.need("file");
    let xml = read_file(file)?;
    let defined = shell.connection()?.define(&xml, args.has("validate").into());
    let domain = defined.while_doing(|| format!("Failed to define domain from {file}"))?;
    shell.remark(format!("Domain '{}' defined from {file}\n", domain.name.lossy()));
    Ok(())
}

fn undefine(shell: &mut Shell, args: &Args) -> Done {
    if ["storage", "remove-all-storage", "wipe-storage", "delete-storage-volume-snapshots"].iter().any(|o| args.has(o))
    {
        return Err(Failure::new(
            "there are no storage pools yet whose volumes could be removed; remove the files by hand",
        ));
    }
    let table = [
        ("managed-save", 1),
        ("snapshots-metadata", 2),
        ("nvram", 4),
        ("keep-nvram", 8),
        ("checkpoints-metadata", 16),
        ("tpm", 32),
        ("keep-tpm", 64),
    ];
    let flags = flags_of(args, &table);
    command(shell, args, "undefine", "has been undefined", |connection, domain| connection.undefine(domain, flags))
}

fn autostart(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let name = domain.name.lossy().into_owned();
    let enable = !args.has("disable");
    let mark = if enable { "mark" } else { "unmark" };
    let set = shell.connection()?.set_autostart(&domain, enable);
    set.while_doing(|| format!("Failed to {mark} domain '{name}' as autostarted"))?;
    shell.remark(format!("Domain '{name}' {mark}ed as autostarted\n"));
    Ok(())
}

fn rename(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    shell.connection()?.rename(&domain, args.need("new-name"))?;
    shell.remark("Domain successfully renamed\n");
    Ok(())
}
