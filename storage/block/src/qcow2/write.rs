//! Writes. Where the image owns the cluster, data goes in place and no table changes. Elsewhere new clusters
//! are filled first, with what the guest sees around its data, and then the tables change in memory.

use std::ops::Range;

use image::qcow2::{
    ExtendedEntry, Freed, L2Entry, SubclusterWrite, Subclusters, WritePlan, plan_subcluster_write, plan_write,
};
use parking_lot::MutexGuard;

use super::{Flight, Qcow2Node, Tables};
use crate::blkdebug::Event;
use crate::error::BlockError;
use crate::node::{Below, Filled, Landing, Mapped};
use crate::sys::{ReadBufs, WriteBufs};

/// Clusters that one allocation fills; bounds the work between two looks at the tables.
const RUN_CLUSTERS_MAX: u64 = 1024;

/// How the first bytes of a write go.
pub(super) struct Plan {
    /// How many of them.
    pub(super) bytes: usize,
    pub(super) target: Target,
}

pub(super) enum Target {
    /// To this offset of the file; no table changes.
    InPlace(u64),
    /// Into clusters that a table entry will refer to afterwards.
    Fill(Fill),
}

/// Clusters that are being filled. Their guest range is in [`Tables::filling`] meanwhile.
pub(super) struct Fill {
    /// First guest offset, at a cluster.
    first: u64,
    /// First host offset.
    host: u64,
    /// Clusters in a row.
    count: u64,
    /// Nothing has to be written around the data: it fills the clusters, or they are past the end of the file,
    /// where they are zeroes by themselves, and zeroes belong there.
    data_alone: bool,
    /// What the entries refer to now; `None` when the clusters are reserved behind them already.
    frees: Option<Vec<Option<Freed>>>,
    /// Which bytes from `first` on are filled: whole clusters, or with extended entries the subclusters of one.
    around: Range<u64>,
    /// What the subclusters of each cluster are afterwards, with extended entries.
    after: Subclusters,
}

impl Fill {
    fn guest_range(&self, cluster_bits: u32) -> Range<u64> {
        self.first..self.first + (self.count << cluster_bits)
    }
}

impl Qcow2Node {
    /// Writes `bufs` at a guest offset inside the disk.
    pub(super) fn write_all(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        let mut done = 0;
        while done < bufs.len() {
            done += match done {
                0 => self.write_run(below, offset, bufs)?,
                _ => self.write_run(below, offset + done as u64, &bufs.range(done, bufs.len() - done))?,
            };
        }
        Ok(())
    }

    /// Writes as much as one plan covers; returns how much that was.
    fn write_run(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<usize, BlockError> {
        let mut tables = self.lock_settled(offset, bufs.len() as u64);
        tables.begin_change(offset, bufs.len() as u64)?;
        let planned = tables.relieve().and_then(|()| tables.plan(offset, bufs.len() as u64));
        let Plan { bytes, target } = tables.noticing(planned)?;
        let part;
        let bufs = if bytes == bufs.len() {
            bufs
        } else {
            part = bufs.range(0, bytes);
            &part
        };
        match target {
            Target::InPlace(host) => {
                let _flight = self.enter(&tables);
                drop(tables);
                self.file.event(Event::WRITE_AIO);
                self.sealing.write(&*self.data.file, &self.data.path, host, bufs)?;
            }
            Target::Fill(fill) => self.fill(tables, below, offset, bufs, fill)?,
        }
        Ok(bytes)
    }

    /// Fills clusters without the lock, and then lets the entries refer to them.
    fn fill(
        &self,
        mut tables: MutexGuard<'_, Tables>,
        below: Below<'_>,
        offset: u64,
        bufs: &WriteBufs<'_>,
        fill: Fill,
    ) -> Result<(), BlockError> {
        let filled = {
            let _flight = self.enter(&tables);
            tables.filling.push(fill.guest_range(self.geometry.cluster_bits));
            MutexGuard::unlocked(&mut tables, || self.write_filled(below, offset, bufs, &fill))
        };
        self.end_fill(&mut tables, &fill, filled)
    }

    /// Lets the entries refer to clusters that were filled, or gives the clusters back.
    fn end_fill(&self, tables: &mut Tables, fill: &Fill, filled: Result<(), BlockError>) -> Result<(), BlockError> {
        let result = tables.refer_or_abandon(fill, filled);
        self.settle(tables, &fill.guest_range(self.geometry.cluster_bits));
        tables.noticing(result)
    }

    /// Where the first bytes of a write belong, if nothing has to be written around them.
    pub(super) fn map_new_data(&self, offset: u64, bytes: u64) -> Result<Option<Mapped<'_>>, BlockError> {
        let mut tables = self.lock_settled(offset, bytes);
        tables.begin_change(offset, bytes)?;
        let planned = tables.relieve().and_then(|()| tables.plan(offset, bytes));
        let Plan { bytes, target } = tables.noticing(planned)?;
        let (host, landing) = match target {
            Target::InPlace(host) => (host, Landing::Flight(self.enter(&tables))),
            Target::Fill(fill) if !fill.data_alone => {
                let abandoned = tables.abandon(&fill);
                return tables.noticing(abandoned).map(|()| None);
            }
            Target::Fill(fill) => {
                tables.filling.push(fill.guest_range(self.geometry.cluster_bits));
                let host = fill.host + self.geometry.in_cluster(offset);
                (
                    host,
                    Landing::Filled(Box::new(Filling { node: self, _flight: self.enter(&tables), fill: Some(fill) })),
                )
            }
        };
        self.file.event(Event::WRITE_AIO);
        Ok(Some(Mapped { file: &*self.data.file, host, bytes: bytes as u64, landing }))
    }

