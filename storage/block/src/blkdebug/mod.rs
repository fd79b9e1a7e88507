//! A file whose requests fail by rules: QEMU's blkdebug, for tests of what stands above it.
//!
//! The engine says what it is about to do ([`crate::FileBackend::event`]). A rule of that event makes requests fail
//! from then on, until a rule of another event takes its place, or takes the file to another state in which other
//! rules count. An event can also be a breakpoint, at which a request waits.
//!
//! Its limits hold for the requests to the file below: longer ones are cut, and those that are not aligned read and
//! write the blocks around them, as QEMU's block layer does. What lies above knows nothing of them, so an event of an
//! image counts once for a request that QEMU cuts before it comes to the image.

mod breakpoints;
mod event;
mod limits;
mod overlaps;
mod rules;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

pub use self::breakpoints::{Breakpoints, Stop, Watch};
pub use self::event::Event;
use self::limits::ZeroCut;
pub use self::limits::{LimitError, Limits};
use self::overlaps::{InFlight, Overlaps};
use self::rules::{Action, FILE_MAX_BYTES, Inject, IoType, parse_file};
pub use self::rules::{Rule, RuleError};
pub(crate) use self::rules::{Section, rules_of};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// The rules of a file, and what requests to it may look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// The rules; of two that say something of one request, the first counts.
    pub rules: Vec<Rule>,
    /// How requests are cut and padded.
    pub limits: Limits,
}

/// A file with rules on top of another one.
pub struct Blkdebug {
    below: Box<dyn FileBackend>,
    limits: Limits,
    rules: Mutex<Rules>,
    breakpoints: Arc<Breakpoints>,
    overlaps: Overlaps,
    /// Something was written since the last flush: without that a flush asks nothing of a file, as in QEMU.
    unflushed: AtomicBool,
}

struct Rules {
    all: Vec<Rule>,
    /// Indices in `all` of what fails requests now, the one looked at first at the front.
    active: Vec<usize>,
    state: u64,
}

/// Why a file of rules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RulesFileError {
    /// The host refused.
    #[error("Could not read blkdebug config file")]
    Read(#[source] io::Error),
    /// What it says is wrong.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

/// Reads a file of rules.
pub fn read_rules(path: &Path) -> Result<Vec<Rule>, RulesFileError> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(RulesFileError::Read)?;
    file.take(FILE_MAX_BYTES as u64 + 1).read_to_string(&mut text).map_err(RulesFileError::Read)?;
    Ok(parse_file(&text)?)
}

impl Blkdebug {
    /// Puts rules on top of a file. Those of the event `none` count at once.
    pub fn new(below: Box<dyn FileBackend>, options: BlkdebugOptions) -> Blkdebug {
        let rules = Rules { all: options.rules, active: Vec::new(), state: 1 };
        let file = Blkdebug {
            below,
            limits: options.limits,
            rules: Mutex::new(rules),
            breakpoints: Arc::default(),
            overlaps: Overlaps::default(),
            unflushed: AtomicBool::new(false),
        };
        file.event(Event::NONE);
        file
    }

    fn check(&self, io_type: IoType, offset: u64, bytes: u64) -> io::Result<()> {
        match self.rules.lock().fault(io_type, offset, bytes) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// A request in flight, where one can be in the way of another.
    fn begin(&self, range: &Range<u64>, is_padded: bool) -> Option<InFlight<'_>> {
        (self.limits.align() > 1).then(|| self.overlaps.begin(range.clone(), is_padded))
    }

    fn read_aligned(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        for (at, bytes) in self.limits.transfers(bufs.len()) {
            let offset = offset.saturating_add(at as u64);
            self.check(IoType::Read, offset, bytes as u64)?;
            self.below.read_at(offset, &bufs.range(at, bytes))?;
        }
        Ok(())
    }

    fn write_aligned(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.event(Event::PWRITEV);
        let done = self.write_cuts(offset, bufs);
        self.event(Event::PWRITEV_DONE);
        done
    }

    fn write_cuts(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        for (at, bytes) in self.limits.transfers(bufs.len()) {
            let offset = offset.saturating_add(at as u64);
            self.check(IoType::Write, offset, bytes as u64)?;
            self.below.write_at(offset, &bufs.range(at, bytes))?;
        }
        Ok(())
    }

    fn zero_aligned(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.event(Event::PWRITEV_ZERO);
        let done = self.limits.zeroes(offset, bytes).try_for_each(|cut| match cut {
            ZeroCut::Zeroes(at, bytes) => {
                self.check(IoType::WriteZeroes, at, bytes)?;
                self.below.write_zeroes(at, bytes, may_unmap)
            }
            // A cut of zeroes is at most 16 MiB.
            ZeroCut::Data(at, bytes) => {
                self.check(IoType::Write, at, bytes)?;
                self.below.write_at(at, &WriteBufs::from_slice(&vec![0; bytes as usize]))
            }
        });
        self.event(Event::PWRITEV_DONE);
        done
    }

