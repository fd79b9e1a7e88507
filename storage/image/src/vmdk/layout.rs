//! New images, as qemu-img lays them out: header, descriptor, then both grain directories with all their tables.
//! A stream has its directory at the end instead, as VMware writes it and ESX demands it.

use super::{
    EXTENTS_MAX, FLAG_COMPRESSED, FLAG_LINE_ENDS, FLAG_MARKERS, FLAG_REDUNDANT, FLAG_ZERO_GRAINS, GD_AT_END,
    GD_ENTRIES_MAX, SECTOR_BYTES, SparseHeader, VmdkError, stream_end,
};
use crate::bytes::NewFile;

/// Grain size of new images: 64 KiB.
const GRAIN_SECTORS: u64 = 128;
const GT_ENTRIES: u32 = 512;
const GT_SECTORS: u64 = 4;
const DESCRIPTOR_SECTOR: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;
const SECTORS_PER_TRACK: u64 = 63;
/// Size of the extents of a split disk.
const SPLIT_BYTES: u64 = 2 << 30;

/// How the parts of a new image lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// One file that grows.
    MonolithicSparse,
    /// One file of compressed grains, written once from start to end.
    StreamOptimized,
    /// A descriptor, and the bytes of the disk in a file beside it.
    MonolithicFlat,
    /// A descriptor, and files that grow, each for 2 GiB of the disk.
    TwoGbMaxExtentSparse,
    /// A descriptor, and the bytes of the disk in files of 2 GiB.
    TwoGbMaxExtentFlat,
}

impl Subformat {
    /// The name in `createType` and in options.
    pub fn name(self) -> &'static str {
        match self {
            Subformat::MonolithicSparse => "monolithicSparse",
            Subformat::StreamOptimized => "streamOptimized",
            Subformat::MonolithicFlat => "monolithicFlat",
            Subformat::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Subformat::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
        }
    }

    /// Whether the disk's bytes are in its extents as they are.
    pub fn is_flat(self) -> bool {
        matches!(self, Subformat::MonolithicFlat | Subformat::TwoGbMaxExtentFlat)
    }

    /// Most bytes of the disk in one extent; `None` where the image is one file.
    fn extent_max_bytes(self) -> Option<u64> {
        match self {
            Subformat::MonolithicSparse | Subformat::StreamOptimized => None,
            Subformat::MonolithicFlat => Some(u64::MAX),
            Subformat::TwoGbMaxExtentSparse | Subformat::TwoGbMaxExtentFlat => Some(SPLIT_BYTES),
        }
    }
}

/// The controller that the disk is for; it decides the geometry in the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterType {
    /// `ide`: 16 heads.
    Ide,
    /// `buslogic`: 255 heads.
    BusLogic,
    /// `lsilogic`: 255 heads.
    LsiLogic,
    /// `legacyESX`: 255 heads.
    LegacyEsx,
}

impl AdapterType {
    /// The name in `ddb.adapterType` and in options.
    pub fn name(self) -> &'static str {
        match self {
            AdapterType::Ide => "ide",
            AdapterType::BusLogic => "buslogic",
            AdapterType::LsiLogic => "lsilogic",
            AdapterType::LegacyEsx => "legacyESX",
        }
    }

    fn heads(self) -> u64 {
        if self == AdapterType::Ide { 16 } else { 255 }
    }
}

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Size of the disk in bytes; rounded up to 512.
    pub size_bytes: u64,
    /// How it is stored.
    pub subformat: Subformat,
    /// For which controller.
    pub adapter_type: AdapterType,
    /// `ddb.virtualHWVersion`; 4 when not given.
    pub hw_version: Option<String>,
    /// `ddb.toolsVersion`; 2147483647 when not given.
    pub tools_version: Option<String>,
    /// A hardware version of 6; excludes `hw_version`.
    pub compat6: bool,
    /// Allow entries that say "zeroes".
    pub zeroed_grain: bool,
    /// Name of the file in its own descriptor, without directories.
    pub file_name: String,
    /// Identity of the contents: random, not `0xffff_ffff`.
    pub cid: u32,
    /// The parent's name as stored and its CID.
    pub parent: Option<(String, u32)>,
}

