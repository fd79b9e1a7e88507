//! Ways of the chipset to reset the machine: the reset control register 0xcf9 (also the ACPI reset register) and the fast
//! reset of port 0x92. "DS" is the Intel ICH9 data sheet 13.7.

use std::sync::Arc;

use hv_core::{Lifecycle, PortDevice, PowerEvent, ResetDevice, StateError};
use minicbor::{Decode, Encode};

/// Reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What the ACPI reset register takes: system reset, both kinds.
pub const RESET_VALUE: u8 = 0x0f;
const CPU_RESET: u8 = 4;
const WRITABLE: u8 = 0x0a;

/// Saved state.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ResetStateV1 {
    /// Reset control register.
    #[n(0)]
    pub control: u8,
    /// Port 0x92.
    #[n(1)]
    pub fast: u8,
}

/// The two registers.
pub struct ResetControl {
    control: u8,
    fast: u8,
    lifecycle: Arc<dyn Lifecycle>,
}

impl ResetControl {
    /// After reset; the A20 gate is open, as it always is.
    pub fn new(lifecycle: Arc<dyn Lifecycle>) -> ResetControl {
        ResetControl { control: 0, fast: 2, lifecycle }
    }
    /// What a snapshot carries.
    pub fn save(&self) -> ResetStateV1 {
        let ResetControl { control, fast, lifecycle: _ } = self;
        ResetStateV1 { control: *control, fast: *fast }
    }
    /// Builds the registers from a saved state; bits that do not exist are dropped.
    pub fn restore(state: ResetStateV1, lifecycle: Arc<dyn Lifecycle>) -> Result<ResetControl, StateError> {
        let ResetStateV1 { control, fast } = state;
        Ok(ResetControl { control: control & WRITABLE, fast: fast & 2, lifecycle })
    }
}

impl PortDevice for ResetControl {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        u32::from(if port == RESET_CONTROL { self.control } else { self.fast })
    }
    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        let value = value as u8;
        let reset = if port == RESET_CONTROL {
            self.control = value & WRITABLE;
            value & CPU_RESET != 0
        } else {
            let rising = value & 1 != 0;
            self.fast = value & 2;
            rising
        };
        if reset {
            self.lifecycle.request(PowerEvent::Reset);
        }
    }
}

impl ResetDevice for ResetControl {
    fn reset(&mut self) {
        *self = ResetControl::new(self.lifecycle.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, check};

    struct Subject(ResetControl);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(ResetControl::new(bench.probe.clone()))
        }
        fn reload(self, bench: &Bench) -> Self {
            Subject(ResetControl::restore(golden::recode(&self.0.save()), bench.probe.clone()).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
    }

    #[test]
    fn each_register_resets_by_its_own_bit() {
        check::<Subject>(
            "in cf9 is 0  out cf9 = a  in cf9 is a  power none  out cf9 = e  power is reset  in cf9 is a
             in 92 is 2  out 92 = 0  in 92 is 0  power none  out 92 = 3  power is reset  in 92 is 2",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        golden::check("testdata/states/reset-v1.hex".as_ref(), &ResetControl::new(Bench::new().probe.clone()).save());
    }
}
