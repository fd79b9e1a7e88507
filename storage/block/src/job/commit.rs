//! Commit: layers move into one below them.

use std::sync::Arc;

use image::Format;

use super::mirror::follow;
use super::{Ending, JobControl, LiveDisk, as_job, check_layer, copy_all};
use crate::create::Preallocation;
use crate::disk::{ChainBackend, Disk};
use crate::error::BlockError;
use crate::qcow2::Qcow2Image;

/// Layers between a disk's top image and its last one.
pub struct CommitLayers {
    /// The first that moves, not the top image: 1 or more.
    pub first: usize,
    /// The one they move into, further down.
    pub base: usize,
    /// The file of that one again, for writing.
    pub base_file: ChainBackend,
    /// The file of the layer above `first` again, for writing; not needed when that is the top image.
    pub overlay_file: Option<ChainBackend>,
    /// The name of the base, and its format, as they shall be stored in the layer above `first`.
    pub base_name: String,
    /// See `base_name`.
    pub base_format: Format,
}

/// Moves layers below the top image into one below them, and leaves them out. Cancelled or cut off, the layers are as
/// they were, and the base holds more of what they hide. [`BlockError::Stopped`]: it was cancelled.
pub fn commit(live: &LiveDisk, layers: CommitLayers, control: &JobControl) -> Result<(), BlockError> {
    as_job(live, control, || {
        let CommitLayers { first, base, base_file, overlay_file, base_name, base_format } = layers;
        check_layer(live.get().nodes(), base)?;
        if first == 0 || first >= base {
            return Err(BlockError::NoSuchLayer { layer: first, layers: base });
        }
        let overlay_file = overlay_file.filter(|_| first > 1);
        let (source, target, overlay) = live.change(|disk| {
            disk.replace_node(base, base_file)?;
            if let Some(file) = overlay_file {
                disk.replace_node(first - 1, file)?;
            }
            let overlay = disk.view(first - 1, false);
            Ok((disk.view(first, true), disk.view(base, false), overlay.qcow2()))
        })?;
        let overlay = overlay.ok_or_else(|| BlockError::NoPull { path: live.get().path().to_owned() })?;
        make_room(&source, &target)?;
        copy_all(&source, &target, base - first, false, control)?;
        if let Some(hidden) = target.size_bytes().checked_sub(source.size_bytes()).filter(|bytes| *bytes > 0) {
            // Behind the end of what moves, the layer above sees zeroes.
            target.write_zeroes(source.size_bytes(), hidden, true)?;
        }
        target.flush()?;
        leave_out(live, first, base, &overlay, &base_name, base_format)
    })
}

fn leave_out(
    live: &LiveDisk,
    first: usize,
    base: usize,
    overlay: &Qcow2Image,
    name: &str,
    format: Format,
) -> Result<(), BlockError> {
    live.change(|disk| {
        overlay.set_backing(Some(name), Some(format.name()))?;
        let mut left = disk.nodes().to_vec();
        left.drain(first..base);
        disk.set_nodes(left);
        Ok(())
    })
}

/// Moves the top image and all layers above `base` into that, and the guest onto it: it follows the guest's writes, says
/// that it is ready, and ends when [`JobControl::complete`] or [`JobControl::cancel`] is called. `base_file` is the file
/// of the base again, for writing. Cancelled or cut off, the layers are as they were, and the base holds more of what
/// they hide.
pub fn commit_active(
    live: &LiveDisk,
    base: usize,
    base_file: ChainBackend,
    control: &Arc<JobControl>,
) -> Result<Ending, BlockError> {
    as_job(live, control, || {
        check_layer(live.get().nodes(), base)?;
        let target = live.change(|disk| {
            disk.replace_node(base, base_file)?;
            Ok(disk.view(base, false))
        })?;
        let source = live.get().view(0, true);
        make_room(&source, &target)?;
        follow(live, target, base, false, control)
    })
}

/// Makes a target as large as what goes into it.
fn make_room(source: &Disk, target: &Disk) -> Result<(), BlockError> {
    match source.size_bytes() > target.size_bytes() {
        true => target.resize(source.size_bytes(), false, Preallocation::Off),
        false => Ok(()),
    }
}
