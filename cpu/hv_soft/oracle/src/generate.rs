//! Instructions to try: every form that iced knows, with operands that reach corners.

use iced_x86::{Code, Encoder, EncodingKind, Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind, Register};

use crate::layout::{DATA, DATA_BYTES, FS_BASE, GS_BASE, Mode, RO_BYTES};
use crate::rng::Rng;

/// An instruction with what its operands need.
pub struct Case {
    /// The instruction.
    pub instruction: Instruction,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// General registers.
    pub gpr: [u64; 16],
}

/// Why a form is not compared, by name; `None` where it is.
pub fn not_comparable(code: Code, mode: Mode) -> Option<&'static str> {
    use M::*;
    let kernel = "enters the host's kernel";
    let host = "its result is the host's identity, time or chance";
    let tables = "its result depends on the host's descriptor tables";
    let system = "changes segments or privilege, which a user process cannot compare";
    let area = "stores state areas in the host's own layout or with host addresses";
    Some(match code.mnemonic() {
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq | Int | Int1 | Int3 | Into => kernel,
        Cpuid | Rdtsc | Rdtscp | Rdpmc | Rdrand | Rdseed | Rdpid | Xgetbv | Rdpru => host,
        Lar | Lsl | Verr | Verw | Sgdt | Sidt | Sldt | Str | Smsw => tables,
        Iret | Iretd | Iretq | Retf | Lss | Lfs | Lgs | Lds | Les | Ltr | Lldt | Swapgs => system,
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => system,
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64 => area,
        Fnstenv | Fnsave | Fldenv | Frstor | Fstenv | Fsave => area,
        Popf | Popfq | Popfd => "takes the trap flag by which the child is stepped",
        Monitor | Mwait | Umonitor | Umwait | Tpause => "waits",
        INVALID => "is not an instruction",
        Movsxd if code == Code::Movsxd_r16_rm16 => "Intel's processors read two bytes of memory and AMD's four",
        Reservednop if format!("{code:?}").ends_with("0F0D") => {
            "with a register, Intel's processors do nothing and AMD's raise #UD"
        }
        _ if code.op_code().encoding() != EncodingKind::Legacy && code.op_code().encoding() != EncodingKind::VEX => {
            "its encoding (EVEX, XOP, 3DNow!) is not offered"
        }
        _ if mode == Mode::Long && narrow_branch(code) => {
            "an operand-size prefix on a near branch means different things to Intel and AMD"
        }
        Jmp | Call if code.op_code().is_far_branch() => system,
        Mov | Pop | Push if code.op_code().op_kinds().contains(&K::seg_reg) => system,
        Pop | Push if format!("{code:?}").ends_with("S") => system,
        _ => return None,
    })
}

/// Near branches with 16-bit operands, which 64-bit code of an Intel processor cannot have.
fn narrow_branch(code: Code) -> bool {
    let name = format!("{code:?}");
    let branch = code.is_jcc_short_or_near()
        || code.is_jmp_short_or_near()
        || code.is_call_near()
        || matches!(code.mnemonic(), M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz);
    let relative = name.ends_with("_16") || name.contains("_16_") || name.contains("rel16");
    branch && relative || matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16)
}

trait FarBranch {
    fn is_far_branch(&self) -> bool;
}
impl FarBranch for iced_x86::OpCodeInfo {
    fn is_far_branch(&self) -> bool {
        let code = self.code();
        code.is_jmp_far() || code.is_jmp_far_indirect() || code.is_call_far() || code.is_call_far_indirect()
    }
}

/// Where memory operands point.
fn target(mode: Mode, rng: &mut Rng) -> u64 {
    let end = DATA + DATA_BYTES as u64;
    let linear = match rng.below(40) {
        0..20 => DATA + rng.below(DATA_BYTES as u64 - 600) / 64 * 64,
        20..28 => DATA + rng.below(DATA_BYTES as u64 - 600),
        28..33 => DATA + 4096 * (1 + rng.below(3)) - rng.below(64),
        33 => end - rng.below(40),
        34 => end + rng.below(RO_BYTES as u64 - 64),
        35 => end + RO_BYTES as u64 - rng.below(40),
        36 => end + RO_BYTES as u64 + rng.below(4096),
        37 => DATA - rng.below(40),
        38 => rng.pick(&[0, 0x8000_0000_0000_0000, 0x0000_8000_0000_0000, 0xffff_8000_0000_0000, 0x7fff_ffff_fff8]),
        _ => DATA + rng.below(DATA_BYTES as u64 - 600) / 16 * 16,
    };
    linear.wrapping_sub(mode.data_base()) & mode.register_mask()
}

