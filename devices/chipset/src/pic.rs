//! Two cascaded 8259A interrupt controllers: ports 0x20, 0x21, 0xa0, 0xa1, and the edge/level control registers 0x4d0
//! and 0x4d1. "DS" is the Intel 8259A data sheet. Pins 0 to 7 are the first chip's, 8 to 15 the second's, which reports
//! into pin 2 of the first. The buffered mode bits are accepted and have no effect, as in the chipset.

use hv_core::{IrqLine, PortDevice, ResetDevice, StateError};
use minicbor::{Decode, Encode};

/// Pin of the first chip that the second reports into.
const CASCADE: u8 = 2;
/// Pins that stay edge-triggered whatever ELCR says: timer, keyboard, cascade; RTC and coprocessor. ICH9 13.4.
const EDGE_ONLY: [u8; 2] = [0x07, 0x21];

/// Saved state of one 8259A.
#[derive(Clone, Debug, PartialEq, Default, Encode, Decode)]
#[allow(missing_docs)] // one register or flip-flop of the DS each
pub struct ChipStateV1 {
    #[n(0)]
    pub irr: u8,
    #[n(1)]
    pub imr: u8,
    #[n(2)]
    pub isr: u8,
    #[n(3)]
    pub levels: u8,
    #[n(4)]
    pub elcr: u8,
    #[n(5)]
    pub base: u8,
    /// Initialisation word expected next, 2 to 4; 0: none.
    #[n(6)]
    pub expects: u8,
    #[n(7)]
    pub wants_icw4: bool,
    #[n(8)]
    pub single: bool,
    #[n(9)]
    pub auto_eoi: bool,
    #[n(10)]
    pub rotate_auto_eoi: bool,
    #[n(11)]
    pub fully_nested: bool,
    #[n(12)]
    pub special_mask: bool,
    #[n(13)]
    pub poll: bool,
    #[n(14)]
    pub read_isr: bool,
    /// The pin of lowest priority.
    #[n(15)]
    pub lowest: u8,
}

/// Saved state of the pair.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct PicStateV1 {
    /// First and second chip.
    #[n(0)]
    pub chips: [ChipStateV1; 2],
}

/// One 8259A. The runtime form is the saved form: every field is guest-visible and none holds a handle.
struct Chip(ChipStateV1);

impl Chip {
    fn new() -> Chip {
        Chip(ChipStateV1 { lowest: 7, ..Default::default() })
    }

    fn set_level(&mut self, pin: u8, high: bool) {
        let bit = 1 << pin;
        let rising = high && self.0.levels & bit == 0;
        self.0.levels = if high { self.0.levels | bit } else { self.0.levels & !bit };
        if self.0.elcr & bit != 0 {
            self.0.irr = if high { self.0.irr | bit } else { self.0.irr & !bit };
        } else if rising {
            self.0.irr |= bit;
        } else if !high {
            // The request must hold until it is acknowledged. DS "Edge and level triggered modes".
            self.0.irr &= !bit;
        }
    }

    /// Pins of `set` by falling priority, the highest first.
    fn highest(&self, set: u8) -> Option<u8> {
        (1..=8).map(|i| (self.0.lowest + i) & 7).find(|&pin| set & 1 << pin != 0)
    }
    fn rank(&self, pin: u8) -> u8 {
        pin.wrapping_sub(self.0.lowest + 1) & 7
    }

    /// The pin whose interrupt is reported now. `nested_pin`: a request of this pin is not held back by its own service.
    fn request(&self, nested_pin: Option<u8>) -> Option<u8> {
        let pin = self.highest(self.0.irr & !self.0.imr)?;
        let mut serving = self.0.isr;
        if self.0.special_mask {
            serving &= !self.0.imr;
        }
        if self.0.fully_nested && nested_pin == Some(pin) {
            serving &= !(1 << pin);
        }
        match self.highest(serving) {
            Some(busy) if self.rank(busy) <= self.rank(pin) => None,
            _ => Some(pin),
        }
    }

