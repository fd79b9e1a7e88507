//! A disk in blocks of one size that a table maps to the file: what vdi, vpc, vhdx and sparse vmdk have in common.
//!
//! A [`BlockTable`] knows one format: where the entry of a block is, what it says, how changed tables reach the
//! disk. [`Mapped`] does the rest. Blocks are appended to the file and never move, so data of a mapped block is
//! read and written without a lock; the one lock is held while entries are looked at.
//!
//! Durability: a block's data, then (after `fdatasync`) the entry that refers to it. Entries stay in memory until
//! a flush. After a crash, what lies behind the last block that a table knows is overwritten. A block that could
//! not be written gives its space back: on a full disk, the tables of those that could need some.

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod hostile_tests;
mod node;
mod pages;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod write;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use image::FormatError;

use crate::error::BlockError;
use crate::foreign::ForeignReport;
use crate::node::{Below, Extent, ExtentKind, read_chain};
use crate::sys::ReadBufs;

pub(crate) use node::{MappedNode, random_uuid, write_new};
pub(crate) use pages::{DirtyPage, TablePages};
pub(crate) use store::{Store, refused};

/// Blocks that one look at the table covers at most.
const RUN_BLOCKS_MAX: u64 = 1 << 16;

/// What a table says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing: what is below shows through.
    Absent,
    /// It reads as zeroes.
    Zero,
    /// Its data is at this offset of the file.
    At(u64),
    /// It is packed, in a form that [`BlockTable::unpack`] knows, at this offset of the file.
    Packed(u64),
}

/// Where the entry of a block is.
pub(crate) enum Slot {
    /// In the page at this file offset, at this byte of it.
    Page(u64, usize),
    /// There is no table: all blocks up to this one (not included) are absent.
    NoTable(u64),
}

/// How a format maps blocks. Blocks are numbered from the start of the disk.
pub(crate) trait BlockTable: Send + Sync {
    /// Guest bytes of a block.
    fn block_bytes(&self) -> u64;
    /// Bytes in the file in front of a block's data, and with the data.
    fn stride(&self) -> (u64, u64) {
        (0, self.block_bytes())
    }
    /// Bytes of an entry, 4 or 8.
    fn entry_bytes(&self) -> usize;
    /// Bytes of the pages in which the table is read and written.
    fn page_bytes(&self) -> usize;
    /// Where the entry of `block` is.
    fn slot(&self, block: u64) -> Result<Slot, FormatError>;
    /// What the entry says; `file_bytes` is how far blocks can reach.
    fn decode(&self, block: u64, raw: &[u8], file_bytes: u64) -> Result<Entry, FormatError>;
    /// The entry as it is stored, into `out` of [`BlockTable::entry_bytes`]. An offset that the format cannot
    /// store is an error.
    fn encode(&self, block: u64, entry: Entry, out: &mut [u8]) -> Result<(), FormatError>;
    /// Whether the format has entries that say "zeroes".
    fn has_zero_entries(&self) -> bool {
        false
    }
    /// Why `block`, which is packed or has no table, cannot be changed.
    fn immutable(&self, block: u64) -> FormatError {
        FormatError::Immutable { block }
    }
    /// Unpacks a block into `out`, a block long.
    fn unpack(&self, _store: &Store, _block: u64, _host: u64, _out: &mut [u8]) -> Result<(), BlockError> {
        Ok(())
    }
    /// What is in front of a new block's data.
    fn lead(&self) -> &[u8] {
        &[]
    }
    /// What follows the last block, written with every flush.
    fn trailer(&self) -> &[u8] {
        &[]
    }
    /// Called before the first change of the image.
    fn begin(&self, _store: &Store) -> Result<(), BlockError> {
        Ok(())
    }
    /// Brings changed pages to the disk; all data is on stable storage already, and a sync follows. `used_end` is
    /// where the last block that they know ends. The order inside must survive a crash at every write.
    fn commit(&self, store: &Store, pages: &[DirtyPage], used_end: u64) -> Result<(), BlockError>;
    /// Called when the image is closed after changes.
    fn close(&self, _store: &Store) -> Result<(), BlockError> {
        Ok(())
    }
}

