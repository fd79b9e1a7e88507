//! Changing a mapped disk: places for new blocks, zeroes, flushes.

use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use super::{BlockTable, Entry, Mapped, Run, Slot, State};
use crate::error::BlockError;
use crate::node::{Below, read_chain};
use crate::sys::{ReadBufs, WriteBufs};

/// Zeroes that are written where a format has no entry for them.
const ZERO_PIECE_BYTES: u64 = 256 << 10;

/// New blocks with a place in the file and no entry yet.
struct Reserved {
    first: u64,
    count: u64,
    /// Where they start, with what is in front of the first one's data.
    host: u64,
    /// Up to here the file holds bytes of no block.
    stale_end: u64,
    /// What is below must fill the parts that the request does not write.
    fill: bool,
}

impl<T: BlockTable> Mapped<T> {
    fn writable(&self) -> Result<(), BlockError> {
        if self.read_only { Err(self.store.read_only()) } else { Ok(()) }
    }

    /// Looks at the run from `offset` on, after every new block in the way has its entry.
    fn settled_run<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        offset: u64,
        bytes: u64,
    ) -> Result<(MutexGuard<'a, State>, Run), BlockError> {
        let block_bytes = self.table.block_bytes();
        let first = offset / block_bytes;
        while state.in_flight.iter().any(|range| range.contains(&first)) {
            state = self.landed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut run = self.run(&mut state, offset, bytes)?;
        // Another writer's new blocks end the run: they will have entries of their own.
        for range in state.in_flight.iter().filter(|range| range.start > first) {
            run.bytes = run.bytes.min(range.start * block_bytes - offset);
        }
        Ok((state, run))
    }

    /// See [`crate::node::Node::write`].
    pub(crate) fn write(&self, below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.writable()?;
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let (mut state, run) = self.settled_run(self.lock(), at, (bufs.len() - done) as u64)?;
            self.begin(&mut state)?;
            match run.entry {
                Entry::At(host) => {
                    drop(state);
                    self.store.write(host, &bufs.range(done, run.bytes as usize))?;
                    done += run.bytes as usize;
                }
                Entry::Packed(_) => {
                    return Err(self.store.refused(self.table.immutable(at / self.table.block_bytes())));
                }
                Entry::Absent | Entry::Zero => {
                    let reserved = self.reserve(&mut state, at, &run, below)?;
                    drop(state);
                    let block_bytes = self.table.block_bytes();
                    let part_end = (reserved.first + reserved.count) * block_bytes;
                    let part = bufs.range(done, run.bytes.min(part_end - at) as usize);
                    let written = self.fill(&reserved, below, at, &part);
                    self.land(&reserved, written)?;
                    done += part.len();
                }
            }
        }
        self.flush_when_full()
    }

    fn begin(&self, state: &mut State) -> Result<(), BlockError> {
        if state.failed {
            return Err(BlockError::FlushFailed { path: self.store.path.clone() });
        }
        if !state.begun {
            self.table.begin(&self.store)?;
            state.begun = true;
        }
        Ok(())
    }

    /// Gives the blocks of a run a place.
    fn reserve(&self, state: &mut State, at: u64, run: &Run, below: Below<'_>) -> Result<Reserved, BlockError> {
        let block_bytes = self.table.block_bytes();
        let (lead_bytes, stride) = self.table.stride();
        let first = at / block_bytes;
        let reused = state.free.first().copied();
        // With something in front of each block, they are written one by one.
        let count = match (lead_bytes, reused) {
            (0, None) => (at + run.bytes - 1) / block_bytes - first + 1,
            _ => 1,
        };
        let host = reused.unwrap_or(state.end);
        let mut raw = [0; 8];
        let last_host = host.saturating_add((count - 1) * stride).saturating_add(lead_bytes);
        for (block, data) in [(first, host + lead_bytes), (first + count - 1, last_host)] {
            let raw = raw.get_mut(..self.table.entry_bytes()).unwrap_or_default();
            self.table.encode(block, Entry::At(data), raw).map_err(|e| self.store.refused(e))?;
            if let Slot::NoTable(_) = self.table.slot(block).map_err(|e| self.store.refused(e))? {
                return Err(self.store.refused(self.table.immutable(block)));
            }
        }
        if reused.is_some() {
            state.free.pop_first();
        } else {
            state.end = host + count * stride;
        }
        state.file_bytes = state.file_bytes.max(state.end);
        state.grown = true;
        state.in_flight.push(first..first + count);
        let fill = run.entry == Entry::Absent && !below.is_empty();
        let stale_end = state.stale_end;
        state.stale_end = stale_end.max(state.end);
        Ok(Reserved { first, count, host, stale_end, fill })
    }

    /// Writes new blocks: the request's bytes, and around them what is below, or zeroes.
    fn fill(&self, new: &Reserved, below: Below<'_>, at: u64, part: &WriteBufs<'_>) -> Result<(), BlockError> {
        let block_bytes = self.table.block_bytes();
        let (lead_bytes, stride) = self.table.stride();
        if new.host < new.stale_end {
            let bytes = (new.stale_end - new.host).min(new.count * stride);
            self.store.write_zeroes(new.host, bytes, true)?;
        }
        if lead_bytes > 0 {
            self.store.write_slice(new.host, self.table.lead())?;
        }
        let start = new.first * block_bytes;
        let data = new.host + lead_bytes;
        self.store.write(data + (at - start), part)?;
        if new.fill {
            let written_end = at + part.len() as u64;
            let end = (start + new.count * block_bytes).min(self.size_bytes);
            for (from, to) in [(start, at), (written_end, end)] {
                self.copy_below(below, from..to, data + (from - start))?;
            }
        }
        Ok(())
    }

    fn copy_below(&self, below: Below<'_>, guest: Range<u64>, host: u64) -> Result<(), BlockError> {
        let mut at = guest.start;
        let mut piece = vec![0; guest.end.saturating_sub(at).min(ZERO_PIECE_BYTES) as usize];
        while at < guest.end {
            let bytes = (guest.end - at).min(ZERO_PIECE_BYTES);
            let piece = piece.get_mut(..bytes as usize).unwrap_or_default();
            read_chain(below, self.guest_base + at, &ReadBufs::from_slice(piece))?;
            self.store.write_slice(host + (at - guest.start), piece)?;
            at += bytes;
        }
        Ok(())
    }

    /// New blocks are written: they get their entries. The places of blocks that could not be written are given
    /// back.
    fn land(&self, new: &Reserved, written: Result<(), BlockError>) -> Result<(), BlockError> {
        let (lead_bytes, stride) = self.table.stride();
        let mut state = self.lock();
        let mut done = 0;
        let landed = written.and_then(|()| {
            while done < new.count {
                let host = new.host + done * stride + lead_bytes;
                self.set_entry(&mut state, new.first + done, Entry::At(host))?;
                done += 1;
            }
            Ok(())
        });
        if done > 0 {
            state.used_end = state.used_end.max(new.host + done * stride);
        }
        state.in_flight.retain(|range| range.start != new.first);
        if done < new.count {
            self.give_back(&mut state, new.host + done * stride..new.host + new.count * stride);
        }
        drop(state);
        self.landed.notify_all();
        landed
    }

    /// Places that nobody uses: what is at the end of the file is cut off, the rest becomes a hole and is for the
    /// next blocks. That the host cannot do it costs space only.
    fn give_back(&self, state: &mut State, places: Range<u64>) {
        let (_, stride) = self.table.stride();
        let old_end = state.end;
        state.free.extend(places.clone().step_by(stride as usize));
        while state.free.last().is_some_and(|last| last + stride == state.end) {
            state.end = state.free.pop_last().unwrap_or(state.end);
        }
        let holes = places.start..places.end.min(state.end);
        if !holes.is_empty() {
            let _ = self.store.punch_hole(holes.start, holes.end - holes.start);
        }
        if state.end < old_end {
            // Under the lock: no place behind `end` is given away meanwhile. A device keeps what it held there.
            let longer = !self.store.keeps_len() && self.store.len_bytes().is_ok_and(|bytes| bytes > state.end);
            if longer && self.store.set_len_bytes(state.end).is_ok() {
                (state.stale_end, state.file_bytes) = (state.end, state.end);
            }
            state.trailer_lost = true;
        }
    }

    fn set_entry(&self, state: &mut State, block: u64, entry: Entry) -> Result<(), BlockError> {
        let mut raw = [0; 8];
        let raw = raw.get_mut(..self.table.entry_bytes()).unwrap_or_default();
        match self.table.slot(block).map_err(|e| self.store.refused(e))? {
            Slot::NoTable(_) => Err(self.store.refused(self.table.immutable(block))),
            Slot::Page(page, at) => {
                self.table.encode(block, entry, raw).map_err(|e| self.store.refused(e))?;
                state.pages.put(&self.store, page, at, raw)
            }
        }
    }

    /// See [`crate::node::Node::write_zeroes`].
    pub(crate) fn write_zeroes(
        &self,
        below: Below<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> Result<(), BlockError> {
        self.writable()?;
        let block_bytes = self.table.block_bytes();
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let (mut state, run) = self.settled_run(self.lock(), at, end - at)?;
            self.begin(&mut state)?;
            match run.entry {
                Entry::At(host) => {
                    drop(state);
                    self.store.write_zeroes(host, run.bytes, may_unmap)?;
                }
                Entry::Packed(_) => {
                    return Err(self.store.refused(self.table.immutable(at / self.table.block_bytes())));
                }
                Entry::Zero => {}
                Entry::Absent if below.is_empty() => {}
                Entry::Absent => {
                    let run_end = at + run.bytes;
                    let first = at.div_ceil(block_bytes);
                    // The last block of the disk is whole when the disk ends in it.
                    let last =
                        if run_end == self.size_bytes { run_end.div_ceil(block_bytes) } else { run_end / block_bytes };
                    let whole = first * block_bytes == at && first < last;
                    if whole && self.table.has_zero_entries() {
                        for block in first..last {
                            self.set_entry(&mut state, block, Entry::Zero)?;
                        }
                        at = run_end.min(last * block_bytes);
                        continue;
                    }
                    drop(state);
                    let stop = if whole { run_end } else { run_end.min(first * block_bytes) };
                    let stop = if stop <= at { run_end } else { stop };
                    let piece = vec![0; (stop - at).min(ZERO_PIECE_BYTES) as usize];
                    self.write(below, at, &WriteBufs::from_slice(&piece))?;
                    at += piece.len() as u64;
                    continue;
                }
            }
            at += run.bytes;
        }
        self.flush_when_full()
    }

    /// See [`crate::node::Node::discard`]. Blocks keep their place.
    pub(crate) fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.writable()?;
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let (mut state, run) = self.settled_run(self.lock(), at, end - at)?;
            self.begin(&mut state)?;
            drop(state);
            if let Entry::At(host) = run.entry {
                self.store.punch_hole(host, run.bytes)?;
            }
            at += run.bytes;
        }
        Ok(())
    }

    fn flush_when_full(&self) -> Result<(), BlockError> {
        let full = self.lock().pages.is_full();
        if full { self.flush() } else { Ok(()) }
    }

    /// See [`crate::node::Node::flush`].
    pub(crate) fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let (pages, used_end, trailer_lost) = {
            let mut state = self.lock();
            if state.failed {
                return Err(BlockError::FlushFailed { path: self.store.path.clone() });
            }
            if state.grown && self.store.len_bytes()? < state.end {
                // Every place that was given away ends at `end`, so nothing that is being written is cut off.
                self.store.set_len_bytes(state.end)?;
            }
            state.grown = false;
            (state.pages.dirty(), state.used_end, state.trailer_lost)
        };
        let synced = self.store.sync();
        let committed = synced.and_then(|()| {
            if pages.is_empty() && !trailer_lost {
                return Ok(());
            }
            self.table.commit(&self.store, &pages, used_end)?;
            self.write_trailer()?;
            self.store.sync()
        });
        let mut state = self.lock();
        match &committed {
            Ok(()) => state.pages.written(&pages),
            // The tables stay in memory and can be written when there is space.
            Err(BlockError::NoSpace { .. }) => {}
            Err(_) => state.failed = true,
        }
        committed
    }

    /// Under the lock, because new blocks go where the trailer is.
    fn write_trailer(&self) -> Result<(), BlockError> {
        let trailer = self.table.trailer();
        let mut state = self.lock();
        if trailer.is_empty() {
            state.trailer_lost = false;
            return Ok(());
        }
        state.stale_end = state.stale_end.max(state.end + trailer.len() as u64);
        self.store.write_slice(state.end, trailer)?;
        state.trailer_lost = false;
        Ok(())
    }

    /// Flushes and lets the format say that the image is whole.
    pub(super) fn close(&mut self) -> Result<(), BlockError> {
        self.flush()?;
        let begun = self.lock().begun;
        if begun { self.table.close(&self.store) } else { Ok(()) }
    }
}
