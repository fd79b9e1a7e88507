//! Small sound images of every kind, made by the engine itself.

use std::ops::Range;
use std::path::Path;

use block::{
    BlockError, ChainBackend, CipherAlgorithm, CipherMode, CipherSpec, CompressionType, CryptMethod, Disk, Format,
    Hash, IvGenerator, LayerKey, LuksCreate, OpenOptions, Passphrase, Preallocation, Qcow2Create, Qcow2Image,
    SnapshotTime, Subformat, VdiOptions, VhdxOptions, VmdkOptions, VpcOptions,
};
use image::vhdx::header::{HEADER_OFFSETS, REGION_OFFSETS};
use image::vhdx::log::NewEntry;
use image::vhdx::{HEADERS_BYTES, Header, Regions};

use super::memory_file::MemoryFile;
use super::victim::{LOG_ENTRY_BYTES, Victim};

const DISK_BYTES: u64 = 1 << 20;
const PATH: &str = "disk.img";

fn layer(file: &MemoryFile, format: Format) -> ChainBackend {
    ChainBackend { file: Box::new(file.clone()), path_label: PATH.into(), format, extents: Vec::new() }
}

fn open(file: &MemoryFile, format: Format) -> Result<Disk, BlockError> {
    open_with(file, format, &LayerKey::None)
}

fn open_with(file: &MemoryFile, format: Format, key: &LayerKey) -> Result<Disk, BlockError> {
    let options = OpenOptions { format, keys: vec![key.clone()], ..OpenOptions::default() };
    Disk::open_backends(vec![layer(file, format)], &options)
}

/// Writes at a few places, so that tables have entries next to each other and far apart.
fn fill(disk: &Disk) -> Result<(), BlockError> {
    let piece_bytes = if disk.is_stream() { disk.cluster_bytes() } else { 4096 };
    let text: Vec<u8> = (0..piece_bytes).map(|i| (i / 3 % 251) as u8).collect();
    let last = disk.size_bytes() - piece_bytes;
    for at in [0, piece_bytes, last] {
        disk.write(at, &text)?;
    }
    disk.flush()
}

fn made(
    format: Format,
    tables: &[Range<u64>],
    make: impl FnOnce(&MemoryFile) -> Result<(), BlockError>,
) -> Result<Victim, BlockError> {
    let file = MemoryFile::default();
    make(&file)?;
    fill(&open(&file, format)?)?;
    Ok(Victim::new(format, file, tables.to_vec()))
}

/// Where the header of a vmdk says that its tables are, a sector each and what is in front of it.
fn vmdk_tables(file: &MemoryFile) -> Vec<Range<u64>> {
    let word = |at: u64| {
        let bytes = file.get(at, 8);
        u64::from_le_bytes(bytes.try_into().unwrap_or_default())
    };
    let end = file.bytes();
    let mut tables = vec![0..80, 512..1024, 512..1024 + 512, end.saturating_sub(2560)..end];
    for directory in [word(48), word(56)] {
        let table = word(directory.saturating_mul(512)) & 0xffff_ffff;
        for sector in [directory, table] {
            if sector > 0 && sector < end / 512 {
                tables.push(sector * 512..sector * 512 + 64);
            }
        }
    }
    // The marker of the first packed grain.
    tables.push(65536..65536 + 64);
    tables
}

