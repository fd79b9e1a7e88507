//! A guest of a few hundred bytes: says `up`, answers every letter in upper case, says `bye` and powers off when its power
//! button is pressed. It also obeys [`POWER_OFF`], [`RESET`] and [`PANIC`]. It halts between ticks of its APIC timer, so
//! that many of them cost a host next to nothing.
//!
//! It starts as Xen's PVH entry has it: 32-bit protected mode, flat segments whose selectors are not to be relied on.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Typed, makes the guest power off: Ctrl+D.
pub const POWER_OFF: u8 = 4;
/// Typed, makes the guest reset its machine: Ctrl+R.
pub const RESET: u8 = 0x12;
/// Typed, makes the guest report a panic: Ctrl+C.
pub const PANIC: u8 = 3;

/// Where it is loaded; its entry.
const CODE: u32 = 0x10_0000;
/// Where it keeps its descriptor tables and its stack, below the code.
const GDT: u32 = 0x8000;
const IDT: u32 = 0x8100;
const HANDLER: u32 = 0x9000;
const STACK: u32 = 0x9_0000;
/// The timer's vector.
const TICK: u32 = 0x20;
/// Guest nanoseconds from tick to tick: one count of the APIC timer is one.
const TICK_NS: u32 = 2_000_000;

/// Registers of the local APIC. SDM 3A 11.4 "Local APIC"
const APIC_SPURIOUS: u32 = 0xfee0_00f0;
const APIC_LVT_TIMER: u32 = 0xfee0_0320;
const APIC_INITIAL_COUNT: u32 = 0xfee0_0380;
const APIC_DIVIDE: u32 = 0xfee0_03e0;
/// Power management of the machine. ACPI 4.8.3.1, 4.8.3.2
const PM1_STS: u32 = 0x600;
const PM1_CNT: u32 = 0x604;
/// The machine's reset control register and the panic event port.
const RESET_CONTROL: u32 = 0xcf9;
const PANIC_EVENT: u32 = 0x505;
/// The first serial port: data and line status.
const SERIAL: u32 = 0x3f8;
const LINE_STATUS: u32 = 0x3fd;

/// The guest as a kernel that a `<kernel>` element may name.
///
/// # Panics
/// Where the assembler refuses an instruction, which is a mistake here.
pub fn kernel() -> Vec<u8> {
    elf(&code().expect("the guest's instructions exist"))
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.cli()?;
    a.mov(esp, STACK)?;
    tables(&mut a)?;
    timer(&mut a)?;
    say(&mut a, "up\n")?;
    let [mut idle, mut drain, mut reset, mut panic] = [(); 4].map(|()| a.create_label());
    let [mut answer, mut button, mut off] = [(); 3].map(|()| a.create_label());
    a.set_label(&mut idle)?;
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.set_label(&mut drain)?;
    a.mov(edx, LINE_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(button)?;
    a.mov(edx, SERIAL)?;
    a.in_(al, dx)?;
    for (byte, label) in [(POWER_OFF, off), (RESET, reset), (PANIC, panic)] {
        a.cmp(al, i32::from(byte))?;
        a.je(label)?;
    }
    a.cmp(al, b'a' as i32)?;
    a.jb(answer)?;
    a.cmp(al, b'z' as i32)?;
    a.ja(answer)?;
    a.and(al, 0xdf)?;
    a.set_label(&mut answer)?;
    a.out(dx, al)?;
    a.jmp(drain)?;
    a.set_label(&mut button)?;
    a.mov(edx, PM1_STS)?;
    a.in_(ax, dx)?;
    a.test(ah, 1)?; // PWRBTN_STS
    a.jz(idle)?;
    a.set_label(&mut off)?;
    say(&mut a, "bye\n")?;
    a.mov(edx, PM1_CNT)?;
    a.mov(eax, 7u32 << 10 | 1 << 13)?; // SLP_TYP 7, SLP_EN: S5
    a.out(dx, ax)?;
    a.hlt()?;
    for (label, port, value) in [(&mut reset, RESET_CONTROL, 6u32), (&mut panic, PANIC_EVENT, 1)] {
        a.set_label(label)?;
        a.mov(edx, port)?;
        a.mov(eax, value)?;
        a.out(dx, al)?;
        a.hlt()?;
    }
    a.assemble(CODE.into())
}

/// Descriptors of our own: an interrupt gate needs a selector that is known.
fn tables(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut store = |at: u32, words: &[u32]| {
        let mut words = (at..).step_by(4).zip(words);
        words.try_for_each(|(at, word)| a.mov(dword_ptr(at), *word))
    };
    // Nothing; code 0x08 and data 0x10, flat, 32-bit. SDM 3A 3.4.5
    store(GDT, &[0, 0, 0x0000_ffff, 0x00cf_9a00, 0x0000_ffff, 0x00cf_9200])?;
    // The limit stands in the upper half of the first word, so that the base is aligned.
    store(GDT + 0x20, &[0x17 << 16, GDT])?;
    store(IDT - 8, &[(TICK * 8 + 7) << 16, IDT])?;
    // A 32-bit interrupt gate, present. SDM 3A 6.11
    store(IDT + TICK * 8, &[8 << 16 | HANDLER & 0xffff, HANDLER & 0xffff_0000 | 0x8e00])?;
    // mov dword ptr [0xfee000b0], 0 (end of interrupt); iretd
    store(HANDLER, &[0x00b0_05c7, 0x0000_fee0, 0x90cf_0000])?;
    a.lgdt(fword_ptr(GDT + 0x22))?;
    a.lidt(fword_ptr(IDT - 6))?;
    let [mut far, mut reload] = [(); 2].map(|()| a.create_label());
    a.push(8)?;
    a.call(far)?;
    a.jmp(reload)?;
    a.set_label(&mut far)?;
    a.retf()?;
    a.set_label(&mut reload)?;
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)
}

/// A periodic tick, and nothing from the old interrupt controllers.
fn timer(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, 0xffu32)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    for (register, value) in [
        (APIC_SPURIOUS, 0x1ff),           // enabled
        (APIC_DIVIDE, 0xb),               // by one
        (APIC_LVT_TIMER, 1 << 17 | TICK), // periodic
        (APIC_INITIAL_COUNT, TICK_NS),
    ] {
        a.mov(dword_ptr(register), value)?;
    }
    Ok(())
}

fn say(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    a.mov(edx, SERIAL)?;
    text.bytes().try_for_each(|byte| {
        a.mov(al, u32::from(byte))?;
        a.out(dx, al)
    })
}

/// An ELF file of one segment, with the note that names its PVH entry (type 18 of "Xen").
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    let note: Vec<u8> =
        [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), CODE].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut file = vec![0u8; HEADERS];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    // Machine x86-64, where the program headers are, their size and number.
    for (at, value) in [(18, 62), (32, 64), (54, 56), (56, 2)] {
        file[at] = value;
    }
    let segments = [(1u32, HEADERS, code.len()), (4, HEADERS + code.len(), note.len())];
    for (index, (kind, offset, bytes)) in segments.into_iter().enumerate() {
        let at = 64 + 56 * index;
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset as u64), (24, CODE.into()), (32, bytes as u64), (40, bytes as u64)] {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    file.extend_from_slice(code);
    file.extend_from_slice(&note);
    file
}
