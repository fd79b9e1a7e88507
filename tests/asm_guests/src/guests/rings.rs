//! Privilege: rings, stacks, gates, fast system calls, I/O permission.

use iced_x86::code_asm::*;
use x86::msr;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image, gate};
use crate::layout::*;
use crate::suite::{Guest, Need, Peer};

const SEP: Need = Need { name: "SYSENTER", leaf: 1, word: 3, bit: 11 };
const UMIP: Need = Need { name: "UMIP", leaf: 7, word: 2, bit: 2 };

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "ring3_32",
            "IRETD to ring 3, a gate with DPL 3 and the stack of the TSS (SDM 3A 6.12.1)",
            "[30u02]0002bfe4 0000001b .[0d 0000u02]00000010 .",
            ring3_32,
        ),
        Guest::new(
            "ring3_64",
            "IRETQ to ring 3, interrupt and fault on RSP0 (SDM 3A 6.14)",
            "[30u02]0002bfc8 [0d 0000u02].",
            ring3_64,
        ),
        Guest::new(
            "gate_privilege",
            "INT n through a gate with DPL 0 from ring 3: #GP(vector * 8 + 2) (SDM 3A 6.12.1.1)",
            "[0d 018au00].",
            gate_privilege,
        ),
        Guest::new("ist", "a gate with an IST entry takes its stack, aligned (SDM 3A 6.14.5)", "[03]0002dfc8 .", ist),
        Guest::new(
            "syscall",
            "SYSCALL and SYSRET: selectors, RCX, R11, FMASK (SDM 3A 5.8.8)",
            "0001a002 00000246 00000018 00000020 00000002 [06u02].",
            syscall,
        ),
        Guest::new(
            "sysret_noncanonical",
            "SYSRET to a non-canonical address faults in ring 0 (SDM 2B SYSRET)",
            "[0d 0000+02].",
            sysret_noncanonical,
        )
        .on_qemu(Peer::Differs { output: "[0d 0000u00].", why: "QEMU returns first, as AMD's processors do" })
        .on_kvm(Peer::Differs { output: "[0d 0000u00].", why: "AMD's processors return first" }),
        Guest::new(
            "sysenter",
            "SYSENTER and SYSEXIT in 32-bit code (SDM 3A 5.8.7)",
            "S00000008 00000010 [0d 0000u04].",
            sysenter,
        )
        .needs(&[SEP]),
        Guest::new(
            "call_gate_32",
            "a call gate to ring 0 copies parameters; RETF goes back to ring 3 (SDM 3A 5.8.4)",
            "G0002bfe8 22222222 11111111 [0d 0000u19].",
            call_gate_32,
        ),
        Guest::new(
            "call_gate_64",
            "a 16-byte call gate to ring 0 (SDM 3A 5.8.3.1)",
            "G0002bfe0 [0d 0000u08].",
            call_gate_64,
        ),
        Guest::new(
            "far_same_level",
            "far CALL, RET n and JMP within a level, through a gate too (SDM 3A 5.8.1)",
            "C00000008 00027ff8 G00000008 00027ff8 00028000 .",
            far_same_level,
        ),
        Guest::new(
            "conforming",
            "conforming code runs at the caller's privilege (SDM 3A 5.8.1.2)",
            "[30u02]0000006b [0d 0000u02].",
            conforming,
        ),
        Guest::new(
            "io_bitmap",
            "the I/O permission bitmap, per byte of an access (SDM 1 19.5.2)",
            "I[0d 0000u14][0d 0000u02].",
            io_bitmap,
        ),
        Guest::new(
            "iopl3",
            "IOPL 3: ring 3 does I/O, CLI, STI (SDM 1 19.5.1)",
            "I00003202 00003002 [0d 0000u42].",
            iopl3,
        ),
        Guest::new(
            "ring3_compat",
            "32-bit ring 3 under a 64-bit kernel (SDM 3A 6.14.3)",
            "[30u02]0000002b [0d 0000u02].",
            ring3_compat,
        ),
        Guest::new(
            "dropped_segments",
            "a return to ring 3 clears segments of ring 0, keeps its own (SDM 3A 5.8.6)",
            "[30u07]00000000 00000033 [0d 0000u07].",
            dropped_segments,
        ),
        Guest::new(
            "iret_nested",
            "IRET with NT set is #GP(0) in long mode (SDM 2A IRET)",
            "[0d 0000+02].",
            iret_nested,
        ),
        Guest::new(
            "gate_flags",
            "an interrupt gate clears IF, a trap gate does not (SDM 3A 6.12.1.3)",
            "[30]00000000 [31]00000200 .",
            gate_flags,
        ),
        Guest::new("gate_16", "a 16-bit interrupt gate pushes 16-bit words (SDM 3A 6.12.1)", "h00006ffa .", gate_16),
        Guest::new(
            "stack_16",
            "a 16-bit stack segment wraps SP and leaves the upper half of ESP (SDM 1 6.2.3)",
            "abcd0000 abcdfffc .",
            stack_16,
        ),
        Guest::new(
            "umip",
            "CR4.UMIP hides SGDT, SIDT, SLDT, STR, SMSW from ring 3 (SDM 3A 2.5)",
            "[0d 0000u00][0d 0000u00][0d 0000u00][0d 0000u00][0d 0000u00].",
            umip,
        )
        .needs(&[UMIP]),
    ]
}

