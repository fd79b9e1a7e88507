//! From instruction bytes to [`Op`]s: iced decodes, this file chooses the handler and normalises the operands.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic as M, OpKind, Register};

use crate::cpu::{BLOCK_RIP, CS, Cpu, ES, FS, Flow, GS, Handler, Io, Mode, NO_SEG, Op, RAX, SS, STACK_SEG, ZERO, addr};
use crate::native::Native;
use crate::ops::arith::{self, Form};
use crate::ops::{bits, flow, masked, moves, stack, string, system, transfer};

/// SHLD and SHRD: the destination is memory (they have no repeat prefix).
pub(crate) const MEMORY_DST: u8 = addr::REPNE;

macro_rules! by_width {
    ($bytes:expr, $T:ident => $e:expr) => {
        match $bytes {
            1 => {
                type $T = u8;
                $e as Handler
            }
            2 => {
                type $T = u16;
                $e as Handler
            }
            4 => {
                type $T = u32;
                $e as Handler
            }
            _ => {
                type $T = u64;
                $e as Handler
            }
        }
    };
}
/// For instructions without a byte form.
macro_rules! by_word {
    ($bytes:expr, $T:ident => $e:expr) => {
        match $bytes {
            2 => {
                type $T = u16;
                $e as Handler
            }
            4 => {
                type $T = u32;
                $e as Handler
            }
            _ => {
                type $T = u64;
                $e as Handler
            }
        }
    };
}
macro_rules! by_condition {
    ($cc:expr, $C:ident => $e:expr) => {{
        macro_rules! one {
            ($n:literal) => {{
                const $C: u8 = $n;
                $e as Handler
            }};
        }
        match $cc {
            0 => one!(0),
            1 => one!(1),
            2 => one!(2),
            3 => one!(3),
            4 => one!(4),
            5 => one!(5),
            6 => one!(6),
            7 => one!(7),
            8 => one!(8),
            9 => one!(9),
            10 => one!(10),
            11 => one!(11),
            12 => one!(12),
            13 => one!(13),
            14 => one!(14),
            _ => one!(15),
        }
    }};
}

/// One decoded instruction and whether a block must end behind it.
pub(crate) struct Decoded {
    pub op: Op,
    pub ends: bool,
}

/// What decoding the next instruction gave.
pub(crate) enum Next {
    Op(Decoded),
    /// The bytes at hand end in the middle of the instruction.
    NeedsMore,
}

/// The number of a general register as [`Op`] wants it.
pub(crate) fn register(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => (r as u8 - Register::AH as u8) | 8 << 4,
        // An 8-bit register's own number counts AH to BH too.
        _ => r.full_register().number() as u8,
    }
}

fn segment(r: Register) -> u8 {
    match r {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        _ => 5,
    }
}

/// The longest instruction. SDM 2A 2.3.11.
pub(crate) const MAX_LENGTH: usize = 15;

/// Decodes a run of instructions that starts at `block_rip`.
pub(crate) struct BlockDecoder<'a> {
    bytes: &'a [u8],
    decoder: Decoder<'a>,
    mode: Mode,
    block_rip: u64,
    native: &'a mut Native,
}

impl<'a> BlockDecoder<'a> {
    pub fn new(bytes: &'a [u8], mode: Mode, block_rip: u64, native: &'a mut Native) -> BlockDecoder<'a> {
        let decoder = Decoder::with_ip(mode.bits as u32, bytes, block_rip, DecoderOptions::NONE);
        BlockDecoder { bytes, decoder, mode, block_rip, native }
    }

    /// Bytes decoded so far.
    pub fn position(&self) -> usize {
        self.decoder.position()
    }

    pub fn next(&mut self) -> Next {
        let start = self.decoder.position();
        let instruction = self.decoder.decode();
        if instruction.is_invalid() && self.decoder.last_error() == DecoderError::NoMoreBytes {
            let _ = self.decoder.set_position(start);
            return Next::NeedsMore;
        }
        let mut one = One {
            i: &instruction,
            mode: self.mode,
            block_rip: self.block_rip,
            native: self.native,
            op: Op {
                run: system::ud,
                imm: 0,
                disp: 0,
                next: (self.decoder.position() & 0xffff) as u16,
                len: (self.decoder.position() - start) as u8,
                dst: 0,
                src: 0,
                base: ZERO,
                index: ZERO,
                scale: 0,
                seg: NO_SEG,
                kind: 0,
                extra: 0,
            },
            ends: false,
        };
        one.build();
        if instruction.is_invalid() && too_long(self.bytes, start, self.mode) {
            one.ending(system::too_long);
        }
        Next::Op(Decoded { op: one.op, ends: one.ends })
    }
}

