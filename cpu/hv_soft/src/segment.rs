//! Segment registers and descriptors. SDM 3A chapters 3.4 and 5.

use x86::Segment;

use crate::cpu::{CS, Cpu, FS, GS, Io, SS, Stop, cr, rf};

/// A descriptor as it stands in a table, with where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub raw: u64,
    /// Linear address of its first byte.
    pub at: u64,
}

impl Descriptor {
    pub fn kind(self) -> u8 {
        (self.raw >> 40 & 15) as u8
    }
    /// A code or data segment, not a system one.
    pub fn is_segment(self) -> bool {
        self.raw >> 44 & 1 != 0
    }
    pub fn is_code(self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }
    pub fn conforming(self) -> bool {
        self.kind() & 4 != 0
    }
    pub fn dpl(self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    pub fn present(self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub fn long(self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    pub fn big(self) -> bool {
        self.raw >> 54 & 1 != 0
    }
    pub fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 56 << 24
    }
    pub fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// The hidden part that a load of `selector` leaves in a segment register.
    pub fn segment(self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attributes: (self.raw >> 40 & 0xf0ff) as u32 }
    }
}

/// A null selector, RPL aside.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// An unusable register holding `selector`.
fn unusable(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: Segment::UNUSABLE }
}

impl Cpu {
    /// Fetches the descriptor of `selector`. `vector`(selector) is raised if it lies outside its table.
    pub fn descriptor(&mut self, io: Io<'_>, selector: u16, vector: u8) -> Result<Descriptor, Stop> {
        let (base, limit) = if selector & 4 != 0 {
            if !self.ldtr.usable() {
                return self.raise_code(vector, selector as u32 & !3);
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, self.gdtr.limit as u32)
        };
        let offset = (selector & !7) as u64;
        if offset + 7 > limit as u64 {
            return self.raise_code(vector, selector as u32 & !3);
        }
        let at = base.wrapping_add(offset);
        let raw = self.load_sys(io, at, 8)?;
        Ok(Descriptor { raw, at })
    }