pub fn vmdk() -> Result<Vec<Victim>, BlockError> {
    let create =
        |file: &MemoryFile, options: &VmdkOptions| block::create_vmdk(file, Path::new(PATH), DISK_BYTES, options);
    let sparse = VmdkOptions::default();
    let zeroed = VmdkOptions { zeroed_grain: true, ..VmdkOptions::default() };
    let stream = VmdkOptions { subformat: Subformat::StreamOptimized, ..VmdkOptions::default() };
    let mut victims = Vec::new();
    for options in [&sparse, &zeroed, &stream] {
        let mut victim = made(Format::Vmdk, &[], |file| create(file, options))?;
        victim.tables = vmdk_tables(&victim.file);
        victims.push(victim);
    }
    let empty = MemoryFile::default();
    create(&empty, &stream)?;
    victims.push(Victim::new(Format::Vmdk, empty.copy(), vmdk_tables(&empty)));
    let child = MemoryFile::default();
    create(&child, &VmdkOptions { backing: Some(("base.vmdk".into(), 7)), ..VmdkOptions::default() })?;
    let mut child = Victim::new(Format::Vmdk, child.copy(), vmdk_tables(&child));
    child.backing = Some(MemoryFile::of(&[0xb5; 4096]));
    victims.push(child);
    let grains = MemoryFile::default();
    create(&grains, &sparse)?;
    fill(&open(&grains, Format::Vmdk)?)?;
    let flat = MemoryFile::of(&vec![0x11; DISK_BYTES as usize]);
    for (create_type, lines) in [
        ("monolithicFlat", "RW 2048 FLAT \"disk-flat.vmdk\" 0\n"),
        ("vmfs", "RW 2048 VMFS \"disk-flat.vmdk\"\n"),
        ("custom", "RW 1024 FLAT \"a.vmdk\" 512\nRW 2048 SPARSE \"b.vmdk\"\nRDONLY 64 ZERO\nRW 8 FLAT \"a.vmdk\" 0\n"),
    ] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
             # Extent description\n{lines}\n# The Disk Data Base\nddb.adapterType = \"ide\"\n"
        );
        let file = MemoryFile::of(text.as_bytes());
        let lines_at = text.find("RW").unwrap_or(0) as u64;
        let tables = vec![lines_at..lines_at + lines.len() as u64, 0..text.len() as u64];
        let mut victim = Victim::new(Format::Vmdk, file, tables);
        victim.extents = vec![flat.copy(), grains.copy()];
        victims.push(victim);
    }
    Ok(victims)
}

pub fn vdi() -> Result<Vec<Victim>, BlockError> {
    let tables = [0x40..0x50, 0x154..0x1c8, 512..528];
    let made = |is_static| {
        made(Format::Vdi, &tables, |file| {
            block::create_vdi(file, Path::new(PATH), 3 * DISK_BYTES, &VdiOptions { is_static })
        })
    };
    Ok(vec![made(false)?, made(true)?])
}

pub fn vpc() -> Result<Vec<Victim>, BlockError> {
    let mut victims = Vec::new();
    for fixed in [false, true] {
        let options = VpcOptions { fixed, force_size: true };
        let mut victim = made(Format::Vpc, &[], |file| block::create_vpc(file, Path::new(PATH), DISK_BYTES, &options))?;
        let end = victim.file.bytes();
        let footer = end - 512..end - 424;
        victim.tables = if fixed { Vec::from([footer]) } else { vec![footer, 0..88, 512..576, 1536..1552] };
        victims.push(victim);
    }
    Ok(victims)
}

pub fn vhdx() -> Result<Vec<Victim>, BlockError> {
    let mut victims = Vec::new();
    for (fixed, block_state_zero) in [(false, true), (false, false), (true, true)] {
        let options = VhdxOptions { fixed, block_state_zero, block_bytes: 1 << 20, ..VhdxOptions::default() };
        let make = |file: &MemoryFile| block::create_vhdx(file, Path::new(PATH), 2 * DISK_BYTES, &options);
        let mut victim = made(Format::Vhdx, &[], make)?;
        let [header, regions] = [HEADER_OFFSETS[0], REGION_OFFSETS[0]];
        victim.tables = vec![0..8, header..header + 80, regions..regions + 80];
        if let Some((_, found)) = vhdx_parts(&victim.file) {
            let (bat, metadata) = (found.bat.offset, found.metadata.offset);
            let items = metadata + (64 << 10);
            victim.tables.extend([bat..bat + 32, metadata..metadata + 192, items..items + 48]);
        }
        victims.push(victim);
    }
    if let Some(first) = victims.first() {
        let logged = with_log(first);
        victims.push(logged);
    }
    Ok(victims)
}

