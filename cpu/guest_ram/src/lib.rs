//! Guest memory: regions that devices, KVM and the software CPU look at together.
//!
//! Devices use it through `vm-memory` ([`GuestRam::memory`]); KVM and the software CPU ask for host addresses
//! ([`GuestRam::regions`], [`GuestRam::host_page`]). Every write made through `vm-memory` passes
//! [`PageMarks::mark_dirty`](vm_memory::bitmap::Bitmap::mark_dirty): one load per page while nobody watches, and the
//! hook by which a device's write reaches a software CPU that has decoded the page.
//!
//! Memory is anonymous and aligned to 2 MiB, so that the host backs it with huge pages: a boot under KVM takes a tenth of the
//! nested page faults that memfd pages of 4 KiB cost, and the software CPU misses the host's TLB less often.
//!
//! `unsafe` is confined to `mapping`. Invariant: this crate does not know who uses the memory.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod mapping;
mod marks;

pub use marks::{CodeWatcher, MARK_CODE, MarksSlice, PageMarks};
pub use vm_memory;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Guest pages are 4 KiB everywhere in this crate.
pub const PAGE_BYTES: u64 = 4096;

/// A guest-physical address, in bytes from the start of the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(pub u64);

impl std::fmt::Display for Gpa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The `vm-memory` view that devices and virtqueues take.
pub type Memory = GuestMemoryMmap<PageMarks>;

/// Why guest memory could not be created or reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A region is empty, unaligned or overlaps another.
    #[error("guest memory region at {gpa} of {bytes} bytes must be 4 KiB aligned, not empty and overlap no other")]
    Layout {
        /// Start of the refused region.
        gpa: Gpa,
        /// Its size.
        bytes: u64,
    },
    /// The host refused the memory.
    #[error("the host cannot provide {bytes} bytes of guest memory: give the domain less memory or free some")]
    Host {
        /// Size of the whole guest.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Bytes outside every region.
    #[error("guest address {gpa} (+{bytes} bytes) is not guest memory")]
    Outside {
        /// First byte asked for.
        gpa: Gpa,
        /// Number of bytes asked for.
        bytes: usize,
    },
}

/// One contiguous piece of guest memory as the engines see it.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    /// First guest-physical byte.
    pub gpa: Gpa,
    /// Length, a multiple of 4 KiB.
    pub bytes: u64,
    /// Where this process sees it. Valid while the [`GuestRam`] it came from (or a clone) lives.
    pub host: *mut u8,
}

/// All memory of one guest. Clones share it; it is unmapped with the last clone.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: Memory,
}

