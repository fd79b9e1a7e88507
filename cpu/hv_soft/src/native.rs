//! Vector, x87 and other instructions executed by the host's own processor.
//!
//! For each instruction a small piece of code (a *thunk*) is generated once: it loads the registers that the instruction
//! uses from the vCPU's state, executes the guest's instruction with its memory operand pointed at a scratch buffer, and
//! stores what was written. Results are bit-exact because it is the same processor. The interpreter moves memory operands
//! between guest and scratch, so no generated code touches guest memory and none can fault: SSE exceptions run masked and
//! are raised afterwards, x87 ones are deferred by the architecture itself.

mod code;

use std::collections::{HashMap, HashSet};
use std::io;

use iced_x86::{
    CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind,
    Register, RflagsBits,
};
use x86::CpuidTable;
use x86::cpuid::Features;

use crate::cpu::{Cpu, Flow, Handler, Io, Mode, Op, Stop};
use crate::fpu::{SCRATCH_BYTES, at};
use code::CodeBuffer;

/// Room for generated code. The pages are taken only when used.
const CODE_BYTES: usize = 4 << 20;
/// More than one block can need.
const RESERVE_BYTES: usize = 64 * 512;

/// How a thunk is called, packed into [`Op::dst`].
mod class {
    pub const INTEGER: u8 = 0;
    pub const SSE: u8 = 1;
    pub const AVX: u8 = 2;
    pub const X87: u8 = 3;
    pub const MMX: u8 = 4;
    /// VEX-encoded without vector registers: no state needs to be enabled, but real mode does not know it.
    pub const VEX_INTEGER: u8 = 5;
}
/// Properties of a thunk, packed into [`Op::src`].
mod trait_bits {
    pub const READS: u8 = 1;
    pub const WRITES: u8 = 2;
    /// A misaligned memory operand raises #GP.
    pub const ALIGNED: u8 = 4;
    /// Uses MXCSR and may raise #XM.
    pub const FLOAT: u8 = 8;
    /// Reports pending x87 exceptions first.
    pub const WAITS: u8 = 16;
    /// Stores an x87 environment, whose pointers are not the guest's.
    pub const ENVIRONMENT: u8 = 32;
    pub const FLAGS: u8 = 64;
}

/// A thunk and the operation fields that go with it.
#[derive(Clone, Copy)]
pub(crate) struct Thunk {
    pub address: u64,
    pub class: u8,
    pub traits: u8,
    pub memory_bytes: u8,
}

/// Generated code of one vCPU.
pub(crate) struct Native {
    code: CodeBuffer,
    thunks: HashMap<Vec<u8>, u64>,
    offered: HashSet<CpuidFeature>,
    info: InstructionInfoFactory,
}

impl Native {
    /// For a guest that sees `cpuid`.
    pub fn new(cpuid: &CpuidTable) -> io::Result<Native> {
        Ok(Native {
            code: CodeBuffer::new(CODE_BYTES)?,
            thunks: HashMap::new(),
            offered: offered_features(cpuid),
            info: InstructionInfoFactory::new(),
        })
    }

    /// Whether CPUID offers everything that `i` needs.
    pub fn offered(&self, i: &Instruction) -> bool {
        i.cpuid_features().iter().all(|f| self.offered.contains(f))
    }

    /// Everything that CPUID offers.
    pub fn offered_features(&self) -> &HashSet<CpuidFeature> {
        &self.offered
    }

    /// Whether a block may not fit any more: the owner then drops all blocks and calls [`Native::reset`].
    pub fn nearly_full(&self) -> bool {
        self.code.free() < RESERVE_BYTES
    }

    /// Forgets all thunks. No operation may refer to one.
    pub fn reset(&mut self) {
        self.code.clear();
        self.thunks.clear();
    }

    /// The thunk for `i`; `None` if the guest was not offered it or it cannot be run this way.
    pub fn translate(&mut self, i: &Instruction, _mode: Mode) -> Option<(Handler, Thunk)> {
        if !self.offered(i) {
            return None;
        }
        match i.mnemonic() {
            M::Vzeroupper => {
                return Some((
                    zero_upper::<false>,
                    Thunk { address: 0, class: class::AVX, traits: 0, memory_bytes: 0 },
                ));
            }
            M::Vzeroall => {
                return Some((zero_upper::<true>, Thunk { address: 0, class: class::AVX, traits: 0, memory_bytes: 0 }));
            }
            _ => {}
        }
        let plan = Plan::new(i, &mut self.info)?;
        let bytes = plan.assemble()?;
        let address = match self.thunks.get(&bytes) {
            Some(&address) => address,
            None => {
                let address = self.code.push(&bytes)?;
                self.thunks.insert(bytes, address);
                address
            }
        };
        let thunk = Thunk { address, class: plan.class, traits: plan.traits, memory_bytes: plan.memory_bytes };
        Some((run_thunk, thunk))
    }
}

