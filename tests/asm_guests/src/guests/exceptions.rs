//! Exceptions and how they escalate.

use iced_x86::code_asm::*;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image, gate};
use crate::layout::*;
use crate::suite::{End, Guest, Peer};

/// Descriptors that are wrong in one way each.
const ABSENT_DATA: u16 = OWN;
const EXECUTE_ONLY: u16 = OWN + 8;
const ABSENT_CODE: u16 = OWN + 16;

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "divide_error",
            "#DE by zero and by overflow, operands unchanged (SDM 3A 6.15)",
            "[00+02][00+02][00+02]80000000 .",
            divide_error,
        ),
        Guest::new(
            "selector_faults",
            "#NP, #SS, #GP of segment register loads (SDM 3A 5.6, 6.15)",
            "[0b 0068+02][0c 0068+02][0d 0000+02][0d 0030+02][0d 0070+02][0d 0204+02][0d 0300+02].",
            selector_faults,
        ),
        Guest::new(
            "null_segment",
            "an access through a null selector is #GP(0) (SDM 3A 3.4.2)",
            "[0d 0000+02].",
            null_segment,
        )
        .on_qemu(super::no_limits("-."))
        .on_kvm(super::no_limits("-.")),
        Guest::new(
            "code_faults",
            "far jumps to data, null and absent segments; LTR, LLDT (SDM 3A 5.8.1)",
            "[0d 0010+02][0d 0000+02][0b 0078+02][0d 0040+02][0d 0008+02].",
            code_faults,
        ),
        Guest::new(
            "gate_faults",
            "absent, wrong and dangling gates; beyond the IDT (SDM 3A 6.12)",
            "[0b 0202+02][0d 020a+02][0d 0000+02][0d 0010+02][0b 0078+02][0d 07fa+02].",
            gate_faults,
        ),
        super::emulated(
            Guest::new(
                "invalid_tss",
                "#TS, #SS for the stack of an inner level (SDM 3A 6.15)",
                "[0a 0010u00][0a 0000u00][0c 0080u00].",
                invalid_tss,
            ),
            "[0a 0010u00][0a 0000u00][0a 0080u00].",
            "QEMU's processor raises #TS for an absent stack",
        ),
        Guest::new(
            "double_fault",
            "a contributory exception while delivering one; a benign first one (SDM 3A 6.15)",
            "[0b 0033+02][08 0000+02].",
            double_fault,
        )
        .on_qemu(no_ext())
        .on_kvm(no_ext()),
        Guest::new(
            "double_fault_64",
            "a page fault while delivering a page fault, on an IST stack (SDM 3A 6.15)",
            "[08 0000+07].",
            double_fault_64,
        ),
        Guest::new(
            "triple_fault",
            "an exception with no IDT, and none for its faults: shutdown (SDM 3A 6.15)",
            "T",
            triple_fault,
        )
        .ends(End::TripleFault),
        Guest::new(
            "overflow_bound",
            "INTO is a trap, BOUND a fault (SDM 3A 6.15)",
            "[04+07]-[05+02]-[05+02].",
            overflow_bound,
        ),
        Guest::new(
            "undefined",
            "LOCK where it must not be, instructions that 64-bit mode lacks, length (SDM 3A 6.15)",
            "[06+02][06+02][06+02][06+02]-[0d 0000+02].",
            undefined,
        ),
        super::emulated(
            Guest::new(
                "step_repeat",
                "TF: a repeated string instruction is left after each element (SDM 3B 17.3.1.4)",
                "[01]09 [01]09 [01]0b [01]0c [01]13 [01]14 .",
                step_repeat,
            ),
            "[01]09 [01]09 [01]09 [01]0b [01]0c [01]13 [01]14 .",
            "QEMU's processor looks at the count once more behind the last element",
        ),
        Guest::new(
            "step_interrupt",
            "INT n clears TF and has no trap of its own, IRET brings TF back (SDM 3B 17.3.1.4)",
            "[30]?0b [01]0c [01]0d [01]14 [01]15 .",
            step_interrupt,
        ),
        super::emulated(
            Guest::new(
                "alignment_check",
                "#AC in ring 3 with CR0.AM and EFLAGS.AC (SDM 3A 6.15)",
                "[0d 0000u0a][11 0000u05][0d 0000u0a].",
                alignment_check,
            ),
            "[0d 0000u0a][0d 0000u0a][0d 0000u0a].",
            "QEMU's processor checks no alignment",
        ),
        super::emulated(
            Guest::new(
                "segment_limits",
                "limits, expand-down, read-only and code segments (SDM 3A 5.3)",
                "-[0d 0000+02]-[0d 0000+02]-[0d 0000+02][0d 0000+02].",
                segment_limits,
            ),
            "-------.",
            "QEMU's processor checks neither limits nor rights of segments",
        ),
        Guest::new(
            "single_step",
            "TF: #DB after each instruction that began with it, DR6.BS (SDM 3B 17.3.1.4)",
            "[01]0b [01]0d [01]0e [01]15 [01]16 [01+03].",
            single_step,
        ),
        Guest::new(
            "step_mov_ss",
            "MOV SS holds a single-step trap back by one instruction (SDM 3A 6.8.3)",
            "[01]0d [01]0e [01]15 [01]16 .",
            step_mov_ss,
        ),
        super::emulated(
            Guest::new(
                "fpu_faults",
                "#NM and #UD by CR0.TS, CR0.EM, CR4.OSFXSR; #MF; #XM (SDM 3A 2.5, 6.15)",
                "[07+02][07+02]-[07+02][06+02][06+02][10+02][13+02][06+02].",
                fpu_faults,
            ),
            "[07+02][07+02]-[07+02][06+02][06+02][10+02]--.",
            "QEMU's processor has no #XM",
        ),
    ]
}

