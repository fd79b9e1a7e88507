//! Delivery of exceptions and interrupts, and the way back. SDM 3A chapter 6.

use hv_core::Halt;
use x86::Segment;

use crate::cpu::{CS, Cpu, DS, ES, FS, Fault, Flow, GS, Io, RSP, SS, Stop, rf};
use crate::segment::{Descriptor, canonical, is_null};

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub vector: u8,
    pub error: Option<u32>,
    pub kind: Kind,
}
/// Where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Exception,
    External,
    /// INT n, INT3, INTO: gate privilege is checked; the saved address is that of the next instruction.
    Software,
}

/// What a delivery pushes and where control goes.
struct Entry {
    cs: Segment,
    cpl: u8,
    rip: u64,
    trap_gate: bool,
}

impl Cpu {
    /// Delivers `event` with the return address `self.rip`, escalating faults on the way to double and triple; those
    /// are reported at `start`, the instruction being executed. SDM 3A 6.15 "Interrupt 8 - Double Fault Exception".
    pub fn deliver(&mut self, io: Io<'_>, event: Event, start: u64) -> Result<(), Halt> {
        let mut event = event;
        loop {
            match self.try_deliver(io, event) {
                Ok(()) => {
                    self.halted = false;
                    return Ok(());
                }
                Err(Stop::Fault) => {
                    self.rip = start;
                    let second = self.fault;
                    if event.vector == 8 && event.kind == Kind::Exception {
                        return Err(Halt::TripleFault);
                    }
                    let first = if event.kind == Kind::Exception { event.vector } else { 0xff };
                    let double = contributory(first) && contributory(second.vector)
                        || first == 14 && (contributory(second.vector) || second.vector == 14);
                    event = if double {
                        Event { vector: 8, error: Some(0), kind: Kind::Exception }
                    } else {
                        let external = (event.kind != Kind::Software) as u32;
                        let error = second.error.map(|e| if second.vector == 14 { e } else { e | external });
                        Event { vector: second.vector, error, kind: Kind::Exception }
                    };
                }
                Err(_) => return Err(Halt::InternalError(self.internal_error())),
            }
        }
    }

    /// Delivers the pending fault.
    pub fn deliver_fault(&mut self, io: Io<'_>) -> Result<(), Halt> {
        self.faults_delivered += 1;
        let Fault { vector, error } = self.fault;
        self.deliver(io, Event { vector, error, kind: Kind::Exception }, self.rip)
    }

    fn try_deliver(&mut self, io: Io<'_>, event: Event) -> Flow {
        if !self.protected() && self.rflags & rf::VM == 0 {
            return self.deliver_real(io, event.vector);
        }
        if self.long_mode() { self.deliver_long(io, event) } else { self.deliver_protected(io, event) }
    }

    /// SDM 3A 20.1.4 "Interrupt and Exception Handling" of real-address mode.
    fn deliver_real(&mut self, io: Io<'_>, vector: u8) -> Flow {
        let at = vector as u64 * 4;
        if at + 3 > self.idtr.limit as u64 {
            return self.gp(vector as u32 * 8 + 2);
        }
        let gate = self.load_sys(io, self.idtr.base.wrapping_add(at), 4)?;
        let sp = self.gpr[RSP];
        let flags = self.full_rflags();
        for (i, value) in [flags, self.seg[CS].selector as u64, self.rip].into_iter().enumerate() {
            let offset = sp.wrapping_sub(2 * (i as u64 + 1)) & 0xffff;
            let va = self.segmented(SS as u8, offset, 2, true)?;
            self.store_sys(io, va, value & 0xffff, 2)?;
        }
        self.gpr[RSP] = sp & !0xffff | sp.wrapping_sub(6) & 0xffff;
        self.load_real_segment(CS, (gate >> 16) as u16);
        self.rip = gate & 0xffff;
        self.set_full_rflags(flags & !(rf::IF | rf::TF | rf::AC));
        Ok(())
    }

    /// Checks the gate and the code segment it leads to; `None` for a task gate.
    fn gate(&mut self, io: Io<'_>, event: Event, bytes: u64) -> Result<(Descriptor, u64), Stop> {
        let at = event.vector as u64 * bytes;
        let error = event.vector as u32 * 8 + 2;
        if at + bytes - 1 > self.idtr.limit as u64 {
            return self.gp(error);
        }
        let at = self.idtr.base.wrapping_add(at);
        let gate = Descriptor { raw: self.load_sys(io, at, 8)?, at };
        let high = if bytes == 16 { self.load_sys(io, at.wrapping_add(8), 8)? } else { 0 };
        let known =
            if bytes == 16 { matches!(gate.kind(), 14 | 15) } else { matches!(gate.kind(), 5 | 6 | 7 | 14 | 15) };
        if gate.is_segment() || !known || event.kind == Kind::Software && gate.dpl() < self.cpl {
            return self.gp(error);
        }
        if !gate.present() {
            return self.raise_code(11, error);
        }
        if gate.kind() == 5 {
            return self.give_up("an interrupt through a task gate is not implemented");
        }
        Ok((gate, high))
    }

