//! 16550A UART: eight ports, one line. "DS" is the National Semiconductor PC16550D data sheet.
//!
//! A byte takes no time on the wire: the transmitter is empty again at once. What the guest sends is collected and handed
//! to the sink a millisecond after the first byte, so that a line of output is one write. Not modelled: baud rate, parity
//! and framing errors, breaks.

use std::collections::VecDeque;

use hv_core::{Clock, GuestNs, IrqLine, PortDevice, ResetDevice, StateError, TimedDevice};
use minicbor::{Decode, Encode};

/// The host's end of a serial port.
pub trait SerialSink: Send {
    /// Takes as many of `bytes` as it can without waiting; returns how many.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// Whether output may be thrown away when the host does not take it; else the guest waits.
    fn lossy(&self) -> bool;
    /// The receiver has room again after [`Serial::room`] was 0.
    fn room_again(&mut self);
}

/// A serial port that leads nowhere.
pub struct NoSink;
impl SerialSink for NoSink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }
    fn lossy(&self) -> bool {
        true
    }
    fn room_again(&mut self) {}
}

const IER_RX: u8 = 1;
const IER_TX: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const LCR_DLAB: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const LSR_DR: u8 = 1;
const LSR_OE: u8 = 2;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
const FCR_ENABLE: u8 = 1;
/// CTS, DSR and DCD: someone is at the other end.
const MSR_CONNECTED: u8 = 0xb0;

const FIFO_BYTES: usize = 16;
/// Output kept for a sink that does not take it.
const TX_MAX_BYTES: usize = 65536;
/// Output that is handed over without waiting for more.
const TX_EAGER_BYTES: usize = 4096;
const FLUSH_DELAY_NS: u64 = 1_000_000;
const RETRY_DELAY_NS: u64 = 5_000_000;

/// Saved state of a port.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[allow(missing_docs)] // register names of the DS
pub struct SerialStateV1 {
    #[n(0)]
    pub ier: u8,
    #[n(1)]
    pub fcr: u8,
    #[n(2)]
    pub lcr: u8,
    #[n(3)]
    pub mcr: u8,
    #[n(4)]
    pub msr: u8,
    #[n(5)]
    pub scr: u8,
    #[n(6)]
    pub divisor: u16,
    #[n(7)]
    pub rx: Vec<u8>,
    #[n(8)]
    pub overrun: bool,
    #[n(9)]
    pub thre_pending: bool,
    #[n(10)]
    pub tx: Vec<u8>,
    #[n(11)]
    pub flush_at_ns: u64,
}

/// One port. Registers are `port & 7`.
pub struct Serial {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    divisor: u16,
    rx: VecDeque<u8>,
    overrun: bool,
    thre_pending: bool,
    tx: Vec<u8>,
    flush_at: GuestNs,
    starved: bool,
    clock: Clock,
    irq: IrqLine,
    sink: Box<dyn SerialSink>,
}