    /// Writes `bufs` and, around them, what the guest sees now.
    pub(super) fn write_filled(
        &self,
        below: Below<'_>,
        offset: u64,
        bufs: &WriteBufs<'_>,
        fill: &Fill,
    ) -> Result<(), BlockError> {
        let within = self.geometry.in_cluster(offset);
        if fill.data_alone {
            self.file.event(Event::WRITE_AIO);
            return self.sealing.write(&*self.data.file, &self.data.path, fill.host + within, bufs);
        }
        let end = within + bufs.len() as u64;
        let mut head = vec![0; (within - fill.around.start) as usize];
        // An external data file ends where the disk ends.
        let disk_end = self.size_bytes().saturating_sub(fill.first);
        let stop = if self.geometry.data_file { fill.around.end.min(disk_end) } else { fill.around.end };
        let mut tail = vec![0; stop.saturating_sub(end) as usize];
        self.read_around(below, fill.first + fill.around.start, &mut head)?;
        self.read_around(below, offset + bufs.len() as u64, &mut tail)?;
        let (head, tail) = (WriteBufs::from_slice(&head), WriteBufs::from_slice(&tail));
        let whole = WriteBufs::concat(&[&head, bufs, &tail]);
        self.file.event(Event::WRITE_AIO);
        self.file.event(Event::COW_WRITE);
        self.sealing.write(&*self.data.file, &self.data.path, fill.host + fill.around.start, &whole)
    }

    /// What the guest sees; past the end of the disk, zeroes.
    fn read_around(&self, below: Below<'_>, offset: u64, out: &mut [u8]) -> Result<(), BlockError> {
        let inside = self.size_bytes().saturating_sub(offset).min(out.len() as u64) as usize;
        match out.get_mut(..inside) {
            Some(out) if !out.is_empty() => {
                self.file.event(Event::COW_READ);
                self.read_all(below, offset, &ReadBufs::from_slice(out))
            }
            _ => Ok(()),
        }
    }

    /// Writes zeroes as data inside one cluster.
    pub(super) fn write_zero_data(&self, below: Below<'_>, offset: u64, bytes: u64) -> Result<(), BlockError> {
        debug_assert!(bytes <= self.geometry.cluster_bytes());
        let zeroes = vec![0; bytes as usize];
        self.write_all(below, offset, &WriteBufs::from_slice(&zeroes))
    }
}

/// Clusters that a caller fills.
struct Filling<'a> {
    node: &'a Qcow2Node,
    _flight: Flight<'a>,
    /// `None` when it has ended.
    fill: Option<Fill>,
}

impl Filled for Filling<'_> {
    fn end(&mut self, filled: bool) -> Result<(), BlockError> {
        let Some(fill) = self.fill.take() else { return Ok(()) };
        let mut tables = self.node.tables.lock();
        let filled = if filled { Ok(()) } else { Err(BlockError::Stopped) };
        self.node.end_fill(&mut tables, &fill, filled)
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        // The error of clusters that were not filled is known to who failed to fill them.
        let _ = self.end(false);
    }
}

