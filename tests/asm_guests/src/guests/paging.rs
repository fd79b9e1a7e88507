//! Paging: formats, rights, error codes, what is remembered and what is forgotten.

use iced_x86::code_asm::*;
use x86::msr;

use crate::asm::{Asm, Emit};
use crate::image::{BuildError, Image, system};
use crate::layout::*;
use crate::suite::{Guest, Need};

const SMEP: Need = Need { name: "SMEP", leaf: 7, word: 1, bit: 7 };
const SMAP: Need = Need { name: "SMAP", leaf: 7, word: 1, bit: 20 };
const GIB_PAGES: Need = Need { name: "1 GiB pages", leaf: 0x8000_0001, word: 3, bit: 26 };

/// A page whose translation guests change, and its entry.
const PAGE: u32 = 0x8_0000;
const ENTRY: u32 = PT + (PAGE >> 12) * 8;
/// Why QEMU's error codes differ where a reserved bit is set.
const RSVD: &str = "QEMU's processor reports RSVD without P";
/// CR0.WP.
const WP: u32 = 1 << 16;

pub(super) fn guests() -> Vec<Guest> {
    vec![
        super::emulated(
            Guest::new(
                "fault_codes",
                "error codes of ring 0: W, P, I/D, RSVD (SDM 3A 4.7)",
                "[0e 0000 00080000+02][0e 0002 00080000+02][0e 0010 00080000@][0e 0003 00080000+02]-[0e 0011 00080000@][0e 0009 00080000+02][0e 000b 00080000+02].",
                fault_codes,
            ),
            "[0e 0000 00080000+02][0e 0002 00080000+02][0e 0010 00080000@][0e 0003 00080000+02]-[0e 0011 00080000@][0e 0008 00080000+02][0e 000a 00080000+02].",
            RSVD,
        ),
        Guest::new(
            "fault_codes_user",
            "error codes of ring 3 (SDM 3A 4.7)",
            "[0e 0004 00080000u05][0e 0006 00080000u05][0e 0014 00080000u00][0e 0007 00080000u05][0e 0005 00080000u05][0e 0007 00080000u05][0e 0015 00080000u00][0e 0015 00080000u00].",
            fault_codes_user,
        ),
        Guest::new(
            "write_protect",
            "CR0.WP decides whether ring 0 writes to read-only pages (SDM 3A 4.6.1)",
            "--[0e 0003 00080000+02][0e 0003 00080000+02].",
            write_protect,
        ),
        Guest::new("smep", "CR4.SMEP: ring 0 executes no user page (SDM 3A 4.6.1)", "S-[0e 0011 0001a000@].", smep)
            .needs(&[SMEP]),
        super::emulated(
            Guest::new(
                "smap",
                "CR4.SMAP: ring 0 touches user pages only with AC, implicit accesses never (SDM 3A 4.6.1)",
                "-[0e 0001 00030000+02]-[0e 0003 00030000+02]-[0e 0001 00030008+02].",
                smap,
            )
            .needs(&[SMAP]),
            "-[0e 0001 00030000+02]-[0e 0003 00030000+02]-[0d 000c+02].",
            "QEMU's processor lets AC lift SMAP for implicit accesses too",
        ),
        Guest::new(
            "accessed_dirty",
            "A and D bits at every level, set by what sets them (SDM 3A 4.8)",
            "00041027 00042027 00043027 00080003 00080023 00080063 [0e 0007 00080000u05]00080005 .",
            accessed_dirty,
        ),
        super::emulated(
            Guest::new(
                "large_pages",
                "2 MiB pages and their reserved bits (SDM 3A 4.5.4)",
                "600dcafe 000000a3 000000e3 [0e 0009 00400000+02].",
                large_pages,
            ),
            "600dcafe 000000a3 000000e3 [0e 0008 00400000+02].",
            RSVD,
        ),
        Guest::new("gib_pages", "1 GiB pages (SDM 3A 4.5.4)", "600dcafe 000000a3 .", gib_pages).needs(&[GIB_PAGES]),
        Guest::new(
            "translations_end",
            "INVLPG, CR3, CR4.PGE end translations, INVLPG of large pages too (SDM 3A 4.10.4)",
            "AAAAA BBBBB AAAAA BBBBB AAAAA .",
            translations_end,
        ),
        super::emulated(
            Guest::new(
                "noncanonical",
                "#GP, #SS for addresses that are not canonical (SDM 1 3.3.7.1)",
                "[0d 0000+02][0c 0000+02][0d 0000+02][0d 0000u0a].",
                noncanonical,
            ),
            "[0d 0000+02][0d 0000+02][0e 0000 fffffffd+02][0d 0000u00].",
            "QEMU's processor has no #SS here, checks only the first byte, and jumps before it faults",
        ),
        super::emulated(
            Guest::new(
                "paging_32",
                "32-bit paging: 4 KiB and 4 MiB pages, error codes without I/D (SDM 3A 4.3)",
                "600dcafe [0e 0000 00402000@][0e 0002 00402000+02][0e 0003 00401000+02]00050021 00000063 [0e 0009 00800000+02].",
                paging_32,
            ),
            "600dcafe [0e 0000 00402000@][0e 0002 00402000+02][0e 0003 00401000+02]00050021 00000063 [0e 0008 00800000+02].",
            RSVD,
        ),
        super::emulated(
            Guest::new(
                "paging_pae",
                "PAE paging: NX, PDPTEs loaded with CR3 (SDM 3A 4.4)",
                "600dcafe [0e 0011 00401000@]-[0e 0000 40000000+02][0d 0000+02].",
                paging_pae,
            ),
            "600dcafe [0e 0011 00401000@]-[0e 0000 40000000+02]-.",
            "QEMU's processor checks no reserved bits of PDPTEs",
        ),
        Guest::new(
            "fault_across_pages",
            "a store across pages faults before it writes; REP MOVS stops between elements (SDM 3A 4.7)",
            "[0e 0002 00081000+02]00000000 [0e 0002 00081000+02]00000006 00000051 00081000 5a5a5a5a .",
            fault_across_pages,
        ),
    ]
}

