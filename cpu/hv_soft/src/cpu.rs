//! The running state of one software vCPU and what every instruction handler works on.

use std::sync::Arc;

use guest_ram::GuestRam;
use hv_core::{Clock, VcpuIo};
use x86::{CpuidTable, Segment, Table};

use crate::alu::{self, Flags};
use crate::code_map::CodeMap;
use crate::fpu::Fpu;
use crate::lapic::Lapic;
use crate::mailbox::Mailbox;
use crate::mmu::Tlb;
use crate::msrs::Msrs;

/// The machine's answers to port and memory accesses.
pub(crate) type Io<'a> = &'a dyn VcpuIo;

/// Why the rest of a block is not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stop {
    /// The instruction set `cpu.rip`.
    Branch,
    /// The instruction is complete, execution goes on behind it, but this block must be left: a mode, a mapping or the
    /// code itself may have changed.
    Next,
    /// `cpu.fault` holds an exception; the instruction has changed nothing (or, a string instruction, has stopped
    /// between two elements).
    Fault,
    /// The instruction made progress and is to be executed again (a string instruction between two pages).
    Again,
    /// HLT: go on behind it after an interrupt.
    Halt,
    /// INT n: `cpu.fault` holds the vector, the saved address is that of the next instruction.
    SoftInt,
    /// `cpu.fault` holds a trap: the instruction is complete, the saved address is that of the next one.
    Trap,
    /// The engine cannot execute this; `cpu.cannot` says what.
    Cannot,
}

/// What a handler returns: go on with the next operation, or not.
pub(crate) type Flow = Result<(), Stop>;

/// Executes one operation.
pub(crate) type Handler = fn(&mut Cpu, &Op, Io<'_>) -> Flow;

/// One decoded instruction. 32 bytes, so that two share a cache line.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub run: Handler,
    /// Immediate operand, branch target relative to the block, or index of a native thunk.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i32,
    /// Offset of the next instruction from the start of the block.
    pub next: u16,
    /// Length of this instruction.
    pub len: u8,
    /// Destination register ([`Cpu::gpr`] index; bits 7:4 are a shift count for 8-bit registers).
    pub dst: u8,
    /// Source register, likewise.
    pub src: u8,
    /// Base register of the memory operand, [`ZERO`] or [`BLOCK_RIP`].
    pub base: u8,
    /// Index register of the memory operand or [`ZERO`].
    pub index: u8,
    /// Shift count of the index.
    pub scale: u8,
    /// Segment of the memory operand; [`NO_SEG`] where its base is known to be 0.
    pub seg: u8,
    /// [`addr`] mode in bits 1:0 and flags above.
    pub kind: u8,
    /// Per handler: a condition, a width, a shift count.
    pub extra: u8,
}

/// Values of [`Op::kind`].
pub(crate) mod addr {
    /// 64-bit address; segment bases only of FS and GS.
    pub const LONG: u8 = 0;
    /// 32-bit address in 64-bit mode.
    pub const LONG32: u8 = 1;
    /// 32-bit address, all of ES, SS, DS flat.
    pub const FLAT: u8 = 2;
    /// Segmented: base, limit and access rights are checked.
    pub const SEGMENTED: u8 = 3;
    pub const MODE: u8 = 3;
    /// The offset is 16 bits wide.
    pub const OFFSET16: u8 = 1 << 2;
    /// REP, REPE.
    pub const REP: u8 = 1 << 3;
    /// REPNE.
    pub const REPNE: u8 = 1 << 4;
    /// LOCK.
    pub const LOCK: u8 = 1 << 5;
    /// 32-bit operand size (else 16), for handlers that need it at run time.
    pub const OPERAND32: u8 = 1 << 6;
    /// 64-bit operand size.
    pub const OPERAND64: u8 = 1 << 7;
}

/// Index of the register that is always 0.
pub(crate) const ZERO: u8 = 16;
/// Index of the register that holds the instruction pointer of the block's first byte.
pub(crate) const BLOCK_RIP: u8 = 17;
/// Segment number whose base is always 0.
pub(crate) const NO_SEG: u8 = 7;

/// The stack segment in 64-bit mode: base 0 too, but a non-canonical address raises #SS.
pub(crate) const STACK_SEG: u8 = 6;

/// Segment numbers, in the order of the encoding.
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const DS: usize = 3;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;

pub(crate) use x86::gpr::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};

/// Bits of RFLAGS that are not status flags.
pub(crate) mod rf {
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
}
/// Bits of CR0, CR4 and EFER that the interpreter looks at.
pub(crate) mod cr {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const PG: u64 = 1 << 31;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// An exception about to be delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
}

