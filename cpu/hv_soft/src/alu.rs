//! Arithmetic with flags, done by the host's own instructions: guest and host are the same architecture, so results
//! and flags (the undefined ones too) are what this processor gives.
//!
//! Status flags travel as [`Flags`]: what LAHF leaves in AH (SF ZF AF PF CF) in bits 15:8 and OF in bit 0. Producing
//! them costs two cheap instructions behind the operation.

use std::arch::asm;

/// Status flags: bit 0 OF, bits 15:8 as LAHF gives them (15 SF, 14 ZF, 12 AF, 10 PF, 9 one, 8 CF).
pub(crate) type Flags = u16;

pub(crate) const OF: Flags = 1;
pub(crate) const CF: Flags = 1 << 8;
pub(crate) const PF: Flags = 1 << 10;
pub(crate) const AF: Flags = 1 << 12;
pub(crate) const ZF: Flags = 1 << 14;
pub(crate) const SF: Flags = 1 << 15;
#[cfg(test)]
pub(crate) const ALL: Flags = OF | CF | PF | AF | ZF | SF;

/// Status bits of RFLAGS.
pub(crate) const RFLAGS_STATUS: u64 = 0x8d5;

/// To the layout of RFLAGS (status bits only).
#[inline(always)]
pub(crate) fn to_rflags(f: Flags) -> u64 {
    (f >> 8) as u64 & 0xd5 | ((f & OF) as u64) << 11
}

/// From the layout of RFLAGS.
#[inline(always)]
pub(crate) fn from_rflags(rflags: u64) -> Flags {
    ((rflags & 0xd5) << 8) as u16 | (rflags >> 11 & 1) as u16
}

/// An operand width.
pub(crate) trait Word: Copy + Eq + 'static {
    const BYTES: u64;
    const BITS: u32;
    fn from_u64(value: u64) -> Self;
    fn to_u64(self) -> u64;
    fn add(a: Self, b: Self) -> (Self, Flags);
    fn sub(a: Self, b: Self) -> (Self, Flags);
    fn adc(a: Self, b: Self, f: Flags) -> (Self, Flags);
    fn sbb(a: Self, b: Self, f: Flags) -> (Self, Flags);
    fn and(a: Self, b: Self) -> (Self, Flags);
    fn or(a: Self, b: Self) -> (Self, Flags);
    fn xor(a: Self, b: Self) -> (Self, Flags);
    fn inc(a: Self, f: Flags) -> (Self, Flags);
    fn dec(a: Self, f: Flags) -> (Self, Flags);
    fn neg(a: Self) -> (Self, Flags);
    fn rol(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn ror(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn rcl(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn rcr(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn shl(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn shr(a: Self, count: u8, f: Flags) -> (Self, Flags);
    fn sar(a: Self, count: u8, f: Flags) -> (Self, Flags);
    /// (low, high, flags)
    fn mul(a: Self, b: Self) -> (Self, Self, Flags);
    fn imul(a: Self, b: Self) -> (Self, Self, Flags);
}

macro_rules! binary {
    ($name:ident, $t:ty, $insn:literal, $class:ident, $r:literal, $b:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t) -> ($t, Flags) {
            let (mut r, f): ($t, Flags) = (a, 0);
            let mut f = f;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!(concat!($insn, " ", $r, ", ", $b), "lahf", "seto al", r = inout($class) r, b = in($class) b,
                     out("ax") f, options(pure, nomem, nostack));
            }
            let _ = &mut f;
            (r, f)
        }
    };
}
macro_rules! binary_carry {
    ($name:ident, $t:ty, $insn:literal, $class:ident, $r:literal, $b:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, f: Flags) -> ($t, Flags) {
            let (mut r, mut flags): ($t, Flags) = (a, f);
            // SAFETY: register arithmetic only. BT moves the guest's carry (bit 8) into the host's.
            unsafe {
                asm!("bt ax, 8", concat!($insn, " ", $r, ", ", $b), "lahf", "seto al", r = inout($class) r,
                     b = in($class) b, inout("ax") flags, options(pure, nomem, nostack));
            }
            (r, flags)
        }
    };
}
macro_rules! unary_carry {
    ($name:ident, $t:ty, $insn:literal, $class:ident, $r:literal) => {
        #[inline(always)]
        fn $name(a: $t, f: Flags) -> ($t, Flags) {
            let (mut r, mut flags): ($t, Flags) = (a, f);
            // SAFETY: register arithmetic only. The carry goes in and, unchanged by INC and DEC, comes out.
            unsafe {
                asm!("bt ax, 8", concat!($insn, " ", $r), "lahf", "seto al", r = inout($class) r, inout("ax") flags,
                     options(pure, nomem, nostack));
            }
            (r, flags)
        }
    };
}
macro_rules! shift {
    ($name:ident, $t:ty, $insn:literal, $class:ident, $r:literal) => {
        #[inline(always)]
        fn $name(a: $t, count: u8, f: Flags) -> ($t, Flags) {
            let (mut r, mut flags): ($t, Flags) = (a, f);
            // SAFETY: register arithmetic only. All flags go in, since a zero count leaves them and rotates keep some.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " ", $r, ", cl"), "lahf", "seto al",
                     r = inout($class) r, in("cl") count, inout("ax") flags, options(pure, nomem, nostack));
            }
            (r, flags)
        }
    };
}

