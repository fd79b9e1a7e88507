//! Memory for generated code, the few instructions around the guest's own, and the call into it.

use std::io;

use crate::fpu::{Fpu, at};

/// Code memory mapped twice: written through one mapping, executed through the other, so that no page is ever both.
pub(super) struct CodeBuffer {
    write: *mut u8,
    exec: *const u8,
    bytes: usize,
    used: usize,
}

// SAFETY: the mappings belong to this value alone and are not tied to a thread.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    pub fn new(bytes: usize) -> io::Result<CodeBuffer> {
        // SAFETY: plain system calls; the name is a C string; results are checked before use.
        unsafe {
            let fd = libc::memfd_create(c"thunks".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |prot| libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, fd, 0);
            let sized = libc::ftruncate(fd, bytes as libc::off_t);
            let write = if sized == 0 { map(libc::PROT_READ | libc::PROT_WRITE) } else { libc::MAP_FAILED };
            let exec =
                if write == libc::MAP_FAILED { libc::MAP_FAILED } else { map(libc::PROT_READ | libc::PROT_EXEC) };
            let error = io::Error::last_os_error();
            libc::close(fd);
            if exec == libc::MAP_FAILED {
                if write != libc::MAP_FAILED {
                    libc::munmap(write, bytes);
                }
                return Err(error);
            }
            Ok(CodeBuffer { write: write.cast(), exec: exec.cast_const().cast(), bytes, used: 0 })
        }
    }

    pub fn free(&self) -> usize {
        self.bytes - self.used
    }
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Appends `code`; its address for execution. `None`: full.
    pub fn push(&mut self, code: &[u8]) -> Option<u64> {
        if code.len() > self.free() {
            return None;
        }
        // SAFETY: the range lies in the writable mapping (checked above), which nobody else holds a reference into.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(self.used), code.len()) };
        let address = self.exec as u64 + self.used as u64;
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.bytes);
        Some(address)
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, of this size, and no code runs from a dropped vCPU.
        unsafe {
            libc::munmap(self.write.cast(), self.bytes);
            libc::munmap(self.exec.cast_mut().cast(), self.bytes);
        }
    }
}

/// Calls the thunk at `address`.
#[inline(always)]
pub(super) fn call(address: u64, fpu: &mut Fpu, gpr: &mut [u64; 32]) {
    // SAFETY: addresses come only from `CodeBuffer::push` of complete thunks; blocks that hold one are dropped before the
    // buffer is cleared. A thunk follows the calling convention and reads and writes only inside these two objects.
    unsafe {
        let thunk: extern "sysv64" fn(*mut Fpu, *mut u64) = std::mem::transmute(address as *const ());
        thunk(fpu, gpr.as_mut_ptr());
    }
}

/// Machine code as it grows. RDI points at the [`Fpu`], RSI at the general registers.
#[derive(Default)]
pub(super) struct Writer {
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    fn disp(&mut self, offset: usize) {
        self.raw(&(offset as i32).to_le_bytes());
    }
    /// ModRM with a 32-bit displacement from RDI (7) or RSI (6).
    fn modrm(&mut self, reg: u8, base: u8, offset: usize) {
        self.bytes.push(0x80 | (reg & 7) << 3 | base);
        self.disp(offset);
    }
    fn movups(&mut self, opcode: u8, n: u8, offset: usize) {
        if n >= 8 {
            self.bytes.push(0x44);
        }
        self.raw(&[0x0f, opcode]);
        self.modrm(n, 7, offset);
    }
    /// The third opcode map with a 256-bit VEX prefix: VINSERTF128 (0x18, `vvvv` = n) and VEXTRACTF128 (0x19).
    fn vex_high(&mut self, opcode: u8, n: u8, vvvv: u8, offset: usize) {
        let r = if n >= 8 { 0 } else { 0x80 };
        self.raw(&[0xc4, r | 0x60 | 3, (!vvvv & 15) << 3 | 4 | 1, opcode]);
        self.modrm(n, 7, offset);
        self.bytes.push(1);
    }
    pub fn load_vector(&mut self, n: u8, upper: bool) {
        self.movups(0x10, n, at::XMM + 16 * n as usize);
        if upper {
            self.vex_high(0x18, n, n, at::YMM_HIGH + 16 * n as usize);
        }
    }
    pub fn store_vector(&mut self, n: u8, upper: bool) {
        self.movups(0x11, n, at::XMM + 16 * n as usize);
        if upper {
            self.vex_high(0x19, n, 0, at::YMM_HIGH + 16 * n as usize);
        }
    }
    pub fn load_gpr(&mut self, guest: u8, host: u8, high: bool) {
        let r = if host >= 8 { 4 } else { 0 };
        if high {
            self.raw(&[0x48 | r, 0x0f, 0xb6]);
            self.modrm(host, 6, 8 * guest as usize + 1);
        } else {
            self.raw(&[0x48 | r, 0x8b]);
            self.modrm(host, 6, 8 * guest as usize);
        }
    }
    pub fn store_gpr(&mut self, guest: u8, host: u8) {
        let r = if host >= 8 { 4 } else { 0 };
        self.raw(&[0x48 | r, 0x89]);
        self.modrm(host, 6, 8 * guest as usize);
    }
    /// `movzx eax, word [flags]; add al, 0x7f; sahf`
    pub fn load_flags(&mut self) {
        self.raw(&[0x0f, 0xb7]);
        self.modrm(0, 7, at::FLAGS);
        self.raw(&[0x04, 0x7f, 0x9e]);
    }
    /// `lahf; seto al; mov [flags], ax`
    pub fn store_flags(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0, 0x66, 0x89]);
        self.modrm(0, 7, at::FLAGS);
    }
    pub fn ldmxcsr(&mut self, offset: usize) {
        self.raw(&[0x0f, 0xae]);
        self.modrm(2, 7, offset);
    }
    pub fn stmxcsr(&mut self, offset: usize) {
        self.raw(&[0x0f, 0xae]);
        self.modrm(3, 7, offset);
    }
    /// `fxrstor64 [rdi]`
    pub fn fxrstor(&mut self) {
        self.raw(&[0x48, 0x0f, 0xae, 0x0f]);
    }
    /// `fxsave64 [rdi]; fninit`: no pending guest exception stays in the host's unit.
    pub fn fxsave_and_leave(&mut self) {
        self.raw(&[0x48, 0x0f, 0xae, 0x07, 0xdb, 0xe3]);
    }
    /// `vzeroupper` where the upper halves were used, then `ret`.
    pub fn leave(&mut self, upper: bool) {
        if upper {
            self.raw(&[0xc5, 0xf8, 0x77]);
        }
        self.bytes.push(0xc3);
    }
}
