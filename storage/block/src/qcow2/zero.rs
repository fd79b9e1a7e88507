//! Zeroing and discarding whole clusters by their entries; the ragged ends of a range as data.

use image::qcow2::{
    ExtendedEntry, Freed, SUBCLUSTERS, Subclusters, ZeroPlan, plan_discard, plan_zero, subcluster_mask,
};

use super::{Qcow2Node, Tables};
use crate::error::BlockError;
use crate::node::Below;

/// Entries that change before others get their turn at the lock.
const STEPS_MAX: usize = 1024;

/// Where a pass over the tables stopped.
pub(super) enum Stop {
    /// Everything before this offset is done.
    At(u64),
    /// From `at` to `end`, inside one cluster, zeroes must be written as data.
    Data { at: u64, end: u64 },
}

impl Qcow2Node {
    /// Makes a range inside the disk read as zeroes.
    pub(super) fn zero_all(
        &self,
        below: Below<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> Result<(), BlockError> {
        self.pass_down(offset, bytes, may_unmap)?;
        let end = offset + bytes;
        let mut at = offset;
        let mut recorded = None;
        while at < end {
            let mut tables = self.lock_settled(at, end - at);
            tables.go_on_changing(&mut recorded, at, end - at)?;
            let result = tables.relieve().and_then(|()| tables.zero_pass(at, end, may_unmap));
            let stop = tables.noticing(result)?;
            drop(tables);
            at = match stop {
                Stop::At(at) => at,
                Stop::Data { at, end } => {
                    self.write_zero_data(below, at, end - at)?;
                    end
                }
            };
        }
        self.pass_zeroes(offset, bytes, may_unmap).map(|_| ())
    }

    /// Discards the whole clusters of a range inside the disk.
    pub(super) fn discard_all(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let end = offset + bytes;
        let mut at = offset.next_multiple_of(cluster_bytes);
        let to_disk_end = end >= self.size_bytes();
        let (first, stop) = (at, if to_disk_end { end } else { end - self.geometry.in_cluster(end) });
        if first < stop {
            self.pass_down(first, stop - first, true)?;
        }
        let mut recorded = None;
        while at < end && (end - at >= cluster_bytes || to_disk_end) {
            let mut tables = self.lock_settled(at, end - at);
            tables.go_on_changing(&mut recorded, at, end - at)?;
            let result = tables.relieve().and_then(|()| tables.discard_pass(at, end));
            at = tables.noticing(result)?;
        }
        if first < stop { self.pass_zeroes(first, stop - first, true).map(|_| ()) } else { Ok(()) }
    }
}

impl Tables {
    /// As [`Tables::begin_change`], for the next pass over one range: what was recorded stays so until bitmaps are
    /// stored.
    fn go_on_changing(&mut self, recorded: &mut Option<u64>, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_writable()?;
        let stored = matches!(self.recording, super::Recording::Stored);
        if stored || *recorded != Some(self.recordings) {
            self.begin_change(offset, bytes)?;
            *recorded = Some(self.recordings);
        }
        Ok(())
    }

    pub(super) fn zero_pass(&mut self, mut at: u64, end: u64, may_unmap: bool) -> Result<Stop, BlockError> {
        for _ in 0..STEPS_MAX {
            if at >= end {
                break;
            }
            match self.zero_step(at, end, may_unmap)? {
                Stop::At(next) => at = next,
                data => return Ok(data),
            }
        }
        Ok(Stop::At(at))
    }

