//! Encrypted images: nothing plain reaches their files, power cuts leave volumes that open, hostile headers are refused.

mod support;

use std::path::Path;

use block::{
    BlockError, CipherMode, CipherSpec, CopyOptions, Discard, Disk, ErrorKind, ExtentKind, FileBackend, Format, Hash,
    KeySlotChange, LayerKey, LuksCreate, OpenOptions, Passphrase, Preallocation, Qcow2Create, Qcow2Image, SnapshotTime,
    create_luks, format_qcow2,
};
use support::{MemFile, Op, Pages, contents, every_cut};

const SIZE_BYTES: u64 = 1 << 20;
/// What no encrypted file may hold.
const MARK: &[u8; 16] = b"PLAIN-TEXT-MARK!";

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.as_bytes().to_vec())
}

fn key(text: &str) -> LayerKey {
    LayerKey::Passphrase(passphrase(text))
}

fn luks() -> LuksCreate {
    LuksCreate { cipher: CipherSpec::default(), hash: Hash::Sha256, iter_time_ms: 0, passphrase: passphrase("one") }
}

fn new_luks() -> MemFile {
    let file = MemFile::default();
    create_luks(&file, Path::new("memory"), SIZE_BYTES, &luks(), Preallocation::Off).unwrap();
    file
}

fn new_qcow2(create: Qcow2Create) -> MemFile {
    let file = MemFile::default();
    format_qcow2(&file, Path::new("memory"), SIZE_BYTES, &Qcow2Create { encryption: Some(luks()), ..create }).unwrap();
    file
}

fn open(file: &MemFile, format: Format, key: LayerKey) -> Result<Disk, BlockError> {
    let opts = OpenOptions { format, keys: vec![key], ..OpenOptions::default() };
    Disk::open_backends(vec![file.layer(format)], &opts)
}

fn marks(bytes: u64) -> Vec<u8> {
    MARK.repeat(bytes as usize / MARK.len() + 1)[..bytes as usize].to_vec()
}

/// No write to the file ever held a mark, at whatever offset it begins.
fn assert_sealed(file: &MemFile, what: &str) {
    // Any eight bytes in a row of repeated marks are one of sixteen.
    let all = MARK.repeat(2);
    let parts: Vec<[u8; 8]> = all.windows(8).take(16).map(|part| part.try_into().unwrap()).collect();
    for op in &file.0.lock().unwrap().log {
        let Op::Write(offset, bytes) = op else { continue };
        let found = bytes.windows(8).position(|run| parts.iter().any(|part| part == run));
        assert_eq!(found, None, "{what}: plain text in a write to {offset:#x}");
    }
}

/// Each way in which data reaches an image.
fn write_everywhere(disk: &Disk) {
    let mut model = contents(disk);
    let mut write = |offset: u64, bytes: u64| {
        disk.write(offset, &marks(bytes)).unwrap();
        model[offset as usize..(offset + bytes) as usize].copy_from_slice(&marks(bytes));
    };
    write(0, 4096);
    write(100_000, 5000);
    write(100, 50);
    write(511, 2);
    write(65536 - 16, 32);
    write(300_000, 300_000);
    write(300_700, 100);
    write(SIZE_BYTES - 512, 512);
    for (offset, bytes) in [(2000, 100), (310_000, 70_000), (131072, 65536)] {
        disk.write_zeroes(offset, bytes, true).unwrap();
        model[offset as usize..(offset + bytes) as usize].fill(0);
    }
    disk.flush().unwrap();
    assert!(contents(disk) == model);
}

#[test]
fn no_plain_text_reaches_a_volume() {
    let file = new_luks();
    let disk = open(&file, Format::Luks, key("one")).unwrap();
    write_everywhere(&disk);
    disk.discard(0, SIZE_BYTES).unwrap();
    assert_eq!(disk.extent(0, SIZE_BYTES).unwrap().extent.kind, ExtentKind::Data);
    disk.resize(2 * SIZE_BYTES, false, Preallocation::Full).unwrap();
    disk.write(SIZE_BYTES + 7, &marks(1000)).unwrap();
    assert_sealed(&file, "luks");
}