const fn no_ext() -> Peer {
    let why = "QEMU's processor leaves EXT clear in the error code of a fault while it delivers another";
    Peer::Differs { output: "[0b 0032+02][08 0000+02].", why }
}

fn divide_error(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.xor(ecx, ecx)?;
        a.mov(eax, 0x8000_0000u32)?;
        a.catch(|a| a.div(ecx))?;
        a.mov(eax, 0x8000_0000u32)?;
        a.cdq()?;
        a.mov(ecx, -1)?;
        a.catch(|a| a.idiv(ecx))?;
        a.mov(ax, 0x100)?;
        a.mov(cl, 1)?;
        a.catch(|a| a.div(cl))?;
        a.mov(eax, 0x8000_0000u32)?;
        a.mov(ecx, eax)?;
        a.show(ecx)?;
        a.say(".")
    })
}

fn wrong_descriptors(image: &mut Image) {
    image.gdt(ABSENT_DATA, 0x00cf_1300_0000_ffff);
    image.gdt(EXECUTE_ONLY, 0x00cf_9900_0000_ffff);
    image.gdt(ABSENT_CODE, 0x00cf_1b00_0000_ffff);
}

fn selector_faults(image: &mut Image) -> Result<(), BuildError> {
    wrong_descriptors(image);
    image.protected(|a| {
        for (segment, selector) in [
            (ds, ABSENT_DATA),
            (ss, ABSENT_DATA),
            (ss, 0),
            (ss, DATA_USER),
            (ds, EXECUTE_ONLY),
            (ds, 0x204), // in the LDT, which there is none
            (ds, 0x300), // beyond the GDT
        ] {
            a.mov(ecx, selector as u32)?;
            a.catch(|a| a.mov(segment, ecx))?;
        }
        a.say(".")
    })
}

fn null_segment(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.xor(ecx, ecx)?;
        a.mov(es, ecx)?;
        a.catch(|a| a.mov(cl, byte_ptr(SCRATCH).es()))?;
        a.say(".")
    })
}

fn code_faults(image: &mut Image) -> Result<(), BuildError> {
    wrong_descriptors(image);
    image.protected(|a| {
        for selector in [DATA0, 0, ABSENT_CODE] {
            a.catch(|a| a.jmp_far(selector, at(EXTRA), 4))?;
        }
        a.mov(ecx, TASK32 as u32)?;
        a.catch(|a| a.ltr(ecx))?; // busy
        a.mov(ecx, CODE32 as u32)?;
        a.catch(|a| a.lldt(ecx))?;
        a.say(".")
    })
}

fn gate_faults(image: &mut Image) -> Result<(), BuildError> {
    wrong_descriptors(image);
    let target = at(EXTRA);
    image.gate32(0x40, gate(14, CODE32, target, 0) & !(1 << 47));
    image.gate32(0x41, gate(9, CODE32, target, 0));
    image.gate32(0x42, gate(14, 0, target, 0));
    image.gate32(0x43, gate(14, DATA0, target, 0));
    image.gate32(0x44, gate(14, ABSENT_CODE, target, 0));
    image.put(POINTERS + 16, &0x7f7u16.to_le_bytes());
    image.protected(|a| {
        for vector in [0x40, 0x41, 0x42, 0x43, 0x44, 0xff] {
            a.catch(|a| a.int(vector))?;
        }
        a.say(".")
    })
}

