//! i8042 keyboard controller, ports 0x60 and 0x64, with a keyboard and a mouse that are present, answer their commands
//! and never send anything by themselves. IRQ 1 and IRQ 12. Command bytes are those of the IBM PS/2 reference manual.

use std::collections::VecDeque;
use std::sync::Arc;

use hv_core::{IrqLine, Lifecycle, PortDevice, PowerEvent, ResetDevice, StateError};
use minicbor::{Decode, Encode};

const STATUS_OUTPUT: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;

const MODE_KBD_INT: u8 = 0x01;
const MODE_AUX_INT: u8 = 0x02;
const MODE_SYSTEM: u8 = 0x04;
const MODE_KBD_OFF: u8 = 0x10;
const MODE_AUX_OFF: u8 = 0x20;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
/// Bytes that may wait to be read; the devices answer at most four at a time.
const QUEUE_BYTES: usize = 64;

/// Saved state.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
pub struct I8042StateV1 {
    /// Controller command byte.
    #[n(0)]
    pub mode: u8,
    /// Last write went to the command port.
    #[n(1)]
    pub command: bool,
    /// Controller command that waits for its data byte; 0: none.
    #[n(2)]
    pub controller_waits: u8,
    /// Keyboard command that waits for its argument; 0: none.
    #[n(3)]
    pub keyboard_waits: u8,
    /// Mouse command that waits for its argument; 0: none.
    #[n(4)]
    pub mouse_waits: u8,
    /// Output port.
    #[n(5)]
    pub output_port: u8,
    /// Scan code set chosen.
    #[n(6)]
    pub scan_set: u8,
    /// Bytes to read, bit 8 set where they come from the mouse.
    #[n(7)]
    pub queue: Vec<u16>,
}

/// The controller.
pub struct I8042 {
    mode: u8,
    command: bool,
    controller_waits: u8,
    keyboard_waits: u8,
    mouse_waits: u8,
    output_port: u8,
    scan_set: u8,
    queue: VecDeque<u16>,
    irq1: IrqLine,
    irq12: IrqLine,
    lifecycle: Arc<dyn Lifecycle>,
}

const FROM_MOUSE: u16 = 0x100;

