//! Writing a `streamOptimized` file: packed grains in ascending order, each grain table behind its grains, at the
//! end the grain directory and the footer. A flush writes that end; what is appended later replaces it.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use image::vmdk::{GRAIN_MARKER_BYTES, SECTOR_BYTES, SparseHeader, VmdkError, grain_header, pack_table, stream_end};

use super::sparse::{read_directory, unpack_grain};
use crate::error::BlockError;
use crate::mapped::Store;
use crate::sys::{ReadBufs, WriteBufs};

pub(super) struct StreamWriter {
    store: Store,
    /// As it is at the start of the file: without the directory's place.
    header: SparseHeader,
    size_bytes: u64,
    state: Mutex<State>,
}

struct State {
    directory: Vec<u32>,
    /// The table that is being filled, and its number.
    table: Vec<u32>,
    table_index: u64,
    /// The first grain that may still be written.
    next_grain: u64,
    /// Where the next piece goes.
    end: u64,
    /// The end of the stream is in the file, from `end` on.
    ended: bool,
}

impl StreamWriter {
    /// Takes an empty stream. `header` is its footer's.
    pub(super) fn new(store: Store, header: &SparseHeader, size_bytes: u64) -> Result<StreamWriter, BlockError> {
        let directory = read_directory(&store, header, header.gd_sector)?;
        if directory.iter().any(|sector| *sector != 0) {
            return Err(store.refused(VmdkError::StreamNotEmpty));
        }
        let state = State {
            directory,
            table: Vec::new(),
            table_index: 0,
            next_grain: 0,
            end: header.overhead_sectors * SECTOR_BYTES,
            ended: true,
        };
        let header = SparseHeader { gd_sector: image::vmdk::GD_AT_END, ..header.clone() };
        Ok(StreamWriter { store, header, size_bytes, state: Mutex::new(state) })
    }

    /// A panic of another thread cannot leave the state behind the file: it is changed after what is written.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self, error: VmdkError) -> BlockError {
        self.store.refused(error)
    }

    /// Appends a packed grain.
    pub(super) fn append(&self, offset: u64, packed: &[u8]) -> Result<(), BlockError> {
        let grain_bytes = self.header.grain_bytes();
        let grain = offset / grain_bytes;
        if !offset.is_multiple_of(grain_bytes) {
            return Err(self.refused(VmdkError::StreamOnly));
        }
        let state = &mut *self.lock();
        if grain < state.next_grain {
            let after = state.next_grain.saturating_sub(1) * grain_bytes;
            return Err(self.refused(VmdkError::StreamOrder { offset, after }));
        }
        self.reopen(state)?;
        let gt_entries = u64::from(self.header.gt_entries);
        if grain / gt_entries != state.table_index {
            self.finish_table(state)?;
            state.table_index = grain / gt_entries;
        }
        let sector = u32::try_from(state.end / SECTOR_BYTES).map_err(|_| self.refused(VmdkError::Full))?;
        let marker = grain_header(grain * self.header.grain_sectors, packed.len() as u32);
        let padding = [0; SECTOR_BYTES as usize];
        let used = GRAIN_MARKER_BYTES + packed.len();
        let padding = padding.get(..used.next_multiple_of(SECTOR_BYTES as usize) - used).unwrap_or_default();
        let parts = [&marker[..], packed, padding].map(WriteBufs::from_slice);
        let [marker, packed, padding] = &parts;
        let whole = WriteBufs::concat(&[marker, packed, padding]);
        self.store.write(state.end, &whole)?;
        state.end += whole.len() as u64;
        state.table.resize(gt_entries as usize, 0);
        if let Some(entry) = state.table.get_mut((grain % gt_entries) as usize) {
            *entry = sector;
        }
        state.next_grain = grain + 1;
        Ok(())
    }

    /// Takes the end of the stream away.
    fn reopen(&self, state: &mut State) -> Result<(), BlockError> {
        if state.ended {
            self.store.set_len_bytes(state.end)?;
            state.ended = false;
        }
        Ok(())
    }

    /// Writes the table that is being filled. It may be written again, when a flush came in between.
    fn finish_table(&self, state: &mut State) -> Result<(), BlockError> {
        if state.table.is_empty() {
            return Ok(());
        }
        state.end = self.put_table(state, state.end)?;
        state.table.clear();
        Ok(())
    }

    /// Writes the current table at `at` and enters it into the directory; returns where it ends.
    fn put_table(&self, state: &mut State, at: u64) -> Result<u64, BlockError> {
        let piece = pack_table(&state.table);
        self.store.write_slice(at, &piece)?;
        let sector = u32::try_from(at / SECTOR_BYTES + 1).map_err(|_| self.refused(VmdkError::Full))?;
        if let Some(entry) = state.directory.get_mut(state.table_index as usize) {
            *entry = sector;
        }
        Ok(at + piece.len() as u64)
    }

    /// Writes the end of the stream, and waits until all of it is on stable storage.
    pub(super) fn flush(&self) -> Result<(), BlockError> {
        let state = &mut *self.lock();
        if !state.ended {
            // The open table is part of this end only, so that it can go on being filled.
            let at = if state.table.is_empty() { state.end } else { self.put_table(state, state.end)? };
            let end = stream_end(&self.header, &state.directory, at / SECTOR_BYTES);
            self.store.write_slice(at, &end)?;
            self.store.set_len_bytes(at + end.len() as u64)?;
            state.ended = true;
        }
        self.store.sync()
    }

    /// Refuses to make zeroes of grains that are in the stream; the others are zeroes.
    pub(super) fn write_zeroes(&self, offset: u64) -> Result<(), BlockError> {
        let next_grain = self.lock().next_grain;
        if offset >= next_grain * self.header.grain_bytes() {
            return Ok(());
        }
        Err(self.refused(VmdkError::StreamOnly))
    }

    /// Where a grain is; `None` when it is not in the stream.
    pub(super) fn find(&self, grain: u64) -> Result<Option<u64>, BlockError> {
        let state = self.lock();
        let gt_entries = u64::from(self.header.gt_entries);
        let (table, index) = (grain / gt_entries, grain % gt_entries);
        let sector = if table == state.table_index && !state.table.is_empty() {
            state.table.get(index as usize).copied().unwrap_or(0)
        } else {
            match state.directory.get(table as usize) {
                None | Some(0) => 0,
                Some(sector) => {
                    let mut raw = [0; 4];
                    let at = u64::from(*sector) * SECTOR_BYTES + index * 4;
                    self.store.read(at, &ReadBufs::from_slice(&mut raw))?;
                    u32::from_le_bytes(raw)
                }
            }
        };
        Ok((sector != 0).then(|| u64::from(sector) * SECTOR_BYTES))
    }

    /// Reads what has been appended; the rest is zeroes.
    pub(super) fn read(&self, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        let grain_bytes = self.header.grain_bytes();
        let mut room = vec![0; grain_bytes as usize];
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let (grain, within) = (at / grain_bytes, at % grain_bytes);
            let part = bufs.range(done, (grain_bytes - within) as usize);
            match self.find(grain)? {
                None => part.fill_zero(),
                Some(host) => {
                    unpack_grain(&self.store, &self.header, grain * self.header.grain_sectors, host, &mut room)?;
                    part.copy_from(room.get(within as usize..).unwrap_or_default());
                }
            }
            done += part.len();
        }
        Ok(())
    }

    pub(super) fn grain_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn path(&self) -> &PathBuf {
        &self.store.path
    }

    pub(super) fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.store.allocated_bytes()
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // Whoever cares about the result has flushed before.
        let _ = self.flush();
    }
}
