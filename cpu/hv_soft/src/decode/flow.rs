//! Branches, calls, the stack, software interrupts, string instructions.

use iced_x86::{Code, Mnemonic as M, OpKind, Register};

use super::{One, segment};
use crate::cpu::{Handler, addr};
use crate::ops::{flow, stack, string, transfer};

impl One<'_> {
    pub(super) fn branch_target(&mut self) {
        self.op.imm = self.i.near_branch_target().wrapping_sub(self.block_rip);
        if self.i.op0_kind() != OpKind::NearBranch16 {
            self.op.kind |= addr::OPERAND32;
        }
    }

    /// Width of a near branch or call in bytes.
    fn branch_width(&self) -> u64 {
        match self.i.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            _ => self.width(0),
        }
    }

    pub(super) fn stack_and_flow(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Jmp | M::Call => self.jump_or_call(),
            M::Ret => {
                self.ends = true;
                self.op.imm = if self.i.op_count() > 0 { self.immediate(0) } else { 0 };
                let width = match self.i.code() {
                    Code::Retnw | Code::Retnw_imm16 => 2,
                    Code::Retnd | Code::Retnd_imm16 => 4,
                    _ => 8,
                };
                self.run(by_word!(width, T => flow::ret::<T>));
            }
            M::Retf => {
                self.ends = true;
                self.op.imm = if self.i.op_count() > 0 { self.immediate(0) } else { 0 };
                let width = match self.i.code() {
                    Code::Retfw | Code::Retfw_imm16 => 2,
                    Code::Retfd | Code::Retfd_imm16 => 4,
                    _ => 8,
                };
                self.run(by_word!(width, T => transfer::ret_far::<T>));
            }
            M::Iret => self.ending(transfer::iret::<u16>),
            M::Iretd => self.ending(transfer::iret::<u32>),
            M::Iretq => self.ending(transfer::iret::<u64>),
            M::Int | M::Int3 | M::Into | M::Int1 | M::Bound => self.software_exceptions(),
            M::Push => self.push(),
            M::Pop => self.pop(),
            M::Pushf => self.run(stack::pushf::<u16>),
            M::Pushfd => self.run(stack::pushf::<u32>),
            M::Pushfq => self.run(stack::pushf::<u64>),
            M::Popf => self.ending(stack::popf::<u16>),
            M::Popfd => self.ending(stack::popf::<u32>),
            M::Popfq => self.ending(stack::popf::<u64>),
            M::Pusha => self.run(stack::pusha::<u16>),
            M::Pushad => self.run(stack::pusha::<u32>),
            M::Popa => self.run(stack::popa::<u16>),
            M::Popad => self.run(stack::popa::<u32>),
            M::Enter => {
                self.op.imm = self.i.immediate16() as u64;
                self.op.extra = self.i.immediate8_2nd();
                self.run(match self.i.code() {
                    Code::Enterw_imm16_imm8 => stack::enter::<u16>,
                    Code::Enterd_imm16_imm8 => stack::enter::<u32>,
                    _ => stack::enter::<u64>,
                });
            }
            M::Leave => self.run(match self.i.code() {
                Code::Leavew => stack::leave::<u16>,
                Code::Leaved => stack::leave::<u32>,
                _ => stack::leave::<u64>,
            }),
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => self.counted_branch(),
            _ => return false,
        }
        true
    }

    fn software_exceptions(&mut self) {
        match self.i.mnemonic() {
            M::Int => {
                self.op.imm = self.immediate(0) & 0xff;
                self.ending(transfer::int_n);
            }
            M::Int3 => {
                self.op.imm = 3;
                self.ending(transfer::int);
            }
            M::Bound => {
                self.memory();
                self.op.dst = self.reg(0);
                let width = self.width(0);
                self.run(if width == 2 { transfer::bound::<u16> } else { transfer::bound::<u32> });
            }
            M::Into => {
                self.op.imm = 4;
                self.ending(transfer::into);
            }
            M::Int1 => self.ending(transfer::int1),
            _ => {}
        }
    }

    pub(super) fn ending(&mut self, handler: Handler) {
        self.ends = true;
        self.run(handler);
    }

    fn jump_or_call(&mut self) {
        self.ends = true;
        let call = self.i.mnemonic() == M::Call;
        match self.i.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                self.branch_target();
                let width = self.branch_width();
                self.run(if call { by_word!(width, T => flow::call::<T>) } else { flow::jmp });
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let wide = self.i.op0_kind() == OpKind::FarBranch32;
                self.op.disp = self.i.far_branch_selector() as i32;
                self.op.imm = if wide { self.i.far_branch32() as u64 } else { self.i.far_branch16() as u64 };
                self.run(match (call, wide) {
                    (true, true) => transfer::call_far::<false, u32>,
                    (true, false) => transfer::call_far::<false, u16>,
                    (false, true) => transfer::jmp_far::<false, u32>,
                    (false, false) => transfer::jmp_far::<false, u16>,
                });
            }
            OpKind::Memory if self.i.is_jmp_far_indirect() || self.i.is_call_far_indirect() => {
                self.memory();
                let width = match self.i.code() {
                    Code::Jmp_m1616 | Code::Call_m1616 => 2,
                    Code::Jmp_m1632 | Code::Call_m1632 => 4,
                    _ => 8,
                };
                self.run(if call {
                    by_word!(width, T => transfer::call_far::<true, T>)
                } else {
                    by_word!(width, T => transfer::jmp_far::<true, T>)
                });
            }
            _ => {
                let (mem, width) = self.source(0);
                self.run(match (call, mem) {
                    (true, true) => by_word!(width, T => flow::call_indirect::<true, T>),
                    (true, false) => by_word!(width, T => flow::call_indirect::<false, T>),
                    (false, true) => by_word!(width, T => flow::jmp_to::<true, T>),
                    (false, false) => by_word!(width, T => flow::jmp_to::<false, T>),
                });
            }
        }
    }

    fn counted_branch(&mut self) {
        self.branch_target();
        use Code::*;
        let bits = match self.i.code() {
            Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
            | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 16,
            Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX
            | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX | Jecxz_rel8_16
            | Jecxz_rel8_32 | Jecxz_rel8_64 => 32,
            _ => 64,
        };
        self.op.kind |= match bits {
            64 => addr::LONG,
            32 => addr::LONG32,
            _ => addr::SEGMENTED | addr::OFFSET16,
        };
        self.op.extra = match self.i.mnemonic() {
            M::Loope => 1,
            M::Loopne => 2,
            _ => 0,
        };
        let is_loop = matches!(self.i.mnemonic(), M::Loop | M::Loope | M::Loopne);
        self.run(if is_loop { flow::loop_ } else { flow::jcxz });
    }

    fn push(&mut self) {
        use Code::*;
        let code = self.i.code();
        if self.is_reg(0) && self.i.op_register(0).is_segment_register() {
            self.op.src = segment(self.i.op_register(0));
            let width = match code {
                Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => 2,
                Pushq_FS | Pushq_GS => 8,
                _ => 4,
            };
            self.run(by_word!(width, T => stack::push_seg::<T>));
        } else if self.is_reg(0) || self.is_mem(0) {
            let (mem, width) = self.source(0);
            self.run(if mem {
                by_word!(width, T => stack::push_mem::<T>)
            } else {
                by_word!(width, T => stack::push_reg::<T>)
            });
        } else {
            self.op.imm = self.immediate(0);
            let width = match code {
                Pushw_imm8 | Push_imm16 => 2,
                Pushd_imm8 | Pushd_imm32 => 4,
                _ => 8,
            };
            self.run(by_word!(width, T => stack::push_imm::<T>));
        }
    }

    fn pop(&mut self) {
        use Code::*;
        if self.is_reg(0) && self.i.op_register(0).is_segment_register() {
            self.op.dst = segment(self.i.op_register(0));
            self.ends = true;
            let width = match self.i.code() {
                Popw_ES | Popw_CS | Popw_SS | Popw_DS | Popw_FS | Popw_GS => 2,
                Popq_FS | Popq_GS => 8,
                _ => 4,
            };
            self.run(by_word!(width, T => stack::pop_seg::<T>));
            return;
        }
        let (mem, width) = self.destination();
        self.run(if mem {
            by_word!(width, T => stack::pop_mem::<T>)
        } else {
            by_word!(width, T => stack::pop_reg::<T>)
        });
    }

    pub(super) fn strings(&mut self) -> bool {
        use Code::*;
        let (what, bytes) = match self.i.code() {
            Movsb_m8_m8 => (string::MOVS, 1),
            Movsw_m16_m16 => (string::MOVS, 2),
            Movsd_m32_m32 => (string::MOVS, 4),
            Movsq_m64_m64 => (string::MOVS, 8),
            Stosb_m8_AL => (string::STOS, 1),
            Stosw_m16_AX => (string::STOS, 2),
            Stosd_m32_EAX => (string::STOS, 4),
            Stosq_m64_RAX => (string::STOS, 8),
            Lodsb_AL_m8 => (string::LODS, 1),
            Lodsw_AX_m16 => (string::LODS, 2),
            Lodsd_EAX_m32 => (string::LODS, 4),
            Lodsq_RAX_m64 => (string::LODS, 8),
            Cmpsb_m8_m8 => (string::CMPS, 1),
            Cmpsw_m16_m16 => (string::CMPS, 2),
            Cmpsd_m32_m32 => (string::CMPS, 4),
            Cmpsq_m64_m64 => (string::CMPS, 8),
            Scasb_AL_m8 => (string::SCAS, 1),
            Scasw_AX_m16 => (string::SCAS, 2),
            Scasd_EAX_m32 => (string::SCAS, 4),
            Scasq_RAX_m64 => (string::SCAS, 8),
            Insb_m8_DX => (string::INS, 1),
            Insw_m16_DX => (string::INS, 2),
            Insd_m32_DX => (string::INS, 4),
            Outsb_DX_m8 => (string::OUTS, 1),
            Outsw_DX_m16 => (string::OUTS, 2),
            Outsd_DX_m32 => (string::OUTS, 4),
            _ => return false,
        };
        let kind = (0..self.i.op_count()).map(|n| self.i.op_kind(n)).find(|k| *k != OpKind::Register);
        let bits = match kind {
            Some(OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI) => 64,
            Some(OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI) => 32,
            _ => 16,
        };
        let source = !matches!(what, string::STOS | string::SCAS | string::INS);
        self.addressing(bits, if source { self.i.memory_segment() } else { Register::ES });
        if self.i.has_rep_prefix() {
            self.op.kind |= addr::REP;
        }
        if self.i.has_repne_prefix() {
            self.op.kind |= addr::REPNE;
        }
        if matches!(what, string::INS | string::OUTS) {
            self.ends = true;
        }
        self.run(string::handler(what, bytes));
        true
    }
}
