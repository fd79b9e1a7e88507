//! Two-operand arithmetic and logic, INC to NEG, shifts, multiplication, division, decimal adjustment.

use crate::alu::{self, AF, CF, Flags, OF, Word};
use crate::cpu::{Cpu, Flow, Handler, Io, Op, RAX, RDX};
use crate::mmu::GuestWord;

/// A two-operand operation.
pub(crate) trait Binary {
    /// The result goes to the first operand (not for CMP and TEST).
    const WRITES: bool;
    fn apply<T: Word>(a: T, b: T, f: Flags) -> (T, Flags);
}
macro_rules! binary {
    ($($name:ident $writes:literal |$a:ident, $b:ident, $f:ident| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: Word>($a: T, $b: T, $f: Flags) -> (T, Flags) {
                $e
            }
        }
    )*};
}
binary! {
    Add true |a, b, _f| T::add(a, b);
    Or true |a, b, _f| T::or(a, b);
    Adc true |a, b, f| T::adc(a, b, f);
    Sbb true |a, b, f| T::sbb(a, b, f);
    And true |a, b, _f| T::and(a, b);
    Sub true |a, b, _f| T::sub(a, b);
    Xor true |a, b, _f| T::xor(a, b);
    Cmp false |a, b, _f| T::sub(a, b);
    Test false |a, b, _f| T::and(a, b);
}

fn rr<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (r, f) = O::apply(cpu.get::<T>(op.dst), cpu.get::<T>(op.src), cpu.flags);
    cpu.flags = f;
    if O::WRITES {
        cpu.set(op.dst, r);
    }
    Ok(())
}
fn ri<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (r, f) = O::apply(cpu.get::<T>(op.dst), T::from_u64(op.imm), cpu.flags);
    cpu.flags = f;
    if O::WRITES {
        cpu.set(op.dst, r);
    }
    Ok(())
}
fn rm<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, false)?;
    let b = cpu.load::<T>(io, va)?;
    let (r, f) = O::apply(cpu.get::<T>(op.dst), b, cpu.flags);
    cpu.flags = f;
    if O::WRITES {
        cpu.set(op.dst, r);
    }
    Ok(())
}
#[inline(always)]
fn memory<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>, b: T) -> Flow {
    let va = cpu.ea(op, T::BYTES, O::WRITES)?;
    if !O::WRITES {
        let a = cpu.load::<T>(io, va)?;
        cpu.flags = O::apply(a, b, cpu.flags).1;
        return Ok(());
    }
    cpu.modify::<T>(io, va, |cpu, a| {
        let (r, f) = O::apply(a, b, cpu.flags);
        cpu.flags = f;
        r
    })
}
fn mr<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let b = cpu.get::<T>(op.src);
    memory::<O, T>(cpu, op, io, b)
}
fn mi<O: Binary, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    memory::<O, T>(cpu, op, io, T::from_u64(op.imm))
}

/// Operand shapes of a two-operand instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
}

/// The handler of a two-operand operation on `bytes`-wide operands.
pub(crate) fn binary<O: Binary>(form: Form, bytes: u64) -> Handler {
    fn pick<O: Binary, T: GuestWord>(form: Form) -> Handler {
        match form {
            Form::RegReg => rr::<O, T>,
            Form::RegImm => ri::<O, T>,
            Form::RegMem => rm::<O, T>,
            Form::MemReg => mr::<O, T>,
            Form::MemImm => mi::<O, T>,
        }
    }
    match bytes {
        1 => pick::<O, u8>(form),
        2 => pick::<O, u16>(form),
        4 => pick::<O, u32>(form),
        _ => pick::<O, u64>(form),
    }
}

/// A one-operand operation.
pub(crate) trait Unary {
    fn apply<T: Word>(a: T, f: Flags) -> (T, Flags);
}
macro_rules! unary {
    ($($name:ident |$a:ident, $f:ident| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Word>($a: T, $f: Flags) -> (T, Flags) {
                $e
            }
        }
    )*};
}
unary! {
    Inc |a, f| T::inc(a, f);
    Dec |a, f| T::dec(a, f);
    Neg |a, _f| T::neg(a);
    Not |a, f| (T::from_u64(!a.to_u64()), f);
}
fn unary_reg<O: Unary, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (r, f) = O::apply(cpu.get::<T>(op.dst), cpu.flags);
    cpu.flags = f;
    cpu.set(op.dst, r);
    Ok(())
}
fn unary_mem<O: Unary, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.modify::<T>(io, va, |cpu, a| {
        let (r, f) = O::apply(a, cpu.flags);
        cpu.flags = f;
        r
    })
}
/// The handler of a one-operand operation.
pub(crate) fn unary<O: Unary>(memory: bool, bytes: u64) -> Handler {
    match (memory, bytes) {
        (false, 1) => unary_reg::<O, u8>,
        (false, 2) => unary_reg::<O, u16>,
        (false, 4) => unary_reg::<O, u32>,
        (false, _) => unary_reg::<O, u64>,
        (true, 1) => unary_mem::<O, u8>,
        (true, 2) => unary_mem::<O, u16>,
        (true, 4) => unary_mem::<O, u32>,
        (true, _) => unary_mem::<O, u64>,
    }
}