impl Serial {
    /// A port after reset.
    pub fn new(clock: Clock, irq: IrqLine, sink: Box<dyn SerialSink>) -> Serial {
        Serial {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr: MSR_CONNECTED,
            scr: 0,
            divisor: 12,
            rx: VecDeque::with_capacity(FIFO_BYTES),
            overrun: false,
            thre_pending: false,
            tx: Vec::new(),
            flush_at: GuestNs::NEVER,
            starved: false,
            clock,
            irq,
            sink,
        }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> SerialStateV1 {
        let Serial { ier, fcr, lcr, mcr, msr, scr, divisor, rx, overrun, thre_pending, tx, flush_at, .. } = self;
        let Serial { starved: _, clock: _, irq: _, sink: _, .. } = self;
        SerialStateV1 {
            ier: *ier,
            fcr: *fcr,
            lcr: *lcr,
            mcr: *mcr,
            msr: *msr,
            scr: *scr,
            divisor: *divisor,
            rx: rx.iter().copied().collect(),
            overrun: *overrun,
            thre_pending: *thre_pending,
            tx: tx.clone(),
            flush_at_ns: flush_at.0,
        }
    }

    /// Builds a port from a saved state. `Length`: more bytes than the FIFO or the output buffer holds.
    pub fn restore(
        state: SerialStateV1,
        clock: Clock,
        irq: IrqLine,
        sink: Box<dyn SerialSink>,
    ) -> Result<Serial, StateError> {
        let SerialStateV1 { ier, fcr, lcr, mcr, msr, scr, divisor, rx, overrun, thre_pending, tx, flush_at_ns } = state;
        if rx.len() > FIFO_BYTES {
            return Err(StateError::Length { field: "serial.rx", want: FIFO_BYTES, got: rx.len() });
        }
        if tx.len() > TX_MAX_BYTES {
            return Err(StateError::Length { field: "serial.tx", want: TX_MAX_BYTES, got: tx.len() });
        }
        let serial = Serial {
            ier: ier & 0xf,
            fcr: fcr & 0xc9,
            lcr,
            mcr: mcr & 0x1f,
            msr,
            scr,
            divisor,
            rx: rx.into(),
            overrun,
            thre_pending,
            tx,
            flush_at: GuestNs(flush_at_ns),
            starved: true, // the new back end is asked to look once
            clock,
            irq,
            sink,
        };
        serial.drive_irq();
        Ok(serial)
    }

    /// How many bytes [`Serial::receive`] takes now.
    pub fn room(&mut self) -> usize {
        let free = self.capacity().saturating_sub(self.rx.len());
        let room = if self.mcr & MCR_LOOP != 0 { 0 } else { free };
        self.starved = room == 0;
        room
    }

    /// Bytes from the host; at most [`Serial::room`], what is more is dropped and reported as an overrun.
    pub fn receive(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.push_rx(b));
        self.drive_irq();
    }

    /// Hands over everything collected, as far as the sink takes it.
    pub fn flush(&mut self) {
        let taken = self.sink.write(&self.tx).min(self.tx.len());
        self.tx.drain(..taken);
        if self.tx.is_empty() {
            self.tx.shrink_to(TX_EAGER_BYTES);
            self.flush_at = GuestNs::NEVER;
        } else {
            self.flush_at = self.clock.now().plus(RETRY_DELAY_NS);
        }
    }

    fn capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO_BYTES } else { 1 }
    }
    fn push_rx(&mut self, byte: u8) {
        if self.rx.len() < self.capacity() {
            self.rx.push_back(byte);
        } else {
            self.overrun = true;
        }
    }
    fn transmit(&mut self, byte: u8) {
        self.thre_pending = false;
        if self.mcr & MCR_LOOP != 0 {
            self.push_rx(byte);
        } else if self.tx.len() < TX_MAX_BYTES {
            if self.tx.is_empty() {
                self.flush_at = self.clock.now().plus(FLUSH_DELAY_NS);
            }
            self.tx.push(byte);
            if self.tx.len() == TX_EAGER_BYTES {
                self.flush();
            }
        }
        self.thre_pending = self.tx_empty();
    }
    /// The transmitter holds the guest up only while a sink that may lose nothing is a buffer behind.
    fn tx_empty(&self) -> bool {
        self.tx.len() < TX_MAX_BYTES || self.sink.lossy()
    }
    fn lsr(&self) -> u8 {
        let ready = if self.rx.is_empty() { 0 } else { LSR_DR };
        let empty = if self.tx_empty() { LSR_THRE | LSR_TEMT } else { 0 };
        ready | empty | if self.overrun { LSR_OE } else { 0 }
    }
    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // DS 8.6.7: RTS -> CTS, DTR -> DSR, OUT1 -> RI, OUT2 -> DCD.
        let m = self.mcr;
        (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
    }
    fn update_msr(&mut self) {
        let (old, new) = (self.msr & 0xf0, self.modem_status());
        let changed = (old ^ new) >> 4;
        // The ring indicator reports its trailing edge only. DS 8.7.
        let delta = changed & 0xb | if old & 0x40 != 0 && new & 0x40 == 0 { 4 } else { 0 };
        self.msr = new | self.msr & 0xf | delta;
    }
    fn trigger_bytes(&self) -> usize {
        match (self.fcr & FCR_ENABLE, self.fcr >> 6) {
            (0, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        }
    }
    /// Interrupt identification without the FIFO bits, highest priority first. DS table IV.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            0x06
        } else if self.ier & IER_RX != 0 && self.rx.len() >= self.trigger_bytes() {
            0x04
        } else if self.ier & IER_RX != 0 && !self.rx.is_empty() {
            0x0c // character timeout: time on the wire is zero, so it is due at once
        } else if self.ier & IER_TX != 0 && self.thre_pending {
            0x02
        } else if self.ier & IER_MODEM != 0 && self.msr & 0xf != 0 {
            0x00
        } else {
            0x01
        }
    }
    fn drive_irq(&self) {
        let enabled = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        self.irq.set(enabled && self.cause() != 0x01);
    }
    fn read_rbr(&mut self) -> u8 {
        let byte = self.rx.pop_front().unwrap_or(0);
        if self.starved && self.rx.is_empty() {
            self.starved = false;
            self.sink.room_again();
        }
        byte
    }
    fn write_fcr(&mut self, value: u8) {
        if (value ^ self.fcr) & FCR_ENABLE != 0 || value & 2 != 0 {
            self.rx.clear();
        }
        // Trigger bits can be set only together with the enable bit. DS 8.4.
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
        if value & 4 != 0 {
            self.thre_pending = true;
        }
        if self.starved {
            self.starved = false;
            self.sink.room_again();
        }
    }
    fn write_ier(&mut self, value: u8) {
        let newly = value & !self.ier;
        self.ier = value & 0xf;
        if newly & IER_TX != 0 && self.tx_empty() {
            self.thre_pending = true;
        }
    }
    fn write_mcr(&mut self, value: u8) {
        let left_loop = self.mcr & MCR_LOOP != 0 && value & MCR_LOOP == 0;
        self.mcr = value & 0x1f;
        self.update_msr();
        if left_loop && self.starved {
            self.starved = false;
            self.sink.room_again();
        }
    }
}

