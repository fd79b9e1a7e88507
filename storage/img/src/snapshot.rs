//! `snapshot`: the internal snapshots of an image.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use block::{CacheMode, Format, Qcow2Image, Snapshot, SnapshotTime};

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::info::snapshot_json;
use crate::open::{self, Access, Named};
use crate::output::{self, stdout};
use crate::size::human;

/// `snapshot`.
pub const COMMAND: Command = Command {
    name: "snapshot",
    about: "List or manipulate snapshots within an image",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    FORCE_SHARE,
    OBJECT,
    flag('l', &["list"], "list the snapshots (the default)"),
    opt('c', &["create"], "NAME", "take a snapshot"),
    opt('a', &["apply"], "NAME", "make the disk what it was then"),
    opt('d', &["delete"], "NAME", "delete a snapshot"),
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let actions: Vec<&'static str> =
        parsed.in_order().map(|(name, _)| name).filter(|n| ["list", "create", "apply", "delete"].contains(n)).collect();
    let action = match actions.as_slice() {
        [] => "list",
        [one] => one,
        _ => return Err(ImgError::MixedActions { command: "snapshot" }),
    };
    let file = parsed.one_file()?;
    let named = Named::of(parsed, file, "format")?;
    let name = parsed.value(action)?.unwrap_or_default();
    if action == "list" {
        let top = open::top(&named, Access::read(parsed))?;
        if top.format == Format::Qcow2 {
            list(&named, &open::qcow2(&named, top, true)?)?;
        }
        return Ok(0);
    }
    let access = Access { share: parsed.has("force-share"), ..Access::write(CacheMode::Writeback) };
    let top = open::top(&named, access)?;
    if top.format != Format::Qcow2 {
        return Err(ImgError::Plain(without_snapshots(action, name)));
    }
    let image = open::qcow2(&named, top, false)?;
    // Data in an external file has one place, and cannot be kept for a snapshot.
    let with_data_file = image.header().geometry.data_file;
    match action {
        "create" if with_data_file => Err(refused("create", name, "Operation not supported")),
        "apply" if with_data_file => Err(refused("apply", name, "Failed to load snapshot: Operation not supported")),
        "create" => change("create", name, image.create_snapshot(name, &now()).map(drop)),
        "apply" if find(&named, &image, name, true)? => change("apply", name, image.apply_snapshot(name)),
        "apply" => Err(refused("apply", name, "Failed to load snapshot: No such file or directory")),
        _ if find(&named, &image, name, false)? => change("delete", name, image.delete_snapshot(name)),
        _ => Err(refused("delete", name, "snapshot not found")),
    }
}

fn change(action: &str, name: &str, done: Result<(), block::BlockError>) -> Result<u8, ImgError> {
    done.map(|()| 0)
        .map_err(|source| ImgError::Failed { doing: format!("Could not {action} snapshot '{name}'"), source })
}

fn refused(action: &'static str, name: &str, reason: &'static str) -> ImgError {
    ImgError::Plain(Rule::Snapshot { action, name: name.to_owned(), reason })
}

/// What qemu-img says of a format that has no snapshots.
fn without_snapshots(action: &str, name: &str) -> Rule {
    let name = name.to_owned();
    match action {
        "create" => Rule::Snapshot { action: "create", name, reason: "Operation not supported" },
        "apply" => Rule::Snapshot { action: "apply", name, reason: "Block driver does not support snapshots" },
        _ => Rule::Snapshot { action: "delete", name, reason: "snapshot not found" },
    }
}

fn find(named: &Named, image: &Qcow2Image, name: &str, by_id: bool) -> Result<bool, ImgError> {
    let all = image.snapshots().map_err(|source| ImgError::Open { name: named.label.clone(), source })?;
    let name = name.as_bytes();
    Ok(all.iter().any(|snapshot| snapshot.name == name || (by_id && snapshot.id == name)))
}

fn list(named: &Named, image: &Qcow2Image) -> Result<(), ImgError> {
    let all = image.snapshots().map_err(|source| ImgError::Open { name: named.label.clone(), source })?;
    output::fact("snapshots", all.iter().map(snapshot_json).collect::<serde_json::Value>());
    if !all.is_empty() {
        let mut out = stdout();
        writeln!(out, "Snapshot list:")?;
        out.write_all(table(&all).as_bytes())?;
    }
    Ok(())
}

/// The snapshots, a line each, with headings; times are local.
pub fn table(all: &[Snapshot]) -> String {
    let zone = jiff::tz::TimeZone::system();
    let mut out = line("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for snapshot in all {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let at = jiff::Timestamp::from_second(i64::from(snapshot.date_sec)).unwrap_or_default();
        let seconds = snapshot.vm_clock_nsec / 1_000_000_000;
        let millis = snapshot.vm_clock_nsec / 1_000_000 % 1000;
        out += &line(
            &text(&snapshot.id),
            &text(&snapshot.name),
            &human(snapshot.vm_state_bytes),
            &at.to_zoned_datetime(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
            &format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60),
            &snapshot.icount.map_or("--".to_owned(), |count| count.to_string()),
        );
    }
    out
}

fn line(id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}

fn now() -> SnapshotTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SnapshotTime {
        // The field of the format ends in 2106.
        date_sec: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        date_nsec: since.subsec_nanos(),
        vm_clock_nsec: 0,
    }
}