/// A file beside a new image, for a part of its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewExtent {
    /// Its name.
    pub name: String,
    /// How many sectors of the disk it holds.
    pub sectors: u64,
}

impl NewImage {
    /// The files beside the image, in the order of the disk; none for an image in one file.
    pub fn extents(&self) -> Result<Vec<NewExtent>, VmdkError> {
        let Some(max_bytes) = self.subformat.extent_max_bytes() else { return Ok(Vec::new()) };
        let too_large = VmdkError::Size { size_bytes: self.size_bytes };
        let size_bytes = self.size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or(too_large)?;
        if size_bytes.div_ceil(max_bytes) > EXTENTS_MAX as u64 {
            return Err(VmdkError::TooManyExtents { max: EXTENTS_MAX });
        }
        // What follows the last dot stays at the end, whatever it is.
        let dot = self.file_name.rfind('.').unwrap_or(self.file_name.len());
        let (stem, suffix) = self.file_name.split_at(dot);
        let mut extents = Vec::new();
        let mut left = size_bytes;
        while left > 0 {
            let (bytes, number) = (left.min(max_bytes), extents.len() + 1);
            let name = match self.subformat {
                Subformat::TwoGbMaxExtentSparse => format!("{stem}-s{number:03}{suffix}"),
                Subformat::TwoGbMaxExtentFlat => format!("{stem}-f{number:03}{suffix}"),
                _ => format!("{stem}-flat{suffix}"),
            };
            extents.push(NewExtent { name, sectors: bytes / SECTOR_BYTES });
            left -= bytes;
        }
        Ok(extents)
    }

    /// Lays out the file of an extent that grows.
    pub fn lay_out_extent(&self, extent: &NewExtent) -> NewFile {
        lay_out_sparse(self, extent.sectors, Vec::new())
    }
}

/// Lays out an empty image: its own file. Those of [`NewImage::extents`] belong to it.
pub fn lay_out(new: &NewImage) -> Result<NewFile, VmdkError> {
    if new.subformat.is_flat() && new.zeroed_grain {
        return Err(VmdkError::FlatZeroedGrain);
    }
    if new.subformat.is_flat() && new.parent.is_some() {
        return Err(VmdkError::FlatParent);
    }
    let too_large = VmdkError::Size { size_bytes: new.size_bytes };
    let size_bytes = new.size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or(too_large.clone())?;
    let capacity_sectors = size_bytes / SECTOR_BYTES;
    if new.subformat.extent_max_bytes().is_some() {
        let descriptor = describe(new, capacity_sectors)?;
        return Ok(NewFile { file_bytes: descriptor.len() as u64, pieces: vec![(0, descriptor)] });
    }
    if capacity_sectors.div_ceil(GRAIN_SECTORS * u64::from(GT_ENTRIES)) > GD_ENTRIES_MAX {
        return Err(too_large);
    }
    let descriptor = describe(new, capacity_sectors)?;
    Ok(match new.subformat {
        Subformat::StreamOptimized => {
            let header = stream_header(capacity_sectors);
            let end = stream_end(&header, &vec![0; header.gd_entries() as usize], header.overhead_sectors);
            let end_at = header.overhead_sectors * SECTOR_BYTES;
            let file_bytes = end_at + end.len() as u64;
            let pieces = vec![(0, header.serialise()), (DESCRIPTOR_SECTOR * SECTOR_BYTES, descriptor), (end_at, end)];
            NewFile { pieces, file_bytes }
        }
        _ => lay_out_sparse(new, capacity_sectors, descriptor),
    })
}

