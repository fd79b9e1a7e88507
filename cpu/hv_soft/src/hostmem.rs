//! The only way the interpreter touches guest memory: single machine instructions on host addresses.
//!
//! Guest memory is shared with device threads and may change at any time, so no Rust reference to it is ever made;
//! every access is one instruction, with the tearing (none when aligned) and ordering that the guest would see.

use std::arch::asm;

/// A host address of guest memory, good for some number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostPtr(pub u64);

macro_rules! access {
    ($load:ident, $store:ident, $t:ty, $class:ident, $reg:literal) => {
        /// Loads a value; unaligned is fine.
        #[inline(always)]
        pub(crate) fn $load(at: HostPtr) -> $t {
            let value: $t;
            // SAFETY: a `HostPtr` comes from the MMU, which checked that the page is mapped guest RAM (kept alive by the
            // `GuestRam` in the same vCPU) and that the access does not cross its end.
            unsafe {
                asm!(concat!("mov ", $reg, ", [{p}]"), v = out($class) value, p = in(reg) at.0,
                     options(nostack, preserves_flags, readonly));
            }
            value
        }
        /// Stores a value; unaligned is fine.
        #[inline(always)]
        pub(crate) fn $store(at: HostPtr, value: $t) {
            // SAFETY: as above; the page is writable in this process (all guest RAM is).
            unsafe {
                asm!(concat!("mov [{p}], ", $reg), v = in($class) value, p = in(reg) at.0,
                     options(nostack, preserves_flags));
            }
        }
    };
}
access!(load8, store8, u8, reg_byte, "{v}");
access!(load16, store16, u16, reg, "{v:x}");
access!(load32, store32, u32, reg, "{v:e}");
access!(load64, store64, u64, reg, "{v}");

/// Copies guest memory into `buf`.
#[inline]
pub(crate) fn read_bytes(at: HostPtr, buf: &mut [u8]) {
    // SAFETY: as in `load8`; the MMU checked `buf.len()` bytes. `rep movsb` reads each byte once.
    unsafe {
        asm!("rep movsb", inout("rcx") buf.len() => _, inout("rsi") at.0 => _, inout("rdi") buf.as_mut_ptr() => _,
             options(nostack, preserves_flags));
    }
}

/// `rep movs` upwards with `bytes` per element: overlapping ranges behave as the guest's own instruction does.
#[inline]
pub(crate) fn rep_movs(dst: HostPtr, src: HostPtr, elements: usize, bytes: usize) {
    // SAFETY: the caller got both ranges from the MMU, each within one page of guest RAM.
    unsafe {
        match bytes {
            1 => asm!("rep movsb", inout("rcx") elements => _, inout("rsi") src.0 => _, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            2 => asm!("rep movsw", inout("rcx") elements => _, inout("rsi") src.0 => _, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            4 => asm!("rep movsd", inout("rcx") elements => _, inout("rsi") src.0 => _, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            _ => asm!("rep movsq", inout("rcx") elements => _, inout("rsi") src.0 => _, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
        }
    }
}

/// `rep stos` upwards with `bytes` per element.
#[inline]
pub(crate) fn rep_stos(dst: HostPtr, value: u64, elements: usize, bytes: usize) {
    // SAFETY: the caller got the range from the MMU, within one page of guest RAM.
    unsafe {
        match bytes {
            1 => asm!("rep stosb", inout("rcx") elements => _, in("rax") value, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            2 => asm!("rep stosw", inout("rcx") elements => _, in("rax") value, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            4 => asm!("rep stosd", inout("rcx") elements => _, in("rax") value, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
            _ => asm!("rep stosq", inout("rcx") elements => _, in("rax") value, inout("rdi") dst.0 => _,
                      options(nostack, preserves_flags)),
        }
    }
}

/// Compare-and-exchange on guest memory, for page-table bits that hardware sets atomically. True if it was exchanged.
#[inline]
pub(crate) fn cmpxchg64(at: HostPtr, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: as in `store64`; page-table entries are 8-byte aligned, so the lock never splits.
    unsafe {
        asm!("lock cmpxchg [{p}], {new}", p = in(reg) at.0, new = in(reg) new, inout("rax") old => found,
             options(nostack));
    }
    found == old
}

/// The 32-bit form of [`cmpxchg64`].
#[inline]
pub(crate) fn cmpxchg32(at: HostPtr, old: u32, new: u32) -> bool {
    let found: u32;
    // SAFETY: as in `cmpxchg64`.
    unsafe {
        asm!("lock cmpxchg [{p}], {new:e}", p = in(reg) at.0, new = in(reg) new, inout("eax") old => found,
             options(nostack));
    }
    found == old
}