impl I8042 {
    /// The controller after reset.
    pub fn new(irq1: IrqLine, irq12: IrqLine, lifecycle: Arc<dyn Lifecycle>) -> I8042 {
        I8042 {
            mode: MODE_KBD_INT | MODE_AUX_INT | MODE_SYSTEM,
            command: false,
            controller_waits: 0,
            keyboard_waits: 0,
            mouse_waits: 0,
            output_port: 0x03, // reset line inactive, A20 open
            scan_set: 2,
            queue: VecDeque::new(),
            irq1,
            irq12,
            lifecycle,
        }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> I8042StateV1 {
        let I8042 {
            mode, command, controller_waits, keyboard_waits, mouse_waits, output_port, scan_set, queue, ..
        } = self;
        let I8042 { irq1: _, irq12: _, lifecycle: _, .. } = self;
        I8042StateV1 {
            mode: *mode,
            command: *command,
            controller_waits: *controller_waits,
            keyboard_waits: *keyboard_waits,
            mouse_waits: *mouse_waits,
            output_port: *output_port,
            scan_set: *scan_set,
            queue: queue.iter().copied().collect(),
        }
    }

    /// Builds the controller from a saved state. `Length`: more bytes than the queue holds.
    pub fn restore(
        state: I8042StateV1,
        irq1: IrqLine,
        irq12: IrqLine,
        lifecycle: Arc<dyn Lifecycle>,
    ) -> Result<I8042, StateError> {
        let I8042StateV1 { mode, command, controller_waits, keyboard_waits, mouse_waits, output_port, scan_set, queue } =
            state;
        if queue.len() > QUEUE_BYTES {
            return Err(StateError::Length { field: "i8042.queue", want: QUEUE_BYTES, got: queue.len() });
        }
        let controller = I8042 {
            mode,
            command,
            controller_waits,
            keyboard_waits,
            mouse_waits,
            output_port,
            scan_set,
            queue: queue.into(),
            irq1,
            irq12,
            lifecycle,
        };
        controller.drive_irqs();
        Ok(controller)
    }

    fn drive_irqs(&self) {
        let from_mouse = self.queue.front().map(|byte| byte & FROM_MOUSE != 0);
        self.irq1.set(from_mouse == Some(false) && self.mode & MODE_KBD_INT != 0);
        self.irq12.set(from_mouse == Some(true) && self.mode & MODE_AUX_INT != 0);
    }
    fn answer(&mut self, source: u16, bytes: &[u8]) {
        for &byte in bytes {
            if self.queue.len() < QUEUE_BYTES {
                self.queue.push_back(source | u16::from(byte));
            }
        }
    }

    fn write_command(&mut self, command: u8) {
        self.controller_waits = 0;
        match command {
            0x20 => self.answer(0, &[self.mode]),
            0x60 | 0xd1..=0xd4 => self.controller_waits = command,
            0xa7 => self.mode |= MODE_AUX_OFF,
            0xa8 => self.mode &= !MODE_AUX_OFF,
            0xa9 | 0xab => self.answer(0, &[0x00]), // line tests pass
            0xaa => {
                // The self test leaves the controller as after power-on.
                self.mode = MODE_SYSTEM | MODE_KBD_OFF | MODE_AUX_OFF;
                self.queue.clear();
                self.answer(0, &[0x55]);
            }
            0xad => self.mode |= MODE_KBD_OFF,
            0xae => self.mode &= !MODE_KBD_OFF,
            0xc0 => self.answer(0, &[0x80]), // input port: not locked
            0xd0 => self.answer(0, &[self.output_port]),
            // Pulses output lines that are 0 in the command; line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => self.lifecycle.request(PowerEvent::Reset),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match std::mem::take(&mut self.controller_waits) {
            0x60 => self.mode = value,
            0xd1 => {
                self.output_port = value | 1;
                if value & 1 == 0 {
                    self.lifecycle.request(PowerEvent::Reset);
                }
            }
            0xd2 => self.answer(0, &[value]),
            0xd3 => self.answer(FROM_MOUSE, &[value]),
            0xd4 => self.mouse(value),
            _ => {
                self.mode &= !MODE_KBD_OFF; // a byte for the keyboard opens its line
                self.keyboard(value);
            }
        }
    }

    fn keyboard(&mut self, value: u8) {
        match (std::mem::take(&mut self.keyboard_waits), value) {
            (0xf0, 0) => self.answer(0, &[ACK, self.scan_set]),
            (0xf0, set @ 1..=3) => {
                self.scan_set = set;
                self.answer(0, &[ACK]);
            }
            (0xed | 0xf3, _) => self.answer(0, &[ACK]),
            (_, 0xed | 0xf0 | 0xf3) => {
                self.keyboard_waits = value;
                self.answer(0, &[ACK]);
            }
            (_, 0xee) => self.answer(0, &[0xee]),
            (_, 0xf2) => self.answer(0, &[ACK, 0xab, 0x83]),
            (_, 0xf4..=0xf6) => self.answer(0, &[ACK]),
            (_, 0xff) => {
                self.scan_set = 2;
                self.answer(0, &[ACK, 0xaa]);
            }
            _ => self.answer(0, &[RESEND]),
        }
    }

    fn mouse(&mut self, value: u8) {
        match (std::mem::take(&mut self.mouse_waits), value) {
            (0xe8 | 0xf3, _) => self.answer(FROM_MOUSE, &[ACK]),
            (_, 0xe8 | 0xf3) => {
                self.mouse_waits = value;
                self.answer(FROM_MOUSE, &[ACK]);
            }
            (_, 0xe6 | 0xe7 | 0xea | 0xf0 | 0xf4..=0xf6) => self.answer(FROM_MOUSE, &[ACK]),
            (_, 0xe9) => self.answer(FROM_MOUSE, &[ACK, 0x00, 0x02, 0x64]), // 4 counts per mm, 100 reports per second
            (_, 0xeb) => self.answer(FROM_MOUSE, &[ACK, 0x08, 0x00, 0x00]), // no button, no movement
            (_, 0xf2) => self.answer(FROM_MOUSE, &[ACK, 0x00]),
            (_, 0xff) => self.answer(FROM_MOUSE, &[ACK, 0xaa, 0x00]),
            _ => self.answer(FROM_MOUSE, &[RESEND]),
        }
    }
}

impl PortDevice for I8042 {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        if port & 4 != 0 {
            let source = match self.queue.front() {
                None => 0,
                Some(byte) if byte & FROM_MOUSE != 0 => STATUS_OUTPUT | STATUS_AUX,
                Some(_) => STATUS_OUTPUT,
            };
            let command = if self.command { STATUS_COMMAND } else { 0 };
            let system = if self.mode & MODE_SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
            return (source | command | system | STATUS_UNLOCKED).into();
        }
        let byte = self.queue.pop_front().unwrap_or(0);
        // The line falls between two bytes, so that each is an edge.
        self.irq1.lower();
        self.irq12.lower();
        self.drive_irqs();
        (byte & 0xff).into()
    }

    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        self.command = port & 4 != 0;
        if self.command {
            self.write_command(value as u8);
        } else {
            self.write_data(value as u8);
        }
        self.drive_irqs();
    }
}

