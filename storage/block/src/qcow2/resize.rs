//! Growing and shrinking the disk.

use image::qcow2::{COPIED, Freed, L2Entry, Subclusters, ZERO, decompress};

use super::Qcow2Node;
use super::maintenance::Qcow2Image;
use super::maintenance_error::MaintenanceError;
use super::rewrite::{Rewrite, word};
use crate::blkdebug::Event;
use crate::create::Preallocation;
use crate::error::{Action, BlockError};
use crate::node::{Below, read_chain};
use crate::sys::{ReadBufs, WriteBufs};
use crate::zeroes::{PIECE_BYTES, write_zero_data};

/// Guest data that appears when a disk grows.
struct NewArea {
    /// First guest byte, at a cluster.
    start: u64,
    /// The guest byte behind the last, at a cluster.
    end: u64,
    /// Where what is below ends: up to there, something must keep it from showing.
    below_end: u64,
    preallocation: Preallocation,
}

impl Qcow2Image {
    /// Changes the size of the disk, rounded up to 512 bytes. New bytes read as zeroes. Shrinking needs `shrink`, and
    /// loses what lies behind the new end; snapshots keep their own size. An image with a backing file is refused here:
    /// [`crate::Disk::resize`] knows what shows through.
    pub fn resize(&self, to_bytes: u64, shrink: bool, preallocation: Preallocation) -> Result<(), BlockError> {
        if self.header().backing_name.is_some() {
            let reason = "it has a backing file, so it must be resized as a part of its disk";
            return Err(self.refuse(MaintenanceError::Unsupported { what: "the size", reason }));
        }
        self.node.resize_over(&[], to_bytes, shrink, preallocation)
    }
}

