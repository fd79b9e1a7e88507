//! Jobs on a disk that a guest uses: [`stream`] takes into the top image what is below it, [`commit`] moves layers into
//! one below them, [`commit_active`] and [`mirror`] move the guest to another image, [`backup`] and [`backup_pull`]
//! show the disk as it was at one moment.
//!
//! A job is a call that takes as long as it takes, on a thread of the caller's; a [`JobControl`] that both share pauses,
//! slows, ends and watches it. A disk has one job at a time.
//!
//! A crash at any moment leaves images that open and hold what they held: the guest's layers change in one switch of
//! a header, after all that it needs is on stable storage. A job that was cut off starts again from its beginning; a
//! stream or commit finds done what was done. A job that fails leaves the guest on the layers it had, and never fails a
//! request of the guest.

mod backup;
mod blocks;
mod commit;
mod control;
mod live;
mod mirror;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::copy::{CopyOptions, copy};
use crate::disk::{Disk, Tap};
use crate::error::BlockError;
use crate::node::{ExtentKind, Node};
use crate::page_buf::PageBuf;

pub use backup::{BackupOptions, BitmapSync, backup, backup_pull};
pub use commit::{CommitLayers, commit, commit_active};
pub use control::{JobControl, JobState, JobStatus};
pub use live::LiveDisk;
pub use mirror::{MirrorOptions, mirror};
pub use stream::{Base, stream};

/// Bytes a job moves between two looks at what is wanted of it.
const CHUNK_BYTES: u64 = 1 << 20;

/// How a job that can be ended in two ways has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest is on the target.
    Completed,
    /// The guest is where it was; the target holds the disk as it was then.
    Cancelled,
}

/// Runs `work` as the one job of a disk, and tells its watchers when it has ended.
fn as_job<T>(
    live: &LiveDisk,
    control: &JobControl,
    work: impl FnOnce() -> Result<T, BlockError>,
) -> Result<T, BlockError> {
    let claim = live.claim()?;
    let result = work();
    drop(claim);
    control.ended();
    result
}

/// Runs `work` while a tap is told of changes.
fn with_tap<T>(
    live: &LiveDisk,
    tap: &Arc<dyn Tap>,
    work: impl FnOnce() -> Result<T, BlockError>,
) -> Result<T, BlockError> {
    let result = work();
    // The tap may be gone already, with a switch to a target.
    let removed = live.change(|disk| {
        disk.remove_tap(tap);
        Ok(())
    });
    result.and_then(|done| removed.map(|()| done))
}

/// A layer of a disk, of which it is not the top one.
fn check_layer(nodes: &[Arc<dyn Node>], layer: usize) -> Result<(), BlockError> {
    match layer {
        layer if (1..nodes.len()).contains(&layer) => Ok(()),
        layer => Err(BlockError::NoSuchLayer { layer, layers: nodes.len() }),
    }
}

/// Copies what the first `layers` of a disk hold, as a part of a job.
fn copy_all(
    source: &Disk,
    target: &Disk,
    layers: usize,
    target_is_zero: bool,
    control: &JobControl,
) -> Result<(), BlockError> {
    control.add_total(source.size_bytes());
    let sparse_bytes = if layers == usize::MAX { CopyOptions::default().sparse_bytes } else { 0 };
    let options = CopyOptions { layers, target_is_zero, sparse_bytes, ..CopyOptions::default() };
    let told = AtomicU64::new(0);
    copy(source, target, &options, &|done, _| {
        let bytes = done.saturating_sub(told.fetch_max(done, Ordering::Relaxed));
        control.advance(bytes, bytes).is_ok()
    })
}

/// Copies a range of what the first `layers` of a disk hold.
fn copy_range(
    source: &Disk,
    target: &Disk,
    (offset, bytes): (u64, u64),
    layers: usize,
    room: &mut PageBuf,
) -> Result<(), BlockError> {
    let (mut at, end) = (offset, offset + bytes);
    while at < end {
        let found = source.extent(at, (end - at).min(CHUNK_BYTES))?;
        let bytes = found.extent.bytes;
        if found.depth < layers || layers == usize::MAX {
            if found.extent.kind == ExtentKind::Data {
                room.set_len(bytes as usize);
                source.read(at, room)?;
                target.write(at, room)?;
            } else {
                target.write_zeroes(at, bytes, true)?;
            }
        }
        at += bytes;
    }
    Ok(())
}