impl Tables {
    /// Decides how the first of `max` bytes at a guest offset are written, and takes clusters for them.
    pub(super) fn plan(&mut self, offset: u64, max: u64) -> Result<Plan, BlockError> {
        if self.geometry.extended_l2 {
            return self.plan_extended(offset, max);
        }
        if let Some((host, bytes)) = self.in_place(offset, max)? {
            return Ok(Plan { bytes: bytes as usize, target: Target::InPlace(host) });
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let within = self.geometry.in_cluster(offset);
        let entry = self.entry(offset)?;
        match plan_write(entry, &self.geometry) {
            WritePlan::Reserved { host } if self.l1_entry(offset)?.copied => {
                self.refuse_tables(offset, host, cluster_bytes)?;
                let bytes = (cluster_bytes - within).min(max);
                let fill = Fill {
                    first: offset - within,
                    host,
                    count: 1,
                    data_alone: bytes == cluster_bytes,
                    frees: None,
                    around: 0..cluster_bytes,
                    after: Subclusters::ALL_DATA,
                };
                Ok(Plan { bytes: bytes as usize, target: Target::Fill(fill) })
            }
            _ => self.plan_new(offset, max),
        }
    }

    /// Where the first of `max` bytes go in place, and how many; `None`: a table has to change.
    pub(super) fn in_place(&mut self, offset: u64, max: u64) -> Result<Option<(u64, u64)>, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let within = self.geometry.in_cluster(offset);
        let table_owned = self.l1_entry(offset)?.copied;
        if self.geometry.extended_l2 {
            let bytes = (cluster_bytes - within).min(max);
            let entry = self.extended_entry(offset)?;
            let plan = plan_subcluster_write(entry, &self.geometry, table_owned, within, bytes);
            let SubclusterWrite::InPlace { host } = plan else { return Ok(None) };
            self.refuse_tables(offset, host, cluster_bytes)?;
            return Ok(Some((host + within, bytes)));
        }
        match plan_write(self.entry(offset)?, &self.geometry) {
            WritePlan::InPlace { host } if table_owned => {
                let bytes = self.in_place_bytes(host, offset, max)?;
                self.refuse_tables(offset, host, within + bytes)?;
                Ok(Some((host + within, bytes)))
            }
            _ => Ok(None),
        }
    }