/// Work for the run loop, checked once per block; vCPU-local.
pub(crate) mod attention {
    /// A code page was written, `CodeMap::hits` says where.
    pub const CODE: u32 = 1;
    /// An interrupt can be delivered now.
    pub const INTERRUPT: u32 = 2;
    /// TF is set: one instruction at a time.
    pub const STEP: u32 = 4;
    /// Interrupts are blocked for one instruction.
    pub const SHADOW: u32 = 8;
    /// So are debug traps: after MOV SS and POP SS.
    pub const TRAP_SHADOW: u32 = 16;
}

/// How instructions are decoded and addresses formed; part of a block's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Mode {
    /// 16, 32 or 64.
    pub bits: u8,
    /// ES, SS, DS are 32-bit flat and writable, CS is flat.
    pub flat: bool,
    /// The stack pointer is 32 bits wide (in 64-bit mode: unused).
    pub stack32: bool,
}

impl Mode {
    /// A small number, different for different modes.
    pub fn key(self) -> u8 {
        (self.bits >> 4) | (self.flat as u8) << 3 | (self.stack32 as u8) << 4
    }
}

/// Where pushes go, decided at every mode change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StackKind {
    Long,
    Flat32,
    Segmented,
}

/// One software vCPU.
pub(crate) struct Cpu {
    /// 0-15 architectural, [`ZERO`], [`BLOCK_RIP`]; a power of two so that a masked index needs no bounds check.
    pub gpr: [u64; 32],
    pub flags: Flags,
    /// RFLAGS without its status bits.
    pub rflags: u64,
    pub rip: u64,
    pub cpl: u8,
    pub mode: Mode,
    pub stack: StackKind,
    /// What [`Cpu::ea`] adds per segment: 0 for ES, CS, SS, DS in 64-bit mode and for [`NO_SEG`].
    pub seg_base: [u64; 8],
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub efer: u64,
    pub dr: [u64; 6],
    /// PDPTEs of PAE paging, loaded with CR3.
    pub pdpte: [u64; 4],
    pub tlb: Tlb,
    pub fault: Fault,
    /// Exceptions delivered so far: single-stepping asks whether its instruction completed.
    pub faults_delivered: u64,
    /// External interrupts delivered so far.
    pub interrupts: u64,
    pub attention: u32,
    pub halted: bool,
    pub nmi_blocked: bool,
    /// Instructions retired, the running block counted in full.
    pub icount: u64,
    /// Virtual clock: guest time is `icount + clock_skew`, the skew being time slept in HLT.
    pub clock_skew: u64,
    /// The run loop looks at the clock when `icount` reaches this.
    pub look_at_clock: u64,
    pub fpu: Fpu,
    pub msrs: Msrs,
    pub lapic: Lapic,
    pub cpuid: Arc<CpuidTable>,
    pub ram: GuestRam,
    pub clock: Clock,
    pub code_map: CodeMap,
    pub mailbox: Arc<Mailbox>,
    /// What could not be executed ([`Stop::Cannot`]).
    pub cannot: String,
    /// State of the pseudo-random generator behind RDRAND under the virtual clock.
    pub random: u64,
}

impl Cpu {
    /// Reads a register: 8-bit ones carry a shift in bits 7:4 of their number.
    #[inline(always)]
    pub fn get<T: alu::Word>(&self, reg: u8) -> T {
        let value = self.gpr[reg as usize & 31 & if T::BYTES == 1 { 15 } else { 31 }];
        if T::BYTES == 1 { T::from_u64(value >> (reg >> 4)) } else { T::from_u64(value) }
    }

    /// Writes a register: 32-bit writes clear the upper half, narrower ones keep the rest. SDM 1 3.4.1.1.
    #[inline(always)]
    pub fn set<T: alu::Word>(&mut self, reg: u8, value: T) {
        let slot = &mut self.gpr[reg as usize & 15];
        match T::BYTES {
            1 => {
                let shift = reg >> 4;
                *slot = *slot & !(0xff << shift) | value.to_u64() << shift;
            }
            2 => *slot = *slot & !0xffff | value.to_u64(),
            _ => *slot = value.to_u64(),
        }
    }

    /// The whole of RFLAGS.
    pub fn full_rflags(&self) -> u64 {
        self.rflags | alu::to_rflags(self.flags) | 2
    }

    /// Replaces RFLAGS, no permission checked; the run loop looks at the consequences.
    pub fn set_full_rflags(&mut self, value: u64) {
        self.flags = alu::from_rflags(value);
        let old = self.rflags;
        self.rflags = value & !alu::RFLAGS_STATUS & !2;
        if (old ^ self.rflags) & (rf::AC | rf::VM) != 0 {
            self.update_mode();
        }
        self.attention =
            if value & rf::TF != 0 { self.attention | attention::STEP } else { self.attention & !attention::STEP };
        self.update_interrupt();
    }

