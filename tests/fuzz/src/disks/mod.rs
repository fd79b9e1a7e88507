//! Disk images under the whole block engine: opened, walked, read, written, checked and repaired.
//!
//! An input's first byte chooses one of the sound images, the rest says how it is damaged ([`Victim::damaged`]). No
//! image may make the engine panic, work without end or open a file that it was not given.

mod memory_file;
mod seeds;
mod victim;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use block::{
    Action, BlockError, ChainBackend, CryptMethod, Disk, FileBackend, ForeignImage, Format, KeySlotChange, LayerKey,
    LuksHeader, OpenOptions, Passphrase, Preallocation, Qcow2Image, Repair, SnapshotTime,
};

use memory_file::MemoryFile;
use victim::Victim;

/// Runs of a disk that are looked at. A damaged one may have 2^50 of them.
const EXTENTS_MAX: usize = 256;
/// A disk up to this size is read as a whole.
const READ_WHOLE_BYTES: u64 = 4 << 20;
const PIECE_BYTES: u64 = 64 << 10;
/// Files that a descriptor gets; one that names more is not opened.
const EXTENT_FILES_MAX: usize = 32;
/// Iterations that opening one encrypted image may cost.
const ITERATIONS_MAX: u64 = 10_000;

type Seeds = fn() -> Result<Vec<Victim>, BlockError>;

fn run(data: &[u8], victims: &OnceLock<Vec<Victim>>, seeds: Seeds) -> bool {
    let victims = victims.get_or_init(|| seeds().unwrap_or_else(|e| panic!("a sound image cannot be made: {e:?}")));
    let Some((first, program)) = data.split_first() else { return false };
    let Some(victim) = victims.get(usize::from(*first) % victims.len().max(1)) else { return false };
    let file = victim.damaged(program);
    let taken = look(victim, &file);
    let _ = noted(change(victim, &file));
    describe(victim, &file);
    taken
}