    fn acknowledge(&mut self, pin: u8) {
        let bit = 1 << pin;
        if self.0.elcr & bit == 0 {
            self.0.irr &= !bit;
        }
        if self.0.auto_eoi {
            if self.0.rotate_auto_eoi {
                self.0.lowest = pin;
            }
        } else {
            self.0.isr |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        match value & 0x18 {
            _ if value & 0x10 != 0 => self.write_icw1(value),
            0x08 => self.write_ocw3(value),
            _ => self.write_ocw2(value),
        }
    }
    fn write_icw1(&mut self, value: u8) {
        // Edge detection starts over, masks and modes are cleared, pin 7 gets the lowest priority. DS "ICW1".
        let Chip(ChipStateV1 { levels, elcr, .. }) = *self;
        let irr = levels & elcr;
        self.0 = ChipStateV1 { levels, elcr, irr, ..Chip::new().0 };
        self.0.expects = 2;
        self.0.wants_icw4 = value & 1 != 0;
        self.0.single = value & 2 != 0;
    }
    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        // The in-service bit that a non-specific end of interrupt clears.
        let mask = if self.0.special_mask { self.0.imr } else { 0 };
        match value >> 5 {
            0 => self.0.rotate_auto_eoi = false,
            4 => self.0.rotate_auto_eoi = true,
            command @ (1 | 5) => {
                if let Some(pin) = self.highest(self.0.isr & !mask) {
                    self.0.isr &= !(1 << pin);
                    if command == 5 {
                        self.0.lowest = pin;
                    }
                }
            }
            3 => self.0.isr &= !(1 << named),
            7 => {
                self.0.isr &= !(1 << named);
                self.0.lowest = named;
            }
            6 => self.0.lowest = named,
            _ => {} // 010 is no operation
        }
    }
    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.0.special_mask = value & 0x20 != 0;
        }
        if value & 4 != 0 {
            self.0.poll = true;
        } else if value & 2 != 0 {
            self.0.read_isr = value & 1 != 0;
        }
    }
    fn write_data(&mut self, value: u8) {
        match self.0.expects {
            2 => {
                self.0.base = value & 0xf8;
                self.0.expects = match (self.0.single, self.0.wants_icw4) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            // The wiring of the cascade is fixed in the chipset.
            3 => self.0.expects = if self.0.wants_icw4 { 4 } else { 0 },
            4 => {
                self.0.fully_nested = value & 0x10 != 0;
                self.0.auto_eoi = value & 2 != 0;
                self.0.expects = 0;
            }
            _ => self.0.imr = value,
        }
    }
    fn poll(&mut self, nested_pin: Option<u8>) -> u8 {
        self.0.poll = false;
        match self.request(nested_pin) {
            Some(pin) => {
                self.acknowledge(pin);
                0x80 | pin
            }
            None => 0,
        }
    }

    fn restore(state: ChipStateV1) -> Result<Chip, StateError> {
        let value = |field, got: u8| Err(StateError::Value { field, got: got.into() });
        match &state {
            s if s.expects == 1 || s.expects > 4 => value("pic.expects", s.expects),
            s if s.lowest > 7 => value("pic.lowest", s.lowest),
            s if s.base & 7 != 0 => value("pic.base", s.base),
            _ => Ok(Chip(state)),
        }
    }
}

/// The pair.
pub struct Pic {
    chips: [Chip; 2],
    intr: IrqLine,
}

impl Pic {
    /// The pair after power-on. `intr` is the output into the processor.
    pub fn new(intr: IrqLine) -> Pic {
        Pic { chips: [Chip::new(), Chip::new()], intr }
    }

    /// What a snapshot carries.
    pub fn save(&self) -> PicStateV1 {
        let Pic { chips, intr: _ } = self;
        PicStateV1 { chips: chips.each_ref().map(|c| c.0.clone()) }
    }

