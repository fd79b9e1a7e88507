//! An assembler with the few things every guest says: print, catch an exception, stop.

use std::ops::{Deref, DerefMut};

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::layout::{CODE32_USER, CODE64_USER, DATA_USER, EXTRA, HOOK, PORT_OUT, PORT_STOP, STACK_USER, USER, at};

/// What emitting code returns.
pub type Emit = Result<(), IcedError>;

/// Addresses of a mode's library routines.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lib {
    /// Prints ECX digits of EAX; changes no register.
    pub hex: u64,
    /// The first half of [`Asm::catch`].
    pub catch: u64,
    /// What [`Asm::catch`] calls where nothing was raised: prints `-`.
    pub missed: u64,
}

/// Emits code of one mode.
pub struct Asm {
    code: CodeAssembler,
    /// 16, 32 or 64.
    pub bits: u32,
    lib: Lib,
}

impl Asm {
    pub(crate) fn new(bits: u32, lib: Lib) -> Result<Asm, IcedError> {
        Ok(Asm { code: CodeAssembler::new(bits)?, bits, lib })
    }

    /// Prints `text`. Changes RAX and RDX.
    pub fn say(&mut self, text: &str) -> Emit {
        self.mov(dx, PORT_OUT as u32)?;
        text.bytes().try_for_each(|byte| {
            self.mov(al, byte as u32)?;
            self.out(dx, al)
        })
    }

    /// Prints the lowest `digits` hexadecimal digits of `value`. Changes no register.
    pub fn hex(&mut self, value: AsmRegister32, digits: u32) -> Emit {
        let hex = self.lib.hex;
        if self.bits == 64 {
            self.push(rax)?;
            self.push(rcx)?;
        } else {
            self.push(eax)?;
            self.push(ecx)?;
        }
        self.mov(eax, value)?;
        self.mov(ecx, digits)?;
        self.call(hex)?;
        if self.bits == 64 {
            self.pop(rcx)?;
            self.pop(rax)
        } else {
            self.pop(ecx)?;
            self.pop(eax)
        }
    }

    /// Runs `code`; an exception in it is reported by its handler and control goes on behind. The handler prints, after
    /// `+`, how far the saved instruction pointer is from the start of this (two bytes before `code`). Where nothing is
    /// raised, prints `-`. `code` must be short enough for a short jump.
    pub fn catch(&mut self, code: impl FnOnce(&mut Asm) -> Emit) -> Emit {
        let Lib { catch, missed, .. } = self.lib;
        let mut done = self.create_label();
        self.call(catch)?;
        self.jne(done)?;
        code(self)?;
        self.call(missed)?;
        self.set_label(&mut done)?;
        self.zero_bytes()
    }

    /// Ends the guest.
    pub fn stop(&mut self) -> Emit {
        self.mov(al, 0)?;
        self.out(PORT_STOP as u32, al)?;
        self.hlt()
    }

    /// A far jump (`0xea`) with an offset of `offset_bytes` 2 or 4 to `selector`.
    pub fn jmp_far(&mut self, selector: u16, offset: u32, offset_bytes: u32) -> Emit {
        self.far(0xea, selector, offset, offset_bytes)
    }

    /// A far call, likewise.
    pub fn call_far(&mut self, selector: u16, offset: u32, offset_bytes: u32) -> Emit {
        self.far(0x9a, selector, offset, offset_bytes)
    }

    fn far(&mut self, opcode: u8, selector: u16, offset: u32, offset_bytes: u32) -> Emit {
        let mut bytes = Vec::new();
        if (offset_bytes == 4) != (self.bits == 32) {
            bytes.push(0x66);
        }
        bytes.push(opcode);
        bytes.extend_from_slice(&offset.to_le_bytes()[..offset_bytes as usize]);
        bytes.extend_from_slice(&selector.to_le_bytes());
        self.db(&bytes)
    }

    /// Fills `count` table entries of 4 (`wide`: 8) bytes at `table` with `first`, `first + step`, … In 32-bit code.
    /// Changes EAX, ECX and EDI.
    pub fn table(&mut self, table: u32, count: u32, first: u32, step: u32, wide: bool) -> Emit {
        self.mov(edi, table)?;
        self.mov(eax, first)?;
        self.mov(ecx, count)?;
        let mut next = self.create_label();
        self.set_label(&mut next)?;
        self.mov(dword_ptr(edi), eax)?;
        if wide {
            self.mov(dword_ptr(edi + 4), 0u32)?;
        }
        self.add(eax, step)?;
        self.add(edi, if wide { 8u32 } else { 4 })?;
        self.dec(ecx)?;
        self.jne(next)
    }

    /// Goes to ring 3 at [`USER`] with `flags`, stack and selectors of ring 3, by IRET. In 32-bit and 64-bit code.
    pub fn enter_user(&mut self, flags: u32) -> Emit {
        self.enter_user_at(0, flags)
    }

    /// Likewise, `offset` bytes into the page.
    pub fn enter_user_at(&mut self, offset: u32, flags: u32) -> Emit {
        let code = if self.bits == 64 { CODE64_USER } else { CODE32_USER };
        for word in [DATA_USER as u32, STACK_USER, flags | 2, code as u32, at(USER) + offset] {
            self.push(word as i32)?;
        }
        if self.bits == 64 { self.iretq() } else { self.iretd() }
    }

    /// Sets bits of CR0. In 32-bit and 64-bit code; changes RAX.
    pub fn set_cr0(&mut self, bits: u32) -> Emit {
        self.change(cr0, |a| a.or(eax, bits))
    }
    /// Clears bits of CR0, likewise.
    pub fn clear_cr0(&mut self, bits: u32) -> Emit {
        self.change(cr0, |a| a.and(eax, !bits))
    }
    /// Sets bits of CR4, likewise.
    pub fn set_cr4(&mut self, bits: u32) -> Emit {
        self.change(cr4, |a| a.or(eax, bits))
    }
    /// Clears bits of CR4, likewise.
    pub fn clear_cr4(&mut self, bits: u32) -> Emit {
        self.change(cr4, |a| a.and(eax, !bits))
    }
    fn change(&mut self, register: AsmRegisterCr, change: impl FnOnce(&mut Asm) -> Emit) -> Emit {
        if self.bits == 64 {
            self.mov(rax, register)?;
            change(self)?;
            return self.mov(register, rax);
        }
        self.mov(eax, register)?;
        change(self)?;
        self.mov(register, eax)
    }

    /// RETF with a 64-bit operand.
    pub fn retfq(&mut self) -> Emit {
        self.db(&[0x48, 0xcb])
    }

    /// Installs the hook at [`EXTRA`]. In 32-bit and 64-bit code.
    pub fn hook(&mut self) -> Emit {
        self.mov(dword_ptr(HOOK), at(EXTRA))
    }

    /// Prints `register` with 8 digits and a space. Changes EAX and EDX.
    pub fn show(&mut self, register: AsmRegister32) -> Emit {
        self.hex(register, 8)?;
        self.say(" ")
    }

    /// Writes an MSR. Changes EAX, ECX, EDX.
    pub fn wrmsr_to(&mut self, register: u32, value: u64) -> Emit {
        self.mov(ecx, register)?;
        self.mov(eax, value as u32)?;
        self.mov(edx, (value >> 32) as u32)?;
        self.wrmsr()
    }
}

impl Deref for Asm {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.code
    }
}
impl DerefMut for Asm {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.code
    }
}
