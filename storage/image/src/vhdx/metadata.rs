//! The metadata region: properties of the disk behind a table of items. [MS-VHDX] 2.6.

use super::{ALIGN_BYTES, Guid, VhdxError, guid_text};
use crate::bytes::{bytes16, le16, le32, le64, put};

/// How much of the metadata region [`Metadata::parse`] looks at: the table, and items in the first MiB.
pub const METADATA_BYTES: u64 = ALIGN_BYTES;
/// Bytes of the table, where items may start.
pub(super) const TABLE_BYTES: usize = 64 << 10;

const FILE_PARAMETERS: Guid = *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
const DISK_SIZE: Guid = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
const DISK_ID: Guid = *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46";
const LOGICAL_SECTOR: Guid = *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";
const PHYSICAL_SECTOR: Guid = *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56";
const PARENT_LOCATOR: Guid = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";

const ENTRIES_MAX: u16 = 2047;
const FLAG_REQUIRED: u32 = 4;
const BLOCK_BYTES_MAX: u32 = 256 << 20;
pub(super) const DISK_BYTES_MAX: u64 = 64 << 40;
/// Items of a new image: GUID, and whether it describes the virtual disk (flag 2) besides being required.
const NEW_ITEMS: [(Guid, u32); 5] =
    [(FILE_PARAMETERS, 4), (DISK_SIZE, 6), (DISK_ID, 6), (LOGICAL_SECTOR, 6), (PHYSICAL_SECTOR, 6)];

/// The checked properties of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a block: a power of two, 1 MiB to 256 MiB.
    pub block_bytes: u32,
    /// Blocks stay allocated: a fixed disk.
    pub leave_blocks_allocated: bool,
    /// Size of the disk: at most 64 TiB.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// 512 or 4096; a hint for guests.
    pub physical_sector_bytes: u32,
    /// Identity of the disk, for SCSI page 0x83.
    pub disk_id: Guid,
}

/// The items found in the table, as byte ranges of the region.
#[derive(Default)]
struct Items<'a> {
    parameters: Option<&'a [u8]>,
    size: Option<&'a [u8]>,
    id: Option<&'a [u8]>,
    logical: Option<&'a [u8]>,
    physical: Option<&'a [u8]>,
}

impl Metadata {
    /// Parses the first [`METADATA_BYTES`] of the metadata region.
    pub fn parse(region: &[u8]) -> Result<Metadata, VhdxError> {
        let part = "metadata table";
        if !region.starts_with(b"metadata") {
            return Err(VhdxError::PartSignature { part, want: "metadata" });
        }
        let cut = || VhdxError::Truncated { part, have_bytes: region.len() };
        let count = le16(region, 10).ok_or_else(cut)?;
        if count > ENTRIES_MAX {
            return Err(VhdxError::TooManyEntries { part, count: count.into() });
        }
        let mut items = Items::default();
        let table = region.get(32..TABLE_BYTES).ok_or_else(cut)?;
        for entry in table.chunks_exact(32).take(count.into()) {
            items.take(entry, region)?;
        }
        let missing = |part| VhdxError::Missing { part };
        let parameters = items.parameters.ok_or(missing("item 'file parameters'"))?;
        let u32_of = |item: Option<&[u8]>, part| item.and_then(|item| le32(item, 0)).ok_or(missing(part));
        let flags = le32(parameters, 4).unwrap_or(0);
        if flags & 2 != 0 {
            return Err(VhdxError::Differencing);
        }
        let metadata = Metadata {
            block_bytes: u32_of(Some(parameters), "item 'file parameters'")?,
            leave_blocks_allocated: flags & 1 != 0,
            size_bytes: items.size.and_then(|item| le64(item, 0)).ok_or(missing("item 'virtual disk size'"))?,
            logical_sector_bytes: u32_of(items.logical, "item 'logical sector size'")?,
            physical_sector_bytes: u32_of(items.physical, "item 'physical sector size'")?,
            disk_id: items.id.and_then(|item| bytes16(item, 0)).ok_or(missing("item 'virtual disk ID'"))?,
        };
        metadata.check()?;
        Ok(metadata)
    }

    fn check(&self) -> Result<(), VhdxError> {
        for bytes in [self.logical_sector_bytes, self.physical_sector_bytes] {
            if !matches!(bytes, 512 | 4096) {
                return Err(VhdxError::SectorSize(bytes));
            }
        }
        let block_bytes = self.block_bytes;
        if !block_bytes.is_power_of_two() || !(ALIGN_BYTES as u32..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(VhdxError::BlockSize(block_bytes));
        }
        let sector_bytes = self.logical_sector_bytes;
        if self.size_bytes > DISK_BYTES_MAX || !self.size_bytes.is_multiple_of(sector_bytes.into()) {
            return Err(VhdxError::DiskSize { size_bytes: self.size_bytes, sector_bytes });
        }
        Ok(())
    }

    /// The region's bytes, up to the end of the last item.
    pub(super) fn serialise(&self) -> Vec<u8> {
        let flags = u32::from(self.leave_blocks_allocated);
        let parameters = [self.block_bytes.to_le_bytes(), flags.to_le_bytes()].concat();
        let (size, logical) = (self.size_bytes.to_le_bytes(), self.logical_sector_bytes.to_le_bytes());
        let physical = self.physical_sector_bytes.to_le_bytes();
        let contents: [&[u8]; 5] = [&parameters, &size, &self.disk_id, &logical, &physical];
        let mut out = vec![0; TABLE_BYTES];
        put(&mut out, 0, b"metadata");
        put(&mut out, 10, &(NEW_ITEMS.len() as u16).to_le_bytes());
        for (i, ((guid, flags), content)) in NEW_ITEMS.iter().zip(contents).enumerate() {
            let at = 32 + i * 32;
            put(&mut out, at, guid);
            let offset = out.len() as u32;
            put(&mut out, at + 16, &offset.to_le_bytes());
            put(&mut out, at + 20, &(content.len() as u32).to_le_bytes());
            put(&mut out, at + 24, &flags.to_le_bytes());
            out.extend(content);
        }
        out
    }
}

