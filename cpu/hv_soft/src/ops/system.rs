//! Instructions of the operating system: control registers, tables, MSRs, ports, time, identification.

use x86::{Segment, Table};

use crate::alu::ZF;
use crate::cpu::{Cpu, Flow, Io, Op, RAX, RBX, RCX, RDX, Stop, attention, cr, rf};
use crate::mmu::GuestWord;
use crate::ops::arith::source;
use crate::segment::{canonical, is_null};

impl Cpu {
    /// #GP(0) unless at ring 0.
    #[inline(always)]
    pub(crate) fn privileged(&mut self) -> Flow {
        if self.cpl == 0 { Ok(()) } else { self.gp(0) }
    }

    /// #GP(0) where UMIP hides system state from user code.
    fn umip(&mut self) -> Flow {
        if self.cr4 & cr::UMIP != 0 && self.cpl != 0 { self.gp(0) } else { Ok(()) }
    }

    /// CR0. SDM 3A 2.5, 4.1.
    fn write_cr0(&mut self, value: u64) -> Flow {
        let value = value & 0xe005_003f | 0x10;
        let (nw, cd) = (value & 1 << 29 != 0, value & 1 << 30 != 0);
        let bad = value & cr::PG != 0 && value & cr::PE == 0 || nw && !cd;
        if bad {
            return self.gp(0);
        }
        let turns_paging = (value ^ self.cr0) & cr::PG != 0;
        if turns_paging && value & cr::PG != 0 {
            if self.efer & cr::LME != 0 {
                if self.cr4 & cr::PAE == 0 || self.seg[crate::cpu::CS].long() {
                    return self.gp(0);
                }
                self.efer |= cr::LMA;
            } else if self.cr4 & cr::PAE != 0 && !self.load_pdptes(self.cr3) {
                return self.gp(0);
            }
        }
        if turns_paging && value & cr::PG == 0 {
            if self.long64() {
                return self.gp(0);
            }
            self.efer &= !cr::LMA;
        }
        if (value ^ self.cr0) & (cr::PG | cr::WP | cr::PE) != 0 {
            self.tlb.flush_all();
        }
        self.cr0 = value;
        self.update_mode();
        Err(Stop::Next)
    }

    fn write_cr3(&mut self, value: u64) -> Flow {
        let mut value = value;
        if self.long_mode() {
            // Bit 63 asks to keep translations, which is a permission, not an order.
            value &= !(1 << 63);
            if value >> crate::mmu::PHYS_BITS != 0 {
                return self.gp(0);
            }
        } else if self.cr0 & cr::PG != 0 && self.cr4 & cr::PAE != 0 && !self.load_pdptes(value) {
            return self.gp(0);
        }
        self.cr3 = value;
        self.tlb.flush_local();
        Err(Stop::Next)
    }

    fn write_cr4(&mut self, value: u64) -> Flow {
        let known = 0x7
            | cr::DE
            | cr::PSE
            | cr::PAE
            | 1 << 6
            | cr::PGE
            | cr::PCE
            | cr::OSFXSR
            | 1 << 10
            | cr::UMIP
            | cr::FSGSBASE
            | cr::OSXSAVE
            | cr::SMEP
            | cr::SMAP;
        let drops_pae = self.long_mode() && value & cr::PAE == 0;
        if value & !known != 0 || drops_pae {
            return self.gp(0);
        }
        // VME and PVI are not offered by CPUID.
        if value & 3 != 0 {
            return self.gp(0);
        }
        let changed = value ^ self.cr4;
        if changed & cr::PAE != 0
            && self.cr0 & cr::PG != 0
            && !self.long_mode()
            && value & cr::PAE != 0
            && !self.load_pdptes(self.cr3)
        {
            return self.gp(0);
        }
        if changed & (cr::PSE | cr::PAE | cr::PGE | cr::SMEP | cr::SMAP) != 0 {
            self.tlb.flush_all();
        }
        self.cr4 = value;
        self.update_mode();
        Err(Stop::Next)
    }
}

