//! String instructions: element by element, and page by page where memory is plain.

use crate::alu::ZF;
use crate::cpu::{Cpu, DS, ES, Flow, Handler, Io, Op, RAX, RCX, RDI, RDX, RSI, Stop, addr, rf};
use crate::hostmem;
use crate::mmu::GuestWord;

/// The instructions.
pub(crate) const MOVS: u8 = 0;
pub(crate) const STOS: u8 = 1;
pub(crate) const LODS: u8 = 2;
pub(crate) const CMPS: u8 = 3;
pub(crate) const SCAS: u8 = 4;
pub(crate) const INS: u8 = 5;
pub(crate) const OUTS: u8 = 6;

/// The most elements moved before interrupts are looked at again.
const SLICE: u64 = 1 << 16;

/// The handler of `what` on elements of `bytes`.
pub(crate) fn handler(what: u8, bytes: u64) -> Handler {
    fn pick<T: GuestWord>(what: u8) -> Handler {
        match what {
            MOVS => run::<MOVS, T>,
            STOS => run::<STOS, T>,
            LODS => run::<LODS, T>,
            CMPS => run::<CMPS, T>,
            SCAS => run::<SCAS, T>,
            INS => run::<INS, T>,
            _ => run::<OUTS, T>,
        }
    }
    match bytes {
        1 => pick::<u8>(what),
        2 => pick::<u16>(what),
        4 => pick::<u32>(what),
        _ => pick::<u64>(what),
    }
}

/// The part of an index register that the address size uses.
fn address_mask(op: &Op) -> u64 {
    match op.kind & addr::MODE {
        addr::LONG => u64::MAX,
        _ if op.kind & addr::OFFSET16 != 0 => 0xffff,
        _ => 0xffff_ffff,
    }
}
/// Writes an index register in the width of the address size: 32-bit writes clear the upper half, 16-bit ones keep it.
fn set_index(cpu: &mut Cpu, reg: usize, value: u64, mask: u64) {
    let slot = &mut cpu.gpr[reg];
    *slot = if mask == 0xffff { *slot & !0xffff | value & 0xffff } else { value & mask };
}

fn linear(cpu: &mut Cpu, op: &Op, seg: u8, offset: u64, bytes: u64, write: bool) -> Result<u64, Stop> {
    match op.kind & addr::MODE {
        addr::LONG | addr::LONG32 => {
            Ok(offset.wrapping_add(if seg as usize == ES { 0 } else { cpu.seg_base[seg as usize & 7] }))
        }
        addr::FLAT => Ok(offset),
        _ => cpu.segmented(seg, offset, bytes, write),
    }
}
fn source_seg(op: &Op) -> u8 {
    if op.kind & addr::MODE == addr::SEGMENTED && op.seg > 5 { DS as u8 } else { op.seg }
}

fn run<const WHAT: u8, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if matches!(WHAT, INS | OUTS) {
        // Checked even where nothing is to be transferred.
        cpu.check_io(io, cpu.gpr[RDX] as u16, T::BYTES as u8)?;
    }
    let repeat = op.kind & (addr::REP | addr::REPNE) != 0;
    if !repeat {
        element::<WHAT, T>(cpu, op, io)?;
        return cpu.settle();
    }
    let mask = address_mask(op);
    // A single-step trap comes after each element. SDM 3B 17.3.1.4.
    let stepping = cpu.attention & crate::cpu::attention::STEP != 0;
    let mut budget = if stepping { 1 } else { SLICE };
    loop {
        let count = cpu.gpr[RCX] & mask;
        if count == 0 {
            return cpu.settle();
        }
        if budget == 0 || cpu.attention & crate::cpu::attention::CODE != 0 {
            return Err(Stop::Again);
        }
        let moved = bulk::<WHAT, T>(cpu, op, count.min(budget), mask);
        if moved != 0 {
            budget -= moved;
            set_index(cpu, RCX, count - moved, mask);
            continue;
        }
        element::<WHAT, T>(cpu, op, io)?;
        set_index(cpu, RCX, count - 1, mask);
        budget -= 1;
        let zf = cpu.flags & ZF != 0;
        if matches!(WHAT, CMPS | SCAS) && zf == (op.kind & addr::REPNE != 0) {
            return cpu.settle();
        }
        // A port may have asked for a stop; an interrupt must not wait for a long transfer.
        if matches!(WHAT, INS | OUTS) && cpu.mailbox.events.load(std::sync::atomic::Ordering::Relaxed) != 0 && count > 1
        {
            return Err(Stop::Again);
        }
    }
}