    /// How many bytes from `offset`, at most `max`, can go in place behind each other.
    fn in_place_bytes(&mut self, host: u64, offset: u64, max: u64) -> Result<u64, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut run = cluster_bytes - self.geometry.in_cluster(offset);
        let max = max.min(self.slice_reach(offset));
        let mut next_host = host + cluster_bytes;
        while run < max {
            let next = self.entry(offset + run)?;
            if plan_write(next, &self.geometry) != (WritePlan::InPlace { host: next_host }) {
                break;
            }
            run += cluster_bytes;
            next_host += cluster_bytes;
        }
        Ok(run.min(max))
    }

    /// A damaged or malicious entry may claim that a table is guest data: a write there would let the guest
    /// rewrite the tables.
    fn refuse_tables(&self, guest_offset: u64, host: u64, bytes: u64) -> Result<(), BlockError> {
        if self.geometry.data_file {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let mut clusters = host >> bits..(host + bytes).div_ceil(1 << bits);
        match clusters.find(|cluster| self.table_clusters.contains(cluster)) {
            None => Ok(()),
            Some(cluster) => {
                Err(BlockError::DataIsTable { path: self.path.clone(), guest_offset, offset: cluster << bits })
            }
        }
    }

    /// Takes new clusters: as many as need one, lie in one slice and are free in a row.
    fn plan_new(&mut self, offset: u64, max: u64) -> Result<Plan, BlockError> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let within = geometry.in_cluster(offset);
        let first = offset - within;
        self.own_l2(offset)?;
        let end = offset + max.min(self.slice_reach(offset));
        let mut frees: Vec<Option<Freed>> = Vec::new();
        while first + frees.len() as u64 * cluster_bytes < end && (frees.len() as u64) < RUN_CLUSTERS_MAX {
            let at = first + frees.len() as u64 * cluster_bytes;
            match self.needs_new(at)? {
                Some(free) => frees.push(free),
                // The first cluster comes here also when its table was shared and its entries changed owner.
                None if frees.is_empty() => frees.push(self.freed_by(at)?),
                None => break,
            }
        }
        let never_used = self.file_clusters;
        let (cluster, count) = self.alloc_data(first, frees.len() as u64)?;
        frees.truncate(count as usize);
        let bytes = (count * cluster_bytes - within).min(end - offset);
        let data_alone = match self.zero_around(offset, bytes) {
            // Nobody knows what an external data file holds where nothing was written; and in an encrypted image the
            // zeroes of the file are none of the disk.
            Ok(zero) => {
                let is_zero = zero && cluster >= never_used && !geometry.data_file;
                bytes == count * cluster_bytes || (is_zero && self.options.sealing.is_plain())
            }
            Err(error) => return self.give_back_data(cluster, count).and(Err(error)),
        };
        let host = cluster << geometry.cluster_bits;
        let around = 0..count * cluster_bytes;
        let fill = Fill { first, host, count, data_alone, frees: Some(frees), around, after: Subclusters::ALL_DATA };
        Ok(Plan { bytes: bytes as usize, target: Target::Fill(fill) })
    }

    /// As [`Tables::plan`], with extended entries: one cluster at a time, or whole ones that need new room.
    fn plan_extended(&mut self, offset: u64, max: u64) -> Result<Plan, BlockError> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let within = geometry.in_cluster(offset);
        let bytes = (cluster_bytes - within).min(max);
        let table_owned = self.l1_entry(offset)?.copied;
        let entry = self.extended_entry(offset)?;
        let unit = geometry.subcluster_bytes();
        let first = offset - within;
        let (host, fill, after, frees) = match plan_subcluster_write(entry, &geometry, table_owned, within, bytes) {
            SubclusterWrite::InPlace { host } => {
                self.refuse_tables(offset, host, cluster_bytes)?;
                return Ok(Plan { bytes: bytes as usize, target: Target::InPlace(host + within) });
            }
            SubclusterWrite::Fill { host, fill, after } => {
                self.refuse_tables(offset, host, cluster_bytes)?;
                (host, fill, after, None)
            }
            SubclusterWrite::Allocate { .. } if bytes == cluster_bytes => {
                return self.plan_new(offset, max - max % cluster_bytes);
            }
            SubclusterWrite::Allocate { fill, after, free } => {
                self.own_l2(offset)?;
                let (cluster, _) = self.alloc_data(first, 1)?;
                (cluster << geometry.cluster_bits, fill, after, Some(vec![free]))
            }
        };
        let around = fill.0 * unit..fill.1 * unit;
        let data_alone = around == (within..within + bytes);
        let fill = Fill { first, host, count: 1, data_alone, frees, around, after };
        Ok(Plan { bytes: bytes as usize, target: Target::Fill(fill) })
    }

    /// How the entry of a cluster stands to a write of all of it in [`Tables::plan_new`]: what is freed when it gets a
    /// new cluster; `None` when it has one of its own.
    fn needs_new(&mut self, offset: u64) -> Result<Option<Option<Freed>>, BlockError> {
        let geometry = self.geometry;
        let has_own = match geometry.extended_l2 {
            true => matches!(self.extended_entry(offset)?, ExtendedEntry::Standard { host: Some(_), copied: true, .. }),
            false => !matches!(plan_write(self.entry(offset)?, &geometry), WritePlan::Allocate { .. }),
        };
        if has_own { Ok(None) } else { self.freed_by(offset).map(Some) }
    }

    /// Lets entries refer to clusters that were filled; without the data or the entries, the clusters go back.
    pub(super) fn refer_or_abandon(&mut self, fill: &Fill, filled: Result<(), BlockError>) -> Result<(), BlockError> {
        filled.and_then(|()| self.refer_to(fill)).or_else(|error| self.abandon(fill).and(Err(error)))
    }

    /// The clusters are filled: entries refer to them, what they referred to before goes.
    fn refer_to(&mut self, fill: &Fill) -> Result<(), BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let bitmap = fill.after.bitmap();
        let entries = (0..fill.count).map(|i| [L2Entry::fresh_data(fill.host + i * cluster_bytes), bitmap]);
        self.set_entries(fill.first, entries)?;
        for Freed { offset, bytes } in fill.frees.iter().flatten().flatten().copied() {
            self.free_later(offset, bytes);
        }
        Ok(())
    }

    /// The clusters could not be filled: they go back, unless an entry reserves them.
    pub(super) fn abandon(&mut self, fill: &Fill) -> Result<(), BlockError> {
        match fill.frees {
            Some(_) => self.give_back_data(fill.host >> self.geometry.cluster_bits, fill.count),
            None => Ok(()),
        }
    }

    /// Whether the guest sees only zeroes before and after a range in the clusters it begins and ends in. Not for
    /// clusters with subclusters.
    fn zero_around(&mut self, offset: u64, bytes: u64) -> Result<bool, BlockError> {
        let head_is_zero = self.geometry.is_aligned(offset) || self.reads_zero(offset)?;
        let end = offset + bytes;
        Ok(head_is_zero && (self.geometry.is_aligned(end) || self.reads_zero(end - 1)?))
    }

    /// Whether the guest sees only zeroes in the cluster of `offset`, or its subcluster, without reading data.
    pub(super) fn reads_zero(&mut self, offset: u64) -> Result<bool, BlockError> {
        let (entry, _) = self.piece(offset)?;
        Ok(entry.reads_zero(self.options.has_backing))
    }
}