/// MOV to CRn; `op.extra` is n.
pub(crate) fn mov_to_cr(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    let value = if cpu.long64() { cpu.gpr[op.src as usize & 15] } else { cpu.gpr[op.src as usize & 15] & 0xffff_ffff };
    match op.extra {
        0 if value >> 32 != 0 => cpu.gp(0),
        0 => cpu.write_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        8 if value & !15 != 0 => cpu.gp(0),
        8 => {
            cpu.lapic.set_cr8(value);
            cpu.update_interrupt();
            Err(Stop::Next)
        }
        _ => cpu.undefined(),
    }
}
/// MOV from CRn.
pub(crate) fn mov_from_cr(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    let value = match op.extra {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.lapic.cr8(),
        _ => return cpu.undefined(),
    };
    cpu.gpr[op.dst as usize & 15] = if cpu.long64() { value } else { value & 0xffff_ffff };
    Ok(())
}

/// Register of a DR number: DR4 and DR5 are DR6 and DR7 unless CR4.DE.
fn debug_register(cpu: &mut Cpu, number: u8) -> Result<usize, Stop> {
    match number {
        0..=3 => Ok(number as usize),
        6 | 7 => Ok(number as usize - 2),
        4 | 5 if cpu.cr4 & cr::DE == 0 => Ok(number as usize),
        _ => cpu.undefined(),
    }
}
/// MOV to DRn.
pub(crate) fn mov_to_dr(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let index = debug_register(cpu, op.extra)?;
    cpu.privileged()?;
    let value = cpu.gpr[op.src as usize & 15];
    if index >= 4 && value >> 32 != 0 {
        return cpu.gp(0);
    }
    match index {
        4 => cpu.dr[4] = value & 0xe00f | 0xffff_0ff0,
        5 => {
            if value & 0xff != 0 {
                return cpu.give_up("hardware breakpoints (DR7 with an enabled condition) are not implemented");
            }
            cpu.dr[5] = value & 0xffff_2bff | 0x400;
        }
        _ => cpu.dr[index] = value,
    }
    Ok(())
}
/// MOV from DRn.
pub(crate) fn mov_from_dr(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let index = debug_register(cpu, op.extra)?;
    cpu.privileged()?;
    cpu.gpr[op.dst as usize & 15] = cpu.dr[index];
    Ok(())
}

pub(crate) fn clts(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    cpu.cr0 &= !cr::TS;
    Ok(())
}
/// SMSW to a register of `T`.
pub(crate) fn smsw<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.umip()?;
    cpu.set(op.dst, T::from_u64(cpu.cr0));
    Ok(())
}
pub(crate) fn smsw_mem(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.umip()?;
    let va = cpu.ea(op, 2, true)?;
    cpu.store(io, va, cpu.cr0 as u16)
}
/// LMSW: sets PE, MP, EM, TS; never clears PE.
pub(crate) fn lmsw<const MEM: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.privileged()?;
    let word = source::<u16>(cpu, op, io, MEM)? as u64;
    let value = cpu.cr0 & !0xe | word & 0xf;
    cpu.write_cr0(value)
}

/// LGDT, LIDT (`IDT`).
pub(crate) fn load_table<const IDT: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.privileged()?;
    let bytes = if cpu.long64() { 10 } else { 6 };
    let va = cpu.ea(op, bytes, false)?;
    let limit = cpu.load::<u16>(io, va)?;
    let base = if cpu.long64() {
        cpu.load::<u64>(io, va.wrapping_add(2))?
    } else {
        let base = cpu.load::<u32>(io, va.wrapping_add(2))? as u64;
        if op.kind & crate::cpu::addr::OPERAND32 != 0 { base } else { base & 0xff_ffff }
    };
    if cpu.long64() && !canonical(base) {
        return cpu.gp(0);
    }
    let table = Table { base, limit };
    if IDT {
        cpu.idtr = table;
    } else {
        cpu.gdtr = table;
    }
    Ok(())
}
/// SGDT, SIDT.
pub(crate) fn store_table<const IDT: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.umip()?;
    let table = if IDT { cpu.idtr } else { cpu.gdtr };
    let bytes = if cpu.long64() { 10 } else { 6 };
    let va = cpu.ea(op, bytes, true)?;
    cpu.probe_write(va, bytes)?;
    cpu.store_then(io, va, table.limit)?;
    if cpu.long64() {
        cpu.store_then(io, va.wrapping_add(2), table.base)?;
    } else {
        cpu.store_then(io, va.wrapping_add(2), table.base as u32)?;
    }
    cpu.settle()
}

