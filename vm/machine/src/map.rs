//! Who answers which port and which address: immutable tables, replaced as a whole when a window moves.

use std::sync::Arc;

use hv_core::{Doorbell, Gpa, MmioDevice, PortDevice, Space, TimedDevice};
use parking_lot::Mutex;
use pci::{SharedFunction, Window};

/// A port device with deadlines.
pub(crate) trait TimedPort: PortDevice + TimedDevice {}
impl<D: PortDevice + TimedDevice> TimedPort for D {}
/// A memory device with deadlines.
pub(crate) trait TimedMmio: MmioDevice + TimedDevice {}
impl<D: MmioDevice + TimedDevice> TimedMmio for D {}

/// Who answers a port.
#[derive(Clone)]
pub(crate) enum PortTarget {
    /// A chip with byte-wide registers: wider accesses are split.
    Bytes(Arc<Mutex<dyn PortDevice>>),
    /// The same, with deadlines in the given slot.
    TimedBytes(Arc<Mutex<dyn TimedPort>>, usize),
    /// A chip that takes every width, with deadlines in the given slot.
    TimedWide(Arc<Mutex<dyn TimedPort>>, usize),
    /// Configuration address and data.
    PciConfig,
    /// A port window of a function.
    Window(SharedFunction, Window),
}

/// Who answers a memory range.
#[derive(Clone)]
pub(crate) enum MmioTarget {
    Chip(Arc<Mutex<dyn MmioDevice>>),
    Timed(Arc<Mutex<dyn TimedMmio>>, usize),
    Ecam,
    Window(SharedFunction, u8),
}

/// A memory range and who answers it.
#[derive(Clone)]
pub(crate) struct MmioRange {
    pub(crate) start: u64,
    /// First address after the range.
    pub(crate) end: u64,
    pub(crate) target: MmioTarget,
}

/// The tables.
pub(crate) struct Map {
    /// Index into `port_targets` plus one, by port; 0: a hole.
    port_index: Box<[u8]>,
    port_targets: Vec<PortTarget>,
    mmio: Vec<MmioRange>,
    doorbells: Vec<Doorbell>,
}

impl Map {
    pub(crate) fn new() -> Map {
        Map {
            port_index: vec![0; 65536].into_boxed_slice(),
            port_targets: Vec::new(),
            mmio: Vec::new(),
            doorbells: Vec::new(),
        }
    }

    /// Gives ports to `target`. Ports that are taken stay with whoever has them.
    pub(crate) fn add_ports(&mut self, first: u16, count: u16, target: PortTarget) {
        self.port_targets.push(target);
        let Ok(index) = u8::try_from(self.port_targets.len()) else { return };
        let first = usize::from(first);
        if let Some(ports) = self.port_index.get_mut(first..(first + usize::from(count)).min(65536)) {
            ports.iter_mut().filter(|p| **p == 0).for_each(|p| *p = index);
        }
    }

    /// Adds a memory range. One that overlaps an earlier one is left out: real hardware would answer twice.
    pub(crate) fn add_mmio(&mut self, start: u64, bytes: u64, target: MmioTarget) {
        let end = start.saturating_add(bytes);
        let at = self.mmio.partition_point(|r| r.end <= start);
        if self.mmio.get(at).is_none_or(|next| end <= next.start) {
            self.mmio.insert(at, MmioRange { start, end, target });
        }
    }

    /// Sets the doorbells.
    pub(crate) fn set_doorbells(&mut self, mut doorbells: Vec<Doorbell>) {
        doorbells.sort_by_key(|d| d.address.0);
        self.doorbells = doorbells;
    }

    #[inline]
    pub(crate) fn port(&self, port: u16) -> Option<&PortTarget> {
        let index = usize::from(*self.port_index.get(usize::from(port))?);
        self.port_targets.get(index.checked_sub(1)?)
    }

    #[inline]
    pub(crate) fn mmio(&self, gpa: Gpa) -> Option<&MmioRange> {
        let at = self.mmio.partition_point(|r| r.end <= gpa.0);
        self.mmio.get(at).filter(|r| r.start <= gpa.0)
    }

    /// Doorbells that a write of `bytes` with `value` rings.
    #[inline]
    pub(crate) fn rung(&self, space: Space, gpa: u64, bytes: u8, value: u64) -> impl Iterator<Item = &Doorbell> {
        let at = self.doorbells.partition_point(|d| d.address.0 < gpa);
        let here = self.doorbells.get(at..).unwrap_or(&[]).iter().take_while(move |d| d.address.0 == gpa);
        here.filter(move |d| {
            d.space == space && (d.bytes == 0 || d.bytes == bytes) && d.value.is_none_or(|want| want == value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl MmioDevice for Nothing {
        fn read(&mut self, _offset: u64, _bytes: u8) -> u64 {
            0
        }
        fn write(&mut self, _offset: u64, _bytes: u8, _value: u64) {}
    }

    #[test]
    fn ranges_are_found_by_any_byte_and_do_not_overlap() {
        let mut map = Map::new();
        let chip = || MmioTarget::Chip(Arc::new(Mutex::new(Nothing)));
        map.add_mmio(0x3000, 0x1000, chip());
        map.add_mmio(0x1000, 0x1000, chip());
        map.add_mmio(0x3800, 0x1000, chip());
        map.add_mmio(0x2800, 0x1000, chip());
        map.add_mmio(0x2000, 0x1000, chip());
        map.add_mmio(u64::MAX - 0xfff, 0x1000, chip());
        let start = |gpa| map.mmio(Gpa(gpa)).map(|r| r.start);
        let want = [
            (0xfff, None),
            (0x1000, Some(0x1000)),
            (0x2fff, Some(0x2000)),
            (0x3fff, Some(0x3000)),
            (0x4000, None),
            (0x4100, None),
        ];
        for (gpa, range) in want {
            assert_eq!(start(gpa), range, "{gpa:#x}");
        }
    }

    #[test]
    fn the_first_owner_of_a_port_keeps_it() {
        let mut map = Map::new();
        map.add_ports(0x10, 4, PortTarget::PciConfig);
        assert!(map.port(0xf).is_none() && map.port(0x10).is_some() && map.port(0x13).is_some());
        map.add_ports(0xfff0, 0xffff, PortTarget::PciConfig);
        assert!(map.port(0xffff).is_some());
    }
}
