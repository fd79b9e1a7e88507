//! The local APIC, xAPIC and x2APIC. SDM 3A chapter 11.

use crate::cpu::{Cpu, Io, Stop};
use crate::mailbox;

/// IA32_APIC_BASE bits.
const BSP: u64 = 1 << 8;
const X2APIC: u64 = 1 << 10;
const ENABLE: u64 = 1 << 11;

/// Register numbers: MMIO offset / 16, the same as the x2APIC MSR minus 0x800.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}
const LVT_THERMAL: usize = 1;
const LVT_LINT0: usize = 3;
const LVT_ERROR: usize = 5;
const MASKED: u32 = 1 << 16;
/// Version 0x14, six LVT entries, no EOI-broadcast suppression.
const VERSION: u32 = 0x0005_0014;

/// The register file, owned by the vCPU's thread.
pub(crate) struct Lapic {
    pub base: u64,
    id: u32,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    esr: u32,
    esr_pending: u32,
    icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial_count: u32,
    divide: u32,
    /// IA32_TSC_DEADLINE as written.
    pub tsc_deadline: u64,
    /// When the timer fires next, guest nanoseconds.
    pub timer_due_ns: Option<u64>,
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    bits.iter().enumerate().rev().find(|(_, w)| **w != 0).map(|(i, w)| (i * 32) as u8 + (31 - w.leading_zeros()) as u8)
}
fn has(bits: &[u32; 8], vector: u8) -> bool {
    bits[vector as usize / 32] & 1 << (vector % 32) != 0
}
fn set(bits: &mut [u32; 8], vector: u8, on: bool) {
    let word = &mut bits[vector as usize / 32];
    *word = *word & !(1 << (vector % 32)) | (on as u32) << (vector % 32);
}

impl Lapic {
    /// After power-on: enabled in IA32_APIC_BASE, software-disabled, LVTs masked. SDM 3A 11.4.7.1. The boot processor's
    /// LINT0 passes the 8259 through, as firmware leaves it: guests are booted without firmware too.
    pub fn new(id: u32) -> Lapic {
        let mut lvt = [MASKED; 6];
        if id == 0 {
            lvt[LVT_LINT0] = 0x700;
        }
        Lapic {
            base: 0xfee0_0000 | ENABLE | if id == 0 { BSP } else { 0 },
            id,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt,
            initial_count: 0,
            divide: 0,
            tsc_deadline: 0,
            timer_due_ns: None,
        }
    }