impl Qcow2Node {
    /// As [`Qcow2Image::resize`], with what shows through.
    pub(super) fn resize_over(
        &self,
        below: Below<'_>,
        to_bytes: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Result<(), BlockError> {
        let before_bytes = self.size_bytes();
        let below_bytes = below.first().map_or(0, |node| node.size_bytes());
        self.rewrite(|rewrite| {
            let from_bytes = rewrite.geometry.size_bytes;
            let size = image::qcow2::HeaderError::Size(to_bytes);
            let Some(to_bytes) = to_bytes.checked_next_multiple_of(512).filter(|to| *to <= i64::MAX as u64) else {
                return Err(rewrite.place.refuse(MaintenanceError::Header(size)));
            };
            if to_bytes < from_bytes && !shrink {
                return Err(rewrite.place.refuse(MaintenanceError::ShrinkNotAllowed { from_bytes, to_bytes }));
            }
            if rewrite.header.snapshot_count > 0 && rewrite.geometry.version < 3 {
                return Err(rewrite.place.refuse(MaintenanceError::SnapshotsInVersion2));
            }
            if to_bytes == from_bytes {
                return Ok(());
            }
            rewrite.header.geometry.size_bytes = to_bytes;
            let max = image::qcow2::L1_MAX_BYTES / 8;
            let entries = rewrite.header.geometry.l1_entries();
            if entries > max {
                let source = image::qcow2::HeaderError::L1TooLarge { entries, max };
                return Err(rewrite.place.refuse(MaintenanceError::Header(source)));
            }
            let cluster_bytes = rewrite.geometry.cluster_bytes();
            let mut l1 = rewrite.old_l1.clone();
            // What lies behind the old end, like the state of a machine from a snapshot, must not become guest data.
            rewrite.unmap_from(&mut l1, from_bytes.min(to_bytes).next_multiple_of(cluster_bytes))?;
            l1.resize(entries.max(1) as usize, 0);
            let grows = to_bytes > from_bytes;
            if grows && rewrite.geometry.data_file {
                rewrite.grow_data(from_bytes, to_bytes, preallocation)?;
            }
            if grows || !rewrite.geometry.data_file {
                // Also when shrinking: QEMU lets what is left in the last cluster come back when the disk grows again.
                rewrite.zero_tail(&mut l1, below, from_bytes.min(to_bytes))?;
            }
            if grows {
                // A raw data file has all of the disk, so all of it is mapped.
                let raw = rewrite.header.is_data_file_raw() && preallocation == Preallocation::Off;
                let preallocation = if raw { Preallocation::Metadata } else { preallocation };
                let area = NewArea {
                    start: from_bytes.next_multiple_of(cluster_bytes),
                    end: to_bytes.next_multiple_of(cluster_bytes),
                    below_end: below_bytes,
                    preallocation,
                };
                rewrite.map_new(&mut l1, &area)?;
            }
            let larger = l1.len() > rewrite.old_l1.len();
            rewrite.place.file.event(if larger { Event::L1_GROW_WRITE_TABLE } else { Event::L1_SHRINK_WRITE_TABLE });
            rewrite.set_active(l1, false)?;
            rewrite.resize_bitmaps(false)
        })?;
        if to_bytes < before_bytes {
            if self.geometry.data_file {
                Rewrite::shrink_data(&self.data, self.size_bytes())?;
            }
            // The disk has its size. A file that stays longer than it must be is a loss and no failure.
            let _ = self.rewrite(|rewrite| rewrite.sink_tables()).and_then(|()| self.trim_file());
        }
        Ok(())
    }

    /// Ends the file behind the last cluster in use.
    fn trim_file(&self) -> Result<(), BlockError> {
        let mut tables = self.quiet()?;
        let failed = |e| BlockError::io(&self.path, Action::Write, e);
        let file_bytes = tables.file.len_bytes().map_err(failed)?;
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut end = file_bytes.div_ceil(cluster_bytes);
        while end > 0 && tables.refcount(end - 1)? == 0 {
            end -= 1;
        }
        if end * cluster_bytes < file_bytes {
            tables.file.set_len_bytes(end * cluster_bytes).map_err(failed)?;
        }
        Ok(())
    }
}

impl Rewrite<'_> {
    /// Changes one L2 table of `l1`, in a copy, or in a new one where there is none. Nothing happens when `change`
    /// returns false.
    fn edit_l2(
        &mut self,
        l1: &mut [u64],
        index: usize,
        change: impl FnOnce(&mut Self, &mut [u8]) -> Result<bool, BlockError>,
    ) -> Result<(), BlockError> {
        let Some(raw) = l1.get_mut(index) else { return Ok(()) };
        let entry = image::qcow2::L1Entry::decode(*raw, &self.geometry).map_err(|e| self.damaged(index, e))?;
        let mut table = match entry.table {
            Some(offset) => self.read_l2(offset)?,
            None => vec![0; self.geometry.cluster_bytes() as usize],
        };
        if !change(self, &mut table)? {
            return Ok(());
        }
        *raw = self.place(&table)? | COPIED;
        match entry.table {
            Some(offset) => self.counts.drop(offset, self.geometry.cluster_bytes()),
            None => Ok(()),
        }
    }

    /// Moves the tables of the disk down to where there is room. A shrunken disk has its new ones behind the data that
    /// it had, since nothing of the old state is written over.
    fn sink_tables(&mut self) -> Result<(), BlockError> {
        let mut l1 = self.old_l1.clone();
        for (index, offset) in self.l2_tables(&l1)? {
            if self.counts.get(offset >> self.geometry.cluster_bits)? == 1 {
                let table = self.read_l2(offset)?;
                let lower = self.sink(offset, &table)?;
                l1.get_mut(index).into_iter().for_each(|raw| *raw = lower | COPIED);
                self.counts.relieve()?;
            }
        }
        self.counts.renew()?;
        let raw: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        if l1 == self.old_l1 {
            self.header.l1_offset = self.sink(self.header.l1_offset, &raw)?;
            return Ok(());
        }
        let old = self.header.l1_offset;
        self.header.l1_offset = self.place(&raw)?;
        self.drop_table(old, raw.len() as u64)
    }

    /// Copies a table that is referred to once to free room further down, if there is any; returns where it is then.
    fn sink(&mut self, offset: u64, table: &[u8]) -> Result<u64, BlockError> {
        let copy = self.place(table)?;
        self.counts.drop(copy.max(offset), table.len() as u64)?;
        Ok(copy.min(offset))
    }