/// The host's feature words.
pub(crate) fn host_features() -> Features {
    use std::arch::x86_64::__cpuid_count;
    let (one, seven, ext) = (__cpuid_count(1, 0), __cpuid_count(7, 0), __cpuid_count(0x8000_0001, 0));
    // AVX needs the host's system software too: without OSXSAVE and YMM state in XCR0 it does not exist.
    let avx_usable = std::arch::is_x86_feature_detected!("avx");
    let avx_bits = 1 << 28 | 1 << 12 | 1 << 29;
    Features {
        leaf1_ecx: if avx_usable { one.ecx } else { one.ecx & !avx_bits },
        leaf1_edx: one.edx,
        leaf7_ebx: if avx_usable { seven.ebx } else { seven.ebx & !(1 << 5) },
        leaf7_ecx: seven.ecx,
        leaf7_edx: seven.edx,
        ext1_ecx: ext.ecx,
        ext1_edx: ext.edx,
    }
}

fn offered_features(cpuid: &CpuidTable) -> HashSet<CpuidFeature> {
    use CpuidFeature as F;
    let word = |leaf, pick: fn(&x86::CpuidLeaf) -> u32| cpuid.get(leaf, 0).map_or(0, pick);
    let (c1, d1) = (word(1, |l| l.ecx), word(1, |l| l.edx));
    let (b7, c7) = (word(7, |l| l.ebx), word(7, |l| l.ecx));
    let (ce, de) = (word(0x8000_0001, |l| l.ecx), word(0x8000_0001, |l| l.edx));
    let mut set: HashSet<F> = [
        F::INTEL8086,
        F::INTEL186,
        F::INTEL286,
        F::INTEL386,
        F::INTEL486,
        F::X64,
        F::FPU,
        F::FPU287,
        F::FPU387,
        F::MULTIBYTENOP,
        F::PAUSE,
        F::INTEL8086_ONLY,
    ]
    .into_iter()
    .collect();
    let table = [
        (d1, 8, F::CX8),
        (d1, 15, F::CMOV),
        (d1, 23, F::MMX),
        (d1, 24, F::FXSR),
        (d1, 25, F::SSE),
        (d1, 26, F::SSE2),
        (d1, 19, F::CLFSH),
        (d1, 4, F::TSC),
        (d1, 5, F::MSR),
        (d1, 11, F::SEP),
        (c1, 0, F::SSE3),
        (c1, 1, F::PCLMULQDQ),
        (c1, 9, F::SSSE3),
        (c1, 12, F::FMA),
        (c1, 13, F::CMPXCHG16B),
        (c1, 19, F::SSE4_1),
        (c1, 20, F::SSE4_2),
        (c1, 22, F::MOVBE),
        (c1, 23, F::POPCNT),
        (c1, 25, F::AES),
        (c1, 26, F::XSAVE),
        (c1, 28, F::AVX),
        (c1, 29, F::F16C),
        (c1, 30, F::RDRAND),
        (b7, 0, F::FSGSBASE),
        (b7, 3, F::BMI1),
        (b7, 5, F::AVX2),
        (b7, 8, F::BMI2),
        (b7, 18, F::RDSEED),
        (b7, 19, F::ADX),
        (b7, 20, F::SMAP),
        (b7, 23, F::CLFLUSHOPT),
        (b7, 24, F::CLWB),
        (b7, 29, F::SHA),
        (c7, 22, F::RDPID),
        (ce, 0, F::X64),
        (ce, 5, F::LZCNT),
        (ce, 8, F::PREFETCHW),
        (de, 11, F::SYSCALL),
        (de, 27, F::RDTSCP),
    ];
    set.extend(table.iter().filter(|(word, bit, _)| word >> bit & 1 != 0).map(|(.., f)| *f));
    if d1 & 1 != 0 && c1 & 1 != 0 {
        set.insert(F::FPU387SL_ONLY);
    }
    set.remove(&F::FPU387SL_ONLY);
    set
}