/// What the lock protects.
struct State {
    pages: TablePages,
    /// Where the next block goes.
    end: u64,
    /// Where the last block that has an entry ends.
    used_end: u64,
    /// Up to here the file may hold bytes of no block, which a new block must not show.
    stale_end: u64,
    /// How far blocks can reach.
    file_bytes: u64,
    /// Places before `end` of blocks that could not be written.
    free: BTreeSet<u64>,
    /// Blocks that are being given a place.
    in_flight: Vec<Range<u64>>,
    /// The image has been changed since it was opened.
    begun: bool,
    /// There are blocks whose space the file does not have yet.
    grown: bool,
    /// What follows the last block was overwritten, or cut off with a block that could not be written.
    trailer_lost: bool,
    /// A flush failed: what is on the disk is unknown.
    failed: bool,
}

/// A disk, or a part of one, behind a table.
pub(crate) struct Mapped<T: BlockTable> {
    pub(crate) store: Store,
    pub(crate) table: T,
    size_bytes: u64,
    /// Where this part starts on the disk.
    guest_base: u64,
    read_only: bool,
    /// Data may lie in holes of the file: ask it.
    holes: bool,
    state: Mutex<State>,
    landed: Condvar,
    flushing: Mutex<()>,
}

/// How a table's blocks are opened.
pub(crate) struct MapOptions {
    pub(crate) size_bytes: u64,
    pub(crate) guest_base: u64,
    pub(crate) read_only: bool,
    /// All blocks were allocated when the image was made.
    pub(crate) preallocated: bool,
    /// Where the next block goes.
    pub(crate) end: u64,
}

/// Consecutive blocks that one answer describes, from a byte of the first one on.
struct Run {
    entry: Entry,
    bytes: u64,
}

/// Why there is no entry.
enum Found {
    /// The image contradicts itself there.
    Contradiction(FormatError),
    /// The host failed.
    Failure(BlockError),
}

impl From<FormatError> for Found {
    fn from(error: FormatError) -> Found {
        Found::Contradiction(error)
    }
}

impl<T: BlockTable> Mapped<T> {
    pub(crate) fn new(store: Store, table: T, options: &MapOptions) -> Result<Mapped<T>, BlockError> {
        let file_bytes = store.len_bytes()?;
        let pages = TablePages::new(table.page_bytes());
        let state = State {
            pages,
            end: options.end,
            used_end: options.end,
            stale_end: file_bytes,
            file_bytes,
            free: BTreeSet::new(),
            in_flight: Vec::new(),
            begun: false,
            grown: false,
            trailer_lost: false,
            failed: false,
        };
        Ok(Mapped {
            store,
            table,
            size_bytes: options.size_bytes,
            guest_base: options.guest_base,
            read_only: options.read_only,
            holes: options.preallocated,
            state: Mutex::new(state),
            landed: Condvar::new(),
            flushing: Mutex::new(()),
        })
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Guest bytes of a block.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.table.block_bytes()
    }

    /// A panic of another thread cannot leave the state half changed: every change is one assignment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of a block, and the next block that may have another one.
    fn entry(&self, state: &mut State, block: u64) -> Result<(Entry, u64), Found> {
        match self.table.slot(block)? {
            Slot::NoTable(next) => Ok((Entry::Absent, next.max(block + 1))),
            Slot::Page(page, at) => {
                let page = state.pages.get(&self.store, page).map_err(Found::Failure)?;
                let raw = page.get(at..at + self.table.entry_bytes()).unwrap_or_default();
                Ok((self.table.decode(block, raw, state.file_bytes)?, block + 1))
            }
        }
    }

