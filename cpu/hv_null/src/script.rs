//! Text scripts against one device, for its tests.
//!
//! Every script runs twice, the second time with save, encode, decode and restore before every access: any script is a
//! snapshot test too. Numbers are hexadecimal where they are ports, offsets and values; lines, counts and times are
//! decimal. `#` starts a comment.
//!
//! | command | meaning |
//! |---|---|
//! | `out 3f8 = 41`, `outw`, `outl` | port write of 1, 2, 4 bytes |
//! | `in 3fd is 60`, `inw`, `inl` | port read; `in 3fd` alone discards the value |
//! | `write4 10 = 1`, `read4 10 is 1` | memory access at an offset, 1, 2, 4 or 8 bytes |
//! | `step 10ms` (`ns`, `us`, `s`) | guest time passes, deadlines run on the way |
//! | `irq 4 high`, `irq 4 low` | expected level of a line |
//! | `edges 4 is 2` | rising edges of a line since last asked |
//! | `msi is fee00000 41`, `msi none` | next message signalled |
//! | `power is reset`, `power none` | next power event requested |
//! | anything else | [`UnderTest::word`] |

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv_core::{Clock, IrqLine, Lifecycle, LineTarget, MmioDevice, Msi, MsiSink, PortDevice, PowerEvent, TimedDevice};

/// A device as the scripts see it.
pub trait UnderTest: Sized {
    /// A device after power-on, with what the bench lends it.
    fn build(bench: &Bench) -> Self;
    /// Save, encode, decode, restore.
    fn reload(self, bench: &Bench) -> Self;
    /// Its port half.
    fn port(&mut self) -> Option<&mut dyn PortDevice> {
        None
    }
    /// Its memory half.
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        None
    }
    /// Its deadlines.
    fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
        None
    }
    /// A command of this device's own; false if it is unknown.
    fn word(&mut self, _word: &str, _words: &mut Words<'_>, _bench: &Bench) -> bool {
        false
    }
}

#[derive(Default)]
struct Wires {
    levels: [bool; 32],
    edges: [u64; 32],
    msis: VecDeque<Msi>,
    power: VecDeque<PowerEvent>,
}

/// Lines, messages and power events that the device under test drives.
#[derive(Default)]
pub struct Probe(Mutex<Wires>);

impl Probe {
    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LineTarget for Probe {
    fn set_level(&self, pin: u8, high: bool) {
        let wires = &mut *self.wires();
        let pin = usize::from(pin);
        if high && !wires.levels[pin] {
            wires.edges[pin] += 1;
        }
        wires.levels[pin] = high;
    }
}
impl MsiSink for Probe {
    fn signal(&self, msi: Msi) {
        self.wires().msis.push_back(msi);
    }
}
impl Lifecycle for Probe {
    fn request(&self, event: PowerEvent) {
        self.wires().power.push_back(event);
    }
}

/// What the machine would lend.
pub struct Bench {
    /// A virtual clock that `step` moves.
    pub clock: Clock,
    /// Where lines, messages and power events go.
    pub probe: Arc<Probe>,
}

impl Bench {
    /// A bench at time 0 with all lines low.
    pub fn new() -> Bench {
        Bench { clock: Clock::virtual_clock(), probe: Arc::default() }
    }
    /// The line into pin `pin`.
    pub fn line(&self, pin: u8) -> IrqLine {
        IrqLine::new(self.probe.clone(), pin)
    }
    /// The level of pin `pin`.
    pub fn level(&self, pin: u8) -> bool {
        self.probe.wires().levels[usize::from(pin)]
    }
}

impl Default for Bench {
    fn default() -> Self {
        Bench::new()
    }
}

/// The words of a script from the current one on, with the line for messages.
pub struct Words<'a> {
    words: VecDeque<(usize, &'a str)>,
    line: usize,
}

impl<'a> Words<'a> {
    fn new(script: &'a str) -> Words<'a> {
        let words = script.lines().enumerate().flat_map(|(i, line)| {
            let code = line.split('#').next().unwrap_or("");
            code.split_whitespace().map(move |w| (i + 1, w))
        });
        Words { words: words.collect(), line: 0 }
    }
    fn next(&mut self) -> Option<&'a str> {
        let (line, word) = self.words.pop_front()?;
        self.line = line;
        Some(word)
    }
    /// The next word.
    pub fn word(&mut self) -> &'a str {
        let line = self.line;
        self.next().unwrap_or_else(|| panic!("script line {line}: a word is missing"))
    }
    /// Whether the next word is `want`, which is then consumed.
    pub fn accept(&mut self, want: &str) -> bool {
        let found = self.words.front().is_some_and(|&(_, w)| w == want);
        if found {
            self.next();
        }
        found
    }
    /// The next word, which must be `want`.
    pub fn expect(&mut self, want: &str) {
        let got = self.word();
        assert_eq!(got, want, "script line {}: unexpected word", self.line);
    }
    /// The next word as a hexadecimal number.
    pub fn hex(&mut self) -> u64 {
        let word = self.word();
        u64::from_str_radix(word, 16).unwrap_or_else(|_| panic!("script line {}: {word} is not hex", self.line))
    }
    /// The next word as a decimal number.
    pub fn dec(&mut self) -> u64 {
        let word = self.word();
        word.parse().unwrap_or_else(|_| panic!("script line {}: {word} is not decimal", self.line))
    }
    fn ns(&mut self) -> u64 {
        let word = self.word();
        let split = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
        let factor = match &word[split..] {
            "ns" => 1,
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            unit => panic!("script line {}: {unit:?} is no unit of time", self.line),
        };
        word[..split].parse::<u64>().expect("digits") * factor
    }
    /// Fails unless `got` is the number after `is`, where one follows.
    pub fn check(&mut self, what: &str, got: u64) {
        if self.accept("is") {
            let want = self.hex();
            assert_eq!(got, want, "script line {}: {what} is {got:x}, expected {want:x}", self.line);
        }
    }
    /// Script line of the last word, for messages.
    pub fn line(&self) -> usize {
        self.line
    }
}