fn lay_out_sparse(new: &NewImage, capacity_sectors: u64, descriptor: Vec<u8>) -> NewFile {
    let table_count = capacity_sectors.div_ceil(GRAIN_SECTORS * u64::from(GT_ENTRIES));
    let gd_sectors = (table_count * 4).div_ceil(SECTOR_BYTES);
    let both_sectors = gd_sectors + table_count * GT_SECTORS;
    let rgd_sector = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS;
    let gd_sector = rgd_sector + both_sectors;
    let header = SparseHeader {
        version: if new.zeroed_grain { 2 } else { 1 },
        flags: FLAG_LINE_ENDS | FLAG_REDUNDANT | if new.zeroed_grain { FLAG_ZERO_GRAINS } else { 0 },
        capacity_sectors,
        grain_sectors: GRAIN_SECTORS,
        descriptor_sector: DESCRIPTOR_SECTOR,
        descriptor_sectors: DESCRIPTOR_SECTORS,
        gt_entries: GT_ENTRIES,
        rgd_sector,
        gd_sector,
        overhead_sectors: (gd_sector + both_sectors).next_multiple_of(GRAIN_SECTORS),
        unclean: false,
    };
    let directory = |at: u64| {
        let entry = |i| ((at + gd_sectors + i * GT_SECTORS) as u32).to_le_bytes();
        (at * SECTOR_BYTES, (0..table_count).flat_map(entry).collect::<Vec<u8>>())
    };
    NewFile {
        file_bytes: header.overhead_sectors * SECTOR_BYTES,
        pieces: vec![
            (0, header.serialise()),
            (DESCRIPTOR_SECTOR * SECTOR_BYTES, descriptor),
            directory(rgd_sector),
            directory(gd_sector),
        ],
    }
}

/// The header at the start of a stream, whose directory the footer will name.
pub(super) fn stream_header(capacity_sectors: u64) -> SparseHeader {
    SparseHeader {
        version: 3,
        flags: FLAG_LINE_ENDS | FLAG_COMPRESSED | FLAG_MARKERS,
        capacity_sectors,
        grain_sectors: GRAIN_SECTORS,
        descriptor_sector: DESCRIPTOR_SECTOR,
        descriptor_sectors: DESCRIPTOR_SECTORS,
        gt_entries: GT_ENTRIES,
        rgd_sector: 0,
        gd_sector: GD_AT_END,
        overhead_sectors: GRAIN_SECTORS,
        unclean: false,
    }
}

/// The descriptor's text, line by line as qemu-img writes it.
fn describe(new: &NewImage, capacity_sectors: u64) -> Result<Vec<u8>, VmdkError> {
    let hw_version = match (&new.hw_version, new.compat6) {
        (Some(_), true) => return Err(VmdkError::Compat6HwVersion),
        (Some(version), false) => version.as_str(),
        (None, true) => "6",
        (None, false) => "4",
    };
    let tools_version = new.tools_version.as_deref().unwrap_or("2147483647");
    let parent_name = new.parent.as_ref().map_or("", |(name, _)| name.as_str());
    for text in [&new.file_name, hw_version, tools_version, parent_name] {
        if text.contains(['"', '\n', '\r', '\0']) {
            return Err(VmdkError::Name(text.to_owned()));
        }
    }
    let parent_cid = new.parent.as_ref().map_or(u32::MAX, |(_, cid)| *cid);
    let parent_line = match &new.parent {
        Some((name, _)) => format!("parentFileNameHint=\"{name}\"\n"),
        None => "\n".to_owned(),
    };
    let mut extents = String::new();
    let kind = if new.subformat.is_flat() { "FLAT" } else { "SPARSE" };
    let offset = if new.subformat.is_flat() { " 0" } else { "" };
    match new.subformat.extent_max_bytes() {
        None => extents = format!("RW {capacity_sectors} SPARSE \"{}\"\n", new.file_name),
        Some(_) => new.extents()?.iter().for_each(|extent| {
            extents += &format!("RW {} {kind} \"{}\"{offset}\n", extent.sectors, extent.name);
        }),
    }
    let heads = new.adapter_type.heads();
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:x}\nparentCID={parent_cid:x}\ncreateType=\"{create_type}\"\n\
         {parent_line}# Extent description\n{extents}\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{hw_version}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{SECTORS_PER_TRACK}\"\nddb.adapterType = \"{adapter}\"\n\
         ddb.toolsVersion = \"{tools_version}\"\n",
        cid = new.cid,
        create_type = new.subformat.name(),
        cylinders = capacity_sectors / (SECTORS_PER_TRACK * heads),
        adapter = new.adapter_type.name(),
    );
    // A zero byte ends the text where it is embedded.
    if new.subformat.extent_max_bytes().is_none() && text.len() as u64 >= DESCRIPTOR_SECTORS * SECTOR_BYTES {
        return Err(VmdkError::Name(parent_name.to_owned()));
    }
    Ok(text.into_bytes())
}

