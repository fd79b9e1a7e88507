//! Zeroing and discarding whole clusters by their entries; the ragged ends of a range as data.

use image::qcow2::{Freed, ZeroPlan, plan_discard, plan_zero};

use super::Qcow2Node;
use crate::disk::Node;
use crate::error::BlockError;

impl Qcow2Node {
    /// Makes a range inside the disk read as zeroes.
    pub(crate) fn write_zeroes(
        &mut self,
        below: &mut [Node],
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> Result<(), BlockError> {
        self.check_writable()?;
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let result = self.relieve().and_then(|()| self.zero_step(below, at, end, may_unmap));
            at = self.noticing(result)?;
        }
        Ok(())
    }

    /// Handles what lies in one cluster, or skips what no table maps; returns where to go on.
    fn zero_step(&mut self, below: &mut [Node], at: u64, end: u64, may_unmap: bool) -> Result<u64, BlockError> {
        let has_backing = self.options.has_backing;
        if !has_backing && self.l1_entry(at)?.table.is_none() {
            let reach = self.geometry.l2_reach_bytes();
            return Ok((at - at % reach).saturating_add(reach).min(end));
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let next = (at - self.geometry.in_cluster(at)).saturating_add(cluster_bytes);
        let whole = self.geometry.is_aligned(at) && (end >= next || end >= self.size_bytes());
        let next = next.min(end);
        if !whole {
            if !self.reads_zero(at)? {
                self.write_zero_data(below, at, next - at)?;
            }
            return Ok(next);
        }
        let entry = self.entry(at)?;
        match plan_zero(entry, &self.geometry, has_backing, may_unmap) {
            ZeroPlan::Keep => {}
            ZeroPlan::Set { raw, free } => self.replace(at, raw, free)?,
            ZeroPlan::WriteData => self.write_zero_data(below, at, next - at)?,
        }
        Ok(next)
    }

    fn replace(&mut self, offset: u64, raw: u64, free: Option<Freed>) -> Result<(), BlockError> {
        self.set_entries(offset, std::iter::once(raw))?;
        if let Some(Freed { offset, bytes }) = free {
            self.free_later(offset, bytes);
        }
        Ok(())
    }

    /// Discards the whole clusters of a range inside the disk.
    pub(crate) fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_writable()?;
        let cluster_bytes = self.geometry.cluster_bytes();
        let end = offset + bytes;
        let mut at = offset.next_multiple_of(cluster_bytes);
        while at < end && (end - at >= cluster_bytes || end >= self.size_bytes()) {
            let result = self.relieve().and_then(|()| self.discard_step(at, end));
            at = self.noticing(result)?;
        }
        Ok(())
    }

    fn discard_step(&mut self, at: u64, end: u64) -> Result<u64, BlockError> {
        if self.l1_entry(at)?.table.is_none() {
            let reach = self.geometry.l2_reach_bytes();
            return Ok((at - at % reach).saturating_add(reach).min(end));
        }
        let entry = self.entry(at)?;
        if let ZeroPlan::Set { raw, free } = plan_discard(entry, &self.geometry, self.options.has_backing) {
            self.replace(at, raw, free)?;
        }
        Ok(at + self.geometry.cluster_bytes())
    }
}