/// Sets the page's entry.
fn map(a: &mut Asm, low: u32, high: u32) -> Emit {
    a.mov(dword_ptr(ENTRY), low)?;
    a.mov(dword_ptr(ENTRY + 4), high)?;
    a.invlpg(byte_ptr(PAGE))
}

fn fault_codes(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.set_cr0(WP)?;
        a.mov(ecx, PAGE)?;
        map(a, 0, 0)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.catch(|a| a.mov(byte_ptr(rcx), al))?;
        a.catch(|a| a.jmp(rcx))?;
        map(a, PAGE | 1, 0)?;
        a.catch(|a| a.mov(byte_ptr(rcx), al))?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        map(a, PAGE | 3, 1 << 31)?;
        a.catch(|a| a.jmp(rcx))?;
        map(a, PAGE | 3, 1 << 19)?; // bit 51
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.catch(|a| a.mov(byte_ptr(rcx), al))?;
        a.say(".")
    })
}

/// Ring 3 code at offsets 0 (read), 0x100 (write), 0x200 (execute) that uses the page; the access is 5 bytes in.
fn user_accesses(image: &mut Image) -> Result<(), BuildError> {
    image.code(64, USER, |a| {
        a.mov(ecx, PAGE)?;
        a.mov(al, byte_ptr(rcx))
    })?;
    image.code(64, USER + 0x100, |a| {
        a.mov(ecx, PAGE)?;
        a.mov(byte_ptr(rcx), al)
    })?;
    image.code(64, USER + 0x200, |a| {
        a.mov(ecx, PAGE)?;
        a.jmp(rcx)
    })
}
const READ: u32 = 0;
const WRITE: u32 = 0x100;
const EXECUTE: u32 = 0x200;

