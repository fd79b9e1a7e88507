//! External data files: who may open them, what holds after a power cut in either file, and what a raw one shows.

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};

use block::{
    BlockError, ChainBackend, DataFile, Disk, FileBackend, Format, OpenOptions, Preallocation, Qcow2Create,
    format_data_file, format_qcow2, inspect, resolve_chain, resolve_chain_probing,
};
use support::{MemFile, Op, Pages, Rng, Watched, apply_torn, qemu_check, qemu_img};

const SIZE_BYTES: u64 = 256 << 10;
const SECTOR: usize = 512;

/// A name in a header leads nowhere without consent; the file it names does not exist, so that an attempt to open it
/// would say so.
#[test]
fn only_a_declared_image_opens_what_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let make = |file: &str, data: &str| {
        let path = dir.path().join(file);
        let options =
            Qcow2Create { data_file: Some(DataFile { name: data.to_owned(), raw: false }), ..Qcow2Create::default() };
        block::create_qcow2(&path, 1 << 20, &options).unwrap();
        path
    };
    let opened = |path: &Path, format| resolve_chain_probing(path, format, true, true).err();
    for name in ["secret", "/nowhere/secret", "json:{\"driver\":\"null-co\"}", "nbd://h/x", "file:secret", "fd:3"] {
        let path = make(&format!("{}.qcow2", name.len()), name);
        assert_eq!(inspect(&path, None).unwrap().data_file.unwrap().name.as_deref(), Some(name));
        // Nobody said that it is qcow2, or the daemon asks, which opens nothing that an image names.
        for refused in [opened(&path, None), resolve_chain(&path, Some(Format::Qcow2), true, true).err()] {
            assert!(matches!(refused, Some(BlockError::DataFileConsent { .. })), "{name}: {refused:?}");
        }
        let declared = opened(&path, Some(Format::Qcow2));
        let is_path = !name.contains(':');
        match declared {
            Some(BlockError::DataFile { source, .. }) if is_path => {
                assert!(source.to_string().contains("secret"), "{source}");
            }
            Some(BlockError::DataFileProtocol { .. }) if !is_path => {}
            other => panic!("{name}: {other:?}"),
        }
    }
    // A declared format of a backing file is the image's word, not the user's.
    let below = make("below.qcow2", "secret");
    let top = dir.path().join("top.qcow2");
    let options = Qcow2Create {
        backing: Some((below.to_str().unwrap().to_owned(), "qcow2".to_owned())),
        ..Qcow2Create::default()
    };
    block::create_qcow2(&top, 1 << 20, &options).unwrap();
    let refused = opened(&top, None);
    assert!(matches!(refused, Some(BlockError::DataFileConsent { .. })), "{refused:?}");
    // An image that does not say its name.
    let unnamed = make("unnamed.qcow2", "");
    let refused = opened(&unnamed, Some(Format::Qcow2));
    assert!(matches!(refused, Some(BlockError::DataFileNotGiven { .. })), "{refused:?}");
}

/// What reached which of the two files, in order.
type Log = Arc<Mutex<Vec<(usize, Op)>>>;

/// A new image and its data file.
fn start(cluster_bits: u32, extended_l2: bool, raw: bool) -> [Pages; 2] {
    start_with("data", cluster_bits, extended_l2, raw)
}

fn start_with(name: &str, cluster_bits: u32, extended_l2: bool, raw: bool) -> [Pages; 2] {
    let options = Qcow2Create {
        cluster_bits,
        extended_l2,
        data_file: Some(DataFile { name: name.to_owned(), raw }),
        ..Qcow2Create::default()
    };
    let [file, data] = [MemFile::default(), MemFile::default()];
    format_data_file(&data, Path::new("data"), SIZE_BYTES, &options).unwrap();
    format_qcow2(&file, Path::new("memory"), SIZE_BYTES, &options).unwrap();
    [file, data].map(|file| std::mem::take(&mut file.0.lock().unwrap().pages))
}

