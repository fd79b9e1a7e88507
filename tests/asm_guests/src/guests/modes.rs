//! Modes and the ways between them.

use iced_x86::code_asm::*;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image};
use crate::layout::*;
use crate::suite::Guest;

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "real_mode",
            "reset leads to real mode, its interrupts go through the IVT (SDM 3A 20.1)",
            "R[03][00+04][06+02].",
            real_mode,
        ),
        Guest::new(
            "protected_mode",
            "CR0.PE and a far jump (SDM 3A 9.9.1)",
            "P[03][06+02][0d 0068+02].",
            protected_mode,
        ),
        Guest::new(
            "long_mode",
            "CR4.PAE, EFER.LME, CR0.PG and a far jump (SDM 3A 9.8.5)",
            "L[03][06+02][0e 0000 00400000+02].",
            long_mode,
        ),
        Guest::new(
            "real_and_back",
            "protected mode by way of a 16-bit segment to real mode and back (SDM 3A 9.9.2)",
            "PR[21]P[03].",
            real_and_back,
        ),
        Guest::new(
            "big_real",
            "a segment's hidden limit survives the way to real mode (SDM 3A 9.9.2)",
            "55aa55aa .",
            big_real,
        ),
        Guest::new(
            "real_limit",
            "64 KiB segments of real mode: #GP, #SS (SDM 3A 20.1.4)",
            "[0d+02][0c+02].",
            real_limit,
        )
        .on_qemu(super::no_limits("--."))
        .on_kvm(super::no_limits("--.")),
        Guest::new(
            "compatibility_mode",
            "CS.L = 0 in long mode: 32-bit code, 64-bit handlers (SDM 3A 5.2.1)",
            "LC0000ffff [03]L00000001 .",
            compatibility_mode,
        ),
        Guest::new(
            "leave_long_mode",
            "paging off ends long mode (SDM 3A 9.8.5.4)",
            "L00000500 P00000000 [03].",
            leave_long_mode,
        ),
        Guest::new(
            "v86_mode",
            "IRET enters virtual-8086 mode, INT and #GP leave it (SDM 3A 20.2, 20.3)",
            "[21v0a][0d 0000v0a]5a .",
            v86_mode,
        ),
        Guest::new(
            "v86_io",
            "virtual-8086 mode asks the I/O bitmap whatever IOPL says (SDM 1 19.5.2)",
            "V[0d 0000v06].",
            v86_io,
        ),
        Guest::new(
            "v86_iopl",
            "IOPL below 3: CLI, PUSHF, INT n raise #GP in virtual-8086 mode (SDM 3A 20.2.8)",
            "[0d 0000v00][0d 0000v00][0d 0000v00][03v01].",
            v86_iopl,
        ),
    ]
}

fn real_mode(image: &mut Image) -> Result<(), BuildError> {
    image.real(|a| {
        a.say("R")?;
        a.int3()?;
        a.catch(|a| {
            a.xor(cx, cx)?;
            a.div(cx)
        })?;
        a.catch(|a| a.ud2())?;
        a.say(".")
    })
}

fn protected_mode(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.say("P")?;
        a.int3()?;
        a.catch(|a| a.ud2())?;
        a.mov(ecx, 0x68u32)?;
        a.catch(|a| a.mov(ds, ecx))?;
        a.say(".")
    })
}

fn long_mode(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.say("L")?;
        a.int3()?;
        a.catch(|a| a.ud2())?;
        a.mov(ecx, 0x40_0000u32)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.say(".")
    })
}

/// 16-bit code that clears CR0.PE and jumps to real mode at `next`.
fn to_real(a: &mut Asm, next: usize) -> Emit {
    a.mov(eax, cr0)?;
    a.and(al, 0xfe)?;
    a.mov(cr0, eax)?;
    a.jmp_far((PAYLOAD >> 4) as u16, next as u32, 2)
}

fn load_data(a: &mut Asm, selector: u16) -> Emit {
    a.mov(eax, selector as u32)?;
    [ds, es, ss].into_iter().try_for_each(|s| a.mov(s, eax))
}

fn real_and_back(image: &mut Image) -> Result<(), BuildError> {
    image.put(EXTRA + 0xf00, &[0xff, 0x03, 0, 0, 0, 0]);
    image.protected(|a| {
        a.say("P")?;
        a.jmp_far(CODE16, EXTRA as u32, 4)
    })?;
    image.code(16, EXTRA, |a| {
        load_data(a, DATA16)?;
        to_real(a, EXTRA + 0x100)
    })?;
    image.code(16, EXTRA + 0x100, |a| {
        load_data(a, 0)?;
        a.mov(sp, STACK16)?;
        a.mov(word_ptr(0x21 * 4), (STUBS16 + 0x21 * STUB16_BYTES) as u32)?;
        a.mov(word_ptr(0x21 * 4 + 2), PAYLOAD >> 4)?;
        a.lidt(fword_ptr(EXTRA as u32 + 0xf00).cs())?;
        a.say("R")?;
        a.int(0x21)?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.jmp_far(CODE32, at(EXTRA + 0x200), 4)
    })?;
    image.code(32, EXTRA + 0x200, |a| {
        load_data(a, DATA0)?;
        a.mov(esp, STACK)?;
        a.lidt(fword_ptr(at(POINTERS) + 16))?;
        a.say("P")?;
        a.int3()?;
        a.say(".")?;
        a.stop()
    })
}