fn fault_codes_user(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        for (low, high, access) in [
            (0, 0, READ),
            (0, 0, WRITE),
            (0, 0, EXECUTE),
            (PAGE | 5, 0, WRITE), // read-only
            (PAGE | 3, 0, READ),  // ring 0's
            (PAGE | 3, 0, WRITE),
            (PAGE | 3, 0, EXECUTE),
            (PAGE | 7, 1 << 31, EXECUTE),
        ] {
            map(a, low, high)?;
            a.catch(|a| a.enter_user_at(access, 0))?;
        }
        a.say(".")
    })?;
    user_accesses(image)
}

fn write_protect(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(ecx, PAGE)?;
        for wp in [false, true] {
            if wp {
                a.set_cr0(WP)?;
            }
            for entry in [PAGE | 1, PAGE | 5] {
                map(a, entry, 0)?;
                a.catch(|a| a.mov(byte_ptr(rcx), al))?;
            }
        }
        a.say(".")
    })
}

fn smep(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(ecx, at(USER))?;
        a.catch(|a| a.call(rcx))?;
        a.set_cr4(1 << 20)?;
        a.catch(|a| a.call(rcx))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| {
        a.say("S")?;
        a.ret()
    })
}

fn smap(image: &mut Image) -> Result<(), BuildError> {
    // An LDT in a page of ring 3: its descriptors are read with supervisor rights whatever AC says.
    image.gdt(OWN, system(2, USER_DATA, 0xfff));
    image.long(|a| {
        a.mov(ecx, OWN as u32)?;
        a.lldt(ecx)?;
        a.mov(ecx, USER_DATA)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.set_cr4(1 << 21)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.stac()?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.clac()?;
        a.catch(|a| a.mov(byte_ptr(rcx), al))?;
        a.stac()?;
        a.catch(|a| a.mov(byte_ptr(rcx), al))?;
        a.mov(ecx, 0x0cu32)?; // entry 1 of the LDT
        a.catch(|a| a.mov(fs, ecx))?;
        a.say(".")
    })
}

fn accessed_dirty(image: &mut Image) -> Result<(), BuildError> {
    let show = |a: &mut Asm| {
        a.mov(ecx, dword_ptr(ENTRY))?;
        a.show(ecx)
    };
    image.long(|a| {
        for table in [PML4, PDPT, PD] {
            a.mov(ecx, dword_ptr(table))?;
            a.show(ecx)?;
        }
        map(a, PAGE | 3, 0)?;
        show(a)?;
        a.mov(al, byte_ptr(PAGE))?;
        show(a)?;
        a.mov(byte_ptr(PAGE), al)?;
        show(a)?;
        map(a, PAGE | 5, 0)?;
        a.catch(|a| a.enter_user_at(WRITE, 0))?;
        show(a)?;
        a.say(".")
    })?;
    user_accesses(image)
}

fn large_pages(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(dword_ptr(DATA), 0x600d_cafeu32)?;
        a.mov(dword_ptr(PD + 8), 0x83)?;
        a.mov(dword_ptr(PD + 16), 0x2083)?; // bit 13 is reserved
        a.mov(ecx, dword_ptr(0x20_0000 + DATA))?;
        a.show(ecx)?;
        a.mov(ecx, dword_ptr(PD + 8))?;
        a.show(ecx)?;
        a.mov(dword_ptr(0x20_0000 + DATA), ecx)?;
        a.mov(ecx, dword_ptr(PD + 8))?;
        a.show(ecx)?;
        a.mov(ecx, 0x40_0000u32)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.say(".")
    })
}

fn gib_pages(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(dword_ptr(DATA), 0x600d_cafeu32)?;
        a.mov(dword_ptr(PDPT + 8), 0x83)?;
        a.mov(ecx, dword_ptr(0x4000_0000 + DATA))?;
        a.show(ecx)?;
        a.mov(ecx, dword_ptr(PDPT + 8))?;
        a.show(ecx)?;
        a.say(".")
    })
}