#[cfg(test)]
fn plain(size_bytes: u64) -> NewImage {
    NewImage {
        size_bytes,
        subformat: Subformat::MonolithicSparse,
        adapter_type: AdapterType::Ide,
        hw_version: None,
        tools_version: None,
        compat6: false,
        zeroed_grain: false,
        file_name: "a.vmdk".to_owned(),
        cid: 0xce9e_1cd9,
        parent: None,
    }
}

#[test]
fn header_and_directories_lie_where_qemu_img_puts_them() {
    // From hex dumps of `qemu-img create -f vmdk`: size, gd_sector, overhead.
    for (size_bytes, gd_sector, overhead) in
        [(100 << 20, 38, 128), (1 << 30, 150, 384), (3000 << 30, 0x5_df03, 0xb_be00), (1000, 26, 128)]
    {
        let file = lay_out(&plain(size_bytes)).unwrap();
        let header = SparseHeader::parse(&file.pieces[0].1, file.file_bytes).unwrap();
        assert_eq!((header.gd_sector, header.overhead_sectors), (gd_sector, overhead), "{size_bytes}");
        assert_eq!(file.file_bytes, overhead * 512);
        assert_eq!(file.pieces[2].0, 21 * 512);
    }
    let file = lay_out(&plain(1 << 30)).unwrap();
    assert_eq!(&file.pieces[2].1[..8], b"\x16\0\0\0\x1a\0\0\0");
    assert!(matches!(lay_out(&plain(u64::MAX)), Err(VmdkError::Size { .. })));
    assert!(matches!(lay_out(&plain(257 << 40)), Err(VmdkError::Size { .. })));
}

#[test]
fn descriptors_are_qemu_imgs_byte_by_byte() {
    let golden = "# Disk DescriptorFile\nversion=1\nCID=fe31f8b\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
        # Extent description\nRW 20971520 SPARSE \"a.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
        ddb.virtualHWVersion = \"7\"\nddb.geometry.cylinders = \"1305\"\nddb.geometry.heads = \"255\"\n\
        ddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\nddb.toolsVersion = \"123\"\n";
    let new = NewImage {
        adapter_type: AdapterType::LsiLogic,
        hw_version: Some("7".to_owned()),
        tools_version: Some("123".to_owned()),
        cid: 0xfe3_1f8b,
        ..plain(10 << 30)
    };
    assert_eq!(String::from_utf8(describe(&new, 20_971_520).unwrap()).unwrap(), golden);
    let child = NewImage { parent: Some(("z.vmdk".to_owned(), 0x9f4b_5af2)), ..plain(1 << 30) };
    let text = String::from_utf8(describe(&child, 2_097_152).unwrap()).unwrap();
    assert!(
        text.contains("parentCID=9f4b5af2\ncreateType=\"monolithicSparse\"\nparentFileNameHint=\"z.vmdk\"\n# Extent")
    );
    let parsed = super::Descriptor::parse(text.as_bytes()).unwrap();
    assert_eq!(
        (parsed.parent_cid, parsed.parent_name.as_deref(), parsed.sectors()),
        (0x9f4b_5af2, Some("z.vmdk"), 2_097_152)
    );
}