    /// Builds the pair from a saved state. `Value`: a state that the chip cannot be in.
    pub fn restore(state: PicStateV1, intr: IrqLine) -> Result<Pic, StateError> {
        let PicStateV1 { chips: [first, second] } = state;
        let mut pic = Pic { chips: [Chip::restore(first)?, Chip::restore(second)?], intr };
        pic.update();
        Ok(pic)
    }

    /// The level of input `pin`, 0 to 15. Pin 2 is taken by the cascade: changes are ignored.
    pub fn set_level(&mut self, pin: u8, high: bool) {
        if pin == CASCADE {
            return;
        }
        if let Some(chip) = self.chips.get_mut(usize::from(pin >> 3)) {
            chip.set_level(pin & 7, high);
            self.update();
        }
    }

    /// The processor's acknowledge cycle: the vector. A request that has gone yields the spurious one, pin 7. DS "Interrupt
    /// sequence".
    pub fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.chips;
        let vector = match first.request(Some(CASCADE)) {
            Some(CASCADE) => {
                first.acknowledge(CASCADE);
                match second.request(None) {
                    Some(pin) => {
                        second.acknowledge(pin);
                        second.0.base | pin
                    }
                    None => second.0.base | 7,
                }
            }
            Some(pin) => {
                first.acknowledge(pin);
                first.0.base | pin
            }
            None => first.0.base | 7,
        };
        self.update();
        vector
    }

    /// Whether the output is high: the processor has something to acknowledge.
    pub fn pending(&self) -> bool {
        self.chips[0].request(Some(CASCADE)).is_some()
    }

    fn update(&mut self) {
        let [first, second] = &mut self.chips;
        // The cascade pin pulses for every new request of the second chip, so its level may be repeated.
        let cascade = second.request(None).is_some();
        first.set_level(CASCADE, false);
        first.set_level(CASCADE, cascade);
        self.intr.set(self.pending());
    }
}

impl PortDevice for Pic {
    fn read(&mut self, port: u16, _bytes: u8) -> u32 {
        let index = usize::from(matches!(port, 0xa0 | 0xa1 | 0x4d1));
        let nested_pin = (index == 0).then_some(CASCADE);
        let chip = &mut self.chips[index];
        let value = match port {
            0x4d0 | 0x4d1 => chip.0.elcr,
            _ if chip.0.poll => chip.poll(nested_pin),
            _ if port & 1 != 0 => chip.0.imr,
            _ if chip.0.read_isr => chip.0.isr,
            _ => chip.0.irr,
        };
        self.update();
        value.into()
    }

    fn write(&mut self, port: u16, _bytes: u8, value: u32) {
        let value = value as u8;
        match port {
            0x4d0 | 0x4d1 => {
                let index = usize::from(port & 1);
                let chip = &mut self.chips[index].0;
                chip.elcr = value & !EDGE_ONLY[index];
                chip.irr |= chip.elcr & chip.levels;
            }
            0xa0 => self.chips[1].write_command(value),
            0xa1 => self.chips[1].write_data(value),
            _ if port & 1 != 0 => self.chips[0].write_data(value),
            _ => self.chips[0].write_command(value),
        }
        self.update();
    }
}