/// A hook that prints what `show` emits; BX points to vector, error code and frame.
fn hook(image: &mut Image, bits: u32, show: impl FnOnce(&mut Asm) -> Emit) -> Result<(), BuildError> {
    image.code(bits, EXTRA, |a| {
        show(a)?;
        a.ret()
    })
}

fn ring3_32(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(0x30, gate(14, CODE32, at(STUBS32 + 0x30 * STUB_BYTES), 3));
    hook(image, 32, |a| {
        a.show(ebx)?;
        a.mov(ecx, dword_ptr(ebx + 12))?;
        a.and(ecx, 0x1bu32)?;
        a.add(ecx, 0x10u32)?; // CS is 0x2b
        a.show(ecx)?;
        a.say(".")
    })?;
    image.protected(|a| {
        a.hook()?;
        a.catch(|a| a.enter_user(0))?;
        a.mov(ecx, ss)?;
        a.show(ecx)?;
        a.say(".")
    })?;
    image.code(32, USER, |a| {
        a.int(0x30)?;
        a.hlt()
    })
}

fn ring3_64(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(0x30, gate(14, CODE64, at(STUBS64 + 0x30 * STUB_BYTES), 3));
    hook(image, 64, |a| a.show(ebx))?;
    image.long(|a| {
        a.hook()?;
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| {
        a.int(0x30)?;
        a.hlt()
    })
}

fn gate_privilege(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| a.int(0x31))
}

fn ist(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(3, gate(14, CODE64, at(STUBS64 + 3 * STUB_BYTES), 0) | 1 << 32);
    hook(image, 64, |a| a.show(ebx))?;
    image.long(|a| {
        a.hook()?;
        a.int3()?;
        a.say(".")
    })
}

fn fast_system_calls(a: &mut Asm) -> Emit {
    a.wrmsr_to(msr::EFER, 0xd01)?; // NXE, LMA, LME, SCE
    a.wrmsr_to(msr::STAR, (CODE64 as u64) << 32 | 0x28 << 48)?;
    a.wrmsr_to(msr::LSTAR, at(EXTRA) as u64)?;
    a.wrmsr_to(msr::FMASK, 0x244)
}

fn syscall(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        fast_system_calls(a)?;
        // Parity and zero are set, and IF; FMASK clears them.
        a.catch(|a| a.enter_user(0x246))?;
        a.say(".")
    })?;
    image.code(64, EXTRA, |a| {
        a.mov(r15, rsp)?;
        a.mov(rsp, STACK as u64 - 0x100)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.mov(r14, rcx)?;
        a.show(ecx)?;
        a.mov(ecx, r11d)?;
        a.show(ecx)?;
        a.mov(ecx, cs)?;
        a.show(ecx)?;
        a.mov(ecx, ss)?;
        a.show(ecx)?;
        a.show(ebx)?;
        a.mov(rcx, r14)?;
        a.mov(r11d, 2)?;
        a.mov(rsp, r15)?;
        a.sysretq()
    })?;
    image.code(64, USER, |a| {
        a.syscall()?;
        a.ud2()
    })
}

fn sysret_noncanonical(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        fast_system_calls(a)?;
        a.mov(rcx, 0x8000_0000_0000u64)?;
        a.mov(r11d, 2)?;
        a.catch(|a| a.sysretq())?;
        a.say(".")
    })
}

fn sysenter(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.wrmsr_to(msr::SYSENTER_CS, CODE32 as u64)?;
        a.wrmsr_to(msr::SYSENTER_ESP, STACK as u64 - 0x100)?;
        a.wrmsr_to(msr::SYSENTER_EIP, at(EXTRA) as u64)?;
        a.catch(|a| a.enter_user(0x200))?;
        a.say(".")
    })?;
    image.code(32, EXTRA, |a| {
        a.say("S")?;
        a.mov(ecx, cs)?;
        a.show(ecx)?;
        a.mov(ecx, ss)?;
        a.show(ecx)?;
        a.mov(edx, at(USER) + 4)?;
        a.mov(ecx, STACK_USER)?;
        a.sysexit()
    })?;
    image.code(32, USER, |a| {
        a.sysenter()?;
        a.nop()?;
        a.nop()?;
        a.hlt()
    })
}

