//! `bench`: requests of one kind, timed.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

use block::{Begun, BlockError, CacheMode, Disk, PageBuf, Ring};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::Command;
use crate::convert::default_workers;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::output::{self, say_line};

/// `bench`.
pub const COMMAND: Command =
    Command { name: "bench", about: "Run a simple image benchmark", operands: "FILENAME", options: OPTIONS, run };

const OPTIONS: &[Opt] = &[
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    opt('t', &["cache"], "CACHE", "cache mode (writeback)"),
    opt('c', &["count"], "COUNT", "requests in all (75000)"),
    opt('s', &["buffer-size"], "SIZE", "bytes of each (4k)"),
    opt('d', &["depth"], "DEPTH", "requests at once (64)"),
    opt('o', &["offset"], "OFFSET", "where the first one goes"),
    opt('S', &["step-size"], "SIZE", "how far the next one is (the buffer size)"),
    opt('i', &["aio"], "threads|native|io_uring", "how the host is asked (past its cache a ring, else threads)"),
    flag('n', &["native"], "short for --aio=native"),
    flag('w', &["write"], "write, instead of reading"),
    opt('\0', &["pattern"], "BYTE", "byte to write (0)"),
    opt('\0', &["flush-interval"], "COUNT", "flush after this many requests"),
    flag('\0', &["no-drain"], "do not wait for requests under way before a flush"),
    FORCE_SHARE,
    OBJECT,
];

/// Most threads of direct requests; a deeper queue is as deep as this. More do not make a disk quicker, and those that
/// write to a file that grows spin for their turn.
const DIRECT_THREADS_MAX: u64 = 8;
/// Most threads of requests to a server.
const REMOTE_THREADS_MAX: u64 = 64;
/// Most requests in a ring; a deeper queue is as deep as this.
const RING_REQUESTS_MAX: u64 = 4096;
/// So many requests that the ring refused in a row, and the rest is for threads: this one waits for each.
const REFUSALS_MAX: u64 = 256;
/// What buffers of direct I/O start at a multiple of.
const PAGE_BYTES: usize = 4096;

/// What is measured.
struct Plan {
    count: u64,
    bytes: u64,
    depth: u64,
    offset: u64,
    step: u64,
    pattern: u8,
    write: bool,
    flush_interval: u64,
    drain: bool,
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let plan = plan(parsed)?;
    let cache = open::cache_named("", parsed.value("cache")?, CacheMode::Writeback)?;
    let aio = if parsed.has("native") { Some("native") } else { parsed.value("aio")? };
    let by_ring = match aio {
        // As a machine's disk does without `io=` in its XML.
        None => cache.is_direct(),
        Some("threads") => false,
        Some("native" | "io_uring") => true,
        Some(other) => return Err(ImgError::Plain(Rule::Aio(other.to_owned()))),
    };
    let named = Named::of(parsed, file, "format")?;
    if aio == Some("native") && !cache.is_direct() {
        return Err(ImgError::OpenRule { name: named.label, reason: Rule::NativeNeedsDirect });
    }
    let disk = open::disk(&named, Access { write: plan.write, share: parsed.has("force-share"), cache })?;
    if !parsed.has("quiet") || crate::program() == "qemu-img" {
        say_line(format_args!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
            plan.count,
            if plan.write { "write" } else { "read" },
            plan.bytes,
            plan.depth,
            plan.offset,
            plan.step
        ));
        if plan.flush_interval > 0 {
            let drain = if plan.drain { "" } else { "asynchronous " };
            say_line(format_args!("Sending {drain}flush every {} requests", plan.flush_interval));
        }
    }
    let started = Instant::now();
    // A request that the host serves from memory keeps a processor busy; more threads would only take turns. One that
    // goes to the disk keeps a thread waiting, and one that goes to a server for longer.
    let threads = match cache.is_direct() {
        _ if disk.is_remote() => REMOTE_THREADS_MAX,
        true => DIRECT_THREADS_MAX,
        false => default_workers() as u64,
    };
    let run = Run { disk: &disk, plan: &plan, next: AtomicU64::new(0), error: Mutex::new(None) };
    if by_ring {
        run.by_ring().map_err(ImgError::Ring)?;
    }
    run.by_threads(plan.depth.min(threads));
    let error = run.error.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), |source| Err(ImgError::BenchFailed { source }))?;
    let seconds = started.elapsed().as_secs_f64();
    output::fact("seconds", seconds);
    say_line(format_args!("Run completed in {seconds:.3} seconds."));
    Ok(0)
}