/// A shift or rotate.
pub(crate) trait Shift {
    fn apply<T: Word>(a: T, count: u8, f: Flags) -> (T, Flags);
}
macro_rules! shift {
    ($($name:ident $method:ident;)*) => {$(
        pub(crate) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Word>(a: T, count: u8, f: Flags) -> (T, Flags) {
                T::$method(a, count, f)
            }
        }
    )*};
}
shift! { Rol rol; Ror ror; Rcl rcl; Rcr rcr; Shl shl; Shr shr; Sar sar; }

/// The count comes from CL (`op.extra` = 1) or is `op.imm`.
#[inline(always)]
fn count(cpu: &Cpu, op: &Op) -> u8 {
    if op.extra != 0 { cpu.gpr[crate::cpu::RCX] as u8 } else { op.imm as u8 }
}
fn shift_reg<O: Shift, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (r, f) = O::apply(cpu.get::<T>(op.dst), count(cpu, op), cpu.flags);
    cpu.flags = f;
    cpu.set(op.dst, r);
    Ok(())
}
fn shift_mem<O: Shift, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES, true)?;
    let n = count(cpu, op);
    cpu.modify::<T>(io, va, |cpu, a| {
        let (r, f) = O::apply(a, n, cpu.flags);
        cpu.flags = f;
        r
    })
}
/// The handler of a shift.
pub(crate) fn shift<O: Shift>(memory: bool, bytes: u64) -> Handler {
    match (memory, bytes) {
        (false, 1) => shift_reg::<O, u8>,
        (false, 2) => shift_reg::<O, u16>,
        (false, 4) => shift_reg::<O, u32>,
        (false, _) => shift_reg::<O, u64>,
        (true, 1) => shift_mem::<O, u8>,
        (true, 2) => shift_mem::<O, u16>,
        (true, 4) => shift_mem::<O, u32>,
        (true, _) => shift_mem::<O, u64>,
    }
}

/// SHLD (`LEFT`) and SHRD.
pub(crate) fn double_shift<const LEFT: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let (b, n) = (cpu.get::<T>(op.src).to_u64(), count(cpu, op));
    let apply = move |a: u64, f: Flags| -> (u64, Flags) {
        match (LEFT, T::BYTES) {
            (true, 2) => wide(alu::shld16(a as u16, b as u16, n, f)),
            (true, 4) => wide(alu::shld32(a as u32, b as u32, n, f)),
            (true, _) => alu::shld64(a, b, n, f),
            (false, 2) => wide(alu::shrd16(a as u16, b as u16, n, f)),
            (false, 4) => wide(alu::shrd32(a as u32, b as u32, n, f)),
            (false, _) => alu::shrd64(a, b, n, f),
        }
    };
    fn wide<W: Into<u64>>((value, f): (W, Flags)) -> (u64, Flags) {
        (value.into(), f)
    }
    if op.kind & crate::decode::MEMORY_DST == 0 {
        let (r, f) = apply(cpu.get::<T>(op.dst).to_u64(), cpu.flags);
        cpu.flags = f;
        cpu.set(op.dst, T::from_u64(r));
        return Ok(());
    }
    let va = cpu.ea(op, T::BYTES, true)?;
    cpu.modify::<T>(io, va, |cpu, a| {
        let (r, f) = apply(a.to_u64(), cpu.flags);
        cpu.flags = f;
        T::from_u64(r)
    })
}

/// The register or memory source operand.
#[inline(always)]
pub(crate) fn source<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>, memory: bool) -> Result<T, crate::cpu::Stop> {
    if memory {
        let va = cpu.ea(op, T::BYTES, false)?;
        cpu.load::<T>(io, va)
    } else {
        Ok(cpu.get::<T>(op.src))
    }
}

/// MUL and IMUL with one operand.
pub(crate) fn multiply<const SIGNED: bool, const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let b = source::<T>(cpu, op, io, MEM)?;
    let a = cpu.get::<T>(RAX as u8);
    let (low, high, f) = if SIGNED { T::imul(a, b) } else { T::mul(a, b) };
    cpu.flags = f;
    if T::BYTES == 1 {
        cpu.set::<u16>(RAX as u8, (low.to_u64() | high.to_u64() << 8) as u16);
    } else {
        cpu.set(RAX as u8, low);
        cpu.set(RDX as u8, high);
    }
    Ok(())
}

