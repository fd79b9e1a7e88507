//! x87, SSE and AVX state: one XSAVE image in the standard format. SDM 1 chapter 13.

use crate::cpu::{Cpu, Flow, Io, Stop, cr};

/// Offsets in the image.
pub(crate) mod at {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const HEADER: usize = 512;
    pub const YMM_HIGH: usize = 576;
    pub const END: usize = 832;
    /// Behind the image, for native thunks: the memory operand, the flags, the working and the host's MXCSR.
    pub const SCRATCH: usize = 832;
    pub const FLAGS: usize = 960;
    pub const WORK_MXCSR: usize = 968;
    pub const HOST_MXCSR: usize = 972;
}
/// Bytes of the memory operand that a native thunk can have.
pub(crate) const SCRATCH_BYTES: usize = 128;
/// Bits of MXCSR that exist.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// The image and what native thunks work with; aligned so that the host can load from it. Offsets are those of [`at`].
#[repr(C, align(64))]
pub(crate) struct Fpu {
    pub image: [u8; at::END],
    pub scratch: [u8; SCRATCH_BYTES],
    pub flags: u64,
    pub work_mxcsr: u32,
    pub host_mxcsr: u32,
}
const _: () =
    assert!(std::mem::offset_of!(Fpu, scratch) == at::SCRATCH && std::mem::offset_of!(Fpu, flags) == at::FLAGS);
const _: () = assert!(std::mem::offset_of!(Fpu, host_mxcsr) == at::HOST_MXCSR);

impl Fpu {
    pub fn new() -> Fpu {
        let mut fpu =
            Fpu { image: [0; at::END], scratch: [0; SCRATCH_BYTES], flags: 0, work_mxcsr: 0x1f80, host_mxcsr: 0x1f80 };
        fpu.init_x87();
        fpu.set_u16(at::FCW, 0x40);
        fpu.set_mxcsr(0x1f80);
        fpu
    }
    /// FNINIT.
    pub fn init_x87(&mut self) {
        self.image[..at::MXCSR].fill(0);
        self.set_u16(at::FCW, 0x37f);
    }
    /// The unit changes over to MMX: the top of stack becomes 0 (the image, which is relative to it, turns) and all registers
    /// are in use. SDM 1 9.6.2.
    pub fn enter_mmx(&mut self) {
        let status = self.u16(at::FSW);
        let top = (status >> 11 & 7) as usize;
        self.image[at::ST..at::XMM].rotate_right(16 * top);
        self.set_u16(at::FSW, status & !0x3800);
        self.image[at::FTW] = 0xff;
    }
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.image[at], self.image[at + 1]])
    }
    pub fn set_u16(&mut self, at: usize, value: u16) {
        self.image[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.image[24], self.image[25], self.image[26], self.image[27]])
    }
    pub fn set_mxcsr(&mut self, value: u32) {
        self.image[at::MXCSR..at::MXCSR + 4].copy_from_slice(&value.to_le_bytes());
        self.image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }
}

/// State components of XCR0.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