/// What a thunk has to do.
struct Plan {
    instruction: Instruction,
    class: u8,
    traits: u8,
    memory_bytes: u8,
    /// (guest register, host register, high byte, written)
    gprs: Vec<(u8, Register, bool, bool)>,
    /// Vector registers by number: (number, written).
    vectors: Vec<(u8, bool)>,
    reads_flags: bool,
    writes_flags: bool,
}

/// Status flags of RFLAGS; iced counts the x87 condition codes among "flags" too.
const STATUS: u32 = RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// Host registers a guest's may be moved to: all are the callee's to change, none is the thunk's own (RDI, RSI).
const POOL: [Register; 6] = [Register::RCX, Register::RDX, Register::R8, Register::R9, Register::R10, Register::R11];

impl Plan {
    fn new(i: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Plan> {
        let info = factory.info(i).clone();
        let vex = i.encoding() == EncodingKind::VEX;
        if !vex && i.encoding() != EncodingKind::Legacy || i.is_vsib() || i.is_stack_instruction() {
            return None;
        }
        let used: Vec<_> = info.used_registers().iter().map(|u| (u.register(), u.access())).collect();
        let vectors_used = used.iter().any(|(r, _)| r.is_vector_register());
        let x87 = is_x87(i);
        let mmx = used.iter().any(|(r, _)| r.is_mm()) || i.mnemonic() == M::Emms;
        let class = match (x87, mmx, vex, vectors_used) {
            (true, ..) => class::X87,
            (_, true, ..) => class::MMX,
            (.., true, true) => class::AVX,
            (.., true, false) => class::VEX_INTEGER,
            (.., true) => class::SSE,
            _ => class::INTEGER,
        };
        let mut plan = Plan {
            instruction: *i,
            class,
            traits: 0,
            memory_bytes: 0,
            gprs: Vec::new(),
            vectors: Vec::new(),
            reads_flags: i.rflags_read() & STATUS != 0,
            writes_flags: i.rflags_modified() & STATUS != 0,
        };
        plan.memory(i, &info)?;
        plan.registers(i, &used)?;
        plan.properties(i);
        Some(plan)
    }

    /// Points the memory operand at the scratch buffer.
    fn memory(&mut self, i: &Instruction, info: &iced_x86::InstructionInfo) -> Option<()> {
        let implicit = |k| matches!(k, OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI);
        if (0..i.op_count()).any(|n| implicit(i.op_kind(n))) {
            return None;
        }
        let Some(operand) = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory) else { return Some(()) };
        let bytes = i.memory_size().size();
        let bytes = if bytes == 0 { environment_bytes(i)? } else { bytes };
        if bytes > SCRATCH_BYTES {
            return None;
        }
        self.memory_bytes = bytes as u8;
        self.traits |= match info.op_access(operand) {
            OpAccess::Read | OpAccess::CondRead => trait_bits::READS,
            OpAccess::Write => trait_bits::WRITES,
            OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite => {
                trait_bits::READS | trait_bits::WRITES
            }
            _ => return None,
        };
        let m = &mut self.instruction;
        m.set_memory_base(Register::RDI);
        m.set_memory_index(Register::None);
        m.set_memory_displacement64(at::SCRATCH as u64);
        m.set_memory_displ_size(8);
        m.set_segment_prefix(Register::None);
        Some(())
    }

