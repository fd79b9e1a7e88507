//! Virtual PC and Hyper-V disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use image::FormatError;
use image::vpc::{
    DYNAMIC_HEADER_BYTES, DynamicHeader, ENTRY_ABSENT, FOOTER_BYTES, Footer, NewImage, VpcError, lay_out,
};

use crate::error::BlockError;
use crate::io::FileBackend;
use crate::mapped::{BlockTable, DirtyPage, Entry, MapOptions, Mapped, MappedNode, Slot, Store, random_uuid, refused};
use crate::node::{Below, Extent, Node};
use crate::sys::{ReadBufs, WriteBufs};

const PAGE_BYTES: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// 2000-01-01 00:00 UTC, where the format's time starts.
const EPOCH_UNIX_S: u64 = 946_684_800;

/// Opens a vpc: the bytes of the disk with a footer behind them, or blocks behind a table.
pub(crate) fn open_vpc(
    file: Arc<dyn FileBackend>,
    path: PathBuf,
    read_only: bool,
    no_sync: bool,
) -> Result<Arc<dyn Node>, BlockError> {
    let store = Store { file, path, no_sync };
    let file_bytes = store.len_bytes()?;
    let (footer, footer_bytes, footer_at_end) = read_footer(&store, file_bytes)?;
    let Some(dynamic_offset) = footer.dynamic_offset else {
        footer.check_fixed(file_bytes).map_err(|e| store.refused(e))?;
        return Ok(Arc::new(FixedVpc { store, size_bytes: footer.size_bytes(), read_only }));
    };
    let header = store.read_vec(dynamic_offset, DYNAMIC_HEADER_BYTES as u64)?;
    let header = DynamicHeader::parse(&header, &footer, file_bytes).map_err(|e| store.refused(e))?;
    let used = if footer_at_end { file_bytes - FOOTER_BYTES as u64 } else { file_bytes };
    let options = MapOptions {
        size_bytes: footer.size_bytes(),
        guest_base: 0,
        read_only,
        preallocated: false,
        // New blocks replace the footer, which follows behind them with the next flush.
        end: used.max(header.data_offset()).next_multiple_of(PAGE_BYTES),
    };
    let lead_bytes = header.bitmap_bytes().next_multiple_of(PAGE_BYTES);
    let mut lead = vec![0; (lead_bytes - header.bitmap_bytes()) as usize];
    lead.resize(lead_bytes as usize, 0xff);
    let table = BatTable { header, footer: footer_bytes, lead };
    Ok(Arc::new(MappedNode::new(Mapped::new(store, table, &options)?)))
}

/// The footer, its bytes, and whether it ends the file. The copy at the start serves a dynamic disk whose end is
/// not as it should be, because a writer was interrupted.
fn read_footer(store: &Store, file_bytes: u64) -> Result<(Footer, Vec<u8>, bool), BlockError> {
    let last_at = file_bytes.saturating_sub(FOOTER_BYTES as u64);
    let last = store.read_vec(last_at, FOOTER_BYTES as u64)?;
    let from_end = Footer::parse(&last);
    let first = store.read_vec(0, FOOTER_BYTES as u64)?;
    match Footer::parse(&first) {
        Ok(footer) if footer.dynamic_offset.is_some() => Ok((footer, first, from_end.is_ok())),
        copy => match (from_end, copy) {
            (Ok(footer), _) => Ok((footer, last, true)),
            // The more telling of the two.
            (Err(VpcError::Cookie), Err(error)) | (Err(error), _) => Err(store.refused(error)),
        },
    }
}

/// The block allocation table.
struct BatTable {
    header: DynamicHeader,
    /// As it is written behind the last block.
    footer: Vec<u8>,
    /// What is in front of a block's data, which starts at a page of the host: padding, then the bitmap, which says
    /// that every sector is in use.
    lead: Vec<u8>,
}

impl BlockTable for BatTable {
    fn block_bytes(&self) -> u64 {
        u64::from(self.header.block_bytes)
    }

    fn stride(&self) -> (u64, u64) {
        (self.lead.len() as u64, self.lead.len() as u64 + u64::from(self.header.block_bytes))
    }

    fn entry_bytes(&self) -> usize {
        4
    }

    fn page_bytes(&self) -> usize {
        PAGE_BYTES as usize
    }