/// Prints the letter at the page.
fn letter(a: &mut Asm) -> Emit {
    a.mov(al, byte_ptr(PAGE))?;
    a.mov(dx, PORT_OUT as u32)?;
    a.out(dx, al)
}

fn translations_end(image: &mut Image) -> Result<(), BuildError> {
    let (first, second) = (DATA, DATA + 0x1000);
    image.long(|a| {
        a.mov(byte_ptr(first), b'A' as u32)?;
        a.mov(byte_ptr(second), b'B' as u32)?;
        a.set_cr4(1 << 7)?; // PGE
        // The same five ways to end a translation, for alternating targets.
        for round in 0..5 {
            let target = if round % 2 == 0 { first } else { second };
            for way in 0..5 {
                let global = if way == 2 { 1 << 8 } else { 0 };
                map(a, (if round % 2 == 0 { second } else { first }) | 3 | global, 0)?;
                a.mov(al, byte_ptr(PAGE))?;
                a.mov(dword_ptr(ENTRY), target | 3)?;
                match way {
                    0 => a.invlpg(byte_ptr(PAGE + 0x123))?,
                    1 => {
                        a.mov(rax, cr3)?;
                        a.mov(cr3, rax)?;
                    }
                    2 => {
                        a.clear_cr4(1 << 7)?;
                        a.set_cr4(1 << 7)?;
                    }
                    3 => {
                        a.clear_cr0(WP)?;
                        a.invlpg(byte_ptr(PAGE))?;
                    }
                    _ => large_invlpg(a, target)?,
                }
                letter(a)?;
            }
            a.say(" ")?;
        }
        a.say(".")
    })
}

/// Ends the translation of a 2 MiB page by one address in it, then reaches `target`'s letter through it.
fn large_invlpg(a: &mut Asm, target: u32) -> Emit {
    a.mov(dword_ptr(PD + 8), 0)?;
    a.invlpg(byte_ptr(0x20_0000))?;
    a.mov(dword_ptr(PD + 8), 0x20_0083)?;
    a.mov(al, byte_ptr(0x20_0000 + target))?;
    a.mov(dword_ptr(PD + 8), 0x83)?;
    a.invlpg(byte_ptr(0x3f_f123))?;
    a.mov(al, byte_ptr(0x20_0000 + target))?;
    a.mov(ebx, eax)?;
    a.invlpg(byte_ptr(PAGE))?;
    a.mov(al, byte_ptr(PAGE))?;
    // Both ways to the same byte.
    a.cmp(al, bl)?;
    let mut same = a.create_label();
    a.je(same)?;
    a.say("?")?;
    a.set_label(&mut same)?;
    a.zero_bytes()
}

fn noncanonical(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(rcx, 0x8000_0000_0000u64)?;
        a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
        a.mov(rbp, 0x8000_0000_0000u64)?;
        a.catch(|a| a.mov(al, byte_ptr(rbp)))?;
        a.mov(rcx, 0x7fff_ffff_fffdu64)?;
        a.catch(|a| a.mov(eax, dword_ptr(rcx)))?;
        a.catch(|a| a.enter_user(0))?;
        a.say(".")
    })?;
    image.code(64, USER, |a| {
        a.mov(rcx, 0x8000_0000_0000u64)?; // 10 bytes
        a.jmp(rcx)
    })
}