macro_rules! word {
    ($t:ty, $wide:ty, $signed:ty, $signed_wide:ty, $class:ident, $r:literal, $b:literal) => {
        impl Word for $t {
            const BYTES: u64 = size_of::<$t>() as u64;
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn from_u64(value: u64) -> $t {
                value as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            binary!(add, $t, "add", $class, $r, $b);
            binary!(sub, $t, "sub", $class, $r, $b);
            binary!(and, $t, "and", $class, $r, $b);
            binary!(or, $t, "or", $class, $r, $b);
            binary!(xor, $t, "xor", $class, $r, $b);
            binary_carry!(adc, $t, "adc", $class, $r, $b);
            binary_carry!(sbb, $t, "sbb", $class, $r, $b);
            unary_carry!(inc, $t, "inc", $class, $r);
            unary_carry!(dec, $t, "dec", $class, $r);
            #[inline(always)]
            fn neg(a: $t) -> ($t, Flags) {
                <$t as Word>::sub(0, a)
            }
            shift!(rol, $t, "rol", $class, $r);
            shift!(ror, $t, "ror", $class, $r);
            shift!(rcl, $t, "rcl", $class, $r);
            shift!(rcr, $t, "rcr", $class, $r);
            shift!(shl, $t, "shl", $class, $r);
            shift!(shr, $t, "shr", $class, $r);
            shift!(sar, $t, "sar", $class, $r);
            #[inline(always)]
            fn mul(a: $t, b: $t) -> ($t, $t, Flags) {
                <$t as Multiply>::unsigned(a, b)
            }
            #[inline(always)]
            fn imul(a: $t, b: $t) -> ($t, $t, Flags) {
                <$t as Multiply>::signed(a, b)
            }
        }
    };
}

/// The one-operand multiplications, by the host, so that the flags SDM leaves undefined match it.
trait Multiply: Sized {
    fn unsigned(a: Self, b: Self) -> (Self, Self, Flags);
    fn signed(a: Self, b: Self) -> (Self, Self, Flags);
}
macro_rules! multiply {
    ($t:ty, $b:literal) => {
        impl Multiply for $t {
            #[inline(always)]
            fn unsigned(a: $t, b: $t) -> ($t, $t, Flags) {
                multiply!(@ $t, "mul", $b, a, b)
            }
            #[inline(always)]
            fn signed(a: $t, b: $t) -> ($t, $t, Flags) {
                multiply!(@ $t, "imul", $b, a, b)
            }
        }
    };
    (@ $t:ty, $insn:literal, $b:literal, $x:ident, $y:ident) => {{
        let (low, high): (u64, u64);
        let f: u64;
        // SAFETY: register arithmetic only; RAX and RDX are declared.
        unsafe {
            asm!(concat!($insn, " ", $b), "mov {f}, rax", "lahf", "seto al", "xchg {f}, rax",
                 b = in(reg) $y as u64, f = out(reg) f, inout("rax") $x as u64 => low, out("rdx") high,
                 options(pure, nomem, nostack));
        }
        (low as $t, high as $t, f as Flags)
    }};
}
multiply!(u16, "{b:x}");
multiply!(u32, "{b:e}");
multiply!(u64, "{b}");
impl Multiply for u8 {
    #[inline(always)]
    fn unsigned(a: u8, b: u8) -> (u8, u8, Flags) {
        let (product, f): (u16, Flags);
        // SAFETY: register arithmetic only.
        unsafe {
            asm!("mul {b}", "mov {p:x}, ax", "lahf", "seto al", b = in(reg_byte) b, p = out(reg) product,
                 inout("ax") a as u16 => f, options(pure, nomem, nostack));
        }
        (product as u8, (product >> 8) as u8, f)
    }
    #[inline(always)]
    fn signed(a: u8, b: u8) -> (u8, u8, Flags) {
        let (product, f): (u16, Flags);
        // SAFETY: register arithmetic only.
        unsafe {
            asm!("imul {b}", "mov {p:x}, ax", "lahf", "seto al", b = in(reg_byte) b, p = out(reg) product,
                 inout("ax") a as u16 => f, options(pure, nomem, nostack));
        }
        (product as u8, (product >> 8) as u8, f)
    }
}

word!(u8, u16, i8, i16, reg_byte, "{r}", "{b}");
word!(u16, u32, i16, i32, reg, "{r:x}", "{b:x}");
word!(u32, u64, i32, i64, reg, "{r:e}", "{b:e}");
word!(u64, u128, i64, i128, reg, "{r}", "{b}");

/// The flags of a logical operation's result, for bit tests that change only the carry.
#[inline(always)]
pub(crate) fn with_cf(f: Flags, carry: bool) -> Flags {
    f & !CF | (carry as u16) << 8
}

macro_rules! double_shift {
    ($name:ident, $t:ty, $insn:literal, $r:literal, $b:literal) => {
        /// Double shift: `a` shifted by `count`, bits coming in from `b`.
        #[inline(always)]
        pub(crate) fn $name(a: $t, b: $t, count: u8, f: Flags) -> ($t, Flags) {
            let (mut r, mut flags): ($t, Flags) = (a, f);
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " ", $r, ", ", $b, ", cl"), "lahf", "seto al",
                     r = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") flags,
                     options(pure, nomem, nostack));
            }
            (r, flags)
        }
    };
}
double_shift!(shld16, u16, "shld", "{r:x}", "{b:x}");
double_shift!(shld32, u32, "shld", "{r:e}", "{b:e}");
double_shift!(shld64, u64, "shld", "{r}", "{b}");
double_shift!(shrd16, u16, "shrd", "{r:x}", "{b:x}");
double_shift!(shrd32, u32, "shrd", "{r:e}", "{b:e}");
double_shift!(shrd64, u64, "shrd", "{r}", "{b}");