    fn gate_entry(&mut self, io: Io<'_>, gate: Descriptor, high: u64) -> Result<Entry, Stop> {
        let selector = (gate.raw >> 16) as u16;
        if is_null(selector) {
            return self.gp(0);
        }
        let error = selector as u32 & !3;
        let mut code = self.descriptor(io, selector, 13)?;
        let long = self.long_mode();
        if !code.is_code() || code.dpl() > self.cpl || long && (!code.long() || code.big()) {
            return self.gp(error);
        }
        if !code.present() {
            return self.raise_code(11, error);
        }
        self.mark_accessed(io, &mut code)?;
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let mut rip = gate.raw & 0xffff;
        if gate.kind() & 8 != 0 {
            rip |= gate.raw >> 32 & 0xffff_0000;
        }
        rip |= high << 32;
        let cs = code.segment(selector & !3 | cpl as u16);
        Ok(Entry { cs, cpl, rip, trap_gate: gate.kind() & 1 != 0 })
    }

    /// SDM 3A 6.14 "Exception and Interrupt Handling in 64-bit Mode".
    fn deliver_long(&mut self, io: Io<'_>, event: Event) -> Flow {
        let (gate, high) = self.gate(io, event, 16)?;
        let entry = self.gate_entry(io, gate, high & 0xffff_ffff)?;
        let ist = gate.raw >> 32 & 7;
        let inner = entry.cpl < self.cpl;
        let top = if ist != 0 {
            self.tss64_stack(io, 3 + ist)?
        } else if inner {
            self.tss64_stack(io, entry.cpl as u64)?
        } else {
            self.gpr[RSP]
        };
        let mut rsp = top & !15;
        let old_flags = self.full_rflags();
        let frame = [
            self.seg[SS].selector as u64,
            self.gpr[RSP],
            self.flags_to_push(event),
            self.seg[CS].selector as u64,
            self.rip,
        ];
        for value in frame {
            rsp = rsp.wrapping_sub(8);
            self.push_checked(io, entry.cpl, rsp, value)?;
        }
        if let Some(error) = event.error {
            rsp = rsp.wrapping_sub(8);
            self.push_checked(io, entry.cpl, rsp, error as u64)?;
        }
        if inner {
            let cpl = entry.cpl;
            self.seg[SS] =
                Segment { selector: cpl as u16, base: 0, limit: 0, attributes: Segment::UNUSABLE | (cpl as u32) << 5 };
        }
        self.gpr[RSP] = rsp;
        self.finish_entry(entry, old_flags);
        Ok(())
    }

    fn push_checked(&mut self, io: Io<'_>, cpl: u8, rsp: u64, value: u64) -> Flow {
        if !canonical(rsp) {
            return self.raise_code(12, 0);
        }
        self.store_as(io, cpl, rsp, value, 8)
    }

    /// RF is set in the image a fault pushes, so that its handler's IRET does not meet the same breakpoint again.
    fn flags_to_push(&self, event: Event) -> u64 {
        let fault = event.kind == Kind::Exception && !matches!(event.vector, 1 | 3 | 4 | 8);
        self.full_rflags() | if fault { rf::RF } else { 0 }
    }

    fn finish_entry(&mut self, entry: Entry, old_flags: u64) {
        let mut clear = rf::TF | rf::NT | rf::RF | rf::VM;
        if !entry.trap_gate {
            clear |= rf::IF;
        }
        self.enter_code(entry.cs, entry.cpl, entry.rip);
        self.set_full_rflags(old_flags & !clear);
        self.update_mode();
    }

