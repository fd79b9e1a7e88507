//! What a request costs when its tables are cached: no memory is allocated. The counting allocator is the
//! reason why this is a test of its own, with one test function.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Format, OpenOptions, Qcow2Create, create_qcow2};
use vm_memory::VolatileSlice;

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
fn reads_and_overwrites_of_allocated_clusters_allocate_nothing() {
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
}
