//! Bus 0 and the two ways into configuration space: ports 0xcf8/0xcfc and the ECAM.

use hv_core::StateError;
use minicbor::{Decode, Encode};

use crate::SharedFunction;

const ENABLE: u32 = 1 << 31;

/// Saved state.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct RootStateV1 {
    /// Configuration address register.
    #[n(0)]
    pub address: u32,
}

/// The functions of bus 0. There are no others: every other bus reads as empty.
pub struct Root {
    functions: Vec<Option<SharedFunction>>,
    address: std::sync::atomic::AtomicU32,
}

impl Root {
    /// An empty bus.
    pub fn new() -> Root {
        Root { functions: vec![None; 256], address: 0.into() }
    }
    /// Puts `function` at `device` (0 to 31), `number` (0 to 7). False: the place is taken or does not exist.
    pub fn add(&mut self, device: u8, number: u8, function: SharedFunction) -> bool {
        match self.functions.get_mut(usize::from(device) * 8 + usize::from(number)) {
            Some(place) if place.is_none() && number < 8 => {
                *place = Some(function);
                true
            }
            _ => false,
        }
    }
    /// The functions there are, with device and function number, ascending.
    pub fn functions(&self) -> impl Iterator<Item = (u8, u8, &SharedFunction)> {
        let place = |i: usize| ((i / 8) as u8, (i % 8) as u8);
        self.functions.iter().enumerate().filter_map(move |(i, f)| f.as_ref().map(|f| (place(i).0, place(i).1, f)))
    }

    /// What a snapshot carries beside the functions.
    pub fn save(&self) -> RootStateV1 {
        let Root { functions: _, address } = self;
        RootStateV1 { address: address.load(std::sync::atomic::Ordering::Relaxed) }
    }
    /// Takes the address register of a saved state.
    pub fn restore(self, state: &RootStateV1) -> Result<Root, StateError> {
        Ok(Root { address: (state.address & ADDRESS_BITS).into(), ..self })
    }
    /// Back to the state after power-on, without the functions.
    pub fn reset(&self) {
        self.address.store(0, std::sync::atomic::Ordering::Relaxed);
    }

    fn read(&self, bus: u32, devfn: u32, offset: u32, bytes: u8) -> u32 {
        let place = if bus == 0 { self.functions.get(devfn as usize) } else { None };
        match place {
            Some(Some(function)) if offset < 256 => function.lock().config_read(offset as u8, bytes),
            _ => u32::MAX, // no function, or extended space of a conventional one
        }
    }
    fn write(&self, bus: u32, devfn: u32, offset: u32, bytes: u8, value: u32) -> bool {
        let place = if bus == 0 { self.functions.get(devfn as usize) } else { None };
        match place {
            Some(Some(function)) if offset < 256 => function.lock().config_write(offset as u8, bytes, value),
            _ => false,
        }
    }

    /// Port read, 0xcf8 to 0xcff. Only whole 32-bit accesses reach the address register. PCI 3.2.2.3.2
    pub fn port_read(&self, port: u16, bytes: u8) -> u32 {
        let address = self.address.load(std::sync::atomic::Ordering::Relaxed);
        match port {
            0xcf8 if bytes == 4 => address,
            0xcfc..=0xcff if address & ENABLE != 0 => {
                let (bus, devfn) = (address >> 16 & 0xff, address >> 8 & 0xff);
                self.read(bus, devfn, address & 0xfc | u32::from(port & 3), bytes)
            }
            _ => u32::MAX,
        }
    }
    /// Port write, 0xcf8 to 0xcff. True: windows have changed.
    pub fn port_write(&self, port: u16, bytes: u8, value: u32) -> bool {
        let address = self.address.load(std::sync::atomic::Ordering::Relaxed);
        match port {
            0xcf8 if bytes == 4 => {
                self.address.store(value & ADDRESS_BITS, std::sync::atomic::Ordering::Relaxed);
                false
            }
            0xcfc..=0xcff if address & ENABLE != 0 => {
                let (bus, devfn) = (address >> 16 & 0xff, address >> 8 & 0xff);
                self.write(bus, devfn, address & 0xfc | u32::from(port & 3), bytes, value)
            }
            _ => false,
        }
    }

    /// Read at `offset` of the ECAM window. PCIe 7.2.2
    pub fn ecam_read(&self, offset: u64, bytes: u8) -> u64 {
        let offset = offset as u32;
        match bytes {
            8 => self.ecam_read(offset.into(), 4) | self.ecam_read(u64::from(offset) + 4, 4) << 32,
            _ => self.read(offset >> 20 & 0xff, offset >> 12 & 0xff, offset & 0xfff, bytes).into(),
        }
    }
    /// Write at `offset` of the ECAM window. True: windows have changed.
    pub fn ecam_write(&self, offset: u64, bytes: u8, value: u64) -> bool {
        let at = offset as u32;
        match bytes {
            8 => self.ecam_write(offset, 4, value & 0xffff_ffff) | self.ecam_write(offset + 4, 4, value >> 32),
            _ => self.write(at >> 20 & 0xff, at >> 12 & 0xff, at & 0xfff, bytes, value as u32),
        }
    }
}

/// Enable, bus, device, function and double word; the rest reads 0.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl Default for Root {
    fn default() -> Self {
        Root::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_bridge::HostBridge;
    use parking_lot::Mutex;
    use std::sync::Arc;

    fn root() -> Root {
        let mut root = Root::new();
        assert!(root.add(0, 0, Arc::new(Mutex::new(HostBridge::new()))));
        assert!(!root.add(0, 0, Arc::new(Mutex::new(HostBridge::new()))));
        assert!(!root.add(32, 0, Arc::new(Mutex::new(HostBridge::new()))));
        root
    }

    #[test]
    fn the_port_pair_reaches_functions_in_every_width() {
        let root = root();
        root.port_write(0xcf8, 4, 0x8000_0003);
        assert_eq!(root.port_read(0xcf8, 4), 0x8000_0000);
        assert_eq!(root.port_read(0xcfc, 4), 0x29c0_8086);
        assert_eq!((root.port_read(0xcfe, 2), root.port_read(0xcff, 1)), (0x29c0, 0x29));
        assert_eq!(root.port_read(0xcf8, 2), u32::MAX);
        root.port_write(0xcf8, 4, 0);
        assert_eq!(root.port_read(0xcfc, 4), u32::MAX, "without the enable bit nothing is selected");
        for empty in [0x8000_0800, 0x8001_0000] {
            root.port_write(0xcf8, 4, empty);
            assert_eq!(root.port_read(0xcfc, 4), u32::MAX);
        }
        root.port_write(0xcf8, 4, 0x8000_0060);
        assert!(root.port_write(0xcfc, 4, 0xe000_0001));
        assert_eq!(root.restore(&RootStateV1 { address: 0x8000_0060 }).unwrap().port_read(0xcfc, 4), 0xe000_0001);
    }

    #[test]
    fn the_ecam_reaches_the_same_functions() {
        let root = root();
        assert_eq!(root.ecam_read(0, 4), 0x29c0_8086);
        assert_eq!(root.ecam_read(0x2c, 8), 0x1100_1af4);
        for empty in [0x100, 0x8000, 1 << 20] {
            assert_eq!(root.ecam_read(empty, 4), u64::from(u32::MAX), "{empty:#x}");
        }
        assert!(root.ecam_write(0x60, 8, 0xe000_0001));
        assert_eq!(root.ecam_read(0x60, 8), 0xe000_0001);
    }
}