    /// Renames general registers out of the thunk's way and lists what is to be loaded and stored.
    fn registers(&mut self, i: &Instruction, used: &[(Register, OpAccess)]) -> Option<()> {
        let explicit: Vec<Register> =
            (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n)).collect();
        let addressing = [i.memory_base(), i.memory_index()].map(Register::full_register);
        let written =
            |a: OpAccess| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        let mut pool: Vec<Register> = POOL.to_vec();
        // Registers that the instruction names only by its nature stay what they are.
        let mut implicit = Vec::new();
        let named = implicit_operands(i);
        for &(full, is_written) in named {
            pool.retain(|p| *p != full);
            self.add_gpr(full.number() as u8, full, false, is_written);
        }
        for &(r, access) in used {
            if r.is_gpr() && !explicit.iter().any(|e| e.full_register() == r.full_register()) {
                let full = r.full_register();
                if addressing.contains(&full) && !written(access) || named.iter().any(|n| n.0 == full) {
                    continue;
                }
                if !matches!(full, Register::RAX | Register::RCX | Register::RDX | Register::RBX)
                    || full == Register::RBX
                {
                    return None;
                }
                pool.retain(|p| *p != full);
                implicit.push(full);
                self.add_gpr(full.number() as u8, full, false, written(access));
            }
        }
        for (n, r) in (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| (n, i.op_register(n))) {
            if !r.is_gpr() {
                continue;
            }
            let high = matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
            let full = r.full_register();
            let known = self.gprs.iter().find(|g| g.0 == full.number() as u8 && g.2 == high).map(|g| g.1);
            let host = match known {
                Some(host) => host,
                None if is_fixed(i, n) => full,
                None => pool.first().copied()?,
            };
            pool.retain(|p| *p != host);
            // No instruction that comes here writes AH to BH.
            let access = !high && used.iter().filter(|(u, _)| u.full_register() == full).any(|&(_, a)| written(a));
            self.add_gpr(full.number() as u8, host, high, access);
            self.instruction.set_op_register(n, sized(host, r.size()));
        }
        for &(r, access) in used.iter().filter(|(r, _)| r.is_vector_register()) {
            let number = r.number() as u8;
            match self.vectors.iter_mut().find(|v| v.0 == number) {
                Some(v) => v.1 |= written(access),
                None => self.vectors.push((number, written(access))),
            }
        }
        Some(())
    }

    fn add_gpr(&mut self, guest: u8, host: Register, high: bool, written: bool) {
        match self.gprs.iter_mut().find(|g| g.0 == guest && g.2 == high) {
            Some(g) => g.3 |= written,
            None => self.gprs.push((guest, host, high, written)),
        }
    }

    fn properties(&mut self, i: &Instruction) {
        if needs_mxcsr(i) {
            self.traits |= trait_bits::FLOAT;
        }
        if matches!(self.class, class::SSE | class::MMX) && self.memory_bytes == 16 && !tolerates_misalignment(i)
            || self.class == class::AVX && demands_alignment(i)
        {
            self.traits |= trait_bits::ALIGNED;
        }
        let name = format!("{:?}", i.mnemonic());
        if self.class == class::X87 && !name.starts_with("Fn") || self.class == class::MMX {
            self.traits |= trait_bits::WAITS;
        }
        if self.class == class::X87 && self.traits & trait_bits::WRITES != 0 {
            // An unmasked exception leaves the destination alone: what is written back is then what was there.
            self.traits |= trait_bits::READS;
        }
        if matches!(i.mnemonic(), M::Fnstenv | M::Fnsave) {
            self.traits |= trait_bits::ENVIRONMENT;
        }
        if self.writes_flags || self.reads_flags {
            self.traits |= trait_bits::FLAGS;
        }
    }

    /// The thunk's bytes, position-independent: `extern "sysv64" fn(state: *mut Fpu, gpr: *mut u64)`.
    fn assemble(&self) -> Option<Vec<u8>> {
        let mut out = code::Writer::default();
        let legacy_state = matches!(self.class, class::X87 | class::MMX);
        if legacy_state {
            out.stmxcsr(at::HOST_MXCSR);
            out.fxrstor();
        } else {
            if self.traits & trait_bits::FLOAT != 0 {
                out.stmxcsr(at::HOST_MXCSR);
                out.ldmxcsr(at::WORK_MXCSR);
            }
            for &(n, _) in &self.vectors {
                out.load_vector(n, self.class == class::AVX);
            }
        }
        if self.reads_flags {
            out.load_flags();
        }
        for &(guest, host, high, _) in &self.gprs {
            out.load_gpr(guest, host.number() as u8, high);
        }
        let mut encoder = Encoder::try_new(64).ok()?;
        encoder.encode(&self.instruction, 0x1000).ok()?;
        out.raw(&encoder.take_buffer());
        for &(guest, host, high, written) in &self.gprs {
            if written && !high {
                out.store_gpr(guest, host.number() as u8);
            }
        }
        if !legacy_state {
            for &(n, written) in &self.vectors {
                if written {
                    out.store_vector(n, self.class == class::AVX);
                }
            }
        }
        if self.writes_flags {
            out.store_flags();
        }
        if legacy_state {
            out.fxsave_and_leave();
            out.ldmxcsr(at::HOST_MXCSR);
        } else if self.traits & trait_bits::FLOAT != 0 {
            out.stmxcsr(at::WORK_MXCSR);
            out.ldmxcsr(at::HOST_MXCSR);
        }
        out.leave(self.class == class::AVX);
        Some(out.bytes)
    }
}

