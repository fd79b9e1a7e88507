//! Persistent dirty bitmaps: operations on them, and recording what guests change.
//!
//! The first change of data loads the bits of every bitmap that records, and marks these bitmaps as in use on disk before
//! any data is written: after a crash nobody trusts them. Closing the image, and any operation on the image as a
//! whole, stores the bits and the mark goes, in one switch of the header.

use image::qcow2::bitmaps::{
    BITMAP_NAME_MAX, BITMAPS_MAX, Bitmap, BitmapError, BitmapExtension, BitmapTableEntry, bitmap_table_entries,
    parse_bitmaps, serialise_bitmaps,
};
use image::qcow2::{AUTOCLEAR_BITMAPS, EXT_BITMAPS, Geometry, Header, HeaderError};

use super::maintenance::Qcow2Image;
use super::maintenance_error::MaintenanceError;
use super::rewrite::{Place, Rewrite, words};
use super::{Qcow2Node, Tables};
use crate::error::BlockError;

/// Bits of one bitmap, and of all that record, that are held in memory, in bytes: 32 TiB of disk at 64 KiB a bit.
const BITS_MAX_BYTES: u64 = 64 << 20;
/// Flags in a directory entry: a u32 at this byte of it, with the mark of use in its lowest bit.
const FLAGS_AT: u64 = 12;

/// What a bitmap says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name, unique in the image.
    pub name: String,
    /// Guest bytes that one bit stands for.
    pub granularity_bytes: u64,
    /// Changes are recorded.
    pub enabled: bool,
    /// A writer did not store it, so it may miss changes: it can only be removed.
    pub inconsistent: bool,
}

/// Which parts of a disk a bitmap says have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapBits {
    granularity_bits: u8,
    disk_bytes: u64,
    /// The first bit is the lowest of the first byte.
    bits: Vec<u8>,
}

impl BitmapBits {
    /// No bit is set. `None` when there would be more than fit in memory.
    fn clear(disk_bytes: u64, granularity_bits: u8) -> Option<BitmapBits> {
        let bytes = disk_bytes.div_ceil(1u64.checked_shl(u32::from(granularity_bits))?).div_ceil(8);
        (bytes <= BITS_MAX_BYTES).then(|| BitmapBits { granularity_bits, disk_bytes, bits: vec![0; bytes as usize] })
    }

    /// Guest bytes that one bit stands for.
    pub fn granularity_bytes(&self) -> u64 {
        1 << self.granularity_bits
    }

    fn bit_count(&self) -> u64 {
        self.disk_bytes.div_ceil(self.granularity_bytes())
    }

    fn get(&self, bit: u64) -> bool {
        self.bits.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
    }

    /// Marks a guest range as changed; what lies behind the disk is left out.
    pub fn set(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.disk_bytes);
        if offset >= end {
            return;
        }
        for bit in offset >> self.granularity_bits..end.div_ceil(self.granularity_bytes()) {
            if let Some(byte) = self.bits.get_mut((bit / 8) as usize) {
                *byte |= 1 << (bit % 8);
            }
        }
    }

    /// Ranges of the disk that are marked, in order: offset and length.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for bit in (0..self.bit_count()).filter(|bit| self.get(*bit)) {
            let start = bit << self.granularity_bits;
            let bytes = self.granularity_bytes().min(self.disk_bytes - start);
            match ranges.last_mut() {
                Some((at, length)) if *at + *length == start => *length += bytes,
                _ => ranges.push((start, bytes)),
            }
        }
        ranges
    }

    /// Whether the byte at an offset of the disk is marked, and for how many bytes from there, at most `bytes`, that is so.
    pub fn run(&self, offset: u64, bytes: u64) -> (u64, bool) {
        let first = offset >> self.granularity_bits;
        let is_marked = self.get(first);
        let end = offset.saturating_add(bytes);
        let mut next = first + 1;
        while next << self.granularity_bits < end && self.get(next) == is_marked {
            next += 1;
        }
        ((next << self.granularity_bits).min(end) - offset, is_marked)
    }

    pub(crate) fn resized(&self, disk_bytes: u64) -> Option<BitmapBits> {
        let mut new = BitmapBits::clear(disk_bytes, self.granularity_bits)?;
        self.ranges().into_iter().for_each(|(offset, bytes)| new.set(offset, bytes));
        Some(new)
    }
}