#[test]
fn no_plain_text_reaches_a_qcow2_image() {
    let base = Qcow2Create::default();
    for create in [
        base.clone(),
        Qcow2Create { cluster_bits: 9, ..base.clone() },
        Qcow2Create { cluster_bits: 14, extended_l2: true, ..base.clone() },
        Qcow2Create { version: 2, cluster_bits: 12, ..base.clone() },
        Qcow2Create { preallocation: Preallocation::Metadata, ..base.clone() },
        Qcow2Create { preallocation: Preallocation::Full, version: 2, ..base.clone() },
    ] {
        let what = format!("{create:?}");
        let (file, version) = (new_qcow2(create), create_version(&what));
        let disk = open(&file, Format::Qcow2, key("one")).unwrap();
        assert!(contents(&disk).iter().all(|byte| *byte == 0), "{what}");
        write_everywhere(&disk);
        let image = disk.qcow2().unwrap();
        let time = SnapshotTime { date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
        image.create_snapshot("s", &time).unwrap();
        let state = marks(200_000);
        image.create_snapshot_with_state("m", &time, &mut &state[..]).unwrap();
        let mut read = vec![0; state.len()];
        assert_eq!(image.read_vm_state("m", 0, &mut read).unwrap(), state.len());
        assert!(read == state, "{what}");
        write_everywhere(&disk);
        image.apply_snapshot("s").unwrap();
        let before = contents(&disk);
        if version == 3 {
            for room in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
                let size = disk.size_bytes();
                disk.resize(size + 100_352, false, room).unwrap();
                assert!(contents(&disk)[size as usize..].iter().all(|byte| *byte == 0), "{what} {room:?}");
            }
            // A cluster that is cut short is written anew, with zeroes behind the end.
            disk.resize(SIZE_BYTES - 3584, true, Preallocation::Off).unwrap();
            disk.resize(SIZE_BYTES, false, Preallocation::Off).unwrap();
            assert!(contents(&disk)[..SIZE_BYTES as usize - 3584] == before[..SIZE_BYTES as usize - 3584], "{what}");
        }
        assert!(matches!(disk.pack(&marks(1 << 16), &mut Vec::new()), Err(BlockError::CompressedPlain { .. })));
        assert!(matches!(disk.write_packed(0, &[1; 100], 65536), Err(BlockError::CompressedPlain { .. })));
        drop(disk);
        let report = file.0.lock().unwrap().pages.check();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {:?}", report.findings);
        assert_sealed(&file, &what);
    }
}

fn create_version(what: &str) -> u32 {
    if what.contains("version: 2") { 2 } else { 3 }
}

#[test]
fn what_comes_from_below_is_encrypted_too() {
    let base = MemFile::default();
    base.0.lock().unwrap().pages.write(0, &marks(SIZE_BYTES));
    let backing = Some(("base".to_owned(), "raw".to_owned()));
    for version in [2, 3] {
        let top = new_qcow2(Qcow2Create { backing: backing.clone(), version, ..Qcow2Create::default() });
        let opts = OpenOptions { keys: vec![key("one")], ..OpenOptions::default() };
        let disk = Disk::open_backends(vec![top.layer(Format::Qcow2), base.layer(Format::Raw)], &opts).unwrap();
        disk.write(70_000, &[1; 10]).unwrap();
        disk.write_zeroes(200_000, 300, true).unwrap();
        disk.write_zeroes(262_144, 65_536, true).unwrap();
        let mut want = marks(SIZE_BYTES);
        want[70_000..70_010].fill(1);
        want[200_000..200_300].fill(0);
        want[262_144..327_680].fill(0);
        assert!(contents(&disk) == want, "{version}");
        if version == 3 {
            // Version 2 has no zeroes: they become data, in front of the backing file.
            disk.qcow2().unwrap().amend(&block::Amend { version: Some(2), ..block::Amend::default() }).unwrap();
            assert!(contents(&disk) == want);
        }
        // A copy into an encrypted image: by whatever way a copy moves bytes.
        let copies = [new_luks(), new_qcow2(Qcow2Create::default())];
        for (file, format) in copies.iter().zip([Format::Luks, Format::Qcow2]) {
            let target = open(file, format, key("one")).unwrap();
            block::copy(&disk, &target, &CopyOptions::default(), &|_, _| true).unwrap();
            assert!(contents(&target) == want);
            drop(target);
            assert_sealed(file, "a copy");
        }
        drop(disk);
        assert_sealed(&top, "an overlay");
    }
}

#[test]
fn guest_memory_is_never_encrypted_in_place() {
    for (file, format) in [(new_luks(), Format::Luks), (new_qcow2(Qcow2Create::default()), Format::Qcow2)] {
        let disk = open(&file, format, key("one")).unwrap();
        let mut ours = marks(20_000);
        let before = ours.clone();
        disk.write(12_345, &ours).unwrap();
        assert!(ours == before, "{format}");
        disk.read(12_345, &mut ours).unwrap();
        assert!(ours == before, "{format}");
    }
}