impl ResetDevice for I8042 {
    fn reset(&mut self) {
        *self = I8042::new(self.irq1.clone(), self.irq12.clone(), self.lifecycle.clone());
        self.drive_irqs();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(I8042);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(I8042::new(bench.line(1), bench.line(12), bench.probe.clone()))
        }
        fn reload(self, bench: &Bench) -> Self {
            let state = golden::recode(&self.0.save());
            Subject(I8042::restore(state, bench.line(1), bench.line(12), bench.probe.clone()).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, _words: &mut Words<'_>, _bench: &Bench) -> bool {
            self.0.reset();
            word == "reset"
        }
    }

    #[test]
    fn the_probe_of_linux_finds_what_it_looks_for() {
        // drivers/input/serio/i8042.c: controller test, command byte round trip, AUX loopback, AUX test.
        check::<Subject>(
            "in 64 is 14  out 64 = aa  in 64 is 1d  in 60 is 55  in 64 is 1c
             out 64 = 60  out 60 = 74  out 64 = 20  in 60 is 74
             out 64 = d3  out 60 = a5  in 64 is 35  in 60 is a5
             out 64 = a9  in 60 is 0  out 64 = a7  out 64 = 20  in 60 is 74  out 64 = a8  out 64 = 20  in 60 is 54",
        );
    }

    #[test]
    fn the_keyboard_answers_with_interrupts() {
        check::<Subject>(
            "out 60 = f2  irq 1 high  in 60 is fa  edges 1 is 2  in 60 is ab  in 60 is 83  irq 1 low  edges 1 is 1
             out 60 = ff  in 60 is fa  in 60 is aa  out 60 = ed  in 60 is fa  out 60 = 7  in 60 is fa
             out 60 = f0 in 60 is fa out 60 = 0 in 60 is fa in 60 is 2  out 60 = 12  in 60 is fe  out 60 = ee in 60 is ee",
        );
    }

    #[test]
    fn the_mouse_answers_through_its_own_line() {
        check::<Subject>(
            "out 64 = d4  out 60 = ff  irq 12 high  irq 1 low  in 64 is 35  in 60 is fa  in 60 is aa  in 60 is 0  irq 12 low
             out 64 = d4  out 60 = e8  out 64 = d4  out 60 = 3  in 60 is fa  in 60 is fa
             out 64 = d4  out 60 = e1  in 60 is fe",
        );
    }

    #[test]
    fn lines_stay_low_without_their_enable_bit() {
        check::<Subject>("out 64 = 60  out 60 = 0  out 60 = ee  irq 1 low  in 60 is ee");
    }

    #[test]
    fn both_ways_to_pulse_the_reset_line() {
        check::<Subject>(
            "out 64 = ff power none  out 64 = fe  power is reset  out 64 = d1  out 60 = 3  power none
             out 64 = d0 in 60 is 3  out 64 = d1  out 60 = 2  power is reset",
        );
    }

    #[test]
    fn a_flood_of_commands_is_bounded() {
        let script = "out 60 = f2 ".repeat(100) + &"in 60 ".repeat(QUEUE_BYTES) + "in 64 is 14";
        check::<Subject>(&script);
    }

    #[test]
    fn the_shipped_state_decodes() {
        let bench = Bench::new();
        let controller = I8042::new(bench.line(1), bench.line(12), bench.probe.clone());
        golden::check("testdata/states/i8042-v1.hex".as_ref(), &controller.save());
    }
}