    /// SDM 3A 6.12.1 "Exception- or Interrupt-Handler Procedures", from virtual-8086 mode too (20.3.1).
    fn deliver_protected(&mut self, io: Io<'_>, event: Event) -> Flow {
        let from_v86 = self.rflags & rf::VM != 0;
        let (gate, _) = self.gate(io, event, 8)?;
        let entry = self.gate_entry(io, gate, 0)?;
        if from_v86 && entry.cpl != 0 {
            return self.gp(entry.cs.selector as u32 & !3);
        }
        let bytes: u64 = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let flags = self.flags_to_push(event);
        let mut frame = Vec::with_capacity(10);
        let inner = entry.cpl < self.cpl || from_v86;
        let (ss, esp) = if inner {
            let (selector, esp) = self.tss_stack(io, entry.cpl)?;
            let ss = self.inner_stack(io, selector, entry.cpl)?;
            if from_v86 {
                frame.extend([GS, FS, DS, ES].map(|s| self.seg[s].selector as u64));
            }
            frame.extend([self.seg[SS].selector as u64, self.gpr[RSP]]);
            (ss, esp as u64)
        } else {
            (self.seg[SS], self.gpr[RSP])
        };
        frame.extend([flags, self.seg[CS].selector as u64, self.rip]);
        frame.extend(event.error.map(u64::from));
        let mask = if ss.big() { 0xffff_ffff } else { 0xffff };
        let mut sp = esp;
        for value in frame {
            sp = sp.wrapping_sub(bytes) & mask;
            if sp as u32 > ss.limit && ss.kind() & 4 == 0 {
                return self.raise_code(12, if inner { ss.selector as u32 & !3 } else { 0 });
            }
            let va = ss.base.wrapping_add(sp) & 0xffff_ffff;
            self.store_as(io, entry.cpl, va, value & (u64::MAX >> (64 - 8 * bytes)), bytes)?;
        }
        self.gpr[RSP] = if ss.big() { sp } else { esp & 0xffff_0000 | sp };
        self.seg[SS] = ss;
        if from_v86 {
            for s in [GS, FS, DS, ES] {
                self.seg[s] = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
            }
        }
        let old_flags = self.full_rflags();
        self.finish_entry(entry, old_flags);
        Ok(())
    }

    /// The stack segment of an inner level, faults as #TS. SDM 3A 6.12.1.
    pub fn inner_stack(&mut self, io: Io<'_>, selector: u16, cpl: u8) -> Result<Segment, Stop> {
        let error = selector as u32 & !3;
        if is_null(selector) {
            return self.raise_code(10, error);
        }
        let mut d = self.descriptor(io, selector, 10)?;
        let good = d.is_segment() && !d.is_code() && d.kind() & 2 != 0 && d.dpl() == cpl && (selector & 3) as u8 == cpl;
        if !good {
            return self.raise_code(10, error);
        }
        if !d.present() {
            return self.raise_code(12, error);
        }
        self.mark_accessed(io, &mut d)?;
        Ok(d.segment(selector))
    }

    /// IRET with an operand of `bytes` (2, 4 or 8). SDM 2A "IRET".
    pub fn iret(&mut self, io: Io<'_>, bytes: u64) -> Flow {
        self.nmi_blocked = false;
        if !self.protected() {
            return self.iret_real(io, bytes);
        }
        if self.rflags & rf::NT != 0 {
            if self.long_mode() {
                return self.gp(0);
            }
            return self.give_up("a return from a nested task is not implemented");
        }
        self.iret_protected(io, bytes)
    }

    fn iret_real(&mut self, io: Io<'_>, bytes: u64) -> Flow {
        let v86 = self.rflags & rf::VM != 0;
        if v86 && self.rflags & rf::IOPL != rf::IOPL {
            return self.gp(0);
        }
        let mut sp = self.gpr[RSP];
        let rip = self.pop_at(io, &mut sp, bytes)?;
        let cs = self.pop_at(io, &mut sp, bytes)? as u16;
        let flags = self.pop_at(io, &mut sp, bytes)?;
        if rip > 0xffff {
            return self.gp(0);
        }
        self.gpr[RSP] = sp;
        self.load_real_segment(CS, cs);
        self.rip = rip;
        let keep = if v86 { rf::IOPL | rf::VM | rf::VIF | rf::VIP } else { rf::VM | rf::VIF | rf::VIP };
        self.merge_flags(flags, bytes, keep);
        Err(Stop::Branch)
    }

    /// Takes `bytes` of flags from a stack image, bits in `keep` staying as they are.
    pub fn merge_flags(&mut self, image: u64, bytes: u64, keep: u64) {
        let old = self.full_rflags();
        let mut changeable: u64 = 0x24_7fd5 | rf::RF | rf::AC | rf::VIF | rf::VIP;
        if bytes == 2 {
            changeable &= 0xffff;
        }
        changeable &= !keep;
        self.set_full_rflags(old & !changeable | image & changeable);
    }