fn gpr(mode: Mode, rng: &mut Rng, base: Register, rsp: bool) -> Register {
    loop {
        let n = rng.below(mode.registers()) as u32;
        // The stack pointer is an operand now and then, but not the usual one.
        if rsp || n != 4 || rng.one_in(8) {
            return base + n;
        }
    }
}
fn gpr8(mode: Mode, rng: &mut Rng) -> Register {
    // AL to R15L in iced's order; AH to BH among them.
    Register::AL + rng.below(if mode == Mode::Long { 20 } else { 8 }) as u32
}

/// Builds a case for `code`; `None` where iced cannot encode what came out.
pub fn case(code: Code, mode: Mode, rng: &mut Rng) -> Option<Case> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let mut regs: [u64; 16] = std::array::from_fn(|_| rng.integer() & mode.register_mask());
    // Implicit pointers lead into data.
    for r in [4, 6, 7] {
        regs[r] = target(mode, rng);
    }
    if rng.one_in(2) {
        regs[3] = target(mode, rng);
    }
    if rng.one_in(3) {
        regs[5] = target(mode, rng);
    }
    let mut memory = false;
    for n in 0..info.op_count() {
        memory |= operand(&mut i, n, info.op_kind(n), mode, rng)?;
    }
    if memory {
        address(&mut i, mode, rng, &mut regs);
    }
    prefixes(&mut i, info, rng, &mut regs);
    let mut encoder = Encoder::try_new(mode.bits()).ok()?;
    let length = encoder.encode(&i, mode.code()).ok()?;
    let bytes = encoder.take_buffer();
    if length > 15 {
        return None;
    }
    // What the processor and the interpreter will decode, which may differ from what was meant.
    let decoded = iced_x86::Decoder::with_ip(mode.bits(), &bytes, mode.code(), 0).decode();
    if decoded.code() != code && !same_operation(decoded.code(), code) {
        return None;
    }
    Some(Case { instruction: decoded, bytes, gpr: regs })
}

/// Encodings that decode to a sibling form.
fn same_operation(a: Code, b: Code) -> bool {
    a.mnemonic() == b.mnemonic()
}

/// Fills in operand `n`; true if it is an explicit memory operand.
fn operand(i: &mut Instruction, n: u32, kind: K, mode: Mode, rng: &mut Rng) -> Option<bool> {
    let register = |i: &mut Instruction, r: Register| {
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, r);
    };
    let either = rng.one_in(2);
    match kind {
        K::r8_reg | K::r8_opcode => register(i, gpr8(mode, rng)),
        K::r16_reg | K::r16_opcode | K::r16_rm | K::r16_reg_mem => register(i, gpr(mode, rng, Register::AX, false)),
        K::r32_reg | K::r32_opcode | K::r32_rm | K::r32_vvvv | K::r32_reg_mem => {
            register(i, gpr(mode, rng, Register::EAX, false));
        }
        K::r64_reg | K::r64_opcode | K::r64_rm | K::r64_vvvv | K::r64_reg_mem => {
            register(i, gpr(mode, rng, Register::RAX, false));
        }
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            register(i, Register::XMM0 + rng.below(mode.registers()) as u32)
        }
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            register(i, Register::YMM0 + rng.below(mode.registers()) as u32)
        }
        K::mm_reg | K::mm_rm => register(i, Register::MM0 + rng.below(8) as u32),
        K::sti_opcode => register(i, Register::ST0 + rng.below(8) as u32),
        K::al => register(i, Register::AL),
        K::cl => register(i, Register::CL),
        K::ax => register(i, Register::AX),
        K::dx => register(i, Register::DX),
        K::eax => register(i, Register::EAX),
        K::rax => register(i, Register::RAX),
        K::st0 => register(i, Register::ST0),
        K::cr_reg => {
            register(i, rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8]))
        }
        K::dr_reg => register(i, rng.pick(&[Register::DR0, Register::DR6, Register::DR7])),
        K::r8_or_mem if either => register(i, gpr8(mode, rng)),
        K::r16_or_mem if either => register(i, gpr(mode, rng, Register::AX, false)),
        K::r32_or_mem if either => register(i, gpr(mode, rng, Register::EAX, false)),
        K::r64_or_mem if either => register(i, gpr(mode, rng, Register::RAX, false)),
        K::xmm_or_mem if either => register(i, Register::XMM0 + rng.below(mode.registers()) as u32),
        K::ymm_or_mem if either => register(i, Register::YMM0 + rng.below(mode.registers()) as u32),
        K::mm_or_mem if either => register(i, Register::MM0 + rng.below(8) as u32),
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
        | K::mm_or_mem
        | K::mem
        | K::mem_vsib32x
        | K::mem_vsib64x
        | K::mem_vsib32y
        | K::mem_vsib64y => {
            i.set_op_kind(n, OpKind::Memory);
            return Some(true);
        }
        K::mem_offs => {
            let goal = target(mode, rng);
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_displacement64(goal);
            // As wide as addresses are.
            i.set_memory_displ_size(mode.bits() / 8);
        }
        K::imm8_const_1 => {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(1);
        }
        K::imm8 | K::imm4_m2z => {
            i.set_op_kind(
                n,
                if n > 0 && i.op_kind(n - 1) == OpKind::Immediate16 {
                    OpKind::Immediate8_2nd
                } else {
                    OpKind::Immediate8
                },
            );
            let value = rng.integer() as u8;
            if i.op_kind(n) == OpKind::Immediate8_2nd {
                i.set_immediate8_2nd(value & 3)
            } else {
                i.set_immediate8(value)
            }
        }
        K::imm8sex16 => immediate(i, n, OpKind::Immediate8to16, rng),
        K::imm8sex32 => immediate(i, n, OpKind::Immediate8to32, rng),
        K::imm8sex64 => immediate(i, n, OpKind::Immediate8to64, rng),
        K::imm16 => {
            i.set_op_kind(n, OpKind::Immediate16);
            i.set_immediate16(if i.mnemonic() == M::Enter { rng.below(64) as u16 } else { rng.integer() as u16 });
        }
        K::imm32 => {
            i.set_op_kind(n, OpKind::Immediate32);
            i.set_immediate32(rng.integer() as u32);
        }
        K::imm32sex64 => {
            i.set_op_kind(n, OpKind::Immediate32to64);
            i.set_immediate32to64(rng.integer() as i32 as i64);
        }
        K::imm64 => {
            i.set_op_kind(n, OpKind::Immediate64);
            i.set_immediate64(rng.integer());
        }
        _ => return implied(i, n, kind, mode, rng),
    }
    Some(false)
}

