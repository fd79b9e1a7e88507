//! Ports through which firmware and guests talk about themselves: the debug console 0x402, the diagnostic port 0x80 and
//! the panic event port 0x505 (QEMU's pvpanic, docs/specs/pvpanic). They hold no state beyond port 0x80's latch.

use std::sync::Arc;

use hv_core::{Lifecycle, PortDevice, PowerEvent, StateError};
use minicbor::{Decode, Encode};

/// Firmware's debug output. A read says that the port exists.
pub struct DebugConsole(Box<dyn FnMut(u8) + Send>);

impl DebugConsole {
    /// A port that hands each byte to `sink`.
    pub fn new(sink: impl FnMut(u8) + Send + 'static) -> DebugConsole {
        DebugConsole(Box::new(sink))
    }
}
impl PortDevice for DebugConsole {
    fn read(&mut self, _port: u16, _bytes: u8) -> u32 {
        0xe9
    }
    fn write(&mut self, _port: u16, _bytes: u8, value: u32) {
        (self.0)(value as u8);
    }
}

/// Saved state of the diagnostic port.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct DiagnosticStateV1 {
    /// Last value written.
    #[n(0)]
    pub value: u8,
}

/// Port 0x80: guests write to it to wait a microsecond on real hardware.
#[derive(Default)]
pub struct Diagnostic {
    value: u8,
}

impl Diagnostic {
    /// What a snapshot carries.
    pub fn save(&self) -> DiagnosticStateV1 {
        let Diagnostic { value } = self;
        DiagnosticStateV1 { value: *value }
    }
    /// Builds the port from a saved state.
    pub fn restore(state: DiagnosticStateV1) -> Result<Diagnostic, StateError> {
        let DiagnosticStateV1 { value } = state;
        Ok(Diagnostic { value })
    }
}
impl PortDevice for Diagnostic {
    fn read(&mut self, _port: u16, _bytes: u8) -> u32 {
        self.value.into()
    }
    fn write(&mut self, _port: u16, _bytes: u8, value: u32) {
        self.value = value as u8;
    }
}

/// Event bit: the guest's kernel has panicked.
const PANICKED: u8 = 1;
/// Event bit: the guest has panicked and a crash kernel takes over; the machine goes on.
const CRASH_LOADED: u8 = 2;

/// The panic event port.
pub struct PanicEvent {
    lifecycle: Arc<dyn Lifecycle>,
}

impl PanicEvent {
    /// A port that reports to `lifecycle`.
    pub fn new(lifecycle: Arc<dyn Lifecycle>) -> PanicEvent {
        PanicEvent { lifecycle }
    }
}
impl PortDevice for PanicEvent {
    fn read(&mut self, _port: u16, _bytes: u8) -> u32 {
        (PANICKED | CRASH_LOADED).into()
    }
    fn write(&mut self, _port: u16, _bytes: u8, value: u32) {
        if value as u8 & PANICKED != 0 {
            self.lifecycle.request(PowerEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, check};
    use std::sync::Mutex;

    struct Panic(PanicEvent);
    impl UnderTest for Panic {
        fn build(bench: &Bench) -> Self {
            Panic(PanicEvent::new(bench.probe.clone()))
        }
        fn reload(self, _bench: &Bench) -> Self {
            self
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
    }
    struct Delay(Diagnostic);
    impl UnderTest for Delay {
        fn build(_bench: &Bench) -> Self {
            Delay(Diagnostic::default())
        }
        fn reload(self, _bench: &Bench) -> Self {
            Delay(Diagnostic::restore(golden::recode(&self.0.save())).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
    }

    #[test]
    fn a_panic_is_reported_and_a_crash_kernel_is_not() {
        check::<Panic>("in 505 is 3  out 505 = 2  power none  out 505 = 1  power is panicked");
    }

    #[test]
    fn the_diagnostic_port_latches() {
        check::<Delay>("out 80 = 5a  in 80 is 5a");
        golden::check("testdata/states/diagnostic-v1.hex".as_ref(), &Diagnostic::default().save());
    }

    #[test]
    fn the_debug_console_hands_bytes_on() {
        let text = Arc::new(Mutex::new(Vec::new()));
        let sink = text.clone();
        let mut console = DebugConsole::new(move |byte| sink.lock().unwrap().push(byte));
        b"ok".iter().for_each(|&b| console.write(0x402, 1, b.into()));
        assert_eq!((console.read(0x402, 1), &text.lock().unwrap()[..]), (0xe9, &b"ok"[..]));
    }
}
