//! Reads. Neighbouring clusters that are neighbours on the host too become one system call.

use image::qcow2::{L2Entry, decompress};

use super::Qcow2Node;
use crate::disk::{Node, read_chain};
use crate::error::{Action, BlockError};
use crate::sys::ReadBufs;

impl Qcow2Node {
    /// Fills `bufs` from a guest offset; `below` is what shows through where nothing is mapped.
    pub(crate) fn read(&mut self, below: &mut [Node], offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        let mut done = 0;
        while done < bufs.len() {
            let result = self.read_run(below, offset + done as u64, &bufs.range(done, bufs.len() - done));
            done += self.noticing(result)?;
        }
        Ok(())
    }

    /// Reads as much as one mapping covers; returns how much that was.
    fn read_run(&mut self, below: &mut [Node], offset: u64, bufs: &ReadBufs<'_>) -> Result<usize, BlockError> {
        let entry = self.entry(offset)?;
        let within = self.geometry.in_cluster(offset);
        let bytes = match entry {
            L2Entry::Compressed { .. } => (self.geometry.cluster_bytes() - within).min(bufs.len() as u64),
            _ => self.run_bytes(entry, offset, bufs.len() as u64)?,
        } as usize;
        let bufs = bufs.range(0, bytes);
        match entry {
            L2Entry::Data { host, .. } => {
                self.file.read_at(host + within, &bufs).map_err(|e| self.io(Action::Read, e))?;
            }
            L2Entry::Zero { .. } => bufs.fill_zero(),
            L2Entry::Unallocated => read_chain(below, offset, &bufs)?,
            L2Entry::Compressed { host, bytes: packed } => {
                self.unpack(offset, host, packed)?;
                bufs.copy_from(self.unpacked.plain.get(within as usize..).unwrap_or_default());
            }
        }
        Ok(bytes)
    }

    /// How many bytes from `offset`, at most `max`, continue the mapping `first` without a break.
    fn run_bytes(&mut self, first: L2Entry, offset: u64, max: u64) -> Result<u64, BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut run = cluster_bytes - self.geometry.in_cluster(offset);
        let mut clusters = 1;
        while run < max {
            let next = self.entry(offset + run)?;
            let continues = match (first, next) {
                (L2Entry::Data { host, .. }, L2Entry::Data { host: next, .. }) => {
                    next == host + clusters * cluster_bytes
                }
                (L2Entry::Zero { .. }, L2Entry::Zero { .. }) | (L2Entry::Unallocated, L2Entry::Unallocated) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            run += cluster_bytes;
            clusters += 1;
        }
        Ok(run.min(max))
    }

    /// Unpacks a compressed cluster into `self.unpacked`, unless it is there already.
    fn unpack(&mut self, guest_offset: u64, host: u64, bytes: u64) -> Result<(), BlockError> {
        if (self.unpacked.host, self.unpacked.bytes) == (host, bytes) {
            return Ok(());
        }
        self.unpacked.host = 0;
        self.unpacked.bytes = 0;
        // The descriptor has room for less than two clusters, so this is bounded.
        let mut packed = vec![0; bytes as usize];
        self.read_file(host, &mut packed)?;
        self.unpacked.plain.resize(self.geometry.cluster_bytes() as usize, 0);
        decompress(self.header.compression, &packed, &mut self.unpacked.plain)
            .map_err(|source| BlockError::Compressed { path: self.path.clone(), guest_offset, source })?;
        self.unpacked.host = host;
        self.unpacked.bytes = bytes;
        Ok(())
    }
}