impl PortDevice for Serial {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        let dlab = self.lcr & LCR_DLAB != 0;
        let value = match port & 7 {
            0 if dlab => self.divisor as u8,
            1 if dlab => (self.divisor >> 8) as u8,
            0 => self.read_rbr(),
            1 => self.ier,
            2 => {
                let cause = self.cause();
                if cause == 0x02 {
                    self.thre_pending = false;
                }
                cause | if self.fcr & FCR_ENABLE != 0 { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let lsr = self.lsr();
                self.overrun = false;
                lsr
            }
            6 => {
                let msr = self.msr;
                self.msr &= 0xf0;
                msr
            }
            _ => self.scr,
        };
        self.drive_irq();
        value.into()
    }

    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        let value = value as u8;
        let dlab = self.lcr & LCR_DLAB != 0;
        match port & 7 {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => self.write_ier(value),
            2 => self.write_fcr(value),
            3 => self.lcr = value,
            4 => self.write_mcr(value),
            7 => self.scr = value,
            _ => {} // LSR and MSR are read-only here; the DS reserves writes for factory tests
        }
        self.drive_irq();
    }
}

impl TimedDevice for Serial {
    fn next_due(&self) -> Option<GuestNs> {
        (self.flush_at != GuestNs::NEVER).then_some(self.flush_at)
    }
    fn on_due(&mut self, now: GuestNs) {
        if now >= self.flush_at {
            let was_empty = self.tx_empty();
            self.flush();
            self.thre_pending |= !was_empty && self.tx_empty();
            self.drive_irq();
        }
    }
}

