//! Waiting for events.

use std::time::{Duration, Instant};

use client::events::DOMAIN_EVENTS;
use client::{Event, EventKind, uuid_text};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::grammar::{Args, Done, Group, Kind, Opt, Verb, flag, option};
use crate::names;
use crate::shell::Shell;

const EVENT: &[Opt] = &[
    option("domain", Kind::Text, "only of one domain"),
    option("event", Kind::Text, "which kind"),
    flag("all", "every kind"),
    flag("loop", "until the time is over or Ctrl+C, rather than the first one"),
    option("timeout", Kind::Number, "seconds to wait"),
    flag("list", "print the kinds there are"),
    flag("timestamp", "print when each one came"),
];

pub const VERBS: &[Verb] = &[Verb {
    name: "event",
    group: Group::Monitor,
    summary: "wait for events of domains",
    options: EVENT,
    shows: true,
    run: event,
}];

fn event(shell: &mut Shell, args: &Args) -> Done {
    if args.has("list") {
        if shell.json {
            shell.show(&Value::Array(DOMAIN_EVENTS.iter().map(|row| row.name.into()).collect()));
        } else {
            DOMAIN_EVENTS.iter().for_each(|row| shell.say(format!("{}\n", row.name)));
        }
        return Ok(());
    }
    let kinds: Vec<i32> = match (args.has("all"), args.text("event")) {
        (true, _) => DOMAIN_EVENTS.iter().map(|row| row.id).collect(),
        (false, Some(name)) => {
            let row = DOMAIN_EVENTS.iter().find(|row| row.name == name);
            vec![row.ok_or_else(|| Failure::new(format!("unknown event type {name}")))?.id]
        }
        (false, None) => return Err(Failure::new("one of --list, --all, or --event <type> is required")),
    };
    let timeout = args.number("timeout")?;
    if timeout == Some(0) {
        return Err(Failure::new("invalid timeout: must be positive"));
    }
    let domain = match args.text("domain") {
        Some(word) => Some(shell.domain_named(word, client::Lookup::Any)?),
        None => None,
    };
    let connection = shell.connection()?;
    connection.start_keepalive()?;
    let mut callbacks = Vec::new();
    for kind in kinds {
        match connection.register_event(kind, domain.as_ref()) {
            Ok(callback) => callbacks.push(callback),
            // Of all kinds some may be newer than the daemon.
            Err(_) if args.has("all") => {}
            Err(error) => return Err(error.into()),
        }
    }
    let deadline = timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let mut count = 0;
    let in_time = loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let Some(event) = shell.connection()?.next_event(left)? else { break false };
        count += 1;
        print(shell, args, &event);
        shell.flush();
        if !args.has("loop") {
            break true;
        }
    };
    for callback in callbacks {
        shell.connection()?.deregister_event(callback)?;
    }
    if !in_time {
        shell.remark("event loop timed out\n");
    }
    shell.remark(format!("events received: {count}\n"));
    if count == 0 { Err(Failure::silent()) } else { Ok(()) }
}

fn print(shell: &mut Shell, args: &Args, event: &Event) {
    let name = event.domain.name.lossy().into_owned();
    if shell.json {
        let mut value = json!({ "event": event.name(), "domain": name, "uuid": uuid_text(&event.domain.uuid) });
        if let Some(object) = value.as_object_mut() {
            object.extend(details_json(&event.kind));
        }
        // One line per event: whoever reads does so while they come.
        shell.say(format!("{value}\n"));
        return;
    }
    let stamp = if args.has("timestamp") { timestamp() + ": " } else { String::new() };
    let details = match &event.kind {
        EventKind::Lifecycle { event, detail } => {
            let (event, detail) = names::lifecycle(*event, *detail);
            format!(": {event} {detail}")
        }
        EventKind::IoError { path, alias, action, reason } => {
            let because = if reason.is_empty() { String::new() } else { format!(" due to {reason}") };
            format!(": {path} ({alias}) {}{because}", action_word(*action))
        }
        EventKind::Metadata { kind, uri } => {
            format!(": type {}, uri {}", metadata_word(*kind), uri.as_deref().unwrap_or("<null>"))
        }
        EventKind::Reboot | EventKind::Other => String::new(),
    };
    shell.say(format!("{stamp}event '{}' for domain '{name}'{details}\n", event.name()));
}

fn action_word(action: i32) -> &'static str {
    match action {
        0 => "none",
        1 => "pause",
        _ => "report",
    }
}

fn metadata_word(kind: i32) -> &'static str {
    match kind {
        0 => "description",
        1 => "title",
        _ => "element",
    }
}

fn details_json(kind: &EventKind) -> Vec<(String, Value)> {
    let pair = |name: &str, value: Value| (name.to_owned(), value);
    match kind {
        EventKind::Lifecycle { event, detail } => {
            let (event, detail) = names::lifecycle(*event, *detail);
            vec![pair("change", event.into()), pair("detail", detail.into())]
        }
        EventKind::IoError { path, alias, action, reason } => vec![
            pair("path", path.as_str().into()),
            pair("device", alias.as_str().into()),
            pair("action", action_word(*action).into()),
            pair("reason", reason.as_str().into()),
        ],
        EventKind::Metadata { kind, uri } => {
            vec![pair("type", metadata_word(*kind).into()), pair("uri", uri.clone().into())]
        }
        EventKind::Reboot | EventKind::Other => Vec::new(),
    }
}

/// Now, as `2026-01-31 12:34:56.789+0000`.
fn timestamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (now.as_secs() / 86_400, now.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}+0000", now.subsec_millis())
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that leap days end their year; 146097 days are 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        // Values of `date -u -d @SECONDS`.
        for (seconds, expected) in [
            (0u64, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (1_709_164_800, (2024, 2, 29)),
            (1_735_689_599, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(civil(seconds / 86_400), expected, "{seconds}");
        }
    }
}
