//! Instructions to try: every form that iced knows in 64-bit mode, with operands that reach corners.

use iced_x86::{Code, Encoder, EncodingKind, Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind, Register};

use crate::layout::{CODE, DATA, DATA_BYTES, FS_BASE, GS_BASE, RO_BYTES};
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
pub fn not_comparable(code: Code) -> Option<&'static str> {
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
        Reservednop if format!("{code:?}").ends_with("0F0D") => {
            "with a register, Intel's processors do nothing and AMD's raise #UD"
        }
        _ if code.op_code().encoding() != EncodingKind::Legacy && code.op_code().encoding() != EncodingKind::VEX => {
            "its encoding (EVEX, XOP, 3DNow!) is not offered"
        }
        _ if narrow_branch(code) => "an operand-size prefix on a near branch means different things to Intel and AMD",
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
fn target(rng: &mut Rng) -> u64 {
    let end = DATA + DATA_BYTES as u64;
    match rng.below(40) {
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
    }
}

fn gpr(rng: &mut Rng, base: Register, rsp: bool) -> Register {
    loop {
        let n = rng.below(16) as u32;
        // The stack pointer is an operand now and then, but not the usual one.
        if rsp || n != 4 || rng.one_in(8) {
            return base + n;
        }
    }
}
fn gpr8(rng: &mut Rng) -> Register {
    // AL to R15L in iced's order; AH to BH among them.
    Register::AL + rng.below(20) as u32
}

/// Builds a case for `code`; `None` where iced cannot encode what came out.
pub fn case(code: Code, rng: &mut Rng) -> Option<Case> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let mut regs: [u64; 16] = std::array::from_fn(|_| rng.integer());
    // Implicit pointers lead into data.
    for r in [4, 6, 7] {
        regs[r] = target(rng);
    }
    if rng.one_in(2) {
        regs[3] = target(rng);
    }
    if rng.one_in(3) {
        regs[5] = target(rng);
    }
    let mut memory = false;
    for n in 0..info.op_count() {
        memory |= operand(&mut i, n, info.op_kind(n), code, rng)?;
    }
    if memory {
        address(&mut i, rng, &mut regs);
    }
    prefixes(&mut i, info, rng, &mut regs);
    let mut encoder = Encoder::try_new(64).ok()?;
    let length = encoder.encode(&i, CODE).ok()?;
    let bytes = encoder.take_buffer();
    if length > 15 {
        return None;
    }
    // What the processor and the interpreter will decode, which may differ from what was meant.
    let decoded = iced_x86::Decoder::with_ip(64, &bytes, CODE, 0).decode();
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
fn operand(i: &mut Instruction, n: u32, kind: K, code: Code, rng: &mut Rng) -> Option<bool> {
    let register = |i: &mut Instruction, r: Register| {
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, r);
    };
    let either = rng.one_in(2);
    match kind {
        K::r8_reg | K::r8_opcode => register(i, gpr8(rng)),
        K::r16_reg | K::r16_opcode | K::r16_rm | K::r16_reg_mem => register(i, gpr(rng, Register::AX, false)),
        K::r32_reg | K::r32_opcode | K::r32_rm | K::r32_vvvv | K::r32_reg_mem => {
            register(i, gpr(rng, Register::EAX, false));
        }
        K::r64_reg | K::r64_opcode | K::r64_rm | K::r64_vvvv | K::r64_reg_mem => {
            register(i, gpr(rng, Register::RAX, false));
        }
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            register(i, Register::XMM0 + rng.below(16) as u32)
        }
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            register(i, Register::YMM0 + rng.below(16) as u32)
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
        K::r8_or_mem if either => register(i, gpr8(rng)),
        K::r16_or_mem if either => register(i, gpr(rng, Register::AX, false)),
        K::r32_or_mem if either => register(i, gpr(rng, Register::EAX, false)),
        K::r64_or_mem if either => register(i, gpr(rng, Register::RAX, false)),
        K::xmm_or_mem if either => register(i, Register::XMM0 + rng.below(16) as u32),
        K::ymm_or_mem if either => register(i, Register::YMM0 + rng.below(16) as u32),
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
            let goal = target(rng);
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_displacement64(goal);
            i.set_memory_displ_size(8);
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
            i.set_immediate16(if code.mnemonic() == M::Enter { rng.below(64) as u16 } else { rng.integer() as u16 });
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
        K::br64_1 | K::br64_4 => {
            i.set_op_kind(n, OpKind::NearBranch64);
            i.set_near_branch64(CODE + 2 + rng.below(60));
        }
        K::seg_rSI => i.set_op_kind(n, OpKind::MemorySegRSI),
        K::es_rDI => i.set_op_kind(n, OpKind::MemoryESRDI),
        K::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
        K::seg_rBX_al => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(Register::RBX);
            i.set_memory_index(Register::AL);
        }
        _ => return None,
    }
    Some(false)
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
fn address(i: &mut Instruction, rng: &mut Rng, regs: &mut [u64; 16]) {
    let goal = target(rng);
    let vsib = i.is_vsib()
        || i.code()
            .op_code()
            .op_kinds()
            .iter()
            .any(|k| matches!(k, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y));
    let base_of_segment = if rng.one_in(12) {
        let (segment, base) = rng.pick(&[(Register::FS, FS_BASE), (Register::GS, GS_BASE)]);
        i.set_segment_prefix(segment);
        base
    } else {
        0
    };
    // AMD's processors refuse the upper half through FS and GS where Intel's page-fault.
    let goal = if base_of_segment != 0 && goal >> 47 != 0 { DATA } else { goal };
    let goal = goal.wrapping_sub(base_of_segment);
    if !vsib && rng.one_in(8) && base_of_segment == 0 && (DATA - 4096..DATA + 0x10000).contains(&goal) {
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
    let base = gpr(rng, Register::RAX, true);
    i.set_memory_base(base);
    i.set_memory_displacement64(displacement as u64);
    i.set_memory_displ_size(match displacement {
        0 => 0,
        -128..128 => 1,
        _ => 8,
    });
    let mut rest = goal.wrapping_sub(displacement as u64);
    if vsib {
        let y = i.code().op_code().op_kinds().iter().any(|k| matches!(k, K::mem_vsib32y | K::mem_vsib64y));
        i.set_memory_index(if y { Register::YMM0 } else { Register::XMM0 } + rng.below(16) as u32);
        i.set_memory_index_scale(1 << rng.below(4));
    } else if rng.one_in(2) {
        let index = gpr(rng, Register::RAX, false);
        if index != Register::RSP && index != base {
            let scale = 1u32 << rng.below(4);
            i.set_memory_index(index);
            i.set_memory_index_scale(scale);
            rest = rest.wrapping_sub(regs[index.number()].wrapping_mul(scale as u64));
        }
    }
    regs[base.number()] = rest;
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