/// Runs `script` twice against a new device, see the module's page.
pub fn check<D: UnderTest>(script: &str) {
    check_with(D::build, script);
}

/// [`check`] with a device built in a particular way.
pub fn check_with<D: UnderTest>(build: impl Fn(&Bench) -> D, script: &str) {
    for reload in [false, true] {
        let bench = Bench::new();
        let device = Some(build(&bench));
        let mut run = Run { bench, device, reload };
        let mut words = Words::new(script);
        while let Some(word) = words.next() {
            run.command(word, &mut words);
        }
    }
}

struct Run<D> {
    bench: Bench,
    device: Option<D>,
    reload: bool,
}

impl<D: UnderTest> Run<D> {
    fn device(&mut self) -> &mut D {
        if self.reload {
            self.device = self.device.take().map(|d| d.reload(&self.bench));
        }
        self.device.as_mut().expect("a device is always there between commands")
    }
    fn port(&mut self) -> &mut dyn PortDevice {
        self.device().port().expect("the device under test has ports")
    }
    fn mmio(&mut self) -> &mut dyn MmioDevice {
        self.device().mmio().expect("the device under test has memory registers")
    }

    fn command(&mut self, word: &str, words: &mut Words<'_>) {
        match word {
            "in" | "inb" => self.port_read(1, words),
            "inw" => self.port_read(2, words),
            "inl" => self.port_read(4, words),
            "out" | "outb" => self.port_write(1, words),
            "outw" => self.port_write(2, words),
            "outl" => self.port_write(4, words),
            "read1" | "read2" | "read4" | "read8" => self.mmio_read(word.as_bytes()[4] - b'0', words),
            "write1" | "write2" | "write4" | "write8" => self.mmio_write(word.as_bytes()[5] - b'0', words),
            "step" => self.step(words.ns()),
            "irq" => {
                let pin = words.dec();
                let want = match words.word() {
                    "high" => true,
                    "low" => false,
                    other => panic!("script line {}: {other} is no level", words.line),
                };
                let got = self.bench.level(pin as u8);
                assert_eq!(got, want, "script line {}: irq {pin} is high: {got}", words.line);
            }
            "edges" => {
                let pin = words.dec() as usize;
                let got = std::mem::take(&mut self.bench.probe.wires().edges[pin]);
                words.expect("is");
                let want = words.dec();
                assert_eq!(got, want, "script line {}: edges of irq {pin}", words.line);
            }
            "msi" => self.msi(words),
            "power" => self.power(words),
            other => {
                self.device();
                let Run { bench, device, .. } = self;
                let known = device.as_mut().is_some_and(|d| d.word(other, words, bench));
                assert!(known, "script line {}: unknown command {other}", words.line);
            }
        }
    }

