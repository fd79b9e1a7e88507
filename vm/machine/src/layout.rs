//! The guest-physical address map of `vireo-q35-1`. These addresses are an ABI: a saved guest relies on them.

use guest_ram::{Gpa, PAGE_BYTES};

use crate::MachineError;

/// Name of the machine type.
pub const MACHINE_TYPE: &str = "vireo-q35-1";

/// Low memory ends here or below: what is more continues at 4 GiB.
pub const LOW_RAM_CAP: u64 = 0x8000_0000;
/// Memory that would reach this address (the ECAM window) is split at [`LOW_RAM_CAP`].
pub const LOW_RAM_LIMIT: u64 = 0xb000_0000;
/// Start of high memory.
pub const HIGH_RAM: u64 = 1 << 32;
/// The least memory a guest may have.
pub const MIN_RAM_BYTES: u64 = 32 << 20;

/// Memory BARs below 4 GiB.
pub const PCI_MEMORY: (u64, u64) = (0xc000_0000, 0xfec0_0000);
/// Port BARs.
pub const PCI_PORTS: (u64, u64) = (0xc000, 0x1_0000);
/// I/O APIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// HPET registers.
pub const HPET: u64 = 0xfed0_0000;
/// Local APIC registers, answered by the engine.
pub const LAPIC: u64 = 0xfee0_0000;

/// First byte of the extended BIOS data area: conventional memory ends here.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables, RSDP first; up to 1 MiB.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Memory a kernel may be loaded to.
pub const HIGH_LOAD: u64 = 0x10_0000;

/// Memory regions of a guest with `bytes` of memory, ascending.
pub fn ram_regions(bytes: u64) -> Result<Vec<(Gpa, u64)>, MachineError> {
    if bytes < MIN_RAM_BYTES || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MachineError::MemorySize { bytes, min_bytes: MIN_RAM_BYTES });
    }
    if bytes <= LOW_RAM_LIMIT {
        return Ok(vec![(Gpa(0), bytes)]);
    }
    Ok(vec![(Gpa(0), LOW_RAM_CAP), (Gpa(HIGH_RAM), bytes - LOW_RAM_CAP)])
}

/// What a range of the memory map is. The numbers are those of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// One entry of the memory map a guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map of a guest whose memory is `regions`.
pub fn memory_map(regions: &[(Gpa, u64)]) -> Vec<Range> {
    let range = |start, end: u64, kind| Range { start, bytes: end - start, kind };
    let low_end = regions.first().map_or(0, |&(_, bytes)| bytes);
    let mut map = vec![
        range(0, EBDA, RangeKind::Ram),
        range(EBDA, 0xa_0000, RangeKind::Reserved),
        range(ACPI_TABLES, HIGH_LOAD, RangeKind::Reserved),
        range(HIGH_LOAD, low_end, RangeKind::Ram),
        // Linux takes the ECAM only where the memory map reserves it.
        range(LOW_RAM_LIMIT, LOW_RAM_LIMIT + pci::host_bridge::ECAM_BYTES, RangeKind::Reserved),
    ];
    map.extend(regions.iter().skip(1).map(|&(Gpa(start), bytes)| range(start, start + bytes, RangeKind::Ram)));
    map
}

/// The first address after all memory, at least 4 GiB.
pub fn ram_top(regions: &[(Gpa, u64)]) -> u64 {
    regions.last().map_or(HIGH_RAM, |&(Gpa(start), bytes)| (start + bytes).max(HIGH_RAM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_only_where_it_would_reach_the_ecam() {
        let mib = |n: u64| n << 20;
        for (bytes, want) in [
            (mib(512), vec![(0, mib(512))]),
            (mib(2816), vec![(0, mib(2816))]),
            (mib(2817), vec![(0, mib(2048)), (1 << 32, mib(769))]),
            (mib(8192), vec![(0, mib(2048)), (1 << 32, mib(6144))]),
        ] {
            let want: Vec<(Gpa, u64)> = want.into_iter().map(|(g, b)| (Gpa(g), b)).collect();
            assert_eq!(ram_regions(bytes).unwrap(), want);
        }
        assert!(ram_regions(mib(31)).is_err() && ram_regions(mib(64) + 1).is_err());
    }

    #[test]
    fn the_map_is_ascending_and_covers_all_memory() {
        let regions = ram_regions(8 << 30).unwrap();
        let map = memory_map(&regions);
        assert!(map.windows(2).all(|w| w[0].start + w[0].bytes <= w[1].start));
        let ram: u64 = map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.bytes).sum();
        assert_eq!(ram, (8 << 30) - (HIGH_LOAD - EBDA));
    }
}