fn plan(parsed: &Parsed) -> Result<Plan, ImgError> {
    let number = |name: &'static str, what: &'static str, min: u64, max: u64, default: u64| {
        parsed.value(name)?.map_or(Ok(default), |text| ImgError::number(text, what, min..=max))
    };
    let int = i32::MAX as u64;
    let bytes = number("buffer-size", "buffer size", 1, int, 4096)?;
    let step = number("step-size", "step size", 0, int, 0)?;
    let plan = Plan {
        count: number("count", "request count", 1, int, 75000)?,
        bytes,
        depth: number("depth", "queue depth", 1, int, 64)?,
        offset: number("offset", "offset", 0, i64::MAX as u64, 0)?,
        step: if step == 0 { bytes } else { step },
        pattern: number("pattern", "pattern byte", 0, 0xff, 0)? as u8,
        write: parsed.has("write"),
        flush_interval: number("flush-interval", "flush interval", 0, int, 0)?,
        drain: !parsed.has("no-drain"),
    };
    let rule = |text| Err(ImgError::Plain(Rule::Requires(text)));
    if !plan.write && plan.flush_interval > 0 {
        return rule("--flush-interval is only available in write tests");
    }
    if plan.flush_interval > 0 && plan.flush_interval < plan.depth {
        return rule("Flush interval can't be smaller than depth");
    }
    Ok(plan)
}

/// The requests, and how far they are.
struct Run<'a> {
    disk: &'a Disk,
    plan: &'a Plan,
    /// Number of the next request.
    next: AtomicU64,
    /// The first error.
    error: Mutex<Option<BlockError>>,
}

impl Run<'_> {
    /// The number of the next request and where it goes, if one is left.
    fn take(&self) -> Option<(u64, u64)> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.plan.count {
            return None;
        }
        // Those behind the first go round at the end of the disk.
        let size = u128::from(self.disk.size_bytes().max(1));
        let at = u128::from(self.plan.offset) + u128::from(index) * u128::from(self.plan.step);
        Some((index, if index == 0 { self.plan.offset } else { (at % size) as u64 }))
    }

    /// Keeps the first error; no request follows it.
    fn keep_first(&self, done: Result<(), BlockError>) {
        if let Err(new) = done {
            self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(new);
            self.next.store(self.plan.count, Ordering::Relaxed);
        }
    }

    fn flush_is_due_after(&self, index: u64) -> bool {
        self.plan.flush_interval > 0 && (index + 1).is_multiple_of(self.plan.flush_interval)
    }

    /// Every request that is left, each by a thread that waits for it.
    fn by_threads(&self, threads: u64) {
        // Requests share it; a flush that waits for them has it alone.
        let gate = RwLock::new(());
        let work = || {
            let mut room = PageBuf::default();
            while let Some((index, at)) = self.take() {
                if room.is_empty() {
                    room.set_len(self.plan.bytes as usize);
                    room.fill(self.plan.pattern);
                }
                let shared = gate.read().unwrap_or_else(PoisonError::into_inner);
                self.keep_first(if self.plan.write {
                    self.disk.write(at, &room)
                } else {
                    self.disk.read(at, &mut room)
                });
                drop(shared);
                if self.flush_is_due_after(index) {
                    let _alone = self.plan.drain.then(|| gate.write().unwrap_or_else(PoisonError::into_inner));
                    self.keep_first(self.disk.flush());
                }
            }
        };
        let left = self.plan.count.saturating_sub(self.next.load(Ordering::Relaxed));
        block::run_on_threads(threads.min(left) as usize, &work);
    }

    /// Requests that go on in a ring while this thread begins others; it waits for those that the ring refuses. Leaves all
    /// of them where the host has no ring, and the rest after [`REFUSALS_MAX`].
    fn by_ring(&self) -> io::Result<()> {
        let Some(mut lane) = Lane::new(self.plan) else { return Ok(()) };
        let mut refused = 0;
        while refused < REFUSALS_MAX
            && let Some((index, at)) = self.take()
        {
            refused = if lane.request(self, at)? { 0 } else { refused + 1 };
            if self.flush_is_due_after(index) {
                if self.plan.drain {
                    lane.settle(self, 0)?;
                }
                self.keep_first(self.disk.flush());
            }
        }
        lane.settle(self, 0)
    }
}