    /// What lies before and behind a request in the blocks of its padded range.
    fn read_around(&self, range: &Range<u64>, offset: u64, bytes: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let (align, all) = (self.limits.align(), range.end - range.start);
        let (before, behind) = (offset - range.start, range.end.saturating_sub(offset.saturating_add(bytes)));
        let mut head = Vec::new();
        if before > 0 || all == align {
            let at_once = is_one_piece(all, align, before, behind);
            self.event_if(before > 0, Event::PWRITEV_RMW_HEAD);
            self.event_if(at_once && behind > 0, Event::PWRITEV_RMW_TAIL);
            head = vec![0; if at_once { all } else { align } as usize];
            self.read_aligned(range.start, &ReadBufs::from_slice(&mut head))?;
            self.event_if(before > 0, Event::PWRITEV_RMW_AFTER_HEAD);
            self.event_if(at_once && behind > 0, Event::PWRITEV_RMW_AFTER_TAIL);
            if at_once {
                let tail = head.split_off((all - behind) as usize);
                head.truncate(before as usize);
                return Ok((head, tail));
            }
        }
        head.truncate(before as usize);
        if behind == 0 {
            return Ok((head, Vec::new()));
        }
        self.event(Event::PWRITEV_RMW_TAIL);
        let mut block = vec![0; align as usize];
        self.read_aligned(range.end - align, &ReadBufs::from_slice(&mut block))?;
        self.event(Event::PWRITEV_RMW_AFTER_TAIL);
        Ok((head, block.split_off((align - behind) as usize)))
    }

    fn event_if(&self, happens: bool, event: Event) {
        if happens {
            self.event(event);
        }
    }

    /// Writes zeroes over a part of blocks that holds more than them.
    fn zero_padded(&self, range: &Range<u64>, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        let (head, tail) = self.read_around(range, offset, bytes)?;
        let (align, all) = (self.limits.align(), range.end - range.start);
        let write = |at: u64, head: &[u8], bytes: u64, tail: &[u8]| {
            let zeroes = vec![0; bytes as usize];
            let parts = [head, &zeroes, tail].map(WriteBufs::from_slice);
            self.write_aligned(at, &WriteBufs::concat(&[&parts[0], &parts[1], &parts[2]]))
        };
        if is_one_piece(all, align, head.len() as u64, tail.len() as u64) {
            return write(range.start, &head, bytes, &tail);
        }
        let mut middle = range.clone();
        if !head.is_empty() {
            write(range.start, &head, align - head.len() as u64, &[])?;
            middle.start += align;
        }
        if !tail.is_empty() {
            middle.end -= align;
        }
        if !middle.is_empty() {
            self.zero_aligned(middle.start, middle.end - middle.start, may_unmap)?;
        }
        if tail.is_empty() { Ok(()) } else { write(middle.end, &[], align - tail.len() as u64, &tail) }
    }
}

/// Whether the blocks at both ends of a padded request are all there is of it.
fn is_one_piece(all: u64, align: u64, before: u64, behind: u64) -> bool {
    all == align || (before > 0 && behind > 0 && all / 2 == align)
}

impl Rules {
    /// `process_event` of QEMU: rules are looked at from the last to the first, and of those that match, the one
    /// looked at last goes to the front.
    fn event(&mut self, event: Event) {
        let mut replaced = false;
        let mut next_state = self.state;
        for (index, rule) in self.all.iter().enumerate().rev() {
            if rule.event != event || (rule.state != 0 && rule.state != self.state) {
                continue;
            }
            match rule.action {
                Action::SetState(state) => next_state = state,
                Action::Inject(_) => {
                    if !std::mem::replace(&mut replaced, true) {
                        self.active.clear();
                    }
                    self.active.insert(0, index);
                }
            }
        }
        self.state = next_state;
    }

    /// The error of a request; 0 when it goes through.
    fn fault(&mut self, io_type: IoType, offset: u64, bytes: u64) -> i32 {
        let hit = |inject: &Inject| {
            let here = inject
                .sector
                .is_none_or(|sector| sector.checked_mul(512).is_some_and(|at| at >= offset && at - offset < bytes));
            here && inject.io_type.map_or(io_type != IoType::BlockStatus, |wanted| wanted == io_type)
        };
        let found = self.active.iter().enumerate().find_map(|(place, index)| match self.all.get(*index)?.action {
            Action::Inject(inject) if hit(&inject) => Some((place, *index, inject)),
            _ => None,
        });
        let Some((place, index, inject)) = found else { return 0 };
        if inject.once && inject.errno != 0 {
            self.active.remove(place);
            self.all.remove(index);
            self.active.iter_mut().filter(|active| **active > index).for_each(|active| *active -= 1);
        }
        inject.errno
    }
}

