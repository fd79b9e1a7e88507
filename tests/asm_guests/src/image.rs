//! Builds images.

use iced_x86::IcedError;

use crate::asm::{Asm, Emit, Lib};
use crate::layout::*;
use crate::library;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The assembler refused something.
    #[error("the code at payload offset {offset:#x} cannot be assembled")]
    Assemble {
        /// Where it was to go.
        offset: usize,
        /// Its reason.
        #[source]
        source: IcedError,
    },
    /// Code ran into what stands behind it.
    #[error("the code at payload offset {offset:#x} has {bytes} bytes where there is room for {room}")]
    TooLong {
        /// Where it stands.
        offset: usize,
        /// Its size.
        bytes: usize,
        /// What fits.
        room: usize,
    },
}

/// An image in the making.
pub struct Image {
    bytes: Vec<u8>,
    libs: [Lib; 3],
}

/// Starts of everything in the payload: code ends before the next of them.
const STARTS: [usize; 18] = [
    START16, LIB16, STUBS16, BODY16, START32, LIB32, STUBS32, BODY32, START64, LIB64, STUBS64, BODY64, USER, EXTRA,
    GDT, IDT32, RESET_CODE, 0xfff0,
];

impl Image {
    /// Libraries, tables and the reset vector; no guest yet.
    pub fn new() -> Result<Image, BuildError> {
        let mut image = Image { bytes: vec![0; IMAGE_BYTES], libs: [Lib::default(); 3] };
        let parts = [(16, LIB16, STUBS16, 0), (32, LIB32, STUBS32, PAYLOAD), (64, LIB64, STUBS64, PAYLOAD)];
        for (lib, (bits, offset, stubs, base)) in (0..).zip(parts) {
            let ip = base as u64 + offset as u64;
            let made = library::assemble(bits, ip).map_err(|source| BuildError::Assemble { offset, source })?;
            image.place(offset, &made.code)?;
            image.put(stubs, &library::stubs(bits, base as u64 + stubs as u64, made.handler));
            image.libs[lib] = made.lib;
        }
        image.code(16, RESET_CODE, library::reset_code)?;
        image.put(0xfff0, &[0xea, 0x00, 0xf0, 0x00, 0xf0]);
        image.tables();
        Ok(image)
    }