impl Cpu {
    /// An SSE instruction may run. SDM 3A 2.5 table 2-2, 13.? "Emulation".
    #[inline(always)]
    pub fn check_sse(&mut self) -> Flow {
        if self.cr0 & (cr::EM | cr::TS) == 0 && self.cr4 & cr::OSFXSR != 0 { Ok(()) } else { self.sse_refused() }
    }
    #[cold]
    fn sse_refused(&mut self) -> Flow {
        if self.cr0 & cr::EM != 0 || self.cr4 & cr::OSFXSR == 0 { self.undefined() } else { self.raise(7) }
    }
    /// A VEX-encoded vector instruction may run.
    #[inline(always)]
    pub fn check_avx(&mut self) -> Flow {
        let enabled = self.cr4 & cr::OSXSAVE != 0 && self.xcr0 & (SSE | AVX) == SSE | AVX;
        if enabled && self.cr0 & cr::TS == 0 { Ok(()) } else { self.avx_refused(enabled) }
    }
    #[cold]
    fn avx_refused(&mut self, enabled: bool) -> Flow {
        if enabled { self.raise(7) } else { self.undefined() }
    }
    /// An x87 (or MMX: `mmx`) instruction may run.
    #[inline(always)]
    pub fn check_x87(&mut self, mmx: bool) -> Flow {
        match self.cr0 & (cr::EM | cr::TS) {
            0 => Ok(()),
            bits if mmx && bits & cr::EM != 0 => self.undefined(),
            _ => self.raise(7),
        }
    }
    /// FWAIT, and what every waiting x87 instruction does first: a pending unmasked exception is reported.
    pub fn check_x87_pending(&mut self) -> Flow {
        if self.fpu.u16(at::FSW) & 0x80 == 0 {
            return Ok(());
        }
        if self.cr0 & cr::NE == 0 {
            return self.give_up("x87 exceptions through FERR# and IRQ 13 (CR0.NE = 0) are not implemented");
        }
        self.raise(16)
    }

    /// FXSAVE. SDM 2A.
    pub fn fxsave(&mut self, io: Io<'_>, va: u64, wide: bool) -> Flow {
        if self.cr0 & (cr::EM | cr::TS) != 0 {
            return self.raise(7);
        }
        if va & 15 != 0 {
            return self.gp(0);
        }
        let mut area = [0u8; 416];
        area.copy_from_slice(&self.fpu.image[..416]);
        if !wide {
            // Selectors FCS and FDS read as 0, and offsets are 32 bits wide.
            area[12..16].fill(0);
            area[20..24].fill(0);
        }
        let xmm_end = if self.long64() { 416 } else { at::XMM + 128 };
        let end = if self.cr4 & cr::OSFXSR != 0 { xmm_end } else { at::XMM };
        self.write_block(io, va, &area[..end])?;
        self.settle()
    }

    /// FXRSTOR. SDM 2A.
    pub fn fxrstor(&mut self, io: Io<'_>, va: u64) -> Flow {
        if self.cr0 & (cr::EM | cr::TS) != 0 {
            return self.raise(7);
        }
        if va & 15 != 0 {
            return self.gp(0);
        }
        let mut area = [0u8; 416];
        self.read_block(io, va, &mut area)?;
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        if self.cr4 & cr::OSFXSR != 0 && mxcsr & !MXCSR_MASK != 0 {
            return self.gp(0);
        }
        self.fpu.image[..24].copy_from_slice(&area[..24]);
        self.fpu.image[at::ST..at::XMM].copy_from_slice(&area[at::ST..at::XMM]);
        if self.cr4 & cr::OSFXSR != 0 {
            self.fpu.set_mxcsr(mxcsr);
            let end = if self.long64() { 416 } else { at::XMM + 128 };
            self.fpu.image[at::XMM..end].copy_from_slice(&area[at::XMM..end]);
        }
        Ok(())
    }

    fn check_xsave(&mut self, va: u64) -> Flow {
        if self.cr4 & cr::OSXSAVE == 0 {
            return self.undefined();
        }
        if self.cr0 & cr::TS != 0 {
            return self.raise(7);
        }
        if va & 63 != 0 { self.gp(0) } else { Ok(()) }
    }

    /// EDX:EAX, the components an XSAVE instruction asks for.
    fn requested(&self) -> u64 {
        use crate::cpu::{RAX, RDX};
        (self.gpr[RDX] << 32 | self.gpr[RAX] & 0xffff_ffff) & self.xcr0
    }