/// A ring, and the buffers of its requests.
struct Lane {
    ring: Ring<(), Asked>,
    buffers: Buffers,
    /// Numbers of the buffers that no request uses.
    free: Vec<usize>,
}

/// A request that is under way: its buffer, and where it goes.
#[derive(Clone, Copy)]
struct Asked {
    buffer: usize,
    at: u64,
}

/// As many buffers as requests are under way at most, each at the start of a page.
struct Buffers {
    memory: GuestMemoryMmap<()>,
    count: usize,
    bytes: usize,
}

impl Buffers {
    /// `None` where the host has not that much memory.
    fn new(count: usize, bytes: usize) -> Option<Buffers> {
        let room = bytes.next_multiple_of(PAGE_BYTES).checked_mul(count)?;
        Some(Buffers { memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), room)]).ok()?, count, bytes })
    }

    /// There is one for each number below `count`.
    fn get(&self, number: usize) -> Option<VolatileSlice<'_>> {
        let at = number * self.bytes.next_multiple_of(PAGE_BYTES);
        self.memory.get_slice(GuestAddress(at as u64), self.bytes).ok()
    }
}

impl Lane {
    /// `None` where the host has no ring, or not the memory.
    fn new(plan: &Plan) -> Option<Lane> {
        let count = plan.depth.min(RING_REQUESTS_MAX);
        let buffers = Buffers::new(count as usize, plan.bytes as usize)?;
        let mut ring = Ring::new(count as u16, buffers.memory.clone()).ok()?;
        ring.take_all();
        if plan.write && plan.pattern != 0 {
            let pattern = vec![plan.pattern; buffers.bytes];
            (0..buffers.count).filter_map(|number| buffers.get(number)).for_each(|buffer| buffer.copy_from(&pattern));
        }
        Some(Lane { ring, free: (0..buffers.count).collect(), buffers })
    }

    /// Begins a request, once one of the lane's buffers is free; `false` if it was done here, because the ring refused it.
    fn request(&mut self, run: &Run<'_>, at: u64) -> io::Result<bool> {
        self.settle(run, self.buffers.count - 1)?;
        let Some(number) = self.free.pop() else { return Ok(false) };
        let asked = Asked { buffer: number, at };
        let buffer = self.buffers.get(number);
        let begun = match run.plan.write {
            true => self.ring.write(run.disk, at, buffer.as_slice(), asked),
            false => self.ring.read(run.disk, at, buffer.as_slice(), asked),
        };
        if begun == Begun::UnderWay {
            return Ok(true);
        }
        if begun == Begun::Refused {
            self.wait_for(run, asked);
        }
        self.free.push(number);
        Ok(begun == Begun::Done)
    }

    /// Does a request without the ring.
    fn wait_for(&self, run: &Run<'_>, asked: Asked) {
        let buffer = self.buffers.get(asked.buffer);
        run.keep_first(match run.plan.write {
            true => run.disk.write_at(asked.at, buffer.as_slice()),
            false => run.disk.read_at(asked.at, buffer.as_slice()),
        });
    }

    /// Waits until at most so many requests are under way.
    fn settle(&mut self, run: &Run<'_>, most: usize) -> io::Result<()> {
        while self.ring.under_way() > most {
            self.ring.wait()?;
            while let Some(over) = self.ring.next_over(run.disk) {
                if !over.good {
                    self.wait_for(run, over.tag);
                }
                self.free.push(over.tag.buffer);
            }
        }
        Ok(())
    }
}
