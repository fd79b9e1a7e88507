//! `map`: where each part of a disk comes from.

use std::io::Write;

use block::{ChainExtent, Disk, ExtentKind};

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed, opt};
use crate::layers;
use crate::open::{self, Access, Named};
use crate::output::stdout;

/// `map`.
pub const COMMAND: Command = Command {
    name: "map",
    about: "Dump the map of an image: which file holds which part of the disk",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    FORMAT,
    IMAGE_OPTS,
    opt('s', &["start-offset"], "OFFSET", "where to start"),
    opt('l', &["max-length"], "LENGTH", "how far to go"),
    FORCE_SHARE,
    OBJECT,
    OUTPUT,
    JSON,
];

/// A run of the disk of which all is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    file: usize,
    offset: Option<u64>,
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let json = parsed.json()?;
    let number = |name: &'static str, what: &'static str| {
        let text = parsed.value(name)?;
        text.map(|text| ImgError::size(text, what)).transpose()
    };
    let start = number("start-offset", "start offset")?.unwrap_or(0);
    let length = number("max-length", "max length")?;
    let named = Named::of(parsed, file, "format")?;
    let (disk, names) = open::disk_with_names(&named, Access::read(parsed))?;
    let end = length.map_or(disk.size_bytes(), |length| start.saturating_add(length).min(disk.size_bytes()));
    let mut out = std::io::BufWriter::new(stdout());
    if json {
        write!(out, "[")?;
    } else {
        writeln!(out, "Offset          Length          Mapped to       File")?;
    }
    let mut first = true;
    let shift = layers::shift(&named.spec.file);
    let printed = walk(&disk, start, end, &mut |entry| {
        let mut entry = *entry;
        if entry.depth == 0 {
            entry.offset = entry.offset.map(|offset| offset + shift);
        }
        let entry = &entry;
        let last = entry.start + entry.length >= end;
        if json {
            json_line(&mut out, entry, first, last)?;
        } else {
            human_line(&mut out, entry, &names)?;
        }
        first = false;
        Ok(())
    });
    // What was found before an error has its place in the output.
    out.flush()?;
    printed?;
    Ok(0)
}

/// Calls `each` for every run from `start` to `end`, at least once.
fn walk(
    disk: &Disk,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(&Entry) -> Result<(), ImgError>,
) -> Result<(), ImgError> {
    let mut pending = Entry { start, ..Entry::default() };
    let mut at = start;
    while at < end {
        let found = disk.extent(at, end - at).map_err(|source| ImgError::BlockStatus { source })?;
        let entry = Entry::new(at, found);
        at += entry.length;
        if pending.length == 0 {
            pending = entry;
        } else if pending.continues_in(&entry) {
            pending.length += entry.length;
        } else {
            each(&pending)?;
            pending = entry;
        }
    }
    each(&pending)
}

impl Entry {
    fn new(start: u64, found: ChainExtent) -> Entry {
        let ChainExtent { depth, extent } = found;
        let present = extent.kind != ExtentKind::Below && !extent.marked;
        Entry {
            start,
            length: extent.bytes,
            // Of what nobody holds, the last layer that could have held it is named.
            depth: if present { depth } else { depth.saturating_sub(1) },
            present,
            zero: extent.kind != ExtentKind::Data,
            data: (extent.kind == ExtentKind::Data && !extent.marked) || extent.hole,
            compressed: extent.compressed,
            file: extent.file,
            offset: extent.host.filter(|_| !extent.marked),
        }
    }

    fn continues_in(&self, next: &Entry) -> bool {
        let place = match (self.offset, next.offset) {
            (Some(here), Some(there)) => here.checked_add(self.length) == Some(there),
            (None, None) => true,
            _ => false,
        };
        let kind = |e: &Entry| (e.depth, e.present, e.zero, e.data, e.compressed, e.file);
        place && kind(self) == kind(next)
    }
}

fn json_line(out: &mut impl Write, entry: &Entry, first: bool, last: bool) -> Result<(), ImgError> {
    let Entry { start, length, depth, present, zero, data, compressed, offset, file: _ } = entry;
    let offset = offset.map(|offset| format!(", \"offset\": {offset}")).unwrap_or_default();
    write!(
        out,
        "{}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}{}",
        if first { "" } else { ",\n" },
        if last { "]\n" } else { "" }
    )?;
    Ok(())
}

fn human_line(out: &mut impl Write, entry: &Entry, names: &[Vec<String>]) -> Result<(), ImgError> {
    if !entry.data || entry.zero {
        return Ok(());
    }
    let Some(offset) = entry.offset else {
        return Err(ImgError::Plain(Rule::MapNotPlain));
    };
    let name = names.get(entry.depth).and_then(|files| files.get(entry.file)).map_or("", String::as_str);
    writeln!(out, "{:<16}{:<16}{:<16}{name}", hex(entry.start), hex(entry.length), hex(offset))?;
    Ok(())
}

/// C's `%#llx`: no prefix for 0.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}