    fn known(&self, entry: Result<(Entry, u64), Found>) -> Result<(Entry, u64), BlockError> {
        entry.map_err(|found| match found {
            Found::Contradiction(error) => self.store.refused(error),
            Found::Failure(error) => error,
        })
    }

    /// The run at `offset`, which is inside the disk, at most `bytes` long.
    fn run(&self, state: &mut State, offset: u64, bytes: u64) -> Result<Run, BlockError> {
        let block_bytes = self.table.block_bytes();
        let within = offset % block_bytes;
        let first = offset / block_bytes;
        let (entry, mut next) = self.known(self.entry(state, first))?;
        let last = (offset + bytes.max(1) - 1) / block_bytes;
        let (_, stride) = self.table.stride();
        while next <= last && next - first < RUN_BLOCKS_MAX {
            let want = match entry {
                Entry::At(host) if stride == block_bytes => Entry::At(host + (next - first) * block_bytes),
                Entry::At(_) | Entry::Packed(_) => break,
                absent => absent,
            };
            let (got, after) = self.known(self.entry(state, next))?;
            if got != want {
                break;
            }
            next = after;
        }
        let run_bytes = (next - first).saturating_mul(block_bytes) - within;
        let entry = match entry {
            Entry::At(host) => Entry::At(host + within),
            other => other,
        };
        Ok(Run { entry, bytes: run_bytes.min(bytes) })
    }

    /// Looks at every entry: `each` gets those that make sense, the others become findings.
    pub(crate) fn check(
        &self,
        report: &mut ForeignReport,
        each: &mut dyn FnMut(u64, Entry, &mut ForeignReport),
    ) -> Result<(), BlockError> {
        let blocks = self.size_bytes.div_ceil(self.block_bytes());
        let mut block = 0;
        while block < blocks {
            match self.entry(&mut self.lock(), block) {
                Ok((entry, next)) => {
                    if entry != Entry::Absent {
                        each(block, entry, report);
                    }
                    block = next;
                }
                Err(Found::Contradiction(error)) => {
                    report.add(|| error.to_string());
                    block += 1;
                }
                Err(Found::Failure(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// See [`crate::node::Node::extent`].
    pub(crate) fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let run = self.run(&mut self.lock(), offset, bytes)?;
        let mut extent = Extent::new(run.bytes, ExtentKind::Data);
        match run.entry {
            Entry::Absent => extent.kind = ExtentKind::Below,
            Entry::Zero => extent.kind = ExtentKind::Zero,
            Entry::Packed(_) => extent.compressed = true,
            Entry::At(host) => {
                let (bytes, data) = if self.holes { self.store.extent(host, run.bytes)? } else { (run.bytes, true) };
                extent = Extent::placed(bytes.min(run.bytes), host, data);
            }
        }
        Ok(extent)
    }

    /// See [`crate::node::Node::read`].
    pub(crate) fn read(&self, below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        let mut done = 0;
        let mut block = Vec::new();
        while done < bufs.len() {
            let at = offset + done as u64;
            let run = self.run(&mut self.lock(), at, (bufs.len() - done) as u64)?;
            let part = bufs.range(done, run.bytes as usize);
            match run.entry {
                Entry::Absent => read_chain(below, self.guest_base + at, &part)?,
                Entry::Zero => part.fill_zero(),
                Entry::At(host) => self.store.read(host, &part)?,
                Entry::Packed(host) => {
                    let block_bytes = self.table.block_bytes();
                    block.resize(block_bytes as usize, 0);
                    self.table.unpack(&self.store, at / block_bytes, host, &mut block)?;
                    part.copy_from(block.get((at % block_bytes) as usize..).unwrap_or_default());
                }
            }
            done += part.len();
        }
        Ok(())
    }
}

impl<T: BlockTable> Drop for Mapped<T> {
    fn drop(&mut self) {
        // Whoever cares about the result has flushed before.
        let _ = self.close();
    }
}
