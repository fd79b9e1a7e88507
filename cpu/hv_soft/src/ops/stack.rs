//! PUSH and POP in all their forms.

use crate::cpu::{Cpu, Flow, Io, Op, RBP, RSP, SS, StackKind, Stop, rf};
use crate::mmu::GuestWord;
use crate::ops::arith::source;

impl Cpu {
    /// Pushes `value`; RSP moves only when the store has succeeded. Ends with [`Cpu::settle`] or a branch.
    #[inline(always)]
    pub fn push<T: GuestWord>(&mut self, io: Io<'_>, value: T) -> Flow {
        match self.stack {
            StackKind::Long => {
                let sp = self.gpr[RSP].wrapping_sub(T::BYTES);
                self.store_then(io, sp, value).map_err(|stop| self.stack_fault(sp, stop))?;
                self.gpr[RSP] = sp;
            }
            StackKind::Flat32 => {
                let sp = self.gpr[RSP].wrapping_sub(T::BYTES) & 0xffff_ffff;
                self.store_then(io, sp, value)?;
                self.gpr[RSP] = sp;
            }
            StackKind::Segmented => {
                let sp = self.stack_add(self.gpr[RSP], T::BYTES.wrapping_neg());
                let mask = if self.seg[SS].big() { 0xffff_ffff } else { 0xffff };
                let va = self.segmented(SS as u8, sp & mask, T::BYTES, true)?;
                self.store_then(io, va, value)?;
                self.gpr[RSP] = sp;
            }
        }
        Ok(())
    }

    /// Reads the value at `sp` and moves `sp` behind it; RSP is the caller's to change.
    #[inline(always)]
    pub fn pop_value<T: GuestWord>(&mut self, io: Io<'_>, sp: &mut u64) -> Result<T, Stop> {
        let va = match self.stack {
            StackKind::Long => *sp,
            StackKind::Flat32 => *sp & 0xffff_ffff,
            StackKind::Segmented => {
                let mask = if self.seg[SS].big() { 0xffff_ffff } else { 0xffff };
                self.segmented(SS as u8, *sp & mask, T::BYTES, false)?
            }
        };
        let value = self.load::<T>(io, va).map_err(|stop| self.stack_fault(va, stop))?;
        *sp = self.stack_add(*sp, T::BYTES);
        Ok(value)
    }

    /// A non-canonical stack address is #SS, not #GP.
    #[cold]
    pub fn stack_fault(&mut self, va: u64, stop: Stop) -> Stop {
        if stop == Stop::Fault && self.fault.vector == 13 && !crate::segment::canonical(va) {
            self.fault.vector = 12;
        }
        stop
    }
}

pub(crate) fn push_reg<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.push(io, cpu.get::<T>(op.src))?;
    cpu.settle()
}
pub(crate) fn push_imm<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.push(io, T::from_u64(op.imm))?;
    cpu.settle()
}
pub(crate) fn push_mem<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let value = source::<T>(cpu, op, io, true)?;
    cpu.push(io, value)?;
    cpu.settle()
}
pub(crate) fn push_seg<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let selector = cpu.seg[op.src as usize % 6].selector;
    cpu.push(io, T::from_u64(selector as u64))?;
    cpu.settle()
}
pub(crate) fn pop_reg<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mut sp = cpu.gpr[RSP];
    let value = cpu.pop_value::<T>(io, &mut sp)?;
    cpu.gpr[RSP] = sp;
    cpu.set(op.dst, value);
    Ok(())
}
/// POP to memory: an address based on RSP uses the new RSP. SDM 2B "POP".
pub(crate) fn pop_mem<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let old = cpu.gpr[RSP];
    let mut sp = old;
    let value = cpu.pop_value::<T>(io, &mut sp)?;
    cpu.gpr[RSP] = sp;
    let done = cpu.ea(op, T::BYTES, true).and_then(|va| cpu.store_then(io, va, value));
    if done.is_err() {
        cpu.gpr[RSP] = old;
        return done;
    }
    cpu.settle()
}
pub(crate) fn pop_seg<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mut sp = cpu.gpr[RSP];
    let selector = cpu.pop_value::<T>(io, &mut sp)?.to_u64() as u16;
    let seg = op.dst as usize % 6;
    cpu.load_segment(io, seg, selector)?;
    cpu.gpr[RSP] = sp;
    if seg == SS {
        cpu.attention |= crate::cpu::attention::SHADOW | crate::cpu::attention::TRAP_SHADOW;
    }
    Err(Stop::Next)
}

