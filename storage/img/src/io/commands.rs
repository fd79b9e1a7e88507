//! The table of `io`'s commands, and those that are not requests.

use std::ffi::OsString;
use std::io::{Write, stdout};
use std::time::Duration;

use block::{CacheMode, Disk, ExtentKind, Preallocation};

use super::report::amount;
use super::requests::{discard, read, reason, write};
use super::{Next, Session};
use crate::error::{ImgError, host};
use crate::getopt::{self, Opt, Parsed, flag, opt};
use crate::layers;
use crate::open::{self, Access, Named};
use crate::size;

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

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::Error(format!("the answer cannot be written: {}", host(&error)))
    }
}

/// One command.
struct Entry {
    names: &'static [&'static str],
    args: &'static str,
    about: &'static str,
    options: &'static [Opt],
    run: Run,
}

/// What a command needs.
enum Run {
    /// The image, opened for reading at least. `true`: for writing.
    OnDisk(bool, fn(&Disk, &Parsed, &[&str]) -> Result<(), Failure>),
    /// The same; failures are printed and do not count.
    Async(bool, fn(&Disk, &Parsed, &[&str]) -> Result<(), Failure>),
    /// The session.
    OnSession(fn(&mut Session, &Parsed, &[&str]) -> Result<Next, Failure>),
}

