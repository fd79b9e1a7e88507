//! Writes. Where the image owns the cluster, data goes in place and no table changes. Elsewhere new clusters
//! are filled first, with what the guest sees around its data, and then the tables change in memory.

use image::qcow2::{Freed, L2Entry, WritePlan, plan_write};

use super::Qcow2Node;
use crate::disk::Node;
use crate::error::{Action, BlockError};
use crate::sys::{ReadBufs, WriteBufs};

/// Clusters that one allocation fills; bounds the work between two looks at the tables.
const RUN_CLUSTERS_MAX: u64 = 1024;

impl Qcow2Node {
    /// Writes `bufs` at a guest offset inside the disk.
    pub(crate) fn write(&mut self, below: &mut [Node], offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.check_writable()?;
        let mut done = 0;
        while done < bufs.len() {
            let result = self
                .relieve()
                .and_then(|()| self.write_run(below, offset + done as u64, &bufs.range(done, bufs.len() - done)));
            done += self.noticing(result)?;
        }
        Ok(())
    }

    /// Writes as much as one plan covers; returns how much that was.
    fn write_run(&mut self, below: &mut [Node], offset: u64, bufs: &WriteBufs<'_>) -> Result<usize, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let within = self.geometry.in_cluster(offset);
        let entry = self.entry(offset)?;
        match plan_write(entry, &self.geometry) {
            WritePlan::InPlace { host } if self.l1_entry(offset)?.copied => {
                let bytes = self.in_place_bytes(host, offset, bufs.len() as u64)? as usize;
                self.refuse_tables(offset, host, within + bytes as u64)?;
                let write = self.file.write_at(host + within, &bufs.range(0, bytes));
                write.map_err(|e| self.io(Action::Write, e))?;
                Ok(bytes)
            }
            WritePlan::Reserved { host } if self.l1_entry(offset)?.copied => {
                let bytes = (cluster_bytes - within).min(bufs.len() as u64) as usize;
                self.refuse_tables(offset, host, cluster_bytes)?;
                self.fill(below, offset, &bufs.range(0, bytes), host, 1)?;
                self.set_entries(offset, std::iter::once(L2Entry::fresh_data(host)))?;
                Ok(bytes)
            }
            _ => self.write_new(below, offset, bufs),
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
        let bits = self.geometry.cluster_bits;
        let mut clusters = host >> bits..(host + bytes).div_ceil(1 << bits);
        match clusters.find(|cluster| self.table_clusters.contains(cluster)) {
            None => Ok(()),
            Some(cluster) => {
                Err(BlockError::DataIsTable { path: self.path.clone(), guest_offset, offset: cluster << bits })
            }
        }
    }

    /// Writes into new clusters: as many as need one, lie in one slice and are free in a row.
    fn write_new(&mut self, below: &mut [Node], offset: u64, bufs: &WriteBufs<'_>) -> Result<usize, BlockError> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let within = geometry.in_cluster(offset);
        let first = offset - within;
        self.own_l2(offset)?;
        let end = offset + (bufs.len() as u64).min(self.slice_reach(offset));
        let mut frees: Vec<Option<Freed>> = Vec::new();
        while first + frees.len() as u64 * cluster_bytes < end && (frees.len() as u64) < RUN_CLUSTERS_MAX {
            let entry = self.entry(first + frees.len() as u64 * cluster_bytes)?;
            match plan_write(entry, &geometry) {
                WritePlan::Allocate { free } => frees.push(free),
                // The first cluster comes here also when its table was shared and its entries changed owner.
                _ if frees.is_empty() => frees.push(entry.freed(&geometry)),
                _ => break,
            }
        }
        let never_used = self.file_clusters;
        let (cluster, count) = self.alloc_run(frees.len() as u64)?;
        let host = cluster << geometry.cluster_bits;
        let bytes = (count * cluster_bytes - within).min(end - offset) as usize;
        let bufs = bufs.range(0, bytes);
        // Clusters past the end of the file are zeroes by themselves: no need to write any around the data.
        let filled = match self.zero_around(offset, bytes as u64) {
            Ok(true) if cluster >= never_used => {
                self.file.write_at(host + within, &bufs).map_err(|e| self.io(Action::Write, e))
            }
            Ok(_) => self.fill(below, offset, &bufs, host, count),
            Err(error) => Err(error),
        };
        let stored = filled.and_then(|()| {
            let entries = (0..count).map(|i| L2Entry::fresh_data(host + i * cluster_bytes));
            self.set_entries(first, entries)
        });
        if let Err(error) = stored {
            self.give_back(cluster, count)?;
            return Err(error);
        }
        for Freed { offset, bytes } in frees.into_iter().take(count as usize).flatten() {
            self.free_later(offset, bytes);
        }
        Ok(bytes)
    }

    /// Fills `count` host clusters at `host` with `bufs` and, around them, what the guest sees now.
    fn fill(
        &mut self,
        below: &mut [Node],
        offset: u64,
        bufs: &WriteBufs<'_>,
        host: u64,
        count: u64,
    ) -> Result<(), BlockError> {
        let within = self.geometry.in_cluster(offset);
        let end = within + bufs.len() as u64;
        let tail_bytes = (count << self.geometry.cluster_bits) - end;
        let mut head = vec![0; within as usize];
        let mut tail = vec![0; tail_bytes as usize];
        self.read_around(below, offset - within, &mut head)?;
        self.read_around(below, offset + bufs.len() as u64, &mut tail)?;
        let (head, tail) = (WriteBufs::from_slice(&head), WriteBufs::from_slice(&tail));
        let whole = WriteBufs::concat(&[&head, bufs, &tail]);
        self.file.write_at(host, &whole).map_err(|e| self.io(Action::Write, e))
    }

    /// Whether the guest sees only zeroes before and after a range in the clusters it begins and ends in.
    fn zero_around(&mut self, offset: u64, bytes: u64) -> Result<bool, BlockError> {
        let head_is_zero = self.geometry.is_aligned(offset) || self.reads_zero(offset)?;
        let end = offset + bytes;
        Ok(head_is_zero && (self.geometry.is_aligned(end) || self.reads_zero(end - 1)?))
    }

    /// What the guest sees; past the end of the disk, zeroes.
    fn read_around(&mut self, below: &mut [Node], offset: u64, out: &mut [u8]) -> Result<(), BlockError> {
        let inside = self.size_bytes().saturating_sub(offset).min(out.len() as u64) as usize;
        match out.get_mut(..inside) {
            Some(out) if !out.is_empty() => self.read(below, offset, &ReadBufs::from_slice(out)),
            _ => Ok(()),
        }
    }

    /// Whether the guest sees only zeroes in the cluster of `offset`, without reading data.
    pub(super) fn reads_zero(&mut self, offset: u64) -> Result<bool, BlockError> {
        let entry = self.entry(offset)?;
        Ok(entry.reads_zero(self.options.has_backing))
    }

    /// Writes zeroes as data inside one cluster.
    pub(super) fn write_zero_data(&mut self, below: &mut [Node], offset: u64, bytes: u64) -> Result<(), BlockError> {
        debug_assert!(bytes <= self.geometry.cluster_bytes());
        let zeroes = vec![0; bytes as usize];
        let bufs = WriteBufs::from_slice(&zeroes);
        let mut done = 0;
        while done < zeroes.len() {
            done += self.write_run(below, offset + done as u64, &bufs.range(done, zeroes.len() - done))?;
        }
        Ok(())
    }
}