/// What the tables know about recording changes.
#[derive(Default)]
pub(super) enum Recording {
    /// No bitmap records.
    #[default]
    Off,
    /// Bitmaps record, and are on disk as they should be.
    Stored,
    /// Their bits are here, by name; on disk they are marked as in use.
    Loaded(Vec<(Vec<u8>, BitmapBits)>),
}

impl Qcow2Image {
    /// The bitmaps of the image. None, when a writer that does not know them has changed it since.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>, BlockError> {
        let tables = self.node.tables.lock();
        let place = Place { file: &*tables.file, path: &tables.path };
        let loaded = matches!(tables.recording, Recording::Loaded(_));
        let bitmaps = read_directory(place, &tables.header)?.into_iter().map(|bitmap| BitmapInfo {
            name: String::from_utf8_lossy(&bitmap.name).into_owned(),
            granularity_bytes: 1 << bitmap.granularity_bits,
            enabled: bitmap.enabled,
            // The mark on disk that is our own means nothing else.
            inconsistent: bitmap.in_use && !(loaded && tables.has_loaded(&bitmap.name)),
        });
        Ok(bitmaps.collect())
    }

    /// Adds a bitmap without a bit set. `granularity_bytes` is a power of two from 512 to 2^31; a disabled one records
    /// nothing.
    pub fn add_bitmap(&self, name: &str, granularity_bytes: u64, enabled: bool) -> Result<(), BlockError> {
        self.change_bitmaps(|rewrite, bitmaps| {
            let refuse = |rewrite: &Rewrite<'_>, source| Err(rewrite.place.refuse(MaintenanceError::Bitmaps(source)));
            if rewrite.geometry.version < 3 {
                let source = HeaderError::NeedsVersion3 { feature: "a bitmap" };
                return Err(rewrite.place.refuse(MaintenanceError::Header(source)));
            }
            let index = bitmaps.len() as u32;
            let bits = granularity_bytes.checked_ilog2().unwrap_or(0) as u8;
            if !granularity_bytes.is_power_of_two() || !(9..=31).contains(&bits) {
                return refuse(rewrite, BitmapError::Granularity { index, bits });
            }
            if name.is_empty() || name.len() > BITMAP_NAME_MAX {
                return refuse(rewrite, BitmapError::Name { index, bytes: name.len() });
            }
            if index >= BITMAPS_MAX {
                return refuse(rewrite, BitmapError::Count { count: index + 1 });
            }
            if bitmaps.iter().any(|bitmap| bitmap.name == name.as_bytes()) {
                return Err(rewrite.place.refuse(MaintenanceError::BitmapExists { name: name.to_owned() }));
            }
            let mut bitmap = Bitmap {
                name: name.as_bytes().to_vec(),
                granularity_bits: bits,
                in_use: false,
                enabled,
                table_offset: 0,
                table_entries: 0,
                extra: Vec::new(),
                extra_compatible: false,
            };
            rewrite.store_clear(&mut bitmap)?;
            bitmaps.push(bitmap);
            Ok(())
        })
    }

    /// Removes a bitmap.
    pub fn remove_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.change_bitmaps(|rewrite, bitmaps| {
            let index = position(rewrite, bitmaps, name)?;
            let bitmap = bitmaps.remove(index);
            rewrite.drop_bits(&bitmap)
        })
    }

    /// Clears all bits of a bitmap.
    pub fn clear_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.change_bitmap(name, |rewrite, bitmap| {
            rewrite.drop_bits(bitmap)?;
            rewrite.store_clear(bitmap)
        })
    }

    /// Makes a bitmap record changes, or stop.
    pub fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<(), BlockError> {
        self.change_bitmap(name, |_, bitmap| {
            bitmap.enabled = enabled;
            Ok(())
        })
    }

    /// The bits of a bitmap as they are now.
    pub fn bitmap_bits(&self, name: &str) -> Result<BitmapBits, BlockError> {
        let tables = self.node.tables.lock();
        if let Recording::Loaded(loaded) = &tables.recording
            && let Some((_, bits)) = loaded.iter().find(|(loaded, _)| loaded == name.as_bytes())
        {
            return Ok(bits.clone());
        }
        let place = Place { file: &*tables.file, path: &tables.path };
        let bitmaps = read_directory(place, &tables.header)?;
        let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == name.as_bytes());
        let Some(bitmap) = bitmap else {
            return Err(place.refuse(MaintenanceError::BitmapNotFound { name: name.to_owned() }));
        };
        consistent(place, bitmap)?;
        read_bits(place, &tables.geometry, bitmap)
    }

    /// Marks in a bitmap what another one, of this image or of another with a disk of the same size, has marked.
    pub fn merge_bitmap(&self, name: &str, source: &BitmapBits) -> Result<(), BlockError> {
        self.change_bitmap(name, |rewrite, bitmap| {
            let mut bits = read_bits(rewrite.place, &rewrite.geometry, bitmap)?;
            if bits.disk_bytes != source.disk_bytes {
                let (name, have, other) = (name.to_owned(), bits.disk_bytes, source.disk_bytes);
                return Err(rewrite.place.refuse(MaintenanceError::BitmapSizes { name, have, other }));
            }
            source.ranges().into_iter().for_each(|(offset, bytes)| bits.set(offset, bytes));
            rewrite.drop_bits(bitmap)?;
            rewrite.store_bits(bitmap, &bits)
        })
    }

    fn change_bitmap(
        &self,
        name: &str,
        change: impl FnOnce(&mut Rewrite<'_>, &mut Bitmap) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        self.change_bitmaps(|rewrite, bitmaps| {
            let index = position(rewrite, bitmaps, name)?;
            let Some(bitmap) = bitmaps.get_mut(index) else { return Ok(()) };
            consistent(rewrite.place, bitmap)?;
            change(rewrite, bitmap)
        })
    }

    fn change_bitmaps(
        &self,
        change: impl FnOnce(&mut Rewrite<'_>, &mut Vec<Bitmap>) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| rewrite.change_bitmaps(change))
    }
}