/// LLDT.
pub(crate) fn lldt<const MEM: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    cpu.privileged()?;
    let selector = source::<u16>(cpu, op, io, MEM)?;
    if is_null(selector) {
        cpu.ldtr = Segment { selector, attributes: Segment::UNUSABLE, ..Segment::default() };
        return Ok(());
    }
    let error = selector as u32 & !3;
    if selector & 4 != 0 {
        return cpu.gp(error);
    }
    let d = cpu.descriptor(io, selector, 13)?;
    if d.is_segment() || d.kind() != 2 {
        return cpu.gp(error);
    }
    if !d.present() {
        return cpu.raise_code(11, error);
    }
    let high = if cpu.long_mode() { cpu.descriptor_high(io, selector, d)? & 0xffff_ffff } else { 0 };
    let mut segment = d.segment(selector);
    segment.base |= high << 32;
    cpu.ldtr = segment;
    Ok(())
}
/// LTR: the descriptor becomes busy.
pub(crate) fn ltr<const MEM: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    cpu.privileged()?;
    let selector = source::<u16>(cpu, op, io, MEM)?;
    let error = selector as u32 & !3;
    if is_null(selector) || selector & 4 != 0 {
        return cpu.gp(error);
    }
    let d = cpu.descriptor(io, selector, 13)?;
    let available = d.kind() == 9 || d.kind() == 1 && !cpu.long_mode();
    if d.is_segment() || !available {
        return cpu.gp(error);
    }
    if !d.present() {
        return cpu.raise_code(11, error);
    }
    let high = if cpu.long_mode() { cpu.descriptor_high(io, selector, d)? & 0xffff_ffff } else { 0 };
    cpu.store_sys(io, d.at.wrapping_add(5), d.raw >> 40 & 0xff | 2, 1)?;
    let mut segment = d.segment(selector);
    segment.base |= high << 32;
    segment.attributes |= 2;
    cpu.tr = segment;
    cpu.settle()
}
/// SLDT, STR (`TASK`) to a register of `T`.
pub(crate) fn store_selector<const TASK: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    cpu.umip()?;
    let selector = if TASK { cpu.tr.selector } else { cpu.ldtr.selector };
    cpu.set(op.dst, T::from_u64(selector as u64));
    Ok(())
}
pub(crate) fn store_selector_mem<const TASK: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    cpu.umip()?;
    let va = cpu.ea(op, 2, true)?;
    cpu.store(io, va, if TASK { cpu.tr.selector } else { cpu.ldtr.selector })
}

