//! Mirror: a target becomes what the disk is, follows its changes, and can take its place.

use std::sync::Arc;

use parking_lot::Mutex;

use super::blocks::Blocks;
use super::control::End;
use super::{Ending, JobControl, LiveDisk, as_job, copy_all, copy_range, with_tap};
use crate::disk::{Disk, Tap};
use crate::error::BlockError;
use crate::page_buf::PageBuf;

/// Smallest range whose change is remembered.
const BLOCK_BYTES: u64 = 65_536;

/// What goes into the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorOptions {
    /// How many layers of the disk, from the top one on; what is below them is below the target too. `usize::MAX`:
    /// all of them.
    pub layers: usize,
    /// The target reads as zeroes.
    pub target_is_zero: bool,
}

impl Default for MirrorOptions {
    /// All of the disk into a target that holds anything.
    fn default() -> MirrorOptions {
        MirrorOptions { layers: usize::MAX, target_is_zero: false }
    }
}

/// Remembers which blocks have changed.
struct Changes {
    dirty: Mutex<Blocks>,
    control: Arc<JobControl>,
}

impl Tap for Changes {
    fn before(&self, _: &Disk, _: u64, _: u64) {}

    fn after(&self, _: &Disk, offset: u64, bytes: u64) {
        let added = {
            let mut dirty = self.dirty.lock();
            let blocks = dirty.touched(offset, bytes);
            dirty.set(blocks) * dirty.block_bytes()
        };
        if added > 0 {
            self.control.add_total(added);
            self.control.wake();
        }
    }
}

impl Changes {
    /// Copies blocks that have changed, one run of them; returns how many bytes, 0 when there are none.
    fn copy_run(&self, source: &Disk, target: &Disk, layers: usize, room: &mut PageBuf) -> Result<u64, BlockError> {
        let (range, blocks) = {
            let mut dirty = self.dirty.lock();
            let most = (super::CHUNK_BYTES / dirty.block_bytes()).max(1);
            let Some(run) = dirty.first_run(0, most) else { return Ok(0) };
            // Before it is read: what changes while it is read is copied again.
            run.clone().for_each(|block| dirty.clear(block));
            (dirty.bytes_of(&run), (run.end - run.start) * dirty.block_bytes())
        };
        copy_range(source, target, range, layers, room)?;
        Ok(blocks)
    }
}

/// Makes `target`, a disk at least as large, what the disk is, and keeps it so until [`JobControl::complete`] moves the
/// guest onto it or [`JobControl::cancel`] lets it be. A failure leaves the guest where it was.
pub fn mirror(
    live: &LiveDisk,
    target: Disk,
    options: &MirrorOptions,
    control: &Arc<JobControl>,
) -> Result<Ending, BlockError> {
    as_job(live, control, || {
        let need = live.get().size_bytes();
        if target.size_bytes() < need {
            return Err(BlockError::TargetTooSmall { path: target.path().to_owned(), have: target.size_bytes(), need });
        }
        follow(live, target, options.layers, options.target_is_zero, control)
    })
}

/// Copies everything, then what has changed, again and again.
pub(super) fn follow(
    live: &LiveDisk,
    target: Disk,
    layers: usize,
    target_is_zero: bool,
    control: &Arc<JobControl>,
) -> Result<Ending, BlockError> {
    let size_bytes = live.get().size_bytes();
    let dirty = Mutex::new(Blocks::new(size_bytes, BLOCK_BYTES.max(target.cluster_bytes())));
    let changes = Arc::new(Changes { dirty, control: control.clone() });
    let tap: Arc<dyn Tap> = changes.clone();
    let source = live.change(|disk| {
        disk.add_tap(tap.clone());
        Ok(disk.view(0, true))
    })?;
    with_tap(live, &tap, || {
        match copy_all(&source, &target, layers, target_is_zero, control) {
            Err(BlockError::Stopped) => return Ok(Ending::Cancelled),
            copied => copied?,
        }
        let mut room = PageBuf::default();
        loop {
            let bytes = changes.copy_run(&source, &target, layers, &mut room)?;
            if bytes > 0 {
                match control.advance(bytes, bytes) {
                    Err(BlockError::Stopped) => return Ok(Ending::Cancelled),
                    advanced => advanced?,
                }
                continue;
            }
            match control.idle(|| changes.dirty.lock().first_run(0, 1).is_some()) {
                None => {}
                Some(End::Cancel) => {
                    target.flush()?;
                    return Ok(Ending::Cancelled);
                }
                Some(End::Complete) => break,
            }
        }
        // Most of what the switch has to wait for, while requests go on.
        target.flush()?;
        live.change(|disk| {
            while changes.copy_run(&source, &target, layers, &mut room)? > 0 {}
            target.flush()?;
            disk.remove_tap(&tap);
            disk.move_to(target);
            Ok(Ending::Completed)
        })
    })
}