fn position(rewrite: &Rewrite<'_>, bitmaps: &[Bitmap], name: &str) -> Result<usize, BlockError> {
    let found = bitmaps.iter().position(|bitmap| bitmap.name == name.as_bytes());
    found.ok_or_else(|| rewrite.place.refuse(MaintenanceError::BitmapNotFound { name: name.to_owned() }))
}

fn consistent(place: Place<'_>, bitmap: &Bitmap) -> Result<(), BlockError> {
    if !bitmap.in_use {
        return Ok(());
    }
    let name = String::from_utf8_lossy(&bitmap.name).into_owned();
    Err(place.refuse(MaintenanceError::BitmapInconsistent { name }))
}

/// Reads the directory that a header refers to.
fn read_directory(place: Place<'_>, header: &Header) -> Result<Vec<Bitmap>, BlockError> {
    let refused = |source| place.refuse(MaintenanceError::Bitmaps(source));
    let Some(extension) = BitmapExtension::of(header).map_err(refused)? else { return Ok(Vec::new()) };
    let file_bytes = place.file.len_bytes().map_err(|e| BlockError::io(place.path, crate::error::Action::Stat, e))?;
    let (offset, bytes) = (extension.directory_offset, extension.directory_bytes);
    if offset.saturating_add(bytes) > file_bytes {
        return Err(refused(BitmapError::Directory { offset, bytes }));
    }
    let mut raw = vec![0; bytes as usize];
    place.read(offset, &mut raw)?;
    parse_bitmaps(header, extension.count, &raw).map_err(refused)
}

/// The table of a bitmap; its length is bounded by the directory's check.
fn read_table(place: Place<'_>, bitmap: &Bitmap) -> Result<Vec<u64>, BlockError> {
    let mut raw = vec![0; bitmap.table_entries as usize * 8];
    place.read(bitmap.table_offset, &mut raw)?;
    Ok(words(&raw))
}

fn read_bits(place: Place<'_>, geometry: &Geometry, bitmap: &Bitmap) -> Result<BitmapBits, BlockError> {
    let refused = |source| place.refuse(MaintenanceError::Bitmaps(source));
    let Some(mut bits) = BitmapBits::clear(geometry.size_bytes, bitmap.granularity_bits) else {
        let reason = "it has more bits than fit in memory";
        return Err(place.refuse(MaintenanceError::Unsupported { what: "a bitmap", reason }));
    };
    let table = read_table(place, bitmap)?;
    for (part, raw) in bits.bits.chunks_mut(geometry.cluster_bytes() as usize).zip(table) {
        match BitmapTableEntry::decode(raw, geometry).map_err(refused)? {
            BitmapTableEntry::Clear => {}
            BitmapTableEntry::Set => part.fill(0xff),
            BitmapTableEntry::At(offset) => place.read(offset, part)?,
        }
    }
    // Bits behind the end of the disk mean nothing.
    let unused = bits.bits.len() as u64 * 8 - bits.bit_count();
    if let Some(last) = bits.bits.last_mut() {
        *last &= 0xffu8.checked_shr(unused as u32).unwrap_or(0);
    }
    Ok(bits)
}