pub(crate) fn pushf<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    if cpu.rflags & rf::VM != 0 && cpu.rflags & rf::IOPL != rf::IOPL {
        return cpu.gp(0);
    }
    let image = cpu.full_rflags() & !(rf::RF | rf::VM);
    cpu.push(io, T::from_u64(image))?;
    cpu.settle()
}
pub(crate) fn popf<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    let vm = cpu.rflags & rf::VM != 0;
    if vm && cpu.rflags & rf::IOPL != rf::IOPL {
        return cpu.gp(0);
    }
    let mut sp = cpu.gpr[RSP];
    let image = cpu.pop_value::<T>(io, &mut sp)?.to_u64();
    cpu.gpr[RSP] = sp;
    let mut keep = rf::VM | rf::VIF | rf::VIP;
    if cpu.cpl != 0 {
        keep |= rf::IOPL;
    }
    if cpu.cpl as u64 > (cpu.rflags & rf::IOPL) >> 12 {
        keep |= rf::IF;
    }
    cpu.merge_flags(image & !rf::RF, T::BYTES, keep);
    Err(Stop::Next)
}

/// PUSHA, PUSHAD.
pub(crate) fn pusha<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    let old = cpu.gpr[RSP];
    for reg in 0..8u8 {
        let value = if reg as usize == RSP { T::from_u64(old) } else { cpu.get::<T>(reg) };
        if let Err(stop) = cpu.push(io, value) {
            cpu.gpr[RSP] = old;
            return Err(stop);
        }
    }
    cpu.settle()
}
/// POPA, POPAD.
pub(crate) fn popa<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    let mut sp = cpu.gpr[RSP];
    let mut values = [T::from_u64(0); 8];
    for value in values.iter_mut().rev() {
        *value = cpu.pop_value::<T>(io, &mut sp)?;
    }
    for (reg, value) in values.into_iter().enumerate() {
        if reg != RSP {
            cpu.set(reg as u8, value);
        }
    }
    cpu.gpr[RSP] = sp;
    Ok(())
}

/// ENTER: frame of `op.imm` bytes at nesting level `op.extra`. SDM 2A "ENTER".
pub(crate) fn enter<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let (old_sp, old_bp) = (cpu.gpr[RSP], cpu.gpr[RBP]);
    let flow = enter_frame::<T>(cpu, op, io);
    if flow.is_err() {
        (cpu.gpr[RSP], cpu.gpr[RBP]) = (old_sp, old_bp);
        return flow;
    }
    cpu.settle()
}
fn enter_frame<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let level = op.extra & 31;
    cpu.push(io, cpu.get::<T>(RBP as u8))?;
    let frame = cpu.gpr[RSP];
    let mut bp = cpu.gpr[RBP];
    for _ in 1..level {
        bp = cpu.stack_add(bp, T::BYTES.wrapping_neg());
        let mut at = bp;
        let value = cpu.pop_value::<T>(io, &mut at)?;
        cpu.push(io, value)?;
    }
    if level > 0 {
        cpu.push(io, T::from_u64(frame))?;
    }
    cpu.set(RBP as u8, T::from_u64(frame));
    cpu.gpr[RSP] = cpu.stack_add(cpu.gpr[RSP], op.imm.wrapping_neg());
    // The new top of stack must be writable, or ENTER faults before anything has changed.
    let at = cpu.gpr[RSP];
    let va = if cpu.long64() {
        at
    } else {
        let mask = if cpu.seg[SS].big() { 0xffff_ffff } else { 0xffff };
        cpu.segmented(SS as u8, at & mask, T::BYTES, true)?
    };
    cpu.probe_write(va, T::BYTES).map_err(|stop| cpu.stack_fault(va, stop))
}

/// LEAVE.
pub(crate) fn leave<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    let frame = cpu.gpr[RBP];
    let mut sp = match cpu.stack {
        StackKind::Long => frame,
        _ if cpu.seg[SS].big() => frame & 0xffff_ffff,
        _ => cpu.gpr[RSP] & !0xffff | frame & 0xffff,
    };
    let value = cpu.pop_value::<T>(io, &mut sp)?;
    cpu.gpr[RSP] = sp;
    cpu.set(RBP as u8, value);
    Ok(())
}