/// One element, index registers moved, RCX not.
fn element<const WHAT: u8, T: GuestWord>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    let mask = address_mask(op);
    let step = if cpu.rflags & rf::DF != 0 { T::BYTES.wrapping_neg() } else { T::BYTES };
    let (si, di) = (cpu.gpr[RSI] & mask, cpu.gpr[RDI] & mask);
    let from = |cpu: &mut Cpu| linear(cpu, op, source_seg(op), si, T::BYTES, false);
    let to = |cpu: &mut Cpu, write: bool| linear(cpu, op, ES as u8, di, T::BYTES, write);
    match WHAT {
        MOVS => {
            let va = from(cpu)?;
            let value = cpu.load::<T>(io, va)?;
            let va = to(cpu, true)?;
            cpu.store_then(io, va, value)?;
        }
        STOS => {
            let va = to(cpu, true)?;
            cpu.store_then(io, va, cpu.get::<T>(RAX as u8))?;
        }
        LODS => {
            let va = from(cpu)?;
            let value = cpu.load::<T>(io, va)?;
            cpu.set(RAX as u8, value);
        }
        CMPS => {
            // The order in which two faults are found is the processor's: destination first.
            let va = to(cpu, false)?;
            let b = cpu.load::<T>(io, va)?;
            let va = from(cpu)?;
            let a = cpu.load::<T>(io, va)?;
            cpu.flags = T::sub(a, b).1;
        }
        SCAS => {
            let va = to(cpu, false)?;
            let b = cpu.load::<T>(io, va)?;
            cpu.flags = T::sub(cpu.get::<T>(RAX as u8), b).1;
        }
        INS => {
            let port = cpu.gpr[RDX] as u16;
            let va = to(cpu, true)?;
            cpu.probe_write(va, T::BYTES)?;
            let value = io.port_read(port, T::BYTES as u8);
            cpu.store_then(io, va, T::from_u64(value as u64))?;
        }
        _ => {
            let port = cpu.gpr[RDX] as u16;
            let va = from(cpu)?;
            let value = cpu.load::<T>(io, va)?;
            io.port_write(port, T::BYTES as u8, value.to_u64() as u32);
        }
    }
    if matches!(WHAT, MOVS | LODS | CMPS | OUTS) {
        set_index(cpu, RSI, si.wrapping_add(step), mask);
    }
    if !matches!(WHAT, LODS | OUTS) {
        set_index(cpu, RDI, di.wrapping_add(step), mask);
    }
    Ok(())
}

/// As many elements of MOVS and STOS as fit into the pages at hand; 0 where the slow way is needed.
fn bulk<const WHAT: u8, T: GuestWord>(cpu: &mut Cpu, op: &Op, count: u64, mask: u64) -> u64 {
    let addressing = op.kind & addr::MODE;
    if !matches!(WHAT, MOVS | STOS) || cpu.rflags & rf::DF != 0 || count < 2 || addressing == addr::SEGMENTED {
        return 0;
    }
    let (si, di) = (cpu.gpr[RSI] & mask, cpu.gpr[RDI] & mask);
    let room = |va: u64| (4096 - (va & 0xfff)) / T::BYTES;
    let mut elements = count.min(room(di));
    let Some(dst) = cpu.host_range(di, true) else { return 0 };
    if WHAT == STOS {
        if elements == 0 {
            return 0;
        }
        hostmem::rep_stos(dst, cpu.get::<T>(RAX as u8).to_u64(), elements as usize, T::BYTES as usize);
    } else {
        let source = if addressing == addr::FLAT { si } else { si.wrapping_add(cpu.seg_base[op.seg as usize & 7]) };
        let Some(src) = cpu.host_range(source, false) else { return 0 };
        elements = elements.min(room(source));
        if elements == 0 {
            return 0;
        }
        hostmem::rep_movs(dst, src, elements as usize, T::BYTES as usize);
        set_index(cpu, RSI, si.wrapping_add(elements * T::BYTES), mask);
    }
    set_index(cpu, RDI, di.wrapping_add(elements * T::BYTES), mask);
    elements
}