    fn iret_protected(&mut self, io: Io<'_>, bytes: u64) -> Flow {
        let mut sp = self.gpr[RSP];
        let rip = self.pop_at(io, &mut sp, bytes)?;
        let cs = self.pop_at(io, &mut sp, bytes)? as u16;
        let flags = self.pop_at(io, &mut sp, bytes)?;
        if flags & rf::VM != 0 && self.cpl == 0 && bytes == 4 && !self.long_mode() {
            return self.iret_to_v86(io, sp, rip, cs, flags);
        }
        let cpl = (cs & 3) as u8;
        if cpl < self.cpl {
            return self.gp(cs as u32 & !3);
        }
        let code = self.code_segment(io, cs, cpl, true)?;
        let to_long64 = self.long_mode() && code.long();
        if to_long64 && !canonical(rip) || !to_long64 && rip > code.limit as u64 {
            return self.gp(0);
        }
        let outer = cpl > self.cpl;
        let stack = if outer || self.long64() {
            let new_sp = self.pop_at(io, &mut sp, bytes)?;
            let ss = self.pop_at(io, &mut sp, bytes)? as u16;
            Some((new_sp, self.return_stack(io, ss, cpl, to_long64)?))
        } else {
            None
        };
        let old_cpl = self.cpl;
        let mut keep = 0;
        if old_cpl != 0 {
            keep |= rf::IOPL | rf::VIF | rf::VIP;
        }
        if old_cpl as u64 > (self.rflags & rf::IOPL) >> 12 {
            keep |= rf::IF;
        }
        self.enter_code(code, cpl, rip);
        match stack {
            Some((new_sp, ss)) => {
                self.seg[SS] = ss;
                self.gpr[RSP] = if to_long64 || ss.big() {
                    if bytes == 8 { new_sp } else { new_sp & 0xffff_ffff }
                } else {
                    self.gpr[RSP] & !0xffff | new_sp & 0xffff
                };
            }
            None => self.gpr[RSP] = sp,
        }
        self.merge_flags(flags, bytes, keep | rf::VM);
        if outer {
            self.drop_privileged_segments();
        }
        self.update_mode();
        Err(Stop::Branch)
    }

    /// SS of a return. In long mode a null SS is fine below ring 3 when the target is 64-bit code.
    pub fn return_stack(&mut self, io: Io<'_>, ss: u16, cpl: u8, to_long64: bool) -> Result<Segment, Stop> {
        if is_null(ss) && to_long64 && cpl != 3 {
            if (ss & 3) as u8 != cpl {
                return self.gp(ss as u32 & !3);
            }
            return Ok(Segment { selector: ss, base: 0, limit: 0, attributes: Segment::UNUSABLE | (cpl as u32) << 5 });
        }
        self.stack_segment(io, ss, cpl)
    }

    fn iret_to_v86(&mut self, io: Io<'_>, mut sp: u64, rip: u64, cs: u16, flags: u64) -> Flow {
        let mut next = |cpu: &mut Cpu| cpu.pop_at(io, &mut sp, 4);
        let esp = next(self)?;
        let mut selectors = [0u16; 5];
        for s in &mut selectors {
            *s = next(self)? as u16;
        }
        self.set_full_rflags(flags & 0x3f_7fd7 | 2);
        self.cpl = 3;
        self.gpr[RSP] = esp;
        for (seg, selector) in [SS, ES, DS, FS, GS].into_iter().zip(selectors) {
            self.load_real_segment(seg, selector);
        }
        self.load_real_segment(CS, cs);
        self.rip = rip & 0xffff;
        Err(Stop::Branch)
    }

    /// Pops `bytes` at `sp`, which moves, without touching RSP.
    pub fn pop_at(&mut self, io: Io<'_>, sp: &mut u64, bytes: u64) -> Result<u64, Stop> {
        let va = if self.long64() {
            *sp
        } else {
            let mask = if self.seg[SS].big() { 0xffff_ffff } else { 0xffff };
            self.segmented(SS as u8, *sp & mask, bytes, false)?
        };
        let value = match bytes {
            2 => self.load::<u16>(io, va).map(u64::from),
            4 => self.load::<u32>(io, va).map(u64::from),
            _ => self.load::<u64>(io, va),
        };
        let value = value.map_err(|stop| self.stack_fault(va, stop))?;
        *sp = self.stack_add(*sp, bytes);
        Ok(value)
    }

    /// RSP moved by `delta`, in the width of the stack pointer.
    pub fn stack_add(&self, sp: u64, delta: u64) -> u64 {
        let sum = sp.wrapping_add(delta);
        if self.long64() {
            sum
        } else if self.seg[SS].big() {
            sum & 0xffff_ffff
        } else {
            sp & !0xffff | sum & 0xffff
        }
    }
}

/// #DE, #TS, #NP, #SS, #GP.
fn contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}