fn vhdx_parts(file: &MemoryFile) -> Option<(Header, Regions)> {
    let start = file.get(0, HEADERS_BYTES as usize);
    let (header, _) = Header::current(&start, file.bytes()).ok()?;
    let regions = Regions::parse(&start, header.log, file.bytes()).ok()?;
    Some((header, regions))
}

/// The image as a writer leaves it that was interrupted: the log says again what the table says.
fn with_log(victim: &Victim) -> Victim {
    let file = victim.file.copy();
    let mut tables = victim.tables.clone();
    if let Some((header, regions)) = vhdx_parts(&file) {
        let guid = [7; 16];
        let sector = file.get(regions.bat.offset, 4096);
        for (sequence, at) in [(1, 0), (2, LOG_ENTRY_BYTES)] {
            let sectors = [(regions.bat.offset, sector.as_slice())];
            // Both belong to one sequence, which starts with the first.
            let entry = NewEntry { guid: &guid, sequence, at: 0, file_bytes: file.bytes(), sectors: &sectors };
            file.put(header.log.offset + at, &entry.serialise());
            let entry_at = header.log.offset + at;
            tables.extend([entry_at..entry_at + 104, entry_at + 4096..entry_at + 4112]);
        }
        let header = Header { log_guid: guid, ..header }.serialise();
        HEADER_OFFSETS.iter().for_each(|offset| file.put(*offset, &header));
    }
    Victim::new(Format::Vhdx, file, tables)
}

pub fn luks() -> Result<Vec<Victim>, BlockError> {
    let passphrase = Passphrase::new(b"passphrase".to_vec());
    let key = LayerKey::Passphrase(passphrase.clone());
    let cbc =
        CipherSpec { algorithm: CipherAlgorithm::Aes128, mode: CipherMode::Cbc, iv: IvGenerator::Essiv(Hash::Sha256) };
    let mut victims = Vec::new();
    for cipher in [cbc, CipherSpec::default()] {
        let luks = LuksCreate { cipher, hash: Hash::Sha1, iter_time_ms: 0, passphrase: passphrase.clone() };
        let file = MemoryFile::default();
        block::create_luks(&file, Path::new(PATH), DISK_BYTES, &luks, Preallocation::Off)?;
        fill(&open_with(&file, Format::Luks, &key)?)?;
        victims.push(Victim::new(Format::Luks, file, vec![0..592, 104..112, 164..168, 208..592, 4096..8192]));
        let file = MemoryFile::default();
        let options = Qcow2Create { cluster_bits: 12, encryption: Some(luks), ..Qcow2Create::default() };
        block::format_qcow2(&file, Path::new(PATH), DISK_BYTES, &options)?;
        let disk = open_with(&file, Format::Qcow2, &key)?;
        fill(&disk)?;
        drop(disk);
        let mut tables = qcow2_tables(&file)?;
        let header = Qcow2Image::open_backend(layer(&file, Format::Qcow2), true)?.header();
        if let CryptMethod::Luks(place) = header.crypt_method {
            tables.push(place.offset..place.offset + 592);
        }
        victims.push(Victim::new(Format::Qcow2, file, tables));
    }
    victims.iter_mut().for_each(|victim| victim.key = key.clone());
    Ok(victims)
}

