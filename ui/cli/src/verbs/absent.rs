//! Lists of what the daemon does not have yet. The daemon is asked all the same: the day it has some, they are shown.

use client::remote::*;
use client::{ClientError, Connection};
use serde_json::Value;

use crate::columns::table;
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, option};
use crate::shell::Shell;

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Other, summary, options, shows: true, run }
}

const ALL: Opt = flag("all", "active and inactive ones");
const INACTIVE: Opt = flag("inactive", "only inactive ones");
const NAME: Opt = flag("name", "print names");
const UUID: Opt = flag("uuid", "print uuids");
const LIST: &[Opt] = &[
    INACTIVE,
    ALL,
    flag("persistent", "only those with a definition"),
    flag("transient", "only those without"),
    flag("autostart", "only those that start by themselves"),
    flag("no-autostart", "only those that do not"),
    UUID,
    NAME,
    flag("table", "print a table (the default)"),
    flag("details", "with sizes"),
    option("type", Kind::Text, "only of some types"),
];
const NODEDEV: &[Opt] =
    &[flag("tree", "as a tree"), option("cap", Kind::Text, "only with some capabilities"), INACTIVE, ALL];
const SECRET: &[Opt] = &[
    flag("ephemeral", "only those that are never stored"),
    flag("no-ephemeral", "only those that are"),
    flag("private", "only those nobody may read"),
    flag("no-private", "only those that can be read"),
];
const SNAPSHOT: &[Opt] = &[
    DOMAIN,
    flag("parent", "with the parent of each"),
    flag("tree", "as a tree"),
    NAME,
    flag("roots", "only those without parents"),
    flag("leaves", "only those without children"),
    flag("no-leaves", "only those with children"),
    flag("metadata", "only those with metadata"),
    flag("no-metadata", "only those without"),
    flag("inactive", "only those taken while the domain was off"),
    flag("active", "only those with memory"),
    flag("disk-only", "only those of disks alone"),
    flag("internal", "only those inside the image"),
    flag("external", "only those in files of their own"),
    flag("topological", "parents before children"),
];
const CHECKPOINT: &[Opt] = &[
    DOMAIN,
    flag("parent", "with the parent of each"),
    flag("roots", "only those without parents"),
    flag("leaves", "only those without children"),
    flag("no-leaves", "only those with children"),
    flag("tree", "as a tree"),
    NAME,
    flag("topological", "parents before children"),
];

pub const VERBS: &[Verb] = &[
    verb("net-list", "networks", LIST, net_list),
    verb("pool-list", "storage pools", LIST, pool_list),
    verb("snapshot-list", "snapshots of a domain", SNAPSHOT, snapshot_list),
    verb("checkpoint-list", "checkpoints of a domain", CHECKPOINT, checkpoint_list),
    verb("nodedev-list", "devices of the host", NODEDEV, nodedev_list),
    verb("iface-list", "interfaces of the host", &[INACTIVE, ALL], iface_list),
    verb("secret-list", "secrets", SECRET, secret_list),
    verb("nwfilter-list", "network filters", &[], nwfilter_list),
];

/// Prints names under the heading of the family's table.
fn show(
    shell: &mut Shell,
    args: &Args,
    heading: &[&str],
    names: impl FnOnce(&mut Connection) -> Result<Vec<String>, ClientError>,
) -> Done {
    let names = names(shell.connection()?)?;
    if shell.json {
        shell.show(&Value::Array(names.into_iter().map(Value::String).collect()));
    } else if args.has("name") || args.has("uuid") || heading.is_empty() {
        names.iter().for_each(|name| shell.say(format!("{name}\n")));
    } else {
        let row = |name: String| {
            let rest = std::iter::repeat_n("-".to_owned(), heading.len() - 1);
            std::iter::once(name).chain(rest).collect()
        };
        let rows: Vec<Vec<String>> = names.into_iter().map(row).collect();
        let text = table(heading, &rows, shell.quiet);
        shell.say(text);
    }
    Ok(())
}

macro_rules! names_of {
    ($proc:ident, $list:ident, $name:ident) => {
        |connection: &mut Connection| {
            let reply = connection.call::<$proc::Proc>(&$proc::Args { need_results: 1, flags: 0 })?;
            Ok(reply.$list.0.iter().map(|object| object.$name.lossy().into_owned()).collect())
        }
    };
}

fn net_list(shell: &mut Shell, args: &Args) -> Done {
    let heading = ["Name", "State", "Autostart", "Persistent"];
    show(shell, args, &heading, names_of!(connect_list_all_networks, nets, name))
}

fn pool_list(shell: &mut Shell, args: &Args) -> Done {
    let details = ["Name", "State", "Autostart", "Persistent", "Capacity", "Allocation", "Available"];
    let heading = if args.has("details") { &details[..] } else { &details[..3] };
    show(shell, args, heading, names_of!(connect_list_all_storage_pools, pools, name))
}

fn nodedev_list(shell: &mut Shell, args: &Args) -> Done {
    show(shell, args, &[], names_of!(connect_list_all_node_devices, devices, name))
}

fn iface_list(shell: &mut Shell, args: &Args) -> Done {
    show(shell, args, &["Name", "State", "MAC Address"], names_of!(connect_list_all_interfaces, ifaces, name))
}

fn secret_list(shell: &mut Shell, args: &Args) -> Done {
    show(shell, args, &["UUID", "Usage"], |connection| {
        let args = connect_list_all_secrets::Args { need_results: 1, flags: 0 };
        let secrets = connection.call::<connect_list_all_secrets::Proc>(&args)?.secrets.0;
        Ok(secrets.iter().map(|secret| client::uuid_text(&secret.uuid)).collect())
    })
}

fn nwfilter_list(shell: &mut Shell, args: &Args) -> Done {
    show(shell, args, &["UUID", "Name"], names_of!(connect_list_all_nwfilters, filters, name))
}

fn snapshot_list(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let all = ["Name", "Creation Time", "State", "Parent"];
    let heading = if args.has("tree") { &[][..] } else { &all[..if args.has("parent") { 4 } else { 3 }] };
    show(shell, args, heading, |connection| {
        let args = domain_list_all_snapshots::Args { dom: domain, need_results: 1, flags: 0 };
        let snapshots = connection.call::<domain_list_all_snapshots::Proc>(&args)?.snapshots.0;
        Ok(snapshots.iter().map(|snapshot| snapshot.name.lossy().into_owned()).collect())
    })
}

fn checkpoint_list(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let all = ["Name", "Creation Time", "Parent"];
    let heading = if args.has("tree") { &[][..] } else { &all[..if args.has("parent") { 3 } else { 2 }] };
    show(shell, args, heading, |connection| {
        let args = domain_list_all_checkpoints::Args { dom: domain, need_results: 1, flags: 0 };
        let checkpoints = connection.call::<domain_list_all_checkpoints::Proc>(&args)?.checkpoints.0;
        Ok(checkpoints.iter().map(|checkpoint| checkpoint.name.lossy().into_owned()).collect())
    })
}
