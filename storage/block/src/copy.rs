//! Copying one disk into another, and comparing two. Several threads share the work: each takes the next run of
//! the source, reads it and, when its turn has come, writes it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::disk::{ChainExtent, Disk};
use crate::error::BlockError;
use crate::node::ExtentKind;
use crate::zeroes::{for_each_run, is_zero};

/// Bytes that one thread holds at a time. Small enough to stay in the processor's cache between the read that
/// fills them and the write that takes them.
const CHUNK_BYTES: u64 = 256 << 10;
/// Zeroes that one step skips or writes.
const ZERO_STEP_BYTES: u64 = 1 << 30;
/// Memory of one thread's stack. Nothing recurses deeper than a backing chain, 200 images at most.
const STACK_BYTES: usize = 512 << 10;

/// How a disk is copied.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Threads, 1 to 16.
    pub workers: usize,
    /// Let writes overtake each other.
    pub out_of_order: bool,
    /// Store clusters compressed.
    pub compressed: bool,
    /// Smallest run of zeroes that is looked for in data, in bytes; 0 looks for none.
    pub sparse_bytes: u64,
    /// The target reads as zeroes where nothing was written: zeroes need no writing.
    pub target_is_zero: bool,
    /// Copy only what the top image of the source holds: what is below is below the target too.
    pub top_only: bool,
    /// Where the copy starts in the target.
    pub target_offset: u64,
}

impl Default for CopyOptions {
    /// Two threads, writes in order, zeroes of 4 KiB looked for, into a target that holds anything.
    fn default() -> CopyOptions {
        CopyOptions {
            workers: 2,
            out_of_order: false,
            compressed: false,
            sparse_bytes: 4096,
            target_is_zero: false,
            top_only: false,
            target_offset: 0,
        }
    }
}

/// A piece of work: a run of the source.
struct Step {
    /// Its place in the order of writes.
    turn: u64,
    offset: u64,
    bytes: u64,
    kind: ExtentKind,
}

/// What the threads of a copy share.
struct Shared<'a> {
    source: &'a Disk,
    target: &'a Disk,
    opts: &'a CopyOptions,
    chunk_bytes: u64,
    /// Where the next step starts, and its turn.
    next: Mutex<(u64, u64)>,
    /// The turn that may write.
    turn: Mutex<u64>,
    turned: Condvar,
    stop: AtomicBool,
    done_bytes: AtomicU64,
    error: Mutex<Option<BlockError>>,
    progress: &'a (dyn Fn(u64, u64) -> bool + Sync),
}

/// Copies all of `source` to `target`, which is large enough. `progress` is told bytes done and bytes in all now
/// and then, from any thread; it returns whether to go on. After an error or a stop any part may be copied.
pub fn copy(
    source: &Disk,
    target: &Disk,
    opts: &CopyOptions,
    progress: &(dyn Fn(u64, u64) -> bool + Sync),
) -> Result<(), BlockError> {
    // Compressed clusters are written whole, so steps are whole clusters.
    let unit = if opts.compressed { target.cluster_bytes().max(512) } else { 4096 };
    let shared = Shared {
        source,
        target,
        opts,
        chunk_bytes: if opts.compressed { unit } else { CHUNK_BYTES },
        next: Mutex::new((0, 0)),
        turn: Mutex::new(0),
        turned: Condvar::new(),
        stop: AtomicBool::new(false),
        done_bytes: AtomicU64::new(0),
        error: Mutex::new(None),
        progress,
    };
    run_on_threads(opts.workers.clamp(1, 16), &|| shared.work());
    match shared.error.into_inner() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Runs `work` on this thread and `count - 1` others, fewer where the host gives no more.
fn run_on_threads(count: usize, work: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for _ in 1..count {
            // One thread less is slower and nothing else.
            let _ = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        }
        work();
    });
}

