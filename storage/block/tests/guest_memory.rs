//! Requests with guest memory, over files of the host: scattered buffers, dirty tracking, `O_DIRECT`.

mod support;

use std::path::Path;

use block::{
    CacheMode, ChainFile, DetectZeroes, Disk, ErrorKind, Format, OpenOptions, Qcow2Create, create_qcow2, create_raw,
    use_direct_io,
};
use support::{Rng, contents, open_chain, qemu_img};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

fn guest(bytes: usize) -> GuestMemoryMmap<AtomicBitmap> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

#[test]
fn scattered_guest_memory_goes_both_ways_and_reads_mark_it_dirty() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    create_qcow2(&image, 4 << 20, &Qcow2Create::default()).unwrap();
    let disk = open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
    let ram = guest(1 << 20);
    ram.write_slice(&[0x5a; 4096], GuestAddress(0x1000)).unwrap();
    ram.write_slice(&[0x7b; 512], GuestAddress(0x8200)).unwrap();
    let at = |gpa: u64, len: usize| ram.get_slice(GuestAddress(gpa), len).unwrap();
    // The request crosses a cluster boundary inside its first piece.
    disk.write_at(65536 - 512, &[at(0x1000, 4096), at(0x8200, 512)]).unwrap();
    let (one, two) = (at(0x2_0000, 512), at(0x3_0000, 4096));
    assert!(!two.bitmap().dirty_at(0));
    disk.read_at(65536 - 512, &[one, two]).unwrap();
    assert!(one.bitmap().dirty_at(0) && two.bitmap().dirty_at(0));
    let mut got = [0u8; 4608];
    one.copy_to(&mut got[..512]);
    two.copy_to(&mut got[512..]);
    assert!(got[..4096].iter().all(|b| *b == 0x5a) && got[4096..].iter().all(|b| *b == 0x7b));
    let outside = disk.read_at((4 << 20) - 512, &[at(0, 1024)]).unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::OutOfRange);
    assert_eq!(disk.write(u64::MAX - 100, &[0; 512]).unwrap_err().kind(), ErrorKind::OutOfRange);
    let counters = disk.counters();
    assert_eq!((counters.reads, counters.read_bytes, counters.writes, counters.written_bytes), (1, 4608, 1, 4608));
    assert!(counters.allocated_bytes >= 2 * 65536);
}

#[test]
fn more_pieces_than_one_system_call_takes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    create_raw(&image, 4 << 20).unwrap();
    let disk = open_chain(&[(&image, Format::Raw)], &OpenOptions { format: Format::Raw, ..OpenOptions::default() });
    let mut memory: Vec<u8> = (0..2000 * 512).map(|i| (i / 512) as u8).collect();
    let want = memory.clone();
    let pieces: Vec<VolatileSlice<'_>> = memory.chunks_mut(512).map(VolatileSlice::from).collect();
    disk.write_at(0, &pieces).unwrap();
    let mut got = vec![0; want.len()];
    disk.read(0, &mut got).unwrap();
    assert!(got == want);
}

/// Opens for direct I/O, or says why the test cannot run here (tmpfs before Linux 6.6 has none).
fn open_direct(path: &Path) -> Option<std::fs::File> {
    let file = support::open_file(path, true);
    let direct = use_direct_io(&file);
    if let Err(error) = &direct {
        eprintln!("skipped: {} has no direct I/O: {error}", path.display());
    }
    direct.ok().map(|()| file)
}

#[test]
fn direct_files_take_requests_of_any_alignment() {
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let image = dir.path().join(format.name());
        let size = (2 << 20) + 512 * 3;
        match format {
            Format::Raw => create_raw(&image, size).unwrap(),
            _ => create_qcow2(&image, size, &Qcow2Create { cluster_bits: 9, ..Qcow2Create::default() }).unwrap(),
        }
        let Some(file) = open_direct(&image) else { return };
        let opts = OpenOptions { format, cache: CacheMode::None, ..OpenOptions::default() };
        let disk = Disk::open(vec![ChainFile { file, path_label: image.clone(), format, extents: Vec::new() }], &opts)
            .unwrap();
        let mut shadow = vec![0; size as usize];
        let mut rng = Rng(11);
        for _ in 0..150 {
            let start = rng.below(size / 512 - 20) as usize * 512;
            let data = vec![rng.next() as u8; 512 * (1 + rng.below(20) as usize)];
            disk.write(start as u64, &data).unwrap();
            shadow[start..start + data.len()].copy_from_slice(&data);
        }
        disk.write(size - 512, &[9; 512]).unwrap();
        shadow[size as usize - 512..].fill(9);
        assert!(contents(&disk) == shadow, "{format}");
        drop(disk);
        if format == Format::Raw {
            assert_eq!(std::fs::metadata(&image).unwrap().len(), size, "padding must not lengthen the disk");
        }
        let flat = dir.path().join("shadow");
        std::fs::write(&flat, &shadow).unwrap();
        qemu_img(&["compare", "-f", format.name(), "-F", "raw", image.to_str().unwrap(), flat.to_str().unwrap()]);
    }
}

#[test]
fn raw_files_are_sparse_where_nothing_or_zeroes_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    create_raw(&image, 16 << 20).unwrap();
    let opts = OpenOptions { format: Format::Raw, detect_zeroes: DetectZeroes::Unmap, ..OpenOptions::default() };
    let disk = open_chain(&[(&image, Format::Raw)], &opts);
    disk.write(1 << 20, &vec![1; 8 << 20]).unwrap();
    disk.flush().unwrap();
    let full = disk.counters().allocated_bytes;
    assert!(full >= 8 << 20);
    disk.discard(1 << 20, 4 << 20).unwrap();
    disk.write(5 << 20, &vec![0; 2 << 20]).unwrap();
    assert!(disk.counters().allocated_bytes <= full - (6 << 20));
    let all = contents(&disk);
    assert!(all[..7 << 20].iter().all(|b| *b == 0) && all[7 << 20..9 << 20].iter().all(|b| *b == 1));
}
