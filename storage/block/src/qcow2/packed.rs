//! Compressed writes. Streams are packed behind each other, so several share a host cluster, which has a reference
//! from each of them.

use image::qcow2::{Compressor, Freed, L2Entry, decompress};

use super::{Qcow2Node, Tables};
use crate::blkdebug::Event;
use crate::error::{Action, BlockError};
use crate::sys::WriteBufs;

/// Compressors kept for the next request.
const COMPRESSORS_MAX: usize = 16;

impl Qcow2Node {
    /// A cluster of an external data file has one place, which others must not reach into.
    pub(super) fn refuse_packed(&self) -> Result<(), BlockError> {
        match self.geometry.data_file {
            true => Err(BlockError::NoCompression { path: self.path.clone() }),
            false => Ok(()),
        }
    }

    /// Compresses one cluster; false when it does not shrink.
    pub(super) fn pack_cluster(&self, cluster: &[u8], packed: &mut Vec<u8>) -> bool {
        let kept = self.compressors.lock().pop();
        let mut compressor = kept.unwrap_or_else(|| Compressor::new(self.compression));
        let shrinks = compressor.compress(cluster, packed);
        let mut kept = self.compressors.lock();
        if kept.len() < COMPRESSORS_MAX {
            kept.push(compressor);
        }
        shrinks
    }

    /// Stores one stream for the cluster at `offset`. Where no descriptor can say where it is, far beyond what files
    /// reach, the cluster is stored as it is.
    pub(super) fn store_or_unpack(&self, offset: u64, packed: &[u8]) -> Result<(), BlockError> {
        let cluster_bytes = self.geometry.cluster_bytes();
        if !self.geometry.is_aligned(offset) || packed.len() as u64 >= cluster_bytes {
            let bytes = packed.len() as u64;
            return Err(BlockError::NoPackedCluster { path: self.path.clone(), offset, bytes });
        }
        if self.store_packed(offset, packed)? {
            return Ok(());
        }
        let mut plain = vec![0; cluster_bytes as usize];
        decompress(self.compression, packed, &mut plain).map_err(|source| BlockError::Compressed {
            path: self.path.clone(),
            guest_offset: offset,
            source,
        })?;
        let inside = self.size_bytes().saturating_sub(offset).min(cluster_bytes) as usize;
        // A whole cluster needs nothing from below.
        self.write_all(&[], offset, &WriteBufs::from_slice(plain.get(..inside).unwrap_or_default()))
    }

    /// Stores one stream. False, with nothing changed, when no descriptor can say where it is.
    fn store_packed(&self, offset: u64, packed: &[u8]) -> Result<bool, BlockError> {
        // One stream at a time: neighbours share sectors, which a direct write reads and writes as a whole.
        let _turn = self.packing.lock();
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut tables = self.lock_settled(offset, cluster_bytes);
        tables.begin_change(offset, cluster_bytes)?;
        let bytes = packed.len() as u64;
        let taken = tables.relieve().and_then(|()| tables.take_packed(bytes));
        let host = tables.noticing(taken)?;
        let Some(raw) = L2Entry::compressed(host, bytes, &self.geometry) else {
            let given = tables.give_back_packed(host, bytes);
            tables.noticing(given)?;
            return Ok(false);
        };
        let range = offset..offset + cluster_bytes;
        tables.filling.push(range.clone());
        let written = parking_lot::MutexGuard::unlocked(&mut tables, || {
            self.file.event(Event::WRITE_COMPRESSED);
            let write = self.file.write_at(host, &WriteBufs::from_slice(packed));
            write.map_err(|e| self.failed(Action::Write, e))
        });
        let stored = written.and_then(|()| tables.refer_to_packed(offset, raw));
        let result = match stored {
            Ok(()) => Ok(true),
            Err(error) => tables.give_back_packed(host, bytes).and(Err(error)),
        };
        self.settle(&mut tables, &range);
        tables.noticing(result)
    }
}

impl Tables {
    /// Room for a stream, at most a cluster long: behind the one before, or in a new cluster.
    fn take_packed(&mut self, bytes: u64) -> Result<u64, BlockError> {
        self.file.event(Event::CLUSTER_ALLOC_BYTES);
        let geometry = self.geometry;
        let (bits, cluster_bytes) = (geometry.cluster_bits, geometry.cluster_bytes());
        let within = geometry.in_cluster(self.packed_end);
        let behind = self.packed_end >> bits;
        let shared = within != 0 && self.refcount(behind)? < geometry.refcount_max();
        if shared && within + bytes <= cluster_bytes {
            self.add_reference(behind)?;
            self.packed_end += bytes;
            return Ok(self.packed_end - bytes);
        }
        let (cluster, _) = self.alloc_run(1)?;
        let host = match shared && cluster == behind + 1 {
            true => {
                self.add_reference(behind)?;
                self.packed_end
            }
            false => cluster << bits,
        };
        self.packed_end = host + bytes;
        Ok(host)
    }

    fn give_back_packed(&mut self, host: u64, bytes: u64) -> Result<(), BlockError> {
        let bits = self.geometry.cluster_bits;
        for cluster in host >> bits..(host + bytes).div_ceil(1 << bits) {
            self.give_back(cluster, 1)?;
        }
        Ok(())
    }

    fn refer_to_packed(&mut self, offset: u64, raw: u64) -> Result<(), BlockError> {
        let free = self.freed_by(offset)?;
        self.file.event(Event::L2_UPDATE_COMPRESSED);
        self.set_entries(offset, std::iter::once([raw, 0]))?;
        if let Some(Freed { offset, bytes }) = free {
            self.free_later(offset, bytes);
        }
        Ok(())
    }
}