#[test]
fn keys_open_what_they_should() {
    let qcow2 = new_qcow2(Qcow2Create::default());
    for (file, format, parameter) in
        [(new_luks(), Format::Luks, "key-secret"), (qcow2, Format::Qcow2, "encrypt.key-secret")]
    {
        let refused = |key: LayerKey| open(&file, format, key).err().unwrap();
        assert!(matches!(refused(key("two")), BlockError::WrongKey { .. }));
        assert!(
            matches!(refused(LayerKey::None), BlockError::KeyNeeded { parameter: needed, .. } if needed == parameter)
        );
        assert_eq!(refused(LayerKey::None).kind(), ErrorKind::Unsupported);
        // Without a key the image can be described, and no data read or written.
        let disk = open(&file, format, LayerKey::Closed).unwrap();
        assert_eq!(disk.size_bytes(), SIZE_BYTES);
        let closed = disk.write(0, &[0; 512]).unwrap_err();
        assert!(matches!(closed, BlockError::Closed { .. }), "{closed}");
        if format == Format::Luks {
            assert!(matches!(disk.read(0, &mut [0; 512]), Err(BlockError::Closed { .. })));
        }
        assert_eq!(format!("{:?}", key("one")), "Passphrase(Passphrase)");
    }
    // A layer that is not encrypted has no use for a key.
    let plain = MemFile::default();
    plain.set_len_bytes(SIZE_BYTES).unwrap();
    assert!(open(&plain, Format::Raw, key("one")).is_ok());
}

#[test]
fn a_discard_of_an_image_with_clusters_frees_them() {
    let file = new_qcow2(Qcow2Create::default());
    let opts = OpenOptions { keys: vec![key("one")], discard: Discard::Unmap, ..OpenOptions::default() };
    let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &opts).unwrap();
    disk.write(0, &marks(3 << 16)).unwrap();
    disk.discard(0, 1 << 16).unwrap();
    assert_eq!(disk.extent(0, 1 << 16).unwrap().extent.kind, ExtentKind::Below);
    let there = disk.extent(1 << 16, 1 << 16).unwrap().extent;
    // Who is told no place in the file cannot take ciphertext for data.
    assert_eq!((there.kind, there.host), (ExtentKind::Data, None));
}

/// The disk that a passphrase opens, as it was.
fn opens(pages: &Pages, format: Format, text: &str, want: &[u8]) -> bool {
    match open(&MemFile::of(pages.clone()), format, key(text)) {
        Ok(disk) => {
            let mut read = vec![0; want.len()];
            disk.read(0, &mut read).unwrap();
            assert!(read == want, "the data changed");
            true
        }
        Err(BlockError::WrongKey { .. }) => false,
        Err(error) => panic!("{error:?}"),
    }
}

fn activate(text: &str, slot: Option<usize>) -> KeySlotChange {
    KeySlotChange::Activate { slot, passphrase: passphrase(text), iter_time_ms: 0 }
}

fn deactivate(text: Option<&str>, slot: Option<usize>) -> KeySlotChange {
    KeySlotChange::Deactivate { slot, passphrase: text.map(passphrase) }
}

#[test]
fn a_power_cut_never_loses_the_last_passphrase() {
    let data = marks(4096);
    let file = new_qcow2(Qcow2Create::default());
    open(&file, Format::Qcow2, key("one")).unwrap().write(0, &data).unwrap();
    // Each change with whom it must not lock out at any time, and who opens the image at its end.
    let changes: [(KeySlotChange, &str, &[&str], &[&str]); 6] = [
        (activate("two", None), "one", &["one"], &["one", "two"]),
        (activate("three", Some(6)), "one", &["one", "two"], &["one", "two", "three"]),
        (deactivate(Some("two"), None), "one", &["one", "three"], &["one", "three"]),
        (deactivate(None, Some(0)), "three", &["three"], &["three"]),
        // The only slot is overwritten: somebody is let in all the time.
        (activate("four", Some(6)), "three", &[], &["four"]),
        (activate("five", Some(7)), "four", &["four"], &["four", "five"]),
    ];
    for (change, with, kept, end) in &changes {
        file.0.lock().unwrap().log.clear();
        let start = file.0.lock().unwrap().pages.clone();
        let image = Qcow2Image::open_backend(file.layer(Format::Qcow2), false).unwrap();
        image.change_key_slots(&key(with), change, true).unwrap();
        drop(image);
        let log = file.0.lock().unwrap().log.clone();
        every_cut(&start, &log, &mut |torn, what, _| {
            for text in *kept {
                assert!(opens(torn, Format::Qcow2, text, &data), "{change:?}: {what}: {text} is locked out");
            }
            let anybody = [*with].iter().chain(*end).any(|text| opens(torn, Format::Qcow2, text, &data));
            assert!(anybody, "{change:?}: {what}: everybody is locked out");
        });
        let now = file.0.lock().unwrap().pages.clone();
        for text in ["one", "two", "three", "four", "five"] {
            assert_eq!(opens(&now, Format::Qcow2, text, &data), end.contains(&text), "{change:?}: {text}");
        }
    }
}

