//! MOV and its relatives: extensions, exchanges, conditional moves, address computation.

use crate::alu::{self, ZF};
use crate::cpu::{Cpu, Flow, Handler, Io, Op, RAX, RBX, RCX, RDX, addr};
use crate::mmu::GuestWord;
use crate::ops::arith::Form;

fn rr<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.set(op.dst, cpu.get::<T>(op.src));
    Ok(())
}
fn ri<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.set(op.dst, T::from_u64(op.imm));
    Ok(())
}
fn rm<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, false)?;
    let value = cpu.load::<T>(io, va)?;
    cpu.set(op.dst, value);
    Ok(())
}
fn mr<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.store(io, va, cpu.get::<T>(op.src))
}
fn mi<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.store(io, va, T::from_u64(op.imm))
}
/// The handler of MOV.
pub(crate) fn mov(form: Form, bytes: u64) -> Handler {
    fn pick<T: GuestWord>(form: Form) -> Handler {
        match form {
            Form::RegReg => rr::<T>,
            Form::RegImm => ri::<T>,
            Form::RegMem => rm::<T>,
            Form::MemReg => mr::<T>,
            Form::MemImm => mi::<T>,
        }
    }
    match bytes {
        1 => pick::<u8>(form),
        2 => pick::<u16>(form),
        4 => pick::<u32>(form),
        _ => pick::<u64>(form),
    }
}

/// MOV between the accumulator and a 64-bit absolute address in `op.imm`.
pub(crate) fn absolute<const STORE: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = op.imm.wrapping_add(cpu.seg_base[op.seg as usize & 7]);
    if STORE {
        return cpu.store(io, va, cpu.get::<T>(RAX as u8));
    }
    let value = cpu.load::<T>(io, va)?;
    cpu.set(RAX as u8, value);
    Ok(())
}

/// MOVZX, MOVSX, MOVSXD from `S` to `D`.
pub(crate) fn extend<const SIGNED: bool, const MEM: bool, S: GuestWord, D: GuestWord>(
    cpu: &mut Cpu,
    op: &Op,
    io: Io<'_>,
) -> Flow {
    let raw = crate::ops::arith::source::<S>(cpu, op, io, MEM)?.to_u64();
    let value = if SIGNED { ((raw << (64 - S::BITS)) as i64 >> (64 - S::BITS)) as u64 } else { raw };
    cpu.set(op.dst, D::from_u64(value & u64::MAX >> (64 - D::BITS)));
    Ok(())
}

/// LEA: no segment, no access.
pub(crate) fn lea<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let offset = cpu.offset(op);
    let address = if op.kind & addr::MODE == addr::LONG { offset } else { cpu.wrap_offset(op, offset) };
    cpu.set(op.dst, T::from_u64(address));
    Ok(())
}

/// XCHG of two registers.
pub(crate) fn xchg_reg<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    cpu.set(op.dst, b);
    cpu.set(op.src, a);
    Ok(())
}
/// XCHG with memory.
pub(crate) fn xchg_mem<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, true)?;
    let new = cpu.get::<T>(op.src);
    cpu.modify::<T>(io, va, |cpu, old| {
        cpu.set(op.src, old);
        new
    })
}

/// XADD.
pub(crate) fn xadd<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let b = cpu.get::<T>(op.src);
    if !MEM {
        let a = cpu.get::<T>(op.dst);
        let (sum, f) = T::add(a, b);
        cpu.flags = f;
        cpu.set(op.src, a);
        cpu.set(op.dst, sum);
        return Ok(());
    }
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.modify::<T>(io, va, |cpu, a| {
        let (sum, f) = T::add(a, b);
        cpu.flags = f;
        cpu.set(op.src, a);
        sum
    })
}

/// CMPXCHG. The destination is written in every case, as the processor does.
pub(crate) fn cmpxchg<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let new = cpu.get::<T>(op.src);
    let expected = cpu.get::<T>(RAX as u8);
    if !MEM {
        let old = cpu.get::<T>(op.dst);
        cpu.flags = T::sub(expected, old).1;
        if old == expected {
            cpu.set(op.dst, new);
        } else {
            cpu.set(RAX as u8, old);
        }
        return Ok(());
    }
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.modify::<T>(io, va, |cpu, old| {
        cpu.flags = T::sub(expected, old).1;
        if old == expected {
            return new;
        }
        cpu.set(RAX as u8, old);
        old
    })
}

