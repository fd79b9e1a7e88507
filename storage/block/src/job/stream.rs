//! Stream: the top image takes in what shows through it, until it needs some of the layers below no more.

use image::Format;

use super::{CHUNK_BYTES, JobControl, LiveDisk, as_job, check_layer};
use crate::error::BlockError;
use crate::node::ExtentKind;
use crate::page_buf::PageBuf;

/// The layer that stays below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its number; 1 is the one right below the top.
    pub layer: usize,
    /// Its name as it shall be stored in the image above.
    pub name: String,
    /// Its format.
    pub format: Format,
}

/// Takes into the top image what it shows of the layers above `base`, or of all layers, and then leaves them out. A
/// guest that uses the disk sees no difference. Cancelled or cut off, the layers are as they were and the top image
/// holds more than before. [`BlockError::Stopped`]: it was cancelled.
pub fn stream(live: &LiveDisk, base: Option<&Base>, control: &JobControl) -> Result<(), BlockError> {
    as_job(live, control, || {
        let disk = live.get().view(0, false);
        let nodes = disk.nodes();
        let last = base.map_or(nodes.len(), |base| base.layer);
        if base.is_some() {
            check_layer(nodes, last)?;
        }
        let Some((top, below)) = nodes.split_first() else { return Err(BlockError::EmptyChain) };
        let image = disk.qcow2().ok_or_else(|| BlockError::NoPull { path: disk.path().to_owned() })?;
        let size_bytes = disk.size_bytes();
        control.add_total(size_bytes);
        let (mut at, mut room) = (0, PageBuf::default());
        while at < size_bytes {
            let found = disk.extent(at, size_bytes - at)?;
            // A layer that ends early shows zeroes there, which the base may not.
            let is_needed = found.extent.kind == ExtentKind::Data || base.is_some();
            let (bytes, moved) = if (1..last).contains(&found.depth) && is_needed {
                let bytes = top.pull(below, at, found.extent.bytes.min(CHUNK_BYTES), &mut room)?;
                (bytes, bytes)
            } else {
                (found.extent.bytes, 0)
            };
            at += bytes;
            control.advance(bytes, moved)?;
        }
        // Most of what the switch has to wait for, while requests go on.
        disk.flush()?;
        live.change(|live| {
            image.set_backing(base.map(|base| base.name.as_str()), base.map(|base| base.format.name()))?;
            let mut left = nodes.to_vec();
            left.drain(1..last);
            live.set_nodes(left);
            Ok(())
        })
    })
}