impl GuestRam {
    /// Creates zeroed guest memory with the given regions, `(start, bytes)` in ascending order. Pages are taken from the host
    /// when first touched. `Layout`: a region is refused, nothing was created.
    pub fn new(layout: &[(Gpa, u64)]) -> Result<GuestRam, RamError> {
        let mut total = 0u64;
        let mut end = 0u64;
        for &(gpa, bytes) in layout {
            let aligned = gpa.0 % PAGE_BYTES == 0 && bytes % PAGE_BYTES == 0 && bytes != 0;
            let next = gpa.0.checked_add(bytes);
            match next {
                Some(next) if aligned && gpa.0 >= end => end = next,
                _ => return Err(RamError::Layout { gpa, bytes }),
            }
            total = total.checked_add(bytes).ok_or(RamError::Layout { gpa, bytes })?;
        }
        let host_error = |source: std::io::Error| RamError::Host { bytes: total, source };
        let mut regions = Vec::with_capacity(layout.len());
        for &(gpa, bytes) in layout {
            let mapping = mapping::map(gpa, bytes).map_err(host_error)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(gpa.0)).ok_or(RamError::Layout { gpa, bytes })?;
            regions.push(region);
        }
        let memory = Memory::from_regions(regions).map_err(|e| host_error(std::io::Error::other(e)))?;
        Ok(GuestRam { memory })
    }

    /// The view that virtqueues and DMA use.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Size of all regions together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.memory.iter().map(|r| r.len()).sum()
    }

    /// Bytes of it that the host holds in memory now. Costs a byte per page and one call per region.
    pub fn resident_bytes(&self) -> u64 {
        self.memory.iter().map(|r| GuestMemoryRegion::bitmap(r).marks().resident_bytes()).sum()
    }

    /// The regions in ascending order of guest address.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.memory.iter().map(|r| RamRegion { gpa: Gpa(r.start_addr().0), bytes: r.len(), host: r.as_ptr() })
    }

    /// Host address of the 4 KiB page that holds `gpa` and the marks of its region with the page's index in them;
    /// `None` where there is no memory. The address is valid while this `GuestRam` or a clone lives.
    pub fn host_page(&self, gpa: Gpa) -> Option<(*mut u8, &PageMarks, usize)> {
        let region = self.memory.find_region(GuestAddress(gpa.0))?;
        let offset = (gpa.0 - region.start_addr().0) & !(PAGE_BYTES - 1);
        let page = region.as_ptr().wrapping_add(offset as usize);
        Some((page, GuestMemoryRegion::bitmap(region).marks(), (offset / PAGE_BYTES) as usize))
    }

    /// Registers who is told when a page marked [`MARK_CODE`] is written through `vm-memory`.
    pub fn watch_code(&self, watcher: Arc<dyn CodeWatcher>) {
        for region in self.memory.iter() {
            GuestMemoryRegion::bitmap(region).marks().watch(watcher.clone());
        }
    }

    /// Copies guest memory into `buf`. `Outside`: some byte is not memory; `buf` may hold part of the data.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), RamError> {
        let bytes = buf.len();
        self.memory.read_slice(buf, GuestAddress(gpa.0)).map_err(|_| RamError::Outside { gpa, bytes })
    }

    /// Copies `buf` into guest memory. `Outside`: some byte is not memory; part of the data may have been written.
    pub fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), RamError> {
        self.memory.write_slice(buf, GuestAddress(gpa.0)).map_err(|_| RamError::Outside { gpa, bytes: buf.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn refuses_bad_layouts() {
        for layout in [
            vec![(Gpa(0), 0)],
            vec![(Gpa(1), 4096)],
            vec![(Gpa(0), 100)],
            vec![(Gpa(0), 8192), (Gpa(4096), 4096)],
            vec![(Gpa(u64::MAX - 4095), 8192)],
        ] {
            assert!(matches!(GuestRam::new(&layout), Err(RamError::Layout { .. })), "{layout:?}");
        }
    }

    #[test]
    fn reads_back_what_was_written_in_two_regions() {
        let ram = GuestRam::new(&[(Gpa(0), 8192), (Gpa(0x10_0000), 4096)]).unwrap();
        ram.write(Gpa(0x10_0ff0), &[7; 16]).unwrap();
        let mut back = [0; 16];
        ram.read(Gpa(0x10_0ff0), &mut back).unwrap();
        assert_eq!(back, [7; 16]);
        assert!(matches!(ram.write(Gpa(0x10_0ff1), &[7; 16]), Err(RamError::Outside { .. })));
        assert!(ram.host_page(Gpa(0x2000)).is_none());
        assert_eq!(ram.bytes(), 12288);
        assert_eq!(ram.resident_bytes() % 4096, 0);
        assert!(ram.resident_bytes() >= 4096);
    }

    #[derive(Default)]
    struct Seen(Mutex<Vec<u64>>);
    impl CodeWatcher for Seen {
        fn code_written(&self, page: Gpa) {
            self.0.lock().unwrap().push(page.0);
        }
    }

    #[test]
    fn a_write_tells_the_watcher_of_code_pages_only() {
        let ram = GuestRam::new(&[(Gpa(0x10_0000), 0x4000)]).unwrap();
        let seen = Arc::new(Seen::default());
        ram.watch_code(seen.clone());
        let (_, marks, index) = ram.host_page(Gpa(0x10_2abc)).unwrap();
        marks.set(index, MARK_CODE);
        ram.write(Gpa(0x10_0000), &[1; 0x2000]).unwrap();
        assert!(seen.0.lock().unwrap().is_empty());
        ram.write(Gpa(0x10_1fff), &[1; 2]).unwrap();
        assert_eq!(*seen.0.lock().unwrap(), [0x10_2000]);
    }
}
