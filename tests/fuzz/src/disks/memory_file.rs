//! A sparse file in memory that counts what it is asked: an engine that believes a lying table asks without end, or
//! for more at once than any format has.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{FileBackend, ReadBufs, WriteBufs};

const PAGE_BYTES: u64 = 4096;
/// Calls that one input may cost. The most that a sound image of the corpus needs is below a tenth of it.
const CALLS_MAX: u64 = 20_000;
/// Bytes that one input may move.
const MOVED_MAX_BYTES: u64 = 512 << 20;
/// Longest read: the table of snapshots of a qcow2, the largest piece of any format.
const READ_MAX_BYTES: usize = 64 << 20;

/// The file. Clones are the same file; [`MemoryFile::copy`] is another one.
#[derive(Clone, Default)]
pub struct MemoryFile {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Default)]
struct State {
    /// Pages that are not all zeroes.
    pages: HashMap<u64, Arc<[u8; PAGE_BYTES as usize]>>,
    len_bytes: u64,
    calls: u64,
    moved_bytes: u64,
}

impl State {
    fn count(&mut self, bytes: u64) {
        self.calls += 1;
        self.moved_bytes += bytes;
        // What unwinds already must not panic again.
        if !std::thread::panicking() {
            assert!(self.calls <= CALLS_MAX, "one input costs more than {CALLS_MAX} calls");
            assert!(self.moved_bytes <= MOVED_MAX_BYTES, "one input moves more than {MOVED_MAX_BYTES} bytes");
        }
    }

    /// Changes a part of a page; one that is all zeroes afterwards is dropped.
    fn change(&mut self, number: u64, change: impl FnOnce(&mut [u8])) {
        let page = self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE_BYTES as usize]));
        let bytes = Arc::make_mut(page);
        change(bytes);
        if bytes.iter().all(|byte| *byte == 0) {
            self.pages.remove(&number);
        }
    }

    fn zero(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes);
        let inside = offset.div_ceil(PAGE_BYTES)..end / PAGE_BYTES;
        self.pages.retain(|number, _| !inside.contains(number));
        for number in [offset / PAGE_BYTES, end / PAGE_BYTES] {
            let start = number * PAGE_BYTES;
            let from = offset.clamp(start, start + PAGE_BYTES) - start;
            let to = end.clamp(start, start + PAGE_BYTES) - start;
            if from < to && self.pages.contains_key(&number) {
                self.change(number, |page| page.get_mut(from as usize..to as usize).unwrap_or_default().fill(0));
            }
        }
    }
}

impl MemoryFile {
    /// A file that holds `bytes`.
    pub fn of(bytes: &[u8]) -> MemoryFile {
        let file = MemoryFile::default();
        file.put(0, bytes);
        file
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another file with the same bytes, and nothing counted.
    pub fn copy(&self) -> MemoryFile {
        let state = State { calls: 0, moved_bytes: 0, ..self.state().clone() };
        MemoryFile { state: Arc::new(Mutex::new(state)) }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.state().len_bytes
    }

    /// Offsets of pages that are not all zeroes, in order.
    pub fn used_pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.state().pages.keys().map(|number| number * PAGE_BYTES).collect();
        pages.sort_unstable();
        pages
    }

    /// Reads; zeroes past the end.
    pub fn get(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        // The file in memory has no errors for offsets of a small image.
        let _ = self.read_at(offset, &ReadBufs::from_slice(&mut out));
        out
    }

    /// Writes, growing the file.
    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let _ = self.write_at(offset, &WriteBufs::from_slice(bytes));
    }

    /// Cuts the file off, if it is longer.
    pub fn truncate(&self, bytes: u64) {
        let shorter = bytes.min(self.bytes());
        let _ = self.set_len_bytes(shorter);
    }
}

/// The end of a range, where a host has files that long.
fn end_of(offset: u64, bytes: u64) -> io::Result<u64> {
    let end = offset.checked_add(bytes).filter(|end| *end <= i64::MAX as u64);
    end.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl FileBackend for MemoryFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        end_of(offset, bufs.len() as u64)?;
        let state = &mut *self.state();
        state.count(bufs.len() as u64);
        assert!(
            bufs.len() <= READ_MAX_BYTES || std::thread::panicking(),
            "{} bytes are read at {offset:#x} at once",
            bufs.len()
        );
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let within = (at % PAGE_BYTES) as usize;
            let part = bufs.range(done, PAGE_BYTES as usize - within);
            // Pages past the end are not kept, so that what is read there is zeroes.
            match state.pages.get(&(at / PAGE_BYTES)) {
                Some(page) => part.copy_from(page.get(within..).unwrap_or_default()),
                None => part.fill_zero(),
            }
            done += part.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let end = end_of(offset, bufs.len() as u64)?;
        let state = &mut *self.state();
        state.count(bufs.len() as u64);
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let within = (at % PAGE_BYTES) as usize;
            let part = bufs.range(done, PAGE_BYTES as usize - within);
            state.change(at / PAGE_BYTES, |page| {
                part.copy_to(page.get_mut(within..).unwrap_or_default());
            });
            done += part.len();
        }
        state.len_bytes = state.len_bytes.max(end);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        end_of(offset, bytes)?;
        let state = &mut *self.state();
        state.count(0);
        state.zero(offset, bytes);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> io::Result<()> {
        let end = end_of(offset, bytes)?;
        self.punch_hole(offset, bytes)?;
        let state = &mut *self.state();
        state.len_bytes = state.len_bytes.max(end);
        Ok(())
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        end_of(offset, bytes)?;
        let state = &mut *self.state();
        state.count(0);
        let is_data = |at: u64| state.pages.contains_key(&(at / PAGE_BYTES));
        let data = is_data(offset);
        let mut found = PAGE_BYTES - offset % PAGE_BYTES;
        while found < bytes.min(1 << 20) && is_data(offset + found) == data {
            found += PAGE_BYTES;
        }
        Ok((found.min(bytes).max(1), data))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes())
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        end_of(bytes, 0)?;
        let state = &mut *self.state();
        state.zero(bytes, i64::MAX as u64 - bytes);
        state.len_bytes = bytes;
        Ok(())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.state().pages.len() as u64 * PAGE_BYTES)
    }
}
