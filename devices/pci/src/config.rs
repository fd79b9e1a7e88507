//! Type 0 configuration space: identity, command, BARs, capability list. PCI chapter 6.

use hv_core::{Space, StateError};
use minicbor::{Decode, Encode};

use crate::Window;

/// Offset of the command register.
pub const COMMAND: u8 = 0x04;
/// Offset of the first BAR.
pub const BAR0: u8 = 0x10;
/// Offset of the interrupt line register.
pub const INTERRUPT_LINE: u8 = 0x3c;
/// Offset of the interrupt pin register.
pub const INTERRUPT_PIN: u8 = 0x3d;
/// Command bit: decode port BARs.
pub const COMMAND_IO: u16 = 1;
/// Command bit: decode memory BARs.
pub const COMMAND_MEMORY: u16 = 2;
/// Command bit: may master the bus.
pub const COMMAND_MASTER: u16 = 4;
/// Command bit: do not drive the interrupt pin.
pub const COMMAND_INTX_OFF: u16 = 1 << 10;
/// I/O, memory, master, parity, SERR, interrupt disable.
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // register names of PCI 6.2.1
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass, programming interface, from the top.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB, not prefetchable.
    Memory32,
    /// Memory anywhere, prefetchable; takes two registers.
    Memory64,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    bytes: u64,
}

/// Saved state: all 256 bytes; what is not writable is taken from the device.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ConfigStateV1 {
    /// Configuration space.
    #[n(0)]
    pub bytes: Vec<u8>,
}

/// Configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    power_on: [u8; 256],
    bars: [Option<Bar>; 6],
    next_capability: u8,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A function with no BAR, no capability and no interrupt pin.
    pub fn new(identity: &Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; 256],
            writable: [0; 256],
            power_on: [0; 256],
            bars: [None; 6],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITY_POINTER,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space.allow(0x0c, &[0xff]); // cache line size: kept, without effect
        space
    }

    /// Adds a BAR of `bytes`, a power of two of at least 16 (memory) or 4 (ports).
    pub fn with_bar(mut self, index: u8, kind: BarKind, bytes: u64) -> ConfigSpace {
        debug_assert!(bytes.is_power_of_two() && bytes >= 16 && index < 6);
        let offset = BAR0 + 4 * index;
        let mask = !(bytes - 1);
        match kind {
            BarKind::Io => {
                self.set(offset, &1u32.to_le_bytes());
                self.allow(offset, &(mask as u32).to_le_bytes());
            }
            BarKind::Memory32 => self.allow(offset, &(mask as u32).to_le_bytes()),
            BarKind::Memory64 => {
                self.set(offset, &0xcu32.to_le_bytes()); // 64-bit, prefetchable
                self.allow(offset, &mask.to_le_bytes());
            }
        }
        if let Some(bar) = self.bars.get_mut(usize::from(index)) {
            *bar = Some(Bar { kind, bytes });
        }
        self
    }

    /// Adds interrupt pin INTA.
    pub fn with_interrupt_pin(mut self) -> ConfigSpace {
        self.set(INTERRUPT_PIN, &[1]);
        self
    }

    /// Appends a capability: `body` follows id and next pointer, `writable` are its writable bits. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let offset = self.next_capability;
        debug_assert!(usize::from(offset) + 2 + body.len() <= 256);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        let pointer = self.last_pointer as u8;
        self.set(pointer, &[offset]);
        let status = self.bytes[STATUS] | STATUS_CAPABILITIES;
        self.set(STATUS as u8, &[status]);
        self.last_pointer = usize::from(offset) + 1;
        self.next_capability = offset.saturating_add(2 + body.len() as u8).next_multiple_of(4);
        offset
    }

    /// Sets bytes as they are after power-on, whether a guest may write them or not.
    pub fn set(&mut self, offset: u8, value: &[u8]) {
        for (i, &byte) in (usize::from(offset)..256).zip(value) {
            self.bytes[i] = byte;
            self.power_on[i] = byte;
        }
    }
    /// Lets a guest write these bits.
    pub fn allow(&mut self, offset: u8, mask: &[u8]) {
        for (i, &byte) in (usize::from(offset)..256).zip(mask) {
            self.writable[i] |= byte;
        }
    }

    /// Reads `bytes` (1, 2 or 4) at `offset`; past the end all ones.
    pub fn read(&self, offset: u8, bytes: u8) -> u32 {
        (0..usize::from(bytes.min(4))).fold(0, |value, i| {
            let byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
            value | u32::from(byte) << (8 * i)
        })
    }

    /// Writes the writable bits of `bytes` (1, 2 or 4) at `offset`. True: a BAR or the decoding of BARs has changed.
    pub fn write(&mut self, offset: u8, bytes: u8, value: u32) -> bool {
        let mut changed = false;
        for i in 0..usize::from(bytes.min(4)) {
            let at = usize::from(offset) + i;
            let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else { break };
            let new = *byte & !mask | (value >> (8 * i)) as u8 & mask;
            let decoding = at == usize::from(COMMAND) && (new ^ *byte) & (COMMAND_IO | COMMAND_MEMORY) as u8 != 0;
            changed |= decoding || (0x10..0x28).contains(&at) && new != *byte;
            *byte = new;
        }
        changed
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.read(COMMAND, 2) as u16
    }
    /// Shows in the status register whether the interrupt pin would be driven.
    pub fn show_interrupt(&mut self, asserted: bool) {
        let status = &mut self.bytes[STATUS];
        *status = if asserted { *status | STATUS_INTERRUPT } else { *status & !STATUS_INTERRUPT };
    }

    /// The BARs there are: index, kind, length.
    pub fn bars(&self) -> impl Iterator<Item = (u8, BarKind, u64)> + '_ {
        self.bars.iter().enumerate().filter_map(|(i, bar)| bar.map(|b| (i as u8, b.kind, b.bytes)))
    }

    /// Adds the windows of enabled BARs. A BAR at 0 counts as not assigned.
    pub fn windows(&self, windows: &mut Vec<Window>) {
        let command = self.command();
        for (id, kind, bytes) in self.bars() {
            let low = self.read(BAR0 + 4 * id, 4);
            let (space, enabled, base) = match kind {
                BarKind::Io => (Space::Port, command & COMMAND_IO, u64::from(low & 0xfffc)),
                BarKind::Memory32 => (Space::Memory, command & COMMAND_MEMORY, u64::from(low & !0xf)),
                BarKind::Memory64 => {
                    let high = u64::from(self.read(BAR0 + 4 * id + 4, 4));
                    (Space::Memory, command & COMMAND_MEMORY, high << 32 | u64::from(low & !0xf))
                }
            };
            if enabled != 0 && base != 0 && base.checked_add(bytes).is_some() {
                windows.push(Window { id, space, base, bytes });
            }
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// What a snapshot carries.
    pub fn save(&self) -> ConfigStateV1 {
        let ConfigSpace { bytes, writable: _, power_on: _, bars: _, next_capability: _, last_pointer: _ } = self;
        ConfigStateV1 { bytes: bytes.to_vec() }
    }

    /// This space (as built) with the writable bits of a saved one. `Length`: not 256 bytes.
    pub fn restore(mut self, state: &ConfigStateV1) -> Result<ConfigSpace, StateError> {
        let saved: &[u8; 256] = state.bytes.as_slice().try_into().map_err(|_| StateError::Length {
            field: "pci.config",
            want: 256,
            got: state.bytes.len(),
        })?;
        for ((byte, &mask), &saved) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *byte = *byte & !mask | saved & mask;
        }
        self.show_interrupt(saved[STATUS] & STATUS_INTERRUPT != 0);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        ConfigSpace::new(&identity)
            .with_bar(0, BarKind::Io, 32)
            .with_bar(1, BarKind::Memory32, 4096)
            .with_bar(4, BarKind::Memory64, 1 << 33)
            .with_interrupt_pin()
    }

    #[test]
    fn the_header_reads_as_built_and_keeps_read_only_bits() {
        let mut space = space();
        for offset in (0..=0xfc).step_by(4) {
            space.write(offset, 4, u32::MAX);
        }
        let expected = [
            (0x00, 0x1042_1af4),
            (0x04, 0x0000_0547),
            (0x08, 0x0100_0001),
            (0x0c, 0x0000_00ff),
            (0x10, 0xffff_ffe1), // sizing: 32 ports
            (0x14, 0xffff_f000), // 4 KiB
            (0x18, 0),
            (0x20, 0x0000_000c), // 8 GiB, 64-bit, prefetchable
            (0x24, 0xffff_fffe),
            (0x2c, 0x1100_1af4),
            (0x3c, 0x0000_01ff),
        ];
        for (offset, value) in expected {
            assert_eq!(space.read(offset, 4), value, "{offset:#x}");
        }
        assert_eq!(space.read(0xff, 4), 0xffff_ff00);
        space.reset();
        assert_eq!((space.read(0x04, 4), space.read(0x10, 4), space.read(0x20, 4)), (0, 1, 0xc));
    }

    #[test]
    fn windows_follow_bars_and_command() {
        let mut space = space();
        space.write(0x10, 4, 0xc001);
        space.write(0x14, 4, 0xfeb0_0000);
        space.write(0x24, 4, 0x40);
        let windows = |space: &ConfigSpace| {
            let mut list = Vec::new();
            space.windows(&mut list);
            list
        };
        assert_eq!(windows(&space), []);
        assert!(space.write(4, 2, 1));
        assert!(!space.write(4, 2, 5), "bus mastering moves no window");
        let port = Window { id: 0, space: Space::Port, base: 0xc000, bytes: 32 };
        assert_eq!(windows(&space), [port]);
        space.write(4, 2, 2);
        let memory = |id, base, bytes| Window { id, space: Space::Memory, base, bytes };
        assert_eq!(windows(&space), [memory(1, 0xfeb0_0000, 4096), memory(4, 0x40 << 32, 1 << 33)]);
        assert!(space.write(0x14, 4, 0), "a BAR moved");
        assert_eq!(windows(&space), [memory(4, 0x40 << 32, 1 << 33)]);
        space.write(0x24, 4, u32::MAX);
        assert_eq!(windows(&space), [], "a window may not wrap around");
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x09, &[16, 1, 0], &[0, 0, 0xff]);
        let second = space.add_capability(0x11, &[3, 0, 0, 0, 0, 0], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.read(0x06, 2), 0x10);
        assert_eq!((space.read(0x34, 1), space.read(0x40, 4), space.read(0x48, 4)), (0x40, 0x0110_4809, 0x0003_0011));
        space.write(0x4a, 2, 0xffff);
        assert_eq!(space.read(0x4a, 2), 0xc003);
    }

    #[test]
    fn a_saved_space_cannot_change_what_a_guest_cannot() {
        let mut state = ConfigStateV1 { bytes: vec![0xff; 256] };
        let space = space().restore(&state).unwrap();
        assert_eq!((space.read(0, 4), space.read(4, 2)), (0x1042_1af4, 0x0547));
        state.bytes.pop();
        assert!(self::tests::space().restore(&state).is_err());
    }
}