impl Rewrite<'_> {
    /// Changes the directory.
    pub(super) fn change_bitmaps(
        &mut self,
        change: impl FnOnce(&mut Self, &mut Vec<Bitmap>) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        // The tables that are there fit the disk as it is on disk.
        let now = Header { geometry: self.geometry, ..self.header.clone() };
        let old = BitmapExtension::of(&now).map_err(|source| self.place.refuse(MaintenanceError::Bitmaps(source)))?;
        let mut bitmaps = read_directory(self.place, &now)?;
        change(self, &mut bitmaps)?;
        if bitmaps.is_empty() {
            self.header.set_extension(EXT_BITMAPS, None);
            self.header.autoclear &= !AUTOCLEAR_BITMAPS;
        } else {
            let raw =
                serialise_bitmaps(&bitmaps).map_err(|source| self.place.refuse(MaintenanceError::Bitmaps(source)))?;
            let extension = BitmapExtension {
                count: bitmaps.len() as u32,
                directory_offset: self.place(&raw)?,
                directory_bytes: raw.len() as u64,
            };
            self.header.set_extension(EXT_BITMAPS, Some(extension.serialise()));
            self.header.autoclear |= AUTOCLEAR_BITMAPS;
        }
        match old {
            Some(old) => self.drop_table(old.directory_offset, old.directory_bytes),
            None => Ok(()),
        }
    }

    /// Fits every bitmap to a new size of the disk; with `all`, what records is marked as changed everywhere.
    pub(super) fn resize_bitmaps(&mut self, all: bool) -> Result<(), BlockError> {
        if BitmapExtension::of(&self.header).ok().flatten().is_none() {
            return Ok(());
        }
        let disk_bytes = self.header.geometry.size_bytes;
        self.change_bitmaps(|rewrite, bitmaps| {
            for bitmap in bitmaps.iter_mut() {
                // One that may miss changes would look whole at its new size. A snapshot that is applied leaves it alone.
                if bitmap.in_use && all {
                    continue;
                }
                consistent(rewrite.place, bitmap)?;
                let old = read_bits(rewrite.place, &rewrite.geometry, bitmap)?;
                let Some(mut new) = old.resized(disk_bytes) else {
                    let reason = "a bitmap would have more bits than fit in memory; remove it";
                    let source = MaintenanceError::Unsupported { what: "the size of the disk", reason };
                    return Err(rewrite.place.refuse(source));
                };
                if all && bitmap.enabled {
                    new.set(0, disk_bytes);
                }
                rewrite.drop_bits(bitmap)?;
                rewrite.store_bits(bitmap, &new)?;
            }
            Ok(())
        })
    }

    /// Drops the references to a bitmap's table and bits.
    fn drop_bits(&mut self, bitmap: &Bitmap) -> Result<(), BlockError> {
        for raw in read_table(self.place, bitmap)? {
            let entry = BitmapTableEntry::decode(raw, &self.geometry)
                .map_err(|source| self.place.refuse(MaintenanceError::Bitmaps(source)))?;
            if let BitmapTableEntry::At(offset) = entry {
                self.counts.drop(offset, self.geometry.cluster_bytes())?;
            }
        }
        self.drop_table(bitmap.table_offset, u64::from(bitmap.table_entries) * 8)
    }

    fn store_clear(&mut self, bitmap: &mut Bitmap) -> Result<(), BlockError> {
        let Some(bits) = BitmapBits::clear(self.header.geometry.size_bytes, bitmap.granularity_bits) else {
            let reason = "it would have more bits than fit in memory; choose a larger granularity";
            return Err(self.place.refuse(MaintenanceError::Unsupported { what: "a bitmap", reason }));
        };
        self.store_bits(bitmap, &bits)
    }

    /// Writes bits and a table for them, and lets the bitmap refer to them.
    fn store_bits(&mut self, bitmap: &mut Bitmap, bits: &BitmapBits) -> Result<(), BlockError> {
        let geometry = self.header.geometry;
        let want = bitmap_table_entries(&geometry, bitmap.granularity_bits).unwrap_or(0);
        if want == 0 {
            // QEMU does not open an image with a bitmap that has no table.
            let reason = "the disk has no bytes";
            return Err(self.place.refuse(MaintenanceError::Unsupported { what: "a bitmap", reason }));
        }
        let mut table = Vec::with_capacity(want as usize * 8);
        for part in bits.bits.chunks(geometry.cluster_bytes() as usize) {
            let entry = match crate::zeroes::is_zero(part) {
                true => BitmapTableEntry::Clear,
                false => BitmapTableEntry::At(self.place(part)?),
            };
            table.extend(entry.encode().to_be_bytes());
        }
        bitmap.table_offset = self.place(&table)?;
        bitmap.table_entries = want as u32;
        Ok(())
    }
}