pub(crate) const LAR: u8 = 0;
pub(crate) const LSL: u8 = 1;
pub(crate) const VERR: u8 = 2;
pub(crate) const VERW: u8 = 3;
/// LAR, LSL, VERR, VERW: ask about a descriptor without faulting on what it says.
pub(crate) fn inspect<const WHAT: u8, const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    let selector = source::<u16>(cpu, op, io, MEM)?;
    cpu.flags &= !ZF;
    if is_null(selector) {
        return Ok(());
    }
    let d = match cpu.descriptor(io, selector, 13) {
        Ok(d) => d,
        Err(Stop::Fault) if cpu.fault.vector == 13 => return Ok(()),
        Err(stop) => return Err(stop),
    };
    let visible = d.is_code() && d.conforming() || d.dpl() >= cpu.cpl.max((selector & 3) as u8);
    let long = cpu.long_mode();
    let suits = match WHAT {
        LAR if !d.is_segment() => match d.kind() {
            2 | 9 | 11 | 12 => true,
            1 | 3 | 4 | 5 => !long,
            _ => false,
        },
        LSL if !d.is_segment() => match d.kind() {
            2 | 9 | 11 => true,
            1 | 3 => !long,
            _ => false,
        },
        VERR => d.is_segment() && (!d.is_code() || d.kind() & 2 != 0),
        VERW => d.is_segment() && !d.is_code() && d.kind() & 2 != 0,
        _ => true,
    };
    if !visible || !suits {
        return Ok(());
    }
    cpu.flags |= ZF;
    match WHAT {
        LAR => cpu.set(op.dst, T::from_u64(d.raw >> 32 & 0x00f0_ff00)),
        LSL => cpu.set(op.dst, T::from_u64(d.limit() as u64)),
        _ => {}
    }
    Ok(())
}
/// ARPL.
pub(crate) fn arpl<const MEM: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if !cpu.protected() {
        return cpu.undefined();
    }
    let rpl = cpu.get::<u16>(op.src) & 3;
    let va = if MEM { cpu.ea(op, 2, false)? } else { 0 };
    let old = if MEM { cpu.load::<u16>(io, va)? } else { cpu.get::<u16>(op.dst) };
    let lower = old & 3 < rpl;
    // Memory that keeps its value is not written, and may be read-only.
    match (lower, MEM) {
        (true, true) => cpu.store_then(io, va, old & !3 | rpl)?,
        (true, false) => cpu.set(op.dst, old & !3 | rpl),
        (false, _) => {}
    }
    cpu.flags = cpu.flags & !ZF | if lower { ZF } else { 0 };
    cpu.settle()
}

pub(crate) fn invlpg(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    let offset = cpu.offset(op);
    let va = match op.kind & crate::cpu::addr::MODE {
        crate::cpu::addr::LONG => offset.wrapping_add(cpu.seg_base[op.seg as usize & 7]),
        crate::cpu::addr::SEGMENTED => cpu.seg[op.seg as usize % 6].base.wrapping_add(cpu.wrap_offset(op, offset)),
        _ => offset & 0xffff_ffff,
    };
    cpu.tlb.flush_page(va);
    Err(Stop::Next)
}
/// INVD, WBINVD: there is no cache to lose or write.
pub(crate) fn wbinvd(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()
}

pub(crate) fn hlt(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    Err(Stop::Halt)
}
pub(crate) fn nop(_: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    Ok(())
}
/// Cache-line instructions read their operand for faults and nothing else.
pub(crate) fn touch(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 1, false)?;
    cpu.load::<u8>(io, va).map(|_| ())
}
pub(crate) fn ud(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.undefined()
}

/// An instruction of more than 15 bytes.
pub(crate) fn too_long(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.gp(0)
}

fn may_change_if(cpu: &mut Cpu) -> Flow {
    let iopl = (cpu.rflags & rf::IOPL) >> 12;
    if cpu.cr0 & cr::PE != 0 && cpu.cpl as u64 > iopl { cpu.gp(0) } else { Ok(()) }
}
pub(crate) fn cli(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    may_change_if(cpu)?;
    cpu.rflags &= !rf::IF;
    cpu.update_interrupt();
    Ok(())
}
/// STI: interrupts stay blocked for one more instruction if they were.
pub(crate) fn sti(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    may_change_if(cpu)?;
    if cpu.rflags & rf::IF == 0 {
        cpu.rflags |= rf::IF;
        cpu.attention |= attention::SHADOW;
        cpu.update_interrupt();
        return Err(Stop::Next);
    }
    Ok(())
}
pub(crate) fn set_df<const ON: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.rflags = cpu.rflags & !rf::DF | if ON { rf::DF } else { 0 };
    Ok(())
}
/// CLC (0), STC (1), CMC (2).
pub(crate) fn carry<const WHAT: u8>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    use crate::alu::CF;
    match WHAT {
        0 => cpu.flags &= !CF,
        1 => cpu.flags |= CF,
        _ => cpu.flags ^= CF,
    }
    Ok(())
}
/// CLAC, STAC (`SET`).
pub(crate) fn access_flag<const SET: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cpl != 0 {
        return cpu.undefined();
    }
    cpu.rflags = cpu.rflags & !rf::AC | if SET { rf::AC } else { 0 };
    cpu.update_mode();
    Ok(())
}

