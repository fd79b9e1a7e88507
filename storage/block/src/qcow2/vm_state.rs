//! The state of a machine inside a snapshot: bytes that lie behind the disk in the snapshot's own L1 table, where no
//! guest sees them.

use std::io::Read;

use image::qcow2::{COPIED, L1_MAX_BYTES, L2Entry, Snapshot, SnapshotL1, Subclusters, ZERO};

use super::maintenance::Qcow2Image;
use super::maintenance_error::MaintenanceError;
use super::resize::store_entry;
use super::rewrite::{Place, Rewrite};
use super::snapshots::{SnapshotTime, find, new_snapshot, read_table, replace_table};
use crate::blkdebug::Event;
use crate::error::{Action, BlockError};
use crate::sys::ReadBufs;

impl Qcow2Image {
    /// As [`Qcow2Image::create_snapshot`], with the state of the machine, which is read to its end. `read_vm_state`
    /// gives it back. Requests of guests wait meanwhile.
    pub fn create_snapshot_with_state(
        &self,
        name: &str,
        time: &SnapshotTime,
        state: &mut dyn Read,
    ) -> Result<String, BlockError> {
        self.node.rewrite(|rewrite| {
            rewrite.refuse_snapshots()?;
            let mut table = read_table(rewrite.place, &rewrite.header)?;
            let active = rewrite.old_l1.clone();
            rewrite.add_references(&active)?;
            let state_index = rewrite.geometry.l1_entries() as usize;
            let mut l1 = active.clone();
            // A state that the disk still carries from a snapshot that was applied belongs to that one.
            let gone: Vec<u64> = l1.get(state_index..).unwrap_or_default().to_vec();
            rewrite.drop_references(&gone)?;
            l1.resize(state_index, 0);
            let vm_state_bytes = rewrite.store_state(&mut l1, state)?;
            l1.resize(l1.len().max(1), 0);
            let raw: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let own = SnapshotL1 { offset: rewrite.place(&raw)?, entries: l1.len() as u32 };
            let snapshot = new_snapshot(rewrite, &table.snapshots, name, time, own);
            let id = String::from_utf8_lossy(&snapshot.id).into_owned();
            table.snapshots.push(Snapshot { vm_state_bytes, ..snapshot });
            rewrite.set_active(active, false)?;
            replace_table(rewrite, &table)?;
            Ok(id)
        })
    }

    /// Reads the state of the machine in a snapshot from a byte on: fills `out` as far as there is state, and returns
    /// how much that was. `name` is an identifier or a name.
    pub fn read_vm_state(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<usize, BlockError> {
        let mut tables = self.node.quiet_for_reading()?;
        let place = Place { file: &*tables.file, path: &tables.path };
        let snapshots = read_table(place, &tables.header)?.snapshots;
        let snapshot = find(place, &snapshots, name)?;
        let have = snapshot.vm_state_bytes.saturating_sub(offset).min(out.len() as u64) as usize;
        let entries = u64::from(snapshot.l1.entries);
        let l1 = tables.load_table("L1 table of a snapshot", snapshot.l1.offset, entries)?;
        let geometry = tables.geometry;
        let sealing = tables.options.sealing.clone();
        // Behind the disk as it was then.
        let then = image::qcow2::Geometry { size_bytes: snapshot.disk_bytes, ..geometry };
        let base = then.l1_entries().saturating_mul(geometry.l2_reach_bytes());
        let saved = std::mem::replace(&mut tables.l1, l1);
        let read = (|| {
            let mut done = 0;
            while done < have {
                let at = base.saturating_add(offset).saturating_add(done as u64);
                let (entry, bytes) = tables.run(at, (have - done) as u64)?;
                let part = out.get_mut(done..done + bytes as usize).unwrap_or_default();
                let within = geometry.in_cluster(at);
                match entry {
                    L2Entry::Data { host, .. } => {
                        tables.file.event(Event::VMSTATE_LOAD);
                        let bufs = ReadBufs::from_slice(part);
                        sealing.read(&*tables.file, &tables.path, host + within, at, &bufs)?;
                    }
                    L2Entry::Zero { .. } | L2Entry::Unallocated => part.fill(0),
                    L2Entry::Compressed { .. } => {
                        let reason = "it is compressed";
                        let what = "the state of a machine";
                        return Err(self.refuse(MaintenanceError::Unsupported { what, reason }));
                    }
                }
                done += part.len().max(1);
            }
            Ok(have)
        })();
        tables.l1 = saved;
        read
    }
}

impl Rewrite<'_> {
    /// Writes a state to new clusters, with L2 tables for them behind the entries of `l1`. Returns its length.
    fn store_state(&mut self, l1: &mut Vec<u64>, state: &mut dyn Read) -> Result<u64, BlockError> {
        let geometry = self.geometry;
        self.place.file.event(Event::VMSTATE_SAVE);
        let entry_bytes = geometry.l2_entry_bytes() as usize;
        let mut total = 0u64;
        let mut cluster = vec![0; geometry.cluster_bytes() as usize];
        loop {
            let mut table = vec![0; geometry.cluster_bytes() as usize];
            let mut used = false;
            let mut at_end = false;
            for entry in table.chunks_exact_mut(entry_bytes) {
                let got =
                    read_full(state, &mut cluster).map_err(|e| BlockError::io(self.place.path, Action::Read, e))?;
                at_end = got < cluster.len();
                if got == 0 {
                    break;
                }
                total += got as u64;
                used = true;
                cluster.get_mut(got..).unwrap_or_default().fill(0);
                // Nothing may be left unmapped: a backing file could show there.
                let zero = geometry.version >= 3 && crate::zeroes::is_zero(&cluster);
                let (raw, subclusters) = match zero {
                    true => (if geometry.extended_l2 { 0 } else { ZERO }, Subclusters::ALL_ZERO),
                    false => (self.place_data(&cluster)? | COPIED, Subclusters::ALL_DATA),
                };
                store_entry(entry, raw, subclusters);
                if at_end {
                    break;
                }
            }
            if used {
                l1.push(self.place(&table)? | COPIED);
            }
            if l1.len() as u64 > L1_MAX_BYTES / 8 {
                let source = image::qcow2::HeaderError::L1TooLarge { entries: l1.len() as u64, max: L1_MAX_BYTES / 8 };
                return Err(self.place.refuse(MaintenanceError::Header(source)));
            }
            self.counts.relieve()?;
            if at_end {
                return Ok(total);
            }
        }
    }
}

/// Fills `out` as far as there is something to read.
fn read_full(from: &mut dyn Read, out: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
