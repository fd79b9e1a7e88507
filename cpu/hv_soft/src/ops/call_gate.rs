//! Far calls and jumps through call gates. SDM 3A 5.8.4 "Accessing a Code Segment Through a Call Gate"; SDM 2A "CALL", "JMP".

use x86::Segment;

use crate::cpu::{Cpu, Flow, Io, RSP, SS, Stop};
use crate::segment::{Descriptor, canonical, is_null};

/// Where a gate leads, all checks passed but those of the stack.
pub(crate) struct Gate {
    code: Segment,
    cpl: u8,
    rip: u64,
    /// Size of what is pushed: 2, 4 or 8 bytes.
    bytes: u64,
    /// Parameters to copy to the inner stack, of `bytes` each.
    parameters: u64,
}

impl Cpu {
    /// The gate behind `selector`; `None` where it is no call gate and the caller goes on with a code segment.
    pub fn call_gate(&mut self, io: Io<'_>, selector: u16, jump: bool) -> Result<Option<Gate>, Stop> {
        if is_null(selector) {
            return Ok(None);
        }
        let gate = self.descriptor(io, selector, 13)?;
        let long = self.long_mode();
        if gate.is_segment() || !(gate.kind() == 12 || gate.kind() == 4 && !long) {
            return Ok(None);
        }
        let error = selector as u32 & !3;
        let rpl = (selector & 3) as u8;
        if gate.dpl() < self.cpl.max(rpl) {
            return self.gp(error);
        }
        let high = if long { self.upper_half(io, selector, gate)? } else { 0 };
        if !gate.present() {
            return self.raise_code(11, error);
        }
        self.gate_target(io, gate, high, jump).map(Some)
    }

    /// The second eight bytes of a gate of long mode; their type field must be 0.
    fn upper_half(&mut self, io: Io<'_>, selector: u16, gate: Descriptor) -> Result<u64, Stop> {
        let high = self.descriptor_high(io, selector, gate)?;
        if high >> 40 & 0x1f != 0 { self.gp(selector as u32 & !3) } else { Ok(high & 0xffff_ffff) }
    }

    fn gate_target(&mut self, io: Io<'_>, gate: Descriptor, high: u64, jump: bool) -> Result<Gate, Stop> {
        let selector = (gate.raw >> 16) as u16;
        if is_null(selector) {
            return self.gp(0);
        }
        let error = selector as u32 & !3;
        let mut code = self.descriptor(io, selector, 13)?;
        let long = self.long_mode();
        let reachable = if jump && !code.conforming() { code.dpl() == self.cpl } else { code.dpl() <= self.cpl };
        if !code.is_code() || !reachable || long && (!code.long() || code.big()) {
            return self.gp(error);
        }
        if !code.present() {
            return self.raise_code(11, error);
        }
        self.mark_accessed(io, &mut code)?;
        let wide = gate.kind() & 8 != 0;
        let mut rip = gate.raw & 0xffff;
        if wide {
            rip |= gate.raw >> 32 & 0xffff_0000;
        }
        rip |= high << 32;
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let code = code.segment(selector & !3 | cpl as u16);
        if long && !canonical(rip) || !long && rip > code.limit as u64 {
            return self.gp(0);
        }
        let bytes = if long {
            8
        } else if wide {
            4
        } else {
            2
        };
        let parameters = if long { 0 } else { gate.raw >> 32 & 31 };
        Ok(Gate { code, cpl, rip, bytes, parameters })
    }

    /// A far jump through `gate`.
    pub fn jump_through(&mut self, gate: Gate) -> Flow {
        self.enter_code(gate.code, self.cpl, gate.rip);
        Err(Stop::Branch)
    }

    /// A far call through `gate` that returns to `back`.
    pub fn call_through(&mut self, io: Io<'_>, gate: Gate, back: u64) -> Flow {
        let inner = gate.cpl < self.cpl;
        let (stack, top) = if inner { self.inner_top(io, gate.cpl)? } else { (self.seg[SS], self.gpr[RSP]) };
        let mut frame = Vec::with_capacity(35);
        if inner {
            frame.extend([self.seg[SS].selector as u64, self.gpr[RSP]]);
            frame.extend(self.parameters(io, &gate)?);
        }
        frame.extend([self.seg[crate::cpu::CS].selector as u64, back]);
        let long = self.long_mode();
        let mask = if long {
            u64::MAX
        } else if stack.big() {
            0xffff_ffff
        } else {
            0xffff
        };
        let error = if inner { stack.selector as u32 & !3 } else { 0 };
        let mut sp = top;
        for value in frame {
            sp = sp.wrapping_sub(gate.bytes) & mask;
            let va = if long { sp } else { stack.base.wrapping_add(sp) & 0xffff_ffff };
            let outside = if long { !canonical(va) } else { !within(&stack, sp, gate.bytes) };
            if outside {
                return self.raise_code(12, error);
            }
            self.store_as(io, gate.cpl, va, value & (u64::MAX >> (64 - 8 * gate.bytes)), gate.bytes)?;
        }
        self.gpr[RSP] = if mask == 0xffff { top & !0xffff | sp } else { sp };
        self.seg[SS] = stack;
        self.enter_code(gate.code, gate.cpl, gate.rip);
        Err(Stop::Branch)
    }

    /// Stack segment and pointer of the inner level. Long mode: a null selector.
    fn inner_top(&mut self, io: Io<'_>, cpl: u8) -> Result<(Segment, u64), Stop> {
        if self.long_mode() {
            let rsp = self.tss64_stack(io, cpl as u64)?;
            let attributes = Segment::UNUSABLE | (cpl as u32) << 5;
            return Ok((Segment { selector: cpl as u16, base: 0, limit: 0, attributes }, rsp));
        }
        let (selector, esp) = self.tss_stack(io, cpl)?;
        Ok((self.inner_stack(io, selector, cpl)?, esp as u64))
    }

    /// The caller's parameters, in the order in which they are pushed.
    fn parameters(&mut self, io: Io<'_>, gate: &Gate) -> Result<Vec<u64>, Stop> {
        let mut sp = self.gpr[RSP];
        let mut values = Vec::with_capacity(gate.parameters as usize);
        for _ in 0..gate.parameters {
            values.push(self.pop_at(io, &mut sp, gate.bytes)?);
        }
        values.reverse();
        Ok(values)
    }
}

/// Whether `bytes` at `sp` lie inside a stack segment.
fn within(stack: &Segment, sp: u64, bytes: u64) -> bool {
    let last = sp + bytes - 1;
    if stack.kind() & 4 != 0 {
        let top = if stack.big() { 0xffff_ffff } else { 0xffff };
        return sp > stack.limit as u64 && last <= top;
    }
    last <= stack.limit as u64
}