fn invalid_tss(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, 0x00cf_bb00_0000_ffff); // code of ring 1
    image.gdt(OWN + 24, 0x00cf_3300_0000_ffff); // data of ring 1, absent
    image.gate32(0x45, gate(14, OWN, at(EXTRA), 3));
    image.protected(|a| {
        for selector in [DATA0, 0, (OWN + 24) | 1] {
            a.mov(word_ptr(at(TSS32) + 16), selector as u32)?; // SS1
            a.catch(|a| a.enter_user(0))?;
        }
        a.say(".")
    })?;
    image.code(32, USER, |a| a.int(0x45))
}

fn double_fault(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(6, gate(14, CODE32, at(EXTRA), 0) & !(1 << 47));
    image.gate32(13, gate(14, CODE32, at(EXTRA), 0) & !(1 << 47));
    image.protected(|a| {
        a.catch(|a| a.ud2())?;
        a.mov(ecx, 0x300u32)?;
        a.catch(|a| a.mov(ds, ecx))?;
        a.say(".")
    })
}

fn double_fault_64(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(8, gate(14, CODE64, at(STUBS64 + 8 * STUB_BYTES), 0) | 1 << 32);
    image.long(|a| {
        a.catch(|a| {
            a.mov(esp, 0x40_0000u32)?; // 5 bytes; nothing is mapped there
            a.push(rax)
        })?;
        a.say(".")
    })
}

fn triple_fault(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.say("T")?;
        a.lidt(fword_ptr(SCRATCH))?;
        a.int3()
    })
}

fn overflow_bound(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.catch(|a| {
            a.mov(al, 0x7f)?;
            a.add(al, 1)?;
            a.db(&[0xce]) // INTO
        })?;
        a.catch(|a| {
            a.xor(eax, eax)?;
            a.db(&[0xce]) // INTO
        })?;
        a.mov(dword_ptr(SCRATCH), 5u32)?;
        a.mov(dword_ptr(SCRATCH + 4), 10u32)?;
        for index in [11, 5, -1] {
            a.mov(ecx, index)?;
            a.catch(|a| a.bound(ecx, dword_ptr(SCRATCH)))?;
        }
        a.say(".")
    })
}

fn undefined(image: &mut Image) -> Result<(), BuildError> {
    let mut longest = [0x66; 16];
    longest[15] = 0x90;
    image.long(|a| {
        a.catch(|a| a.db(&[0xf0, 0xff, 0xc0]))?; // LOCK INC EAX
        a.catch(|a| a.db(&[0xf0, 0x89, 0x01]))?; // LOCK MOV [RCX], EAX
        a.catch(|a| a.db(&[0x06]))?; // PUSH ES
        a.catch(|a| a.db(&[0x62, 0x00]))?; // BOUND
        a.catch(|a| a.db(&longest[1..]))?; // 15 bytes
        a.catch(|a| a.db(&longest))?;
        a.say(".")
    })
}

/// Prints where the trap was, from R12.
fn trap_hook(image: &mut Image) -> Result<(), BuildError> {
    image.code(64, EXTRA, |a| {
        let mut stepped = a.create_label();
        a.mov(rax, dr6)?;
        a.bt(eax, 14u32)?;
        a.jb(stepped)?;
        a.say("?")?;
        a.set_label(&mut stepped)?;
        a.xor(eax, eax)?;
        a.mov(dr6, rax)?;
        a.mov(ecx, dword_ptr(rbx + 16))?;
        a.sub(ecx, r12d)?;
        a.hex(ecx, 2)?;
        a.say(" ")?;
        a.ret()
    })
}

/// Code of 9 bytes after which TF is set, R12 pointing to its start.
fn set_tf(a: &mut Asm) -> Emit {
    let mut start = a.create_label();
    a.lea(r12, ptr(start))?;
    a.set_label(&mut start)?;
    a.pushfq()?;
    a.or(dword_ptr(rsp), 0x100)?;
    a.popfq()
}

/// Code of 9 bytes that clears it.
fn clear_tf(a: &mut Asm) -> Emit {
    a.pushfq()?;
    a.and(dword_ptr(rsp), !0x100)?;
    a.popfq()
}

fn single_step(image: &mut Image) -> Result<(), BuildError> {
    trap_hook(image)?;
    image.long(|a| {
        a.hook()?;
        set_tf(a)?;
        a.inc(eax)?;
        a.inc(eax)?;
        clear_tf(a)?;
        a.catch(|a| a.int1())?;
        a.say(".")
    })
}

