//! Near jumps, calls, returns, loops and the end of a block.

use crate::alu::{self, ZF};
use crate::cpu::{BLOCK_RIP, CS, Cpu, Flow, Io, Op, RCX, Stop, addr};
use crate::mmu::GuestWord;
use crate::ops::arith::source;
use crate::segment::canonical;

impl Cpu {
    /// Address of the instruction behind `op`, in the width of the instruction pointer.
    #[inline(always)]
    pub fn next_rip(&self, op: &Op) -> u64 {
        self.wrap_rip(self.gpr[BLOCK_RIP as usize].wrapping_add(op.next as u64))
    }

    #[inline(always)]
    pub(crate) fn wrap_rip(&self, rip: u64) -> u64 {
        match self.mode.bits {
            64 => rip,
            32 => rip & 0xffff_ffff,
            // EIP exists in 16-bit code too: only the fetch is limited to the segment.
            _ => rip & 0xffff_ffff,
        }
    }

    /// The branch target relative to the block, cut to the operand size.
    #[inline(always)]
    fn target(&self, op: &Op) -> u64 {
        let rip = self.gpr[BLOCK_RIP as usize].wrapping_add(op.imm);
        self.cut(op, rip)
    }

    #[inline(always)]
    fn cut(&self, op: &Op, rip: u64) -> u64 {
        if self.mode.bits == 64 {
            rip
        } else if op.kind & addr::OPERAND32 != 0 {
            rip & 0xffff_ffff
        } else {
            rip & 0xffff
        }
    }

    /// A near branch to `rip`: limit or canonical check first.
    #[inline(always)]
    pub(crate) fn branch(&mut self, rip: u64) -> Flow {
        if self.mode.bits == 64 {
            if !canonical(rip) {
                return self.gp(0);
            }
        } else if rip > self.seg[CS].limit as u64 {
            return self.gp(0);
        }
        self.rip = rip;
        Err(Stop::Branch)
    }
}

/// The last operation of a block that ends without a branch.
pub(crate) fn end_of_block(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.rip = cpu.next_rip(op);
    Err(Stop::Branch)
}

/// Jcc: falls through within the block where the condition fails.
pub(crate) fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if !alu::condition(CC, cpu.flags) {
        return Ok(());
    }
    let rip = cpu.target(op);
    cpu.branch(rip)
}

pub(crate) fn jmp(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let rip = cpu.target(op);
    cpu.branch(rip)
}

pub(crate) fn jmp_to<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let rip = source::<T>(cpu, op, io, MEM)?.to_u64();
    cpu.branch(rip)
}

fn call_to<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>, rip: u64) -> Flow {
    let in_range = if cpu.mode.bits == 64 { canonical(rip) } else { rip <= cpu.seg[CS].limit as u64 };
    if !in_range {
        // A fault of the push comes first.
        if cpu.mode.bits == 64 {
            let sp = cpu.gpr[crate::cpu::RSP].wrapping_sub(T::BYTES);
            cpu.probe_write(sp, T::BYTES).map_err(|stop| cpu.stack_fault(sp, stop))?;
        }
        return cpu.gp(0);
    }
    let back = cpu.next_rip(op);
    cpu.push(io, T::from_u64(back))?;
    cpu.rip = rip;
    Err(Stop::Branch)
}
pub(crate) fn call<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let rip = cpu.target(op);
    call_to::<T>(cpu, op, io, rip)
}
pub(crate) fn call_indirect<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let rip = source::<T>(cpu, op, io, MEM)?.to_u64();
    call_to::<T>(cpu, op, io, rip)
}

/// RET, with `op.imm` bytes of arguments released.
pub(crate) fn ret<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mut sp = cpu.gpr[crate::cpu::RSP];
    let rip = cpu.pop_value::<T>(io, &mut sp)?.to_u64();
    let in_range = if cpu.mode.bits == 64 { canonical(rip) } else { rip <= cpu.seg[CS].limit as u64 };
    if !in_range {
        return cpu.gp(0);
    }
    cpu.gpr[crate::cpu::RSP] = cpu.stack_add(sp, op.imm);
    cpu.rip = rip;
    Err(Stop::Branch)
}

/// Counter of LOOP and JrCXZ, by address size.
fn counter(cpu: &Cpu, op: &Op) -> u64 {
    match op.kind & addr::MODE {
        addr::LONG => cpu.gpr[RCX],
        _ if op.kind & addr::OFFSET16 != 0 => cpu.gpr[RCX] & 0xffff,
        _ => cpu.gpr[RCX] & 0xffff_ffff,
    }
}

/// LOOP (`op.extra` 0), LOOPE (1), LOOPNE (2).
pub(crate) fn loop_(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let count = counter(cpu, op).wrapping_sub(1);
    let old = cpu.gpr[RCX];
    match op.kind & addr::MODE {
        addr::LONG => cpu.gpr[RCX] = count,
        _ if op.kind & addr::OFFSET16 != 0 => cpu.set(RCX as u8, count as u16),
        _ => cpu.set(RCX as u8, count as u32),
    }
    let zf = cpu.flags & ZF != 0;
    let again = counter(cpu, op) != 0 && [true, zf, !zf][op.extra as usize % 3];
    if !again {
        return Ok(());
    }
    let rip = cpu.target(op);
    let flow = cpu.branch(rip);
    if flow == Err(Stop::Fault) {
        cpu.gpr[RCX] = old;
    }
    flow
}

/// JCXZ, JECXZ, JRCXZ.
pub(crate) fn jcxz(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if counter(cpu, op) != 0 {
        return Ok(());
    }
    let rip = cpu.target(op);
    cpu.branch(rip)
}
