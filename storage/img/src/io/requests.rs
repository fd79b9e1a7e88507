//! The commands of `io` that read, write, zero and discard.

use std::io::Read;
use std::time::{Duration, Instant};

use block::{BlockError, Disk, ErrorKind};

use super::commands::{Failure, size_of};
use super::report::{Done, dump};
use crate::error::{host, why};
use crate::getopt::Parsed;
use crate::output::say_line;

/// The byte written when no pattern is given.
const PATTERN: u8 = 0xcd;
/// Largest request; a larger one is refused before memory is asked for it.
pub const REQUEST_MAX_BYTES: u64 = (1 << 31) - 512;

/// Why a request failed, as the host would say it.
pub fn reason(error: &BlockError) -> String {
    match error {
        BlockError::Io { source, .. } | BlockError::NoSpace { source, .. } => host(source),
        BlockError::PartialCluster { .. } => "Invalid argument".to_owned(),
        BlockError::NoCompression { .. } => "Operation not supported".to_owned(),
        other if other.kind() == ErrorKind::OutOfRange => "Input/output error".to_owned(),
        other => why(other),
    }
}

fn failed(verb: &str, error: &BlockError) -> Failure {
    Failure::Said(format!("{verb} failed: {}", reason(error)))
}

/// Reads offset and length of a request.
type ReadRange = fn(&[&str]) -> Result<(u64, u64), Failure>;

/// Of a request of one length.
fn range(words: &[&str]) -> Result<(u64, u64), Failure> {
    one_length(words, "")
}

/// Of a write: qemu-io's `-n` takes more.
fn written_range(words: &[&str]) -> Result<(u64, u64), Failure> {
    one_length(words, " without -n")
}

fn one_length(words: &[&str], unless: &str) -> Result<(u64, u64), Failure> {
    let [offset, length] = words else { return Err(Failure::Usage) };
    let (offset, bytes) = (size_of(offset)?, size_of(length)?);
    if bytes > REQUEST_MAX_BYTES {
        return Err(Failure::Said(format!("length cannot exceed {REQUEST_MAX_BYTES}{unless}, given {length}")));
    }
    Ok((offset, bytes))
}

/// Of a request of several buffers, a length each.
fn vector(words: &[&str]) -> Result<(u64, u64), Failure> {
    let [offset, lengths @ ..] = words else { return Err(Failure::Usage) };
    if lengths.is_empty() {
        return Err(Failure::Usage);
    }
    let offset = size_of(offset)?;
    let mut bytes = 0;
    for length in lengths {
        let more = size_of(length)?;
        if more > REQUEST_MAX_BYTES {
            return Err(Failure::Said(format!("Argument '{length}' exceeds maximum size {REQUEST_MAX_BYTES}")));
        }
        if bytes > REQUEST_MAX_BYTES - more {
            let text = format!("The total number of bytes exceed the maximum size {REQUEST_MAX_BYTES}");
            return Err(Failure::Said(text));
        }
        bytes += more;
    }
    Ok((offset, bytes))
}

fn pattern(parsed: &Parsed) -> Result<Option<u8>, Failure> {
    let Some(text) = parsed.value("pattern").map_err(|_| Failure::Usage)? else { return Ok(None) };
    let value = match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    value.map(Some).ok_or_else(|| Failure::Said(format!("{text} is not a valid pattern byte")))
}

/// A request that has been read from a command.
pub struct Request {
    what: What,
    offset: u64,
    bytes: u64,
    /// The command in failures.
    verb: &'static str,
    quiet: bool,
    machine: bool,
}

enum What {
    Read { check: Option<Check>, verbose: bool },
    Write { data: Vec<u8>, compressed: bool, fua: bool },
    Zeroes { unmap: bool, fua: bool },
}

/// What a read has to find.
struct Check {
    byte: u8,
    skip: u64,
    /// `None`: up to the end.
    length: Option<u64>,
}

/// What came of a request.
pub struct Answer {
    request: Request,
    took: Duration,
    /// What was read.
    data: Vec<u8>,
}

impl Request {
    /// Makes the request.
    pub fn run(self, disk: &Disk) -> Result<Answer, Failure> {
        let Request { offset, bytes, verb, .. } = self;
        let mut room = match &self.what {
            What::Read { .. } => vec![0; bytes as usize],
            _ => Vec::new(),
        };
        let started = Instant::now();
        let flushed = |fua: &bool| if *fua { disk.flush() } else { Ok(()) };
        let done = match &self.what {
            What::Read { .. } => disk.read(offset, &mut room),
            What::Write { data, compressed: true, .. } => disk.write_compressed(offset, data),
            What::Write { data, fua, .. } => disk.write(offset, data).and_then(|()| flushed(fua)),
            What::Zeroes { unmap, fua } => disk.write_zeroes(offset, bytes, *unmap).and_then(|()| flushed(fua)),
        };
        done.map_err(|error| failed(verb, &error))?;
        Ok(Answer { took: started.elapsed(), data: room, request: self })
    }
}

impl Answer {
    /// Prints it; fails when a read found something else.
    pub fn print(self) -> Result<(), Failure> {
        let Answer { request: Request { what, offset, bytes, quiet, machine, .. }, took, data } = self;
        let mut outcome = Ok(());
        let (verb, verbose) = match what {
            What::Read { check, verbose } => {
                if let Some(check) = check {
                    outcome = check.holds(offset, &data);
                    if matches!(outcome, Err(Failure::Said(_))) {
                        return outcome;
                    }
                }
                ("read", verbose)
            }
            What::Write { .. } | What::Zeroes { .. } => ("wrote", false),
        };
        if !quiet {
            if verbose {
                dump(offset, &data);
            }
            Done { verb, offset, bytes, took, machine }.print();
        }
        outcome
    }
}

