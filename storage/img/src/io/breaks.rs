//! The commands of `io` that stop requests, let them go on and wait; and the one that raises a signal.

use std::sync::Arc;
use std::time::Duration;

use block::blkdebug::Breakpoints;
use block::{Disk, Event};
use rustix::process::{Signal, getpid, kill_process};

use super::commands::{Failure, size_of};
use super::{Next, Session};
use crate::error::host;
use crate::getopt::Parsed;

/// Where glibc's signals end (`NSIG`).
const SIGNAL_END: u64 = 65;

const NOT_FOUND: &str = "No such file or directory";

fn breakpoints(disk: &Disk, doing: &str) -> Result<Arc<Breakpoints>, Failure> {
    disk.breakpoints().cloned().ok_or_else(|| Failure::Said(format!("{doing}: Operation not supported")))
}

/// `break EVENT TAG`.
pub fn set_break(_: &mut Session, disk: &Arc<Disk>, words: &[&str]) -> Result<(), Failure> {
    let [event, tag] = words else { return Err(Failure::Usage) };
    let breakpoints = breakpoints(disk, "Could not set breakpoint")?;
    let event = Event::named(event);
    let event = event.ok_or_else(|| Failure::Said(format!("Could not set breakpoint: {NOT_FOUND}")))?;
    breakpoints.set(event, tag);
    Ok(())
}

/// `remove_break TAG`. As in qemu-io it fails when all that the tag names is requests: they go on.
pub fn remove_break(session: &mut Session, disk: &Arc<Disk>, words: &[&str]) -> Result<(), Failure> {
    let [tag] = words else { return Err(Failure::Usage) };
    let doing = format!("Could not remove breakpoint {tag}");
    let removed = breakpoints(disk, &doing)?.remove(tag);
    session.background.settle(disk);
    if removed { Ok(()) } else { Err(Failure::Said(format!("{doing}: {NOT_FOUND}"))) }
}

/// `resume TAG`.
pub fn resume(session: &mut Session, disk: &Arc<Disk>, words: &[&str]) -> Result<(), Failure> {
    let [tag] = words else { return Err(Failure::Usage) };
    let doing = "Could not resume request";
    if !breakpoints(disk, doing)?.resume(tag) {
        return Err(Failure::Said(format!("{doing}: {NOT_FOUND}")));
    }
    session.background.settle(disk);
    Ok(())
}

/// `wait_break TAG`.
pub fn wait_break(session: &mut Session, disk: &Arc<Disk>, words: &[&str]) -> Result<(), Failure> {
    let [tag] = words else { return Err(Failure::Usage) };
    session.background.wait_break(&*breakpoints(disk, "wait_break")?, tag)?;
    session.background.deliver()
}

/// `aio_flush`: waits for requests, and brings nothing to the disk.
pub fn aio_flush(session: &mut Session, disk: &Arc<Disk>, _: &[&str]) -> Result<(), Failure> {
    session.background.finish(disk)
}

/// `sleep MILLISECONDS`.
pub fn sleep(session: &mut Session, _: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    let [text] = words else { return Err(Failure::Usage) };
    let millis = count(text).ok_or_else(|| Failure::Said(format!("{text} is not a valid number")))?;
    std::thread::sleep(Duration::from_millis(millis));
    session.background.deliver().map(|()| Next::Go)
}

/// A number as C writes it: decimal, octal, hexadecimal.
fn count(text: &str) -> Option<u64> {
    let (digits, radix) = match (text.strip_prefix("0x").or(text.strip_prefix("0X")), text.strip_prefix('0')) {
        (Some(hex), _) => (hex, 16),
        (None, Some(octal)) if !octal.is_empty() => (octal, 8),
        _ => (text, 10),
    };
    u64::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))
}

/// `sigraise SIGNAL`.
pub fn sigraise(_: &mut Session, _: &Parsed, words: &[&str]) -> Result<Next, Failure> {
    let [text] = words else { return Err(Failure::Usage) };
    let number = size_of(text)?;
    if number > SIGNAL_END {
        return Err(Failure::Said(format!("signal argument '{text}' is too large to be a valid signal")));
    }
    if number == 0 {
        return Ok(Next::Go);
    }
    let signal = i32::try_from(number).ok().and_then(Signal::from_named_raw);
    let signal = signal.ok_or_else(|| {
        Failure::Error(format!("sigraise: signal {number} is a real-time one; only those with a name can be raised"))
    })?;
    kill_process(getpid(), signal).map_err(|errno| Failure::Error(format!("sigraise: {}", host(&errno.into()))))?;
    Ok(Next::Go)
}

#[test]
fn numbers_are_c_s() {
    for (text, want) in [
        ("0", Some(0)),
        ("10", Some(10)),
        ("010", Some(8)),
        ("0x10", Some(16)),
        ("x", None),
        ("-1", None),
        ("", None),
        ("+1", None),
    ] {
        assert_eq!(count(text), want, "{text}");
    }
}
