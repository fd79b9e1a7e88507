//! Listing domains, and their statistics in bulk.

use client::{Affect, Connection, DomainRef, Lookup, Metadata, ParamValue, uuid_text};
use serde_json::{Map, Value, json};

use crate::columns::table;
use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, Done, Group, Kind, Opt, Verb, flag, option};
use crate::names;
use crate::shell::Shell;

/// Switches that choose domains, with the protocol's filter flags.
const FILTERS: [(&str, u32); 12] = [
    ("transient", 8),
    ("persistent", 4),
    ("with-snapshot", 4096),
    ("without-snapshot", 8192),
    ("with-checkpoint", 16384),
    ("without-checkpoint", 32768),
    ("state-running", 16),
    ("state-paused", 32),
    ("state-shutoff", 64),
    ("state-other", 128),
    ("autostart", 1024),
    ("no-autostart", 2048),
];
const ACTIVE: u32 = 1;
const INACTIVE: u32 = 2;
const WITH_SAVE: u32 = 256;
const WITHOUT_SAVE: u32 = 512;

const LIST: &[Opt] = &[
    flag("inactive", "only domains that do not run"),
    flag("all", "domains that run and domains that do not"),
    flag("transient", "only domains without a definition"),
    flag("persistent", "only domains with a definition"),
    flag("with-snapshot", "only domains that have snapshots"),
    flag("without-snapshot", "only domains that have none"),
    flag("with-checkpoint", "only domains that have checkpoints"),
    flag("without-checkpoint", "only domains that have none"),
    flag("state-running", "only running domains"),
    flag("state-paused", "only paused domains"),
    flag("state-shutoff", "only domains that are off"),
    flag("state-other", "only domains in any other state"),
    flag("autostart", "only domains that start by themselves"),
    flag("no-autostart", "only domains that do not"),
    flag("with-managed-save", "only domains with a saved state"),
    flag("without-managed-save", "only domains without one"),
    flag("uuid", "print uuids"),
    flag("name", "print names"),
    flag("id", "print ids"),
    flag("table", "print a table (the default)"),
    flag("managed-save", "say 'saved' of domains with a saved state"),
    flag("title", "add the title to the table"),
];

const STATS: &[Opt] = &[
    flag("state", "state and reason"),
    flag("cpu-total", "CPU time of the machine"),
    flag("balloon", "memory"),
    flag("vcpu", "virtual CPUs"),
    flag("interface", "network interfaces"),
    flag("block", "disks"),
    flag("perf", "performance events"),
    flag("iothread", "I/O threads"),
    flag("memory", "memory bandwidth"),
    flag("dirtyrate", "how fast memory changes"),
    flag("vm", "figures of the engine"),
    flag("list-active", "only domains that run"),
    flag("list-inactive", "only domains that do not"),
    flag("list-persistent", "only domains with a definition"),
    flag("list-transient", "only domains without one"),
    flag("list-running", "only running domains"),
    flag("list-paused", "only paused domains"),
    flag("list-shutoff", "only domains that are off"),
    flag("list-other", "only domains in any other state"),
    flag("raw", "print values as they come"),
    flag("enforce", "fail where a group is not there"),
    flag("backing", "show the backing files of disks"),
    flag("nowait", "leave out what would have to be waited for"),
    option("domain", Kind::Words, "domains to report; all without it"),
];
/// Groups of statistics in the order of their bits.
const GROUPS: [&str; 11] =
    ["state", "cpu-total", "balloon", "vcpu", "interface", "block", "perf", "iothread", "memory", "dirtyrate", "vm"];
/// Filters of statistics, likewise.
const STATS_FILTERS: [&str; 8] = [
    "list-active",
    "list-inactive",
    "list-persistent",
    "list-transient",
    "list-running",
    "list-paused",
    "list-shutoff",
    "list-other",
];

pub const VERBS: &[Verb] = &[
    Verb { name: "list", group: Group::Monitor, summary: "list domains", options: LIST, shows: true, run: list },
    Verb {
        name: "domstats",
        group: Group::Monitor,
        summary: "statistics of one, several or all domains",
        options: STATS,
        shows: true,
        run: domstats,
    },
];

/// What a row of the listing shows.
struct Row {
    domain: DomainRef,
    state: i32,
    saved: bool,
    title: Option<String>,
}

impl Row {
    fn id(&self) -> String {
        if self.domain.id < 0 { "-".into() } else { self.domain.id.to_string() }
    }

    fn state(&self, show_saved: bool) -> &'static str {
        if show_saved && self.saved && self.state == 5 { "saved" } else { names::state(self.state) }
    }
}

fn filter_flags(args: &Args) -> u32 {
    let mut flags = 0;
    for (name, flag) in FILTERS {
        if args.has(name) {
            flags |= flag;
        }
    }
    if args.has("with-managed-save") {
        flags |= WITH_SAVE;
    }
    if args.has("without-managed-save") {
        flags |= WITHOUT_SAVE;
    }
    let states = 16 | 32 | 64 | 128;
    if args.has("all") {
        flags |= ACTIVE | INACTIVE;
    } else if args.has("inactive") {
        flags |= INACTIVE;
    } else if flags & states == 0 {
        flags |= ACTIVE;
    }
    flags
}

