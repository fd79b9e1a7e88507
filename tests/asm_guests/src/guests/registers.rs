//! Control registers, MSRs, CPUID, extended state.

use iced_x86::code_asm::*;
use x86::msr;

use crate::image::{BuildError, Image, system};
use crate::layout::*;
use crate::suite::{Guest, Need, Peer};

const AVX: Need = Need { name: "AVX", leaf: 1, word: 2, bit: 28 };
const FSGSBASE: Need = Need { name: "FSGSBASE", leaf: 7, word: 1, bit: 0 };
const CX16: Need = Need { name: "CMPXCHG16B", leaf: 1, word: 2, bit: 13 };

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "cpuid",
            "highest leaves, hypervisor bit and name, OSXSAVE follows CR4 (SDM 2A CPUID)",
            "11 80000000 4b4d564b 564b4d56 0000004d 00000000 08000000 .",
            cpuid,
        )
        .on_qemu(Peer::Differs {
            output: "11 80000000 54474354 43544743 47435447 00000000 08000000 .",
            why: "QEMU's own name",
        }),
        Guest::new(
            "msrs",
            "#GP for unknown MSRs and bad values; FS base, SWAPGS (SDM 2B RDMSR, WRMSR)",
            "[0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02]600dcafe 12345678 .",
            msrs,
        )
        .on_qemu(Peer::Differs {
            output: "------600dcafe 12345678 .",
            why: "QEMU's processor lets unknown MSRs and any value pass",
        })
        .on_kvm(Peer::Differs {
            output: "[0d 0000+02][0d 0000+02]-[0d 0000+02][0d 0000+02][0d 0000+02]600dcafe 12345678 .",
            why: "KVM leaves LSTAR to the processor, and QEMU's takes any value",
        }),
        Guest::new(
            "control_registers",
            "combinations and bits that raise #GP, registers that raise #UD (SDM 3A 2.5)",
            "[0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02][0d 0000+02][06+02][06+02]-[06+02].",
            control_registers,
        )
        .on_qemu(Peer::Skipped("QEMU's processor lets long mode lose PAE, and is lost"))
        .on_kvm(Peer::Differs {
            output: "[0d 0000+02][0d 0000+02]-[0d 0000+02][0d 0000+02][0d 0000+02][06+02][06+02]-[06+02].",
            why: "QEMU's processor drops the upper half of CR0",
        }),
        Guest::new(
            "xsave",
            "XGETBV, XSETBV, XSAVE and XRSTOR of all three components (SDM 1 13)",
            "[06+02]00000001 [0d 0000+02][0d 0000+02][0d 0000+02]00000007 00000007 0badcafe [0d 0000+02][0d 0000+02].",
            xsave,
        )
        .needs(&[AVX]),
        super::emulated(
            Guest::new(
                "fsgsbase",
                "WRGSBASE and RDFSBASE with and without CR4.FSGSBASE (SDM 2B)",
                "[06+02]600dcafe 00000001 [0d 0000+02].",
                fsgsbase,
            )
            .needs(&[FSGSBASE]),
            "[06+02]600dcafe 00000001 -.",
            "QEMU's processor takes any base",
        ),
        Guest::new("tsc", "CR4.TSD keeps RDTSC from ring 3; the counter counts (SDM 3B 17.17)", "+[0d 0000u00].", tsc),
        Guest::new(
            "cmpxchg16b",
            "CMPXCHG16B: exchange, failure, alignment (SDM 2A)",
            "1600dcafe 0600dcafe [0d 0000+02].",
            cmpxchg16b,
        )
        .needs(&[CX16]),
        Guest::new(
            "kvmclock",
            "the clock page of KVM's MSR: an even version, a multiplier (KVM's documentation, x86/msr)",
            "00000000 10.",
            kvmclock,
        )
        .on_qemu(Peer::Skipped("QEMU offers it only under KVM")),
        Guest::new(
            "descriptor_queries",
            "LLDT, LAR, LSL, VERR, VERW (SDM 3A 5.10)",
            "00c0f300 ffffffff 10 11 01 0.",
            descriptor_queries,
        ),
        Guest::new(
            "flags_of_ring3",
            "POPF in ring 3 changes neither IOPL nor IF (SDM 2B POPF)",
            "[30u0e]00000206 [06u10].",
            flags_of_ring3,
        ),
    ]
}

/// Prints 1 if `condition` (a jump that is taken) holds.
macro_rules! flag {
    ($a:ident, $jump:ident) => {{
        let (mut yes, mut end) = ($a.create_label(), $a.create_label());
        $a.$jump(yes)?;
        $a.say("0")?;
        $a.jmp(end)?;
        $a.set_label(&mut yes)?;
        $a.say("1")?;
        $a.set_label(&mut end)?;
        $a.zero_bytes()?;
    }};
}

