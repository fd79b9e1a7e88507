//! String instructions, string I/O, code that changes itself, accesses across pages, memory-mapped I/O.

use iced_x86::code_asm::*;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image};
use crate::layout::*;
use crate::suite::{Guest, Peer};

pub(super) fn guests() -> Vec<Guest> {
    let needs_port = Peer::Skipped("it needs the engine's memory-mapped window");
    vec![
        Guest::new(
            "rep_counts",
            "REP with counts 0, 1 and many, DF, across a page (SDM 2B REP)",
            "00000000 00000000 00000001 00000000 00002345 00000000 00000000 fffffffc .",
            rep_counts,
        ),
        Guest::new(
            "rep_compare",
            "REPE CMPS and REPNE SCAS stop where they must (SDM 2B REP)",
            "00000004 00000004 1 00000000 0 00000007 1.",
            rep_compare,
        ),
        Guest::new(
            "string_io",
            "REP OUTS and REP INS, with DF, count 0 (SDM 2B OUTS, INS)",
            "strings!00000000 00000008 e9e9e9e9 e9000000 .",
            string_io,
        ),
        Guest::new(
            "smc_same_block",
            "a store changes the next instruction (SDM 3A 8.1.3)",
            "00000002 00000012 .",
            smc_same_block,
        )
        .on_kvm(Peer::Differs {
            output: "00000001 00000012 .",
            why: "QEMU's processor misses the first store to the code it runs in a nested guest",
        }),
        Guest::new(
            "smc_alias",
            "code changes through another linear address, and by REP MOVS (SDM 3A 8.1.3)",
            "00000001 00000002 00000003 .",
            smc_alias,
        ),
        Guest::new(
            "smc_across_pages",
            "an instruction across two pages changes in either (SDM 3A 8.1.3)",
            "04030201 aa030201 aa0302bb .",
            smc_across_pages,
        ),
        Guest::new(
            "unaligned_across_pages",
            "loads, stores and locked adds across pages (SDM 3A 8.1.1)",
            "55667788 11223344 5566778a 11223344 .",
            unaligned_across_pages,
        ),
        Guest::new(
            "mmio",
            "one access per instruction, two for a read-modify-write, all widths (no RAM there)",
            "00000000 cafe0000 00000001 cafe5a01 00000003 600dcafe .",
            mmio,
        )
        .on_qemu(needs_port),
        Guest::new(
            "mmio_across_pages",
            "an access across two pages of memory-mapped I/O; REP MOVS from it",
            "55667788 11223344 55667788 55667788 .",
            mmio_across_pages,
        )
        .on_qemu(needs_port),
    ]
}

fn rep_counts(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        // Nothing at all.
        a.mov(dword_ptr(DATA), 0)?;
        a.mov(edi, DATA)?;
        a.mov(eax, 0x55)?;
        a.xor(ecx, ecx)?;
        a.rep().stosd()?;
        a.mov(ebx, dword_ptr(DATA))?;
        a.show(ebx)?;
        a.lea(ebx, dword_ptr(rdi - DATA as i32))?;
        a.show(ebx)?;
        // 0x2345 bytes with a prefix of one, over page boundaries; the last is copied.
        a.mov(edi, DATA + 0xfff)?;
        a.mov(eax, 1)?;
        a.mov(ecx, 0x2345)?;
        a.rep().stosb()?;
        a.movzx(ebx, byte_ptr(DATA + 0xfff + 0x2344))?;
        a.show(ebx)?;
        a.movzx(ebx, byte_ptr(DATA + 0xfff + 0x2345))?;
        a.show(ebx)?;
        a.lea(ebx, dword_ptr(rdi - (DATA + 0xfff) as i32))?;
        a.show(ebx)?;
        a.show(ecx)?;
        // Downwards.
        a.std()?;
        a.mov(esi, DATA + 0x8000)?;
        a.mov(edi, DATA)?;
        a.mov(ecx, 1)?;
        a.rep().movsd()?;
        a.cld()?;
        a.mov(ebx, dword_ptr(DATA))?;
        a.show(ebx)?;
        a.lea(ebx, dword_ptr(rdi - DATA as i32))?;
        a.show(ebx)?;
        a.say(".")
    })
}

