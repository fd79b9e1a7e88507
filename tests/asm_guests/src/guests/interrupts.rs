//! Interrupts: windows, the local APIC, its timer, the 8259, NMI.

use iced_x86::code_asm::*;
use x86::msr;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image};
use crate::layout::*;
use crate::suite::{Guest, Need, Peer};

const X2APIC: Need = Need { name: "x2APIC", leaf: 1, word: 2, bit: 21 };
const TSC_DEADLINE: Need = Need { name: "TSC deadline timer", leaf: 1, word: 2, bit: 24 };

/// Registers of the local APIC.
const APIC: u32 = 0xfee0_0000;
const TPR: u32 = 0x80;
const EOI: u32 = 0xb0;
const SVR: u32 = 0xf0;
const IRR2: u32 = 0x220;
const ISR3: u32 = 0x130;
const ICR: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
/// ICR: to itself.
const SELF: u32 = 0x4_0000;

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "sti_window",
            "STI lets one more instruction through, POPF none, CLI closes in time (SDM 2B STI)",
            "[40]00000001 -[41]00000003 [42]00000003 .",
            sti_window,
        ),
        Guest::new("hlt", "HLT ends with an interrupt, which returns behind it (SDM 2A HLT)", "a[40]b", hlt),
        Guest::new(
            "extint",
            "the 8259's vector comes through LINT0, past IRR and ISR (SDM 3A 11.5.1)",
            "a[51]b[52]c[53]00000000 -[54].",
            extint,
        )
        .on_qemu(Peer::Skipped("it needs the engine's test port")),
        Guest::new(
            "tpr_and_cr8",
            "TPR and CR8 hold an interrupt back in IRR (SDM 3A 11.8.3, 11.8.6)",
            "00010000 -[50]00000050 00000005 -[51]00000004 .",
            tpr_and_cr8,
        ),
        Guest::new(
            "apic_priority",
            "the higher class first; a lower one waits for EOI (SDM 3A 11.8.3)",
            "[61]00000002 -[41].",
            apic_priority,
        ),
        Guest::new(
            "apic_timer",
            "one-shot and periodic timer, current count, mask (SDM 3A 11.5.4)",
            "r[40]00000000 [41][41][41]m.",
            apic_timer,
        ),
        Guest::new(
            "tsc_deadline",
            "the timer fires at a TSC value, past ones at once (SDM 3A 11.5.4.1)",
            "[44]00000000 [44]00000000 .",
            tsc_deadline,
        )
        .needs(&[TSC_DEADLINE])
        .on_qemu(Peer::Skipped("QEMU's APIC has no such timer")),
        Guest::new(
            "x2apic",
            "registers as MSRs, self IPI, what raises #GP (SDM 3A 11.12)",
            "00000000 00000001 [40][41][0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02].",
            x2apic,
        )
        .needs(&[X2APIC])
        .on_qemu(Peer::Differs {
            output: "00000000 00000001 [40][41]-[0d 0000+02][0d 0000+02][0d 0000+02].",
            why: "QEMU's APIC takes any value as an end of interrupt",
        })
        .on_kvm(Peer::Differs {
            output: "00000000 00000001 [40][41]-[0d 0000+02][0d 0000+02][0d 0000+02].",
            why: "KVM takes any value as an end of interrupt",
        }),
        Guest::new("nmi", "an NMI in an NMI handler waits for IRET (SDM 3A 6.7.1)", "[02]ab[02]c.", nmi),
    ]
}

/// Writes an APIC register. Changes RDI.
fn write(a: &mut Asm, register: u32, value: u32) -> Emit {
    a.mov(edi, APIC)?;
    a.mov(dword_ptr(rdi + register), value)
}
/// Reads one into ECX, likewise.
fn read(a: &mut Asm, register: u32) -> Emit {
    a.mov(edi, APIC)?;
    a.mov(ecx, dword_ptr(rdi + register))
}

/// A guest with the APIC on, whose handlers end the interrupt after `hook`. The hook may use RAX to RDX.
fn with_apic(
    image: &mut Image,
    hook: impl FnOnce(&mut Asm) -> Emit,
    body: impl FnOnce(&mut Asm) -> Emit,
) -> Result<(), BuildError> {
    image.code(64, EXTRA, |a| {
        hook(a)?;
        a.mov(ecx, APIC)?;
        a.mov(dword_ptr(rcx + EOI), 0)?;
        a.ret()
    })?;
    image.long(|a| {
        a.hook()?;
        a.xor(r12d, r12d)?;
        write(a, SVR, 0x1ff)?;
        body(a)
    })
}