/// Branch targets, and memory operands whose address registers are fixed.
fn implied(i: &mut Instruction, n: u32, kind: K, mode: Mode, rng: &mut Rng) -> Option<bool> {
    match kind {
        K::br64_1 | K::br64_4 => {
            i.set_op_kind(n, OpKind::NearBranch64);
            i.set_near_branch64(mode.code() + 2 + rng.below(60));
        }
        K::br32_1 | K::br32_4 => {
            i.set_op_kind(n, OpKind::NearBranch32);
            i.set_near_branch32(mode.code() as u32 + 2 + rng.below(60) as u32);
        }
        K::br16_1 | K::br16_2 => {
            i.set_op_kind(n, OpKind::NearBranch16);
            i.set_near_branch16(mode.code() as u16 + 2 + rng.below(60) as u16);
        }
        K::seg_rSI => {
            i.set_op_kind(n, by_mode(mode, [OpKind::MemorySegRSI, OpKind::MemorySegESI, OpKind::MemorySegSI]))
        }
        K::es_rDI => i.set_op_kind(n, by_mode(mode, [OpKind::MemoryESRDI, OpKind::MemoryESEDI, OpKind::MemoryESDI])),
        K::seg_rDI => {
            i.set_op_kind(n, by_mode(mode, [OpKind::MemorySegRDI, OpKind::MemorySegEDI, OpKind::MemorySegDI]))
        }
        K::seg_rBX_al => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(by_mode(mode, [Register::RBX, Register::EBX, Register::BX]));
            i.set_memory_index(Register::AL);
        }
        _ => return None,
    }
    Some(false)
}

fn by_mode<T: Copy>(mode: Mode, [long, wide, narrow]: [T; 3]) -> T {
    match mode {
        Mode::Long => long,
        Mode::Bits32 => wide,
        Mode::Bits16 => narrow,
    }
}

fn immediate(i: &mut Instruction, n: u32, kind: OpKind, rng: &mut Rng) {
    i.set_op_kind(n, kind);
    let value = rng.integer() as i8 as i64;
    match kind {
        OpKind::Immediate8to16 => i.set_immediate8to16(value as i16),
        OpKind::Immediate8to32 => i.set_immediate8to32(value as i32),
        _ => i.set_immediate8to64(value),
    }
}

