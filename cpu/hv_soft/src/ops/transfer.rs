//! Far transfers, interrupts by instruction, system calls, segment register moves.

use x86::Segment;

use crate::cpu::{CS, Cpu, Fault, Flow, Io, Op, RCX, RSP, SS, Stop, attention, cr, rf};
use crate::mmu::GuestWord;
use crate::segment::canonical;

/// MOV from a segment register to a general register.
pub(crate) fn mov_from_seg<T: GuestWord>(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    let selector = cpu.seg[op.src as usize % 6].selector as u64;
    cpu.set(op.dst, T::from_u64(selector));
    Ok(())
}
/// MOV from a segment register to memory: always 16 bits.
pub(crate) fn store_seg(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 2, true)?;
    cpu.store(io, va, cpu.seg[op.src as usize % 6].selector)
}
/// MOV to a segment register.
pub(crate) fn mov_to_seg<const MEM: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let selector = crate::ops::arith::source::<u16>(cpu, op, io, MEM)?;
    let seg = op.dst as usize % 6;
    cpu.load_segment(io, seg, selector)?;
    if seg == SS {
        cpu.attention |= attention::SHADOW | attention::TRAP_SHADOW;
    }
    Err(Stop::Next)
}
/// LDS, LES, LSS, LFS, LGS: offset of `T`, then selector; `op.extra` is the segment.
pub(crate) fn load_far_pointer<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, T::BYTES + 2, false)?;
    let offset = cpu.load::<T>(io, va)?;
    let selector = cpu.load::<u16>(io, va.wrapping_add(T::BYTES))?;
    cpu.load_segment(io, op.extra as usize % 6, selector)?;
    cpu.set(op.dst, offset);
    Err(Stop::Next)
}

fn far_target<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Result<(u16, u64), Stop> {
    if !MEM {
        return Ok((op.disp as u16, op.imm));
    }
    let va = cpu.ea(op, T::BYTES + 2, false)?;
    let offset = cpu.load::<T>(io, va)?.to_u64();
    Ok((cpu.load::<u16>(io, va.wrapping_add(T::BYTES))?, offset))
}
fn check_target(cpu: &mut Cpu, code: &Segment, rip: u64) -> Flow {
    let long = cpu.long_mode() && code.long();
    if long && !canonical(rip) || !long && rip > code.limit as u64 { cpu.gp(0) } else { Ok(()) }
}

/// Far JMP; the pointer is immediate (selector in `op.disp`, offset in `op.imm`) or in memory.
pub(crate) fn jmp_far<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let (selector, rip) = far_target::<MEM, T>(cpu, op, io)?;
    if !cpu.protected() {
        if rip > cpu.seg[CS].limit as u64 {
            return cpu.gp(0);
        }
        cpu.load_real_segment(CS, selector);
        cpu.rip = rip;
        return Err(Stop::Branch);
    }
    if let Some(gate) = cpu.call_gate(io, selector, true)? {
        return cpu.jump_through(gate);
    }
    let code = cpu.code_segment(io, selector, cpu.cpl, false)?;
    check_target(cpu, &code, rip)?;
    cpu.enter_code(code, cpu.cpl, rip);
    Err(Stop::Branch)
}

/// Far CALL.
pub(crate) fn call_far<const MEM: bool, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let (selector, rip) = far_target::<MEM, T>(cpu, op, io)?;
    let back = cpu.next_rip(op);
    let old_sp = cpu.gpr[RSP];
    let old_cs = cpu.seg[CS].selector;
    let target = if cpu.protected() {
        if let Some(gate) = cpu.call_gate(io, selector, false)? {
            return cpu.call_through(io, gate, back);
        }
        let code = cpu.code_segment(io, selector, cpu.cpl, false)?;
        check_target(cpu, &code, rip)?;
        Some(code)
    } else {
        None
    };
    let pushed = cpu.push(io, T::from_u64(old_cs as u64)).and_then(|()| cpu.push(io, T::from_u64(back)));
    if pushed.is_err() {
        cpu.gpr[RSP] = old_sp;
        return pushed;
    }
    match target {
        Some(code) => cpu.enter_code(code, cpu.cpl, rip),
        None => {
            cpu.load_real_segment(CS, selector);
            cpu.rip = rip;
        }
    }
    Err(Stop::Branch)
}