    /// XSAVE and XSAVEOPT (which may skip nothing without being wrong). SDM 1 13.7, 13.9.
    pub fn xsave(&mut self, io: Io<'_>, va: u64) -> Flow {
        self.check_xsave(va)?;
        let mask = self.requested();
        let mut old = [0u8; 8];
        self.read_block(io, va + at::HEADER as u64, &mut old)?;
        // Every page is checked before anything is written.
        self.probe_write(va, 1)?;
        self.probe_write(va + at::HEADER as u64, 8)?;
        if mask & AVX != 0 {
            self.probe_write(va + at::END as u64 - 1, 1)?;
        }
        let image = self.fpu.image;
        if mask & X87 != 0 {
            self.write_block(io, va, &image[..24])?;
            self.write_block(io, va + at::ST as u64, &image[at::ST..at::XMM])?;
        }
        if mask & (SSE | AVX) != 0 {
            self.write_block(io, va + at::MXCSR as u64, &image[24..32])?;
        }
        if mask & SSE != 0 {
            let end = if self.long64() { 416 } else { at::XMM + 128 };
            self.write_block(io, va + at::XMM as u64, &image[at::XMM..end])?;
        }
        if mask & AVX != 0 {
            let end = if self.long64() { at::END } else { at::YMM_HIGH + 128 };
            self.write_block(io, va + at::YMM_HIGH as u64, &image[at::YMM_HIGH..end])?;
        }
        let bv = u64::from_le_bytes(old) & !mask | mask;
        self.write_block(io, va + at::HEADER as u64, &bv.to_le_bytes())?;
        self.settle()
    }

    /// XRSTOR of the standard format. SDM 1 13.8.
    pub fn xrstor(&mut self, io: Io<'_>, va: u64) -> Flow {
        self.check_xsave(va)?;
        let mask = self.requested();
        let mut area = [0u8; at::END];
        let end = if mask & AVX != 0 { at::END } else { at::YMM_HIGH };
        self.read_block(io, va, &mut area[..end])?;
        let bv = u64::from_le_bytes(area[512..520].try_into().unwrap_or_default());
        if area[520..536].iter().any(|&b| b != 0) || bv & !self.xcr0 != 0 {
            return self.gp(0);
        }
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        if mask & (SSE | AVX) != 0 && mxcsr & !MXCSR_MASK != 0 {
            return self.gp(0);
        }
        if mask & X87 != 0 {
            if bv & X87 != 0 {
                self.fpu.image[..24].copy_from_slice(&area[..24]);
                self.fpu.image[at::ST..at::XMM].copy_from_slice(&area[at::ST..at::XMM]);
            } else {
                self.fpu.init_x87();
                self.fpu.image[at::ST..at::XMM].fill(0);
            }
        }
        if mask & (SSE | AVX) != 0 {
            self.fpu.set_mxcsr(mxcsr);
        }
        if mask & SSE != 0 {
            let end = if self.long64() { 416 } else { at::XMM + 128 };
            let source = if bv & SSE != 0 { &area[at::XMM..end] } else { &[0u8; 256][..end - at::XMM] };
            self.fpu.image[at::XMM..end].copy_from_slice(source);
        }
        if mask & AVX != 0 {
            let end = if self.long64() { at::END } else { at::YMM_HIGH + 128 };
            let source = if bv & AVX != 0 { &area[at::YMM_HIGH..end] } else { &[0u8; 256][..end - at::YMM_HIGH] };
            self.fpu.image[at::YMM_HIGH..end].copy_from_slice(source);
        }
        Ok(())
    }

    /// XSETBV. SDM 2D.
    pub fn xsetbv(&mut self, register: u32, value: u64) -> Flow {
        if self.cr4 & cr::OSXSAVE == 0 {
            return self.undefined();
        }
        let offered = self.cpuid.get(0xd, 0).map_or(X87, |l| l.eax as u64);
        let avx_without_sse = value & (SSE | AVX) == AVX;
        if self.cpl != 0 || register != 0 || value & X87 == 0 || value & !offered != 0 || avx_without_sse {
            return self.gp(0);
        }
        self.xcr0 = value;
        Err(Stop::Next)
    }
}