impl Check {
    fn holds(&self, offset: u64, data: &[u8]) -> Result<(), Failure> {
        let Check { byte, skip, length } = *self;
        let length = length.unwrap_or((data.len() as u64).saturating_sub(skip));
        let part = skip.checked_add(length).and_then(|end| data.get(skip as usize..end as usize));
        let part =
            part.ok_or_else(|| Failure::Said("pattern verification range exceeds end of read data".to_owned()))?;
        if part.iter().any(|b| *b != byte) {
            say_line(format_args!("Pattern verification failed at offset {}, {length} bytes", offset + skip));
            return Err(Failure::Silent);
        }
        Ok(())
    }
}

/// `read`.
pub fn read(verb: &'static str, parsed: &Parsed, words: &[&str]) -> Result<Request, Failure> {
    reading(verb, parsed, words, range)
}

/// `readv`, `aio_read`.
pub fn readv(verb: &'static str, parsed: &Parsed, words: &[&str]) -> Result<Request, Failure> {
    reading(verb, parsed, words, vector)
}

fn reading(verb: &'static str, parsed: &Parsed, words: &[&str], range: ReadRange) -> Result<Request, Failure> {
    let pattern = pattern(parsed)?;
    let option = |name: &'static str| {
        let text = parsed.value(name).map_err(|_| Failure::Usage)?;
        text.map(size_of).transpose()
    };
    let (skip, length) = (option("pattern-offset")?, option("pattern-length")?);
    let (offset, bytes) = range(words)?;
    if pattern.is_none() && (skip.is_some() || length.is_some()) {
        return Err(Failure::Usage);
    }
    if parsed.has("vm-state") {
        return Err(Failure::Said("reading the VM state is not supported here".to_owned()));
    }
    let check = pattern.map(|byte| Check { byte, skip: skip.unwrap_or(0), length });
    let what = What::Read { check, verbose: parsed.has("verbose") };
    Ok(Request { what, offset, bytes, verb, quiet: parsed.has("quiet"), machine: parsed.has("machine") })
}

/// `write`.
pub fn write(verb: &'static str, parsed: &Parsed, words: &[&str]) -> Result<Request, Failure> {
    if words.len() != 2 {
        return Err(Failure::Usage);
    }
    writing(verb, parsed, words, written_range)
}

/// `writev`, `aio_write`.
pub fn writev(verb: &'static str, parsed: &Parsed, words: &[&str]) -> Result<Request, Failure> {
    writing(verb, parsed, words, vector)
}

fn writing(verb: &'static str, parsed: &Parsed, words: &[&str], range: ReadRange) -> Result<Request, Failure> {
    let has = |name| parsed.has(name);
    let said = |text: &str| Err(Failure::Said(text.to_owned()));
    if has("vm-state") && has("zeroes") {
        return said("-b and -z cannot be specified at the same time");
    }
    if has("vm-state") {
        return said("writing the VM state is not supported here");
    }
    if has("compressed") && has("fua") {
        return said("-c and -f cannot be specified at the same time");
    }
    if has("no-fallback") && !has("zeroes") {
        return said("-n requires -z to be specified");
    }
    if has("unmap") && !has("zeroes") {
        return said("-u requires -z to be specified");
    }
    if [has("zeroes"), has("pattern"), has("source")].iter().filter(|given| **given).count() > 1 {
        return said("Only one of -z, -P, and -s can be specified at the same time");
    }
    if has("zeroes") && words.len() > 2 {
        return said("-z supports only a single length parameter");
    }
    let byte = pattern(parsed)?.unwrap_or(PATTERN);
    let (offset, bytes) = range(words)?;
    let (compressed, fua) = (has("compressed"), has("fua"));
    if compressed {
        for (name, value) in [("offset", offset), ("count", bytes)] {
            if !value.is_multiple_of(512) {
                return said(&format!("{value} is not a sector-aligned value for '{name}'"));
            }
        }
    }
    let what = match parsed.os_value("source") {
        Some(file) => What::Write { data: from_file(file, bytes)?, compressed, fua },
        None if has("zeroes") => What::Zeroes { unmap: has("unmap"), fua },
        None => What::Write { data: vec![byte; bytes as usize], compressed, fua },
    };
    Ok(Request { what, offset, bytes, verb, quiet: has("quiet"), machine: has("machine") })
}

/// The bytes of a file over and over.
fn from_file(file: &std::ffi::OsStr, bytes: u64) -> Result<Vec<u8>, Failure> {
    let name = file.to_string_lossy();
    let mut read = Vec::new();
    std::fs::File::open(file)
        .and_then(|file| file.take(bytes).read_to_end(&mut read))
        .map_err(|error| Failure::Error(format!("{name}: {}", host(&error))))?;
    if read.is_empty() {
        return Err(Failure::Error(format!("{name}: file is empty")));
    }
    Ok(read.into_iter().cycle().take(bytes as usize).collect())
}

/// `discard`.
pub fn discard(disk: &Disk, parsed: &Parsed, words: &[&str]) -> Result<(), Failure> {
    let (offset, bytes) = match words {
        [_, _] => range(words)?,
        _ => return Err(Failure::Usage),
    };
    let started = Instant::now();
    disk.discard(offset, bytes).map_err(|error| failed("discard", &error))?;
    if !parsed.has("quiet") {
        Done { verb: "discard", offset, bytes, took: started.elapsed(), machine: parsed.has("machine") }.print();
    }
    Ok(())
}