pub fn qcow2() -> Result<Vec<Victim>, BlockError> {
    let small = Qcow2Create { cluster_bits: 9, ..Qcow2Create::default() };
    let mut victims = vec![
        qcow2_of(&small, DISK_BYTES)?,
        qcow2_of(&Qcow2Create { cluster_bits: 14, extended_l2: true, ..Qcow2Create::default() }, DISK_BYTES)?,
        qcow2_of(&Qcow2Create { cluster_bits: 12, version: 2, ..Qcow2Create::default() }, DISK_BYTES)?,
        qcow2_of(
            &Qcow2Create {
                cluster_bits: 12,
                refcount_order: 0,
                compression: CompressionType::Zstd,
                lazy_refcounts: true,
                ..Qcow2Create::default()
            },
            DISK_BYTES,
        )?,
    ];
    // Rewrites of a whole chain need no snapshots: this one has a backing file in their place.
    let backing = Some(("base".to_owned(), "raw".to_owned()));
    let file = MemoryFile::default();
    let options = Qcow2Create { cluster_bits: 14, extended_l2: true, backing, ..Qcow2Create::default() };
    block::format_qcow2(&file, Path::new(PATH), DISK_BYTES, &options)?;
    let mut overlay = Victim::new(Format::Qcow2, file.copy(), qcow2_tables(&file)?);
    overlay.backing = Some(MemoryFile::of(&[0xb5; 20_000]));
    victims.push(overlay);
    Ok(victims)
}

/// An image with data, packed clusters, a bitmap and two snapshots.
fn qcow2_of(options: &Qcow2Create, size_bytes: u64) -> Result<Victim, BlockError> {
    let file = MemoryFile::default();
    block::format_qcow2(&file, Path::new(PATH), size_bytes, options)?;
    let disk = open(&file, Format::Qcow2)?;
    fill(&disk)?;
    if let Some(image) = disk.qcow2() {
        if options.version >= 3 && options.refcount_order > 0 {
            image.add_bitmap("b", 65536, true)?;
            image.add_bitmap("off", 512, false)?;
        }
        // A refcount of one bit counts no sharer.
        if options.refcount_order > 0 {
            for name in ["first", "second"] {
                image.create_snapshot(name, &SnapshotTime::default())?;
                disk.write(0, &[0x77; 1024])?;
            }
        }
    }
    let cluster_bytes = disk.cluster_bytes();
    let text: Vec<u8> = (0..cluster_bytes).map(|i| (i / 7 % 5) as u8).collect();
    for index in [64, 65, 66] {
        let mut packed = Vec::new();
        let at = index * cluster_bytes;
        if at < size_bytes && disk.pack(&text, &mut packed)? {
            disk.write_packed(at, &packed, cluster_bytes)?;
        }
    }
    disk.flush()?;
    drop(disk);
    let tables = qcow2_tables(&file)?;
    Ok(Victim::new(Format::Qcow2, file, tables))
}

/// Where the tables are that the header leads to.
fn qcow2_tables(file: &MemoryFile) -> Result<Vec<Range<u64>>, BlockError> {
    let header = Qcow2Image::open_backend(layer(file, Format::Qcow2), true)?.header();
    let cluster_bytes = header.geometry.cluster_bytes();
    let mut tables = vec![0..112, 100..cluster_bytes.min(512), header.l1_offset..header.l1_offset + 64];
    tables.push(header.reftable_offset..header.reftable_offset + 16);
    let pointer = |at: u64| {
        let raw = u64::from_be_bytes(file.get(at, 8).try_into().unwrap_or_default());
        raw & 0x00ff_ffff_ffff_fe00
    };
    for table in [pointer(header.l1_offset), pointer(header.reftable_offset)] {
        if table > 0 {
            tables.push(table..table + cluster_bytes.min(1024));
        }
    }
    if header.snapshot_count > 0 {
        tables.push(header.snapshots_offset..header.snapshots_offset + 160);
    }
    // The extension of bitmaps points to their directory; that is in the header's cluster, the directory anywhere.
    if let Some(extension) = header.extension(0x2385_2875)
        && let Some(offset) = extension.get(16..24).and_then(|raw| raw.try_into().ok()).map(u64::from_be_bytes)
    {
        tables.push(offset..offset + 96);
        let bits = pointer(offset);
        tables.push(bits..bits + 16);
    }
    Ok(tables)
}