    fn port_read(&mut self, bytes: u8, words: &mut Words<'_>) {
        let port = words.hex() as u16;
        let got = self.port().read(port, bytes);
        words.check(&format!("port {port:x}"), u64::from(got) & mask(bytes));
    }
    fn port_write(&mut self, bytes: u8, words: &mut Words<'_>) {
        let port = words.hex() as u16;
        words.expect("=");
        let value = words.hex() as u32;
        self.port().write(port, bytes, value);
    }
    fn mmio_read(&mut self, bytes: u8, words: &mut Words<'_>) {
        let offset = words.hex();
        let got = self.mmio().read(offset, bytes);
        words.check(&format!("offset {offset:x}"), got & mask(bytes));
    }
    fn mmio_write(&mut self, bytes: u8, words: &mut Words<'_>) {
        let offset = words.hex();
        words.expect("=");
        let value = words.hex();
        self.mmio().write(offset, bytes, value);
    }

    fn msi(&mut self, words: &mut Words<'_>) {
        let got = self.bench.probe.wires().msis.pop_front();
        let want = if words.accept("none") {
            None
        } else {
            words.expect("is");
            let address = words.hex();
            Some(Msi { address, data: words.hex() as u32 })
        };
        assert_eq!(got, want, "script line {}: message", words.line);
    }
    fn power(&mut self, words: &mut Words<'_>) {
        let got = self.bench.probe.wires().power.pop_front();
        let want = if words.accept("none") {
            None
        } else {
            words.expect("is");
            Some(match words.word() {
                "reset" => PowerEvent::Reset,
                "off" => PowerEvent::PowerOff,
                "panicked" => PowerEvent::Panicked,
                other => panic!("script line {}: {other} is no power event", words.line),
            })
        };
        assert_eq!(got, want, "script line {}: power event", words.line);
    }

    fn step(&mut self, ns: u64) {
        let end = self.bench.clock.now().plus(ns);
        while let Some(due) = self.device().timed().and_then(|t| t.next_due()).filter(|&due| due <= end) {
            self.bench.clock.advance_to(due);
            let now = self.bench.clock.now();
            if let Some(timed) = self.device().timed() {
                timed.on_due(now);
            }
        }
        self.bench.clock.advance_to(end);
    }
}

fn mask(bytes: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(bytes).clamp(1, 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::GuestNs;

    /// A latch at port 10 that raises line 1 a millisecond after a write. `forget`: its snapshot loses the latch.
    struct Latch {
        value: u8,
        due: Option<GuestNs>,
        line: IrqLine,
        clock: Clock,
        forget: bool,
    }
    impl PortDevice for Latch {
        fn read(&mut self, _port: u16, _bytes: u8) -> u32 {
            u32::from(self.value)
        }
        fn write(&mut self, _port: u16, _bytes: u8, value: u32) {
            self.value = value as u8;
            self.due = Some(self.clock.now().plus(1_000_000));
        }
    }
    impl TimedDevice for Latch {
        fn next_due(&self) -> Option<GuestNs> {
            self.due
        }
        fn on_due(&mut self, _now: GuestNs) {
            self.due = None;
            self.line.raise();
        }
    }
    impl UnderTest for Latch {
        fn build(bench: &Bench) -> Latch {
            Latch { value: 0, due: None, line: bench.line(1), clock: bench.clock.clone(), forget: false }
        }
        fn reload(self, _bench: &Bench) -> Latch {
            Latch { value: if self.forget { 0 } else { self.value }, ..self }
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(self)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(self)
        }
    }

    #[test]
    fn commands_reach_the_device_and_time_passes() {
        check::<Latch>("out 10 = 5  in 10 is 5  step 999us irq 1 low  step 1us irq 1 high  edges 1 is 1");
    }

    #[test]
    #[should_panic(expected = "port 10 is 0, expected 5")]
    fn a_device_that_forgets_to_save_a_field_is_caught() {
        check_with(|bench| Latch { forget: true, ..Latch::build(bench) }, "out 10 = 5  in 10 is 5");
    }
}
