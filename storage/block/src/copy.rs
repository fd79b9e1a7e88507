//! Copying one disk into another. Several threads share the work: each takes the next run of
//! the source, reads it and, when its turn has come, writes it.

use std::fs::File;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::crew::Crew;
use crate::disk::{ChainExtent, Disk};
use crate::error::{Action, BlockError};
use crate::host_file::{copy_inside_kernel, shares_blocks};
use crate::node::{ExtentKind, Mapped};
use crate::page_buf::PageBuf;
use crate::runs::Runs;
use crate::sys::{ReadBufs, WriteBufs, pread};
use crate::zeroes::{for_each_run, is_zero};

/// Bytes that one thread holds at a time. Small enough to stay in the processor's cache between the read that
/// fills them and the write that takes them.
pub(crate) const CHUNK_BYTES: u64 = 256 << 10;
/// The same where the source is compressed, and taking it apart costs much more than a step.
const COMPRESSED_CHUNK_BYTES: u64 = 64 << 10;
/// The same for files that bypass the page cache: a huge page.
const DIRECT_CHUNK_BYTES: u64 = 2 << 20;
/// A step fills whole clusters of the target, so that they are written once. Larger ones than this are filled in parts.
const CHUNK_MAX_BYTES: u64 = 2 << 20;
/// Least threads when each waits for the device.
const DIRECT_WORKERS: usize = 3;
/// Zeroes that one step skips or writes.
const ZERO_STEP_BYTES: u64 = 1 << 30;

/// How a disk is copied.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Threads, 1 to 16; all of them where a server keeps them waiting.
    pub workers: usize,
    /// Let writes overtake each other.
    pub out_of_order: bool,
    /// Store clusters compressed.
    pub compressed: bool,
    /// Smallest run of zeroes that is looked for in data, in bytes; 0 looks for none.
    pub sparse_bytes: u64,
    /// The target reads as zeroes where nothing was written: zeroes need no writing.
    pub target_is_zero: bool,
    /// Write zeroes as data, so that the target takes all its space.
    pub allocate_all: bool,
    /// Copy only what this many images of the source hold, from the top one on: what is below them is below the
    /// target too. `usize::MAX` copies all.
    pub layers: usize,
    /// Where the copy starts in the target.
    pub target_offset: u64,
    /// Leave what the target's top image holds as it is: copy only what shows through it.
    pub unmapped_only: bool,
    /// Let the host copy from file to file also where it shares no blocks and leaves the work to no server.
    pub offload: bool,
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
            allocate_all: false,
            layers: usize::MAX,
            target_offset: 0,
            unmapped_only: false,
            offload: false,
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
    /// The layer whose file holds the bytes as they are.
    from_file: Option<usize>,
}

/// How far one decision about the source reaches, and what it is: the kind of step, and the layer whose file holds the
/// bytes; `None` when nothing has to be done.
struct Run {
    bytes: u64,
    work: Option<(ExtentKind, Option<usize>)>,
}

/// A part of a step on its way into the target.
struct Place<'a> {
    /// Where it starts in the step.
    start: u64,
    bytes: u64,
    way: Way<'a>,
}

enum Way<'a> {
    /// To this place in a file.
    Mapped(Mapped<'a>),
    /// The target must write it.
    Written,
    /// It is zeroes. Done after the places before it, which may be filling the cluster that it starts in.
    Zeroes,
}

/// How far the source has been given out.
#[derive(Default)]
struct Cursor {
    /// Where the next step starts.
    offset: u64,
    /// Its place in the order of writes.
    turn: u64,
    source: Runs,
    target: Runs,
}

