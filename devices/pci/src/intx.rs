//! Interrupt pins of PCI functions: swizzled onto PIRQ A to H, which lead to IOAPIC pins 16 to 23 and, where the LPC
//! bridge routes them, to the 8259 pair. ICH9 5.8, and the wiring that SeaBIOS expects of a q35.

use std::sync::Arc;

use hv_core::LineTarget;
use parking_lot::Mutex;

/// Number of PIRQ lines.
const PIRQS: usize = 8;
/// A route with this bit set leads to the IOAPIC only.
const ROUTE_OFF: u8 = 0x80;

/// PIRQ index (A is 0) of pin INTA (0) to INTD (3) of `device`, 0 to 31.
pub(crate) fn pirq(device: u8, pin: u8) -> u8 {
    // Devices 0 to 24 rotate over PIRQ E to H, the chipset's own devices use A to D straight.
    if device < 25 { 4 + (device + pin) % 4 } else { pin % 4 }
}

/// Global system interrupt of pin INTA (0) to INTD (3) of `device`.
pub fn gsi(device: u8, pin: u8) -> u8 {
    16 + pirq(device, pin)
}

struct Lines {
    /// Asserted sources of each PIRQ, a bit per device.
    asserted: [u32; PIRQS],
    routes: [u8; PIRQS],
    /// 8259 inputs that a route has driven high.
    isa_high: u16,
}

/// The PIRQ lines. As a [`LineTarget`] its pins are `4 * device + pin`.
pub struct Pirqs {
    lines: Mutex<Lines>,
    ioapic: Arc<dyn LineTarget>,
    pic: Arc<dyn LineTarget>,
}

impl Pirqs {
    /// Lines into `ioapic` pins 16 to 23 and, by route, into `pic`.
    pub fn new(ioapic: Arc<dyn LineTarget>, pic: Arc<dyn LineTarget>) -> Pirqs {
        Pirqs {
            lines: Mutex::new(Lines { asserted: [0; PIRQS], routes: [ROUTE_OFF; PIRQS], isa_high: 0 }),
            ioapic,
            pic,
        }
    }

    /// Routes PIRQ `index` as its LPC register says: interrupt number in bits 3:0, bit 7 set is none.
    pub(crate) fn set_route(&self, index: usize, route: u8) {
        let mut lines = self.lines.lock();
        if let Some(old) = lines.routes.get_mut(index) {
            *old = route;
        }
        self.drive_pic(&mut lines);
    }

    fn drive_pic(&self, lines: &mut Lines) {
        let high = lines.asserted.iter().zip(&lines.routes).fold(0u16, |high, (&asserted, &route)| {
            let on = asserted != 0 && route & ROUTE_OFF == 0;
            high | if on { 1 << (route & 0xf) } else { 0 }
        });
        let changed = high ^ lines.isa_high;
        lines.isa_high = high;
        (0..16u8).filter(|pin| changed & 1 << pin != 0).for_each(|pin| self.pic.set_level(pin, high & 1 << pin != 0));
    }
}

impl LineTarget for Pirqs {
    fn set_level(&self, pin: u8, high: bool) {
        let device = pin / 4 % 32;
        let index = pirq(device, pin % 4);
        let mut lines = self.lines.lock();
        let Some(asserted) = lines.asserted.get_mut(usize::from(index)) else { return };
        let old = *asserted;
        *asserted = if high { old | 1 << device } else { old & !(1 << device) };
        let level = *asserted != 0;
        if level != (old != 0) {
            self.ioapic.set_level(16 + index, level);
            self.drive_pic(&mut lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::script::{Bench, Probe};

    fn level(probe: &Arc<Probe>, pin: u8) -> bool {
        Bench { probe: probe.clone(), ..Bench::new() }.level(pin)
    }

    #[test]
    fn pins_swizzle_as_firmware_expects() {
        // SeaBIOS mch_pci_slot_get_irq: devices 0 to 24 rotate from E, 25 to 31 do not.
        for (device, pin, want) in
            [(0, 0, 20), (1, 0, 21), (2, 0, 22), (2, 3, 21), (24, 0, 20), (31, 0, 16), (29, 3, 19)]
        {
            assert_eq!(gsi(device, pin), want, "device {device} pin {pin}");
        }
    }

    #[test]
    fn sharing_devices_hold_the_line_together_and_routes_follow() {
        let (ioapic, pic) = (Arc::<Probe>::default(), Arc::<Probe>::default());
        let pirqs = Pirqs::new(ioapic.clone(), pic.clone());
        pirqs.set_level(4, true); // device 1 INTA: PIRQ F
        pirqs.set_level(20, true); // device 5 INTA: PIRQ F
        assert!(level(&ioapic, 21) && !level(&pic, 10));
        pirqs.set_route(5, 10);
        assert!(level(&pic, 10));
        pirqs.set_level(4, false);
        assert!(level(&ioapic, 21) && level(&pic, 10));
        pirqs.set_route(5, 11);
        assert!(!level(&pic, 10) && level(&pic, 11));
        pirqs.set_level(20, false);
        assert!(!level(&ioapic, 21) && !level(&pic, 11));
    }
}