fn call_gate_32(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, gate(12, CODE32, at(EXTRA), 3) | 2 << 32);
    image.protected(|a| {
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(32, EXTRA, |a| {
        a.mov(ebx, esp)?; // EIP, CS, parameters, ESP, SS
        a.say("G")?;
        a.show(ebx)?;
        // Ring 3 came without a DS.
        a.mov(ecx, dword_ptr(ebx + 8).ss())?;
        a.show(ecx)?;
        a.mov(ecx, dword_ptr(ebx + 12).ss())?;
        a.show(ecx)?;
        a.retf_1(8)
    })?;
    image.code(32, USER, |a| {
        a.push(0x1111_1111)?; // 5 bytes
        a.push(0x2222_2222)?; // 5
        a.call_far(OWN | 3, 0, 4)?; // 7, ends at 0x11
        a.cmp(esp, STACK_USER)?; // 6: both stacks have lost the parameters
        a.jne(at(USER) as u64)?;
        a.hlt()
    })
}

fn call_gate_64(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, gate(12, CODE64, at(EXTRA), 3));
    image.put(USER + 0x100, &[0, 0, 0, 0, OWN as u8 | 3, 0]);
    image.long(|a| {
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(64, EXTRA, |a| {
        a.mov(ebx, esp)?;
        a.say("G")?;
        a.show(ebx)?;
        a.retfq()
    })?;
    image.code(64, USER, |a| {
        a.call(fword_ptr(at(USER) + 0x100))?; // 7 bytes
        a.nop()?;
        a.hlt()
    })
}

fn far_same_level(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, gate(12, CODE32, at(EXTRA) + 0x100, 0));
    image.protected(|a| {
        a.call_far(CODE32, at(EXTRA), 4)?;
        a.call_far(OWN, 0, 4)?;
        a.mov(ecx, esp)?;
        a.show(ecx)?;
        a.jmp_far(CODE32, at(EXTRA) + 0x200, 4)
    })?;
    for (offset, letter) in [(0, "C"), (0x100, "G")] {
        image.code(32, EXTRA + offset, |a| {
            a.mov(ebx, esp)?;
            a.say(letter)?;
            a.mov(ecx, dword_ptr(ebx + 4))?;
            a.show(ecx)?;
            a.show(ebx)?;
            a.retf()
        })?;
    }
    image.code(32, EXTRA + 0x200, |a| {
        a.say(".")?;
        a.stop()
    })
}

fn conforming(image: &mut Image) -> Result<(), BuildError> {
    image.gdt(OWN, 0x00cf_9f00_0000_ffff); // conforming code, DPL 0
    image.gate32(0x30, gate(14, CODE32, at(STUBS32 + 0x30 * STUB_BYTES), 3));
    hook(image, 32, |a| {
        a.mov(ecx, dword_ptr(ebx + 12))?;
        a.show(ecx)
    })?;
    image.protected(|a| {
        a.hook()?;
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(32, USER, |a| a.jmp_far(OWN, at(USER) + 0x100, 4))?;
    image.code(32, USER + 0x100, |a| {
        a.int(0x30)?;
        a.hlt()
    })
}

/// Opens `ports` in the bitmap of the 32-bit task.
pub(super) fn open_ports(image: &mut Image, ports: &[u16]) {
    let mut map = [0xffu8; TSS_BYTES - 0x68];
    for &port in ports {
        map[port as usize / 8] &= !(1 << (port % 8));
    }
    image.put(TSS32 + 0x68, &map);
}

fn io_bitmap(image: &mut Image) -> Result<(), BuildError> {
    open_ports(image, &[PORT_OUT, 0x307, 0x310, 0x311]);
    image.protected(|a| {
        a.catch(|a| a.enter_user(0))?;
        a.mov(word_ptr(at(TSS32) + 0x66), 0x1000u32)?; // no bitmap at all
        a.mov(word_ptr(at(USER)), 0xe4ebu32)?;
        a.catch(|a| {
            a.mov(byte_ptr(at(USER)), 0x90u32)?;
            a.mov(byte_ptr(at(USER) + 1), 0x90u32)?;
            a.mov(word_ptr(at(USER) + 2), 0x00e4u32)?; // IN AL, 0
            a.enter_user(0)
        })?;
        a.say(".")
    })?;
    image.code(32, USER, |a| {
        a.say("I")?; // 7 bytes
        a.mov(dx, 0x310)?; // 4
        a.in_(ax, dx)?; // 2
        a.mov(dx, 0x307)?; // 4
        a.in_(al, dx)?; // 1
        a.nop()?;
        a.nop()?;
        a.in_(ax, dx) // 0x307 is open, 0x308 is not
    })
}

fn iopl3(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.catch(|a| a.enter_user(0x3000))?;
        a.say(".")
    })?;
    image.code(32, USER, |a| {
        a.say("I")?;
        a.sti()?;
        a.pushfd()?;
        a.cli()?;
        a.pushfd()?;
        a.pop(ebx)?;
        a.pop(ecx)?;
        // The library is not this ring's to call: its stack and code are, in a flat segment.
        a.mov(eax, DATA_USER as u32)?;
        a.mov(ds, eax)?;
        a.show(ecx)?;
        a.show(ebx)?;
        a.hlt()
    })
}

fn umip(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.set_cr4(1 << 11)?;
        for code in [0x00u32, 0x100, 0x200, 0x300, 0x400] {
            a.catch(|a| a.enter_user_at(code, 0))?;
        }
        a.say(".")
    })?;
    image.code(64, USER, |a| a.sgdt(tbyte_ptr(USER_DATA)))?;
    image.code(64, USER + 0x100, |a| a.sidt(tbyte_ptr(USER_DATA)))?;
    image.code(64, USER + 0x200, |a| a.sldt(ecx))?;
    image.code(64, USER + 0x300, |a| a.str(ecx))?;
    image.code(64, USER + 0x400, |a| a.smsw(ecx))
}

