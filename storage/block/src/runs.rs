//! The last run that a disk told of, for those who walk along it in small steps: finding a long run means looking at
//! every entry of it.

use crate::disk::{ChainExtent, Disk};
use crate::error::BlockError;

/// Remembers one run of one disk. What it covers must not change while it is remembered.
#[derive(Default)]
pub(crate) struct Runs {
    start: u64,
    found: Option<ChainExtent>,
}

impl Runs {
    /// [`Disk::extent`], asked only for what is not known yet.
    pub(crate) fn at(&mut self, disk: &Disk, offset: u64, bytes: u64) -> Result<ChainExtent, BlockError> {
        if let (Some(mut rest), Some(gone)) = (self.found, offset.checked_sub(self.start))
            && gone < rest.extent.bytes
        {
            rest.extent.bytes = (rest.extent.bytes - gone).min(bytes);
            rest.extent.host = rest.extent.host.map(|host| host + gone);
            return Ok(rest);
        }
        let found = disk.extent(offset, bytes)?;
        *self = Runs { start: offset, found: Some(found) };
        Ok(found)
    }
}