/// IN; the port is `op.imm` or DX (`op.extra` 1).
pub(crate) fn port_in<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let port = if op.extra != 0 { cpu.gpr[RDX] as u16 } else { op.imm as u16 };
    cpu.check_io(io, port, T::BYTES as u8)?;
    let value = io.port_read(port, T::BYTES as u8);
    cpu.set(RAX as u8, T::from_u64(value as u64));
    Ok(())
}
/// OUT. The block ends: the machine may have been reset or stopped by it.
pub(crate) fn port_out<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let port = if op.extra != 0 { cpu.gpr[RDX] as u16 } else { op.imm as u16 };
    cpu.check_io(io, port, T::BYTES as u8)?;
    io.port_write(port, T::BYTES as u8, cpu.get::<T>(RAX as u8).to_u64() as u32);
    Err(Stop::Next)
}

/// CPUID, with the words that depend on control registers filled in.
pub(crate) fn cpuid(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let (leaf, subleaf) = (cpu.gpr[RAX] as u32, cpu.gpr[RCX] as u32);
    let max = |base: u32| cpu.cpuid.get(base, 0).map_or(0, |l| l.eax);
    let known = match leaf >> 28 {
        0 => leaf <= max(0),
        4 => leaf <= max(0x4000_0000),
        _ => leaf <= max(0x8000_0000) && leaf >> 28 == 8,
    };
    // Beyond the highest basic leaf Intel processors answer with that leaf; zeroes are what AMD's give and are safer.
    let mut words = match cpu.cpuid.get(leaf, subleaf) {
        Some(l) if known => [l.eax, l.ebx, l.ecx, l.edx],
        _ => [0; 4],
    };
    match (leaf, subleaf) {
        (1, _) => {
            if cpu.cr4 & cr::OSXSAVE != 0 {
                words[2] |= 1 << 27;
            }
            if !cpu.lapic.enabled() {
                words[3] &= !(1 << 9);
            }
        }
        (0xb, _) => words[2] |= subleaf & 0xff,
        (0xd, 0) => words[1] = if cpu.xcr0 & 4 != 0 { 832 } else { 576 },
        (0xd, 1) => words[1] = if cpu.xcr0 & 4 != 0 { 832 } else { 576 },
        _ => {}
    }
    for (reg, word) in [RAX, RBX, RCX, RDX].into_iter().zip(words) {
        cpu.gpr[reg] = word as u64;
    }
    Ok(())
}

fn set_pair(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}
fn pair(cpu: &Cpu) -> u64 {
    cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff
}
/// RDTSC, RDTSCP (`AUX`).
pub(crate) fn rdtsc<const AUX: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cr4 & cr::TSD != 0 && cpu.cpl != 0 {
        return cpu.gp(0);
    }
    let tsc = cpu.tsc();
    set_pair(cpu, tsc);
    if AUX {
        cpu.gpr[RCX] = cpu.msrs.tsc_aux & 0xffff_ffff;
    }
    // Virtual time moves from block to block, and no two reads may give the same. SDM 3B 17.17.
    if cpu.clock.is_virtual() { Err(Stop::Next) } else { Ok(()) }
}
pub(crate) fn rdpid(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.gpr[op.dst as usize & 15] = cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}
pub(crate) fn rdmsr(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.privileged()?;
    match cpu.read_msr(cpu.gpr[RCX] as u32) {
        Some(value) => {
            set_pair(cpu, value);
            Ok(())
        }
        None => cpu.gp(0),
    }
}
pub(crate) fn wrmsr(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    cpu.privileged()?;
    let value = pair(cpu);
    cpu.write_msr(io, cpu.gpr[RCX] as u32, value)?;
    Err(Stop::Next)
}
/// RDPMC: no counters.
pub(crate) fn rdpmc(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.gp(0)
}
pub(crate) fn xgetbv(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cr4 & cr::OSXSAVE == 0 {
        return cpu.undefined();
    }
    if cpu.gpr[RCX] as u32 > 1 {
        return cpu.gp(0);
    }
    // With ECX = 1, the components in use: all that are enabled.
    set_pair(cpu, cpu.xcr0);
    Ok(())
}
pub(crate) fn xsetbv(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    let value = pair(cpu);
    cpu.xsetbv(cpu.gpr[RCX] as u32, value)
}

