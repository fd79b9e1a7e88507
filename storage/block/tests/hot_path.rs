//! What a request costs when its tables are cached: no memory is allocated, and many share a system call where a ring
//! carries them out. The counting allocator is the
//! reason why this is a test of its own, with one test function.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Begun, CacheMode, ChainFile, Disk, Format, OpenOptions, Qcow2Create, Ring, create_qcow2, use_direct_io};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system allocator unchanged; only a counter is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps GlobalAlloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps GlobalAlloc's contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn reads_and_overwrites_of_allocated_clusters_cost_little() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    create_qcow2(&image, 64 << 20, &Qcow2Create::default()).unwrap();
    let disk = support::open_chain(&[(&image, Format::Qcow2)], &OpenOptions::default());
    disk.write(0, &vec![1; 8 << 20]).unwrap();
    disk.flush().unwrap();
    let mut memory = vec![0u8; 64 << 10];
    let pieces: Vec<VolatileSlice<'_>> = memory.chunks_mut(4096).map(VolatileSlice::from).collect();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for i in 0..1000u64 {
        let offset = i * 7919 % 1900 * 4096;
        let request = if i % 10 == 0 { &pieces[..] } else { &pieces[..1] };
        disk.read_at(offset, request).unwrap();
        disk.write_at(offset, request).unwrap();
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    drop(disk);
    many_at_once(&image);
}

/// 32 requests at once, each replaced by another when it is over.
fn many_at_once(image: &Path) {
    const DEPTH: u64 = 32;
    const REQUESTS: u64 = 4096;
    let file = support::open_file(image, true);
    use_direct_io(&file).unwrap();
    let file = ChainFile { file, path_label: image.into(), format: Format::Qcow2, extents: Vec::new() };
    let disk = Disk::open(vec![file], &OpenOptions { cache: CacheMode::None, ..OpenOptions::default() }).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), (DEPTH * 4096) as usize)]).unwrap();
    let mut ring = Ring::new(DEPTH as u16, memory.clone()).unwrap();
    let begin = |ring: &mut Ring<()>, i: u64, tag: u64| {
        let slice = memory.get_slice(GuestAddress(tag * 4096), 4096).unwrap();
        let offset = i * 7919 % 1900 * 4096;
        let begun = match i % 2 {
            0 => ring.read(&disk, offset, &[slice], tag),
            _ => ring.write(&disk, offset, &[slice], tag),
        };
        assert_eq!(begun, Begun::UnderWay);
    };
    disk.read(0, &mut [0; 4096]).unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..DEPTH).for_each(|tag| begin(&mut ring, tag, tag));
    ring.submit().unwrap();
    assert_eq!(ring.calls(), 1, "all that was begun is handed over at once");
    let mut begun = DEPTH;
    while ring.under_way() > 0 {
        ring.wait().unwrap();
        while let Some(over) = ring.next_over(&disk) {
            assert!(over.good);
            if begun < REQUESTS {
                begin(&mut ring, begun, over.tag);
                begun += 1;
            }
        }
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    eprintln!("{REQUESTS} requests, {DEPTH} at once: {} system calls", ring.calls());
}