/// What the threads of a copy share.
struct Shared<'a> {
    source: &'a Disk,
    target: &'a Disk,
    opts: &'a CopyOptions,
    chunk_bytes: u64,
    next: Mutex<Cursor>,
    /// The turn that may write.
    turn: Mutex<u64>,
    turned: Condvar,
    stop: AtomicBool,
    /// Held by who writes to the page cache. The kernel lets one thread at a time write to a file, and others spin for
    /// as long as that takes.
    writes: Mutex<()>,
    /// Whether the source's file system may copy inside the kernel without moving bytes, asked once.
    shares_blocks: OnceLock<bool>,
    /// These two files cannot be copied inside the kernel.
    no_kernel_copy: AtomicBool,
    done_bytes: AtomicU64,
    error: Mutex<Option<BlockError>>,
    crew: Crew,
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
    let stream = target.is_stream();
    // Direct I/O waits for the device each time: more requests at once, and larger ones, keep it busy.
    let direct = source.is_direct() || target.is_direct();
    let opts = &CopyOptions {
        workers: if direct { opts.workers.max(DIRECT_WORKERS) } else { opts.workers },
        compressed: opts.compressed || stream,
        out_of_order: opts.out_of_order && !stream,
        ..opts.clone()
    };
    let chunk_bytes = if direct { DIRECT_CHUNK_BYTES } else { CHUNK_BYTES };
    // Compressed clusters are written whole, so steps are whole clusters.
    let unit = if opts.compressed { target.cluster_bytes().max(512) } else { 4096 };
    let shared = Shared {
        source,
        target,
        opts,
        chunk_bytes: match (opts.compressed, target.cluster_bytes()) {
            (true, _) => unit,
            (false, whole @ ..=CHUNK_MAX_BYTES) => chunk_bytes.max(whole),
            (false, _) => chunk_bytes,
        },
        next: Mutex::new(Cursor::default()),
        turn: Mutex::new(0),
        turned: Condvar::new(),
        writes: Mutex::new(()),
        stop: AtomicBool::new(false),
        shares_blocks: OnceLock::new(),
        no_kernel_copy: AtomicBool::new(false),
        done_bytes: AtomicU64::new(0),
        error: Mutex::new(None),
        crew: Crew::new(opts.workers, source.is_remote() || target.is_remote()),
        progress,
    };
    shared.crew.run(&|| shared.work());
    match shared.error.into_inner() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Shared<'_> {
    fn work(&self) {
        let mut room = PageBuf::default();
        let mut packed = Vec::new();
        loop {
            let result = match self.take() {
                Ok(Some(step)) => self.crew.step(|| self.perform(&step, &mut room, &mut packed)),
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
        while next.offset < self.source.size_bytes() && !self.stop.load(Ordering::Relaxed) {
            let offset = next.offset;
            let Run { bytes, work } = self.run_at(&mut next)?;
            next.offset = offset + bytes;
            let Some((kind, from_file)) = work else {
                self.report(bytes);
                continue;
            };
            next.turn += 1;
            return Ok(Some(Step { turn: next.turn - 1, offset, bytes, kind, from_file }));
        }
        Ok(None)
    }

    /// Decides what is done with the bytes at the cursor, and how many of them.
    fn run_at(&self, next: &mut Cursor) -> Result<Run, BlockError> {
        let (offset, left) = (next.offset, self.source.size_bytes() - next.offset);
        let ChainExtent { depth, extent } = next.source.at(self.source, offset, left.min(ZERO_STEP_BYTES))?;
        let (mut bytes, mut held) = (extent.bytes, false);
        if self.opts.unmapped_only {
            let there = next.target.at(self.target, self.opts.target_offset + offset, bytes)?;
            bytes = there.extent.bytes;
            held = there.depth == 0 && there.extent.kind != ExtentKind::Below;
        }
        let is_part = self.opts.layers != usize::MAX;
        // A layer that ends early shows zeroes there, whatever is below it.
        let left_below = held || is_part && depth >= self.opts.layers;
        let all = self.opts.allocate_all;
        let nothing = left_below || (extent.kind != ExtentKind::Data && self.opts.target_is_zero && !all);
        if self.opts.compressed {
            // A cluster that is partly data is read whole.
            let whole = bytes / self.chunk_bytes * self.chunk_bytes;
            let skipped = nothing && (whole > 0 || bytes == left);
            let bytes = if nothing && whole > 0 { whole } else { self.chunk_bytes.min(left) };
            return Ok(Run { bytes, work: (!skipped).then_some((ExtentKind::Data, None)) });
        }
        if nothing {
            return Ok(Run { bytes, work: None });
        }
        if extent.kind != ExtentKind::Data && !all {
            return Ok(Run { bytes, work: Some((extent.kind, None)) });
        }
        let most = match extent.compressed {
            true => COMPRESSED_CHUNK_BYTES.max(self.target.cluster_bytes()).min(self.chunk_bytes),
            false => self.chunk_bytes,
        };
        // Steps end at chunk boundaries, so that a run that starts raggedly does not stay ragged.
        let chunk = (most - offset % most).min(left);
        // A compressed cluster is a run of its own; what follows is read with it, and zeroes will show.
        let any = extent.compressed && !is_part && !self.opts.unmapped_only;
        let bytes = if any { chunk } else { bytes.min(chunk) };
        let from_file = extent.host.filter(|_| !all).map(|_| depth);
        Ok(Run { bytes, work: Some((ExtentKind::Data, from_file)) })
    }

    fn report(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if !(self.progress)(done, self.source.size_bytes()) {
            self.fail(BlockError::Stopped);
        }
    }

    fn perform(&self, step: &Step, room: &mut PageBuf, packed: &mut Vec<u8>) -> Result<(), BlockError> {
        let target_offset = self.opts.target_offset + step.offset;
        if step.kind != ExtentKind::Data {
            self.await_turn(step.turn)?;
            self.target.write_zeroes(target_offset, step.bytes, true)?;
            self.end_turn(step.turn);
        } else if self.opts.compressed {
            let bytes = self.read(step, room)?;
            self.write_compressed(step.turn, target_offset, bytes, packed)?;
            self.end_turn(step.turn);
        } else {
            self.copy_data(step, room)?;
        }
        self.report(step.bytes);
        Ok(())
    }

    fn read<'r>(&self, step: &Step, room: &'r mut PageBuf) -> Result<&'r mut [u8], BlockError> {
        // Once, for the largest step: growing it later would copy it. What no step fills takes no memory.
        room.set_len(self.chunk_bytes.max(step.bytes) as usize);
        let bytes = room.get_mut(..step.bytes as usize).unwrap_or_default();
        self.source.read(step.offset, bytes)?;
        Ok(bytes)
    }

    /// Copies a step from file to file inside the kernel where that can be done, else through memory. Places are
    /// taken in turn, so that the target is laid out in order; the bytes move when others have their turn.
    fn copy_data(&self, step: &Step, room: &mut PageBuf) -> Result<(), BlockError> {
        let target_offset = self.opts.target_offset + step.offset;
        // Held until the bytes have moved: the place stays the source's as long.
        let mapped = self.map_source(step)?;
        let in_file = mapped.as_ref().and_then(|place| Some((place.file.as_host_file()?, place.host)));
        let source = match in_file.filter(|(file, _)| self.may_share_blocks(file)) {
            Some((file, host)) if !self.may_hold_zeroes(file, host, step)? => Some((file, host)),
            _ => None,
        };
        let bytes: &[u8] = if source.is_some() { &[] } else { self.read(step, room)? };
        self.await_turn(step.turn)?;
        let mut places = Vec::new();
        match source {
            Some(_) => self.take_places(target_offset, 0, step.bytes, &mut places)?,
            None => for_each_run(bytes, target_offset, self.block_bytes(), |start, len, data| {
                let (start, len) = (start as u64, len as u64);
                if data || self.opts.sparse_bytes == 0 {
                    self.take_places(target_offset, start, len, &mut places)?;
                } else if !self.opts.target_is_zero {
                    places.push(Place { start, bytes: len, way: Way::Zeroes });
                }
                Ok(())
            })?,
        }
        self.end_turn(step.turn);
        places.into_iter().try_for_each(|place| self.move_bytes(step, place, source, bytes))
    }

    /// Where bytes have to move, they had better move through memory: looking for zeroes by itself, with a call for
    /// each block, costs more than the copy that goes with it.
    fn may_share_blocks(&self, file: &File) -> bool {
        let shares = self.opts.offload || *self.shares_blocks.get_or_init(|| shares_blocks(file));
        if !shares {
            self.no_kernel_copy.store(true, Ordering::Relaxed);
        }
        shares
    }

    /// Where all of a step is in one file, if it may be copied from there.
    fn map_source(&self, step: &Step) -> Result<Option<Mapped<'_>>, BlockError> {
        let Some(depth) = step.from_file.filter(|_| !self.no_kernel_copy.load(Ordering::Relaxed)) else {
            return Ok(None);
        };
        let mapped = self.source.map_read(depth, step.offset, step.bytes)?;
        Ok(mapped.filter(|place| place.bytes == step.bytes))
    }

    /// Moves the bytes of one place: out of the source's file, or out of memory.
    fn move_bytes(
        &self,
        step: &Step,
        place: Place<'_>,
        source: Option<(&File, u64)>,
        bytes: &[u8],
    ) -> Result<(), BlockError> {
        let Place { start, bytes: len, way } = place;
        let offset = self.opts.target_offset + step.offset + start;
        let failed = |e| BlockError::io(self.target.path(), Action::Write, e);
        let in_kernel = !self.no_kernel_copy.load(Ordering::Relaxed);
        let way = match (way, source.filter(|_| in_kernel)) {
            (Way::Zeroes, _) => return self.target.write_zeroes(offset, len, true),
            (Way::Mapped(place), Some((from, host))) => {
                let copied = match place.file.as_host_file() {
                    Some(to) => copy_inside_kernel(from, host + start, to, place.host, len).map_err(failed)?,
                    None => false,
                };
                if copied {
                    return place.finish().and_then(|()| self.target.written());
                }
                self.no_kernel_copy.store(true, Ordering::Relaxed);
                Way::Mapped(place)
            }
            (Way::Written, Some(_)) => {
                // A target that takes all its data itself gets nothing from looking at the source's file first.
                self.no_kernel_copy.store(true, Ordering::Relaxed);
                Way::Written
            }
            (way, _) => way,
        };
        let mut scratch = PageBuf::default();
        let part = match bytes.get(start as usize..(start + len) as usize) {
            Some(part) => part,
            None => {
                scratch.set_len(len as usize);
                self.source.read(step.offset + start, &mut scratch)?;
                &scratch
            }
        };
        match way {
            Way::Mapped(place) => {
                let _alone = place.file.as_host_file().map(|_| self.writes.lock());
                place.file.write_at(place.host, &WriteBufs::from_slice(part)).map_err(failed)?;
                place.finish().and_then(|()| self.target.written())
            }
            _ => {
                let _alone = self.target.writes_to_page_cache().then(|| self.writes.lock());
                self.target.write(offset, part)
            }
        }
    }

    /// Blocks that are looked at for zeroes; one larger than any step when none are.
    fn block_bytes(&self) -> u64 {
        if self.opts.sparse_bytes == 0 { u64::MAX } else { self.opts.sparse_bytes }
    }

    /// Takes places in the target's file for `bytes` at `start` of a step. Where the target must write itself
    /// (a part of a cluster with data around it), there is no place.
    fn take_places<'p>(
        &'p self,
        target_offset: u64,
        mut start: u64,
        bytes: u64,
        places: &mut Vec<Place<'p>>,
    ) -> Result<(), BlockError> {
        let end = start + bytes;
        let cluster = self.target.cluster_bytes();
        while start < end {
            let at = target_offset + start;
            let alone = if cluster == 0 { u64::MAX } else { cluster - at % cluster };
            // A cluster that an earlier place is filling is written after that, by the target.
            let last_byte = places.last().map(|last| target_offset + last.start + last.bytes - 1);
            let shares = last_byte.is_some_and(|last| last.checked_div(cluster) == at.checked_div(cluster));
            let mapped = if shares && cluster > 0 { None } else { self.target.map_write(at, end - start)? };
            let bytes = mapped.as_ref().map_or(alone, |place| place.bytes).min(end - start);
            places.push(Place { start, bytes, way: mapped.map_or(Way::Written, Way::Mapped) });
            start += bytes;
        }
        Ok(())
    }

    /// Whether a block of the step begins with zeroes: then all of it may be zeroes.
    fn may_hold_zeroes(&self, from: &File, host: u64, step: &Step) -> Result<bool, BlockError> {
        let mut at = 0;
        while self.opts.sparse_bytes > 0 && at < step.bytes {
            let mut first = [0; 16];
            let got = pread(from, host + at, &ReadBufs::from_slice(&mut first));
            let got = got.map_err(|e| BlockError::io(self.source.path(), Action::Read, e))?;
            if got < first.len() || first == [0; 16] {
                return Ok(true);
            }
            at += self.opts.sparse_bytes - (self.opts.target_offset + step.offset + at) % self.opts.sparse_bytes;
        }
        Ok(false)
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
        // A source may end inside a cluster of a larger target, which keeps what is behind.
        let end = offset + bytes.len() as u64;
        let whole = bytes.len() as u64 == self.chunk_bytes || end == self.target.size_bytes();
        let smaller = whole && self.target.pack(bytes, packed)?;
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