fn cpuid(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        for (leaf, least) in [(0, 0xd), (0x8000_0000u32, 0x8000_0008u32)] {
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.cmp(eax, least as i32)?;
            flag!(a, jae);
        }
        a.say(" ")?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.and(ecx, 0x8000_0000u32 as i32)?;
        a.show(ecx)?;
        a.mov(eax, 0x4000_0000)?;
        a.cpuid()?;
        a.mov(r12d, edx)?;
        a.show(ebx)?;
        a.show(ecx)?;
        a.show(r12d)?;
        for set in [false, true] {
            if set {
                a.set_cr4(1 << 18)?;
            }
            a.mov(eax, 1)?;
            a.cpuid()?;
            a.and(ecx, 1 << 27)?;
            a.show(ecx)?;
        }
        a.say(".")
    })
}

fn msrs(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(ecx, 0x1234_5678)?;
        a.catch(|a| a.rdmsr())?;
        for (register, value) in [
            (0x1234_5678u32, 0u64),
            (msr::LSTAR, 0x8000_0000_0000),
            (msr::EFER, 0xd02),
            (msr::EFER, 0x800), // LME with paging on
            (msr::PAT, 2),      // no such memory type
        ] {
            a.mov(ecx, register)?;
            a.mov(eax, value as u32)?;
            a.mov(edx, (value >> 32) as u32)?;
            a.catch(|a| a.wrmsr())?;
        }
        a.mov(dword_ptr(DATA + 8), 0x600d_cafeu32)?;
        a.wrmsr_to(msr::FS_BASE, DATA as u64)?;
        a.mov(ecx, dword_ptr(8).fs())?;
        a.show(ecx)?;
        a.wrmsr_to(msr::KERNEL_GS_BASE, 0x1234_5678)?;
        a.swapgs()?;
        a.mov(ecx, msr::GS_BASE)?;
        a.rdmsr()?;
        a.mov(ecx, eax)?;
        a.show(ecx)?;
        a.say(".")
    })
}

fn control_registers(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(rcx, cr0)?;
        a.and(ecx, !1)?; // PG without PE
        a.catch(|a| a.mov(cr0, rcx))?;
        a.mov(rcx, cr0)?;
        a.or(ecx, 1 << 29)?; // NW without CD
        a.and(ecx, !(1 << 30))?;
        a.catch(|a| a.mov(cr0, rcx))?;
        a.mov(rcx, cr0)?;
        a.bts(rcx, 32u32)?;
        a.catch(|a| a.mov(cr0, rcx))?;
        a.mov(rcx, cr4)?;
        a.bts(rcx, 31u32)?;
        a.catch(|a| a.mov(cr4, rcx))?;
        a.mov(rcx, cr4)?;
        a.and(ecx, !(1 << 5))?; // no PAE in long mode
        a.catch(|a| a.mov(cr4, rcx))?;
        a.mov(ecx, 16)?;
        a.catch(|a| a.mov(cr8, rcx))?;
        a.catch(|a| a.db(&[0x0f, 0x20, 0xc8]))?; // MOV RAX, CR1
        a.set_cr4(1 << 3)?; // DE
        a.catch(|a| a.db(&[0x0f, 0x21, 0xe0]))?; // MOV RAX, DR4
        a.clear_cr4(1 << 3)?;
        a.catch(|a| a.db(&[0x0f, 0x21, 0xe0]))?;
        a.catch(|a| a.db(&[0x0f, 0x22, 0xf8]))?; // MOV CR7, RAX
        a.say(".")
    })
}

fn xsave(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.xor(ecx, ecx)?;
        a.catch(|a| a.xgetbv())?;
        a.set_cr4(1 << 18 | 1 << 9)?; // OSXSAVE, OSFXSR
        a.xgetbv()?;
        a.mov(ebx, eax)?;
        a.show(ebx)?;
        for (register, value) in [(0, 6), (0, 5), (1, 1)] {
            a.mov(ecx, register)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.catch(|a| a.xsetbv())?;
        }
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        a.xgetbv()?;
        a.mov(ebx, eax)?;
        a.show(ebx)?;
        a.fninit()?;
        a.fld1()?;
        a.mov(dword_ptr(USER_DATA), 0x0bad_cafe)?;
        a.vbroadcastss(ymm3, dword_ptr(USER_DATA))?;
        a.mov(ebx, DATA)?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave(ptr(rbx))?;
        a.mov(ecx, dword_ptr(rbx + 512))?;
        a.show(ecx)?;
        a.vzeroall()?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xrstor(ptr(rbx))?;
        a.vextractf128(xmm0, ymm3, 1)?;
        a.movd(ecx, xmm0)?;
        a.show(ecx)?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.add(ebx, 32)?;
        a.catch(|a| a.xsave(ptr(rbx)))?; // not aligned
        a.sub(ebx, 32)?;
        a.mov(dword_ptr(rbx + 512 + 16), 1)?; // a reserved byte of the header
        a.catch(|a| a.xrstor(ptr(rbx)))?;
        a.say(".")
    })
}