/// A condition of Jcc, SETcc and CMOVcc by its encoding (low four opcode bits). SDM 1 appendix B.
#[inline(always)]
pub(crate) fn condition(code: u8, f: Flags) -> bool {
    let of = f & OF != 0;
    let sf = f & SF != 0;
    let base = match code >> 1 {
        0 => of,
        1 => f & CF != 0,
        2 => f & ZF != 0,
        3 => f & (CF | ZF) != 0,
        4 => sf,
        5 => f & PF != 0,
        6 => sf != of,
        _ => f & ZF != 0 || sf != of,
    };
    base != (code & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_known_sums() {
        // Worked by hand from SDM 1 3.4.3.1 "Status Flags".
        assert_eq!(u8::add(0x7f, 1), (0x80, SF | AF | OF | 0x200));
        assert_eq!(u8::add(0xff, 1), (0, ZF | AF | CF | PF | 0x200));
        assert_eq!(u32::sub(0, 1), (u32::MAX, SF | AF | CF | PF | 0x200));
        assert_eq!(u16::adc(0xffff, 0, CF).0, 0);
        assert_eq!(u64::sbb(5, 5, CF).0, u64::MAX);
        assert_eq!(u64::inc(u64::MAX, CF).1 & (CF | ZF), CF | ZF);
        assert_eq!(u64::inc(u64::MAX, 0).1 & (CF | ZF), ZF);
    }

    #[test]
    fn a_zero_count_changes_no_flag() {
        for f in [0x200, ALL | 0x200, OF | 0x200, CF | ZF | 0x200] {
            assert_eq!(u32::shl(5, 0, f), (5, f));
            assert_eq!(u32::rcl(5, 32, f), (5, f));
            assert_eq!(shld64(5, 6, 64, f), (5, f));
        }
        assert_eq!(u32::rol(0x8000_0000, 1, SF | ZF | 0x200).1 & (SF | ZF | CF), SF | ZF | CF);
    }

    #[test]
    fn multiplications() {
        assert_eq!(u8::mul(200, 2), (144, 1, u8::mul(200, 2).2));
        assert!(u8::mul(200, 2).2 & CF != 0 && u8::mul(2, 2).2 & CF == 0);
        assert_eq!(u64::imul(u64::MAX, 2).1, u64::MAX);
        assert_eq!((u32::mul(0xffff_ffff, 16).0, u32::mul(0xffff_ffff, 16).1), (0xffff_fff0, 15));
    }

    #[test]
    fn conditions_against_setcc() {
        for rflags in 0..0x1000u64 {
            if rflags & !RFLAGS_STATUS != 0 {
                continue;
            }
            let f = from_rflags(rflags);
            assert_eq!(to_rflags(f), rflags);
            let (mut l, mut le, mut be): (u8, u8, u8) = (0, 0, 0);
            // SAFETY: flags are loaded and read, the stack is balanced.
            unsafe {
                asm!("push {r}", "popfq", "setl {l}", "setle {le}", "setbe {be}", r = in(reg) rflags | 2,
                     l = inout(reg_byte) l, le = inout(reg_byte) le, be = inout(reg_byte) be);
            }
            assert_eq!([condition(12, f), condition(14, f), condition(6, f)], [l != 0, le != 0, be != 0]);
            assert_eq!(condition(13, f), l == 0);
        }
    }
}