/// CMPXCHG8B.
pub(crate) fn cmpxchg8b(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 8, true)?;
    let pair = |cpu: &Cpu, high: usize, low: usize| cpu.gpr[high] << 32 | cpu.gpr[low] & 0xffff_ffff;
    let (expected, new) = (pair(cpu, RDX, RAX), pair(cpu, RCX, RBX));
    cpu.modify::<u64>(io, va, |cpu, old| {
        if old == expected {
            cpu.flags |= ZF;
            return new;
        }
        cpu.flags &= !ZF;
        cpu.set(RAX as u8, old as u32);
        cpu.set(RDX as u8, (old >> 32) as u32);
        old
    })
}

/// CMPXCHG16B.
pub(crate) fn cmpxchg16b(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 16, true)?;
    if va & 15 != 0 {
        return cpu.gp(0);
    }
    cpu.probe_write(va, 16)?;
    let old = (cpu.load::<u64>(io, va)?, cpu.load::<u64>(io, va + 8)?);
    if old == (cpu.gpr[RAX], cpu.gpr[RDX]) {
        cpu.flags |= ZF;
        cpu.store_then(io, va, cpu.gpr[RBX])?;
        cpu.store_then(io, va + 8, cpu.gpr[RCX])?;
        return cpu.settle();
    }
    cpu.flags &= !ZF;
    (cpu.gpr[RAX], cpu.gpr[RDX]) = old;
    Ok(())
}

/// CMOVcc: the source is read whatever the condition; a 32-bit destination loses its upper half in any case.
pub(crate) fn cmov<const CC: u8, const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let value = crate::ops::arith::source::<T>(cpu, op, io, MEM)?;
    let chosen = if alu::condition(CC, cpu.flags) { value } else { cpu.get::<T>(op.dst) };
    cpu.set(op.dst, chosen);
    Ok(())
}
/// SETcc of a register.
pub(crate) fn setcc_reg<const CC: u8>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.set(op.dst, alu::condition(CC, cpu.flags) as u8);
    Ok(())
}
/// SETcc of memory.
pub(crate) fn setcc_mem<const CC: u8>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 1, true)?;
    cpu.store(io, va, alu::condition(CC, cpu.flags) as u8)
}

/// CBW, CWDE, CDQE: sign-extends half of the accumulator into `T`.
pub(crate) fn widen<T: GuestWord>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let half = T::BITS / 2;
    let value = ((cpu.gpr[RAX] << (64 - half)) as i64 >> (64 - half)) as u64;
    cpu.set(RAX as u8, T::from_u64(value & u64::MAX >> (64 - T::BITS)));
    Ok(())
}
/// CWD, CDQ, CQO: the sign of the accumulator fills rDX.
pub(crate) fn sign_to_dx<T: GuestWord>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let negative = cpu.gpr[RAX] >> (T::BITS - 1) & 1 != 0;
    cpu.set(RDX as u8, T::from_u64(if negative { u64::MAX >> (64 - T::BITS) } else { 0 }));
    Ok(())
}

/// BSWAP.
pub(crate) fn bswap<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    match T::BYTES {
        8 => cpu.set(op.dst, cpu.get::<u64>(op.dst).swap_bytes()),
        4 => cpu.set(op.dst, cpu.get::<u32>(op.dst).swap_bytes()),
        // Undefined by the SDM; processors clear the register.
        _ => cpu.set::<u16>(op.dst, 0),
    }
    Ok(())
}

/// MOVBE.
pub(crate) fn movbe<const STORE: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let swap = |v: T| T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BITS));
    let va = cpu.ea(op, T::BYTES, STORE)?;
    if STORE {
        return cpu.store(io, va, swap(cpu.get::<T>(op.src)));
    }
    let value = cpu.load::<T>(io, va)?;
    cpu.set(op.dst, swap(value));
    Ok(())
}

/// XLAT: the operand's address is computed as base + AL.
pub(crate) fn xlat(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mut address = *op;
    address.index = crate::cpu::ZERO;
    let al = cpu.gpr[RAX] & 0xff;
    address.disp = al as i32;
    let va = cpu.ea(&address, 1, false)?;
    let value = cpu.load::<u8>(io, va)?;
    cpu.set(RAX as u8, value);
    Ok(())
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let ah = (alu::to_rflags(cpu.flags) | 2) as u8;
    cpu.set::<u8>(8 << 4, ah);
    Ok(())
}
/// SAHF.
pub(crate) fn sahf(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let ah = cpu.get::<u8>(8 << 4) as u64;
    cpu.flags = alu::from_rflags(ah) & !alu::OF | cpu.flags & alu::OF;
    Ok(())
}
