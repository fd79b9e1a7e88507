//! LPC bridge of the ICH9 (function 00:1f.0): where the power management block is, how PIRQ lines lead to the 8259 pair,
//! and the root complex registers. "DS" is the Intel ICH9 data sheet 13.1.

use std::sync::Arc;

use hv_core::{Space, StateError};

use crate::{ConfigSpace, ConfigStateV1, Identity, PciFunction, Pirqs, Window};

/// Window id of the power management block; the machine puts the block's own registers there.
pub const PM_WINDOW: u8 = 0x20;
/// Window id of the root complex registers.
const RCBA_WINDOW: u8 = 0x21;
/// Where the power management block is in this machine type, as SeaBIOS and OVMF put it.
pub const PM_BASE: u16 = 0x600;
const PM_BYTES: u64 = 128;
const RCBA_BYTES: u64 = 16 << 10;

const PMBASE: u8 = 0x40;
const ACPI_CNTL: u8 = 0x44;
const ACPI_ENABLE: u32 = 0x80;
/// PIRQ A to D and E to H.
const ROUTES: [u8; 8] = [0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6a, 0x6b];
const RCBA: u8 = 0xf0;

/// The function.
pub struct Lpc {
    config: ConfigSpace,
    pirqs: Arc<Pirqs>,
}

fn config() -> ConfigSpace {
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x8086,
        device: 0x2918,
        revision: 2,
        class: 0x06_0100,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    // Command is fixed but for SERR and parity: the bridge always decodes. DS 13.1.3
    config.set(0x04, &[0x07]);
    config.set(PMBASE, &u32::from(PM_BASE | 1).to_le_bytes());
    config.allow(PMBASE, &0xff80u32.to_le_bytes());
    config.set(ACPI_CNTL, &[ACPI_ENABLE as u8]);
    config.allow(ACPI_CNTL, &[0x87]);
    for offset in ROUTES {
        config.set(offset, &[0x80]);
        config.allow(offset, &[0x8f]);
    }
    config.allow(0x80, &[0x77, 0x13, 0xff, 0x3f]); // decode ranges: kept, everything is decoded
    config.allow(RCBA, &0xffff_c001u32.to_le_bytes());
    config
}

impl Lpc {
    /// The bridge after reset, the power management block open at [`PM_BASE`].
    pub fn new(pirqs: Arc<Pirqs>) -> Lpc {
        let lpc = Lpc { config: config(), pirqs };
        lpc.set_routes();
        lpc
    }
    /// What a snapshot carries.
    pub fn save(&self) -> ConfigStateV1 {
        self.config.save()
    }
    /// Builds the bridge from a saved state and sets the routes of `pirqs`.
    pub fn restore(state: &ConfigStateV1, pirqs: Arc<Pirqs>) -> Result<Lpc, StateError> {
        let lpc = Lpc { config: config().restore(state)?, pirqs };
        lpc.set_routes();
        Ok(lpc)
    }
    fn set_routes(&self) {
        for (index, offset) in ROUTES.into_iter().enumerate() {
            self.pirqs.set_route(index, self.config.read(offset, 1) as u8);
        }
    }
}

impl PciFunction for Lpc {
    fn config_read(&mut self, offset: u8, bytes: u8) -> u32 {
        self.config.read(offset, bytes)
    }
    fn config_write(&mut self, offset: u8, bytes: u8, value: u32) -> bool {
        let changed = self.config.write(offset, bytes, value);
        self.set_routes();
        changed || matches!(offset & !3, PMBASE | ACPI_CNTL | RCBA)
    }
    fn windows(&self, windows: &mut Vec<Window>) {
        let pm_base = u64::from(self.config.read(PMBASE, 4) & 0xff80);
        if self.config.read(ACPI_CNTL, 1) & ACPI_ENABLE != 0 && pm_base != 0 {
            windows.push(Window { id: PM_WINDOW, space: Space::Port, base: pm_base, bytes: PM_BYTES });
        }
        let rcba = self.config.read(RCBA, 4);
        if rcba & 1 != 0 && rcba > 1 {
            let base = u64::from(rcba & !0x3fff);
            windows.push(Window { id: RCBA_WINDOW, space: Space::Memory, base, bytes: RCBA_BYTES });
        }
    }
    fn window_read(&mut self, id: u8, offset: u64, _bytes: u8) -> u64 {
        match (id, offset) {
            // Interrupt routes of devices 25 to 31: INTA to PIRQ A and so on. DS 10.1.45 "D31IR"
            (RCBA_WINDOW, 0x3140..=0x314f) => 0x3210,
            (RCBA_WINDOW, _) => 0,
            _ => u64::MAX,
        }
    }
    fn window_write(&mut self, _id: u8, _offset: u64, _bytes: u8, _value: u64) {}
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn reset(&mut self) {
        self.config.reset();
        self.set_routes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::LineTarget;
    use hv_null::script::{Bench, Probe};

    fn windows(lpc: &Lpc) -> Vec<(u8, u64)> {
        let mut list = Vec::new();
        lpc.windows(&mut list);
        list.iter().map(|w| (w.id, w.base)).collect()
    }

    #[test]
    fn the_power_management_block_and_the_root_complex_move() {
        let pirqs = Arc::new(Pirqs::new(Arc::<Probe>::default(), Arc::<Probe>::default()));
        let mut lpc = Lpc::new(pirqs.clone());
        assert_eq!(windows(&lpc), [(PM_WINDOW, 0x600)]);
        assert!(lpc.config_write(0x40, 4, 0xffff_b0ff));
        assert_eq!(lpc.config_read(0x40, 4), 0xb081);
        assert_eq!(windows(&lpc), [(PM_WINDOW, 0xb080)]);
        lpc.config_write(0x44, 1, 0);
        lpc.config_write(0xf0, 4, 0xfed1_c001);
        assert_eq!(windows(&lpc), [(RCBA_WINDOW, 0xfed1_c000)]);
        assert_eq!(windows(&Lpc::restore(&lpc.save(), pirqs).unwrap()), [(RCBA_WINDOW, 0xfed1_c000)]);
        lpc.reset();
        assert_eq!(windows(&lpc), [(PM_WINDOW, 0x600)]);
    }

    #[test]
    fn a_route_register_leads_its_pirq_to_the_8259() {
        let pic = Bench::new();
        let pirqs = Arc::new(Pirqs::new(Arc::<Probe>::default(), pic.probe.clone()));
        let mut lpc = Lpc::new(pirqs.clone());
        pirqs.set_level(4 * 2, true); // device 2 INTA: PIRQ G
        lpc.config_write(0x68, 4, 0x0b0b_0a0a);
        assert_eq!(lpc.config_read(0x6a, 1), 0x0b);
        assert!(pic.level(11) && !pic.level(10));
        lpc.reset();
        assert!(!pic.level(11));
    }
}