    pub fn x2apic(&self) -> bool {
        self.base & (ENABLE | X2APIC) == ENABLE | X2APIC
    }
    pub fn enabled(&self) -> bool {
        self.base & ENABLE != 0
    }
    fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & 0x100 != 0
    }

    /// LINT0 passes the 8259's request: the APIC is off, or its LINT0 entry is ExtINT and not masked.
    pub fn accepts_extint(&self) -> bool {
        !self.enabled() || self.lvt[LVT_LINT0] & (MASKED | 0x700) == 0x700
    }

    /// Processor priority. SDM 3A 11.8.3.1.
    fn ppr(&self) -> u32 {
        let in_service = highest(&self.isr).map_or(0, |v| v as u32);
        if self.tpr & 0xf0 >= in_service & 0xf0 { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector that could be delivered now.
    pub fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.software_enabled() && vector as u32 & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// Moves `vector` from requested to in service.
    pub fn accept(&mut self, vector: u8) {
        set(&mut self.irr, vector, false);
        set(&mut self.isr, vector, true);
    }

    /// Requests from the mailbox arrive.
    pub fn merge(&mut self, requests: [(u32, u32); 8]) {
        if !self.enabled() {
            return;
        }
        for (i, (requested, level)) in requests.into_iter().enumerate() {
            self.irr[i] |= requested;
            self.tmr[i] = self.tmr[i] & !requested | level & requested;
        }
    }

    fn request_self(&mut self, vector: u8) {
        if vector < 16 {
            self.esr_pending |= 1 << 6;
        } else {
            set(&mut self.irr, vector, true);
            set(&mut self.tmr, vector, false);
        }
    }

    /// Ends the highest in-service interrupt; its vector if it was level-triggered.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        set(&mut self.isr, vector, false);
        has(&self.tmr, vector).then_some(vector)
    }

    fn tpr_class(&self) -> u64 {
        (self.tpr >> 4) as u64
    }
    /// CR8.
    pub fn cr8(&self) -> u64 {
        self.tpr_class()
    }
    pub fn set_cr8(&mut self, value: u64) {
        self.tpr = (value as u32 & 15) << 4;
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[0] >> 17 & 3
    }
    /// Timer ticks are guest nanoseconds divided by 1 to 128.
    fn divisor(&self) -> u64 {
        1 << (((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7)
    }
    fn arm_count(&mut self, now_ns: u64) {
        self.timer_due_ns = (self.initial_count != 0 && self.timer_mode() != 2)
            .then(|| now_ns + self.initial_count as u64 * self.divisor());
    }
    fn current_count(&self, now_ns: u64) -> u32 {
        match self.timer_due_ns {
            Some(due) if self.timer_mode() != 2 => (due.saturating_sub(now_ns) / self.divisor()) as u32,
            _ => 0,
        }
    }
    /// The timer has reached its deadline.
    pub fn timer_fired(&mut self, now_ns: u64) {
        match (self.timer_mode(), self.timer_due_ns) {
            (1, Some(due)) => {
                let period = (self.initial_count as u64 * self.divisor()).max(1);
                let missed = now_ns.saturating_sub(due) / period;
                self.timer_due_ns = Some(due + (missed + 1) * period);
            }
            _ => {
                self.timer_due_ns = None;
                self.tsc_deadline = 0;
            }
        }
        if self.lvt[0] & MASKED == 0 {
            self.request_self(self.lvt[0] as u8);
        }
    }

    /// Back to the power-on state, at `base`.
    pub fn reset(&mut self, base: u64) {
        *self = Lapic { base, ..Lapic::new(self.id) };
    }

    /// The registers at `now_ns` in the layout of KVM_GET_LAPIC: 16 bytes per register.
    pub fn save(&self, now_ns: u64) -> Vec<u8> {
        let mut area = vec![0u8; 1024];
        for register in 0..64u32 {
            if let Some(value) = self.read(register, now_ns) {
                area[register as usize * 16..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
        area[reg::ICR_HIGH as usize * 16..][..4].copy_from_slice(&((self.icr >> 32) as u32).to_le_bytes());
        area
    }

    /// Takes registers in that layout; a count that was running goes on from where it stood. A deadline in the TSC is
    /// another register's.
    pub fn restore(&mut self, area: &[u8], now_ns: u64) {
        let word = |register: u32| {
            area.get(register as usize * 16..).and_then(|a| a.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b))
        };
        self.id = if self.x2apic() { word(reg::ID) } else { word(reg::ID) >> 24 };
        (self.tpr, self.svr, self.esr) = (word(reg::TPR) & 0xff, word(reg::SVR) & 0x1ff, word(reg::ESR));
        if !self.x2apic() {
            (self.ldr, self.dfr) = (word(reg::LDR), word(reg::DFR) | 0x0fff_ffff);
        }
        for i in 0..8u32 {
            self.isr[i as usize] = word(reg::ISR + i);
            self.tmr[i as usize] = word(reg::TMR + i);
            self.irr[i as usize] = word(reg::IRR + i);
        }
        self.icr = word(reg::ICR) as u64 | (word(reg::ICR_HIGH) as u64) << 32;
        for (i, lvt) in self.lvt.iter_mut().enumerate() {
            *lvt = word(reg::LVT_TIMER + i as u32);
        }
        self.initial_count = word(reg::INITIAL_COUNT);
        self.divide = word(reg::DIVIDE) & 0xb;
        let left = match (word(reg::CURRENT_COUNT), self.timer_mode()) {
            (0, 1) => self.initial_count,
            (left, _) => left,
        };
        self.timer_due_ns = (left != 0 && self.timer_mode() != 2).then(|| now_ns + left as u64 * self.divisor());
    }

    fn logical_identity(&self) -> u32 {
        if self.x2apic() { (self.id >> 4) << 16 | 1 << (self.id & 15) } else { self.ldr }
    }

    fn read(&self, register: u32, now_ns: u64) -> Option<u32> {
        Some(match register {
            reg::ID if self.x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::PPR => self.ppr(),
            reg::LDR => self.logical_identity(),
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr[(register - reg::ISR) as usize],
            reg::TMR..reg::IRR => self.tmr[(register - reg::TMR) as usize],
            reg::IRR..reg::ESR => self.irr[(register - reg::IRR) as usize],
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[(register - reg::LVT_TIMER) as usize],
            reg::INITIAL_COUNT => self.initial_count,
            reg::CURRENT_COUNT => self.current_count(now_ns),
            reg::DIVIDE => self.divide,
            _ => return None,
        })
    }
}

impl Cpu {
    /// `gpa` is in the xAPIC's register page.
    pub(crate) fn is_apic_page(&self, gpa: u64) -> bool {
        gpa & !0xfff == self.lapic.base & 0xff_ffff_f000 && self.lapic.enabled() && !self.lapic.x2apic()
    }

    pub(crate) fn apic_mmio_read(&mut self, gpa: u64, bytes: u64) -> u64 {
        let register = (gpa as u32 & 0xfff) >> 4;
        let value = self.lapic.read(register, self.now_ns()).unwrap_or(0) as u64;
        value >> (8 * (gpa & 3)) & (u64::MAX >> (64 - 8 * bytes))
    }

    pub(crate) fn apic_mmio_write(&mut self, io: Io<'_>, gpa: u64, value: u64, bytes: u64) {
        // Only aligned 32-bit writes are defined. SDM 3A 11.4.1.
        if bytes < 4 || gpa & 0xf != 0 {
            return;
        }
        let register = (gpa as u32 & 0xfff) >> 4;
        if register == reg::ICR_HIGH {
            self.lapic.icr = self.lapic.icr & 0xffff_ffff | (value & 0xff00_0000) << 32;
            return;
        }
        self.apic_write(io, register, value as u32);
    }

    /// RDMSR of an x2APIC register; `None` raises #GP.
    pub(crate) fn x2apic_read(&mut self, register: u32) -> Option<u64> {
        if register == reg::ICR {
            return Some(self.lapic.icr);
        }
        self.lapic.read(register, self.now_ns()).map(u64::from)
    }

    /// WRMSR of an x2APIC register; `None` raises #GP.
    pub(crate) fn x2apic_write(&mut self, io: Io<'_>, register: u32, value: u64) -> Option<()> {
        match register {
            reg::ICR => {
                self.lapic.icr = value & !(1 << 12);
                self.send_ipi((value >> 32) as u32);
                Some(())
            }
            reg::SELF_IPI => {
                self.lapic.request_self(value as u8);
                self.update_interrupt();
                Some(())
            }
            reg::EOI | reg::ESR if value != 0 => None,
            _ if value >> 32 != 0 => None,
            reg::TPR | reg::EOI | reg::SVR | reg::ESR | reg::LVT_TIMER..=reg::INITIAL_COUNT | reg::DIVIDE => {
                self.apic_write(io, register, value as u32);
                Some(())
            }
            _ => None,
        }
    }

    fn apic_write(&mut self, io: Io<'_>, register: u32, value: u32) {
        let now_ns = self.now_ns();
        let apic = &mut self.lapic;
        match register {
            reg::ID => apic.id = value >> 24,
            reg::TPR => apic.tpr = value & 0xff,
            reg::EOI => {
                if let Some(vector) = apic.end_of_interrupt() {
                    io.eoi(vector);
                }
            }
            reg::LDR => apic.ldr = value & 0xff00_0000,
            reg::DFR => apic.dfr = value | 0x0fff_ffff,
            reg::SVR => {
                apic.svr = value & 0x1ff;
                if value & 0x100 == 0 {
                    apic.lvt.iter_mut().for_each(|l| *l |= MASKED);
                }
            }
            reg::ESR => apic.esr = std::mem::take(&mut apic.esr_pending),
            reg::ICR => {
                apic.icr = apic.icr & !0xffff_ffff | (value & !(1 << 12)) as u64;
                let dest = (apic.icr >> 56) as u32;
                self.send_ipi(dest);
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let index = (register - reg::LVT_TIMER) as usize;
                let old_mode = apic.timer_mode();
                apic.lvt[index] = match index {
                    0 => value & 0x0007_00ff,
                    LVT_THERMAL | 2 => value & 0x0001_07ff,
                    LVT_ERROR => value & 0x0001_00ff,
                    _ => value & 0x0001_a7ff,
                };
                if !apic.software_enabled() {
                    apic.lvt[index] |= MASKED;
                }
                if index == 0 && apic.timer_mode() != old_mode {
                    apic.timer_due_ns = None;
                    apic.tsc_deadline = 0;
                }
            }
            reg::INITIAL_COUNT => {
                apic.initial_count = value;
                apic.arm_count(now_ns);
            }
            reg::DIVIDE => {
                apic.divide = value & 0xb;
                apic.arm_count(now_ns);
            }
            _ => {}
        }
        self.publish_identity();
        self.look_at_clock = 0;
        self.update_interrupt();
    }

    fn publish_identity(&self) {
        let apic = &self.lapic;
        self.mailbox.set_identity(apic.id, apic.logical_identity(), apic.x2apic());
    }

    /// Sends what ICR says. SDM 3A 11.6.1.
    fn send_ipi(&mut self, dest: u32) {
        let icr = self.lapic.icr;
        let (vector, mode) = (icr as u8, (icr >> 8 & 7) as u8);
        let logical = icr & 1 << 11 != 0;
        let boxes = std::slice::from_ref(&self.mailbox);
        match icr >> 18 & 3 {
            0 => mailbox::deliver(boxes, dest, logical, mode, vector, false),
            1 | 2 => mailbox::deliver(boxes, u32::MAX, false, mode, vector, false),
            _ => {}
        }
        // What it sent to itself is there at the next instruction.
        self.lapic.merge(self.mailbox.take_requests());
        self.update_interrupt();
    }

    /// WRMSR IA32_APIC_BASE. SDM 3A 11.12.5 "x2APIC State Transitions".
    pub(crate) fn set_apic_base(&mut self, value: u64) -> Result<(), Stop> {
        let reserved = !(0xff_ffff_f000 | BSP | X2APIC | ENABLE);
        let (enable, x2) = (value & ENABLE != 0, value & X2APIC != 0);
        let was_x2 = self.lapic.x2apic();
        let illegal = !enable && x2 || was_x2 && enable && !x2 || !self.lapic.enabled() && x2;
        if value & reserved != 0 || illegal {
            return self.gp(0);
        }
        if !enable && self.lapic.enabled() {
            let id = self.lapic.id;
            self.lapic = Lapic::new(id);
        }
        self.lapic.base = value & !BSP | self.lapic.base & BSP;
        self.tlb.flush_all();
        self.publish_identity();
        self.update_interrupt();
        Ok(())
    }

    /// WRMSR IA32_TSC_DEADLINE. SDM 3A 11.5.4.1 "TSC-Deadline Mode".
    pub(crate) fn set_tsc_deadline(&mut self, value: u64) {
        if self.lapic.timer_mode() != 2 {
            return;
        }
        self.lapic.tsc_deadline = value;
        // The offset is a signed number: a TSC that starts at 0 after guest time did is behind it.
        let due = value as i128 - self.msrs.tsc_offset as i64 as i128;
        self.lapic.timer_due_ns = (value != 0).then(|| due.clamp(0, u64::MAX as i128) as u64);
        self.look_at_clock = 0;
    }
}