impl<'a> Items<'a> {
    fn take(&mut self, entry: &[u8], region: &'a [u8]) -> Result<(), VhdxError> {
        let cut = || VhdxError::Truncated { part: "metadata table", have_bytes: region.len() };
        let guid = bytes16(entry, 0).ok_or_else(cut)?;
        let offset = le32(entry, 16).ok_or_else(cut)?;
        let bytes = le32(entry, 20).ok_or_else(cut)?;
        let required = le32(entry, 24).ok_or_else(cut)? & FLAG_REQUIRED != 0;
        let (slot, item, want_bytes) = match guid {
            FILE_PARAMETERS => (&mut self.parameters, "file parameters", 8),
            DISK_SIZE => (&mut self.size, "virtual disk size", 8),
            DISK_ID => (&mut self.id, "virtual disk ID", 16),
            LOGICAL_SECTOR => (&mut self.logical, "logical sector size", 4),
            PHYSICAL_SECTOR => (&mut self.physical, "physical sector size", 4),
            PARENT_LOCATOR => return Err(VhdxError::Differencing),
            _ if required => {
                return Err(VhdxError::UnknownRequired { part: "metadata item", guid: guid_text(&guid) });
            }
            _ => return Ok(()),
        };
        let place = VhdxError::ItemPlace { item, offset, bytes, want_bytes };
        if bytes != want_bytes || (offset as usize) < TABLE_BYTES {
            return Err(place);
        }
        let content = region.get(offset as usize..offset as usize + bytes as usize).ok_or(place)?;
        if slot.replace(content).is_some() {
            return Err(VhdxError::Twice { part: item });
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) fn sample() -> Metadata {
    Metadata {
        block_bytes: 8 << 20,
        leave_blocks_allocated: false,
        size_bytes: 100 << 20,
        logical_sector_bytes: 512,
        physical_sector_bytes: 512,
        disk_id: [9; 16],
    }
}

#[test]
fn items_are_laid_out_as_qemu_img_does_it() {
    let bytes = sample().serialise();
    // From a hex dump of `qemu-img create -f vhdx ... 100M`.
    assert_eq!(&bytes[..12], b"metadata\0\0\x05\0");
    assert_eq!(&bytes[48..60], b"\0\0\x01\0\x08\0\0\0\x04\0\0\0");
    assert_eq!(&bytes[0xb0..0xbc], b"\x24\0\x01\0\x04\0\0\0\x06\0\0\0");
    assert_eq!(&bytes[0x10000..0x10010], b"\0\0\x80\0\0\0\0\0\0\0\x40\x06\0\0\0\0");
    assert_eq!(Metadata::parse(&bytes), Ok(sample()));
}

#[test]
fn each_item_is_held_to_its_limits() {
    let item = |item, offset, bytes, want_bytes| VhdxError::ItemPlace { item, offset, bytes, want_bytes };
    let size = |size_bytes| VhdxError::DiskSize { size_bytes, sector_bytes: 512 };
    let unknown =
        VhdxError::UnknownRequired { part: "metadata item", guid: "05050505-0505-0505-0505-050505050505".to_owned() };
    let cases: &[(usize, &[u8], VhdxError)] = &[
        (0, b"M", VhdxError::PartSignature { part: "metadata table", want: "metadata" }),
        (10, &[0, 8], VhdxError::TooManyEntries { part: "metadata table", count: 2048 }),
        (10, &[4], VhdxError::Missing { part: "item 'physical sector size'" }),
        (10, &[0], VhdxError::Missing { part: "item 'file parameters'" }),
        (32, &[5; 16], unknown),
        (32, &PARENT_LOCATOR, VhdxError::Differencing),
        (64, &FILE_PARAMETERS, VhdxError::Twice { part: "file parameters" }),
        (48, &[0xff; 4], item("file parameters", u32::MAX, 8, 8)),
        (48, &[0xff, 0xff, 0, 0], item("file parameters", 0xffff, 8, 8)),
        (52, &[9], item("file parameters", 0x10000, 9, 8)),
        (0x10004, &[2], VhdxError::Differencing),
        (0x10008, &[1], size((100 << 20) + 1)),
        (0x10008, &[0xff; 8], size(u64::MAX)),
        (0x10008, &((64u64 << 40) + 512).to_le_bytes(), size((64 << 40) + 512)),
        (0x10020, &[1], VhdxError::SectorSize(513)),
        (0x10024, &[0; 4], VhdxError::SectorSize(0)),
    ];
    for (at, patch, want) in cases {
        let mut bytes = sample().serialise();
        put(&mut bytes, *at, patch);
        assert_eq!(Metadata::parse(&bytes).as_ref(), Err(want), "patch at {at:#x}");
    }
    let bytes = sample().serialise();
    for cut in [0, 7, 8, 11, 31, 32, TABLE_BYTES - 1, TABLE_BYTES, bytes.len() - 1] {
        assert!(Metadata::parse(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn cve_2014_0148_block_sizes() {
    for block_bytes in [0u32, 1, 512, 1 << 19, (1 << 20) + 1, 3 << 20, 512 << 20, 1 << 31, u32::MAX] {
        let mut bytes = sample().serialise();
        put(&mut bytes, 0x10000, &block_bytes.to_le_bytes());
        assert_eq!(Metadata::parse(&bytes), Err(VhdxError::BlockSize(block_bytes)));
    }
}
