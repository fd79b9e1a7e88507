//! The table of `io`'s commands, and those that are not requests.

use std::ffi::OsString;
use std::io::Write;
use std::sync::Arc;

use block::{CacheMode, Disk, ExtentKind, Preallocation};

use super::breaks::{aio_flush, remove_break, resume, set_break, sigraise, sleep, wait_break};
use super::report::amount;
use super::requests::{Request, discard, read, readv, reason, write, writev};
use super::{Next, Session};
use crate::error::ImgError;
use crate::getopt::{self, Opt, Parsed, flag, opt};
use crate::layers;
use crate::open::{self, Access, Named};
use crate::output::{self, say, say_line, stdout};
use crate::size::{self, SizeError};

/// Why a command did not do what it was asked.
pub enum Failure {
    /// Print how it is used.
    Usage,
    /// Print this where answers go.
    Said(String),
    /// Print this where errors go.
    Error(String),
    /// It has been printed.
    Silent,
}

/// One command.
pub(super) struct Entry {
    names: &'static [&'static str],
    /// How many words may follow, options among them.
    counts: (usize, usize),
    args: &'static str,
    about: &'static str,
    options: &'static [Opt],
    run: Run,
}

/// Reads a request from a command's words.
type ReadRequest = fn(&'static str, &Parsed, &[&str]) -> Result<Request, Failure>;

/// A command for the session and the image that is open.
type OnOpen = fn(&mut Session, &Arc<Disk>, &[&str]) -> Result<(), Failure>;

/// What a command needs.
enum Run {
    /// The image; nothing is waited for.
    Look(fn(&Disk, &[&str]) -> Result<(), Failure>),
    /// The image, opened for reading at least. `true`: for writing.
    OnDisk(bool, fn(&Disk, &Parsed, &[&str]) -> Result<(), Failure>),
    /// The same, for a request with its verb in failures.
    Request(bool, &'static str, ReadRequest),
    /// The same; it goes on while the next commands run, and its failure does not count.
    Async(bool, &'static str, ReadRequest),
    /// The session, with an image.
    OnOpen(OnOpen),
    /// The session.
    OnSession(fn(&mut Session, &Parsed, &[&str]) -> Result<Next, Failure>),
}

const READ: &[Opt] = &[
    flag('b', &["vm-state"], ""),
    flag('C', &["machine"], ""),
    flag('p', &["ignored-p"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('v', &["verbose"], ""),
    opt('P', &["pattern"], "BYTE", ""),
    opt('s', &["pattern-offset"], "OFFSET", ""),
    opt('l', &["pattern-length"], "LENGTH", ""),
];
const READV: &[Opt] = &[
    flag('C', &["machine"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('v', &["verbose"], ""),
    opt('P', &["pattern"], "BYTE", ""),
];
const WRITE: &[Opt] = &[
    flag('b', &["vm-state"], ""),
    flag('c', &["compressed"], ""),
    flag('C', &["machine"], ""),
    flag('f', &["fua"], ""),
    flag('n', &["no-fallback"], ""),
    flag('p', &["ignored-p"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('u', &["unmap"], ""),
    flag('z', &["zeroes"], ""),
    opt('P', &["pattern"], "BYTE", ""),
    opt('s', &["source"], "FILE", ""),
];
const WRITEV: &[Opt] = &[
    flag('C', &["machine"], ""),
    flag('f', &["fua"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    opt('P', &["pattern"], "BYTE", ""),
];
const AIO_READ: &[Opt] = &[
    flag('C', &["machine"], ""),
    flag('i', &["invalid"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('v', &["verbose"], ""),
    opt('P', &["pattern"], "BYTE", ""),
];
const AIO_WRITE: &[Opt] = &[
    flag('C', &["machine"], ""),
    flag('f', &["fua"], ""),
    flag('i', &["invalid"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('u', &["unmap"], ""),
    flag('z', &["zeroes"], ""),
    opt('P', &["pattern"], "BYTE", ""),
];
const DISCARD: &[Opt] = &[flag('C', &["machine"], ""), flag('q', &["quiet"], "")];
const OPEN: &[Opt] = &[
    flag('r', &["read-only"], ""),
    flag('s', &["snapshot"], ""),
    flag('n', &["nocache"], ""),
    flag('k', &["ignored-k"], ""),
    flag('U', &["force-share"], ""),
    opt('t', &["cache"], "CACHE", ""),
    opt('d', &["ignored-d"], "DISCARD", ""),
    opt('o', &["options"], "OPTIONS", ""),
];
const REOPEN: &[Opt] = &[flag('r', &["read-only"], ""), flag('w', &["write"], ""), opt('c', &["cache"], "CACHE", "")];

/// As many words as there are.
const ANY: usize = usize::MAX;

#[rustfmt::skip] // a command per line
const COMMANDS: &[Entry] = &[
    Entry { names: &["abort"], counts: (0, 0), args: "", about: "simulate a program crash using abort(3)", options: &[], run: Run::OnSession(abort) },
    Entry { names: &["aio_flush"], counts: (0, 0), args: "", about: "completes all outstanding aio requests", options: &[], run: Run::OnOpen(aio_flush) },
    Entry { names: &["aio_read"], counts: (2, ANY), args: "[-Ciqrv] [-P pattern] off len [len..]", about: "asynchronously reads a number of bytes", options: AIO_READ, run: Run::Async(false, "readv", readv) },
    Entry { names: &["aio_write"], counts: (2, ANY), args: "[-Cfiqruz] [-P pattern] off len [len..]", about: "asynchronously writes a number of bytes", options: AIO_WRITE, run: Run::Async(true, "aio_write", writev) },
    Entry { names: &["alloc", "a"], counts: (1, 2), args: "offset [count]", about: "checks if offset is allocated in the file", options: &[], run: Run::Look(alloc) },
    Entry { names: &["break"], counts: (2, 2), args: "event tag", about: "sets a breakpoint on event and tags the stopped request as tag", options: &[], run: Run::OnOpen(set_break) },
    Entry { names: &["close", "c"], counts: (0, 0), args: "", about: "close the current open file", options: &[], run: Run::OnSession(close) },
    Entry { names: &["discard", "d"], counts: (2, ANY), args: "[-Cq] off len", about: "discards a number of bytes at a specified offset", options: DISCARD, run: Run::OnDisk(true, discard) },
    Entry { names: &["flush", "f"], counts: (0, 0), args: "", about: "flush all in-core file state to disk", options: &[], run: Run::OnDisk(false, flush) },
    Entry { names: &["help", "?"], counts: (0, 1), args: "[command]", about: "help for one or all commands", options: &[], run: Run::OnSession(help) },
    Entry { names: &["info", "i"], counts: (0, 0), args: "", about: "prints information about the current file", options: &[], run: Run::OnSession(info) },
    Entry { names: &["length", "l"], counts: (0, 0), args: "", about: "gets the length of the current file", options: &[], run: Run::Look(length) },
    Entry { names: &["map"], counts: (0, 0), args: "", about: "prints the allocated areas of a file", options: &[], run: Run::Look(map) },
    Entry { names: &["open", "o"], counts: (0, ANY), args: "[-rsnkU] [-t cache] [-d discard] [-o options] [path]", about: "open the file specified by path", options: OPEN, run: Run::OnSession(open_image) },
    Entry { names: &["quit", "q"], counts: (0, ANY), args: "", about: "exit the program", options: &[], run: Run::OnSession(quit) },
    Entry { names: &["read", "r"], counts: (2, ANY), args: "[-abCqrv] [-P pattern [-s off] [-l len]] off len", about: "reads a number of bytes at a specified offset", options: READ, run: Run::Request(false, "read", read) },
    Entry { names: &["readv", "rv"], counts: (2, ANY), args: "[-Cqrv] [-P pattern] off len [len..]", about: "reads a number of bytes at a specified offset", options: READV, run: Run::Request(false, "readv", readv) },
    Entry { names: &["remove_break"], counts: (1, 1), args: "tag", about: "remove a breakpoint by tag", options: &[], run: Run::OnOpen(remove_break) },
    Entry { names: &["reopen"], counts: (0, ANY), args: "[(-r|-w)] [-c cache]", about: "reopens an image with new options", options: REOPEN, run: Run::OnSession(reopen) },
    Entry { names: &["resume"], counts: (1, 1), args: "tag", about: "resumes the request tagged as tag", options: &[], run: Run::OnOpen(resume) },
    Entry { names: &["sigraise"], counts: (1, 1), args: "signal", about: "raises a signal", options: &[], run: Run::OnSession(sigraise) },
    Entry { names: &["sleep"], counts: (1, 1), args: "", about: "waits for the given value in milliseconds", options: &[], run: Run::OnSession(sleep) },
    Entry { names: &["truncate", "t"], counts: (1, 3), args: "[-m prealloc_mode] off", about: "truncates the current file at the given offset", options: &[opt('m', &["mode"], "MODE", "")], run: Run::OnDisk(true, truncate) },
    Entry { names: &["wait_break"], counts: (1, 1), args: "tag", about: "waits for the suspension of a request", options: &[], run: Run::OnOpen(wait_break) },
    Entry { names: &["write", "w"], counts: (2, ANY), args: "[-bcCfnqruz] [-P pattern | -s source_file] off len", about: "writes a number of bytes at a specified offset", options: WRITE, run: Run::Request(true, "write", write) },
    Entry { names: &["writev", "wv"], counts: (2, ANY), args: "[-Cfqr] [-P pattern] off len [len..]", about: "writes a number of bytes at a specified offset", options: WRITEV, run: Run::Request(true, "writev", writev) },
];

impl Entry {
    fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or_default()
    }

    fn usage(&self) -> String {
        let space = if self.args.is_empty() { "" } else { " " };
        format!("{}{space}{} -- {}", self.name(), self.args, self.about)
    }
}

impl Session {
    /// Runs one line.
    pub fn command(&mut self, line: &str) -> Next {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        let Some(name) = words.next() else { return Next::Go };
        let Some(entry) = COMMANDS.iter().find(|entry| entry.names.contains(&name)) else {
            eprintln!("command \"{name}\" not found");
            return Next::Failed;
        };
        let args: Vec<OsString> = words.map(OsString::from).collect();
        let next = match self.checked(entry, args) {
            Ok(next) => next,
            Err(failure) => {
                failure.print_for(entry);
                Next::Failed
            }
        };
        output::flush();
        next
    }

    fn checked(&mut self, entry: &Entry, args: Vec<OsString>) -> Result<Next, Failure> {
        if self.disk.is_none() && !matches!(entry.run, Run::OnSession(_)) {
            return Err(Failure::Error("no file open, try 'help open'".to_owned()));
        }
        let (min, max) = entry.counts;
        if !(min..=max).contains(&args.len()) {
            let expected = match max {
                ANY => format!("at least {min}"),
                _ if min == max => min.to_string(),
                _ => format!("between {min} and {max}"),
            };
            let (count, name) = (args.len(), entry.name());
            let text = format!("bad argument count {count} to {name}, expected {expected} arguments");
            return Err(Failure::Error(text));
        }
        // A command without options takes what looks like one for a word.
        let words_only = entry.options.is_empty().then(|| OsString::from("--"));
        let args = words_only.into_iter().chain(args).collect();
        let parsed = getopt::parse(entry.name(), entry.options, args).map_err(|error| {
            match &error {
                ImgError::Option { fault, .. } => eprintln!("{}: {fault}", entry.name()),
                other => eprintln!("{other}"),
            }
            Failure::Usage
        })?;
        self.run(entry, &parsed)
    }

    fn run(&mut self, entry: &Entry, parsed: &Parsed) -> Result<Next, Failure> {
        let words: Vec<&str> = parsed.words.iter().filter_map(|word| word.to_str()).collect();
        let disk = match (&entry.run, &self.disk) {
            (Run::OnSession(run), _) => return run(self, parsed, &words),
            (_, Some(disk)) => disk.clone(),
            (_, None) => return Err(Failure::Silent),
        };
        let writes = matches!(entry.run, Run::OnDisk(true, _) | Run::Request(true, ..) | Run::Async(true, ..));
        if writes && !self.access.write {
            return Err(Failure::Error(format!("{}: Block node is read-only", crate::program())));
        }
        let done = match entry.run {
            Run::Look(run) => run(&disk, &words),
            Run::OnDisk(_, run) => self.background.deliver().and_then(|()| run(&disk, parsed, &words)),
            Run::Request(_, verb, read) => {
                self.background.deliver()?;
                read(verb, parsed, &words)?.run(&disk)?.print()
            }
            Run::Async(writes, verb, read) => {
                let request = read(verb, parsed, &words)?;
                if parsed.has("invalid") {
                    say_line(format_args!("injecting invalid {} request", if writes { "write" } else { "read" }));
                    return Ok(Next::Go);
                }
                self.background.start(&disk, request)
            }
            Run::OnOpen(run) => run(self, &disk, &words),
            Run::OnSession(run) => return run(self, parsed, &words),
        };
        done.map(|()| Next::Go)
    }

    /// Waits for what is under way before the image is closed.
    fn finish(&mut self) -> Result<(), Failure> {
        match &self.disk {
            Some(disk) => self.background.finish(disk),
            None => Ok(()),
        }
    }

    /// The last command is over. A request that waits at a breakpoint fails the run, and goes on.
    pub fn end(&mut self) -> Result<(), Failure> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let finished = self.background.finish(disk);
        if let Err(failure) = &finished {
            failure.print();
        }
        self.background.end(disk)?;
        finished
    }
}

impl Failure {
    /// Prints why the command did not do what it was asked.
    fn print_for(&self, entry: &Entry) {
        match self {
            Failure::Usage => say_line(entry.usage()),
            other => other.print(),
        }
    }

    /// Prints what there is to say without the command.
    pub fn print(&self) {
        match self {
            Failure::Said(text) => say_line(text),
            Failure::Error(text) => eprintln!("{text}"),
            Failure::Usage | Failure::Silent => {}
        }
    }
}

/// A size in a command.
pub fn size_of(text: &str) -> Result<u64, Failure> {
    let refused = match size::parse(text) {
        Ok(bytes) if i64::try_from(bytes).is_ok() => return Ok(bytes),
        Ok(_) | Err(SizeError::Range) => "argument too large",
        Err(SizeError::Text) => "non-numeric argument, or extraneous/unrecognized suffix",
    };
    Err(Failure::Said(format!("Parsing error: {refused} -- {text}")))
}

fn abort(_: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    std::process::abort()
}

fn quit(_: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    Ok(Next::Quit)
}

fn flush(disk: &Disk, _: &Parsed, _: &[&str]) -> Result<(), Failure> {
    disk.flush().map_err(|error| Failure::Said(format!("flush failed: {}", reason(&error))))
}

fn length(disk: &Disk, _: &[&str]) -> Result<(), Failure> {
    say_line(amount(disk.size_bytes() as f64));
    Ok(())
}

fn truncate(disk: &Disk, parsed: &Parsed, words: &[&str]) -> Result<(), Failure> {
    let refused = |text: &str| Err(Failure::Error(format!("{}: {text}", crate::program())));
    let [to, ..] = words else { return Err(Failure::Usage) };
    let room = match parsed.value("mode").map_err(|_| Failure::Usage)? {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => return refused(&format!("Invalid preallocation mode '{other}'")),
    };
    let to_bytes = size_of(to)?;
    let shrinks_into_room = room != Preallocation::Off && to_bytes < disk.size_bytes();
    match disk.qcow2() {
        Some(_) if !to_bytes.is_multiple_of(512) => return refused("The new size must be a multiple of 512"),
        Some(_) if shrinks_into_room => return refused("Preallocation can't be used for shrinking an image"),
        None if shrinks_into_room => return refused("Cannot use preallocation for shrinking files"),
        None if room == Preallocation::Metadata => return refused("Unsupported preallocation mode: metadata"),
        _ => {}
    }
    disk.resize(to_bytes, true, room).map_err(|error| Failure::Error(reason(&error)))
}

/// The top image's runs: allocated or not.
fn allocated_runs(disk: &Disk, start: u64, end: u64) -> Result<Vec<(u64, u64, bool)>, Failure> {
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = start;
    while at < end {
        let found =
            disk.extent(at, end - at).map_err(|error| Failure::Said(format!("map failed: {}", reason(&error))))?;
        let here = found.depth == 0 && found.extent.kind != ExtentKind::Below;
        match runs.last_mut() {
            Some((_, bytes, last)) if *last == here => *bytes += found.extent.bytes,
            _ => runs.push((at, found.extent.bytes, here)),
        }
        at += found.extent.bytes;
    }
    Ok(runs)
}

fn map(disk: &Disk, _: &[&str]) -> Result<(), Failure> {
    let mut out = stdout();
    for (at, bytes, allocated) in allocated_runs(disk, 0, disk.size_bytes())? {
        let state = if allocated { "    allocated" } else { "not allocated" };
        let (length, offset) = (amount(bytes as f64), amount(at as f64));
        let _ = writeln!(out, "{length} ({bytes:#x}) bytes {state} at offset {offset} ({at:#x})");
    }
    Ok(())
}

fn alloc(disk: &Disk, words: &[&str]) -> Result<(), Failure> {
    let (offset, count) = match words {
        [offset] => (size_of(offset)?, 512),
        [offset, count] => (size_of(offset)?, size_of(count)?),
        _ => return Err(Failure::Usage),
    };
    let end = offset.saturating_add(count).min(disk.size_bytes());
    let runs = allocated_runs(disk, offset, end)?;
    let sum: u64 = runs.iter().filter(|(_, _, here)| *here).map(|(_, bytes, _)| bytes).sum();
    say_line(format_args!("{sum}/{} bytes allocated at offset {}", end.saturating_sub(offset), amount(offset as f64)));
    Ok(())
}

fn info(session: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    let (Some(disk), Some(named)) = (&session.disk, &session.named) else {
        return Err(Failure::Error("no file open, try 'help open'".to_owned()));
    };
    let format = layers::format_of(named).map_err(|error| Failure::Error(error.to_string()))?;
    let said = crate::info::of_disk(disk, format).map_err(|error| Failure::Error(reason(&error)))?;
    say(said);
    Ok(Next::Go)
}

fn close(session: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    if session.disk.is_none() {
        return Err(Failure::Error("no file open, try 'help open'".to_owned()));
    }
    session.finish()?;
    session.close().map(|()| Next::Go).map_err(|error| Failure::Error(error.to_string()))
}

fn cache_of(text: Option<&str>, default: CacheMode) -> Result<CacheMode, Failure> {
    open::cache_named("", text, default)
        .map_err(|_| Failure::Error(format!("Invalid cache option: {}", text.unwrap_or(""))))
}

fn open_image(session: &mut Session, parsed: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    if session.disk.is_some() {
        return Err(Failure::Error("file open already, try 'help close'".to_owned()));
    }
    let value = |name| parsed.value(name).map_err(|_| Failure::Usage);
    let cache = if parsed.has("nocache") { Some("none") } else { value("cache")? };
    let access = Access {
        write: !parsed.has("read-only"),
        share: parsed.has("force-share"),
        cache: cache_of(cache, CacheMode::Writeback)?,
    };
    let named = match (words, value("options")?) {
        ([file], None) => Named::new(OsString::from(file).as_os_str(), false, None),
        ([], Some(options)) => Named::new(OsString::from(options).as_os_str(), true, None),
        ([file], Some(options)) => Named::with_options(OsString::from(file).as_os_str(), options),
        _ => return Err(Failure::Usage),
    };
    let label = words.first().copied();
    let secrets = session.secrets.clone();
    let opened = named.and_then(|named| session.open(named.with(secrets), access, parsed.has("snapshot")));
    opened
        .map(|()| Next::Go)
        .map_err(|error| Failure::Error(format!("{}: {}", crate::program(), super::cannot_open(label, error))))
}

fn reopen(session: &mut Session, parsed: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    if !words.is_empty() || (parsed.has("read-only") && parsed.has("write")) {
        return Err(Failure::Usage);
    }
    session.finish()?;
    let write = (session.access.write || parsed.has("write")) && !parsed.has("read-only");
    let cache = cache_of(parsed.value("cache").map_err(|_| Failure::Usage)?, session.access.cache)?;
    let done = session.reopen(write, cache);
    done.map(|()| Next::Go).map_err(|error| Failure::Error(format!("{}: {error}", crate::program())))
}

fn help(_: &mut Session, _: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    let text = match words {
        [] => {
            let lines: String = COMMANDS.iter().map(|entry| entry.usage() + "\n").collect();
            lines + "\nUse 'help commandname' for extended help.\n"
        }
        [name, ..] => match COMMANDS.iter().find(|entry| entry.names.contains(name)) {
            Some(entry) => entry.usage() + "\n",
            None => return Err(Failure::Said(format!("command {name} not found"))),
        },
    };
    say(text);
    Ok(Next::Go)
}