/// Far RET, to the same or an outer level, releasing `op.imm` bytes.
pub(crate) fn ret_far<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mut sp = cpu.gpr[RSP];
    let rip = cpu.pop_at(io, &mut sp, T::BYTES)?;
    let selector = cpu.pop_at(io, &mut sp, T::BYTES)? as u16;
    if !cpu.protected() {
        if rip > cpu.seg[CS].limit as u64 {
            return cpu.gp(0);
        }
        cpu.gpr[RSP] = cpu.stack_add(sp, op.imm);
        cpu.load_real_segment(CS, selector);
        cpu.rip = rip;
        return Err(Stop::Branch);
    }
    let cpl = (selector & 3) as u8;
    if cpl < cpu.cpl {
        return cpu.gp(selector as u32 & !3);
    }
    let code = cpu.code_segment(io, selector, cpl, true)?;
    check_target(cpu, &code, rip)?;
    if cpl == cpu.cpl {
        cpu.gpr[RSP] = cpu.stack_add(sp, op.imm);
        cpu.enter_code(code, cpl, rip);
        return Err(Stop::Branch);
    }
    sp = cpu.stack_add(sp, op.imm);
    let new_sp = cpu.pop_at(io, &mut sp, T::BYTES)?;
    let ss = cpu.pop_at(io, &mut sp, T::BYTES)? as u16;
    let long = cpu.long_mode() && code.long();
    let ss = cpu.return_stack(io, ss, cpl, long)?;
    cpu.enter_code(code, cpl, rip);
    cpu.seg[SS] = ss;
    cpu.gpr[RSP] = new_sp;
    cpu.gpr[RSP] = cpu.stack_add(cpu.gpr[RSP], op.imm);
    cpu.drop_privileged_segments();
    Err(Stop::Branch)
}

/// IRET with operands of `T`.
pub(crate) fn iret<T: GuestWord>(cpu: &mut Cpu, _: &Op, io: Io<'_>) -> Flow {
    cpu.iret(io, T::BYTES)
}

/// INT n (`op.imm` is the vector). In virtual-8086 mode it needs IOPL 3, which INT3 and INTO do not. SDM 3A 20.2.8.
pub(crate) fn int_n(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if cpu.rflags & rf::VM != 0 && cpu.rflags & rf::IOPL != rf::IOPL {
        return cpu.gp(0);
    }
    int(cpu, op, io)
}
/// INT3 (`op.imm` is the vector): the run loop delivers, with the gate's privilege checked.
pub(crate) fn int(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    cpu.fault = Fault { vector: op.imm as u8, error: None };
    Err(Stop::SoftInt)
}
/// INTO.
pub(crate) fn into(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if cpu.flags & crate::alu::OF == 0 { Ok(()) } else { int(cpu, op, io) }
}
/// BOUND: #BR unless the signed index lies between the two bounds in memory, both included. SDM 2A.
pub(crate) fn bound<T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let va = cpu.ea(op, 2 * T::BYTES, false)?;
    let signed = |value: T| value.to_u64() << (64 - T::BITS);
    let lower = signed(cpu.load::<T>(io, va)?) as i64;
    let upper = signed(cpu.load::<T>(io, va.wrapping_add(T::BYTES))?) as i64;
    let index = signed(cpu.get::<T>(op.dst)) as i64;
    if (lower..=upper).contains(&index) { Ok(()) } else { cpu.raise(5) }
}
/// INT1 (ICEBP): a debug exception, trap class.
pub(crate) fn int1(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    cpu.fault = Fault { vector: 1, error: None };
    Err(Stop::Trap)
}

