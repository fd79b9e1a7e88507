//! Integer instructions: arithmetic, moves, bits, conditions.

use iced_x86::{Code, Mnemonic as M, OpKind, Register};

use super::{MEMORY_DST, One, segment};
use crate::cpu::{Cpu, Flow, Handler, Io, Op, RAX};
use crate::ops::{arith, bits, flow, moves, system, transfer};

impl One<'_> {
    pub(super) fn integer(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Add => self.alu::<arith::Add>(),
            M::Or => self.alu::<arith::Or>(),
            M::Adc => self.alu::<arith::Adc>(),
            M::Sbb => self.alu::<arith::Sbb>(),
            M::And => self.alu::<arith::And>(),
            M::Sub => self.alu::<arith::Sub>(),
            M::Xor => self.alu::<arith::Xor>(),
            M::Cmp => self.alu::<arith::Cmp>(),
            M::Test => self.alu::<arith::Test>(),
            M::Inc => self.unary::<arith::Inc>(),
            M::Dec => self.unary::<arith::Dec>(),
            M::Neg => self.unary::<arith::Neg>(),
            M::Not => self.unary::<arith::Not>(),
            M::Rol => self.shift::<arith::Rol>(),
            M::Ror => self.shift::<arith::Ror>(),
            M::Rcl => self.shift::<arith::Rcl>(),
            M::Rcr => self.shift::<arith::Rcr>(),
            M::Shl | M::Sal => self.shift::<arith::Shl>(),
            M::Shr => self.shift::<arith::Shr>(),
            M::Sar => self.shift::<arith::Sar>(),
            M::Shld | M::Shrd => self.double_shift(),
            M::Mov => return self.mov(),
            M::Movzx | M::Movsx | M::Movsxd => self.extend(),
            M::Lea => {
                self.memory();
                self.op.dst = self.reg(0);
                let width = self.width(0);
                self.run(by_word!(width, T => moves::lea::<T>));
            }
            M::Xchg => self.xchg(),
            M::Xadd => self.xadd_or_cmpxchg(true),
            M::Cmpxchg => self.xadd_or_cmpxchg(false),
            M::Cmpxchg8b => {
                self.memory();
                self.run(moves::cmpxchg8b);
            }
            M::Cmpxchg16b => {
                self.memory();
                self.run(moves::cmpxchg16b);
            }
            M::Bswap => {
                let (_, width) = self.destination();
                self.run(by_word!(width, T => moves::bswap::<T>));
            }
            M::Movbe => {
                self.memory();
                let store = self.is_mem(0);
                let width = self.i.memory_size().size();
                if store {
                    self.op.src = self.reg(1);
                } else {
                    self.op.dst = self.reg(0);
                }
                self.run(if store {
                    by_word!(width, T => moves::movbe::<true, T>)
                } else {
                    by_word!(width, T => moves::movbe::<false, T>)
                });
                return self.native.offered(self.i);
            }
            M::Cbw => self.run(moves::widen::<u16>),
            M::Cwde => self.run(moves::widen::<u32>),
            M::Cdqe => self.run(moves::widen::<u64>),
            M::Cwd => self.run(moves::sign_to_dx::<u16>),
            M::Cdq => self.run(moves::sign_to_dx::<u32>),
            M::Cqo => self.run(moves::sign_to_dx::<u64>),
            M::Mul => self.multiply(false),
            M::Imul if self.i.op_count() == 1 => self.multiply(true),
            M::Imul => self.imul(),
            M::Div | M::Idiv => self.divide(),
            M::Bt => self.bit_test::<{ bits::BT }>(),
            M::Bts => self.bit_test::<{ bits::BTS }>(),
            M::Btr => self.bit_test::<{ bits::BTR }>(),
            M::Btc => self.bit_test::<{ bits::BTC }>(),
            M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => self.scan(),
            M::Lahf => self.run(moves::lahf),
            M::Sahf => self.run(moves::sahf),
            M::Xlatb => {
                let bits = match self.i.op_kind(0) {
                    OpKind::Memory => self.i.memory_base().size() as u32 * 8,
                    _ => self.mode.bits as u32,
                };
                self.addressing(bits, self.i.memory_segment());
                self.op.base = crate::cpu::RBX as u8;
                self.run(moves::xlat);
            }
            M::Daa => self.run(arith::decimal::<false>),
            M::Das => self.run(arith::decimal::<true>),
            M::Aaa => self.run(arith::ascii_adjust::<false>),
            M::Aas => self.run(arith::ascii_adjust::<true>),
            M::Aam => {
                self.op.imm = self.immediate(0);
                self.run(arith::aam);
            }
            M::Aad => {
                self.op.imm = self.immediate(0);
                self.run(arith::aad);
            }
            M::Salc => self.run(salc),
            M::Clc => self.run(system::carry::<0>),
            M::Stc => self.run(system::carry::<1>),
            M::Cmc => self.run(system::carry::<2>),
            M::Cld => self.run(system::set_df::<false>),
            M::Std => self.run(system::set_df::<true>),
            _ => return self.conditional(),
        }
        true
    }

    fn conditional(&mut self) -> bool {
        let cc = self.i.condition_code() as u8;
        if cc == 0 {
            return false;
        }
        let cc = cc - 1;
        if self.i.is_jcc_short_or_near() {
            self.branch_target();
            self.run(by_condition!(cc, C => flow::jcc::<C>));
            return true;
        }
        match (self.i.op_count(), self.i.op_kind(0), self.i.op_register(0).size()) {
            (1, OpKind::Memory, _) => {
                self.memory();
                self.run(by_condition!(cc, C => moves::setcc_mem::<C>));
            }
            (1, OpKind::Register, 1) => {
                self.op.dst = self.reg(0);
                self.run(by_condition!(cc, C => moves::setcc_reg::<C>));
            }
            (2, OpKind::Register, width @ (2 | 4 | 8)) if self.i.mnemonic().is_cmov() => {
                self.op.dst = self.reg(0);
                let (mem, _) = self.source(1);
                self.run(match (mem, width) {
                    (false, 2) => by_condition!(cc, C => moves::cmov::<C, false, u16>),
                    (false, 4) => by_condition!(cc, C => moves::cmov::<C, false, u32>),
                    (false, _) => by_condition!(cc, C => moves::cmov::<C, false, u64>),
                    (true, 2) => by_condition!(cc, C => moves::cmov::<C, true, u16>),
                    (true, 4) => by_condition!(cc, C => moves::cmov::<C, true, u32>),
                    (true, _) => by_condition!(cc, C => moves::cmov::<C, true, u64>),
                });
            }
            _ => return false,
        }
        true
    }

    fn mov(&mut self) -> bool {
        let (a, b) = (self.i.op_register(0), self.i.op_register(1));
        let (is0, is1) = (self.is_reg(0), self.is_reg(1));
        if is0 && a.is_segment_register() {
            let (mem, _) = self.source(1);
            self.op.dst = segment(a);
            self.ends = true;
            if a == Register::CS {
                self.run(system::ud);
            } else if mem {
                self.run(transfer::mov_to_seg::<true>);
            } else {
                self.run(transfer::mov_to_seg::<false>);
            }
        } else if is1 && b.is_segment_register() {
            self.op.src = segment(b);
            if self.is_mem(0) {
                self.memory();
                self.run(transfer::store_seg);
            } else {
                self.op.dst = self.reg(0);
                let width = self.width(0);
                self.run(by_word!(width, T => transfer::mov_from_seg::<T>));
            }
        } else if is0 && (a.is_cr() || a.is_dr()) {
            self.op.src = self.reg(1);
            self.op.extra = a.number() as u8;
            self.ends = true;
            self.run(if a.is_cr() { system::mov_to_cr } else { system::mov_to_dr });
        } else if is1 && (b.is_cr() || b.is_dr()) {
            self.op.dst = self.reg(0);
            self.op.extra = b.number() as u8;
            self.run(if b.is_cr() { system::mov_from_cr } else { system::mov_from_dr });
        } else if is0 && a.is_tr() || is1 && b.is_tr() {
            self.run(system::ud);
        } else if self.moffs64() {
            self.memory();
            self.op.imm = self.i.memory_displacement64();
            let store = self.is_mem(0);
            let width = if store { self.width(1) } else { self.width(0) };
            self.run(if store {
                by_width!(width, T => moves::absolute::<true, T>)
            } else {
                by_width!(width, T => moves::absolute::<false, T>)
            });
        } else {
            let (form, width) = self.binary_operands();
            self.run(moves::mov(form, width));
        }
        true
    }

    fn moffs64(&self) -> bool {
        let wide = self.i.memory_displ_size() == 8;
        let absolute = matches!(
            self.i.code(),
            Code::Mov_AL_moffs8
                | Code::Mov_AX_moffs16
                | Code::Mov_EAX_moffs32
                | Code::Mov_RAX_moffs64
                | Code::Mov_moffs8_AL
                | Code::Mov_moffs16_AX
                | Code::Mov_moffs32_EAX
                | Code::Mov_moffs64_RAX
        );
        wide && absolute
    }

    fn extend(&mut self) {
        let signed = self.i.mnemonic() != M::Movzx;
        let to = self.width(0);
        self.op.dst = self.reg(0);
        let (mem, from) = self.source(1);
        macro_rules! pick {
            ($signed:literal, $mem:literal) => {
                match (from, to) {
                    (1, 2) => moves::extend::<$signed, $mem, u8, u16> as Handler,
                    (1, 4) => moves::extend::<$signed, $mem, u8, u32>,
                    (1, _) => moves::extend::<$signed, $mem, u8, u64>,
                    (2, 2) => moves::extend::<$signed, $mem, u16, u16>,
                    (2, 4) => moves::extend::<$signed, $mem, u16, u32>,
                    (2, _) => moves::extend::<$signed, $mem, u16, u64>,
                    (4, 4) => moves::extend::<$signed, $mem, u32, u32>,
                    (4, 2) => moves::extend::<$signed, $mem, u32, u16>,
                    _ => moves::extend::<$signed, $mem, u32, u64>,
                }
            };
        }
        self.run(match (signed, mem) {
            (true, true) => pick!(true, true),
            (true, false) => pick!(true, false),
            (false, true) => pick!(false, true),
            (false, false) => pick!(false, false),
        });
    }

    fn xchg(&mut self) {
        let (mem0, mem1) = (self.is_mem(0), self.is_mem(1));
        if mem0 || mem1 {
            let register = if mem0 { 1 } else { 0 };
            let width = self.width(register);
            self.memory();
            self.op.src = self.reg(register);
            self.run(by_width!(width, T => moves::xchg_mem::<T>));
            return;
        }
        (self.op.dst, self.op.src) = (self.reg(0), self.reg(1));
        let width = self.width(0);
        self.run(by_width!(width, T => moves::xchg_reg::<T>));
    }

    fn xadd_or_cmpxchg(&mut self, xadd: bool) {
        let (mem, width) = self.destination();
        self.op.src = self.reg(1);
        self.run(match (xadd, mem) {
            (true, true) => by_width!(width, T => moves::xadd::<true, T>),
            (true, false) => by_width!(width, T => moves::xadd::<false, T>),
            (false, true) => by_width!(width, T => moves::cmpxchg::<true, T>),
            (false, false) => by_width!(width, T => moves::cmpxchg::<false, T>),
        });
    }

    fn double_shift(&mut self) {
        let (mem, width) = self.destination();
        self.op.kind |= if mem { MEMORY_DST } else { 0 };
        self.op.src = self.reg(1);
        if self.is_reg(2) {
            self.op.extra = 1;
        } else {
            self.op.imm = self.immediate(2);
        }
        let left = self.i.mnemonic() == M::Shld;
        self.run(if left {
            by_word!(width, T => arith::double_shift::<true, T>)
        } else {
            by_word!(width, T => arith::double_shift::<false, T>)
        });
    }

    fn multiply(&mut self, signed: bool) {
        let (mem, width) = self.source(0);
        self.run(match (signed, mem) {
            (true, true) => by_width!(width, T => arith::multiply::<true, true, T>),
            (true, false) => by_width!(width, T => arith::multiply::<true, false, T>),
            (false, true) => by_width!(width, T => arith::multiply::<false, true, T>),
            (false, false) => by_width!(width, T => arith::multiply::<false, false, T>),
        });
    }

    fn imul(&mut self) {
        self.op.dst = self.reg(0);
        let (mem, width) = self.source(1);
        let immediate = self.i.op_count() == 3;
        if immediate {
            self.op.imm = self.immediate(2);
        }
        self.run(match (immediate, mem) {
            (true, true) => by_word!(width, T => arith::imul_to::<true, true, T>),
            (true, false) => by_word!(width, T => arith::imul_to::<true, false, T>),
            (false, true) => by_word!(width, T => arith::imul_to::<false, true, T>),
            (false, false) => by_word!(width, T => arith::imul_to::<false, false, T>),
        });
    }

    fn divide(&mut self) {
        let (mem, width) = self.source(0);
        let signed = self.i.mnemonic() == M::Idiv;
        self.run(match (signed, mem) {
            (true, true) => by_width!(width, T => arith::divide_signed::<true, T>),
            (true, false) => by_width!(width, T => arith::divide_signed::<false, T>),
            (false, true) => by_width!(width, T => arith::divide::<true, T>),
            (false, false) => by_width!(width, T => arith::divide::<false, T>),
        });
    }

    fn bit_test<const WHAT: u8>(&mut self) {
        let (mem, width) = self.destination();
        let register = self.is_reg(1);
        if register {
            self.op.src = self.reg(1);
        } else {
            self.op.imm = self.immediate(1);
        }
        self.run(match (mem, register) {
            (true, true) => by_word!(width, T => bits::test_mem::<WHAT, true, T>),
            (true, false) => by_word!(width, T => bits::test_mem::<WHAT, false, T>),
            (false, true) => by_word!(width, T => bits::test_reg::<WHAT, true, T>),
            (false, false) => by_word!(width, T => bits::test_reg::<WHAT, false, T>),
        });
    }

    fn scan(&mut self) {
        self.op.dst = self.reg(0);
        let (mem, width) = self.source(1);
        // Without the feature the REP prefix is ignored and the older instruction runs.
        let offered = self.native.offered(self.i);
        let mnemonic = match self.i.mnemonic() {
            M::Tzcnt if !offered => M::Bsf,
            M::Lzcnt if !offered => M::Bsr,
            m => m,
        };
        macro_rules! pick {
            ($mem:literal) => {
                match mnemonic {
                    M::Bsf => by_word!(width, T => bits::scan::<false, $mem, T>),
                    M::Bsr => by_word!(width, T => bits::scan::<true, $mem, T>),
                    M::Tzcnt => by_word!(width, T => bits::count_zeros::<false, $mem, T>),
                    M::Lzcnt => by_word!(width, T => bits::count_zeros::<true, $mem, T>),
                    _ => by_word!(width, T => bits::popcnt::<$mem, T>),
                }
            };
        }
        self.run(if mem { pick!(true) } else { pick!(false) });
    }
}

trait MnemonicExt {
    fn is_cmov(&self) -> bool;
}
impl MnemonicExt for M {
    fn is_cmov(&self) -> bool {
        use M::*;
        matches!(
            self,
            Cmova
                | Cmovae
                | Cmovb
                | Cmovbe
                | Cmove
                | Cmovg
                | Cmovge
                | Cmovl
                | Cmovle
                | Cmovne
                | Cmovno
                | Cmovnp
                | Cmovns
                | Cmovo
                | Cmovp
                | Cmovs
        )
    }
}

/// SALC (undocumented, but real firmware uses it): AL is all ones if the carry is set.
fn salc(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let al = if cpu.flags & crate::alu::CF != 0 { 0xff } else { 0u8 };
    cpu.set(RAX as u8, al);
    Ok(())
}