const READ: &[Opt] = &[
    flag('a', &["ignored-a"], ""),
    flag('b', &["vm-state"], ""),
    flag('C', &["machine"], ""),
    flag('i', &["ignored-i"], ""),
    flag('p', &["ignored-p"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('v', &["verbose"], ""),
    opt('P', &["pattern"], "BYTE", ""),
    opt('s', &["pattern-offset"], "OFFSET", ""),
    opt('l', &["pattern-length"], "LENGTH", ""),
];
const WRITE: &[Opt] = &[
    flag('b', &["vm-state"], ""),
    flag('c', &["compressed"], ""),
    flag('C', &["machine"], ""),
    flag('f', &["fua"], ""),
    flag('i', &["ignored-i"], ""),
    flag('n', &["no-fallback"], ""),
    flag('p', &["ignored-p"], ""),
    flag('q', &["quiet"], ""),
    flag('r', &["ignored-r"], ""),
    flag('u', &["unmap"], ""),
    flag('z', &["zeroes"], ""),
    opt('P', &["pattern"], "BYTE", ""),
    opt('s', &["source"], "FILE", ""),
];
const DISCARD: &[Opt] = &[flag('C', &["machine"], ""), flag('q', &["quiet"], "")];
const OPEN: &[Opt] = &[
    flag('r', &["read-only"], ""),
    flag('n', &["nocache"], ""),
    flag('k', &["ignored-k"], ""),
    flag('U', &["force-share"], ""),
    opt('t', &["cache"], "CACHE", ""),
    opt('d', &["ignored-d"], "DISCARD", ""),
    opt('o', &["options"], "OPTIONS", ""),
];
const REOPEN: &[Opt] = &[flag('r', &["read-only"], ""), flag('w', &["write"], ""), opt('c', &["cache"], "CACHE", "")];

#[rustfmt::skip] // a command per line
const COMMANDS: &[Entry] = &[
    Entry { names: &["abort"], args: "", about: "simulate a program crash using abort(3)", options: &[], run: Run::OnSession(abort) },
    Entry { names: &["aio_flush"], args: "", about: "completes all outstanding aio requests", options: &[], run: Run::OnDisk(false, nothing) },
    Entry { names: &["aio_read"], args: "[-Ciqrv] [-P pattern] off len [len..]", about: "asynchronously reads a number of bytes", options: READ, run: Run::Async(false, read) },
    Entry { names: &["aio_write"], args: "[-Cfiqruz] [-P pattern] off len [len..]", about: "asynchronously writes a number of bytes", options: WRITE, run: Run::Async(true, write) },
    Entry { names: &["alloc", "a"], args: "offset [count]", about: "checks if offset is allocated in the file", options: &[], run: Run::OnDisk(false, alloc) },
    Entry { names: &["close", "c"], args: "", about: "close the current open file", options: &[], run: Run::OnSession(close) },
    Entry { names: &["discard", "d"], args: "[-Cq] off len", about: "discards a number of bytes at a specified offset", options: DISCARD, run: Run::OnDisk(true, discard) },
    Entry { names: &["flush", "f"], args: "", about: "flush all in-core file state to disk", options: &[], run: Run::OnDisk(false, flush) },
    Entry { names: &["help", "?"], args: "[command]", about: "help for one or all commands", options: &[], run: Run::OnSession(help) },
    Entry { names: &["info", "i"], args: "", about: "prints information about the current file", options: &[], run: Run::OnSession(info) },
    Entry { names: &["length", "l"], args: "", about: "gets the length of the current file", options: &[], run: Run::OnDisk(false, length) },
    Entry { names: &["map"], args: "", about: "prints the allocated areas of a file", options: &[], run: Run::OnDisk(false, map) },
    Entry { names: &["open", "o"], args: "[-rnkU] [-t cache] [-d discard] [-o options] [path]", about: "open the file specified by path", options: OPEN, run: Run::OnSession(open_image) },
    Entry { names: &["quit", "q"], args: "", about: "exit the program", options: &[], run: Run::OnSession(quit) },
    Entry { names: &["read", "r"], args: "[-abCqrv] [-P pattern [-s off] [-l len]] off len", about: "reads a number of bytes at a specified offset", options: READ, run: Run::OnDisk(false, read) },
    Entry { names: &["readv", "rv"], args: "[-Cqrv] [-P pattern] off len [len..]", about: "reads a number of bytes at a specified offset", options: READ, run: Run::OnDisk(false, read) },
    Entry { names: &["reopen"], args: "[(-r|-w)] [-c cache]", about: "reopens an image with new options", options: REOPEN, run: Run::OnSession(reopen) },
    Entry { names: &["sleep"], args: "", about: "waits for the given value in milliseconds", options: &[], run: Run::OnSession(sleep) },
    Entry { names: &["truncate", "t"], args: "[-m prealloc_mode] off", about: "truncates the current file at the given offset", options: &[opt('m', &["mode"], "MODE", "")], run: Run::OnDisk(true, truncate) },
    Entry { names: &["write", "w"], args: "[-bcCfnqruz] [-P pattern | -s source_file] off len", about: "writes a number of bytes at a specified offset", options: WRITE, run: Run::OnDisk(true, write) },
    Entry { names: &["writev", "wv"], args: "[-Cfqr] [-P pattern] off len [len..]", about: "writes a number of bytes at a specified offset", options: WRITE, run: Run::OnDisk(true, write) },
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
    pub fn command(&mut self, line: &str) -> Result<Next, ImgError> {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        let Some(name) = words.next() else { return Ok(Next::Go) };
        let Some(entry) = COMMANDS.iter().find(|entry| entry.names.contains(&name)) else {
            eprintln!("command \"{name}\" not found");
            return Ok(Next::Failed);
        };
        let args: Vec<OsString> = words.map(OsString::from).collect();
        let outcome = match getopt::parse(entry.name(), entry.options, args) {
            Ok(parsed) => self.run(entry, &parsed),
            Err(error) => {
                eprintln!("{error}");
                Err(Failure::Usage)
            }
        };
        let next = match outcome {
            Ok(next) => next,
            Err(Failure::Silent) => Next::Failed,
            Err(Failure::Usage) => {
                println!("{}", entry.usage());
                Next::Failed
            }
            Err(Failure::Said(text)) => {
                println!("{text}");
                Next::Failed
            }
            Err(Failure::Error(text)) => {
                eprintln!("{text}");
                Next::Failed
            }
        };
        stdout().flush()?;
        Ok(if matches!(entry.run, Run::Async(..)) { Next::Go } else { next })
    }

    fn run(&mut self, entry: &Entry, parsed: &Parsed) -> Result<Next, Failure> {
        let words: Vec<&str> = parsed.words.iter().filter_map(|word| word.to_str()).collect();
        match entry.run {
            Run::OnSession(run) => run(self, parsed, &words),
            Run::OnDisk(write, run) | Run::Async(write, run) => {
                let Some(disk) = &self.disk else {
                    return Err(Failure::Error("no file open, try 'help open'".to_owned()));
                };
                if write && !self.access.write {
                    return Err(Failure::Error(format!("{}: Block node is read-only", crate::program())));
                }
                run(disk, parsed, &words).map(|()| Next::Go)
            }
        }
    }
}

/// A size in a command.
pub fn size_of(text: &str) -> Result<u64, Failure> {
    size::parse(text).ok().filter(|bytes| i64::try_from(*bytes).is_ok()).ok_or_else(|| {
        Failure::Said(format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"))
    })
}

fn nothing(_: &Disk, _: &Parsed, _: &[&str]) -> Result<(), Failure> {
    Ok(())
}

fn abort(_: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    std::process::abort()
}

fn quit(_: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    Ok(Next::Quit)
}

fn sleep(_: &mut Session, _: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    let [millis] = words else { return Err(Failure::Usage) };
    let millis = millis.parse().map_err(|_| Failure::Said(format!("{millis} is no number of milliseconds")))?;
    std::thread::sleep(Duration::from_millis(millis));
    Ok(Next::Go)
}

fn flush(disk: &Disk, _: &Parsed, _: &[&str]) -> Result<(), Failure> {
    disk.flush().map_err(|error| Failure::Said(format!("flush failed: {}", reason(&error))))
}

fn length(disk: &Disk, _: &Parsed, _: &[&str]) -> Result<(), Failure> {
    println!("{}", amount(disk.size_bytes() as f64));
    Ok(())
}

fn truncate(disk: &Disk, parsed: &Parsed, words: &[&str]) -> Result<(), Failure> {
    let [to] = words else { return Err(Failure::Usage) };
    let room = match parsed.value("mode").map_err(|_| Failure::Usage)? {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => return Err(Failure::Said(format!("invalid preallocation mode '{other}'"))),
    };
    disk.resize(size_of(to)?, true, room).map_err(|error| Failure::Error(reason(&error)))
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

fn map(disk: &Disk, _: &Parsed, _: &[&str]) -> Result<(), Failure> {
    let mut out = stdout().lock();
    for (at, bytes, allocated) in allocated_runs(disk, 0, disk.size_bytes())? {
        let state = if allocated { "    allocated" } else { "not allocated" };
        let (length, offset) = (amount(bytes as f64), amount(at as f64));
        writeln!(out, "{length} ({bytes:#x}) bytes {state} at offset {offset} ({at:#x})")?;
    }
    Ok(())
}

fn alloc(disk: &Disk, _: &Parsed, words: &[&str]) -> Result<(), Failure> {
    let (offset, count) = match words {
        [offset] => (size_of(offset)?, 512),
        [offset, count] => (size_of(offset)?, size_of(count)?),
        _ => return Err(Failure::Usage),
    };
    let end = offset.saturating_add(count).min(disk.size_bytes());
    let runs = allocated_runs(disk, offset, end)?;
    let sum: u64 = runs.iter().filter(|(_, _, here)| *here).map(|(_, bytes, _)| bytes).sum();
    println!("{sum}/{} bytes allocated at offset {}", end.saturating_sub(offset), amount(offset as f64));
    Ok(())
}

fn info(session: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
    let (Some(disk), Some(named)) = (&session.disk, &session.named) else {
        return Err(Failure::Error("no file open, try 'help open'".to_owned()));
    };
    let format = layers::format_of(named).map_err(|error| Failure::Error(error.to_string()))?;
    let said = crate::info::of_disk(disk, format).map_err(|error| Failure::Error(reason(&error)))?;
    print!("{said}");
    Ok(Next::Go)
}

fn close(session: &mut Session, _: &Parsed, _: &[&str]) -> Result<Next, Failure> {
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
        _ => return Err(Failure::Usage),
    };
    let label = words.first().copied().unwrap_or_default();
    let secrets = session.secrets.clone();
    let opened = named.and_then(|named| session.open(named.with(secrets), access));
    opened
        .map(|()| Next::Go)
        .map_err(|error| Failure::Error(format!("{}: {}", crate::program(), super::cannot_open(label, error))))
}

fn reopen(session: &mut Session, parsed: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    if !words.is_empty() || (parsed.has("read-only") && parsed.has("write")) {
        return Err(Failure::Usage);
    }
    let write = (session.access.write || parsed.has("write")) && !parsed.has("read-only");
    let cache = cache_of(parsed.value("cache").map_err(|_| Failure::Usage)?, session.access.cache)?;
    let done = session.reopen(write, cache);
    done.map(|()| Next::Go).map_err(|error| Failure::Error(format!("{}: {error}", crate::program())))
}

fn help(_: &mut Session, _: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    let mut out = stdout().lock();
    match words {
        [] => {
            for entry in COMMANDS {
                writeln!(out, "{}", entry.usage())?;
            }
            writeln!(out, "\nUse 'help commandname' for extended help.")?;
        }
        [name, ..] => match COMMANDS.iter().find(|entry| entry.names.contains(name)) {
            Some(entry) => writeln!(out, "{}", entry.usage())?,
            None => {
                writeln!(out, "command {name} not found")?;
                return Err(Failure::Silent);
            }
        },
    }
    Ok(Next::Go)
}