/// SYSCALL. SDM 2B.
pub(crate) fn syscall(cpu: &mut Cpu, op: &Op, _: Io<'_>) -> Flow {
    if !cpu.long64() || cpu.efer & cr::SCE == 0 {
        return cpu.undefined();
    }
    cpu.gpr[RCX] = cpu.next_rip(op);
    let flags = cpu.full_rflags();
    cpu.gpr[11] = flags & !rf::RF;
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.seg[CS] = flat_code(selector, 0, true);
    cpu.seg[SS] = flat_data(selector.wrapping_add(8), 0);
    cpu.cpl = 0;
    cpu.rip = cpu.msrs.lstar;
    cpu.set_full_rflags(flags & !(cpu.msrs.fmask | rf::RF));
    cpu.update_mode();
    Err(Stop::Branch)
}

/// SYSRET; 64-bit operand size returns to 64-bit code.
pub(crate) fn sysret<const LONG: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if !cpu.long64() || cpu.efer & cr::SCE == 0 {
        return cpu.undefined();
    }
    let rip = if LONG { cpu.gpr[RCX] } else { cpu.gpr[RCX] & 0xffff_ffff };
    if cpu.cpl != 0 || !canonical(rip) {
        return cpu.gp(0);
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let selector = if LONG { base.wrapping_add(16) } else { base } | 3;
    cpu.seg[CS] = flat_code(selector, 3, LONG);
    cpu.seg[SS] = flat_data(base.wrapping_add(8) | 3, 3);
    cpu.cpl = 3;
    cpu.rip = rip;
    let flags = cpu.gpr[11] & 0x3c_7fd7 | 2;
    cpu.set_full_rflags(flags);
    cpu.update_mode();
    Err(Stop::Branch)
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cr0 & cr::PE == 0 || cpu.msrs.sysenter_cs & 0xfffc == 0 {
        return cpu.gp(0);
    }
    let long = cpu.long_mode();
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.seg[CS] = flat_code(selector, 0, long);
    cpu.seg[SS] = flat_data(selector.wrapping_add(8), 0);
    cpu.cpl = 0;
    cpu.rip = cpu.msrs.sysenter_eip & width;
    cpu.gpr[RSP] = cpu.msrs.sysenter_esp & width;
    cpu.set_full_rflags(cpu.full_rflags() & !(rf::VM | rf::IF | rf::RF));
    cpu.update_mode();
    Err(Stop::Branch)
}

/// SYSEXIT.
pub(crate) fn sysexit<const LONG: bool>(cpu: &mut Cpu, _: &Op, _: Io<'_>) -> Flow {
    if cpu.cr0 & cr::PE == 0 || cpu.msrs.sysenter_cs & 0xfffc == 0 || cpu.cpl != 0 {
        return cpu.gp(0);
    }
    let width = if LONG { u64::MAX } else { 0xffff_ffff };
    let (rip, rsp) = (cpu.gpr[crate::cpu::RDX] & width, cpu.gpr[RCX] & width);
    if LONG && !(canonical(rip) && canonical(rsp)) {
        return cpu.gp(0);
    }
    let offset = if LONG { 32 } else { 16 };
    let selector = (cpu.msrs.sysenter_cs as u16).wrapping_add(offset) | 3;
    cpu.seg[CS] = flat_code(selector, 3, LONG);
    cpu.seg[SS] = flat_data(selector.wrapping_add(8), 3);
    cpu.cpl = 3;
    cpu.rip = rip;
    cpu.gpr[RSP] = rsp;
    cpu.update_mode();
    Err(Stop::Branch)
}

/// The code segment that fast system calls assume rather than load.
fn flat_code(selector: u16, dpl: u32, long: bool) -> Segment {
    let size = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, attributes: 0x809b | dpl << 5 | size }
}
fn flat_data(selector: u16, dpl: u32) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes: 0xc093 | dpl << 5 }
}
