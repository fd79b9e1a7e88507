//! A sparse extent: grains behind a grain directory and its tables.

use std::collections::HashMap;

use image::FormatError;
use image::vmdk::{
    FOOTER_AREA_BYTES, GRAIN_MARKER_BYTES, Grain, HEADER_BYTES, SECTOR_BYTES, SparseHeader, VmdkError, compressed_span,
    inflate_grain, parse_footer,
};

use crate::error::BlockError;
use crate::mapped::{BlockTable, DirtyPage, Entry, MapOptions, Mapped, Slot, Store};

/// The directories and what they point to.
pub(super) struct GrainTables {
    header: SparseHeader,
    /// Sectors of the grain tables; 0 where there is none.
    directory: Vec<u32>,
    /// The redundant table of each table; empty without them.
    twins: HashMap<u32, u32>,
    /// Length of the file when it was opened: tables lie inside.
    file_bytes: u64,
}

/// The header that counts: of a stream that was written in one go, the footer's.
pub(super) fn read_header(store: &Store) -> Result<SparseHeader, BlockError> {
    let file_bytes = store.len_bytes()?;
    let first = store.read_vec(0, HEADER_BYTES as u64)?;
    let header = SparseHeader::parse(&first, file_bytes).map_err(|e| store.refused(e))?;
    if !header.has_footer() {
        return Ok(header);
    }
    let area = store.read_vec(file_bytes.saturating_sub(FOOTER_AREA_BYTES), FOOTER_AREA_BYTES)?;
    parse_footer(&area, file_bytes).map_err(|e| store.refused(e))
}

/// Reads a grain directory, whose length [`SparseHeader`] has bounded by the file.
pub(super) fn read_directory(store: &Store, header: &SparseHeader, sector: u64) -> Result<Vec<u32>, BlockError> {
    if header.gd_entries() == 0 {
        return Ok(Vec::new());
    }
    let (offset, bytes) = header.directory_range(sector, store.len_bytes()?).map_err(|e| store.refused(e))?;
    let raw = store.read_vec(offset, bytes)?;
    Ok(raw.chunks_exact(4).filter_map(|raw| raw.try_into().ok()).map(u32::from_le_bytes).collect())
}

/// Opens a sparse extent of which the disk has `size_bytes` from `guest_base` on.
pub(super) fn open_sparse(
    store: Store,
    header: SparseHeader,
    guest_base: u64,
    size_bytes: u64,
    read_only: bool,
) -> Result<Mapped<GrainTables>, BlockError> {
    if !read_only && header.version >= 3 && !header.is_compressed() {
        return Err(store.refused(VmdkError::ReadOnlyVersion));
    }
    let directory = read_directory(&store, &header, header.gd_sector)?;
    let mut twins = HashMap::new();
    if !read_only && header.has_redundant() {
        let redundant = read_directory(&store, &header, header.rgd_sector)?;
        twins.extend(directory.iter().copied().zip(redundant).filter(|(_, twin)| *twin != 0));
    }
    let file_bytes = store.len_bytes()?;
    let options = MapOptions {
        size_bytes,
        guest_base,
        read_only: read_only || header.is_compressed(),
        preallocated: false,
        end: file_bytes.next_multiple_of(header.grain_bytes()),
    };
    Mapped::new(store, GrainTables { header, directory, twins, file_bytes }, &options)
}

impl GrainTables {
    pub(super) fn gd_entries(&self) -> u64 {
        self.directory.len() as u64
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.header.is_compressed()
    }

    fn gt_entries(&self) -> u64 {
        u64::from(self.header.gt_entries)
    }

    fn guest_sector(&self, grain: u64) -> u64 {
        grain * self.header.grain_sectors
    }

    /// File offset of a grain table, which lies inside the file.
    fn table_offset(&self, sector: u32) -> Result<u64, VmdkError> {
        let offset = u64::from(sector) * SECTOR_BYTES;
        if offset + self.header.gt_bytes() > self.file_bytes {
            let file_bytes = self.file_bytes;
            return Err(VmdkError::TablePastEnd { table: "grain table", sector: sector.into(), file_bytes });
        }
        Ok(offset)
    }
}