fn sti_window(image: &mut Image) -> Result<(), BuildError> {
    with_apic(
        image,
        |a| {
            a.mov(ecx, r12d)?;
            a.show(ecx)
        },
        |a| {
            write(a, ICR, SELF | 0x40)?;
            a.sti()?;
            a.inc(r12d)?;
            a.inc(r12d)?;
            a.cli()?;
            write(a, ICR, SELF | 0x41)?;
            a.sti()?;
            a.cli()?;
            a.say("-")?;
            a.sti()?;
            a.inc(r12d)?;
            a.cli()?;
            write(a, ICR, SELF | 0x42)?;
            a.pushfq()?;
            a.or(dword_ptr(rsp), 0x200)?;
            a.popfq()?;
            a.inc(r12d)?;
            a.cli()?;
            a.say(".")
        },
    )
}

fn hlt(image: &mut Image) -> Result<(), BuildError> {
    with_apic(
        image,
        |_| Ok(()),
        |a| {
            a.say("a")?;
            write(a, LVT_TIMER, 0x40)?;
            write(a, DIVIDE, 0xb)?;
            write(a, INITIAL_COUNT, 5_000_000)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            a.say("b")
        },
    )
}

fn extint(image: &mut Image) -> Result<(), BuildError> {
    let raise = |a: &mut Asm, vector: u32| {
        a.mov(dx, PORT_EXTINT as u32)?;
        a.mov(al, vector)?;
        a.out(dx, al)
    };
    image.long(|a| {
        write(a, SVR, 0x1ff)?;
        write(a, LVT_LINT0, 0x700)?;
        raise(a, 0x51)?;
        a.say("a")?;
        a.sti()?;
        a.nop()?;
        a.say("b")?;
        raise(a, 0x52)?;
        a.nop()?;
        a.cli()?;
        a.say("c")?;
        raise(a, 0x53)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        read(a, 0x120)?; // ISR, vectors 64 to 95
        a.show(ecx)?;
        write(a, LVT_LINT0, 0x1_0700)?;
        raise(a, 0x54)?;
        a.sti()?;
        a.nop()?;
        a.say("-")?;
        write(a, LVT_LINT0, 0x700)?;
        a.nop()?;
        a.cli()?;
        a.say(".")
    })
}

fn tpr_and_cr8(image: &mut Image) -> Result<(), BuildError> {
    with_apic(
        image,
        |_| Ok(()),
        |a| {
            a.sti()?;
            write(a, TPR, 0x50)?;
            write(a, ICR, SELF | 0x50)?;
            a.nop()?;
            read(a, IRR2)?;
            a.show(ecx)?;
            a.say("-")?;
            write(a, TPR, 0x40)?;
            a.nop()?;
            a.mov(ecx, 5)?;
            a.mov(cr8, rcx)?;
            read(a, TPR)?;
            a.show(ecx)?;
            a.mov(rcx, cr8)?;
            a.show(ecx)?;
            write(a, ICR, SELF | 0x51)?;
            a.nop()?;
            a.say("-")?;
            a.mov(ecx, 4)?;
            a.mov(cr8, rcx)?;
            a.nop()?;
            a.mov(rcx, cr8)?;
            a.show(ecx)?;
            a.cli()?;
            a.say(".")
        },
    )
}

fn apic_priority(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        write(a, SVR, 0x1ff)?;
        write(a, ICR, SELF | 0x41)?;
        write(a, ICR, SELF | 0x61)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        read(a, ISR3)?; // vectors 96 to 127
        a.show(ecx)?;
        a.say("-")?;
        write(a, EOI, 0)?;
        a.nop()?;
        a.cli()?;
        a.say(".")
    })
}

