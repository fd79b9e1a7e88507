//! Bit tests and scans.

use crate::alu::{self, CF, Flags, ZF};
use crate::cpu::{Cpu, Flow, Io, Op};
use crate::mmu::GuestWord;
use crate::ops::arith::source;

/// What a bit test does to the bit.
pub(crate) const BT: u8 = 0;
pub(crate) const BTS: u8 = 1;
pub(crate) const BTR: u8 = 2;
pub(crate) const BTC: u8 = 3;

#[inline(always)]
fn change<const WHAT: u8>(value: u64, bit: u64) -> u64 {
    match WHAT {
        BTS => value | 1 << bit,
        BTR => value & !(1 << bit),
        BTC => value ^ 1 << bit,
        _ => value,
    }
}

/// BT, BTS, BTR, BTC on a register; the bit number is an immediate or a register (`REG`).
pub(crate) fn test_reg<const WHAT: u8, const REG: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let bit = if REG { cpu.get::<T>(op.src).to_u64() } else { op.imm } & (T::BITS as u64 - 1);
    let value = cpu.get::<T>(op.dst).to_u64();
    cpu.flags = alu::with_cf(cpu.flags, value >> bit & 1 != 0);
    if WHAT != BT {
        cpu.set(op.dst, T::from_u64(change::<WHAT>(value, bit)));
    }
    Ok(())
}

/// The same on memory: a register bit number reaches beyond the operand, in both directions.
pub(crate) fn test_mem<const WHAT: u8, const REG: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let number = if REG { cpu.get::<T>(op.src).to_u64() } else { op.imm };
    let bit = number & (T::BITS as u64 - 1);
    let va = if REG {
        let signed = (number << (64 - T::BITS)) as i64 >> (64 - T::BITS);
        let words = signed >> T::BITS.trailing_zeros();
        let mut at = *op;
        // The word offset takes part in address wrap-around, so it goes through the ordinary computation.
        let bytes = words.wrapping_mul(T::BYTES as i64);
        let saved = cpu.gpr[EXTRA as usize];
        cpu.gpr[EXTRA as usize] = cpu.offset(op).wrapping_add(bytes as u64);
        (at.base, at.index, at.disp) = (EXTRA, crate::cpu::ZERO, 0);
        let va = cpu.ea(&at, T::BYTES, WHAT != BT);
        cpu.gpr[EXTRA as usize] = saved;
        va?
    } else {
        cpu.ea(op, T::BYTES, WHAT != BT)?
    };
    if WHAT == BT {
        let value = cpu.load::<T>(io, va)?.to_u64();
        cpu.flags = alu::with_cf(cpu.flags, value >> bit & 1 != 0);
        return Ok(());
    }
    cpu.modify::<T>(io, va, |cpu, value| {
        let value = value.to_u64();
        cpu.flags = alu::with_cf(cpu.flags, value >> bit & 1 != 0);
        T::from_u64(change::<WHAT>(value, bit))
    })
}
/// A register slot that no instruction names.
const EXTRA: u8 = 18;

/// BSF (`REVERSE` false) and BSR. A zero source leaves the destination, as processors do.
pub(crate) fn scan<const REVERSE: bool, const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let value = source::<T>(cpu, op, io, MEM)?.to_u64();
    if value == 0 {
        cpu.flags |= ZF;
        // A 32-bit destination keeps its upper half too.
        return Ok(());
    }
    cpu.flags &= !ZF;
    let index = if REVERSE { 63 - value.leading_zeros() } else { value.trailing_zeros() };
    cpu.set(op.dst, T::from_u64(index as u64));
    Ok(())
}

/// TZCNT (`LEADING` false) and LZCNT.
pub(crate) fn count_zeros<const LEADING: bool, const MEM: bool, T: GuestWord>(
    cpu: &mut Cpu,
    op: &Op,
    io: Io<'_>,
) -> Flow {
    let value = source::<T>(cpu, op, io, MEM)?.to_u64();
    let zeros = if LEADING { value.leading_zeros() - (64 - T::BITS) } else { value.trailing_zeros().min(T::BITS) };
    let f: Flags = cpu.flags & !(CF | ZF);
    cpu.flags = f | if zeros == T::BITS { CF } else { 0 } | if zeros == 0 { ZF } else { 0 };
    cpu.set(op.dst, T::from_u64(zeros as u64));
    Ok(())
}

/// POPCNT.
pub(crate) fn popcnt<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let value = source::<T>(cpu, op, io, MEM)?.to_u64();
    cpu.flags = if value == 0 { ZF } else { 0 };
    cpu.set(op.dst, T::from_u64(value.count_ones() as u64));
    Ok(())
}
