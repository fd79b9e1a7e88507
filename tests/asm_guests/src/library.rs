//! What is in every image beside the guest's own code: the way into each mode, printing, interrupt handlers.
//!
//! A handler prints `[vector]`, and where they apply ` error code`, ` CR2`, then where it came from: `+` and the distance of
//! the saved instruction pointer from [`Asm::catch`], `@` where that is the address of a page fault, or `u` (ring 3) or `v` (virtual-8086 mode) and the pointer's lowest
//! byte. An exception goes on behind the catch; everything else calls the hook and returns. An exception that nobody
//! expects prints `?` and the instruction pointer and ends the guest.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use crate::asm::{Asm, Emit, Lib};
use crate::layout::*;

/// Vectors with an error code: 8, 10 to 14, 17, 21. SDM 3A table 6-1.
const WITH_ERROR: u32 = 0x0022_7d00;

/// Code of a library, the addresses of its routines and of its handler.
pub(crate) struct Assembled {
    pub code: Vec<u8>,
    pub lib: Lib,
    pub handler: u64,
}

/// Assembles the library of a mode for `ip`.
pub(crate) fn assemble(bits: u32, ip: u64) -> Result<Assembled, IcedError> {
    let mut a = Asm::new(bits, Lib::default())?;
    let mut labels: [CodeLabel; 4] = std::array::from_fn(|_| a.create_label());
    a.set_label(&mut labels[0])?;
    hex(&mut a)?;
    a.set_label(&mut labels[1])?;
    catch(&mut a)?;
    a.set_label(&mut labels[2])?;
    missed(&mut a)?;
    a.set_label(&mut labels[3])?;
    match bits {
        16 => handler16(&mut a, labels[0])?,
        32 => handler32(&mut a, labels[0])?,
        _ => handler64(&mut a, labels[0])?,
    }
    let done = a.assemble_options(ip, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let [hex, catch, missed, handler] = labels.map(|l| done.label_ip(&l));
    let lib = Lib { hex: hex?, catch: catch?, missed: missed? };
    Ok(Assembled { code: done.inner.code_buffer, lib, handler: handler? })
}

fn save(a: &mut Asm) -> Emit {
    if a.bits == 64 {
        [rax, rbx, rcx, rdx].into_iter().try_for_each(|r| a.push(r))
    } else {
        [eax, ebx, ecx, edx].into_iter().try_for_each(|r| a.push(r))
    }
}
fn restore(a: &mut Asm) -> Emit {
    if a.bits == 64 {
        [rdx, rcx, rbx, rax].into_iter().try_for_each(|r| a.pop(r))
    } else {
        [edx, ecx, ebx, eax].into_iter().try_for_each(|r| a.pop(r))
    }
}

fn hex(a: &mut Asm) -> Emit {
    a.pushf_any()?;
    save(a)?;
    a.mov(ebx, eax)?;
    a.shl(ecx, 2u32)?;
    a.mov(dx, PORT_OUT as u32)?;
    let (mut next, mut letter) = (a.create_label(), a.create_label());
    a.set_label(&mut next)?;
    a.sub(ecx, 4u32)?;
    a.mov(eax, ebx)?;
    a.shr(eax, cl)?;
    a.and(al, 15u32)?;
    a.add(al, b'0' as u32)?;
    a.cmp(al, b'9' as u32)?;
    a.jbe(letter)?;
    a.add(al, (b'a' - b'0' - 10) as u32)?;
    a.set_label(&mut letter)?;
    a.out(dx, al)?;
    a.test(ecx, ecx)?;
    a.jne(next)?;
    restore(a)?;
    a.popf_any()?;
    a.ret()
}

fn catch(a: &mut Asm) -> Emit {
    match a.bits {
        64 => {
            a.pop(qword_ptr(RESUME))?;
            a.mov(qword_ptr(SAVED_SP), rsp)?;
            a.cmp(rsp, rsp)?;
            a.jmp(qword_ptr(RESUME))
        }
        32 => {
            a.pop(dword_ptr(RESUME))?;
            a.mov(dword_ptr(SAVED_SP), esp)?;
            a.cmp(esp, esp)?;
            a.jmp(dword_ptr(RESUME))
        }
        _ => {
            a.pop(word_ptr(RESUME))?;
            a.mov(word_ptr(SAVED_SP), sp)?;
            a.cmp(sp, sp)?;
            a.jmp(word_ptr(RESUME))
        }
    }
}

fn missed(a: &mut Asm) -> Emit {
    a.pushf_any()?;
    save(a)?;
    a.mov(dword_ptr(RESUME), 0u32)?;
    a.say("-")?;
    restore(a)?;
    a.popf_any()?;
    a.ret()
}

impl Asm {
    fn pushf_any(&mut self) -> Emit {
        match self.bits {
            64 => self.pushfq(),
            32 => self.pushfd(),
            _ => self.pushf(),
        }
    }
    fn popf_any(&mut self) -> Emit {
        match self.bits {
            64 => self.popfq(),
            32 => self.popfd(),
            _ => self.popf(),
        }
    }
}

fn print(a: &mut Asm, hex: CodeLabel, digits: u32) -> Emit {
    a.mov(ecx, digits)?;
    a.call(hex)
}

/// Real mode: the stack holds the vector, IP, CS, FLAGS.
fn handler16(a: &mut Asm, hex: CodeLabel) -> Emit {
    save(a)?;
    a.push(ebp)?;
    a.mov(bp, sp)?;
    a.say("[")?;
    a.movzx(eax, byte_ptr(bp + 20))?;
    print(a, hex, 2)?;
    let (mut normal, mut end) = (a.create_label(), a.create_label());
    a.cmp(word_ptr(RESUME), 0)?;
    a.je(normal)?;
    a.say("+")?;
    a.mov(ax, word_ptr(bp + 22))?;
    a.sub(ax, word_ptr(RESUME))?;
    print(a, hex, 2)?;
    a.say("]")?;
    a.pop(ebp)?;
    restore(a)?;
    a.mov(sp, word_ptr(SAVED_SP))?;
    a.push(word_ptr(RESUME))?;
    a.mov(word_ptr(RESUME), 0)?;
    a.test(sp, sp)?;
    a.ret()?;
    a.set_label(&mut normal)?;
    a.say("]")?;
    a.cmp(byte_ptr(bp + 20), 5)?;
    a.jb(end)?;
    a.cmp(byte_ptr(bp + 20), 8)?;
    a.jae(end)?;
    a.say("?")?;
    a.mov(ax, word_ptr(bp + 22))?;
    print(a, hex, 4)?;
    a.stop()?;
    a.set_label(&mut end)?;
    a.pop(ebp)?;
    restore(a)?;
    a.add(sp, 2)?;
    a.iret()
}

/// Vector, error code and CR2. BX points to the vector; `$word` is the size of a stack slot.
macro_rules! describe {
    ($a:ident, $hex:ident, $bx:ident, $cr2_to:ident, $word:literal) => {
        let (mut no_code, mut no_address) = ($a.create_label(), $a.create_label());
        $a.say("[")?;
        $a.movzx(eax, byte_ptr($bx))?;
        print($a, $hex, 2)?;
        $a.movzx(ecx, byte_ptr($bx))?;
        $a.cmp(ecx, 31)?;
        $a.ja(no_address)?;
        $a.mov(eax, WITH_ERROR)?;
        $a.bt(eax, ecx)?;
        $a.jae(no_code)?;
        $a.say(" ")?;
        $a.mov(eax, dword_ptr($bx + $word))?;
        print($a, $hex, 4)?;
        $a.set_label(&mut no_code)?;
        $a.cmp(byte_ptr($bx), 14)?;
        $a.jne(no_address)?;
        $a.say(" ")?;
        $a.mov($cr2_to, cr2)?;
        print($a, $hex, 8)?;
        $a.set_label(&mut no_address)?;
        $a.zero_bytes()?;
    };
}

/// Jumps to `$to` unless this is an exception that a catch waits for.
macro_rules! unless_caught {
    ($a:ident, $bx:ident, $to:ident) => {
        $a.cmp(dword_ptr(RESUME), 0)?;
        $a.je($to)?;
        $a.cmp(byte_ptr($bx), 32)?;
        $a.jae($to)?;
    };
}

/// Where the exception was raised: offset from the catch, or privilege and the lowest byte of the instruction pointer.
macro_rules! origin {
    ($a:ident, $hex:ident, $bx:ident, $ax:ident, $word:literal) => {
        let (mut user, mut end) = ($a.create_label(), $a.create_label());
        if $a.bits == 32 {
            let mut not_v86 = $a.create_label();
            $a.test(dword_ptr($bx + 4 * $word), 1u32 << 17)?;
            $a.je(not_v86)?;
            $a.say("v")?;
            $a.mov(eax, dword_ptr($bx + 2 * $word))?;
            print($a, $hex, 2)?;
            $a.jmp(end)?;
            $a.set_label(&mut not_v86)?;
        }
        $a.test(dword_ptr($bx + 3 * $word), 3u32)?;
        $a.jne(user)?;
        unless_caught!($a, $bx, end);
        let mut apart = $a.create_label();
        $a.cmp(byte_ptr($bx), 14)?;
        $a.jne(apart)?;
        $a.mov($ax, cr2)?;
        $a.cmp(eax, dword_ptr($bx + 2 * $word))?;
        $a.jne(apart)?;
        $a.say("@")?;
        $a.jmp(end)?;
        $a.set_label(&mut apart)?;
        $a.say("+")?;
        $a.mov(eax, dword_ptr($bx + 2 * $word))?;
        $a.sub(eax, dword_ptr(RESUME))?;
        print($a, $hex, 2)?;
        $a.jmp(end)?;
        $a.set_label(&mut user)?;
        $a.say("u")?;
        $a.mov(eax, dword_ptr($bx + 2 * $word))?;
        print($a, $hex, 2)?;
        $a.set_label(&mut end)?;
        $a.say("]")?;
    };
}

/// On behind the catch, or to the hook. Leaves the rest of the return to the caller.
macro_rules! go_on {
    ($a:ident, $hex:ident, $bx:ident, $sp:ident, $ptr:ident, $word:literal) => {
        let (mut normal, mut back, mut hooked) = ($a.create_label(), $a.create_label(), $a.create_label());
        unless_caught!($a, $bx, normal);
        $a.mov(ecx, DATA0 as u32)?;
        $a.mov(ss, ecx)?;
        $a.lea($sp, $ptr($bx - 4 * $word))?;
        restore(&mut *$a)?;
        $a.mov($sp, $ptr(SAVED_SP))?;
        $a.push($ptr(RESUME))?;
        $a.mov(dword_ptr(RESUME), 0)?;
        $a.test($sp, $sp)?;
        $a.ret()?;
        $a.set_label(&mut normal)?;
        $a.cmp(dword_ptr(HOOK), 0)?;
        $a.jne(hooked)?;
        $a.cmp(byte_ptr($bx), 5)?;
        $a.jb(back)?;
        $a.cmp(byte_ptr($bx), 32)?;
        $a.jae(back)?;
        $a.say("?")?;
        $a.mov(eax, dword_ptr($bx + 2 * $word))?;
        print($a, $hex, 8)?;
        $a.stop()?;
        $a.set_label(&mut hooked)?;
        $a.call($ptr(HOOK))?;
        $a.set_label(&mut back)?;
        $a.zero_bytes()?;
    };
}

/// Protected mode: the stack holds vector, error code (or 0), EIP, CS, EFLAGS.
fn handler32(a: &mut Asm, hex: CodeLabel) -> Emit {
    save(a)?;
    a.push(ds)?;
    a.push(es)?;
    a.mov(eax, DATA0 as u32)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.lea(ebx, dword_ptr(esp + 24))?;
    describe!(a, hex, ebx, eax, 4);
    origin!(a, hex, ebx, eax, 4);
    go_on!(a, hex, ebx, esp, dword_ptr, 4);
    a.pop(es)?;
    a.pop(ds)?;
    restore(a)?;
    a.add(esp, 8)?;
    a.iretd()
}

/// Long mode, likewise.
fn handler64(a: &mut Asm, hex: CodeLabel) -> Emit {
    save(a)?;
    a.lea(rbx, qword_ptr(rsp + 32))?;
    describe!(a, hex, rbx, rax, 8);
    origin!(a, hex, rbx, rax, 8);
    go_on!(a, hex, rbx, rsp, qword_ptr, 8);
    restore(a)?;
    a.add(rsp, 16)?;
    a.iretq()
}

/// The stubs of an interrupt table: each pushes its vector (and 0 in place of an error code) and jumps to the handler.
pub(crate) fn stubs(bits: u32, at: u64, handler: u64) -> Vec<u8> {
    let (count, bytes) = if bits == 16 { (STUBS16_COUNT, STUB16_BYTES) } else { (256, STUB_BYTES) };
    let mut code = Vec::with_capacity(count * bytes);
    for vector in 0..count {
        let start = code.len();
        if bits != 16 && !(vector < 32 && WITH_ERROR & 1 << vector != 0) {
            code.extend_from_slice(&[0x6a, 0]);
        }
        code.extend_from_slice(&[0x6a, vector as u8, 0xe9]);
        let width = if bits == 16 { 2 } else { 4 };
        let from = at + code.len() as u64 + width as u64;
        code.extend_from_slice(&(handler as i64 - from as i64).to_le_bytes()[..width]);
        code.resize(start + bytes, 0x90);
    }
    code
}

/// From reset: copies the payload and jumps to it.
pub(crate) fn reset_code(a: &mut Asm) -> Emit {
    a.cli()?;
    a.cld()?;
    a.mov(ax, 0xf000)?;
    a.mov(ds, ax)?;
    a.mov(ax, PAYLOAD >> 4)?;
    a.mov(es, ax)?;
    a.xor(si, si)?;
    a.xor(di, di)?;
    a.mov(cx, PAYLOAD_BYTES as u32 / 2)?;
    a.rep().movsw()?;
    a.jmp_far((PAYLOAD >> 4) as u16, START16 as u32, 2)
}

/// Real mode: segments, stack, interrupt vectors; on to `body` or to protected mode.
pub(crate) fn start16(a: &mut Asm, protected: bool) -> Emit {
    if protected {
        a.mov(ax, PAYLOAD >> 4)?;
        a.mov(ds, ax)?;
        a.lgdt(fword_ptr(POINTERS as u32))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        return a.jmp_far(CODE32, at(START32), 4);
    }
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    a.mov(sp, STACK16)?;
    a.xor(di, di)?;
    a.mov(ax, STUBS16 as u32)?;
    a.mov(cx, STUBS16_COUNT as u32)?;
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    a.mov(word_ptr(di), ax)?;
    a.mov(word_ptr(di + 2), PAYLOAD >> 4)?;
    a.add(ax, STUB16_BYTES as u32)?;
    a.add(di, 4)?;
    a.dec(cx)?;
    a.jne(next)?;
    a.jmp(BODY16 as u64)
}

/// Protected mode: segments, stack, IDT, task; on to the body or to long mode.
pub(crate) fn start32(a: &mut Asm, long: bool) -> Emit {
    a.mov(eax, DATA0 as u32)?;
    for segment in [ds, es, ss, fs, gs] {
        a.mov(segment, eax)?;
    }
    a.mov(esp, STACK)?;
    if !long {
        a.lidt(fword_ptr(at(POINTERS) + 16))?;
        a.mov(eax, TASK32 as u32)?;
        a.ltr(eax)?;
        return a.jmp(at(BODY32) as u64);
    }
    long_tables(a)?;
    a.mov(eax, cr4)?;
    a.or(eax, 1u32 << 5)?; // PAE
    a.mov(cr4, eax)?;
    a.mov(eax, PML4)?;
    a.mov(cr3, eax)?;
    a.wrmsr_to(x86::msr::EFER, 1 << 8 | 1 << 11)?; // LME, NXE
    a.mov(eax, cr0)?;
    a.or(eax, 1u32 << 31)?;
    a.mov(cr0, eax)?;
    a.jmp_far(CODE64, at(START64), 4)
}

/// Paging structures of long mode: identity; the first 2 MiB in 4 KiB pages, of which ring 3 has [`USER`] and
/// [`USER_DATA`]; the fourth GiB in 2 MiB pages.
fn long_tables(a: &mut Asm) -> Emit {
    a.table(PML4, 0x5000 / 4, 0, 0, false)?;
    a.table(PT, 512, 3, 0x1000, true)?;
    a.table(PT + (at(USER) >> 12) * 8, 1, at(USER) | 7, 0, true)?;
    a.table(PT + (USER_DATA >> 12) * 8, 16, USER_DATA | 7, 0x1000, true)?;
    a.table(PD3, 512, 0xc000_0083, 0x20_0000, true)?;
    for (entry, value) in [(PML4, PDPT | 7), (PDPT, PD | 7), (PDPT + 24, PD3 | 7), (PD, PT | 7)] {
        a.mov(dword_ptr(entry), value)?;
    }
    Ok(())
}

/// Long mode: IDT, task, stack.
pub(crate) fn start64(a: &mut Asm) -> Emit {
    a.mov(rsp, STACK as u64)?;
    a.lidt(tbyte_ptr(at(POINTERS) + 32))?;
    a.mov(eax, TASK64 as u32)?;
    a.ltr(eax)?;
    a.jmp(at(BODY64) as u64)
}