fn list(shell: &mut Shell, args: &Args) -> Done {
    let (uuid, name, id) = (args.has("uuid"), args.has("name"), args.has("id"));
    if let Some(other) = ["name", "uuid", "id"].into_iter().find(|other| args.has("table") && args.has(other)) {
        return Err(Failure::new(format!("Options --table and --{other} are mutually exclusive")));
    }
    let plain = (uuid || name || id) && !shell.json;
    let connection = shell.connection()?;
    let domains = connection.list(filter_flags(args)).while_doing(|| "Failed to list domains".into())?;
    let mut rows = Vec::with_capacity(domains.len());
    for domain in domains {
        match row(connection, domain, args, plain) {
            // A domain that went away while it was asked about is not there.
            Err(error) if error.code() == Some(client::ErrorCode::NoDomain) => {}
            other => rows.push(other.map_err(Failure::from)?),
        }
    }
    // Running ones by id, then the others by name.
    rows.sort_by(|a, b| {
        let key = |row: &Row| (row.domain.id < 0, row.domain.id);
        key(a)
            .cmp(&key(b))
            .then_with(|| a.domain.name.lossy().to_lowercase().cmp(&b.domain.name.lossy().to_lowercase()))
    });
    if shell.json {
        let domains: Vec<Value> = rows.iter().map(|row| as_json(row, args.has("title"))).collect();
        shell.show(&Value::Array(domains));
    } else if plain {
        for row in &rows {
            let parts =
                [(uuid, uuid_text(&row.domain.uuid)), (id, row.id()), (name, row.domain.name.lossy().into_owned())];
            // An id alone is of no use where there is none.
            if id && !name && !uuid && row.domain.id < 0 {
                continue;
            }
            let shown: Vec<String> = parts.into_iter().filter(|(wanted, _)| *wanted).map(|(_, text)| text).collect();
            shell.say(shown.join(" ") + "\n");
        }
    } else {
        let title = args.has("title");
        let cells = rows.iter().map(|row| {
            let mut cells =
                vec![row.id(), row.domain.name.lossy().into_owned(), row.state(args.has("managed-save")).to_owned()];
            cells.extend(title.then(|| row.title.clone().unwrap_or_default()));
            cells
        });
        let heading: &[&str] = if title { &["Id", "Name", "State", "Title"] } else { &["Id", "Name", "State"] };
        let text = table(heading, &cells.collect::<Vec<_>>(), shell.quiet);
        shell.say(text);
    }
    Ok(())
}

fn row(connection: &mut Connection, domain: DomainRef, args: &Args, plain: bool) -> Result<Row, client::ClientError> {
    let state = if plain { 0 } else { connection.state(&domain, 0)?.0 };
    let saved = args.has("managed-save") && !plain && connection.has_managed_save(&domain, 0)?;
    let title = if args.has("title") && !plain {
        connection.metadata(&domain, Metadata::Title, Affect::Current)?
    } else {
        None
    };
    Ok(Row { domain, state, saved, title })
}

fn as_json(row: &Row, with_title: bool) -> Value {
    let id = if row.domain.id < 0 { Value::Null } else { row.domain.id.into() };
    let mut value = json!({
        "id": id,
        "name": row.domain.name.lossy(),
        "uuid": uuid_text(&row.domain.uuid),
        "state": names::state(row.state),
    });
    if let (true, Some(object)) = (with_title, value.as_object_mut()) {
        object.insert("title".into(), row.title.clone().map_or(Value::Null, Value::String));
    }
    value
}

/// A parameter's value as a person reads it.
pub fn param_text(value: &ParamValue) -> String {
    match value {
        ParamValue::Int(value) => value.to_string(),
        ParamValue::Uint(value) => value.to_string(),
        ParamValue::Llong(value) => value.to_string(),
        ParamValue::Ullong(value) => value.to_string(),
        ParamValue::Double(value) => format!("{value:.6}"),
        ParamValue::Boolean(value) => if *value { "yes" } else { "no" }.into(),
        ParamValue::String(value) => value.lossy().into_owned(),
    }
}

/// A parameter's value for programs.
pub fn param_json(value: &ParamValue) -> Value {
    match value {
        ParamValue::Int(value) => (*value).into(),
        ParamValue::Uint(value) => (*value).into(),
        ParamValue::Llong(value) => (*value).into(),
        ParamValue::Ullong(value) => (*value).into(),
        ParamValue::Double(value) => (*value).into(),
        ParamValue::Boolean(value) => (*value).into(),
        ParamValue::String(value) => value.lossy().into(),
    }
}

fn domstats(shell: &mut Shell, args: &Args) -> Done {
    let bits = |names: &[&str]| {
        names.iter().enumerate().filter(|(_, name)| args.has(name)).fold(0, |all, (bit, _)| all | 1 << bit)
    };
    let mut flags: u32 = bits(&STATS_FILTERS);
    for (name, flag) in [("nowait", 1 << 29), ("backing", 1 << 30), ("enforce", 1 << 31)] {
        if args.has(name) {
            flags |= flag;
        }
    }
    let mut domains = Vec::new();
    for word in args.words("domain") {
        domains.push(shell.domain_named(word, Lookup::Any)?);
    }
    let records = shell.connection()?.stats(&domains, bits(&GROUPS), flags)?;
    if shell.json {
        let domains = records.iter().map(|record| {
            let params: Map<String, Value> = record
                .params
                .iter()
                .map(|param| (param.field.lossy().into_owned(), param_json(&param.value)))
                .collect();
            json!({ "name": record.domain.name.lossy(), "uuid": uuid_text(&record.domain.uuid), "stats": params })
        });
        shell.show(&Value::Array(domains.collect()));
        return Ok(());
    }
    for (index, record) in records.iter().enumerate() {
        if index > 0 {
            shell.say("\n");
        }
        shell.say(format!("Domain: '{}'\n", record.domain.name.lossy()));
        for param in &record.params {
            shell.say(format!("  {}={}\n", param.field.lossy(), param_text(&param.value)));
        }
    }
    Ok(())
}