fn open(files: &[MemFile; 2], log: &Log) -> Disk {
    let [file, data] = [0, 1].map(|index| -> Box<dyn FileBackend> {
        let (own, log) = (files[index].clone(), log.clone());
        Box::new(Watched::after(files[index].clone(), move |_| {
            log.lock().unwrap().extend(own.0.lock().unwrap().log.drain(..).map(|op| (index, op)));
        }))
    });
    let extents = vec![(data, "data".into())];
    let layer = ChainBackend { file, path_label: "memory".into(), format: Format::Qcow2, extents };
    Disk::open_backends(vec![layer], &OpenOptions::default()).unwrap()
}

/// What each sector may hold after a cut: the value of the last flush, or a later one.
type Allowed = Vec<Vec<u8>>;

/// Works on a disk; returns its contents, and from which position of the log on which values may be found.
fn work(disk: &Disk, log: &Log, seed: u64) -> (Vec<u8>, Vec<(usize, Allowed)>) {
    let mut rng = Rng(seed);
    let mut now = vec![0u8; SIZE_BYTES as usize];
    let mut allowed: Allowed = vec![vec![0]; SIZE_BYTES as usize / SECTOR];
    let mut marks = vec![(0, allowed.clone())];
    for step in 0..40u64 {
        let offset = rng.below(SIZE_BYTES / 512 - 40) * 512;
        let bytes = (1 + rng.below(40)) * 512;
        let value = if step % 4 == 3 { 0 } else { 10 + step as u8 };
        // From here on the new value may show.
        for sector in &mut allowed[offset as usize / SECTOR..(offset + bytes) as usize / SECTOR] {
            sector.push(value);
        }
        marks.push((log.lock().unwrap().len(), allowed.clone()));
        match step % 8 {
            3 => disk.write_zeroes(offset, bytes, step % 16 == 3).unwrap(),
            7 => {
                // Whole clusters read as zeroes afterwards, the rest as before.
                disk.discard(offset, bytes).unwrap();
                let mut room = vec![0; bytes as usize];
                disk.read(offset, &mut room).unwrap();
                now[offset as usize..(offset + bytes) as usize].copy_from_slice(&room);
            }
            _ => disk.write(offset, &vec![value; bytes as usize]).unwrap(),
        }
        if step % 8 != 7 {
            now[offset as usize..(offset + bytes) as usize].fill(value);
        }
        if step % 5 == 4 {
            disk.flush().unwrap();
            for (sector, bytes) in allowed.iter_mut().zip(now.chunks(SECTOR)) {
                *sector = vec![bytes[0]];
            }
            marks.push((log.lock().unwrap().len(), allowed.clone()));
        }
    }
    (now, marks)
}

fn contents(files: &[MemFile; 2]) -> Vec<u8> {
    support::contents(&open(files, &Log::default()))
}

#[test]
fn a_power_cut_in_either_file_leaves_what_was_flushed() {
    for (cluster_bits, extended, raw) in [(9, false, false), (12, false, true), (14, true, false), (14, true, true)] {
        let start = start(cluster_bits, extended, raw);
        let files = start.clone().map(MemFile::of);
        let log = Log::default();
        let disk = open(&files, &log);
        let (now, marks) = work(&disk, &log, 5 + u64::from(cluster_bits));
        assert!(support::contents(&disk) == now);
        drop(disk);
        let log = std::mem::take(&mut *log.lock().unwrap());
        let mut rng = Rng(3);
        let mut synced = start.clone();
        let mut since = [0; 2];
        for cut in 0..=log.len() {
            let mut torn = synced.clone();
            for (position, (index, op)) in log[..cut].iter().enumerate() {
                if position >= since[*index] {
                    apply_torn(&mut torn[*index], op, &mut rng);
                }
            }
            let what = format!("{cluster_bits} {extended} {raw}: cut {cut} of {}", log.len());
            judge(torn, &marks.iter().rev().find(|(at, _)| *at <= cut).unwrap().1, &what);
            if let Some((index, Op::Sync)) = log.get(cut) {
                for (_, op) in log[since[*index]..cut].iter().filter(|(of, _)| of == index) {
                    synced[*index].apply(op);
                }
                since[*index] = cut + 1;
            }
        }
    }
}