fn apic_timer(image: &mut Image) -> Result<(), BuildError> {
    with_apic(
        image,
        |a| {
            // Three are enough: the third masks the timer.
            let mut more = a.create_label();
            a.inc(r12d)?;
            a.cmp(r12d, 4)?;
            a.jb(more)?;
            a.mov(ecx, APIC)?;
            a.mov(dword_ptr(rcx + LVT_TIMER), 0x3_0041)?;
            a.set_label(&mut more)?;
            a.zero_bytes()
        },
        |a| {
            let (mut stands, mut again) = (a.create_label(), a.create_label());
            write(a, DIVIDE, 0xb)?;
            write(a, LVT_TIMER, 0x40)?;
            write(a, INITIAL_COUNT, 20_000_000)?;
            read(a, CURRENT_COUNT)?;
            a.dec(ecx)?;
            a.cmp(ecx, 20_000_000)?;
            a.jae(stands)?;
            a.say("r")?;
            a.set_label(&mut stands)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            read(a, CURRENT_COUNT)?;
            a.show(ecx)?;
            write(a, LVT_TIMER, 0x2_0041)?;
            write(a, INITIAL_COUNT, 10_000_000)?;
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            a.cmp(r12d, 4)?;
            a.jb(again)?;
            a.say("m.")
        },
    )
}

fn tsc_deadline(image: &mut Image) -> Result<(), BuildError> {
    with_apic(
        image,
        |_| Ok(()),
        |a| {
            write(a, LVT_TIMER, 0x4_0044)?;
            for later in [3_000_000u32, 0] {
                a.rdtsc()?;
                a.shl(rdx, 32u32)?;
                a.or(rax, rdx)?;
                a.add(rax, later as i32)?;
                a.mov(rdx, rax)?;
                a.shr(rdx, 32u32)?;
                a.mov(ecx, msr::TSC_DEADLINE)?;
                a.wrmsr()?;
                a.sti()?;
                a.hlt()?;
                a.cli()?;
                a.mov(ecx, msr::TSC_DEADLINE)?;
                a.rdmsr()?;
                a.mov(ecx, eax)?;
                a.show(ecx)?;
            }
            a.say(".")
        },
    )
}

fn x2apic(image: &mut Image) -> Result<(), BuildError> {
    let register = |mmio: u32| msr::X2APIC_FIRST + mmio / 16;
    image.code(64, EXTRA, |a| {
        a.wrmsr_to(register(EOI), 0)?;
        a.ret()
    })?;
    image.long(|a| {
        a.hook()?;
        a.wrmsr_to(msr::APIC_BASE, 0xfee0_0d00)?;
        a.wrmsr_to(register(SVR), 0x1ff)?;
        for name in [0x20, 0xd0] {
            a.mov(ecx, register(name))?;
            a.rdmsr()?;
            a.mov(ecx, eax)?;
            a.show(ecx)?;
        }
        a.sti()?;
        a.wrmsr_to(register(0x3f0), 0x40)?; // SELF IPI
        a.nop()?;
        a.wrmsr_to(register(ICR), (SELF | 0x41) as u64)?;
        a.nop()?;
        a.cli()?;
        for (name, value) in [
            (register(EOI), 1),               // only 0
            (register(0x20), 0),              // read-only
            (msr::APIC_BASE, 0xfee0_0900u32), // straight back to xAPIC
        ] {
            a.mov(ecx, name)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.catch(|a| a.wrmsr())?;
        }
        a.mov(ecx, register(0xe0))?; // no DFR
        a.catch(|a| a.rdmsr())?;
        a.say(".")
    })
}

fn nmi(image: &mut Image) -> Result<(), BuildError> {
    const NMI: u32 = 0x400;
    image.code(64, EXTRA, |a| {
        let (mut second, mut end) = (a.create_label(), a.create_label());
        a.inc(r12d)?;
        a.cmp(r12d, 1)?;
        a.jne(second)?;
        a.say("a")?;
        a.mov(ecx, APIC)?;
        a.mov(dword_ptr(rcx + ICR_HIGH), 0)?;
        a.mov(dword_ptr(rcx + ICR), NMI)?;
        a.nop()?;
        a.say("b")?;
        a.jmp(end)?;
        a.set_label(&mut second)?;
        a.say("c")?;
        a.set_label(&mut end)?;
        a.ret()
    })?;
    image.long(|a| {
        a.hook()?;
        a.xor(r12d, r12d)?;
        write(a, SVR, 0x1ff)?;
        write(a, ICR_HIGH, 0)?;
        write(a, ICR, NMI)?;
        a.nop()?;
        a.say(".")
    })
}