fn paging_32(image: &mut Image) -> Result<(), BuildError> {
    let (directory, table) = (PML4, PDPT);
    image.protected(|a| {
        a.mov(dword_ptr(DATA), 0x600d_cafeu32)?;
        a.table(directory, 0x800, 0, 0, false)?;
        for (entry, value) in [
            (directory, 0x83),               // the first 4 MiB
            (directory + 4, table | 7),      // 4 KiB pages
            (directory + 8, 1 << 21 | 0x83), // a reserved bit
            (table, DATA | 3),
            (table + 4, DATA | 1), // read-only
        ] {
            a.mov(dword_ptr(entry), value)?;
        }
        a.set_cr4(1 << 4)?; // PSE
        a.mov(eax, directory)?;
        a.mov(cr3, eax)?;
        a.set_cr0(1 << 31 | WP)?;
        a.mov(ecx, dword_ptr(0x40_0000))?;
        a.show(ecx)?;
        a.mov(ecx, 0x40_2000u32)?;
        a.catch(|a| a.jmp(ecx))?;
        a.catch(|a| a.mov(dword_ptr(ecx), ecx))?;
        a.mov(ecx, 0x40_1000u32)?;
        a.mov(al, byte_ptr(ecx))?;
        a.catch(|a| a.mov(dword_ptr(ecx), ecx))?;
        a.mov(ecx, dword_ptr(table + 4))?;
        a.show(ecx)?;
        a.mov(ecx, dword_ptr(directory))?;
        a.and(ecx, 0x7fu32)?;
        a.show(ecx)?;
        a.mov(ecx, 0x80_0000u32)?;
        a.catch(|a| a.mov(al, byte_ptr(ecx)))?;
        a.say(".")
    })
}

fn paging_pae(image: &mut Image) -> Result<(), BuildError> {
    let (pointers, directory, table, wrong) = (PML4, PDPT, PD, PD3);
    image.protected(|a| {
        a.mov(dword_ptr(DATA), 0x600d_cafeu32)?;
        a.table(pointers, 0xc00, 0, 0, false)?;
        for (entry, value) in [
            (pointers, directory | 1),
            (directory, 0x83),
            (directory + 16, table | 3),
            (table, DATA | 3),
            (table + 8, DATA | 3),
            (table + 12, 1 << 31), // NX
        ] {
            a.mov(dword_ptr(entry), value)?;
        }
        a.set_cr4(1 << 5)?;
        a.wrmsr_to(msr::EFER, 1 << 11)?;
        a.mov(eax, pointers)?;
        a.mov(cr3, eax)?;
        a.set_cr0(1 << 31)?;
        a.mov(ecx, dword_ptr(0x40_0000))?;
        a.show(ecx)?;
        a.mov(ecx, 0x40_1000u32)?;
        a.catch(|a| a.jmp(ecx))?;
        a.catch(|a| a.mov(al, byte_ptr(ecx)))?;
        a.mov(ecx, 0x4000_0000u32)?;
        a.catch(|a| a.mov(al, byte_ptr(ecx)))?;
        a.table(wrong, 8, 0, 0, false)?;
        a.mov(dword_ptr(wrong), directory | 3)?; // bit 1 of a PDPTE is reserved
        a.mov(eax, wrong)?;
        a.catch(|a| a.mov(cr3, eax))?;
        a.say(".")
    })
}

fn fault_across_pages(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.mov(dword_ptr(ENTRY + 8), 0)?;
        a.invlpg(byte_ptr(PAGE + 0x1000))?;
        a.mov(dword_ptr(PAGE + 0xffc), 0)?;
        a.mov(ecx, PAGE + 0xffe)?;
        a.catch(|a| a.mov(dword_ptr(rcx), ecx))?;
        a.mov(ecx, dword_ptr(PAGE + 0xffc))?;
        a.show(ecx)?;
        a.mov(edi, DATA)?;
        a.mov(ecx, 0x100)?;
        a.mov(al, 0x5a)?;
        a.rep().stosb()?;
        a.mov(esi, DATA + 0x4d)?;
        a.mov(edi, PAGE + 0xffc)?;
        a.mov(ecx, 10)?;
        a.catch(|a| a.rep().movsb())?;
        a.show(ecx)?;
        a.sub(esi, DATA)?;
        a.show(esi)?;
        a.show(edi)?;
        a.mov(ecx, dword_ptr(PAGE + 0xffc))?;
        a.show(ecx)?;
        a.say(".")
    })
}
