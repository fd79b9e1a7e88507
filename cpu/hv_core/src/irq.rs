//! The whole interrupt surface: pins between devices, and messages into the engine's local APICs.

use std::fmt;
use std::sync::Arc;

/// A message-signalled interrupt as it travels on the bus. SDM 3A 11.11 "Message Signalled Interrupts".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Message address (0xFEEx_xxxx; bits 63:32 carry the extended destination where one is used).
    pub address: u64,
    /// Message data: vector, delivery mode, level and trigger bits.
    pub data: u32,
}

/// Whoever delivers messages to local APICs: the engine.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi`; returns at once, from any thread.
    fn signal(&self, msi: Msi);
}

/// A chip with interrupt input pins (PIC, IOAPIC, or the pair of them behind ISA).
pub trait LineTarget: Send + Sync {
    /// The level of `pin` is now `high`. Repeating a level changes nothing.
    fn set_level(&self, pin: u8, high: bool);
}

/// One interrupt pin, held by the device that drives it.
#[derive(Clone)]
pub struct IrqLine {
    target: Arc<dyn LineTarget>,
    pin: u8,
}

impl IrqLine {
    /// The line into `pin` of `target`.
    pub fn new(target: Arc<dyn LineTarget>, pin: u8) -> IrqLine {
        IrqLine { target, pin }
    }
    /// A line that leads nowhere.
    pub fn unconnected() -> IrqLine {
        IrqLine::new(Arc::new(NoLine), 0)
    }
    /// Drives the pin high.
    pub fn raise(&self) {
        self.set(true);
    }
    /// Drives the pin low.
    pub fn lower(&self) {
        self.set(false);
    }
    /// Drives the pin to `high`.
    pub fn set(&self, high: bool) {
        self.target.set_level(self.pin, high);
    }
    /// A rising edge after which the pin stays high, as the output of a timer does: an 8259 takes back the request of a
    /// pin that falls before it is acknowledged.
    pub fn edge(&self) {
        self.lower();
        self.raise();
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({})", self.pin)
    }
}

/// A target that ignores its pins.
pub struct NoLine;
impl LineTarget for NoLine {
    fn set_level(&self, _pin: u8, _high: bool) {}
}