impl FileBackend for Blkdebug {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let bytes = bufs.len() as u64;
        let range = self.limits.padded(offset, bytes);
        let _in_flight = self.begin(&range, false);
        let all = range.end - range.start;
        if all == bytes || bytes == 0 {
            return self.read_aligned(offset, bufs);
        }
        let mut room = vec![0; usize::try_from(all).map_err(|_| io::ErrorKind::InvalidInput)?];
        self.read_aligned(range.start, &ReadBufs::from_slice(&mut room))?;
        bufs.copy_from(room.get((offset - range.start) as usize..).unwrap_or_default());
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.unflushed.store(true, Ordering::Relaxed);
        let bytes = bufs.len() as u64;
        let range = self.limits.padded(offset, bytes);
        let is_padded = range.end - range.start != bytes && bytes > 0;
        let _in_flight = self.begin(&range, is_padded);
        if !is_padded {
            return self.write_aligned(offset, bufs);
        }
        let (head, tail) = self.read_around(&range, offset, bytes)?;
        let (head, tail) = (WriteBufs::from_slice(&head), WriteBufs::from_slice(&tail));
        self.write_aligned(range.start, &WriteBufs::concat(&[&head, bufs, &tail]))
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.unflushed.swap(false, Ordering::Relaxed) {
            let flushed = self.check(IoType::Flush, 0, 0).and_then(|()| self.below.sync_data());
            return flushed.inspect_err(|_| self.unflushed.store(true, Ordering::Relaxed));
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.unflushed.store(true, Ordering::Relaxed);
        let _in_flight = self.begin(&(offset..offset.saturating_add(bytes)), false);
        self.limits.discards(offset, bytes).try_for_each(|(at, bytes)| {
            self.check(IoType::Discard, at, bytes)?;
            self.below.punch_hole(at, bytes)
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.unflushed.store(true, Ordering::Relaxed);
        let range = self.limits.padded(offset, bytes);
        let is_padded = range.end - range.start != bytes && bytes > 0;
        let _in_flight = self.begin(&range, is_padded);
        if is_padded {
            self.zero_padded(&range, offset, bytes, may_unmap)
        } else {
            self.zero_aligned(offset, bytes, may_unmap)
        }
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let range = self.limits.padded(offset, bytes);
        self.check(IoType::BlockStatus, range.start, range.end - range.start)?;
        self.below.extent(offset, bytes)
    }

    fn event(&self, event: Event) {
        self.rules.lock().event(event);
        self.breakpoints.pass(event);
        self.below.event(event);
    }

    fn breakpoints(&self) -> Option<Arc<Breakpoints>> {
        Some(self.breakpoints.clone())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.below.len_bytes()
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        self.below.set_len_bytes(bytes)
    }

    fn keeps_len(&self) -> bool {
        self.below.keeps_len()
    }

    fn is_remote(&self) -> bool {
        self.below.is_remote()
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.below.allocated_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script of events and requests; a request says what comes of it.
    fn check_rules(rules: &str, script: &str) {
        let mut rules = Rules { all: parse_file(rules).unwrap(), active: Vec::new(), state: 1 };
        for step in script.split(';').map(str::trim) {
            let words: Vec<&str> = step.split(' ').collect();
            if let [event] = words[..] {
                rules.event(Event::named(event).unwrap());
                continue;
            }
            let io_type = match words[0] {
                "read" => IoType::Read,
                "write" => IoType::Write,
                "flush" => IoType::Flush,
                _ => IoType::BlockStatus,
            };
            let number = |word: &str| word.parse::<u64>().unwrap();
            let got = rules.fault(io_type, number(words[1]), number(words[2]));
            assert_eq!(got as u64, number(words[3]), "{step}");
        }
    }

    #[test]
    fn a_rule_counts_from_its_event_on() {
        let rule = |event: &str, more: &str| format!("[inject-error]\nevent = \"{event}\"\n{more}\n");
        check_rules(&rule("cow_read", ""), "read 0 512 0; l2_load; read 0 512 0; cow_read; read 0 512 5; write 0 1 5");
        // Questions about block status fail only when they are asked for, flushes have no place.
        check_rules(&rule("none", "errno = \"28\""), "none; flush 0 0 28; status 0 512 0");
        check_rules(&rule("none", "sector = \"2\""), "none; flush 0 0 0; read 0 1024 0; read 1024 1 5; read 500 600 5");
        check_rules(&rule("none", "iotype = \"block-status\""), "none; status 0 512 5; read 0 512 0");
        check_rules(&rule("none", "once = \"on\""), "none; read 0 512 5; read 0 512 0; none; read 0 512 0");
        // Another event's rule takes its place; one without rules does not.
        let two = rule("cow_read", "errno = \"1\"") + &rule("l2_load", "errno = \"2\"");
        check_rules(&two, "cow_read; read 0 1 1; l2_load; read 0 1 2; l1_update; read 0 1 2; cow_read; read 0 1 1");
        // Of two rules of an event the first counts, and the second when that is gone.
        let two = rule("cow_read", "errno = \"1\"\nonce = \"on\"") + &rule("cow_read", "errno = \"2\"");
        check_rules(&two, "cow_read; read 0 1 1; read 0 1 2; read 0 1 2");
    }

    #[test]
    fn states_make_rules_wait() {
        let rules = "[set-state]\nevent = \"l2_load\"\nstate = \"1\"\nnew_state = \"2\"\n\
                     [inject-error]\nevent = \"l2_load\"\nstate = \"2\"\n";
        check_rules(rules, "l2_load; read 0 1 0; l2_load; read 0 1 5");
    }
}