impl ResetDevice for Serial {
    fn reset(&mut self) {
        self.flush();
        let tx = std::mem::take(&mut self.tx);
        let sink = std::mem::replace(&mut self.sink, Box::new(NoSink));
        let flush_at = self.flush_at;
        *self = Serial { tx, flush_at, ..Serial::new(self.clock.clone(), self.irq.clone(), sink) };
        self.sink.room_again();
        self.drive_irq();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<(Vec<u8>, bool)>>);
    impl SerialSink for Paper {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let (text, jammed) = &mut *self.0.lock().unwrap();
            if *jammed {
                return 0;
            }
            text.extend_from_slice(bytes);
            bytes.len()
        }
        fn lossy(&self) -> bool {
            false
        }
        fn room_again(&mut self) {}
    }

    struct Subject {
        serial: Serial,
        paper: Paper,
    }
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            let paper = Paper::default();
            Subject { serial: Serial::new(bench.clock.clone(), bench.line(4), Box::new(paper.clone())), paper }
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.serial.save());
            let sink = Box::new(self.paper.clone());
            let serial = Serial::restore(state, bench.clock.clone(), bench.line(4), sink).unwrap();
            Subject { serial, paper: self.paper }
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.serial)
        }
        fn timed(&mut self) -> Option<&mut dyn TimedDevice> {
            Some(&mut self.serial)
        }
        fn word(&mut self, word: &str, words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "host" => self.serial.receive(words.word().as_bytes()),
                "room" => {
                    let room = self.serial.room() as u64;
                    words.check("room", room);
                }
                "paper" => assert_eq!(String::from_utf8_lossy(&self.paper.0.lock().unwrap().0), words.word()),
                "jam" => self.paper.0.lock().unwrap().1 = true,
                "unjam" => self.paper.0.lock().unwrap().1 = false,
                "fill" => (0..TX_MAX_BYTES).for_each(|_| self.serial.write(0x3f8, 1, 0x2e)),
                "reset" => self.serial.reset(),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn output_reaches_the_host_a_millisecond_after_its_first_byte() {
        check::<Subject>("out 3f8 = 68  step 500us  out 3f8 = 69  in 3fd is 60  step 499us  step 1us  paper hi");
    }

    #[test]
    fn registers_after_reset_and_their_writable_bits() {
        check::<Subject>(
            "in 3f9 is 0  in 3fa is 1  in 3fb is 0  in 3fc is 0  in 3fd is 60  in 3fe is b0
             out 3f9 = ff  in 3f9 is f   out 3fc = ff  in 3fc is 1f   out 3ff = a5  in 3ff is a5
             out 3fb = 83  out 3f8 = 34  out 3f9 = 12  in 3f8 is 34  in 3f9 is 12  out 3fb = 3  in 3f9 is f
             reset  in 3f9 is 0  in 3fc is 0",
        );
    }

    #[test]
    fn the_fifo_bits_identify_a_16550a() {
        check::<Subject>("out 3fa = 1  in 3fa is c1  out 3fa = 0  in 3fa is 1");
    }

    #[test]
    fn receive_interrupt_follows_the_trigger_level_and_then_the_timeout() {
        check::<Subject>(
            "out 3fc = 8  out 3fa = 41  out 3f9 = 1   # trigger at 4 bytes
             host abcd  irq 4 high  in 3fa is c4
             in 3f8 is 61  in 3fa is cc               # 3 bytes left: character timeout
             in 3f8 is 62  in 3f8 is 63  in 3fd is 61  in 3f8 is 64  irq 4 low  in 3fa is c1  in 3fd is 60",
        );
    }

    #[test]
    fn transmit_interrupt_comes_once_per_empty_transmitter() {
        check::<Subject>(
            "out 3fc = 8  out 3f9 = 2  irq 4 high  in 3fa is 2  irq 4 low  in 3fa is 1
             out 3f8 = 41  irq 4 high  in 3fa is 2  irq 4 low",
        );
    }

    #[test]
    fn no_interrupt_passes_without_out2() {
        check::<Subject>("out 3f9 = 2  irq 4 low  out 3fc = 8  irq 4 high  out 3fc = 0  irq 4 low");
    }

    #[test]
    fn loopback_turns_bytes_and_modem_lines_around() {
        check::<Subject>(
            "out 3fc = 1f  in 3fe is f0   # RI rose, which is not reported
             out 3fc = 1a  in 3fe is 96   # DTR and OUT1 off: DSR changed, RI fell
             in 3fe is 90
             out 3f8 = 5a  in 3fd is 61  in 3f8 is 5a  room is 0
             out 3fc = 0b  room is 1",
        );
    }

    #[test]
    fn an_overrun_is_reported_once() {
        check::<Subject>(
            "out 3fc = 8  out 3f9 = 4  host ab  irq 4 high  in 3fa is 6  in 3fd is 63  irq 4 low  in 3fd is 61
             in 3f8 is 61  in 3fd is 60",
        );
    }

    #[test]
    fn a_sink_that_may_lose_nothing_holds_the_guest_up() {
        check::<Subject>(
            "jam  fill  in 3fd is 0  out 3fc = 8  out 3f9 = 2  irq 4 low
             unjam  step 10ms  in 3fd is 60  irq 4 high",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let serial = Serial::new(bench.clock.clone(), bench.line(4), Box::new(NoSink));
        golden::check("testdata/states/serial-v1.hex".as_ref(), &serial.save());
    }
}