    /// Recomputes whether an interrupt can be delivered, after IF, the APIC or the PIC's request changed.
    pub fn update_interrupt(&mut self) {
        let wanted = self.mailbox.nmi_pending() && !self.nmi_blocked
            || self.rflags & rf::IF != 0 && (self.lapic.deliverable().is_some() || self.extint_wanted());
        if wanted {
            self.attention |= attention::INTERRUPT;
        } else {
            self.attention &= !attention::INTERRUPT;
        }
    }

    /// The 8259 asks and LINT0 (or a disabled APIC) lets it through.
    pub fn extint_wanted(&self) -> bool {
        self.mailbox.extint() && self.lapic.accepts_extint()
    }

    /// 64-bit mode is active (CS.L in long mode).
    #[inline(always)]
    pub fn long64(&self) -> bool {
        self.mode.bits == 64
    }

    /// Long mode is active, 64-bit or compatibility.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & cr::LMA != 0
    }

    /// Protected mode (not real, not virtual-8086).
    pub fn protected(&self) -> bool {
        self.cr0 & cr::PE != 0 && self.rflags & rf::VM == 0
    }

    /// Derives mode, stack kind, segment bases and the TLB set from the registers they follow from.
    pub fn update_mode(&mut self) {
        let bits = if self.long_mode() && self.seg[CS].long() {
            64
        } else if self.seg[CS].big() {
            32
        } else {
            16
        };
        let stack32 = self.seg[SS].big();
        let flat =
            self.protected() && [ES, SS, DS].iter().all(|&s| flat_data(&self.seg[s])) && flat_code(&self.seg[CS]);
        self.mode = if bits == 64 { Mode { bits, flat: true, stack32: true } } else { Mode { bits, flat, stack32 } };
        self.stack = match (bits, flat, stack32) {
            (64, ..) => StackKind::Long,
            (_, true, true) => StackKind::Flat32,
            _ => StackKind::Segmented,
        };
        for s in [ES, CS, SS, DS] {
            self.seg_base[s] = if bits == 64 { 0 } else { self.seg[s].base };
        }
        for s in [FS, GS] {
            self.seg_base[s] = self.seg[s].base;
        }
        let smap_open = self.cr4 & cr::SMAP == 0 || self.rflags & rf::AC != 0;
        let aligned = self.cr0 & cr::AM != 0 && self.rflags & rf::AC != 0;
        self.tlb.select(self.cpl == 3, smap_open && self.cr4 & cr::SMAP != 0, aligned);
    }

    /// Raises an exception with no error code.
    #[cold]
    pub fn raise<T>(&mut self, vector: u8) -> Result<T, Stop> {
        self.fault = Fault { vector, error: None };
        Err(Stop::Fault)
    }

    /// Raises an exception with an error code.
    #[cold]
    pub fn raise_code<T>(&mut self, vector: u8, error: u32) -> Result<T, Stop> {
        self.fault = Fault { vector, error: Some(error) };
        Err(Stop::Fault)
    }

    /// #UD
    #[cold]
    pub fn undefined<T>(&mut self) -> Result<T, Stop> {
        self.raise(6)
    }

    /// #GP(error)
    #[cold]
    pub fn gp<T>(&mut self, error: u32) -> Result<T, Stop> {
        self.raise_code(13, error)
    }

    /// Gives up: the engine does not implement `what`.
    #[cold]
    pub fn give_up<T>(&mut self, what: impl Into<String>) -> Result<T, Stop> {
        self.cannot = what.into();
        Err(Stop::Cannot)
    }

    /// Guest time in nanoseconds, which is also the TSC before its offset.
    pub fn now_ns(&self) -> u64 {
        if self.clock.is_virtual() {
            let now = self.icount + self.clock_skew;
            self.clock.advance_to(hv_core::GuestNs(now));
            return now;
        }
        self.clock.now().0
    }

    /// The time-stamp counter: 1 GHz, so that ticks are nanoseconds and kvmclock needs no scaling.
    pub fn tsc(&self) -> u64 {
        self.now_ns().wrapping_add(self.msrs.tsc_offset)
    }
}

fn flat_data(seg: &Segment) -> bool {
    // Writable, expand-up data with base 0 and a 4 GiB limit.
    seg.usable()
        && seg.base == 0
        && seg.limit == u32::MAX
        && seg.kind() & 0b1110 == 0b0010
        && seg.attributes & 0x90 == 0x90
}

fn flat_code(seg: &Segment) -> bool {
    seg.base == 0 && seg.limit == u32::MAX
}