    /// The upper half of the 16-byte system descriptor `low` of long mode, which must lie in the table too.
    pub fn descriptor_high(&mut self, io: Io<'_>, selector: u16, low: Descriptor) -> Result<u64, Stop> {
        let limit = if selector & 4 != 0 { self.ldtr.limit } else { self.gdtr.limit as u32 };
        if (selector & !7) as u32 + 15 > limit {
            return self.gp(selector as u32 & !3);
        }
        self.load_sys(io, low.at.wrapping_add(8), 8)
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub fn mark_accessed(&mut self, io: Io<'_>, descriptor: &mut Descriptor) -> Result<(), Stop> {
        if descriptor.raw & 1 << 40 == 0 {
            descriptor.raw |= 1 << 40;
            let byte = descriptor.raw >> 40 & 0xff;
            self.store_sys(io, descriptor.at.wrapping_add(5), byte, 1)?;
        }
        Ok(())
    }

    /// Real-address and virtual-8086 mode: the base follows from the selector.
    pub fn load_real_segment(&mut self, seg: usize, selector: u16) {
        let s = &mut self.seg[seg];
        s.selector = selector;
        s.base = (selector as u64) << 4;
        if self.rflags & rf::VM != 0 {
            s.limit = 0xffff;
            s.attributes = 0xf3;
        } else {
            s.attributes &= !Segment::UNUSABLE;
            if seg == CS {
                s.attributes = 0x93 | s.attributes & 0x4000;
            }
        }
        self.update_mode();
    }

    /// MOV, POP and Lxx into ES, SS, DS, FS or GS.
    pub fn load_segment(&mut self, io: Io<'_>, seg: usize, selector: u16) -> Result<(), Stop> {
        if !self.protected() {
            self.load_real_segment(seg, selector);
            return Ok(());
        }
        let loaded =
            if seg == SS { self.stack_segment(io, selector, self.cpl)? } else { self.data_segment(io, selector)? };
        self.seg[seg] = loaded;
        self.update_mode();
        Ok(())
    }

    fn data_segment(&mut self, io: Io<'_>, selector: u16) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Ok(unusable(selector));
        }
        let error = selector as u32 & !3;
        let mut descriptor = self.descriptor(io, selector, 13)?;
        let readable = !descriptor.is_code() || descriptor.kind() & 2 != 0;
        let privileged =
            descriptor.is_code() && descriptor.conforming() || descriptor.dpl() >= self.cpl.max((selector & 3) as u8);
        if !descriptor.is_segment() || !readable || !privileged {
            return self.gp(error);
        }
        if !descriptor.present() {
            return self.raise_code(11, error);
        }
        self.mark_accessed(io, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The stack segment `selector` for privilege `cpl`, checked as MOV SS and returns to outer levels do.
    pub fn stack_segment(&mut self, io: Io<'_>, selector: u16, cpl: u8) -> Result<Segment, Stop> {
        let error = selector as u32 & !3;
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            // SDM 3A 5.8.? "Null SS": allowed in 64-bit mode below ring 3.
            if self.long64() && cpl != 3 && rpl == cpl {
                return Ok(Segment { attributes: Segment::UNUSABLE | (cpl as u32) << 5, ..unusable(selector) });
            }
            return self.gp(0);
        }
        let mut descriptor = self.descriptor(io, selector, 13)?;
        let writable_data = descriptor.is_segment() && !descriptor.is_code() && descriptor.kind() & 2 != 0;
        if !writable_data || descriptor.dpl() != cpl || rpl != cpl {
            return self.gp(error);
        }
        if !descriptor.present() {
            return self.raise_code(12, error);
        }
        self.mark_accessed(io, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The code segment `selector` for a far jump, call or return that ends at privilege `cpl`; marks it accessed.
    /// `rpl_matters`: a jump or call, where a non-conforming segment needs DPL = CPL >= RPL.
    pub fn code_segment(&mut self, io: Io<'_>, selector: u16, cpl: u8, returning: bool) -> Result<Segment, Stop> {
        if is_null(selector) {
            return self.gp(0);
        }
        let error = selector as u32 & !3;
        let mut descriptor = self.descriptor(io, selector, 13)?;
        if !descriptor.is_segment() {
            return self.task_switch(descriptor, error, returning);
        }
        let rpl = (selector & 3) as u8;
        let privileged = if descriptor.conforming() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl && (returning || rpl <= cpl)
        };
        if !descriptor.is_code() || !privileged || self.long_mode() && descriptor.long() && descriptor.big() {
            return self.gp(error);
        }
        if !descriptor.present() {
            return self.raise_code(11, error);
        }
        self.mark_accessed(io, &mut descriptor)?;
        Ok(descriptor.segment(selector & !3 | cpl as u16))
    }

    /// A system descriptor that is no call gate: the engine switches no tasks.
    fn task_switch<T>(&mut self, descriptor: Descriptor, error: u32, returning: bool) -> Result<T, Stop> {
        match descriptor.kind() {
            1 | 3 | 5 | 9 | 11 if !self.long_mode() && !returning => {
                self.give_up("hardware task switching is not implemented")
            }
            _ => self.gp(error),
        }
    }

    /// Makes `segment` the code segment at `rip` with privilege `cpl`.
    pub fn enter_code(&mut self, segment: Segment, cpl: u8, rip: u64) {
        self.seg[CS] = segment;
        self.cpl = cpl;
        self.rip = rip;
        self.update_mode();
    }

    /// After a return to an outer level: data segments that the new level must not use are cleared. SDM 2A "RET".
    pub fn drop_privileged_segments(&mut self) {
        for seg in [0, 3, FS, GS] {
            let s = self.seg[seg];
            let conforming_code = s.kind() & 0xc == 0xc;
            if s.usable() && s.dpl() < self.cpl && !conforming_code {
                self.seg[seg] = unusable(0);
            }
        }
        self.update_mode();
    }

    /// The stack pointer for privilege `cpl` from the 32-bit or 16-bit TSS: (SS selector, ESP).
    pub fn tss_stack(&mut self, io: Io<'_>, cpl: u8) -> Result<(u16, u32), Stop> {
        let wide = self.tr.kind() & 8 != 0;
        let (offset, bytes) = if wide { (4 + 8 * cpl as u64, 8) } else { (2 + 4 * cpl as u64, 4) };
        if !self.tr.usable() || offset + bytes - 1 > self.tr.limit as u64 {
            return self.raise_code(10, self.tr.selector as u32 & !3);
        }
        let at = self.tr.base.wrapping_add(offset);
        let sp_bytes = if wide { 4 } else { 2 };
        let esp = self.load_sys(io, at, sp_bytes)? as u32;
        let ss = self.load_sys(io, at.wrapping_add(sp_bytes), 2)? as u16;
        Ok((ss, esp))
    }

    /// RSP0-2 (index 0-2) or IST1-7 (index 3 + n) of the 64-bit TSS. SDM 3A 7.7.
    pub fn tss64_stack(&mut self, io: Io<'_>, index: u64) -> Result<u64, Stop> {
        let offset = if index < 3 { 4 + 8 * index } else { 0x24 + 8 * (index - 4) };
        if !self.tr.usable() || offset + 7 > self.tr.limit as u64 {
            return self.raise_code(10, self.tr.selector as u32 & !3);
        }
        let rsp = self.load_sys(io, self.tr.base.wrapping_add(offset), 8)?;
        if !canonical(rsp) { self.raise_code(12, 0) } else { Ok(rsp) }
    }

    /// Whether the I/O ports are open to the current privilege. SDM 1 19.5 "Protected-Mode I/O".
    pub fn check_io(&mut self, io: Io<'_>, port: u16, bytes: u8) -> Result<(), Stop> {
        let iopl = (self.rflags & rf::IOPL) >> 12;
        if self.cr0 & cr::PE == 0 || self.rflags & rf::VM == 0 && self.cpl as u64 <= iopl {
            return Ok(());
        }
        let wide = self.tr.kind() & 8 != 0;
        if !self.tr.usable() || !wide || self.tr.limit < 0x67 {
            return self.gp(0);
        }
        let map = self.load_sys(io, self.tr.base.wrapping_add(0x66), 2)?;
        let at = map + port as u64 / 8;
        if at + 1 > self.tr.limit as u64 {
            return self.gp(0);
        }
        let bits = self.load_sys(io, self.tr.base.wrapping_add(at), 2)?;
        let mask = ((1u64 << bytes) - 1) << (port & 7);
        if bits & mask != 0 { self.gp(0) } else { Ok(()) }
    }
}

/// Bits 63:47 are equal.
pub(crate) fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}