/// An addressing form whose registers make it point at a chosen place.
fn address(i: &mut Instruction, mode: Mode, rng: &mut Rng, regs: &mut [u64; 16]) {
    let goal = target(mode, rng);
    let vsib = vsib_of(i);
    let base_of_segment = if rng.one_in(12) {
        let [fs, gs] = match mode {
            Mode::Long => [FS_BASE, GS_BASE],
            _ => mode.far_segments().map(|s| s.base - mode.data_base()),
        };
        let (segment, base) = rng.pick(&[(Register::FS, fs), (Register::GS, gs)]);
        i.set_segment_prefix(segment);
        base
    } else {
        0
    };
    // AMD's processors refuse the upper half through FS and GS where Intel's page-fault.
    let goal = if base_of_segment != 0 && goal >> 47 != 0 { DATA } else { goal };
    let goal = goal.wrapping_sub(base_of_segment) & mode.register_mask();
    let near = (DATA - 4096..DATA + 0x10000).contains(&goal);
    if mode == Mode::Long && vsib.is_none() && rng.one_in(8) && base_of_segment == 0 && near {
        i.set_memory_base(Register::RIP);
        i.set_memory_displacement64(goal);
        i.set_memory_displ_size(8);
        return;
    }
    let displacement = match rng.below(4) {
        0 => 0,
        1 => rng.bits() as i8 as i64,
        2 => rng.bits() as i16 as i64,
        _ => rng.bits() as i32 as i64,
    };
    if mode == Mode::Bits16 && vsib.is_none() && !rng.one_in(4) {
        return narrow_address(i, goal, displacement as i16, rng, regs);
    }
    let first = if mode == Mode::Long { Register::RAX } else { Register::EAX };
    let base = gpr(mode, rng, first, true);
    i.set_memory_base(base);
    i.set_memory_displacement64(displacement as u64 & mode.register_mask());
    i.set_memory_displ_size(match displacement {
        0 => 0,
        -128..128 => 1,
        _ if mode == Mode::Long => 8,
        _ => 4,
    });
    let mut rest = goal.wrapping_sub(displacement as u64);
    if let Some(first) = vsib {
        i.set_memory_index(first + rng.below(mode.registers()) as u32);
        i.set_memory_index_scale(1 << rng.below(4));
    } else if rng.one_in(2) {
        let index = gpr(mode, rng, first, false);
        if index.number() != 4 && index != base {
            let scale = 1u32 << rng.below(4);
            i.set_memory_index(index);
            i.set_memory_index_scale(scale);
            rest = rest.wrapping_sub(regs[index.number()].wrapping_mul(scale as u64));
        }
    }
    regs[base.number()] = rest & mode.register_mask();
}

/// The first register that a vector index can be, for forms that have one.
fn vsib_of(i: &Instruction) -> Option<Register> {
    i.code().op_code().op_kinds().iter().find_map(|k| match k {
        K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
        K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
        _ => None,
    })
}

/// One of the eight forms of 16-bit addressing. SDM 2A table 2-1.
fn narrow_address(i: &mut Instruction, goal: u64, displacement: i16, rng: &mut Rng, regs: &mut [u64; 16]) {
    use Register::{BP, BX, DI, None as Nothing, SI};
    let forms = [(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, Nothing), (DI, Nothing), (BP, Nothing), (BX, Nothing)];
    let (base, index) = rng.pick(&forms);
    i.set_memory_base(base);
    i.set_memory_index(index);
    i.set_memory_displacement64(displacement as u16 as u64);
    i.set_memory_displ_size(match displacement {
        0 => 0,
        -128..128 => 1,
        _ => 2,
    });
    let mut rest = goal.wrapping_sub(displacement as u64);
    if index != Nothing {
        rest = rest.wrapping_sub(regs[index.number()]);
    }
    // Only the low half takes part; the upper half keeps what it had.
    let whole = &mut regs[base.number()];
    *whole = *whole & !0xffff | rest & 0xffff;
}

fn prefixes(i: &mut Instruction, info: &iced_x86::OpCodeInfo, rng: &mut Rng, regs: &mut [u64; 16]) {
    let memory_destination = info.op_count() > 0 && i.op_kind(0) == OpKind::Memory;
    if info.can_use_lock_prefix() && memory_destination && rng.one_in(3) {
        i.set_has_lock_prefix(true);
    }
    if i.is_string_instruction() && rng.one_in(2) {
        if rng.one_in(3) && info.can_use_repne_prefix() {
            i.set_has_repne_prefix(true);
        } else if info.can_use_rep_prefix() {
            i.set_has_rep_prefix(true);
        }
        regs[1] = rng.below(12);
    }
}