pub(crate) fn swapgs(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if !cpu.long64() {
        return cpu.undefined();
    }
    cpu.privileged()?;
    let base = cpu.seg[crate::cpu::GS].base;
    cpu.set_segment_base(crate::cpu::GS, cpu.msrs.kernel_gs_base);
    cpu.msrs.kernel_gs_base = base;
    Ok(())
}
/// RDFSBASE, RDGSBASE; `op.extra` is the segment.
pub(crate) fn read_base<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if !cpu.long64() || cpu.cr4 & cr::FSGSBASE == 0 {
        return cpu.undefined();
    }
    cpu.set(op.dst, T::from_u64(cpu.seg[op.extra as usize % 6].base));
    Ok(())
}
/// WRFSBASE, WRGSBASE.
pub(crate) fn write_base<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if !cpu.long64() || cpu.cr4 & cr::FSGSBASE == 0 {
        return cpu.undefined();
    }
    let base = cpu.get::<T>(op.src).to_u64();
    if !canonical(base) {
        return cpu.gp(0);
    }
    cpu.set_segment_base(op.extra as usize % 6, base);
    Ok(())
}

/// RDRAND, RDSEED. Under the virtual clock the numbers repeat from run to run, as everything does.
pub(crate) fn random<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let value = if cpu.clock.is_virtual() { cpu.next_repeatable() } else { host_random() };
    cpu.flags = crate::alu::CF;
    cpu.set(op.dst, T::from_u64(value));
    Ok(())
}
impl Cpu {
    /// SplitMix64.
    fn next_repeatable(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
/// Eight random bytes of the kernel.
fn host_random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is ours and eight bytes long; a short or failed read leaves zeroes, which is checked.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(got, 8, "the kernel's random number generator is never interrupted for eight bytes");
    u64::from_ne_bytes(bytes)
}

pub(crate) const FXSAVE: u8 = 0;
pub(crate) const FXRSTOR: u8 = 1;
pub(crate) const XSAVE: u8 = 2;
pub(crate) const XRSTOR: u8 = 3;
pub(crate) const LDMXCSR: u8 = 4;
pub(crate) const STMXCSR: u8 = 5;
/// Vector state to and from memory.
pub(crate) fn vector_state<const WHAT: u8>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let bytes = match WHAT {
        FXSAVE | FXRSTOR => 512,
        XSAVE | XRSTOR => 576,
        _ => 4,
    };
    let va = cpu.ea(op, bytes, matches!(WHAT, FXSAVE | XSAVE | STMXCSR))?;
    match WHAT {
        FXSAVE => cpu.fxsave(io, va, op.kind & crate::cpu::addr::OPERAND64 != 0),
        FXRSTOR => cpu.fxrstor(io, va),
        XSAVE => cpu.xsave(io, va),
        XRSTOR => cpu.xrstor(io, va),
        LDMXCSR => {
            cpu.check_sse()?;
            let value = cpu.load::<u32>(io, va)?;
            if value & !crate::fpu::MXCSR_MASK != 0 {
                return cpu.gp(0);
            }
            cpu.fpu.set_mxcsr(value);
            Ok(())
        }
        _ => {
            cpu.check_sse()?;
            cpu.store(io, va, cpu.fpu.mxcsr())
        }
    }
}
/// FNINIT, EMMS and the like live in the native thunks; FWAIT is only a check.
pub(crate) fn fwait(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cr0 & (cr::MP | cr::TS) == cr::MP | cr::TS {
        return cpu.raise(7);
    }
    cpu.check_x87_pending()
}
