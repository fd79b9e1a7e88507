//! Vector instructions that touch memory element by element: masked moves and gathers. Only selected elements are accessed,
//! and only they can fault.

use crate::alu::Word;
use crate::cpu::{Cpu, Flow, Io, Op, STACK_SEG, ZERO};
use crate::fpu::at;
use crate::native::check_avx_mode;

/// A register slot that no instruction names, for computed addresses.
const ADDRESS: u8 = 18;

/// Shape of such an instruction, packed into [`Op::imm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Bytes of a data element.
    pub element: u8,
    /// Number of elements.
    pub count: u8,
    /// Gathers: bytes of an index.
    pub index: u8,
    /// Gathers: log2 of the scale.
    pub scale: u8,
    /// Gathers: the index register.
    pub index_register: u8,
}

impl Shape {
    pub fn pack(self) -> u64 {
        u64::from_le_bytes([self.element, self.count, self.index, self.scale, self.index_register, 0, 0, 0])
    }
    fn unpack(word: u64) -> Shape {
        let [element, count, index, scale, index_register, ..] = word.to_le_bytes();
        Shape { element, count, index, scale, index_register }
    }
}

impl Cpu {
    /// Place of byte `byte` of vector register `n` in the XSAVE image.
    fn lane_at(n: u8, byte: usize) -> usize {
        let n = n as usize & 15;
        if byte < 16 { at::XMM + 16 * n + byte } else { at::YMM_HIGH + 16 * n + byte - 16 }
    }
    /// Element `i` of `bytes` of vector register `n`.
    fn lane(&self, n: u8, i: usize, bytes: usize) -> u64 {
        let from = Self::lane_at(n, i * bytes);
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&self.fpu.image[from..from + bytes]);
        u64::from_le_bytes(word)
    }
    fn set_lane(&mut self, n: u8, i: usize, bytes: usize, value: u64) {
        let to = Self::lane_at(n, i * bytes);
        self.fpu.image[to..to + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    fn selected(&self, n: u8, i: usize, bytes: usize) -> bool {
        self.lane(n, i, bytes) >> (8 * bytes - 1) & 1 != 0
    }
    /// Clears vector register `n` from byte `from` on.
    fn clear_from(&mut self, n: u8, from: usize) {
        for byte in from..32 {
            let at = Self::lane_at(n, byte);
            self.fpu.image[at] = 0;
        }
    }

    /// The address of an operand displaced by `offset` bytes, checked for `bytes`.
    fn displaced(&mut self, op: &Op, offset: u64, bytes: u64, write: bool) -> Result<u64, crate::cpu::Stop> {
        let mut one = *op;
        self.gpr[ADDRESS as usize] = self.offset(op).wrapping_add(offset);
        (one.base, one.index, one.disp) = (ADDRESS, ZERO, 0);
        let va = self.ea(&one, bytes, write)?;
        if self.check_canonical(va, bytes).is_err() {
            return self.raise_code(if op.seg == STACK_SEG { 12 } else { 13 }, 0);
        }
        Ok(va)
    }

    fn load_element(&mut self, io: Io<'_>, va: u64, bytes: u64) -> Result<u64, crate::cpu::Stop> {
        match bytes {
            4 => self.load::<u32>(io, va).map(u64::from),
            _ => self.load::<u64>(io, va),
        }
    }
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q from memory: register `op.dst`, mask `op.src`.
pub(crate) fn masked_load(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    check_avx_mode(cpu)?;
    let shape = Shape::unpack(op.imm);
    let bytes = shape.element as usize;
    let mut loaded = [0u64; 8];
    for i in (0..shape.count as usize).filter(|&i| i < 8) {
        if cpu.selected(op.src, i, bytes) {
            let va = cpu.displaced(op, (i * bytes) as u64, bytes as u64, false)?;
            loaded[i] = cpu.load_element(io, va, bytes as u64)?;
        }
    }
    cpu.clear_from(op.dst, 0);
    for (i, value) in loaded.into_iter().enumerate().take(shape.count as usize) {
        cpu.set_lane(op.dst, i, bytes, value);
    }
    Ok(())
}

/// The same to memory.
pub(crate) fn masked_store(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    check_avx_mode(cpu)?;
    let shape = Shape::unpack(op.imm);
    let bytes = shape.element as usize;
    let chosen: Vec<usize> = (0..shape.count as usize).filter(|&i| cpu.selected(op.src, i, bytes)).collect();
    let mut places = Vec::with_capacity(chosen.len());
    for &i in &chosen {
        let va = cpu.displaced(op, (i * bytes) as u64, bytes as u64, true)?;
        cpu.probe_write(va, bytes as u64)?;
        places.push((va, cpu.lane(op.dst, i, bytes)));
    }
    for (va, value) in places {
        match bytes {
            4 => cpu.store_then(io, va, value as u32)?,
            _ => cpu.store_then(io, va, value)?,
        }
    }
    cpu.settle()
}

/// VGATHERxxx and VPGATHERxx: destination `op.dst`, mask `op.src`. Elements done before a fault stay done.
pub(crate) fn gather(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    check_avx_mode(cpu)?;
    let shape = Shape::unpack(op.imm);
    if op.dst == op.src || op.dst == shape.index_register || op.src == shape.index_register {
        return cpu.undefined();
    }
    let (bytes, index_bytes) = (shape.element as usize, shape.index as usize);
    for i in (0..shape.count as usize).filter(|&i| i < 8) {
        if !cpu.selected(op.src, i, bytes) {
            continue;
        }
        let raw = cpu.lane(shape.index_register, i, index_bytes);
        let index = if index_bytes == 4 { raw as u32 as i32 as i64 } else { raw as i64 };
        let va = cpu.displaced(op, (index << shape.scale) as u64, bytes as u64, false)?;
        let value = cpu.load_element(io, va, bytes as u64)?;
        cpu.set_lane(op.dst, i, bytes, value);
        cpu.set_lane(op.src, i, bytes, 0);
    }
    cpu.clear_from(op.dst, shape.count as usize * bytes);
    cpu.clear_from(op.src, 0);
    Ok(())
}

/// MASKMOVDQU and its VEX form (`VEX`): bytes of `op.dst` chosen by `op.src` go to the address in rDI.
pub(crate) fn maskmovdqu<const VEX: bool>(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    if VEX {
        check_avx_mode(cpu)?
    } else {
        cpu.check_sse()?
    }
    let image = |cpu: &Cpu, n: u8| std::array::from_fn::<u8, 16, _>(|i| cpu.fpu.image[Cpu::lane_at(n, i)]);
    let (data, mask) = (image(cpu, op.dst), image(cpu, op.src));
    store_bytes(cpu, op, io, &data, &mask)
}

/// MASKMOVQ.
pub(crate) fn maskmovq(cpu: &mut Cpu, op: &Op, io: Io<'_>) -> Flow {
    cpu.check_x87(true)?;
    cpu.check_x87_pending()?;
    let top = (cpu.fpu.u16(at::FSW) >> 11 & 7) as usize;
    let mm = |cpu: &Cpu, n: u8| {
        let slot = (n as usize & 7).wrapping_sub(top) & 7;
        std::array::from_fn::<u8, 8, _>(|i| cpu.fpu.image[at::ST + 16 * slot + i])
    };
    let (data, mask) = (mm(cpu, op.dst), mm(cpu, op.src));
    store_bytes(cpu, op, io, &data, &mask)?;
    cpu.fpu.enter_mmx();
    Ok(())
}

fn store_bytes(cpu: &mut Cpu, op: &Op, io: Io<'_>, data: &[u8], mask: &[u8]) -> Flow {
    let chosen = |i: &usize| mask[*i] & 0x80 != 0;
    let mut places = Vec::with_capacity(data.len());
    for i in (0..data.len()).filter(chosen) {
        let va = cpu.displaced(op, i as u64, 1, true)?;
        cpu.probe_write(va, u8::BYTES)?;
        places.push((va, data[i]));
    }
    for (va, byte) in places {
        cpu.store_then(io, va, byte)?;
    }
    cpu.settle()
}
