//! Backup: the disk as it is at one moment, however it changes afterwards. What a guest is about to change is copied
//! first, if the backup still needs it.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use image::Format;
use parking_lot::{Condvar, Mutex};

use super::blocks::Blocks;
use super::{CHUNK_BYTES, JobControl, LiveDisk, as_job, copy_range, with_tap};
use crate::disk::{ChainBackend, Disk, OpenOptions, Tap};
use crate::error::BlockError;
use crate::io::{ReadBackend, ReadOnly};
use crate::node::ExtentKind;
use crate::page_buf::PageBuf;
use crate::qcow2::BitmapBits;
use crate::sys::ReadBufs;

/// Smallest range that is copied at once.
const BLOCK_BYTES: u64 = 65_536;

/// What becomes of the bitmap that a backup starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapSync {
    /// It stays as it is, and goes on recording.
    Never,
    /// From a backup that succeeds on, it records what changed since that began; one that fails changes nothing.
    OnSuccess,
}

/// What is backed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupOptions {
    /// Only what this bitmap of the top image has marked: the target holds the rest from an earlier backup. `None`: all.
    pub bitmap: Option<(String, BitmapSync)>,
}

/// What a backup still needs, and what is being copied for it.
struct Saving {
    target: Disk,
    state: Mutex<State>,
    saved: Condvar,
    control: Arc<JobControl>,
}

struct State {
    needed: Blocks,
    /// Blocks on their way, which nobody changes meanwhile.
    moving: Vec<Range<u64>>,
    /// What ended the backup.
    failed: Option<BlockError>,
}

impl Tap for Saving {
    fn before(&self, disk: &Disk, offset: u64, bytes: u64) {
        let blocks = self.state.lock().needed.touched(offset, bytes);
        self.save(disk, blocks, &mut PageBuf::default());
    }

    fn after(&self, _: &Disk, _: u64, _: u64) {}
}

impl Saving {
    /// Copies what is needed of some blocks, and waits for what others copy of them. A failure is kept: it ends the
    /// backup, and nothing more is needed.
    fn save(&self, source: &Disk, blocks: Range<u64>, room: &mut PageBuf) {
        let mut state = self.state.lock();
        let mut at = blocks.start;
        while at < blocks.end {
            if state.moving.iter().any(|moving| moving.contains(&at)) {
                self.saved.wait(&mut state);
                continue;
            }
            if state.failed.is_some() || !state.needed.is_set(at) {
                at += 1;
                continue;
            }
            let most = (blocks.end - at).min((CHUNK_BYTES / state.needed.block_bytes()).max(1));
            let is_taken = |block: u64| state.moving.iter().any(|moving| moving.contains(&block));
            let run = (at..at + most).take_while(|block| state.needed.is_set(*block) && !is_taken(*block)).count();
            let run = at..at + run as u64;
            let range = state.needed.bytes_of(&run);
            state.moving.push(run.clone());
            let copied = parking_lot::MutexGuard::unlocked(&mut state, || {
                copy_range(source, &self.target, range, usize::MAX, room)
            });
            state.moving.retain(|moving| *moving != run);
            match copied {
                Ok(()) => run.clone().for_each(|block| state.needed.clear(block)),
                Err(error) => {
                    state.failed.get_or_insert(error);
                }
            }
            self.saved.notify_all();
            at = run.end;
        }
    }

    fn failure(&self) -> Result<(), BlockError> {
        self.state.lock().failed.take().map_or(Ok(()), Err)
    }
}

/// Starts to save what changes: from here on, the moment is fixed.
fn begin(
    live: &LiveDisk,
    target: Disk,
    options: &BackupOptions,
    control: &Arc<JobControl>,
) -> Result<(Arc<Saving>, Disk, Option<BitmapBits>), BlockError> {
    live.change(|disk| {
        let need = disk.size_bytes();
        if target.size_bytes() < need {
            return Err(BlockError::TargetTooSmall { path: target.path().to_owned(), have: target.size_bytes(), need });
        }
        let mut needed = Blocks::new(need, BLOCK_BYTES.max(target.cluster_bytes()));
        let mut bits = None;
        match &options.bitmap {
            None => {
                let all = needed.touched(0, need);
                needed.set(all);
            }
            Some((name, sync)) => {
                let image = disk.qcow2().ok_or_else(|| BlockError::NoBitmaps { path: disk.path().to_owned() })?;
                let marked = image.bitmap_bits(name)?;
                for (offset, bytes) in marked.ranges() {
                    let blocks = needed.touched(offset, bytes);
                    needed.set(blocks);
                }
                if *sync == BitmapSync::OnSuccess {
                    image.clear_bitmap(name)?;
                    bits = Some(marked);
                }
            }
        }
        control.add_total(needed.set_bytes());
        let state = Mutex::new(State { needed, moving: Vec::new(), failed: None });
        let saving = Arc::new(Saving { target, state, saved: Condvar::new(), control: control.clone() });
        disk.add_tap(saving.clone());
        Ok((saving, disk.view(0, true), bits))
    })
}