impl BlockTable for GrainTables {
    fn block_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    fn entry_bytes(&self) -> usize {
        4
    }

    fn page_bytes(&self) -> usize {
        self.header.gt_bytes() as usize
    }

    fn slot(&self, grain: u64) -> Result<Slot, FormatError> {
        let table = grain / self.gt_entries();
        match self.directory.get(table as usize) {
            None | Some(0) => Ok(Slot::NoTable((table + 1) * self.gt_entries())),
            Some(sector) => {
                let at = (grain % self.gt_entries()) as usize * 4;
                Ok(Slot::Page(self.table_offset(*sector)?, at))
            }
        }
    }

    fn decode(&self, grain: u64, raw: &[u8], file_bytes: u64) -> Result<Entry, FormatError> {
        let raw = raw.try_into().map_or(0, u32::from_le_bytes);
        let sector = match Grain::from_entry(raw, &self.header) {
            Grain::Absent => return Ok(Entry::Absent),
            Grain::Zero => return Ok(Entry::Zero),
            Grain::At(sector) => u64::from(sector),
        };
        let host = sector * SECTOR_BYTES;
        if sector < self.header.overhead_sectors || host >= file_bytes {
            return Err(VmdkError::GrainOutside { guest_sector: self.guest_sector(grain), sector, file_bytes }.into());
        }
        Ok(if self.header.is_compressed() { Entry::Packed(host) } else { Entry::At(host) })
    }

    fn encode(&self, grain: u64, entry: Entry, out: &mut [u8]) -> Result<(), FormatError> {
        let entry = match entry {
            Entry::At(host) => Grain::At(u32::try_from(host / SECTOR_BYTES).map_err(|_| VmdkError::Full)?),
            Entry::Zero => Grain::Zero,
            Entry::Absent | Entry::Packed(_) => return Err(FormatError::Immutable { block: grain }),
        };
        out.copy_from_slice(&entry.to_entry().to_le_bytes());
        Ok(())
    }

    fn has_zero_entries(&self) -> bool {
        self.header.has_zero_grains()
    }

    fn immutable(&self, grain: u64) -> FormatError {
        if self.header.is_compressed() {
            return VmdkError::StreamOnly.into();
        }
        VmdkError::NoGrainTable { guest_sector: self.guest_sector(grain) }.into()
    }

    fn unpack(&self, store: &Store, grain: u64, host: u64, out: &mut [u8]) -> Result<(), BlockError> {
        unpack_grain(store, &self.header, self.guest_sector(grain), host, out)
    }

    fn commit(&self, store: &Store, pages: &[DirtyPage], _used_end: u64) -> Result<(), BlockError> {
        // Readers use the tables of the first directory; the redundant ones are ahead of them after a crash.
        for page in pages {
            let twin = u32::try_from(page.offset / SECTOR_BYTES).ok().and_then(|sector| self.twins.get(&sector));
            if let Some(twin) = twin {
                let offset = self.table_offset(*twin).map_err(|e| store.refused(e))?;
                store.write_slice(offset, &page.bytes)?;
            }
        }
        for page in pages {
            store.write_slice(page.offset, &page.bytes)?;
        }
        Ok(())
    }
}

/// Reads and unpacks a compressed grain into `out`, a grain long.
pub(super) fn unpack_grain(
    store: &Store,
    header: &SparseHeader,
    guest_sector: u64,
    host: u64,
    out: &mut [u8],
) -> Result<(), BlockError> {
    // Most grains do not grow by being packed, so that one read suffices.
    let mut packed = store.read_vec(host, header.grain_bytes() + SECTOR_BYTES)?;
    let span = compressed_span(&packed, header, guest_sector).map_err(|e| store.refused(e))?;
    let end = GRAIN_MARKER_BYTES + span;
    if end > packed.len() {
        packed = store.read_vec(host, end as u64)?;
    }
    let stream = packed.get(GRAIN_MARKER_BYTES..end).unwrap_or_default();
    inflate_grain(stream, out, guest_sector).map_err(|e| store.refused(e))
}