/// Whether what could not be decoded at `start` is an instruction that goes on behind its 15th byte.
fn too_long(bytes: &[u8], start: usize, mode: Mode) -> bool {
    // The decoder says "invalid" for both. An instruction this long begins with a prefix; without it, one that is merely
    // invalid fits into what is left.
    let Some(rest) = bytes.get(start + 1..start + MAX_LENGTH) else { return false };
    let mut decoder = Decoder::with_ip(mode.bits as u32, rest, 0, DecoderOptions::NONE);
    decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
}

/// The operation that ends a block of `bytes` bytes without a branch.
pub(crate) fn end_of_block(bytes: usize) -> Op {
    Op {
        run: flow::end_of_block,
        imm: 0,
        disp: 0,
        next: bytes as u16,
        len: 0,
        dst: 0,
        src: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: NO_SEG,
        kind: 0,
        extra: 0,
    }
}

struct One<'a> {
    i: &'a Instruction,
    mode: Mode,
    block_rip: u64,
    native: &'a mut Native,
    op: Op,
    ends: bool,
}

impl One<'_> {
    fn is_mem(&self, n: u32) -> bool {
        n < self.i.op_count() && self.i.op_kind(n) == OpKind::Memory
    }
    fn is_reg(&self, n: u32) -> bool {
        n < self.i.op_count() && self.i.op_kind(n) == OpKind::Register
    }
    fn reg(&self, n: u32) -> u8 {
        register(self.i.op_register(n))
    }
    /// Width of operand `n` in bytes.
    fn width(&self, n: u32) -> u64 {
        match self.i.op_kind(n) {
            OpKind::Register => self.i.op_register(n).size() as u64,
            _ => self.i.memory_size().size() as u64,
        }
    }
    fn immediate(&self, n: u32) -> u64 {
        self.i.try_immediate(n).unwrap_or(0)
    }
    /// The address size and segment of an implicit or explicit memory operand.
    fn addressing(&mut self, bits: u32, seg: Register) {
        let explicit = segment(seg);
        if self.mode.bits == 64 {
            self.op.kind |= if bits == 32 { addr::LONG32 } else { addr::LONG };
            self.op.seg = match explicit as usize {
                FS | GS => explicit,
                SS => STACK_SEG,
                _ => NO_SEG,
            };
            return;
        }
        if self.mode.flat && bits == 32 && !matches!(explicit as usize, CS | FS | GS) {
            self.op.kind |= addr::FLAT;
            self.op.seg = NO_SEG;
            return;
        }
        self.op.kind |= addr::SEGMENTED | if bits == 16 { addr::OFFSET16 } else { 0 };
        self.op.seg = explicit;
    }

    /// Fills in the explicit memory operand, if there is one.
    fn memory(&mut self) {
        let (base, index) = (self.i.memory_base(), self.i.memory_index());
        let bits = match (base, index) {
            (Register::None, Register::None) => match self.i.memory_displ_size() {
                2 => 16,
                4 => 32,
                8 => 64,
                _ => self.mode.bits as u32,
            },
            (Register::None, index) => index.size() as u32 * 8,
            (base, _) => base.size() as u32 * 8,
        };
        self.addressing(bits, self.i.memory_segment());
        let displacement = self.i.memory_displacement64();
        match base {
            Register::None => {}
            Register::RIP | Register::EIP => {
                self.op.base = BLOCK_RIP;
                self.op.disp = displacement.wrapping_sub(self.block_rip) as i32;
            }
            base => self.op.base = base.number() as u8,
        }
        if index != Register::None {
            self.op.index = index.number() as u8;
            self.op.scale = self.i.memory_index_scale().trailing_zeros() as u8;
        }
        if self.op.base != BLOCK_RIP {
            self.op.disp = displacement as i32;
        }
    }

    fn run(&mut self, handler: Handler) {
        self.op.run = handler;
    }

    /// Operands `dst, src` in any of the usual shapes; their form and width.
    fn binary_operands(&mut self) -> (Form, u64) {
        let width = self.width(0);
        let form = match (self.is_mem(0), self.is_reg(1), self.is_mem(1)) {
            (false, true, _) => Form::RegReg,
            (false, _, true) => Form::RegMem,
            (false, ..) => Form::RegImm,
            (true, true, _) => Form::MemReg,
            (true, ..) => Form::MemImm,
        };
        if matches!(form, Form::RegMem | Form::MemReg | Form::MemImm) {
            self.memory();
        }
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
        }
        if self.is_reg(1) {
            self.op.src = self.reg(1);
        }
        if matches!(form, Form::RegImm | Form::MemImm) {
            self.op.imm = self.immediate(1);
        }
        (form, width)
    }

    fn alu<O: arith::Binary>(&mut self) {
        let (form, width) = self.binary_operands();
        self.run(arith::binary::<O>(form, width));
    }
    fn unary<O: arith::Unary>(&mut self) {
        let (mem, width) = self.destination();
        self.run(arith::unary::<O>(mem, width));
    }
    fn shift<O: arith::Shift>(&mut self) {
        let (mem, width) = self.destination();
        if self.is_reg(1) {
            self.op.extra = 1;
        } else {
            self.op.imm = self.immediate(1);
        }
        self.run(arith::shift::<O>(mem, width));
    }
    /// Operand 0 as a destination: in memory?, width.
    fn destination(&mut self) -> (bool, u64) {
        let mem = self.is_mem(0);
        if mem {
            self.memory();
        } else {
            self.op.dst = self.reg(0);
        }
        (mem, self.width(0))
    }
    /// Operand `n` as a source in `src` or memory: in memory?, width.
    fn source(&mut self, n: u32) -> (bool, u64) {
        let mem = self.is_mem(n);
        if mem {
            self.memory();
        } else {
            self.op.src = self.reg(n);
        }
        (mem, self.width(n))
    }

    fn build(&mut self) {
        if self.i.is_invalid() {
            self.ends = true;
            return;
        }
        if self.i.has_lock_prefix() {
            self.op.kind |= addr::LOCK;
        }
        let known = self.integer() || self.stack_and_flow() || self.strings() || self.system() || self.masked_vectors();
        if !known {
            self.native();
        }
    }

    /// Everything else runs on the host's processor, if the guest has been offered the feature.
    fn native(&mut self) {
        let mode = self.mode;
        let has_memory = (0..self.i.op_count()).any(|n| {
            matches!(
                self.i.op_kind(n),
                OpKind::Memory | OpKind::MemorySegRDI | OpKind::MemorySegEDI | OpKind::MemorySegDI
            )
        });
        if has_memory && (0..self.i.op_count()).any(|n| self.is_mem(n)) {
            self.memory();
        }
        match self.native.translate(self.i, mode) {
            Some((handler, thunk)) => {
                self.op.imm = thunk.address;
                (self.op.dst, self.op.src, self.op.extra) = (thunk.class, thunk.traits, thunk.memory_bytes);
                self.run(handler);
            }
            None => {
                self.ends = true;
                if self.native.offered(self.i) {
                    self.run(unimplemented);
                }
            }
        }
    }

    fn integer(&mut self) -> bool {
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

    fn branch_target(&mut self) {
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

    fn stack_and_flow(&mut self) -> bool {
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

    fn ending(&mut self, handler: Handler) {
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

    fn strings(&mut self) -> bool {
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

    fn system(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Nop
            | M::Pause
            | M::Endbr64
            | M::Endbr32
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetch
            | M::Prefetchwt1
            | M::Reservednop
            | M::Mfence
            | M::Lfence
            | M::Sfence => self.run(system::nop),
            M::Clflush | M::Clflushopt | M::Clwb => {
                self.memory();
                self.run(system::touch);
            }
            M::Hlt => self.ending(system::hlt),
            M::Cli => self.run(system::cli),
            M::Sti => self.ending(system::sti),
            M::Clac => self.run(system::access_flag::<false>),
            M::Stac => self.run(system::access_flag::<true>),
            M::In | M::Out => self.port(),
            M::Cpuid => self.run(system::cpuid),
            M::Rdtsc => self.run(system::rdtsc::<false>),
            M::Rdtscp => self.run(system::rdtsc::<true>),
            M::Rdpid => {
                self.op.dst = self.reg(0);
                self.run(system::rdpid);
            }
            M::Rdmsr => self.run(system::rdmsr),
            M::Wrmsr => self.ending(system::wrmsr),
            M::Rdpmc => self.run(system::rdpmc),
            M::Xgetbv => self.run(system::xgetbv),
            M::Xsetbv => self.ending(system::xsetbv),
            M::Swapgs => self.run(system::swapgs),
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => self.segment_base(),
            M::Rdrand | M::Rdseed => {
                self.op.dst = self.reg(0);
                let width = self.width(0);
                self.run(by_word!(width, T => system::random::<T>));
                return self.native.offered(self.i);
            }
            M::Clts => self.ending(system::clts),
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.run(system::wbinvd),
            M::Invlpg => {
                self.memory();
                self.ending(system::invlpg);
            }
            M::Syscall => self.ending(transfer::syscall),
            M::Sysret => self.ending(transfer::sysret::<false>),
            M::Sysretq => self.ending(transfer::sysret::<true>),
            M::Sysenter => self.ending(transfer::sysenter),
            M::Sysexit => self.ending(transfer::sysexit::<false>),
            M::Sysexitq => self.ending(transfer::sysexit::<true>),
            M::Ud0 | M::Ud1 | M::Ud2 => self.ending(system::ud),
            _ => return self.tables() || self.state(),
        }
        true
    }

    fn port(&mut self) {
        let out = self.i.mnemonic() == M::Out;
        let (port, data) = if out { (0, 1) } else { (1, 0) };
        let width = self.width(data);
        if self.is_reg(port) {
            self.op.extra = 1;
        } else {
            self.op.imm = self.immediate(port);
        }
        self.ends = true;
        self.run(if out {
            by_width!(width, T => system::port_out::<T>)
        } else {
            by_width!(width, T => system::port_in::<T>)
        });
    }

    fn segment_base(&mut self) {
        let mnemonic = self.i.mnemonic();
        let write = matches!(mnemonic, M::Wrfsbase | M::Wrgsbase);
        self.op.extra = if matches!(mnemonic, M::Rdfsbase | M::Wrfsbase) { FS } else { GS } as u8;
        (self.op.dst, self.op.src) = (self.reg(0), self.reg(0));
        let width = self.width(0);
        self.run(if write {
            by_word!(width, T => system::write_base::<T>)
        } else {
            by_word!(width, T => system::read_base::<T>)
        });
    }

    fn tables(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => {
                self.memory();
                let wide = !matches!(
                    self.i.code(),
                    Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
                );
                if wide {
                    self.op.kind |= addr::OPERAND32;
                }
                match self.i.mnemonic() {
                    M::Lgdt => self.run(system::load_table::<false>),
                    M::Lidt => self.run(system::load_table::<true>),
                    M::Sgdt => self.run(system::store_table::<false>),
                    _ => self.run(system::store_table::<true>),
                }
            }
            M::Lldt | M::Ltr | M::Lmsw => {
                let (mem, _) = self.source(0);
                self.ending(match (self.i.mnemonic(), mem) {
                    (M::Lldt, true) => system::lldt::<true>,
                    (M::Lldt, false) => system::lldt::<false>,
                    (M::Ltr, true) => system::ltr::<true>,
                    (M::Ltr, false) => system::ltr::<false>,
                    (_, true) => system::lmsw::<true>,
                    (_, false) => system::lmsw::<false>,
                });
            }
            M::Sldt | M::Str | M::Smsw => {
                let (mem, width) = self.destination();
                self.run(match (self.i.mnemonic(), mem) {
                    (M::Sldt, true) => system::store_selector_mem::<false>,
                    (M::Str, true) => system::store_selector_mem::<true>,
                    (M::Sldt, false) => by_word!(width, T => system::store_selector::<false, T>),
                    (M::Str, false) => by_word!(width, T => system::store_selector::<true, T>),
                    (_, true) => system::smsw_mem,
                    (_, false) => by_word!(width, T => system::smsw::<T>),
                });
            }
            M::Lar | M::Lsl => {
                self.op.dst = self.reg(0);
                let width = self.width(0);
                let lar = self.i.mnemonic() == M::Lar;
                let (mem, _) = self.source(1);
                self.run(match (lar, mem) {
                    (true, true) => by_word!(width, T => system::inspect::<{ system::LAR }, true, T>),
                    (true, false) => by_word!(width, T => system::inspect::<{ system::LAR }, false, T>),
                    (false, true) => by_word!(width, T => system::inspect::<{ system::LSL }, true, T>),
                    (false, false) => by_word!(width, T => system::inspect::<{ system::LSL }, false, T>),
                });
            }
            M::Verr | M::Verw => {
                let (mem, _) = self.source(0);
                self.run(match (self.i.mnemonic(), mem) {
                    (M::Verr, true) => system::inspect::<{ system::VERR }, true, u16>,
                    (M::Verr, false) => system::inspect::<{ system::VERR }, false, u16>,
                    (_, true) => system::inspect::<{ system::VERW }, true, u16>,
                    (_, false) => system::inspect::<{ system::VERW }, false, u16>,
                });
            }
            M::Arpl => {
                let (mem, _) = self.destination();
                self.op.src = self.reg(1);
                self.run(if mem { system::arpl::<true> } else { system::arpl::<false> });
            }
            M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => {
                self.memory();
                self.op.dst = self.reg(0);
                self.op.extra = match self.i.mnemonic() {
                    M::Lds => crate::cpu::DS,
                    M::Les => ES,
                    M::Lss => SS,
                    M::Lfs => FS,
                    _ => GS,
                } as u8;
                self.ends = true;
                let width = self.width(0);
                self.run(by_word!(width, T => transfer::load_far_pointer::<T>));
            }
            _ => return false,
        }
        true
    }

    /// Vector instructions that reach memory element by element.
    fn masked_vectors(&mut self) -> bool {
        use masked::{Shape, gather, masked_load, masked_store, maskmovdqu, maskmovq};
        let mut shape = Shape { element: 4, count: 0, index: 0, scale: 0, index_register: 0 };
        let vector = |one: &Self, n| one.i.op_register(n).number() as u8;
        match self.i.mnemonic() {
            M::Vmaskmovps | M::Vpmaskmovd | M::Vmaskmovpd | M::Vpmaskmovq => {
                if matches!(self.i.mnemonic(), M::Vmaskmovpd | M::Vpmaskmovq) {
                    shape.element = 8;
                }
                let store = self.is_mem(0);
                let width = self.i.op_register(1).size() as u8;
                shape.count = width / shape.element;
                (self.op.dst, self.op.src) =
                    if store { (vector(self, 2), vector(self, 1)) } else { (vector(self, 0), vector(self, 1)) };
                self.memory();
                self.run(if store { masked_store } else { masked_load });
            }
            M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq => {
                let wide = matches!(self.i.mnemonic(), M::Vgatherdpd | M::Vgatherqpd | M::Vpgatherdq | M::Vpgatherqq);
                let narrow_index =
                    matches!(self.i.mnemonic(), M::Vgatherdps | M::Vgatherdpd | M::Vpgatherdd | M::Vpgatherdq);
                shape.element = if wide { 8 } else { 4 };
                shape.index = if narrow_index { 4 } else { 8 };
                let (data, index) = (self.i.op_register(0).size() as u8, self.i.memory_index().size() as u8);
                shape.count = (data / shape.element).min(index / shape.index);
                shape.index_register = self.i.memory_index().number() as u8;
                shape.scale = self.i.memory_index_scale().trailing_zeros() as u8;
                (self.op.dst, self.op.src) = (vector(self, 0), vector(self, 2));
                self.memory();
                (self.op.index, self.op.scale) = (ZERO, 0);
                self.run(gather);
            }
            M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => {
                let bits = match self.i.op_kind(0) {
                    OpKind::MemorySegRDI => 64,
                    OpKind::MemorySegEDI => 32,
                    _ => 16,
                };
                self.addressing(bits, self.i.memory_segment());
                self.op.base = crate::cpu::RDI as u8;
                (self.op.dst, self.op.src) = (vector(self, 1), vector(self, 2));
                self.run(match self.i.mnemonic() {
                    M::Maskmovdqu => maskmovdqu::<false>,
                    M::Vmaskmovdqu => maskmovdqu::<true>,
                    _ => maskmovq,
                });
            }
            _ => return false,
        }
        self.op.imm = shape.pack();
        if !self.native.offered(self.i) {
            self.run(system::ud);
        }
        true
    }

    fn state(&mut self) -> bool {
        use system::{FXRSTOR, FXSAVE, LDMXCSR, STMXCSR, XRSTOR, XSAVE, vector_state};
        let handler: Handler = match self.i.mnemonic() {
            M::Fxsave => vector_state::<FXSAVE>,
            M::Fxsave64 => {
                self.op.kind |= addr::OPERAND64;
                vector_state::<FXSAVE>
            }
            M::Fxrstor | M::Fxrstor64 => vector_state::<FXRSTOR>,
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => vector_state::<XSAVE>,
            M::Xrstor | M::Xrstor64 => vector_state::<XRSTOR>,
            M::Ldmxcsr | M::Vldmxcsr => vector_state::<LDMXCSR>,
            M::Stmxcsr | M::Vstmxcsr => vector_state::<STMXCSR>,
            M::Wait => {
                self.run(system::fwait);
                return true;
            }
            _ => return false,
        };
        self.memory();
        self.run(handler);
        true
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

fn unimplemented(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.give_up("this instruction is not implemented by the software CPU")
}