fn ring3_compat(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(0x30, gate(14, CODE64, at(STUBS64 + 0x30 * STUB_BYTES), 3));
    hook(image, 64, |a| {
        a.mov(ecx, dword_ptr(rbx + 24))?;
        a.show(ecx)
    })?;
    image.long(|a| {
        a.hook()?;
        a.catch(|a| {
            for word in [DATA_USER as u32, STACK_USER, 2, CODE32_USER as u32, at(USER)] {
                a.push(word as i32)?;
            }
            a.iretq()
        })?;
        a.say(".")
    })?;
    image.code(32, USER, |a| {
        a.int(0x30)?;
        a.hlt()
    })
}

fn dropped_segments(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(0x30, gate(14, CODE32, at(STUBS32 + 0x30 * STUB_BYTES), 3));
    // The handler saved EAX, EBX, ECX, EDX below the vector.
    hook(image, 32, |a| {
        a.mov(ecx, dword_ptr(ebx - 12))?;
        a.show(ecx)?;
        a.mov(ecx, dword_ptr(ebx - 16))?;
        a.show(ecx)
    })?;
    image.protected(|a| {
        a.hook()?;
        a.mov(eax, DATA_USER as u32)?;
        a.mov(fs, eax)?;
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(32, USER, |a| {
        a.mov(ecx, ds)?; // 2 bytes
        a.mov(edx, fs)?; // 2
        a.nop()?;
        a.int(0x30)?; // ends at 7
        a.hlt()
    })
}

fn iret_nested(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 1 << 14)?;
        a.popfq()?;
        a.catch(|a| a.iretq())?;
        a.say(".")
    })
}

fn gate_flags(image: &mut Image) -> Result<(), BuildError> {
    image.gate64(0x31, gate(15, CODE64, at(STUBS64 + 0x31 * STUB_BYTES), 0));
    hook(image, 64, |a| {
        a.pushfq()?;
        a.pop(rcx)?;
        a.and(ecx, 0x200)?;
        a.show(ecx)
    })?;
    image.long(|a| {
        a.hook()?;
        a.sti()?;
        a.int(0x30)?;
        a.int(0x31)?;
        a.cli()?;
        a.say(".")
    })
}

fn gate_16(image: &mut Image) -> Result<(), BuildError> {
    image.gate32(0x48, gate(6, CODE16, EXTRA as u32 + 0x100, 0));
    image.protected(|a| a.jmp_far(CODE16, EXTRA as u32, 4))?;
    image.code(16, EXTRA, |a| {
        a.mov(ax, DATA16 as u32)?;
        a.mov(ss, ax)?;
        a.mov(sp, STACK16)?;
        a.int(0x48)?;
        a.say(".")?;
        a.stop()
    })?;
    image.code(16, EXTRA + 0x100, |a| {
        a.movzx(ecx, sp)?;
        a.say("h")?;
        a.show(ecx)?;
        a.iret()
    })
}

fn stack_16(image: &mut Image) -> Result<(), BuildError> {
    image.protected(|a| {
        a.mov(ecx, DATA16 as u32)?;
        a.mov(ebx, ss)?;
        a.mov(ss, ecx)?;
        a.mov(esp, 0xabcd_0004u32)?;
        a.push(eax)?;
        a.mov(esi, esp)?;
        a.push(eax)?;
        a.mov(edi, esp)?;
        a.mov(ss, ebx)?;
        a.mov(esp, STACK)?;
        a.show(esi)?;
        a.show(edi)?;
        a.say(".")
    })
}