/// IMUL with two operands (`IMM` false: destination times source) or three (source times immediate).
pub(crate) fn imul_to<const IMM: bool, const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let a = source::<T>(cpu, op, io, MEM)?;
    let b = if IMM { T::from_u64(op.imm) } else { cpu.get::<T>(op.dst) };
    let (low, _, f) = T::imul(a, b);
    cpu.flags = f;
    cpu.set(op.dst, low);
    Ok(())
}

/// DIV. #DE where the quotient does not fit.
pub(crate) fn divide<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let divisor = source::<T>(cpu, op, io, MEM)?.to_u64() as u128;
    let dividend = dividend::<T>(cpu);
    let Some(quotient) = dividend.checked_div(divisor).filter(|q| q >> T::BITS == 0) else {
        return cpu.raise(0);
    };
    store_quotient::<T>(cpu, quotient as u64, (dividend % divisor) as u64);
    Ok(())
}

/// IDIV.
pub(crate) fn divide_signed<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let raw = source::<T>(cpu, op, io, MEM)?.to_u64();
    let divisor = ((raw << (64 - T::BITS)) as i64 >> (64 - T::BITS)) as i128;
    let dividend = (dividend::<T>(cpu) << (128 - 2 * T::BITS)) as i128 >> (128 - 2 * T::BITS);
    let limit = 1i128 << (T::BITS - 1);
    let Some(quotient) = dividend.checked_div(divisor).filter(|q| (-limit..limit).contains(q)) else {
        return cpu.raise(0);
    };
    store_quotient::<T>(cpu, quotient as u64, (dividend % divisor) as u64);
    Ok(())
}
fn dividend<T: GuestWord>(cpu: &Cpu) -> u128 {
    if T::BYTES == 1 {
        return cpu.get::<u16>(RAX as u8) as u128;
    }
    (cpu.get::<T>(RDX as u8).to_u64() as u128) << T::BITS | cpu.get::<T>(RAX as u8).to_u64() as u128
}
fn store_quotient<T: GuestWord>(cpu: &mut Cpu, quotient: u64, remainder: u64) {
    if T::BYTES == 1 {
        cpu.set::<u16>(RAX as u8, (quotient & 0xff | (remainder & 0xff) << 8) as u16);
    } else {
        cpu.set(RAX as u8, T::from_u64(quotient));
        cpu.set(RDX as u8, T::from_u64(remainder));
    }
}

/// DAA and DAS (`SUB`). SDM 2A.
pub(crate) fn decimal<const SUB: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let old = cpu.get::<u8>(RAX as u8);
    let (old_cf, old_af) = (cpu.flags & CF != 0, cpu.flags & AF != 0);
    let mut al = old;
    let (mut cf, mut af) = (false, false);
    if old & 15 > 9 || old_af {
        let (value, carry) = if SUB { al.overflowing_sub(6) } else { al.overflowing_add(6) };
        (al, af, cf) = (value, true, old_cf || carry);
    }
    if old > 0x99 || old_cf {
        al = if SUB { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        cf = true;
    }
    cpu.set(RAX as u8, al);
    let f = u8::and(al, al).1 & !(CF | AF | OF);
    cpu.flags = f | if cf { CF } else { 0 } | if af { AF } else { 0 };
    Ok(())
}

/// AAA and AAS (`SUB`).
pub(crate) fn ascii_adjust<const SUB: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let ax = cpu.get::<u16>(RAX as u8);
    let adjust = ax & 15 > 9 || cpu.flags & AF != 0;
    let adjusted = match (adjust, SUB) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    cpu.set::<u16>(RAX as u8, adjusted & 0xff0f);
    cpu.flags = cpu.flags & !(CF | AF) | if adjust { CF | AF } else { 0 };
    Ok(())
}

/// AAM.
pub(crate) fn aam(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let (al, base) = (cpu.get::<u8>(RAX as u8), op.imm as u8);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else { return cpu.raise(0) };
    cpu.set::<u16>(RAX as u8, (high as u16) << 8 | low as u16);
    cpu.flags = u8::and(low, low).1;
    Ok(())
}

/// AAD.
pub(crate) fn aad(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let ax = cpu.get::<u16>(RAX as u8);
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    cpu.set::<u16>(RAX as u8, al as u16);
    cpu.flags = u8::and(al, al).1;
    Ok(())
}