/// Copies the disk as it is now, or what a bitmap has marked of it, into `target`, a disk at least as large.
/// [`BlockError::Stopped`]: it was cancelled, and the target is not complete.
pub fn backup(
    live: &LiveDisk,
    target: Disk,
    options: &BackupOptions,
    control: &Arc<JobControl>,
) -> Result<(), BlockError> {
    as_job(live, control, || {
        let (saving, source, bits) = begin(live, target, options, control)?;
        let tap: Arc<dyn Tap> = saving.clone();
        let result = with_tap(live, &tap, || saving.copy_rest(&source));
        match (&result, bits, &options.bitmap) {
            (Err(_), Some(bits), Some((name, _))) => {
                let image = source.qcow2().ok_or_else(|| BlockError::NoBitmaps { path: source.path().to_owned() })?;
                // What changed since is marked there; what was to be backed up belongs there too. The disk may have grown.
                let bits = bits.resized(source.size_bytes()).unwrap_or(bits);
                image.merge_bitmap(name, &bits).and(result)
            }
            _ => result,
        }
    })
}

impl Saving {
    /// Copies what is still needed, in order.
    fn copy_rest(&self, source: &Disk) -> Result<(), BlockError> {
        let mut room = PageBuf::default();
        loop {
            self.failure()?;
            let (run, bytes) = {
                let state = self.state.lock();
                let most = (CHUNK_BYTES / state.needed.block_bytes()).max(1);
                let Some(run) = state.needed.first_run(0, most) else { break };
                let bytes = (run.end - run.start) * state.needed.block_bytes();
                (run, bytes)
            };
            self.save(source, run, &mut room);
            self.control.advance(bytes, bytes)?;
        }
        self.failure()?;
        self.target.flush()
    }
}

/// Calls `serve` with the disk as it is now, read only, and keeps it so until `serve` returns: what a guest is about to
/// change is copied to `scratch` first, an empty disk at least as large. For a client that fetches a backup, by
/// [`crate::nbd::serve`] for example.
pub fn backup_pull<T>(
    live: &LiveDisk,
    scratch: Disk,
    control: &Arc<JobControl>,
    serve: impl FnOnce(&Disk) -> T,
) -> Result<T, BlockError> {
    as_job(live, control, || {
        let (saving, source, _) = begin(live, scratch, &BackupOptions::default(), control)?;
        let tap: Arc<dyn Tap> = saving.clone();
        with_tap(live, &tap, || {
            let path = PathBuf::from(source.path());
            let file = Box::new(ReadOnly(Moment { source, saving: saving.clone() }));
            let layer = ChainBackend { file, path_label: path, format: Format::Raw, extents: Vec::new() };
            let options = OpenOptions { read_only: true, format: Format::Raw, ..OpenOptions::default() };
            let disk = Disk::open_backends(vec![layer], &options)?;
            let served = serve(&disk);
            saving.failure()?;
            Ok(served)
        })
    })
}

/// A disk as it was at one moment, as a file.
struct Moment {
    source: Disk,
    saving: Arc<Saving>,
}

impl Moment {
    /// Whether a range is still as it was, and how many bytes from its start that answer is good for.
    fn is_unchanged(&self, offset: u64, bytes: u64) -> (bool, u64) {
        let state = self.saving.state.lock();
        let blocks = state.needed.touched(offset, bytes);
        let first = state.needed.is_set(blocks.start);
        let same = blocks.clone().take_while(|block| state.needed.is_set(*block) == first).count() as u64;
        let (start, length) = state.needed.bytes_of(&(blocks.start..blocks.start + same));
        (first, (start + length).saturating_sub(offset).min(bytes))
    }
}

impl ReadBackend for Moment {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let inside = self.source.size_bytes().saturating_sub(offset).min(bufs.len() as u64) as usize;
        bufs.range(inside, bufs.len() - inside).fill_zero();
        let mut room = PageBuf::default();
        let mut done = 0;
        while done < inside {
            let at = offset + done as u64;
            let (unchanged, bytes) = self.is_unchanged(at, ((inside - done) as u64).min(CHUNK_BYTES));
            room.set_len(bytes as usize);
            let from = if unchanged { &self.source } else { &self.saving.target };
            from.read(at, &mut room).map_err(io::Error::other)?;
            // A change waits until what it replaces is saved: if nothing of it is by now, this was read before.
            if unchanged && self.is_unchanged(at, bytes) != (true, bytes) {
                continue;
            }
            if let Some(error) = &self.saving.state.lock().failed {
                return Err(io::Error::other(error.to_string()));
            }
            bufs.range(done, bytes as usize).copy_from(&room);
            done += bytes as usize;
        }
        Ok(())
    }
    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let inside = self.source.size_bytes().saturating_sub(offset).min(bytes);
        if inside == 0 {
            return Ok((bytes, false));
        }
        let (unchanged, bytes) = self.is_unchanged(offset, inside);
        let from = if unchanged { &self.source } else { &self.saving.target };
        let found = from.extent(offset, bytes).map_err(io::Error::other)?.extent;
        // What is a hole by now may have been data when the moment was; the other way round it does not matter.
        let still = !unchanged || self.is_unchanged(offset, found.bytes) == (true, found.bytes);
        Ok((found.bytes, found.kind == ExtentKind::Data || !still))
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.source.size_bytes())
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.source.counters().allocated_bytes)
    }
}