/// Prints ZF.
fn zero_flag(a: &mut Asm) -> Emit {
    a.sete(bl)?;
    a.movzx(ebx, bl)?;
    a.hex(ebx, 1)
}

fn rep_compare(image: &mut Image) -> Result<(), BuildError> {
    image.put(EXTRA, b"abcdef..abcdXf..");
    image.long(|a| {
        a.mov(esi, at(EXTRA))?;
        a.mov(edi, at(EXTRA + 8))?;
        a.mov(ecx, 8)?;
        a.repe().cmpsb()?; // differs in the fifth byte
        a.mov(r12d, ecx)?;
        a.setne(bl)?;
        a.movzx(r13d, bl)?;
        a.dec(ecx)?;
        a.inc(ecx)?;
        a.sub(ecx, -1)?;
        a.show(ecx)?;
        a.lea(ebx, dword_ptr(rsi - at(EXTRA) as i32 - 1))?;
        a.show(ebx)?;
        a.hex(r13d, 1)?;
        a.say(" ")?;
        a.mov(edi, at(EXTRA))?;
        a.mov(al, b'z' as u32)?;
        a.mov(ecx, 16)?;
        a.repne().scasb()?; // is not there
        zero_flag(a)?;
        a.mov(ebx, ecx)?;
        a.hex(ebx, 7)?;
        a.say(" 0 ")?;
        a.mov(edi, at(EXTRA))?;
        a.mov(al, b'.' as u32)?;
        a.mov(ecx, 16)?;
        a.repne().scasb()?;
        a.sete(bl)?;
        a.movzx(r13d, bl)?;
        a.lea(ebx, dword_ptr(rdi - at(EXTRA) as i32))?;
        a.show(ebx)?;
        a.hex(r13d, 1)?;
        a.say(".")
    })
}

fn string_io(image: &mut Image) -> Result<(), BuildError> {
    image.put(EXTRA, b"strings!");
    image.long(|a| {
        a.mov(esi, at(EXTRA))?;
        a.mov(ecx, 8)?;
        a.mov(dx, PORT_OUT as u32)?;
        a.rep().outsb()?;
        a.show(ecx)?;
        a.lea(ebx, dword_ptr(rsi - at(EXTRA) as i32))?;
        a.show(ebx)?;
        a.mov(qword_ptr(DATA), 0)?;
        a.mov(edi, DATA)?;
        a.xor(ecx, ecx)?;
        a.mov(dx, PORT_OUT as u32)?;
        a.rep().insb()?;
        a.mov(ecx, 4)?;
        a.rep().insb()?;
        a.std()?;
        a.mov(edi, DATA + 7)?;
        a.insb()?;
        a.cld()?;
        a.mov(ebx, dword_ptr(DATA))?;
        a.show(ebx)?;
        a.mov(ebx, dword_ptr(DATA + 4))?;
        a.show(ebx)?;
        a.say(".")
    })
}

fn smc_same_block(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        for value in [2, 0x12] {
            let mut patched = a.create_label();
            a.mov(byte_ptr(patched), value)?;
            // MOV EBX, imm32, whose first byte of data is stored to just before.
            a.db(&[0xbb])?;
            a.set_label(&mut patched)?;
            a.db(&[1, 0, 0, 0])?;
            a.show(ebx)?;
        }
        a.say(".")
    })
}

