//! `bench`: requests of one kind, timed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

use block::{BlockError, CacheMode, Disk, PageBuf};

use crate::Command;
use crate::convert::default_workers;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};

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
    opt('i', &["aio"], "threads|native|io_uring", "how the host is asked"),
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
    match parsed.value("aio")? {
        None | Some("threads" | "native" | "io_uring") => {}
        Some(other) => return Err(ImgError::Plain(Rule::Aio(other.to_owned()))),
    }
    let cache = open::cache_named("", parsed.value("cache")?, CacheMode::Writeback)?;
    let named = Named::of(parsed, file, "format")?;
    if (parsed.has("native") || parsed.value("aio")? == Some("native")) && !cache.is_direct() {
        return Err(ImgError::OpenRule { name: named.label, reason: Rule::NativeNeedsDirect });
    }
    let disk = open::disk(&named, Access { write: plan.write, share: parsed.has("force-share"), cache })?;
    if !parsed.has("quiet") || crate::program() == "qemu-img" {
        println!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
            plan.count,
            if plan.write { "write" } else { "read" },
            plan.bytes,
            plan.depth,
            plan.offset,
            plan.step
        );
        if plan.flush_interval > 0 {
            let drain = if plan.drain { "" } else { "asynchronous " };
            println!("Sending {drain}flush every {} requests", plan.flush_interval);
        }
    }
    let started = Instant::now();
    // A request that the host serves from memory keeps a processor busy; more threads would only take turns. One that
    // goes to the disk keeps a thread waiting.
    let most = match cache {
        CacheMode::None | CacheMode::DirectSync => DIRECT_THREADS_MAX,
        _ => default_workers() as u64,
    };
    measure(&disk, &plan, plan.depth.min(most)).map_err(|source| ImgError::BenchFailed { source })?;
    println!("Run completed in {:.3} seconds.", started.elapsed().as_secs_f64());
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

fn measure(disk: &Disk, plan: &Plan, threads: u64) -> Result<(), BlockError> {
    let next = AtomicU64::new(0);
    let error = Mutex::new(None);
    // Requests share it; a flush that waits for them has it alone.
    let gate = RwLock::new(());
    let work = || {
        let mut room = PageBuf::new(plan.bytes as usize);
        room.fill(plan.pattern);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= plan.count {
                return;
            }
            let shared = gate.read().unwrap_or_else(PoisonError::into_inner);
            keep_first(&error, request(disk, plan, index, &mut room));
            drop(shared);
            if plan.flush_interval > 0 && (index + 1).is_multiple_of(plan.flush_interval) {
                let _alone = plan.drain.then(|| gate.write().unwrap_or_else(PoisonError::into_inner));
                keep_first(&error, disk.flush());
            }
        }
    };
    block::run_on_threads(threads as usize, &work);
    match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn keep_first(error: &Mutex<Option<BlockError>>, done: Result<(), BlockError>) {
    if let Err(new) = done {
        error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(new);
    }
}

fn request(disk: &Disk, plan: &Plan, index: u64, room: &mut [u8]) -> Result<(), BlockError> {
    // Those behind the first go round at the end of the disk.
    let size = u128::from(disk.size_bytes().max(1));
    let at = u128::from(plan.offset) + u128::from(index) * u128::from(plan.step);
    let at = if index == 0 { plan.offset } else { (at % size) as u64 };
    if plan.write { disk.write(at, room) } else { disk.read(at, room) }
}