impl ResetDevice for Pic {
    fn reset(&mut self) {
        for chip in &mut self.chips {
            let levels = chip.0.levels;
            *chip = Chip::new();
            chip.0.levels = levels;
        }
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(Pic);
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(Pic::new(bench.line(0)))
        }
        fn reload(self, bench: &Bench) -> Self {
            Subject(Pic::restore(golden::recode(&self.0.save()), bench.line(0)).unwrap())
        }
        fn port(&mut self) -> Option<&mut dyn PortDevice> {
            Some(&mut self.0)
        }
        fn word(&mut self, word: &str, words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "pin" => {
                    let pin = words.dec() as u8;
                    let high = words.word() == "high";
                    self.0.set_level(pin, high);
                }
                "ack" => {
                    let vector = self.0.acknowledge();
                    words.check("vector", vector.into());
                }
                // The usual initialisation: vectors 0x30 and 0x38, everything unmasked.
                "init" => {
                    for (port, value) in [
                        (0x20, 0x11),
                        (0x21, 0x30),
                        (0x21, 4),
                        (0x21, 1),
                        (0xa0, 0x11),
                        (0xa1, 0x38),
                        (0xa1, 2),
                        (0xa1, 1),
                    ] {
                        self.0.write(port, 1, value);
                    }
                }
                "reset" => self.0.reset(),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn an_edge_is_reported_once_and_ends_with_eoi() {
        check::<Subject>(
            "init  pin 3 high  irq 0 high  ack is 33  irq 0 low  out 20 = 0b  in 20 is 8  out 20 = 20  in 20 is 0
             irq 0 low  pin 3 low  pin 3 high  irq 0 high",
        );
    }

    #[test]
    fn a_level_is_reported_as_long_as_it_holds() {
        check::<Subject>(
            "init  out 4d0 = ff  in 4d0 is f8  out 4d1 = ff  in 4d1 is de
             pin 5 high  ack is 35  irq 0 low  out 20 = 20  irq 0 high  ack is 35  pin 5 low  out 20 = 20  irq 0 low",
        );
    }

    #[test]
    fn the_second_chip_reports_through_the_first() {
        check::<Subject>(
            "init  pin 12 high  irq 0 high  ack is 3c  irq 0 low
             pin 8 high  irq 0 low              # of higher priority, but the first chip serves its cascade pin
             out a0 = 20  out 20 = 20  irq 0 high  ack is 38",
        );
    }

    #[test]
    fn the_special_fully_nested_mode_lets_the_second_chip_interrupt_itself() {
        check::<Subject>(
            "init  out 20 = 11  out 21 = 30  out 21 = 4  out 21 = 11
             pin 12 high  ack is 3c  pin 8 high  irq 0 high  ack is 38",
        );
    }

    #[test]
    fn priority_is_by_pin_and_masks_hold_back() {
        check::<Subject>(
            "init  out 21 = 8  pin 3 high  irq 0 low  pin 6 high  pin 4 high  ack is 34  pin 1 high  ack is 31
             out 20 = 20  out 20 = 20  ack is 36  out 21 = 0  irq 0 high  ack is 33",
        );
    }

    #[test]
    fn a_request_that_has_gone_is_spurious() {
        check::<Subject>("init  pin 3 high  pin 3 low  irq 0 low  ack is 37  out 20 = 0b  in 20 is 0");
    }

    #[test]
    fn rotation_makes_the_served_pin_the_last() {
        check::<Subject>(
            "init  pin 3 high  pin 4 high  ack is 33  out 20 = a0  pin 3 low pin 3 high  ack is 34  out 20 = 20  ack is 33
             out 20 = 20 out 20 = c5  pin 5 low pin 5 high pin 6 high  ack is 36",
        );
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        check::<Subject>(
            "out 20 = 11 out 21 = 30 out 21 = 4 out 21 = 3  pin 1 high  ack is 31  out 20 = b  in 20 is 0",
        );
    }

    #[test]
    fn the_special_mask_mode_lets_lower_pins_through() {
        check::<Subject>(
            "init  pin 3 high ack is 33  pin 6 high irq 0 low  out 21 = 8  out 20 = 68  irq 0 high  ack is 36",
        );
    }

    #[test]
    fn a_poll_acknowledges() {
        check::<Subject>(
            "init  pin 4 high  out 20 = c  in 20 is 84  irq 0 low  out 20 = b in 20 is 10  out 20 = c  in 20 is 0",
        );
    }

    #[test]
    fn reset_masks_nothing_and_forgets_requests() {
        check::<Subject>("init  out 21 = ff  pin 4 high  reset  in 21 is 0  in 20 is 0  irq 0 low");
    }

    #[test]
    fn the_shipped_state_decodes() {
        golden::check("testdata/states/pic-v1.hex".as_ref(), &Pic::new(Bench::new().line(0)).save());
    }
}