fn judge(torn: [Pages; 2], allowed: &Allowed, what: &str) {
    let report = torn[0].check();
    assert_eq!(report.corruptions, 0, "{what}: {:?}", report.findings);
    let held = contents(&torn.map(MemFile::of));
    for (index, sector) in held.chunks(SECTOR).enumerate() {
        let known = sector.iter().all(|byte| allowed[index].contains(byte));
        assert!(known, "{what}: sector {index} holds {}, not one of {:?}", sector[0], allowed[index]);
    }
}

#[test]
fn a_raw_data_file_is_the_disk() {
    for (cluster_bits, extended) in [(9, false), (16, false), (14, true)] {
        let files = start(cluster_bits, extended, true).map(MemFile::of);
        let disk = open(&files, &Log::default());
        let (now, _) = work(&disk, &Log::default(), 41);
        disk.resize(SIZE_BYTES + 3584, false, Preallocation::Off).unwrap();
        disk.write(SIZE_BYTES + 512, &[9; 1024]).unwrap();
        disk.resize(SIZE_BYTES + 1024, true, Preallocation::Off).unwrap();
        disk.resize(SIZE_BYTES + 9216, false, Preallocation::Off).unwrap();
        let shown = support::contents(&disk);
        drop(disk);
        let mut raw = vec![0; files[1].0.lock().unwrap().pages.len as usize];
        files[1].0.lock().unwrap().pages.read(0, &mut raw);
        assert_eq!(raw.len() as u64, SIZE_BYTES + 9216);
        assert!(raw == shown && shown[..now.len()] == now);
        let tail = &shown[SIZE_BYTES as usize..];
        let want: Vec<u8> = (0..tail.len()).map(|at| if (512..1024).contains(&at) { 9 } else { 0 }).collect();
        assert!(tail == want, "{cluster_bits}");
    }
}

#[test]
fn images_of_ours_are_read_by_qemu_img() {
    for (cluster_bits, extended, raw) in [(12, false, false), (16, false, true), (14, true, false)] {
        let dir = tempfile::tempdir().unwrap();
        let [image, data, flat] = ["image.qcow2", "data", "flat"].map(|name| dir.path().join(name));
        let files = start_with(data.to_str().unwrap(), cluster_bits, extended, raw).map(MemFile::of);
        let disk = open(&files, &Log::default());
        let (now, _) = work(&disk, &Log::default(), 17);
        drop(disk);
        for (file, path) in files.iter().zip([&image, &data]) {
            file.0.lock().unwrap().pages.store(path);
        }
        std::fs::write(&flat, now).unwrap();
        qemu_check(&image, &format!("{cluster_bits} {extended} {raw}"));
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image.to_str().unwrap(), flat.to_str().unwrap()]);
    }
}

#[test]
fn entries_that_point_elsewhere_are_damage() {
    let [mut image, data] = start(9, false, true);
    // The second entry of the first L2 table, which the first entry of the L1 table names.
    let mut word = [0; 8];
    let mut header = [0; 48];
    image.read(0, &mut header);
    image.read(u64::from_be_bytes(header[40..48].try_into().unwrap()), &mut word);
    let l2 = u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00;
    for (entry, finding) in [(1u64 << 63 | 1024, "as it is"), (1 << 62 | 512, "compressed")] {
        image.write(l2 + 8, &entry.to_be_bytes());
        let files = [image.clone(), data.clone()].map(MemFile::of);
        let disk = open(&files, &Log::default());
        let error = disk.read(512, &mut [0; 512]).unwrap_err();
        assert_eq!(error.kind(), block::ErrorKind::Corrupt, "{error}");
        let report = image.check();
        assert!(report.findings[0].contains(finding), "{:?}", report.findings);
    }
}
