//! Taking in what shows through from below, while guests use the image. What is taken in is in
//! [`Tables::filling`] from before it is read below until entries refer to it, so no write of a guest is lost under it.

use parking_lot::MutexGuard;

use image::qcow2::L2Entry;

use super::write::{Plan, Target};
use super::zero::Stop;
use super::{Qcow2Node, Tables};
use crate::error::BlockError;
use crate::node::{Below, read_chain};
use crate::page_buf::PageBuf;
use crate::sys::{ReadBufs, WriteBufs};
use crate::zeroes::for_each_run;

/// Most bytes taken in at once: guests that write there wait as long.
const PULL_MAX_BYTES: u64 = 1 << 20;

impl Qcow2Node {
    /// Takes in the first run of a range; returns how many bytes that were.
    pub(super) fn pull_run(
        &self,
        below: Below<'_>,
        offset: u64,
        bytes: u64,
        room: &mut PageBuf,
    ) -> Result<u64, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let start = offset - self.geometry.in_cluster(offset);
        let max = bytes.min(start + PULL_MAX_BYTES.max(cluster_bytes) - offset);
        let mut tables = self.lock_settled(start, (offset + max).next_multiple_of(cluster_bytes) - start);
        tables.check_writable()?;
        let found = tables.relieve().and_then(|()| tables.run(offset, max));
        let (entry, run) = tables.noticing(found)?;
        if entry != L2Entry::Unallocated {
            return Ok(run);
        }
        let range = start..(offset + run).next_multiple_of(cluster_bytes);
        tables.filling.push(range.clone());
        let result = {
            let _flight = self.enter(&tables);
            room.set_len(run as usize);
            let read = MutexGuard::unlocked(&mut tables, || read_chain(below, offset, &ReadBufs::from_slice(room)));
            read.and_then(|()| self.place_pulled(&mut tables, below, offset, room))
        };
        self.settle(&mut tables, &range);
        tables.noticing(result).map(|()| run)
    }

    /// Puts bytes that showed through where no entry says anything: data into new clusters, zeroes as such.
    fn place_pulled(
        &self,
        tables: &mut MutexGuard<'_, Tables>,
        below: Below<'_>,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), BlockError> {
        let unit = self.geometry.subcluster_bytes();
        for_each_run(bytes, offset, unit, |start, len, is_data| {
            let (mut at, run_end) = (offset + start as u64, offset + (start + len) as u64);
            while at < run_end {
                let mut end = run_end;
                if !is_data {
                    match tables.zero_pass(at, run_end, false)? {
                        Stop::At(next) => {
                            at = next;
                            continue;
                        }
                        Stop::Data { at: data_at, end: data_end } => (at, end) = (data_at, data_end),
                    }
                }
                let part = bytes.get((at - offset) as usize..(end - offset) as usize).unwrap_or_default();
                at += self.place_data(tables, below, at, part)?;
            }
            Ok(())
        })
    }

    /// Fills new clusters with the first of `bytes`; returns how many.
    fn place_data(
        &self,
        tables: &mut MutexGuard<'_, Tables>,
        below: Below<'_>,
        at: u64,
        bytes: &[u8],
    ) -> Result<u64, BlockError> {
        let Plan { bytes: taken, target } = tables.plan(at, bytes.len() as u64)?;
        let part = bytes.get(..taken).unwrap_or_default();
        let Target::Fill(fill) = target else {
            // The range was found unallocated, and nobody else may have filled it since.
            return Err(BlockError::NoPull { path: self.path.clone() });
        };
        let bufs = WriteBufs::from_slice(part);
        let filled = MutexGuard::unlocked(tables, || self.write_filled(below, at, &bufs, &fill));
        tables.refer_or_abandon(&fill, filled).map(|()| taken as u64)
    }
}