fn fsgsbase(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(rcx, 0x1_0000_0000u64 | DATA as u64)?;
        a.catch(|a| a.wrfsbase(rcx))?;
        a.set_cr4(1 << 16)?;
        a.mov(dword_ptr(DATA), 0x600d_cafeu32)?;
        a.wrgsbase(ecx)?;
        a.mov(ebx, dword_ptr(0).gs())?;
        a.show(ebx)?;
        a.wrfsbase(rcx)?;
        a.rdfsbase(rbx)?;
        a.shr(rbx, 32u32)?;
        a.show(ebx)?;
        a.mov(rcx, 0x8000_0000_0000u64)?;
        a.catch(|a| a.wrfsbase(rcx))?;
        a.say(".")
    })
}

fn tsc(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        let mut stands = a.create_label();
        a.rdtsc()?;
        a.shl(rdx, 32u32)?;
        a.lea(r12, qword_ptr(rax + rdx))?;
        a.xor(eax, eax)?;
        a.cpuid()?; // changes RBX to RDX, and takes a while
        a.rdtsc()?;
        a.shl(rdx, 32u32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, r12)?;
        a.jbe(stands)?;
        a.say("+")?;
        a.set_label(&mut stands)?;
        a.set_cr4(1 << 2)?;
        a.rdtsc()?;
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| a.rdtsc())
}

fn cmpxchg16b(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(qword_ptr(DATA), 1)?;
        a.mov(qword_ptr(DATA + 8), 2)?;
        a.mov(edi, DATA)?;
        a.mov(ebx, 0x600d_cafeu32)?;
        a.mov(ecx, 3)?;
        for _ in 0..2 {
            // The first succeeds, and changes what the second compares with.
            a.mov(eax, 1)?;
            a.mov(edx, 2)?;
            a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
            flag!(a, je);
            a.mov(ebx, dword_ptr(DATA))?;
            a.hex(ebx, 8)?;
            a.say(" ")?;
            a.mov(ebx, 7)?;
        }
        a.add(edi, 8)?;
        a.catch(|a| a.lock().cmpxchg16b(xmmword_ptr(rdi)))?;
        a.say(".")
    })
}

fn descriptor_queries(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, system(2, at(EXTRA), 0xf));
    image.put(EXTRA + 8, &0x00cf_f200_0000_ffffu64.to_le_bytes()); // data of ring 3, not accessed
    image.gdt(OWN + 8, 0x00cf_9900_0000_ffff); // execute-only code
    image.protected(|a| {
        a.mov(ecx, OWN as u32)?;
        a.lldt(ecx)?;
        a.mov(ecx, 0x0fu32)?; // entry 1 of the LDT
        a.mov(es, ecx)?; // marks it accessed
        a.lar(ebx, ecx)?;
        a.show(ebx)?;
        a.lsl(ebx, ecx)?;
        a.show(ebx)?;
        a.mov(ecx, CODE32 as u32)?;
        a.verr(ecx)?;
        flag!(a, je);
        a.verw(ecx)?;
        flag!(a, je);
        a.say(" ")?;
        a.mov(ecx, DATA0 as u32)?;
        a.verr(ecx)?;
        flag!(a, je);
        a.verw(ecx)?;
        flag!(a, je);
        a.say(" ")?;
        a.mov(ecx, OWN as u32 + 8)?;
        a.verr(ecx)?;
        flag!(a, je);
        a.lar(ebx, ecx)?;
        flag!(a, je);
        a.say(" ")?;
        a.mov(ecx, 0x300u32)?; // beyond the table
        a.lsl(ebx, ecx)?;
        flag!(a, je);
        a.say(".")
    })
}

fn flags_of_ring3(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(0x30, crate::gate(14, CODE64, at(STUBS64 + 0x30 * STUB_BYTES), 3));
    image.code(64, EXTRA, |a| {
        a.mov(ecx, dword_ptr(rbx + 32))?;
        a.show(ecx)?;
        a.ret()
    })?;
    image.long(|a| {
        a.hook()?;
        a.catch(|a| a.enter_user(0x200))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| {
        a.pushfq()?; // 1 byte
        a.mov(dword_ptr(rsp), 0x3006)?; // 7: IOPL 3, no IF, PF
        a.popfq()?; // 1
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.int(0x30)?; // ends at 0x0e
        a.nop()?;
        a.nop()?;
        a.ud2()
    })
}

fn kvmclock(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(qword_ptr(DATA), -1)?;
        a.wrmsr_to(msr::KVM_SYSTEM_TIME_NEW, DATA as u64 | 1)?;
        a.mov(ecx, dword_ptr(DATA))?;
        a.and(ecx, 1)?;
        a.show(ecx)?;
        a.cmp(dword_ptr(DATA + 24), 0)?; // multiplier
        flag!(a, jne);
        a.cmp(dword_ptr(DATA + 8), -1)?; // TSC
        flag!(a, je);
        a.say(".")
    })
}