    /// The finished bytes.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// Copies `bytes` to `offset`.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn place(&mut self, offset: usize, bytes: &[u8]) -> Result<(), BuildError> {
        let end = STARTS.into_iter().filter(|&s| s > offset).min().unwrap_or(IMAGE_BYTES);
        if offset + bytes.len() > end {
            return Err(BuildError::TooLong { offset, bytes: bytes.len(), room: end - offset });
        }
        self.put(offset, bytes);
        Ok(())
    }

    /// Code for `bits` at a payload offset. 16-bit code runs with CS based at the payload.
    pub fn code(&mut self, bits: u32, offset: usize, body: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
        let lib = self.libs[match bits {
            16 => 0,
            32 => 1,
            _ => 2,
        }];
        let ip = offset as u64 + if bits == 16 { 0 } else { PAYLOAD as u64 };
        let assemble = || {
            let mut a = Asm::new(bits, lib)?;
            body(&mut a)?;
            a.assemble(ip)
        };
        let code = assemble().map_err(|source| BuildError::Assemble { offset, source })?;
        self.place(offset, &code)
    }

    /// A guest in real mode: DS = ES = SS = 0.
    pub fn real(&mut self, body: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
        self.code(16, START16, |a| library::start16(a, false))?;
        self.body(16, BODY16, body)
    }

    /// A guest in protected mode, flat, no paging.
    pub fn protected(&mut self, body: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
        self.code(16, START16, |a| library::start16(a, true))?;
        self.code(32, START32, |a| library::start32(a, false))?;
        self.body(32, BODY32, body)
    }

    /// A guest in 64-bit mode.
    pub fn long(&mut self, body: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
        self.code(16, START16, |a| library::start16(a, true))?;
        self.code(32, START32, |a| library::start32(a, true))?;
        self.code(64, START64, library::start64)?;
        self.body(64, BODY64, body)
    }

    fn body(&mut self, bits: u32, offset: usize, body: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
        self.code(bits, offset, |a| {
            body(a)?;
            a.stop()
        })
    }

    /// Sets a descriptor.
    pub fn gdt(&mut self, selector: u16, descriptor: u64) {
        self.put(GDT + (selector & !7) as usize, &descriptor.to_le_bytes());
    }

    /// Replaces a gate of protected mode.
    pub fn gate32(&mut self, vector: u8, gate: u64) {
        self.put(IDT32 + vector as usize * 8, &gate.to_le_bytes());
    }

    /// Replaces a gate of long mode.
    pub fn gate64(&mut self, vector: u8, gate: u64) {
        self.put(IDT64 + vector as usize * 16, &gate.to_le_bytes());
    }

    fn tables(&mut self) {
        let tss = |kind: u8, offset: usize| system(kind, at(offset), TSS_BYTES as u32 - 1);
        for (selector, descriptor) in [
            (CODE32, 0x00cf_9b00_0000_ffff),
            (DATA0, 0x00cf_9300_0000_ffff),
            (CODE64, 0x00af_9b00_0000_ffff),
            (CODE64 + 8, 0x00cf_9300_0000_ffff),
            (CODE32_USER, 0x00cf_fb00_0000_ffff),
            (DATA_USER, 0x00cf_f300_0000_ffff),
            (CODE64_USER, 0x00af_fb00_0000_ffff),
            (TASK32, tss(9, TSS32)),
            (TASK64, tss(9, TSS64)),
            (CODE16, 0x0000_9b01_0000_ffff),
            (DATA16, 0x0000_9300_0000_ffff),
        ] {
            self.gdt(selector, descriptor);
        }
        let pointers = [(GDT, 0x1ffu16, POINTERS), (IDT32, 0x7ff, POINTERS + 16), (IDT64, 0xfff, POINTERS + 32)];
        for (table, limit, to) in pointers {
            self.put(to, &limit.to_le_bytes());
            self.put(to + 2, &at(table).to_le_bytes());
        }
        for vector in 0..=255u8 {
            let stub = |stubs: usize| at(stubs + vector as usize * STUB_BYTES);
            self.gate32(vector, gate(14, CODE32, stub(STUBS32), 0));
            self.gate64(vector, gate(14, CODE64, stub(STUBS64), 0));
        }
        self.put(TSS32 + 4, &STACK_RING0.to_le_bytes());
        self.put(TSS32 + 8, &DATA0.to_le_bytes());
        self.put(TSS64 + 4, &(STACK_RING0 as u64).to_le_bytes());
        self.put(TSS64 + 0x24, &(STACK_IST1 as u64).to_le_bytes());
        for tss in [TSS32, TSS64] {
            self.put(tss + 0x66, &0x68u16.to_le_bytes());
            self.put(tss + 0x68, &[0xff; TSS_BYTES - 0x68]);
        }
    }
}

/// A gate (kind 12 call, 14 interrupt, 15 trap; +16 bits: `kind`), present, callable from `dpl`.
pub const fn gate(kind: u8, selector: u16, offset: u32, dpl: u8) -> u64 {
    (offset as u64 & 0xffff)
        | (selector as u64) << 16
        | (kind as u64) << 40
        | (dpl as u64) << 45
        | 1 << 47
        | (offset as u64 & 0xffff_0000) << 32
}

/// A present system descriptor of ring 0.
pub const fn system(kind: u8, base: u32, limit: u32) -> u64 {
    (limit as u64 & 0xffff)
        | (base as u64 & 0xff_ffff) << 16
        | (kind as u64) << 40
        | 1 << 47
        | (limit as u64 & 0xf_0000) << 32
        | (base as u64 & 0xff00_0000) << 32
}