impl Tables {
    fn has_loaded(&self, name: &[u8]) -> bool {
        match &self.recording {
            Recording::Loaded(loaded) => loaded.iter().any(|(loaded, _)| loaded == name),
            _ => false,
        }
    }

    /// Looks at an image that is opened for writing. Returns which autoclear bits are still true.
    pub(super) fn look_for_bitmaps(&mut self) -> u64 {
        let place = Place { file: &*self.file, path: &self.path };
        match read_directory(place, &self.header) {
            Ok(bitmaps) if !bitmaps.is_empty() => {
                let records = bitmaps.iter().any(|bitmap| bitmap.enabled && !bitmap.in_use);
                self.recording = if records { Recording::Stored } else { Recording::Off };
                AUTOCLEAR_BITMAPS
            }
            // A directory that cannot be read cannot be kept true.
            _ => 0,
        }
    }

    /// Records that a guest range is about to change.
    pub(super) fn record(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        if matches!(self.recording, Recording::Stored) {
            self.load_bitmaps()?;
            self.recordings += 1;
        }
        if let Recording::Loaded(loaded) = &mut self.recording {
            loaded.iter_mut().for_each(|(_, bits)| bits.set(offset, bytes));
        }
        Ok(())
    }

    /// Loads the bits of what records, and marks it as in use on disk.
    fn load_bitmaps(&mut self) -> Result<(), BlockError> {
        let place = Place { file: &*self.file, path: &self.path };
        let Some(extension) =
            BitmapExtension::of(&self.header).map_err(|source| place.refuse(MaintenanceError::Bitmaps(source)))?
        else {
            self.recording = Recording::Off;
            return Ok(());
        };
        let bitmaps = read_directory(place, &self.header)?;
        let mut loaded = Vec::new();
        // A cluster more, because tables count in whole ones.
        let mut room = BITS_MAX_BYTES + self.geometry.cluster_bytes();
        let mut at = extension.directory_offset;
        for bitmap in &bitmaps {
            let entry_at = at;
            at += (24 + bitmap.extra.len() as u64 + bitmap.name.len() as u64).next_multiple_of(8);
            if !bitmap.enabled || bitmap.in_use {
                continue;
            }
            // Bits that do not fit in memory are lost by the mark, which says so to everyone.
            let known = bitmap.extra.is_empty() || bitmap.extra_compatible;
            let bytes = u64::from(bitmap.table_entries).saturating_mul(self.geometry.cluster_bytes());
            if known
                && bytes <= room
                && let Ok(bits) = read_bits(place, &self.geometry, bitmap)
            {
                room -= bytes;
                loaded.push((bitmap.name.clone(), bits));
            }
            let mut flags = [0; 4];
            place.read(entry_at + FLAGS_AT, &mut flags)?;
            flags[3] |= 1;
            place.write(entry_at + FLAGS_AT, &flags)?;
        }
        self.barrier()?;
        self.recording = Recording::Loaded(loaded);
        Ok(())
    }

    /// Stores bits that are loaded; the marks go with the same switch.
    pub(super) fn store_bitmaps(&mut self) -> Result<(), BlockError> {
        let Recording::Loaded(loaded) = std::mem::take(&mut self.recording) else { return Ok(()) };
        self.rewrite(|rewrite| {
            rewrite.change_bitmaps(|rewrite, bitmaps| {
                for (name, bits) in &loaded {
                    let Some(bitmap) = bitmaps.iter_mut().find(|bitmap| bitmap.name == *name) else { continue };
                    rewrite.drop_bits(bitmap)?;
                    rewrite.store_bits(bitmap, bits)?;
                    bitmap.in_use = false;
                }
                Ok(())
            })
        })
    }
}

impl Qcow2Node {
    /// Stores bitmaps when the image is closed. After a failure they stay marked as in use.
    pub(super) fn close_bitmaps(&mut self) -> Result<(), BlockError> {
        if !matches!(self.tables.get_mut().recording, Recording::Loaded(_)) {
            return Ok(());
        }
        self.quiet().map(|_| ())
    }
}