fn big_real(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.mov(dword_ptr(0x20_0000), 0x55aa_55aau32)?;
        a.jmp_far(CODE16, EXTRA as u32, 4)
    })?;
    image.code(16, EXTRA, |a| to_real(a, EXTRA + 0x100))?;
    image.code(16, EXTRA + 0x100, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(sp, STACK16)?;
        a.mov(ebx, 0x20_0000u32)?;
        a.mov(ecx, dword_ptr(ebx))?;
        a.show(ecx)?;
        a.say(".")?;
        a.stop()
    })
}

fn real_limit(image: &mut Image) -> Result<(), BuildError> {
    image.real(|a| {
        a.mov(bx, 0xffff)?;
        a.catch(|a| a.mov(cx, word_ptr(bx)))?;
        a.mov(bp, 0xffff)?;
        a.catch(|a| a.mov(cx, word_ptr(bp)))?;
        a.say(".")
    })
}

fn compatibility_mode(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.say("L")?;
        a.push(CODE32 as i32)?;
        a.push(at(EXTRA) as i32)?;
        a.retfq()
    })?;
    image.code(32, EXTRA, |a| {
        a.say("C")?;
        a.mov(ecx, 0x1_0000u32)?;
        a.db(&[0x49])?; // DEC ECX, in 64-bit code a prefix
        a.nop()?;
        a.show(ecx)?;
        a.int3()?;
        a.jmp_far(CODE64, at(EXTRA + 0x100), 4)
    })?;
    image.code(64, EXTRA + 0x100, |a| {
        a.say("L")?;
        a.mov(rcx, 0x1_0000_0000u64)?;
        a.shr(rcx, 32u32)?;
        a.show(ecx)?;
        a.say(".")?;
        a.stop()
    })
}

fn leave_long_mode(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.say("L")?;
        a.mov(ecx, x86::msr::EFER)?;
        a.rdmsr()?;
        a.and(eax, 0x500u32)?; // LMA, LME
        a.mov(ecx, eax)?;
        a.show(ecx)?;
        a.push(CODE32 as i32)?;
        a.push(at(EXTRA) as i32)?;
        a.retfq()
    })?;
    image.code(32, EXTRA, |a| {
        load_data(a, DATA0)?;
        a.mov(eax, cr0)?;
        a.and(eax, 0x7fff_ffffu32)?;
        a.mov(cr0, eax)?;
        a.wrmsr_to(x86::msr::EFER, 0)?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        a.say("P")?;
        a.show(ebx)?;
        a.lidt(fword_ptr(at(POINTERS) + 16))?;
        a.int3()?;
        a.say(".")?;
        a.stop()
    })
}

/// IRET to virtual-8086 mode at payload offset `code` with these flags and DS = 0x5000.
fn enter_v86(a: &mut Asm, code: usize, flags: u32) -> Emit {
    for word in [0, 0, 0x5000, 0, 0x3000, 0x8000, flags | 1 << 17 | 2, PAYLOAD >> 4, code as u32] {
        a.push(word as i32)?;
    }
    a.iretd()
}

fn v86_mode(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(0x21, crate::gate(14, CODE32, at(STUBS32 + 0x21 * STUB_BYTES), 3));
    image.protected(|a| {
        a.catch(|a| enter_v86(a, EXTRA, 0x3000))?;
        a.movzx(ecx, byte_ptr(0x5_0010))?;
        a.hex(ecx, 2)?;
        a.say(" .")
    })?;
    image.code(16, EXTRA, |a| {
        a.mov(bx, 0x10)?; // 3 bytes
        a.mov(byte_ptr(bx), 0x5a)?; // 3
        a.nop()?;
        a.nop()?;
        a.int(0x21)?; // ends at 0x0a
        a.hlt()
    })
}

fn v86_iopl(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(3, crate::gate(14, CODE32, at(STUBS32 + 3 * STUB_BYTES), 3));
    image.protected(|a| {
        for code in [0x000, 0x100, 0x200, 0x300] {
            a.catch(|a| enter_v86(a, EXTRA + code, 0))?;
        }
        a.say(".")
    })?;
    image.code(16, EXTRA, |a| a.cli())?;
    image.code(16, EXTRA + 0x100, |a| a.pushf())?;
    image.code(16, EXTRA + 0x200, |a| a.int(0x21))?;
    // INT3 is not sensitive to IOPL.
    image.code(16, EXTRA + 0x300, |a| a.int3())
}

fn v86_io(image: &mut Image) -> Result<(), BuildError> {
    super::rings::open_ports(image, &[PORT_OUT]);
    image.protected(|a| {
        a.catch(|a| enter_v86(a, EXTRA, 0x3000))?;
        a.say(".")
    })?;
    image.code(16, EXTRA, |a| {
        a.say("V")?; // 6 bytes
        a.in_(al, 0x10)
    })
}