#[test]
fn erased_key_material_is_gone() {
    let file = new_luks();
    let material = |file: &MemFile| {
        let mut bytes = vec![0; 256_000];
        file.0.lock().unwrap().pages.read(4096, &mut bytes);
        bytes
    };
    let before = material(&file);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.luks");
    file.0.lock().unwrap().pages.store(&path);
    let change = |with: &str, change: &KeySlotChange| {
        let top = block::open_alone(&path, Some(Format::Luks), false, true).unwrap();
        block::change_key_slots(top, &key(with), change, false)
    };
    change("one", &activate("two", None)).unwrap();
    change("two", &deactivate(None, Some(0))).unwrap();
    let after = material(&MemFile::of(Pages::load(&path)));
    let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
    assert!(same < 2000, "{same} bytes of 256000 are as they were");
    for (bad, want) in [
        (deactivate(None, Some(1)), "Attempt to erase the only active keyslot 1"),
        (deactivate(Some("two"), None), "All the active keyslots match"),
        (deactivate(Some("one"), None), "No keyslots match"),
        (deactivate(None, Some(8)), "Invalid keyslot 8"),
        (activate("x", Some(8)), "Invalid keyslot 8"),
        (activate("x", Some(1)), "Refusing to overwrite active keyslot 1"),
    ] {
        let error = change("two", &bad).unwrap_err();
        let BlockError::KeySlot { source, .. } = &error else { panic!("{error:?}") };
        assert!(source.to_string().starts_with(want), "{source}");
    }
    assert!(matches!(change("one", &activate("x", None)), Err(BlockError::WrongKey { .. })));
}

#[test]
fn hostile_volumes_are_refused_before_they_cost_anything() {
    let good = new_luks().0.lock().unwrap().pages.clone();
    // Offset, bytes and what the refusal says.
    for (offset, bytes, want) in [
        (164, &u32::MAX.to_be_bytes()[..], "mk-digest-iter"),
        (212, &u32::MAX.to_be_bytes(), "iterations"),
        (252, &u32::MAX.to_be_bytes(), "stripes"),
        (248, &u32::MAX.to_be_bytes(), "overlaps with the encrypted payload"),
        (248, &520u32.to_be_bytes(), "overlaps with the material of keyslot"),
        (248, &1u32.to_be_bytes(), "overlaps with the LUKS header"),
        (108, &u32::MAX.to_be_bytes(), "key-bytes"),
        (104, &u32::MAX.to_be_bytes(), "room"),
        (104, &0u32.to_be_bytes(), "apart from the data"),
        (8, b"serpent\0", "serpent"),
    ] {
        let mut bad = good.clone();
        bad.write(offset, bytes);
        let error = open(&MemFile::of(bad), Format::Luks, key("one")).err().unwrap();
        let text =
            format!("{error:?} {error} {}", std::error::Error::source(&error).map_or(String::new(), |e| e.to_string()));
        assert!(text.contains(want), "{offset}: {text}");
    }
    for len in [0, 100, 591, 592, 5000, 2_068_479] {
        let mut cut = good.clone();
        cut.len = len;
        assert!(open(&MemFile::of(cut), Format::Luks, key("one")).is_err(), "{len}");
    }
    // The pointer of a qcow2 image to its header: past the end of the file, short, or onto guest data.
    let file = new_qcow2(Qcow2Create::default());
    let image = file.0.lock().unwrap().pages.clone();
    let mut header = vec![0; 256];
    image.read(0, &mut header);
    let at = header.windows(4).position(|w| w == 0x0537_be77u32.to_be_bytes()).unwrap() as u64 + 8;
    for (offset, length) in
        [(1u64 << 40, 2_068_480u64), (0x4_0000, 592), (0x4_0000, 1), (0x1_0000, 2_068_480), (0, 1), (0x4_0000, 1 << 50)]
    {
        let mut bad = image.clone();
        bad.write(at, &[offset.to_be_bytes(), length.to_be_bytes()].concat());
        assert!(open(&MemFile::of(bad), Format::Qcow2, key("one")).is_err(), "{offset:#x} {length}");
    }
}

#[test]
fn parts_of_sectors_written_at_once_keep_each_other() {
    let spec = CipherSpec { mode: CipherMode::Cbc, ..CipherSpec::default() };
    let file = MemFile::default();
    create_luks(&file, Path::new("memory"), SIZE_BYTES, &LuksCreate { cipher: spec, ..luks() }, Preallocation::Off)
        .unwrap();
    let disk = open(&file, Format::Luks, key("one")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..200u64 {
                    // 100 bytes of each sector and the next, no two threads in the same bytes.
                    let at = round * 1000 + u64::from(thread) * 250;
                    disk.write(at, &[thread + 1; 250]).unwrap();
                }
            });
        }
    });
    let all = contents(&disk);
    for (at, byte) in all.iter().take(200_000).enumerate() {
        assert_eq!(usize::from(*byte), at % 1000 / 250 + 1, "{at}");
    }
}
