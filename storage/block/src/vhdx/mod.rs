//! Hyper-V disks.

mod log;
mod replayed;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::FormatError;
use image::vhdx::layout::{NewImage, lay_out};
use image::vhdx::metadata::METADATA_BYTES;
use image::vhdx::{ALIGN_BYTES, Bat, Block, HEADERS_BYTES, Header, Metadata, Regions};

use crate::error::BlockError;
use crate::foreign::{ForeignReport, Places};
use crate::io::{FileBackend, ReadOnly};
use crate::mapped::{
    BlockTable, DirtyPage, Entry, MapOptions, Mapped, MappedNode, Slot, Store, random_uuid, refused, write_new,
};
use log::Journal;
use replayed::ReplayedFile;

const PAGE_BYTES: u64 = 4096;

/// The block allocation table, changed through the log.
pub(crate) struct VhdxTable {
    bat: Bat,
    block_bytes: u64,
    journal: Journal,
}

pub(crate) type VhdxNode = MappedNode<VhdxTable>;

/// Opens a vhdx. A log that a writer did not empty is replayed: into the file when it may be written, otherwise
/// in memory.
pub(crate) fn open_vhdx(
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    read_only: bool,
    no_sync: bool,
) -> Result<VhdxNode, BlockError> {
    let mut store = Store { file, path, no_sync };
    let (mut header, mut index) = read_header(&store)?;
    if header.needs_replay() {
        let (changes, len_bytes) = log::replay(&store, &header)?;
        if read_only {
            store.file = Arc::new(ReadOnly(ReplayedFile::new(store.file.clone(), changes, len_bytes)));
        } else {
            (header, index) = log::apply(&store, &header, index, &changes, len_bytes)?;
        }
    }
    let start = store.read_vec(0, HEADERS_BYTES)?;
    let file_bytes = store.len_bytes()?;
    let regions = Regions::parse(&start, header.log, file_bytes).map_err(|e| store.refused(e))?;
    let metadata = store.read_vec(regions.metadata.offset, regions.metadata.bytes.min(METADATA_BYTES))?;
    let metadata = Metadata::parse(&metadata).map_err(|e| store.refused(e))?;
    let bat = Bat::new(&metadata, &regions, header.log).map_err(|e| store.refused(e))?;
    let options = MapOptions {
        size_bytes: metadata.size_bytes,
        guest_base: 0,
        read_only,
        preallocated: metadata.leave_blocks_allocated,
        end: file_bytes.next_multiple_of(ALIGN_BYTES),
    };
    let journal = Journal::new(header, index);
    let table = VhdxTable { bat, block_bytes: u64::from(metadata.block_bytes), journal };
    Ok(MappedNode::new(Mapped::new(store, table, &options)?))
}

fn read_header(store: &Store) -> Result<(Header, usize), BlockError> {
    let start = store.read_vec(0, HEADERS_BYTES)?;
    Header::current(&start, store.len_bytes()?).map_err(|e| store.refused(e))
}

impl BlockTable for VhdxTable {
    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn entry_bytes(&self) -> usize {
        8
    }

    fn page_bytes(&self) -> usize {
        PAGE_BYTES as usize
    }

    fn slot(&self, block: u64) -> Result<Slot, FormatError> {
        let at = self.bat.index(block) * 8;
        Ok(Slot::Page(self.bat.region.offset + at / PAGE_BYTES * PAGE_BYTES, (at % PAGE_BYTES) as usize))
    }

    fn decode(&self, block: u64, raw: &[u8], file_bytes: u64) -> Result<Entry, FormatError> {
        let raw = raw.try_into().map_or(0, u64::from_le_bytes);
        Ok(match self.bat.block(block, raw, file_bytes)? {
            Block::Absent => Entry::Absent,
            Block::Zero => Entry::Zero,
            Block::At(offset) => Entry::At(offset),
        })
    }

    fn encode(&self, block: u64, entry: Entry, out: &mut [u8]) -> Result<(), FormatError> {
        let raw = match entry {
            Entry::At(offset) => Bat::entry_at(offset),
            Entry::Zero => Bat::entry_zero(),
            Entry::Absent | Entry::Packed(_) => return Err(FormatError::Immutable { block }),
        };
        out.copy_from_slice(&raw.to_le_bytes());
        Ok(())
    }

    fn has_zero_entries(&self) -> bool {
        true
    }

    fn begin(&self, store: &Store) -> Result<(), BlockError> {
        self.journal.begin(store)
    }

    fn commit(&self, store: &Store, pages: &[DirtyPage], used_end: u64) -> Result<(), BlockError> {
        self.journal.commit(store, pages, used_end)
    }

    fn close(&self, store: &Store) -> Result<(), BlockError> {
        self.journal.close(store)
    }
}

/// Looks for entries that make no sense and for blocks with two owners. A log that has to be replayed is no damage.
pub(crate) fn check_vhdx(file: Arc<dyn FileBackend>, path: PathBuf) -> Result<ForeignReport, BlockError> {
    let node = open_vhdx(file, path, true, true)?;
    let mut report = ForeignReport::default();
    let disk = node.disk();
    let mut places = Places::new(disk.store.len_bytes()?, disk.block_bytes());
    disk.check(&mut report, &mut |block, entry, report| {
        if let Entry::At(offset) = entry
            && !places.claim(offset)
        {
            report.add(|| format!("block {block} is at {offset:#x}, where another block is"));
        }
    })?;
    Ok(report)
}

/// How a vhdx is created. The defaults are qemu-img's.
#[derive(Clone, Debug)]
pub struct VhdxOptions {
    /// `subformat=fixed`: all blocks have their place; otherwise `dynamic`.
    pub fixed: bool,
    /// `block_size`: rounded up to 1 MiB, at most 256 MiB; 0 chooses by the disk's size.
    pub block_bytes: u64,
    /// `log_size`: rounded up to 1 MiB.
    pub log_bytes: u64,
    /// `block_state_zero`: blocks of a dynamic disk are marked as zeroes, not as absent.
    pub block_state_zero: bool,
}

impl Default for VhdxOptions {
    fn default() -> VhdxOptions {
        VhdxOptions { fixed: false, block_bytes: 0, log_bytes: 1 << 20, block_state_zero: true }
    }
}

/// Writes an empty vhdx into `file`, whose contents are lost; `path` names it in errors.
pub fn create_vhdx(file: &dyn FileBackend, path: &Path, size_bytes: u64, opts: &VhdxOptions) -> Result<(), BlockError> {
    let new = NewImage {
        size_bytes,
        fixed: opts.fixed,
        block_bytes: opts.block_bytes,
        log_bytes: opts.log_bytes,
        block_state_zero: opts.block_state_zero,
        guids: [random_uuid(path)?, random_uuid(path)?, random_uuid(path)?],
    };
    let layout = lay_out(&new).map_err(|e| refused(path, e))?;
    write_new(file, path, &layout)
}
