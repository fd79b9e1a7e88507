//! From instruction bytes to [`Op`]s: iced decodes, this file chooses the handler and normalises the operands.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::cpu::{BLOCK_RIP, CS, Cpu, FS, Flow, GS, Handler, Io, Mode, NO_SEG, Op, SS, STACK_SEG, ZERO, addr};
use crate::native::Native;
use crate::ops::arith::{self, Form};

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

mod flow;
mod integer;
mod system;

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
                run: crate::ops::system::ud,
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
            one.ending(crate::ops::system::too_long);
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
        run: crate::ops::flow::end_of_block,
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
}

fn unimplemented(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.give_up("this instruction is not implemented by the software CPU")
}
