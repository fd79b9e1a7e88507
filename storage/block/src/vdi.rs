//! VirtualBox disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::vdi::{ALLOCATED_OFFSET, BLOCK_BYTES, Block, HEADER_BYTES, Header, NewImage, VdiError, lay_out};
use image::{FormatError, NewFile};

use crate::error::BlockError;
use crate::foreign::{ForeignReport, Places};
use crate::io::FileBackend;
use crate::mapped::{BlockTable, DirtyPage, Entry, MapOptions, Mapped, MappedNode, Slot, Store, random_uuid, refused};

const PAGE_BYTES: u64 = 4096;

/// The block map. Positions count blocks of the file, so the header's number of allocated blocks, which other
/// programs append after, must never be behind the map.
pub(crate) struct VdiTable {
    header: Header,
}

pub(crate) type VdiNode = MappedNode<VdiTable>;

/// Opens a vdi. For writing, what lies behind the last block of the map is free.
pub(crate) fn open_vdi(
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    read_only: bool,
    no_sync: bool,
) -> Result<VdiNode, BlockError> {
    let store = Store { file, path, no_sync };
    let first = store.read_vec(0, HEADER_BYTES as u64)?;
    let header = Header::parse(&first, store.len_bytes()?).map_err(|e| store.refused(e))?;
    let used = if read_only { 0 } else { used_positions(&store, &header)? };
    let options = MapOptions {
        size_bytes: header.size_bytes,
        guest_base: 0,
        read_only,
        preallocated: header.is_static,
        end: header.host_offset(used),
    };
    Ok(MappedNode::new(Mapped::new(store, VdiTable { header }, &options)?))
}

/// One more than the last position in the map.
fn used_positions(store: &Store, header: &Header) -> Result<u32, BlockError> {
    let mut used = 0;
    let mut done = 0;
    let map_bytes = u64::from(header.blocks) * 4;
    while done < map_bytes {
        let piece = store.read_vec(u64::from(header.map_offset) + done, (map_bytes - done).min(1 << 20))?;
        for (i, raw) in piece.chunks_exact(4).enumerate() {
            let entry = header.block(done / 4 + i as u64, le32(raw)).map_err(|e| store.refused(e))?;
            if let Block::At(position) = entry {
                used = used.max(position + 1);
            }
        }
        done += (piece.len() as u64).max(4);
    }
    Ok(used)
}

fn le32(raw: &[u8]) -> u32 {
    raw.try_into().map_or(u32::MAX, u32::from_le_bytes)
}

impl BlockTable for VdiTable {
    fn block_bytes(&self) -> u64 {
        BLOCK_BYTES
    }

    fn entry_bytes(&self) -> usize {
        4
    }

    fn page_bytes(&self) -> usize {
        PAGE_BYTES as usize
    }

    fn slot(&self, block: u64) -> Result<Slot, FormatError> {
        let at = block * 4;
        Ok(Slot::Page(u64::from(self.header.map_offset) + at / PAGE_BYTES * PAGE_BYTES, (at % PAGE_BYTES) as usize))
    }

    fn decode(&self, block: u64, raw: &[u8], file_bytes: u64) -> Result<Entry, FormatError> {
        Ok(match self.header.block(block, le32(raw))? {
            Block::Absent => Entry::Absent,
            Block::Zero => Entry::Zero,
            Block::At(position) => {
                let host = self.header.host_offset(position);
                if host >= file_bytes {
                    return Err(VdiError::BlockPastEnd { block, host, file_bytes }.into());
                }
                Entry::At(host)
            }
        })
    }

    fn encode(&self, block: u64, entry: Entry, out: &mut [u8]) -> Result<(), FormatError> {
        let raw = match entry {
            Entry::At(host) => {
                let position = (host - u64::from(self.header.data_offset)) / BLOCK_BYTES;
                // As many positions as blocks: a map without duplicates never needs more.
                let position = u32::try_from(position).unwrap_or(u32::MAX);
                match self.header.block(block, position)? {
                    Block::At(position) => position,
                    _ => return Err(FormatError::Immutable { block }),
                }
            }
            _ => return Err(FormatError::Immutable { block }),
        };
        out.copy_from_slice(&raw.to_le_bytes());
        Ok(())
    }

    fn commit(&self, store: &Store, pages: &[DirtyPage], used_end: u64) -> Result<(), BlockError> {
        // The number first: a crash in between leaves blocks that nobody uses, not two users of one. Neither order
        // passes a check, QEMU's is the same, and the next writer puts the number right.
        let allocated = (used_end.saturating_sub(u64::from(self.header.data_offset)) / BLOCK_BYTES) as u32;
        store.write_slice(ALLOCATED_OFFSET, &allocated.to_le_bytes())?;
        store.sync()?;
        let map_end = u64::from(self.header.map_offset) + u64::from(self.header.blocks) * 4;
        for page in pages {
            // The last page may reach into the data behind the map.
            let bytes = (map_end - page.offset).min(PAGE_BYTES) as usize;
            store.write_slice(page.offset, page.bytes.get(..bytes).unwrap_or_default())?;
        }
        Ok(())
    }
}

/// Looks for blocks with two owners or outside the disk, and for a wrong number of allocated ones, in QEMU's words.
pub(crate) fn check_vdi(file: Arc<dyn FileBackend>, path: PathBuf) -> Result<ForeignReport, BlockError> {
    let node = open_vdi(file, path, true, true)?;
    let disk = node.disk();
    let header = &disk.table.header;
    let mut report = ForeignReport::default();
    let mut places = Places::new(disk.store.len_bytes()?, BLOCK_BYTES);
    let mut allocated = 0u32;
    disk.check(&mut report, &mut |_, entry, report| {
        if let Entry::At(host) = entry {
            allocated += 1;
            let position = (host - u64::from(header.data_offset)) / BLOCK_BYTES;
            if !places.claim(host) {
                report.add(|| format!("block index {position} also used by {position}"));
            }
        }
    })?;
    if allocated != header.allocated {
        report.add(|| format!("allocated blocks mismatch, is {allocated}, should be {}", header.allocated));
    }
    Ok(report)
}

/// How a vdi is created.
#[derive(Clone, Debug, Default)]
pub struct VdiOptions {
    /// `static`: allocate all blocks.
    pub is_static: bool,
}

/// Writes an empty vdi into `file`, whose contents are lost; `path` names it in errors.
pub fn create_vdi(file: &dyn FileBackend, path: &Path, size_bytes: u64, opts: &VdiOptions) -> Result<(), BlockError> {
    let new = NewImage { size_bytes, is_static: opts.is_static, uuids: [random_uuid(path)?, random_uuid(path)?] };
    let layout: NewFile = lay_out(&new).map_err(|e| refused(path, e))?;
    crate::mapped::write_new(file, path, &layout)
}