fn smc_alias(image: &mut Image) -> Result<(), BuildError> {
    const ALIAS: u32 = 0x8_0000;
    image.long(|a| {
        a.mov(dword_ptr(PT + (ALIAS >> 12) * 8), at(EXTRA) | 3)?;
        a.invlpg(byte_ptr(ALIAS))?;
        a.mov(r12d, at(EXTRA))?;
        a.call(r12)?;
        a.show(ebx)?;
        a.mov(byte_ptr(ALIAS + 1), 2)?;
        a.call(r12)?;
        a.show(ebx)?;
        a.mov(byte_ptr(DATA), 3)?;
        a.mov(esi, DATA)?;
        a.mov(edi, ALIAS + 1)?;
        a.mov(ecx, 4)?;
        a.rep().movsb()?;
        a.call(r12)?;
        a.show(ebx)?;
        a.say(".")
    })?;
    image.code(64, EXTRA, |a| {
        a.mov(ebx, 1)?;
        a.ret()
    })
}

fn smc_across_pages(image: &mut Image) -> Result<(), BuildError> {
    // MOV EBX, imm32; RET: two bytes in one page, four in the next.
    image.put(USER + 0xffe, &[0xbb, 1, 2, 3, 4, 0xc3]);
    image.long(|a| {
        a.mov(r12d, at(USER) + 0xffe)?;
        a.call(r12)?;
        a.show(ebx)?;
        a.mov(byte_ptr(at(EXTRA) + 2), 0xaau32)?;
        a.call(r12)?;
        a.show(ebx)?;
        a.mov(byte_ptr(at(USER) + 0xfff), 0xbbu32)?;
        a.call(r12)?;
        a.show(ebx)?;
        a.say(".")
    })
}

fn unaligned_across_pages(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        let show = |a: &mut Asm| {
            a.mov(rbx, qword_ptr(DATA + 0xffb))?;
            a.show(ebx)?;
            a.shr(rbx, 32u32)?;
            a.show(ebx)
        };
        a.mov(rcx, 0x1122_3344_5566_7788u64)?;
        a.mov(edi, DATA + 0xffb)?;
        a.mov(qword_ptr(rdi), rcx)?;
        show(a)?;
        a.mov(ecx, 2)?;
        a.lock().add(qword_ptr(rdi), rcx)?;
        show(a)?;
        a.say(".")
    })
}

/// Prints the number of accesses to the window since the last time.
fn accesses(a: &mut Asm) -> Emit {
    a.mov(dx, PORT_MMIO_COUNT as u32)?;
    a.in_(eax, dx)?;
    a.mov(ebx, eax)?;
    a.sub(ebx, r12d)?;
    a.mov(r12d, eax)?;
    a.show(ebx)
}

fn mmio(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.xor(r12d, r12d)?;
        a.mov(edi, MMIO)?;
        accesses(a)?;
        a.mov(dword_ptr(rdi), 0xcafe_0000u32)?;
        a.mov(ebx, dword_ptr(rdi))?;
        a.show(ebx)?;
        a.mov(dx, PORT_MMIO_COUNT as u32)?;
        a.in_(eax, dx)?;
        a.mov(r12d, eax)?;
        a.mov(byte_ptr(rdi + 1), 0x5a)?;
        accesses(a)?;
        a.inc(byte_ptr(rdi))?;
        a.mov(ebx, dword_ptr(rdi))?;
        a.show(ebx)?;
        accesses(a)?;
        a.mov(qword_ptr(rdi + 8), 0x600d_cafe)?;
        a.push(qword_ptr(rdi + 8))?;
        a.pop(rbx)?;
        a.show(ebx)?;
        a.say(".")
    })
}

fn mmio_across_pages(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(edi, MMIO)?;
        a.mov(rcx, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rdi + 0xffc), rcx)?;
        a.mov(ebx, dword_ptr(rdi + 0xffc))?;
        a.show(ebx)?;
        a.mov(ebx, dword_ptr(rdi + 0x1000))?;
        a.show(ebx)?;
        a.mov(rbx, qword_ptr(rdi + 0xffc))?;
        a.show(ebx)?;
        a.lea(rsi, qword_ptr(rdi + 0xffc))?;
        a.mov(edi, DATA)?;
        a.mov(ecx, 8)?;
        a.rep().movsb()?;
        a.mov(ebx, dword_ptr(DATA))?;
        a.show(ebx)?;
        a.say(".")
    })
}
