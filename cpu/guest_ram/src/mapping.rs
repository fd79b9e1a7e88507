//! Anonymous memory at an address that suits huge pages.

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionBuilder;

use crate::{Gpa, PageMarks};

/// The size of a huge page on x86-64.
const HUGE_BYTES: u64 = 2 << 20;

/// A mapping of our own, unmapped when dropped.
pub(crate) struct Mapping {
    address: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: an address range without references into it; all access goes through volatile or single-instruction accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and with the last holder of the marks nobody can reach it any more.
        let _ = unsafe { munmap(self.address.as_ptr(), self.bytes) };
    }
}

impl Mapping {
    /// Bytes that the host holds in memory now.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let pages = self.bytes / crate::PAGE_BYTES as usize;
        let mut present = vec![0u8; pages];
        // SAFETY: the range is ours and mapped, and the vector has a byte for each of its pages.
        let failed = unsafe { libc::mincore(self.address.as_ptr(), self.bytes, present.as_mut_ptr()) } != 0;
        if failed { 0 } else { present.iter().filter(|&&p| p & 1 != 0).count() as u64 * crate::PAGE_BYTES }
    }
}

/// Maps `bytes` of zeroed memory for a region at `gpa`. Host and guest address are equal modulo 2 MiB, which is what lets KVM
/// map a huge page of the host as one of the guest.
pub(crate) fn map(gpa: Gpa, bytes: u64) -> io::Result<MmapRegion<PageMarks>> {
    let reserve = usize::try_from(bytes.saturating_add(HUGE_BYTES)).map_err(io::Error::other)?;
    let bytes_usize = bytes as usize;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), reserve, prot, flags)? } as u64;
    let wanted = start + (gpa.0.wrapping_sub(start) & (HUGE_BYTES - 1));
    let (before, after) = ((wanted - start) as usize, (start + HUGE_BYTES - wanted) as usize);
    let at = wanted as *mut c_void;
    let address = NonNull::new(at).ok_or_else(|| io::Error::other("the kernel mapped memory at 0"))?;
    // SAFETY: both pieces lie inside the mapping made above and nobody knows of them.
    unsafe {
        if before != 0 {
            munmap(start as *mut c_void, before)?;
        }
        if after != 0 {
            munmap((wanted + bytes) as *mut c_void, after)?;
        }
        // Without huge pages everything works, only slower.
        let _ = madvise(at, bytes_usize, Advice::LinuxHugepage);
    }
    let marks = PageMarks::new(Mapping { address, bytes: bytes_usize }, gpa, bytes);
    // SAFETY: the range is mapped readable and writable, and stays so while the marks (which the region holds) live.
    let builder = unsafe { MmapRegionBuilder::new_with_bitmap(bytes_usize, marks).with_raw_mmap_pointer(at.cast()) };
    builder.with_mmap_prot(prot.bits() as i32).with_mmap_flags(flags.bits() as i32).build().map_err(io::Error::other)
}