fn step_mov_ss(image: &mut Image) -> Result<(), BuildError> {
    trap_hook(image)?;
    image.long(|a| {
        a.hook()?;
        a.mov(eax, DATA0 as u32)?;
        set_tf(a)?;
        a.mov(ss, eax)?; // ends at 0x0b
        a.inc(ecx)?; // 0x0d
        clear_tf(a)?;
        a.say(".")
    })
}

fn step_repeat(image: &mut Image) -> Result<(), BuildError> {
    trap_hook(image)?;
    image.long(|a| {
        a.hook()?;
        a.mov(edi, DATA)?;
        a.mov(ecx, 3)?;
        set_tf(a)?;
        a.rep().stosb()?; // 2 bytes
        clear_tf(a)?;
        a.say(".")
    })
}

fn step_interrupt(image: &mut Image) -> Result<(), BuildError> {
    trap_hook(image)?;
    image.long(|a| {
        a.hook()?;
        set_tf(a)?;
        a.int(0x30)?; // 2 bytes
        a.nop()?;
        clear_tf(a)?;
        a.say(".")
    })
}

fn alignment_check(image: &mut Image) -> Result<(), BuildError> {
    const AC: u32 = 1 << 18;
    image.long(|a| {
        a.catch(|a| a.enter_user_at(0x100, AC))?;
        a.set_cr0(1 << 18)?; // AM
        a.catch(|a| a.enter_user_at(0x100, AC))?;
        a.catch(|a| a.enter_user_at(0x200, AC))?;
        a.say(".")
    })?;
    for (offset, distance) in [(0x100, 4), (0x200, 3)] {
        image.code(64, USER + offset, |a| {
            a.mov(ecx, USER_DATA + 1)?; // 5 bytes
            a.mov(edx, dword_ptr(rcx + distance))?; // 3
            a.mov(dl, byte_ptr(rcx))?; // 2
            a.hlt()
        })?;
    }
    Ok(())
}

fn segment_limits(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, 0x0040_9305_0000_0fff); // 4 KiB at DATA
    image.gdt(OWN + 8, 0x0040_9705_0000_0fff); // all but the first 4 KiB there
    image.gdt(OWN + 16, 0x0040_9105_0000_0fff); // read-only
    image.protected(|a| {
        for (segment, offset, write) in [
            (OWN, 0xffc, false),
            (OWN, 0xffd, false),
            (OWN + 8, 0x1000, false),
            (OWN + 8, 0xfff, false),
            (OWN + 16, 0, false),
            (OWN + 16, 0, true),
            (CODE32, 0, true),
        ] {
            a.mov(ecx, segment as u32)?;
            a.mov(es, ecx)?;
            a.mov(ecx, offset)?;
            a.catch(|a| match write {
                true => a.mov(dword_ptr(ecx).es(), eax),
                false => a.mov(eax, dword_ptr(ecx).es()),
            })?;
        }
        a.say(".")
    })
}

fn fpu_faults(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.set_cr4(1 << 9 | 1 << 10)?; // OSFXSR, OSXMMEXCPT
        a.set_cr0(1 << 3)?; // TS
        a.catch(|a| a.fninit())?;
        a.catch(|a| a.movaps(xmm0, xmm0))?;
        a.clts()?;
        a.catch(|a| a.fninit())?;
        a.set_cr0(1 << 2)?; // EM
        a.catch(|a| a.fld1())?;
        a.catch(|a| a.movaps(xmm0, xmm0))?;
        a.clear_cr0(1 << 2)?;
        a.clear_cr4(1 << 9)?;
        a.catch(|a| a.movaps(xmm0, xmm0))?;
        a.set_cr4(1 << 9)?;
        a.set_cr0(1 << 5)?; // NE
        a.mov(dword_ptr(SCRATCH), 0x037b)?; // division by zero is not masked
        a.fninit()?;
        a.fldcw(word_ptr(SCRATCH))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.catch(|a| a.wait())?;
        a.fnclex()?;
        a.mov(dword_ptr(SCRATCH), 0x1d80)?; // likewise
        a.ldmxcsr(dword_ptr(SCRATCH))?;
        a.mov(ecx, 1)?;
        a.cvtsi2ss(xmm0, ecx)?;
        a.xorps(xmm1, xmm1)?;
        a.catch(|a| a.divss(xmm0, xmm1))?;
        a.clear_cr4(1 << 10)?;
        a.catch(|a| a.divss(xmm0, xmm1))?;
        a.say(".")
    })
}