#[test]
fn what_would_break_the_text_is_refused() {
    for name in ["a\"b", "a\nb", "a\0"] {
        let new = NewImage { file_name: name.to_owned(), ..plain(512) };
        assert_eq!(lay_out(&new), Err(VmdkError::Name(name.to_owned())));
    }
    let long = NewImage { parent: Some(("x".repeat(20 * 512), 1)), ..plain(512) };
    assert!(matches!(lay_out(&long), Err(VmdkError::Name(_))));
    let both = NewImage { compat6: true, hw_version: Some("7".to_owned()), ..plain(512) };
    assert_eq!(lay_out(&both), Err(VmdkError::Compat6HwVersion));
}

#[test]
fn an_empty_stream_is_whole() {
    let file = lay_out(&NewImage { subformat: Subformat::StreamOptimized, ..plain(100 << 20) }).unwrap();
    let bytes = file.to_bytes();
    let header = SparseHeader::parse(&bytes, file.file_bytes).unwrap();
    assert!(header.has_footer() && header.is_compressed());
    let footer = super::parse_footer(&bytes[bytes.len() - 1536..], file.file_bytes).unwrap();
    assert_eq!(footer.directory_range(footer.gd_sector, file.file_bytes), Ok((129 * 512, 16)));
}

#[test]
fn extents_are_named_and_sized_as_qemu_img_does() {
    use Subformat::{MonolithicFlat, TwoGbMaxExtentFlat, TwoGbMaxExtentSparse};
    // From `qemu-img create -f vmdk -o subformat=...`.
    type Case = (Subformat, &'static str, u64, &'static [(&'static str, u64)]);
    let cases: &[Case] = &[
        (MonolithicFlat, "a.vmdk", 5 << 30, &[("a-flat.vmdk", 10_485_760)]),
        (MonolithicFlat, "noext", 1000, &[("noext-flat", 2)]),
        (TwoGbMaxExtentFlat, "a.b.VMDK", 3 << 30, &[("a.b-f001.VMDK", 4_194_304), ("a.b-f002.VMDK", 2_097_152)]),
        (TwoGbMaxExtentSparse, "e.vmdk", 4 << 30, &[("e-s001.vmdk", 4_194_304), ("e-s002.vmdk", 4_194_304)]),
        (TwoGbMaxExtentFlat, "zero.vmdk", 0, &[]),
        (Subformat::StreamOptimized, "s.vmdk", 5 << 30, &[]),
    ];
    for (subformat, file_name, size_bytes, want) in cases {
        let new = NewImage { subformat: *subformat, file_name: file_name.to_string(), ..plain(*size_bytes) };
        let got = new.extents().unwrap();
        let got: Vec<_> = got.iter().map(|extent| (extent.name.as_str(), extent.sectors)).collect();
        assert_eq!(got, *want, "{file_name}");
        if !want.is_empty() {
            let described = super::Descriptor::parse(&lay_out(&new).unwrap().to_bytes()).unwrap();
            let lines: Vec<_> = described.extents.iter().map(|line| (line.name.as_str(), line.sectors)).collect();
            assert_eq!((lines.as_slice(), described.create_type.as_str()), (*want, subformat.name()));
        }
    }
    let split = NewImage { subformat: TwoGbMaxExtentSparse, ..plain(8 << 40) };
    assert_eq!(split.extents().unwrap().len(), EXTENTS_MAX);
    // Where the directories of the first extent of 5 MiB lie, from a hex dump.
    let layout = split.lay_out_extent(&NewExtent { name: "a".to_owned(), sectors: 10_240 });
    let header = SparseHeader::parse(&layout.pieces[0].1, layout.file_bytes).unwrap();
    assert_eq!((header.rgd_sector, header.gd_sector, header.overhead_sectors), (0x15, 0x1a, 0x80));
    let many = NewImage { size_bytes: (8 << 40) + 1, ..split };
    assert_eq!(many.extents(), Err(VmdkError::TooManyExtents { max: EXTENTS_MAX }));
    let flat = NewImage { subformat: MonolithicFlat, ..plain(512) };
    assert_eq!(lay_out(&NewImage { zeroed_grain: true, ..flat.clone() }), Err(VmdkError::FlatZeroedGrain));
    assert_eq!(lay_out(&NewImage { parent: Some(("z".to_owned(), 1)), ..flat }), Err(VmdkError::FlatParent));
}