    /// Removes every mapping from a guest offset, at a cluster, on.
    fn unmap_from(&mut self, l1: &mut [u64], offset: u64) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let boundary = geometry.l1_index(offset) as usize;
        let first_kept = (geometry.l2_index(offset) * geometry.l2_entry_bytes()) as usize;
        let whole_from = boundary + usize::from(first_kept > 0);
        let gone: Vec<u64> = l1.get(whole_from..).unwrap_or_default().to_vec();
        self.drop_references(&gone)?;
        l1.iter_mut().skip(whole_from).for_each(|raw| *raw = 0);
        if first_kept == 0 || l1.get(boundary).is_none_or(|raw| *raw == 0) {
            return Ok(());
        }
        self.edit_l2(l1, boundary, |rewrite, table| {
            let rest = table.get_mut(first_kept..).unwrap_or_default();
            for entry in rest.chunks_exact(geometry.l2_entry_bytes() as usize) {
                let entry = L2Entry::decode(word(entry), &geometry).map_err(|e| rewrite.damaged(boundary, e))?;
                if let Some(Freed { offset, bytes }) = entry.freed(&geometry) {
                    rewrite.counts.drop(offset, bytes)?;
                }
            }
            let changes = rest.iter().any(|byte| *byte != 0);
            rest.fill(0);
            Ok(changes)
        })
    }

    /// Makes the bytes between the end of the disk and the end of its last cluster zeroes: they become guest data.
    fn zero_tail(&mut self, l1: &mut [u64], below: Below<'_>, size_bytes: u64) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let kept = geometry.in_cluster(size_bytes) as usize;
        if kept == 0 {
            return Ok(());
        }
        let first = size_bytes - kept as u64;
        let index = geometry.l1_index(first) as usize;
        let at = (geometry.l2_index(first) * geometry.l2_entry_bytes()) as usize;
        self.edit_l2(l1, index, |rewrite, table| {
            let Some(target) = table.get_mut(at..at + geometry.l2_entry_bytes() as usize) else { return Ok(false) };
            let mut contents = vec![0; geometry.cluster_bytes() as usize];
            rewrite.read_cluster(index, target, below, first, &mut contents)?;
            let tail = contents.get_mut(kept..).unwrap_or_default();
            if crate::zeroes::is_zero(tail) {
                return Ok(false);
            }
            tail.fill(0);
            let old = L2Entry::decode(word(target), &geometry).map_err(|e| rewrite.damaged(index, e))?;
            let host = match geometry.data_file {
                true => rewrite.put_data(first, contents.get(..kept).unwrap_or_default())?,
                false => rewrite.place_data(&contents)?,
            };
            store_entry(target, host | COPIED, Subclusters::ALL_DATA);
            match old.freed(&geometry) {
                Some(Freed { offset, bytes }) => rewrite.counts.drop(offset, bytes).map(|()| true),
                None => Ok(true),
            }
        })
    }

    /// What a guest could see in a cluster, including what lies behind the end of the disk.
    fn read_cluster(
        &self,
        l1_index: usize,
        entry: &[u8],
        below: Below<'_>,
        guest_offset: u64,
        out: &mut [u8],
    ) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let extended = geometry.extended_l2;
        let bitmap = if extended { word(entry.get(8..).unwrap_or_default()) } else { 0 };
        let damaged = |e| self.damaged(l1_index, e);
        let mut at = 0;
        while at < out.len() {
            let (piece, bytes) = match extended {
                true => image::qcow2::ExtendedEntry::decode(word(entry), bitmap, &geometry)
                    .map_err(damaged)?
                    .piece(&geometry, at as u64),
                false => (L2Entry::decode(word(entry), &geometry).map_err(damaged)?, out.len() as u64),
            };
            let end = (at + bytes.max(1) as usize).min(out.len());
            let part = out.get_mut(at..end).unwrap_or_default();
            match piece {
                L2Entry::Zero { .. } => part.fill(0),
                L2Entry::Unallocated => read_chain(below, guest_offset + at as u64, &ReadBufs::from_slice(part))?,
                L2Entry::Data { host, .. } => {
                    let (host, guest) = (host + at as u64, guest_offset + at as u64);
                    let bufs = ReadBufs::from_slice(part);
                    self.sealing.read(&*self.data.file, &self.data.path, host, guest, &bufs)?;
                }
                L2Entry::Compressed { host, bytes } => {
                    let mut packed = vec![0; bytes as usize];
                    self.place.read(host, &mut packed)?;
                    decompress(self.header.compression, &packed, part).map_err(|source| BlockError::Compressed {
                        path: self.place.path.to_owned(),
                        guest_offset,
                        source,
                    })?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Maps a new area as far as it must be: to room for its data, or to zeroes that hide what is below.
    fn map_new(&mut self, l1: &mut [u64], area: &NewArea) -> Result<(), BlockError> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let hidden_end = area.below_end.min(area.end).next_multiple_of(cluster_bytes);
        // Version 2 has no entry for zeroes, so what must hide gets room too.
        let (room_end, zero_end) = match (area.preallocation, geometry.version) {
            (Preallocation::Off, 2) => (hidden_end, area.start),
            (Preallocation::Off, _) => (area.start, hidden_end),
            _ => (area.end, area.start),
        };
        let sealed = !self.sealing.is_plain();
        let room_flags = if sealed && geometry.version >= 3 && !geometry.extended_l2 { ZERO } else { 0 };
        let mut at = area.start;
        let mapped_end = room_end.max(zero_end);
        while at < mapped_end {
            let reach = geometry.l2_reach_bytes();
            let end = (at - at % reach).saturating_add(reach).min(mapped_end);
            let clusters = (end - at) / cluster_bytes;
            let host = match at < room_end {
                true if geometry.data_file => Some(at),
                true => Some(self.room_for(clusters, area.preallocation)?),
                false => None,
            };
            let first = (geometry.l2_index(at) * geometry.l2_entry_bytes()) as usize;
            self.edit_l2(l1, geometry.l1_index(at) as usize, |_, table| {
                let targets = table.get_mut(first..).unwrap_or_default();
                let targets = targets.chunks_exact_mut(geometry.l2_entry_bytes() as usize).take(clusters as usize);
                for (i, target) in (0..).zip(targets) {
                    // In an encrypted image the zeroes of the file are none of the disk: the entry says so. With
                    // extended entries, room whose subclusters are zeroes hides what is below and needs no data.
                    let raw = match host {
                        Some(host) => (host + i * cluster_bytes) | COPIED | room_flags,
                        None if geometry.extended_l2 => 0,
                        None => ZERO,
                    };
                    store_entry(target, raw, Subclusters::ALL_ZERO);
                }
                Ok(true)
            })?;
            self.counts.relieve()?;
            at = end;
        }
        Ok(())
    }

    /// Clusters in a row that read as zeroes.
    fn room_for(&mut self, clusters: u64, preallocation: Preallocation) -> Result<u64, BlockError> {
        let offset = self.counts.alloc(clusters)?;
        let bytes = clusters * self.geometry.cluster_bytes();
        let failed = |e| BlockError::io(self.place.path, Action::Write, e);
        if !self.sealing.is_plain() && self.geometry.version < 3 {
            let write = |at, zeroes: &WriteBufs<'_>| self.sealing.write(self.place.file, self.place.path, at, zeroes);
            return write_zero_data(offset..offset + bytes, PIECE_BYTES, write).map(|()| offset);
        }
        if preallocation == Preallocation::Full {
            let write = |at, zeroes: &WriteBufs<'_>| self.place.file.write_at(at, zeroes);
            return write_zero_data(offset..offset + bytes, PIECE_BYTES, write).map(|()| offset).map_err(failed);
        }
        let may_unmap = preallocation != Preallocation::Falloc;
        self.place.file.write_zeroes(offset, bytes, may_unmap).map_err(failed)?;
        // Zeroing keeps the length of the file, and a reader wants all of the clusters there.
        let file_bytes = self.place.file.len_bytes().map_err(failed)?;
        if file_bytes < offset + bytes {
            self.place.file.set_len_bytes(offset + bytes).map_err(failed)?;
        }
        Ok(offset)
    }
}

/// Stores an entry; the subclusters only where it has them.
pub(super) fn store_entry(target: &mut [u8], raw: u64, subclusters: Subclusters) {
    for (part, value) in target.chunks_exact_mut(8).zip([raw, subclusters.bitmap()]) {
        part.copy_from_slice(&value.to_be_bytes());
    }
}