/// A general register of `bytes` that is part of the 64-bit register `full`.
fn sized(full: Register, bytes: usize) -> Register {
    let base = match bytes {
        1 => {
            return [
                Register::AL,
                Register::CL,
                Register::DL,
                Register::BL,
                Register::SPL,
                Register::BPL,
                Register::SIL,
                Register::DIL,
                Register::R8L,
                Register::R9L,
                Register::R10L,
                Register::R11L,
                Register::R12L,
                Register::R13L,
                Register::R14L,
                Register::R15L,
            ][full.number() & 15];
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + full.number() as u32
}

/// Registers that the instruction uses without naming them, and whether it writes them.
fn implicit_operands(i: &Instruction) -> &'static [(Register, bool)] {
    use Register::{RAX, RCX, RDX};
    match i.mnemonic() {
        M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64 => &[(RAX, false), (RDX, false), (RCX, true)],
        M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64 => &[(RAX, false), (RDX, false)],
        M::Pcmpistri | M::Vpcmpistri => &[(RCX, true)],
        M::Mulx => &[(RDX, false)],
        _ => &[],
    }
}

/// Operand `n` is always the same register.
fn is_fixed(i: &Instruction, n: u32) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    matches!(i.op_code().op_kind(n), K::al | K::ax | K::eax | K::rax | K::cl | K::dx)
}

fn is_x87(i: &Instruction) -> bool {
    i.cpuid_features().iter().any(|f| {
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::FPU287XL_ONLY)
    })
}

/// Sizes of the x87 state images, by code.
fn environment_bytes(i: &Instruction) -> Option<usize> {
    use iced_x86::Code::*;
    Some(match i.code() {
        Fldenv_m14byte | Fnstenv_m14byte | Fstenv_m14byte => 14,
        Fldenv_m28byte | Fnstenv_m28byte | Fstenv_m28byte => 28,
        Frstor_m94byte | Fnsave_m94byte | Fsave_m94byte => 94,
        Frstor_m108byte | Fnsave_m108byte | Fsave_m108byte => 108,
        _ => return None,
    })
}

/// Instructions that read or set MXCSR: floating-point arithmetic, comparison and conversion.
fn needs_mxcsr(i: &Instruction) -> bool {
    let name = format!("{:?}", i.mnemonic()).to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    if name.starts_with('p') || name.starts_with("mov") || is_x87(i) {
        return false;
    }
    if name.starts_with("cvt") || name.starts_with("fm") || name.starts_with("fnm") {
        return true;
    }
    let arithmetic = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comis", "ucomis", "round", "dpp", "hadd", "hsub",
        "addsub", "rcp", "rsqrt",
    ];
    let typed = ["ps", "pd", "ss", "sd"].iter().any(|s| name.ends_with(s));
    typed && arithmetic.iter().any(|a| name.starts_with(a))
}

/// Legacy 16-byte memory operands that need no alignment. SDM 1 table 14-22 and the instructions' own pages.
fn tolerates_misalignment(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
    )
}
/// VEX instructions that do need it.
fn demands_alignment(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
    )
}

/// VZEROUPPER, VZEROALL (`ALL`).
fn zero_upper<const ALL: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.check_avx()?;
    let count = if cpu.long64() { 16 } else { 8 };
    cpu.fpu.image[at::YMM_HIGH..at::YMM_HIGH + 16 * count].fill(0);
    if ALL {
        cpu.fpu.image[at::XMM..at::XMM + 16 * count].fill(0);
    }
    Ok(())
}

/// A VEX-encoded vector instruction may run: not in real or virtual-8086 mode.
pub(crate) fn check_avx_mode(cpu: &mut Cpu) -> Flow {
    if cpu.protected() { cpu.check_avx() } else { cpu.undefined() }
}

fn check_class(cpu: &mut Cpu, op: &Op) -> Flow {
    match op.dst {
        class::SSE => cpu.check_sse()?,
        class::AVX => check_avx_mode(cpu)?,
        class::X87 => cpu.check_x87(false)?,
        class::MMX => cpu.check_x87(true)?,
        class::VEX_INTEGER if !cpu.protected() => return cpu.undefined(),
        _ => {}
    }
    if op.src & trait_bits::WAITS != 0 { cpu.check_x87_pending() } else { Ok(()) }
}

