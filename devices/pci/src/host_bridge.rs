//! Host bridge of the q35 (Intel 82G33/P35/G31 MCH, function 00:00.0): the ECAM window and the shadow RAM registers, which
//! are kept and have no effect because all of low memory is RAM. "DS" is the Intel 3 Series Express Chipset data sheet.

use hv_core::{Space, StateError};

use crate::{ConfigSpace, ConfigStateV1, Identity, PciFunction, Window};

/// Window id of the ECAM; the machine answers it.
pub const ECAM_WINDOW: u8 = 0x20;
/// Where the window is after reset of this machine type.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Its length: 256 buses.
pub const ECAM_BYTES: u64 = 256 << 20;
const PCIEXBAR: u8 = 0x60;

/// The function.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// The bridge after reset, ECAM open at [`ECAM_BASE`] as firmware would leave it.
    pub fn new() -> HostBridge {
        // The subsystem says "QEMU" to firmware that looks for the platform's interfaces.
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.set(PCIEXBAR, &(ECAM_BASE | 1).to_le_bytes());
        // Base 35:26, length 2:1, enable 0. DS 5.1.13 "PCIEXBAR"
        config.allow(PCIEXBAR, &0x000f_ffff_fc00_0007u64.to_le_bytes());
        config.allow(0x90, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]); // PAM0 to PAM6
        config.set(0x9d, &[0x02]);
        config.allow(0x9d, &[0x78]); // SMRAM: open, close, lock, enable
        HostBridge { config }
    }
    /// What a snapshot carries.
    pub fn save(&self) -> ConfigStateV1 {
        self.config.save()
    }
    /// Builds the bridge from a saved state.
    pub fn restore(state: &ConfigStateV1) -> Result<HostBridge, StateError> {
        Ok(HostBridge { config: HostBridge::new().config.restore(state)? })
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        HostBridge::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u8, bytes: u8) -> u32 {
        self.config.read(offset, bytes)
    }
    fn config_write(&mut self, offset: u8, bytes: u8, value: u32) -> bool {
        self.config.write(offset, bytes, value) || (PCIEXBAR..PCIEXBAR + 8).contains(&offset)
    }
    fn windows(&self, windows: &mut Vec<Window>) {
        let low = self.config.read(PCIEXBAR, 4);
        let high = u64::from(self.config.read(PCIEXBAR + 4, 4));
        let bytes = match low >> 1 & 3 {
            0 => ECAM_BYTES,
            1 => ECAM_BYTES / 2,
            2 => ECAM_BYTES / 4,
            _ => return, // reserved
        };
        let base = (high << 32 | u64::from(low)) & !(bytes - 1);
        if low & 1 != 0 && base != 0 && base.checked_add(bytes).is_some() {
            windows.push(Window { id: ECAM_WINDOW, space: Space::Memory, base, bytes });
        }
    }
    fn window_read(&mut self, _id: u8, _offset: u64, _bytes: u8) -> u64 {
        u64::MAX
    }
    fn window_write(&mut self, _id: u8, _offset: u64, _bytes: u8, _value: u64) {}
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(bridge: &HostBridge) -> Vec<(u64, u64)> {
        let mut list = Vec::new();
        bridge.windows(&mut list);
        list.iter().map(|w| (w.base, w.bytes)).collect()
    }

    #[test]
    fn the_ecam_window_moves_shrinks_and_closes() {
        let mut bridge = HostBridge::new();
        assert_eq!(windows(&bridge), [(0xb000_0000, 256 << 20)]);
        assert!(bridge.config_write(0x60, 4, 0xe000_0001));
        assert_eq!(windows(&bridge), [(0xe000_0000, 256 << 20)]);
        bridge.config_write(0x60, 4, 0xe800_0003);
        assert_eq!(windows(&bridge), [(0xe800_0000, 128 << 20)]);
        bridge.config_write(0x60, 4, 0xe800_0007);
        assert_eq!(windows(&bridge), [], "the reserved length decodes nothing");
        bridge.config_write(0x60, 4, 0xe800_0000);
        assert_eq!(windows(&bridge), []);
        let again = HostBridge::restore(&bridge.save()).unwrap();
        assert_eq!(again.save(), bridge.save());
        bridge.reset();
        assert_eq!(windows(&bridge), [(0xb000_0000, 256 << 20)]);
    }
}
