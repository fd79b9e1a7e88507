//! Where everything is: in the image, and in the memory of a running guest.
//!
//! An image is 64 KiB and ends with the reset vector, so that it can stand where firmware stands. Its first 60 KiB, the
//! payload, are copied to [`PAYLOAD`] and executed there, in RAM: tables get their accessed bits, code may modify itself.

/// Bytes of an image.
pub const IMAGE_BYTES: usize = 0x1_0000;
/// Bytes of it that are copied to RAM.
pub const PAYLOAD_BYTES: usize = 0xf000;
/// Where they are copied to. Real-mode code has CS = `PAYLOAD >> 4`.
pub const PAYLOAD: u32 = 0x1_0000;

/// Offsets in the payload of what is executed first, per mode: the way into the mode, its library, the stubs of its
/// interrupt table, the guest's own code.
pub const START16: usize = 0;
/// Library of real mode.
pub const LIB16: usize = 0x800;
/// Stubs of real mode, [`STUB16_BYTES`] each.
pub const STUBS16: usize = 0x1000;
/// The guest's real-mode code.
pub const BODY16: usize = 0x1400;
/// Way into protected mode.
pub const START32: usize = 0x2000;
/// Library of protected mode.
pub const LIB32: usize = 0x2400;
/// Stubs of protected mode, [`STUB_BYTES`] each.
pub const STUBS32: usize = 0x3000;
/// The guest's 32-bit code.
pub const BODY32: usize = 0x4000;
/// Way into long mode.
pub const START64: usize = 0x6000;
/// Library of long mode.
pub const LIB64: usize = 0x6400;
/// Stubs of long mode, [`STUB_BYTES`] each.
pub const STUBS64: usize = 0x7000;
/// The guest's 64-bit code.
pub const BODY64: usize = 0x8000;
/// A page that ring 3 may use, for code.
pub const USER: usize = 0xa000;
/// A page for more code or data of the guest.
pub const EXTRA: usize = 0xb000;
/// Descriptor table, 64 entries.
pub const GDT: usize = 0xc000;
/// 32-bit task state with 0x68 bytes and an I/O permission bitmap behind.
pub const TSS32: usize = 0xc200;
/// 64-bit task state, likewise.
pub const TSS64: usize = 0xc400;
/// Operands of LGDT and LIDT: GDT, 32-bit IDT, 64-bit IDT, 16 bytes each.
pub const POINTERS: usize = 0xc600;
/// 32-bit interrupt table.
pub const IDT32: usize = 0xd000;
/// 64-bit interrupt table.
pub const IDT64: usize = 0xe000;
/// Where the reset vector's jump leads (in the image, not copied).
pub const RESET_CODE: usize = 0xf000;

/// Bytes of a real-mode stub.
pub const STUB16_BYTES: usize = 8;
/// Real-mode stubs.
pub const STUBS16_COUNT: usize = 0x80;
/// Bytes of a 32-bit or 64-bit stub.
pub const STUB_BYTES: usize = 16;
/// Bytes of a task state with its bitmap (ports 0 to 0x4ff and a closing byte).
pub const TSS_BYTES: usize = 0x68 + 0xa0 + 1;

/// Linear address of the payload's `offset`.
pub const fn at(offset: usize) -> u32 {
    PAYLOAD + offset as u32
}

/// Where the handlers go on after a caught exception; 0: nothing is being caught.
pub const RESUME: u32 = 0x500;
/// The stack pointer there.
pub const SAVED_SP: u32 = 0x508;
/// A routine that handlers call before they return (32- and 64-bit), with BX pointing to vector, error code and the
/// frame; 0: none.
pub const HOOK: u32 = 0x510;
/// Words for guests to use.
pub const SCRATCH: u32 = 0x520;

/// Tops of stacks.
pub const STACK16: u32 = 0x7000;
/// Ring 0.
pub const STACK: u32 = 0x2_8000;
/// What the task states give to ring 0.
pub const STACK_RING0: u32 = 0x2_c000;
/// IST1.
pub const STACK_IST1: u32 = 0x2_e000;
/// Memory that ring 3 may use, 64 KiB.
pub const USER_DATA: u32 = 0x3_0000;
/// Ring 3's stack.
pub const STACK_USER: u32 = 0x3_8000;
/// Paging structures of long mode: PML4, PDPT, page directory and page table of the first 2 MiB, directory of the fourth
/// GiB (the APIC).
pub const PML4: u32 = 0x4_0000;
/// See [`PML4`].
pub const PDPT: u32 = 0x4_1000;
/// See [`PML4`].
pub const PD: u32 = 0x4_2000;
/// See [`PML4`].
pub const PT: u32 = 0x4_3000;
/// See [`PML4`].
pub const PD3: u32 = 0x4_4000;
/// Supervisor memory for guests to use, 192 KiB.
pub const DATA: u32 = 0x5_0000;

/// Selectors. The order of 0x18 to 0x38 is what SYSCALL and SYSRET want.
pub const CODE32: u16 = 0x08;
/// Flat data of ring 0.
pub const DATA0: u16 = 0x10;
/// 64-bit code of ring 0.
pub const CODE64: u16 = 0x18;
/// 32-bit code of ring 3.
pub const CODE32_USER: u16 = 0x28 | 3;
/// Flat data of ring 3.
pub const DATA_USER: u16 = 0x30 | 3;
/// 64-bit code of ring 3.
pub const CODE64_USER: u16 = 0x38 | 3;
/// 32-bit task state.
pub const TASK32: u16 = 0x40;
/// 64-bit task state (two entries).
pub const TASK64: u16 = 0x48;
/// 16-bit code at [`PAYLOAD`].
pub const CODE16: u16 = 0x58;
/// 16-bit data at 0.
pub const DATA16: u16 = 0x60;
/// First selector that guests define themselves.
pub const OWN: u16 = 0x68;

/// Debug console: every byte written is output; reads give 0xe9.
pub const PORT_OUT: u16 = 0x402;
/// A write ends the guest.
pub const PORT_STOP: u16 = 0xf4;
/// Engines only: a write raises the 8259's request with that vector.
pub const PORT_EXTINT: u16 = 0x500;
/// Engines only: two pages of memory-mapped I/O that behave as memory and count accesses.
pub const MMIO: u32 = 0xd000_0000;
/// Bytes of it.
pub const MMIO_BYTES: u32 = 0x2000;
/// Engines only: accesses to [`MMIO`] so far, by port read.
pub const PORT_MMIO_COUNT: u16 = 0x504;