/// Executes the thunk at `op.imm`.
fn run_thunk(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    check_class(cpu, op)?;
    let bytes = op.extra as usize;
    let mut va = 0;
    if bytes != 0 {
        let writes = op.src & trait_bits::WRITES != 0;
        va = cpu.ea(op, bytes as u64, writes)?;
        if op.src & trait_bits::ALIGNED != 0 && va & (bytes as u64 - 1) != 0 {
            return cpu.gp(0);
        }
        if bytes > 8 && cpu.check_canonical(va, bytes as u64).is_err() {
            return cpu.raise_code(if op.seg == crate::cpu::STACK_SEG { 12 } else { 13 }, 0);
        }
        if writes {
            cpu.probe_write_quick(va, bytes as u64)?;
        }
        if op.src & trait_bits::READS != 0 {
            let mut buffer = [0u8; SCRATCH_BYTES];
            cpu.read_block(io, va, &mut buffer[..bytes])?;
            cpu.fpu.scratch[..bytes].copy_from_slice(&buffer[..bytes]);
        }
    }
    if op.src & trait_bits::FLOAT != 0 {
        run_float(cpu, op)?;
    } else {
        execute(cpu, op);
    }
    if matches!(op.dst, class::X87 | class::MMX) {
        // The host's instruction and data pointers say nothing about the guest.
        cpu.fpu.image[6..24].fill(0);
    }
    if op.src & trait_bits::WRITES != 0 {
        if op.src & trait_bits::ENVIRONMENT != 0 {
            let pointers = if matches!(bytes, 14 | 94) { 6..14 } else { 12..28 };
            cpu.fpu.scratch[pointers].fill(0);
        }
        let buffer = cpu.fpu.scratch;
        cpu.write_block(io, va, &buffer[..bytes])?;
        return cpu.settle();
    }
    Ok(())
}

fn execute(cpu: &mut Cpu, op: &Op) {
    if op.src & trait_bits::FLAGS != 0 {
        cpu.fpu.flags = cpu.flags as u64;
        code::call(op.imm, &mut cpu.fpu, &mut cpu.gpr);
        cpu.flags = cpu.fpu.flags as u16;
    } else {
        code::call(op.imm, &mut cpu.fpu, &mut cpu.gpr);
    }
}

/// With the working MXCSR in place: where MMX registers take part it travels in the image.
fn execute_float(cpu: &mut Cpu, op: &Op) {
    if op.dst != class::MMX {
        return execute(cpu, op);
    }
    let work = cpu.fpu.work_mxcsr;
    cpu.fpu.set_mxcsr(work);
    execute(cpu, op);
    cpu.fpu.work_mxcsr = cpu.fpu.mxcsr();
}

/// Exception flags of MXCSR; the masks are seven bits further up.
const EXCEPTIONS: u32 = 0x3f;
const UNDERFLOW: u32 = 1 << 4;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// A floating-point instruction: run with all exceptions masked, then see which the guest wanted to hear of.
fn run_float(cpu: &mut Cpu, op: &Op) -> Flow {
    let guest = cpu.fpu.mxcsr();
    cpu.fpu.work_mxcsr = guest & !EXCEPTIONS | EXCEPTIONS << 7;
    let unmasked = !(guest >> 7) & EXCEPTIONS;
    if unmasked == 0 {
        execute_float(cpu, op);
        cpu.fpu.set_mxcsr(guest | cpu.fpu.work_mxcsr & EXCEPTIONS);
        return Ok(());
    }
    let saved = (cpu.fpu.image, cpu.gpr, cpu.flags);
    let mut tiny = 0;
    if unmasked & UNDERFLOW != 0 {
        // Masked, an exact tiny result raises nothing; unmasked it does. Flushing tiny results to zero tells them apart.
        let work = cpu.fpu.work_mxcsr;
        cpu.fpu.work_mxcsr |= FLUSH_TO_ZERO;
        execute_float(cpu, op);
        tiny = cpu.fpu.work_mxcsr & UNDERFLOW;
        (cpu.fpu.image, cpu.gpr, cpu.flags) = saved;
        cpu.fpu.work_mxcsr = work;
    }
    execute_float(cpu, op);
    let raised = cpu.fpu.work_mxcsr & EXCEPTIONS | tiny;
    if raised & unmasked == 0 {
        cpu.fpu.set_mxcsr(guest | raised);
        return Ok(());
    }
    (cpu.fpu.image, cpu.gpr, cpu.flags) = saved;
    // Exceptions found before the operation (invalid, denormal, divide by zero) keep the later ones from being found.
    let before = raised & unmasked & 7;
    let reported = if before != 0 { raised & 7 } else { raised };
    cpu.fpu.set_mxcsr(guest | reported);
    if cpu.cr4 & 1 << 10 != 0 { cpu.raise::<()>(19) } else { Err::<(), Stop>(cpu.undefined::<()>().unwrap_err()) }
}
