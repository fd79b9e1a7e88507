//! Wires between chips.

use std::sync::Arc;

use chipset::ioapic::{InterruptBus, IoApic};
use chipset::pic::Pic;
use hv_core::{LineTarget, Msi, MsiSink, Vm};
use parking_lot::Mutex;

use crate::counters::Counters;

/// The sixteen ISA interrupt lines, each into the 8259 pair and the IOAPIC.
pub(crate) struct IsaLines {
    pub(crate) pic: Arc<Mutex<Pic>>,
    pub(crate) ioapic: Arc<Mutex<IoApic>>,
}
impl LineTarget for IsaLines {
    fn set_level(&self, pin: u8, high: bool) {
        self.pic.lock().set_level(pin, high);
        // The timer is on pin 2 of the IOAPIC, where the cascade of the 8259s leaves one free.
        match pin {
            0 => self.ioapic.lock().set_level(2, high),
            2 => {}
            _ => self.ioapic.lock().set_level(pin, high),
        }
    }
}

/// Pins of the IOAPIC alone.
pub(crate) struct IoApicPins(pub(crate) Arc<Mutex<IoApic>>);
impl LineTarget for IoApicPins {
    fn set_level(&self, pin: u8, high: bool) {
        self.0.lock().set_level(pin, high);
    }
}

/// Pins of the 8259 pair alone.
pub(crate) struct PicPins(pub(crate) Arc<Mutex<Pic>>);
impl LineTarget for PicPins {
    fn set_level(&self, pin: u8, high: bool) {
        self.0.lock().set_level(pin, high);
    }
}

/// The output of the 8259 pair into the processor.
pub(crate) struct Intr(pub(crate) Arc<dyn Vm>);
impl LineTarget for Intr {
    fn set_level(&self, _pin: u8, high: bool) {
        self.0.set_extint(high);
    }
}

/// Several devices on one line: high while any of them is. Pins are the devices.
pub(crate) struct SharedLine {
    high: Mutex<u32>,
    target: Arc<dyn LineTarget>,
    pin: u8,
}
impl SharedLine {
    pub(crate) fn new(target: Arc<dyn LineTarget>, pin: u8) -> SharedLine {
        SharedLine { high: Mutex::new(0), target, pin }
    }
}
impl LineTarget for SharedLine {
    fn set_level(&self, pin: u8, high: bool) {
        let mut levels = self.high.lock();
        let bit = 1u32 << (pin & 31);
        *levels = if high { *levels | bit } else { *levels & !bit };
        self.target.set_level(self.pin, *levels != 0);
    }
}

/// The way of messages into the engine.
pub(crate) struct Messages {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) counters: Arc<Counters>,
}
impl MsiSink for Messages {
    fn signal(&self, msi: Msi) {
        self.counters.msis.up();
        self.vm.signal(msi);
    }
}
impl InterruptBus for Messages {
    fn signal(&self, msi: Msi) {
        MsiSink::signal(self, msi);
    }
    fn set_route(&self, pin: u8, route: Option<Msi>) {
        self.vm.set_ioapic_route(pin, route);
    }
}