macro_rules! target {
    ($(#[$doc:meta])* $name:ident, $seeds:path) => {
        $(#[$doc])*
        pub fn $name(data: &[u8]) -> bool {
            static VICTIMS: OnceLock<Vec<Victim>> = OnceLock::new();
            run(data, &VICTIMS, $seeds)
        }
    };
}

target!(
    /// VMware disks: sparse files, streams, descriptors with files beside them.
    vmdk,
    seeds::vmdk
);
target!(
    /// VirtualBox disks.
    vdi,
    seeds::vdi
);
target!(
    /// Virtual PC disks.
    vpc,
    seeds::vpc
);
target!(
    /// Hyper-V disks, with and without a log that has to be replayed.
    vhdx,
    seeds::vhdx
);
target!(
    /// qcow2 with snapshots, bitmaps, compressed clusters, subclusters and a backing file.
    qcow2_disk,
    seeds::qcow2
);

target!(
    /// LUKS, as images of their own and in qcow2.
    luks,
    seeds::luks
);

/// The engine opens no file itself, whatever an image names.
fn noted<T>(result: Result<T, BlockError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(BlockError::Io { path, action: Action::Open, .. }) => panic!("{} was opened by name", path.display()),
        Err(error) => {
            // Every error can be told.
            let _ = error.kind();
            let _ = error.to_string();
            None
        }
    }
}

/// The files that a descriptor names: plain names beside it.
fn extents(victim: &Victim, file: &MemoryFile) -> Option<Vec<(MemoryFile, PathBuf)>> {
    if victim.format != Format::Vmdk {
        return Some(Vec::new());
    }
    let shared: Arc<dyn FileBackend> = Arc::new(file.clone());
    let names = noted(block::vmdk_extent_names(shared, Path::new("disk.vmdk")))?;
    if names.len() > EXTENT_FILES_MAX {
        return None;
    }
    let file = |(index, name): (usize, String)| {
        let plain = !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..";
        assert!(plain, "a descriptor names a file elsewhere: {name:?}");
        let nth = index % victim.extents.len().max(1);
        (victim.extents.get(nth).map_or_else(MemoryFile::default, MemoryFile::copy), PathBuf::from(name))
    };
    Some(names.into_iter().enumerate().map(file).collect())
}

fn layers(victim: &Victim, file: &MemoryFile) -> Option<Vec<ChainBackend>> {
    let boxed = |(file, path): (MemoryFile, PathBuf)| (Box::new(file) as Box<dyn FileBackend>, path);
    let layer = |file: &MemoryFile, path: &str, format, extents: Vec<(MemoryFile, PathBuf)>| ChainBackend {
        file: Box::new(file.clone()),
        path_label: path.into(),
        format,
        extents: extents.into_iter().map(boxed).collect(),
    };
    let mut layers = vec![layer(file, "disk", victim.format, extents(victim, file)?)];
    layers.extend(victim.backing.as_ref().map(|base| layer(&base.copy(), "base", Format::Raw, Vec::new())));
    Some(layers)
}

fn open(victim: &Victim, file: &MemoryFile, read_only: bool) -> Option<Disk> {
    if !is_affordable(victim, file) {
        return None;
    }
    let keys = vec![victim.key.clone()];
    let options = OpenOptions { read_only, format: victim.format, keys, ..OpenOptions::default() };
    noted(Disk::open_backends(layers(victim, file)?, &options))
}

/// Whether trying a passphrase costs little. A header may ask for half a minute, which is time that a test does not have.
fn is_affordable(victim: &Victim, file: &MemoryFile) -> bool {
    let at = match victim.format {
        Format::Luks => 0,
        Format::Qcow2 if !matches!(victim.key, LayerKey::None) => {
            let header = file.get(0, 4096);
            let Ok(header) = image::qcow2::Header::parse(&header) else { return true };
            let CryptMethod::Luks(place) = header.crypt_method else { return true };
            place.offset
        }
        _ => return true,
    };
    let Ok(header) = LuksHeader::parse(&file.get(at, image::luks::HEADER_BYTES)) else { return true };
    let slots = header.slots.iter().filter(|slot| slot.active).map(|slot| u64::from(slot.iterations));
    u64::from(header.digest_iterations) + slots.sum::<u64>() <= ITERATIONS_MAX
}

/// Where a disk is touched that is too large to be touched everywhere.
fn places(size_bytes: u64, piece_bytes: u64) -> impl Iterator<Item = u64> {
    let last = size_bytes.saturating_sub(piece_bytes);
    [0, size_bytes / 2 / piece_bytes * piece_bytes, last].into_iter().filter(move |at| at + piece_bytes <= size_bytes)
}

/// Opens the image, walks what it is made of and reads it.
fn look(victim: &Victim, file: &MemoryFile) -> bool {
    let Some(disk) = open(victim, file, true) else { return false };
    view(&disk);
    if let Some(image) = disk.qcow2() {
        let snapshots = noted(image.snapshots()).unwrap_or_default();
        for bitmap in noted(image.bitmaps()).unwrap_or_default().iter().take(8) {
            let _ = noted(image.bitmap_bits(&bitmap.name)).map(|bits| bits.ranges().len());
        }
        for snapshot in snapshots.iter().take(4) {
            let name = String::from_utf8_lossy(&snapshot.name);
            let _ = noted(image.read_vm_state(&name, 0, &mut [0; 512]));
            if noted(image.show_snapshot(&name)).is_some() {
                view(&disk);
            }
        }
    }
    true
}

fn view(disk: &Disk) {
    let size_bytes = disk.size_bytes();
    let mut room = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    for _ in 0..EXTENTS_MAX {
        if at >= size_bytes {
            break;
        }
        let Some(found) = noted(disk.extent(at, size_bytes - at)) else { break };
        let bytes = found.extent.bytes;
        assert!((1..=size_bytes - at).contains(&bytes), "a run at {at:#x} of {size_bytes:#x} has {bytes:#x} bytes");
        let _ = noted(disk.read(at, room.get_mut(..bytes.min(512) as usize).unwrap_or_default()));
        at += bytes;
    }
    let step = PIECE_BYTES.min(size_bytes);
    let all = if size_bytes <= READ_WHOLE_BYTES { size_bytes } else { 0 };
    for at in (0..all).step_by(PIECE_BYTES as usize) {
        let bytes = (size_bytes - at).min(PIECE_BYTES) as usize;
        let _ = noted(disk.read(at, room.get_mut(..bytes).unwrap_or_default()));
    }
    if all == 0 && step > 0 {
        for at in places(size_bytes, step) {
            let _ = noted(disk.read(at, room.get_mut(..step as usize).unwrap_or_default()));
        }
    }
    let _ = (disk.cluster_bytes(), disk.counters(), disk.is_stream());
}

/// Writes to the image what guests and tools write.
fn change(victim: &Victim, file: &MemoryFile) -> Result<(), BlockError> {
    let file = file.copy();
    let Some(disk) = open(victim, &file, false) else { return Ok(()) };
    let bytes = if disk.is_stream() { disk.cluster_bytes() } else { 4096 };
    let data = vec![0x5a; bytes.min(READ_WHOLE_BYTES) as usize];
    for at in places(disk.size_bytes(), bytes.max(1)) {
        let _ = noted(disk.write(at, &data));
        let _ = noted(disk.write_zeroes(at, bytes / 2, true));
        let _ = noted(disk.discard(at, bytes));
    }
    let _ = noted(disk.flush());
    if let Some(image) = disk.qcow2() {
        maintain(&image);
        if !matches!(victim.key, LayerKey::None) {
            let passphrase = Passphrase::new(b"other".to_vec());
            let change = KeySlotChange::Activate { slot: None, passphrase, iter_time_ms: 0 };
            let _ = noted(image.change_key_slots(&victim.key, &change, false));
        }
    }
    drop(disk);
    look(victim, &file);
    Ok(())
}

/// Operations on a qcow2 image as a whole.
fn maintain(image: &Qcow2Image) {
    let time = SnapshotTime::default();
    let first = noted(image.snapshots()).and_then(|snapshots| snapshots.first().map(|first| first.name.clone()));
    let first = String::from_utf8_lossy(&first.unwrap_or_default()).into_owned();
    let _ = noted(image.create_snapshot("new", &time));
    let _ = noted(image.apply_snapshot(&first));
    let _ = noted(image.delete_snapshot(&first));
    let name = noted(image.bitmaps()).and_then(|bitmaps| Some(bitmaps.first()?.name.clone()));
    if let Some(name) = name {
        let _ = noted(image.clear_bitmap(&name));
        let _ = noted(image.remove_bitmap(&name));
    }
    let grown = image.header().geometry.size_bytes.saturating_add(1 << 20);
    let _ = noted(image.resize(grown, false, Preallocation::Off));
}

/// What tools say about the image, and a repair, after which a second one finds nothing.
fn describe(victim: &Victim, file: &MemoryFile) {
    if victim.format == Format::Luks {
        let (file, path_label) = (Box::new(file.clone()), "disk".into());
        let layer = ChainBackend { file, path_label, format: Format::Luks, extents: Vec::new() };
        let _ = noted(block::inspect_backend(&layer));
        return;
    }
    if victim.format != Format::Qcow2 {
        let image = || {
            let extents = extents(victim, file)?;
            let mut image = ForeignImage::new(Arc::new(file.clone()), Path::new("disk"), victim.format);
            image.extents = extents.into_iter().map(|(file, path)| (Arc::new(file) as Arc<_>, path)).collect();
            Some(image)
        };
        let _ = image().and_then(|image| noted(image.inspect()));
        let _ = image().and_then(|image| noted(image.check()));
        return;
    }
    let file = file.copy();
    let layer = || ChainBackend {
        file: Box::new(file.clone()),
        path_label: "disk".into(),
        format: Format::Qcow2,
        extents: Vec::new(),
    };
    let _ = noted(block::inspect_backend(&layer()));
    let Some(first) = noted(block::repair_backend(layer(), Repair::All)) else { return };
    if first.after.corruptions == 0
        && let Some(second) = noted(block::repair_backend(layer(), Repair::All))
    {
        assert_eq!(second.before.corruptions, 0, "a repair that succeeded left {:?}", second.before.findings);
    }
}