    /// Handles what lies in one cluster, or skips what no table maps.
    fn zero_step(&mut self, at: u64, end: u64, may_unmap: bool) -> Result<Stop, BlockError> {
        let has_backing = self.options.has_backing;
        if !has_backing && self.l1_entry(at)?.table.is_none() {
            let reach = self.geometry.l2_reach_bytes();
            return Ok(Stop::At((at - at % reach).saturating_add(reach).min(end)));
        }
        if self.geometry.extended_l2 {
            return self.zero_subclusters(at, end, may_unmap);
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let next = (at - self.geometry.in_cluster(at)).saturating_add(cluster_bytes);
        let whole = self.geometry.is_aligned(at) && (end >= next || end >= self.size_bytes());
        let next = next.min(end);
        if !whole {
            return Ok(if self.reads_zero(at)? { Stop::At(next) } else { Stop::Data { at, end: next } });
        }
        let entry = self.entry(at)?;
        match plan_zero(entry, &self.geometry, has_backing, may_unmap) {
            ZeroPlan::Keep => {}
            ZeroPlan::Set { raw, free } => self.replace(at, [raw, 0], free)?,
            ZeroPlan::WriteData => return Ok(Stop::Data { at, end: next }),
        }
        Ok(Stop::At(next))
    }

    /// Zeroes the whole subclusters of a range inside one cluster by the bitmap; what is left at its ends, as data.
    fn zero_subclusters(&mut self, at: u64, end: u64, may_unmap: bool) -> Result<Stop, BlockError> {
        let (geometry, unit) = (self.geometry, self.geometry.subcluster_bytes());
        let start = at - geometry.in_cluster(at);
        // What lies behind the end of the disk belongs to its last cluster.
        let to_disk_end = end >= self.size_bytes();
        let next = start.saturating_add(geometry.cluster_bytes());
        let stop = next.min(end);
        let (first, last) = ((at - start).div_ceil(unit), (stop - start) / unit);
        let last = if stop == next || to_disk_end { SUBCLUSTERS } else { last };
        if !at.is_multiple_of(unit) || first >= last {
            let stop = stop.min(at - at % unit + unit);
            return Ok(if self.reads_zero(at)? { Stop::At(stop) } else { Stop::Data { at, end: stop } });
        }
        let done = Stop::At((start + last * unit).min(stop));
        let mask = subcluster_mask(first, last);
        let [raw, _] = self.raw_entry(at)?;
        let (host, before) = match self.extended_entry(at)? {
            ExtendedEntry::Standard { host, subclusters, .. } => (host, subclusters),
            ExtendedEntry::Compressed { .. } if mask == u32::MAX => {
                let free = self.freed_by(at)?;
                self.replace(at, [0, Subclusters::ALL_ZERO.bitmap()], free)?;
                return Ok(done);
            }
            ExtendedEntry::Compressed { .. } => return Ok(Stop::Data { at, end: (start + last * unit).min(stop) }),
        };
        let after = before.with_zero(mask);
        let unmap = host.is_some() && after.data == 0 && may_unmap;
        let reads_zero = before.data & mask == 0 && (!self.options.has_backing || before.zero & mask == mask);
        if unmap {
            let free = self.freed_by(at)?;
            self.replace(at, [0, after.bitmap()], free)?;
        } else if !reads_zero {
            self.replace(at, [raw, after.bitmap()], None)?;
        }
        Ok(done)
    }

    fn replace(&mut self, offset: u64, entry: [u64; 2], free: Option<Freed>) -> Result<(), BlockError> {
        self.set_entries(offset, std::iter::once(entry))?;
        if let Some(Freed { offset, bytes }) = free {
            self.free_later(offset, bytes);
        }
        Ok(())
    }

    fn discard_pass(&mut self, mut at: u64, end: u64) -> Result<u64, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let to_disk_end = end >= self.size_bytes();
        for _ in 0..STEPS_MAX {
            if at >= end || (end - at < cluster_bytes && !to_disk_end) {
                break;
            }
            at = self.discard_step(at, end)?;
        }
        Ok(at)
    }

    fn discard_step(&mut self, at: u64, end: u64) -> Result<u64, BlockError> {
        let shows_through = self.options.has_backing && self.geometry.version >= 3;
        if !shows_through && self.l1_entry(at)?.table.is_none() {
            let reach = self.geometry.l2_reach_bytes();
            return Ok((at - at % reach).saturating_add(reach).min(end));
        }
        if self.geometry.extended_l2 {
            let gone = if self.options.has_backing { Subclusters::ALL_ZERO } else { Subclusters::default() };
            if self.raw_entry(at)? != [0, gone.bitmap()] {
                let free = self.freed_by(at)?;
                self.replace(at, [0, gone.bitmap()], free)?;
            }
            return Ok(at + self.geometry.cluster_bytes());
        }
        let entry = self.entry(at)?;
        if let ZeroPlan::Set { raw, free } = plan_discard(entry, &self.geometry, self.options.has_backing) {
            self.replace(at, [raw, 0], free)?;
        }
        Ok(at + self.geometry.cluster_bytes())
    }
}
