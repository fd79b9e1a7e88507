//! Reads. Neighbouring clusters that are neighbours on the host too become one system call.

use image::qcow2::{L2Entry, decompress};

use super::{Qcow2Node, Tables};
use crate::blkdebug::Event;
use crate::error::{Action, BlockError};
use crate::node::{Below, read_chain};
use crate::sys::ReadBufs;

/// Table entries that one look at the tables walks over: bounds how long others wait for the lock.
const RUN_ENTRIES_MAX: u64 = 1 << 16;

/// The compressed cluster that was unpacked last for a request that wanted a part of it.
#[derive(Default)]
pub(super) struct Unpacked {
    key: PackedAt,
    plain: Vec<u8>,
}

/// Where a compressed cluster is, and since when: the same place may be given back and filled anew.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct PackedAt {
    host: u64,
    bytes: u64,
    /// [`Tables::releases`] when the entry was looked up.
    releases: u64,
}

impl Qcow2Node {
    /// Fills `bufs` from a guest offset; `below` is what shows through where nothing is mapped.
    pub(super) fn read_all(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        let mut done = 0;
        while done < bufs.len() {
            done += match done {
                0 => self.read_run(below, offset, bufs)?,
                _ => self.read_run(below, offset + done as u64, &bufs.range(done, bufs.len() - done))?,
            };
        }
        Ok(())
    }

    /// Reads as much as one mapping covers; returns how much that was.
    fn read_run(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<usize, BlockError> {
        let mut tables = self.tables.lock();
        let found = tables.run(offset, bufs.len() as u64);
        let (entry, bytes) = tables.noticing(found)?;
        let _flight = self.enter(&tables);
        let releases = tables.releases;
        drop(tables);
        let bytes = bytes as usize;
        let part;
        let bufs = if bytes == bufs.len() {
            bufs
        } else {
            part = bufs.range(0, bytes);
            &part
        };
        let within = self.geometry.in_cluster(offset);
        match entry {
            L2Entry::Data { host, .. } => {
                self.file.event(Event::READ_AIO);
                self.sealing.read(&*self.data.file, &self.data.path, host + within, offset, bufs)?;
            }
            L2Entry::Zero { .. } => bufs.fill_zero(),
            L2Entry::Unallocated => {
                if !below.is_empty() {
                    self.file.event(Event::READ_BACKING_AIO);
                }
                read_chain(below, offset, bufs)?;
            }
            L2Entry::Compressed { host, bytes } => {
                self.read_packed(offset, PackedAt { host, bytes, releases }, bufs)?;
            }
        }
        Ok(bytes)
    }

    /// Unpacks a compressed cluster, or takes it from the one unpacked last.
    fn read_packed(&self, offset: u64, at: PackedAt, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        if bufs.len() as u64 == self.geometry.cluster_bytes() {
            bufs.copy_from(&self.unpack(offset, at)?);
            return Ok(());
        }
        let within = self.geometry.in_cluster(offset) as usize;
        let mut unpacked = self.unpacked.lock();
        if unpacked.key != at {
            *unpacked = Unpacked { plain: self.unpack(offset, at)?, key: at };
        }
        bufs.copy_from(unpacked.plain.get(within..).unwrap_or_default());
        Ok(())
    }

    fn unpack(&self, guest_offset: u64, at: PackedAt) -> Result<Vec<u8>, BlockError> {
        // The descriptor has room for less than two clusters, so this is bounded.
        let mut packed = vec![0; at.bytes as usize];
        let mut plain = vec![0; self.geometry.cluster_bytes() as usize];
        self.file.event(Event::READ_COMPRESSED);
        self.file.read_at(at.host, &ReadBufs::from_slice(&mut packed)).map_err(|e| self.failed(Action::Read, e))?;
        decompress(self.compression, &packed, &mut plain).map_err(|source| BlockError::Compressed {
            path: self.path.clone(),
            guest_offset,
            source,
        })?;
        Ok(plain)
    }
}

impl Tables {
    /// What maps a guest offset, and for how many bytes from there, at most `max`, without a break. The host offset is
    /// that of the first cluster.
    pub(super) fn run(&mut self, offset: u64, max: u64) -> Result<(L2Entry, u64), BlockError> {
        let (first, mut run) = self.piece(offset)?;
        if matches!(first, L2Entry::Compressed { .. }) {
            return Ok((first, run.min(max)));
        }
        let first_cluster = offset - self.geometry.in_cluster(offset);
        let mut examined = 0;
        while run < max && examined < RUN_ENTRIES_MAX {
            let at = offset + run;
            examined += 1;
            if first == L2Entry::Unallocated && self.l1_entry(at)?.table.is_none() {
                let reach = self.geometry.l2_reach_bytes();
                run = run.saturating_add(reach - at % reach);
                continue;
            }
            let distance = at - self.geometry.in_cluster(at) - first_cluster;
            let (next, bytes) = self.piece(at)?;
            let continues = match (first, next) {
                (L2Entry::Data { host, .. }, L2Entry::Data { host: next, .. }) => next == host + distance,
                (L2Entry::Zero { host: Some(host), .. }, L2Entry::Zero { host: Some(next), .. }) => {
                    next == host + distance
                }
                (L2Entry::Zero { host: None, .. }, L2Entry::Zero { host: None, .. }) => true,
                (L2Entry::Unallocated, L2Entry::Unallocated) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            run += bytes;
        }
        Ok((first, run.min(max)))
    }
}