    fn slot(&self, block: u64) -> Result<Slot, FormatError> {
        let at = block * 4;
        Ok(Slot::Page(self.header.bat_offset + at / PAGE_BYTES * PAGE_BYTES, (at % PAGE_BYTES) as usize))
    }

    fn decode(&self, block: u64, raw: &[u8], file_bytes: u64) -> Result<Entry, FormatError> {
        let sector = raw.try_into().map_or(ENTRY_ABSENT, u32::from_be_bytes);
        if sector == ENTRY_ABSENT {
            return Ok(Entry::Absent);
        }
        let host = u64::from(sector) * SECTOR_BYTES;
        if host < self.header.data_offset() || host >= file_bytes {
            return Err(VpcError::Entry { block, sector, file_bytes }.into());
        }
        Ok(Entry::At(host + self.header.bitmap_bytes()))
    }

    fn encode(&self, block: u64, entry: Entry, out: &mut [u8]) -> Result<(), FormatError> {
        let Entry::At(data) = entry else { return Err(FormatError::Immutable { block }) };
        let sector = (data - self.header.bitmap_bytes()) / SECTOR_BYTES;
        let sector = u32::try_from(sector).ok().filter(|sector| *sector != ENTRY_ABSENT).ok_or(VpcError::Full)?;
        out.copy_from_slice(&sector.to_be_bytes());
        Ok(())
    }

    fn lead(&self) -> &[u8] {
        &self.lead
    }

    /// Readers find the copy at the start, should this one not come to be.
    fn trailer(&self) -> &[u8] {
        &self.footer
    }

    fn commit(&self, store: &Store, pages: &[DirtyPage], _used_end: u64) -> Result<(), BlockError> {
        let bat_end = self.header.bat_offset + u64::from(self.header.entries) * 4;
        for page in pages {
            let bytes = (bat_end - page.offset).min(PAGE_BYTES) as usize;
            store.write_slice(page.offset, page.bytes.get(..bytes).unwrap_or_default())?;
        }
        Ok(())
    }
}

/// A fixed disk: its bytes from the start of the file.
struct FixedVpc {
    store: Store,
    size_bytes: u64,
    read_only: bool,
}

impl FixedVpc {
    fn writable(&self) -> Result<(), BlockError> {
        if self.read_only { Err(self.store.read_only()) } else { Ok(()) }
    }
}

impl Node for FixedVpc {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, BlockError> {
        let (bytes, data) = self.store.extent(offset, bytes)?;
        Ok(Extent::placed(bytes, offset, data))
    }

    fn read(&self, _below: Below<'_>, offset: u64, bufs: &ReadBufs<'_>) -> Result<(), BlockError> {
        self.store.read(offset, bufs)
    }

    fn write(&self, _below: Below<'_>, offset: u64, bufs: &WriteBufs<'_>) -> Result<(), BlockError> {
        self.writable().and_then(|()| self.store.write(offset, bufs))
    }

    fn write_zeroes(&self, _below: Below<'_>, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.writable().and_then(|()| self.store.write_zeroes(offset, bytes, may_unmap))
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.writable().and_then(|()| self.store.punch_hole(offset, bytes))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only { Ok(()) } else { self.store.sync() }
    }

    fn cluster_bytes(&self) -> u64 {
        0
    }

    fn allocated_bytes(&self) -> Result<u64, BlockError> {
        self.store.allocated_bytes()
    }

    fn path(&self) -> &Path {
        &self.store.path
    }
}

/// How a vpc is created.
#[derive(Clone, Debug, Default)]
pub struct VpcOptions {
    /// `subformat=fixed`: data and footer only; otherwise `dynamic`.
    pub fixed: bool,
    /// `force_size`: keep the size instead of growing to a CHS geometry.
    pub force_size: bool,
}

/// Writes an empty vpc into `file`, whose contents are lost; `path` names it in errors. The disk's size may be
/// larger than asked for: see [`VpcOptions::force_size`].
pub fn create_vpc(file: &dyn FileBackend, path: &Path, size_bytes: u64, opts: &VpcOptions) -> Result<(), BlockError> {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(EPOCH_UNIX_S, |since| since.as_secs());
    let new = NewImage {
        size_bytes,
        fixed: opts.fixed,
        force_size: opts.force_size,
        uuid: random_uuid(path)?,
        timestamp_s: now_s.saturating_sub(EPOCH_UNIX_S) as u32,
    };
    let layout = lay_out(&new).map_err(|e| refused(path, e))?;
    crate::mapped::write_new(file, path, &layout)
}