impl Shared<'_> {
    fn work(&self) {
        let mut room = Vec::new();
        let mut packed = Vec::new();
        loop {
            let result = match self.take() {
                Ok(Some(step)) => self.perform(&step, &mut room, &mut packed),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.fail(error);
            }
        }
    }

    fn fail(&self, error: BlockError) {
        self.error.lock().get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
        // Under the lock, so that a thread about to wait sees it.
        drop(self.turn.lock());
        self.turned.notify_all();
    }

    /// The next run of the source that needs something done.
    fn take(&self) -> Result<Option<Step>, BlockError> {
        let mut next = self.next.lock();
        let size_bytes = self.source.size_bytes();
        while next.0 < size_bytes && !self.stop.load(Ordering::Relaxed) {
            let offset = next.0;
            let ChainExtent { depth, extent } =
                self.source.extent(offset, (size_bytes - offset).min(ZERO_STEP_BYTES))?;
            let mut bytes = extent.bytes;
            let left_below = self.opts.top_only && (depth > 0 || extent.kind == ExtentKind::Below);
            let nothing = left_below || (extent.kind != ExtentKind::Data && self.opts.target_is_zero);
            if self.opts.compressed {
                // A cluster that is partly data is read whole.
                bytes = match (nothing, bytes / self.chunk_bytes * self.chunk_bytes) {
                    (true, whole) if whole > 0 => whole,
                    _ => self.chunk_bytes.min(size_bytes - offset),
                };
                if nothing && extent.bytes >= bytes {
                    next.0 = offset + bytes;
                    self.report(bytes);
                    continue;
                }
            } else if nothing {
                next.0 = offset + bytes;
                self.report(bytes);
                continue;
            } else if extent.kind == ExtentKind::Data {
                // Steps end at chunk boundaries, so that a run that starts raggedly does not stay ragged.
                bytes = bytes.min(self.chunk_bytes - offset % self.chunk_bytes);
            }
            let kind = if self.opts.compressed { ExtentKind::Data } else { extent.kind };
            let step = Step { turn: next.1, offset, bytes, kind };
            *next = (offset + bytes, next.1 + 1);
            return Ok(Some(step));
        }
        Ok(None)
    }

    fn report(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if !(self.progress)(done, self.source.size_bytes()) {
            self.fail(BlockError::Stopped);
        }
    }

    fn perform(&self, step: &Step, room: &mut Vec<u8>, packed: &mut Vec<u8>) -> Result<(), BlockError> {
        let target_offset = self.opts.target_offset + step.offset;
        if step.kind != ExtentKind::Data {
            self.await_turn(step.turn)?;
            self.target.write_zeroes(target_offset, step.bytes, true)?;
            self.end_turn(step.turn);
            self.report(step.bytes);
            return Ok(());
        }
        room.resize(self.chunk_bytes.max(step.bytes) as usize, 0);
        let bytes = room.get_mut(..step.bytes as usize).unwrap_or_default();
        self.source.read(step.offset, bytes)?;
        if self.opts.compressed {
            self.write_compressed(step.turn, target_offset, bytes, packed)?;
        } else {
            self.await_turn(step.turn)?;
            self.write(target_offset, bytes)?;
        }
        self.end_turn(step.turn);
        self.report(step.bytes);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        if self.opts.sparse_bytes == 0 {
            return self.target.write(offset, bytes);
        }
        for_each_run(bytes, offset, self.opts.sparse_bytes, |start, len, data| match data {
            true => self.target.write(offset + start as u64, bytes.get(start..start + len).unwrap_or_default()),
            false if self.opts.target_is_zero => Ok(()),
            false => self.target.write_zeroes(offset + start as u64, len as u64, true),
        })
    }

    /// Packs on this thread while others write, and writes in turn.
    fn write_compressed(
        &self,
        turn: u64,
        offset: u64,
        bytes: &mut [u8],
        packed: &mut Vec<u8>,
    ) -> Result<(), BlockError> {
        if is_zero(bytes) {
            self.await_turn(turn)?;
            return match self.opts.target_is_zero {
                true => Ok(()),
                false => self.target.write_zeroes(offset, bytes.len() as u64, true),
            };
        }
        let smaller = self.target.pack(bytes, packed)?;
        self.await_turn(turn)?;
        match smaller {
            true => self.target.write_packed(offset, packed, bytes.len() as u64),
            false => self.target.write(offset, bytes),
        }
    }

    /// Waits until every earlier step has been written.
    fn await_turn(&self, turn: u64) -> Result<(), BlockError> {
        if self.opts.out_of_order {
            return Ok(());
        }
        let mut now = self.turn.lock();
        while *now != turn {
            if self.stop.load(Ordering::Relaxed) {
                return Err(BlockError::Stopped);
            }
            self.turned.wait(&mut now);
        }
        Ok(())
    }

    fn end_turn(&self, turn: u64) {
        if !self.opts.out_of_order {
            *self.turn.lock() = turn + 1;
            self.turned.notify_all();
        }
    }
}
