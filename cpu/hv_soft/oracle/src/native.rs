//! The processor: a traced child process executes one instruction on given registers and memory.

use std::io;
use std::mem::MaybeUninit;

use hv_soft::UserRegisters;

use crate::layout::{
    CODE, DATA, DATA_BYTES, FS_BASE, GS_BASE, Mode, RO_BYTES, SHARED_BYTES, UserSegment, local_segments,
};

/// What one instruction came to on the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Native {
    /// It completed, or made progress.
    Done,
    /// It raised an exception.
    Exception {
        /// Vector number; 16 stands for floating-point exceptions of either unit.
        vector: u8,
        /// Faulting address and whether the page was present, for page faults.
        page: Option<(u64, bool)>,
    },
}

/// The traced child and the memory shared with it.
pub struct Processor {
    child: libc::pid_t,
    shared: *mut u8,
    /// Registers as the kernel gave them at first: segments and the like are kept.
    template: libc::user_regs_struct,
    xstate: Vec<u8>,
    /// The host's kernel lets user code have an LDT.
    has_ldt: bool,
}

/// The kernel's description of an LDT entry. Linux asm/ldt.h `struct user_desc`.
#[repr(C)]
struct LdtEntry {
    number: u32,
    base: u32,
    limit: u32,
    /// seg_32bit, contents (2), read_exec_only, limit_in_pages, seg_not_present, useable.
    flags: u32,
}

/// Writes an LDT entry of the calling process; false where the kernel has no LDT for user code.
fn write_ldt(segment: &UserSegment) -> bool {
    let contents = if segment.code { 2 } else { 0 };
    let flags = segment.big as u32 | contents << 1 | 1 << 6;
    let entry =
        LdtEntry { number: (segment.selector >> 3) as u32, base: segment.base as u32, limit: segment.limit, flags };
    // SAFETY: modify_ldt reads the entry of the size given and changes nothing that this process uses.
    unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &entry, size_of::<LdtEntry>()) == 0 }
}

fn last() -> io::Error {
    io::Error::last_os_error()
}

impl Processor {
    /// Starts the child, stopped, with code at [`CODE`], [`DATA_BYTES`] of writable data at [`DATA`] and [`RO_BYTES`] of
    /// read-only data behind them.
    pub fn start() -> io::Result<Processor> {
        // SAFETY: system calls with checked results. The child of the fork uses only async-signal-safe calls and never
        // returns from this function.
        unsafe {
            let fd = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, SHARED_BYTES as libc::off_t) != 0 {
                return Err(last());
            }
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            let shared = libc::mmap(std::ptr::null_mut(), SHARED_BYTES, rw, libc::MAP_SHARED, fd, 0);
            if shared == libc::MAP_FAILED {
                return Err(last());
            }
            let child = libc::fork();
            if child < 0 {
                return Err(last());
            }
            if child == 0 {
                let place = |address: u64, bytes: usize, prot: libc::c_int, offset: usize| {
                    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
                    let at = libc::mmap(address as *mut _, bytes, prot, flags, fd, offset as libc::off_t);
                    if at as u64 != address {
                        libc::_exit(9);
                    }
                };
                place(CODE, 4096, libc::PROT_READ | libc::PROT_EXEC, 0);
                place(DATA, DATA_BYTES, rw, 4096);
                place(DATA + DATA_BYTES as u64, RO_BYTES, libc::PROT_READ, 4096 + DATA_BYTES);
                let has_ldt = local_segments().iter().all(write_ldt);
                std::ptr::write_volatile(shared.cast::<u8>(), has_ldt as u8);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::raise(libc::SIGSTOP);
                libc::_exit(8);
            }
            libc::close(fd);
            let mut status = 0;
            if libc::waitpid(child, &mut status, 0) != child || !libc::WIFSTOPPED(status) {
                return Err(io::Error::other("the traced child did not come up: are its fixed addresses taken?"));
            }
            let mut template = MaybeUninit::<libc::user_regs_struct>::zeroed();
            if libc::ptrace(libc::PTRACE_GETREGS, child, 0, template.as_mut_ptr()) < 0 {
                return Err(last());
            }
            let shared = shared.cast::<u8>();
            let has_ldt = std::ptr::read_volatile(shared) == 1;
            let template = template.assume_init();
            let mut processor = Processor { child, shared, template, xstate: vec![0; 16384], has_ldt };
            let bytes = processor.get_xstate()?;
            processor.xstate.truncate(bytes);
            Ok(processor)
        }
    }

    fn xstate_call(&mut self, request: libc::c_uint) -> io::Result<usize> {
        const NT_X86_XSTATE: usize = 0x202;
        let mut vector = libc::iovec { iov_base: self.xstate.as_mut_ptr().cast(), iov_len: self.xstate.len() };
        // SAFETY: the vector describes a live buffer of ours.
        if unsafe { libc::ptrace(request, self.child, NT_X86_XSTATE, &mut vector) } < 0 {
            return Err(last());
        }
        Ok(vector.iov_len)
    }
    fn get_xstate(&mut self) -> io::Result<usize> {
        self.xstate_call(libc::PTRACE_GETREGSET)
    }

    /// Whether code of `mode` can run: 16-bit code and the far segments of 32-bit code need an LDT.
    pub fn can(&self, mode: Mode) -> bool {
        mode == Mode::Long || self.has_ldt
    }

    /// The shared memory: code page, writable data, read-only data.
    pub fn memory(&mut self) -> &mut [u8] {
        // SAFETY: mapped for the life of `self`; the child is stopped whenever we run, so nobody else writes.
        unsafe { std::slice::from_raw_parts_mut(self.shared, SHARED_BYTES) }
    }

    /// Executes the instruction at `registers.rip` in code of `mode`; on return `registers` is what it left.
    pub fn step(&mut self, mode: Mode, registers: &mut UserRegisters) -> io::Result<Native> {
        self.set(mode, registers)?;
        // SAFETY: the child is ours and stopped.
        unsafe {
            if libc::ptrace(libc::PTRACE_SINGLESTEP, self.child, 0, 0) < 0 {
                return Err(last());
            }
            let mut status = 0;
            if libc::waitpid(self.child, &mut status, 0) != self.child {
                return Err(last());
            }
            if !libc::WIFSTOPPED(status) {
                return Err(io::Error::other("the traced child is gone"));
            }
            let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
            if libc::ptrace(libc::PTRACE_GETSIGINFO, self.child, 0, info.as_mut_ptr()) < 0 {
                return Err(last());
            }
            let info = info.assume_init();
            self.get(registers)?;
            classify(libc::WSTOPSIG(status), &info)
        }
    }

    fn set(&mut self, mode: Mode, r: &UserRegisters) -> io::Result<()> {
        let g = &r.gpr;
        let mut regs = libc::user_regs_struct {
            rax: g[0],
            rcx: g[1],
            rdx: g[2],
            rbx: g[3],
            rsp: g[4],
            rbp: g[5],
            rsi: g[6],
            rdi: g[7],
            r8: g[8],
            r9: g[9],
            r10: g[10],
            r11: g[11],
            r12: g[12],
            r13: g[13],
            r14: g[14],
            r15: g[15],
            rip: r.rip,
            eflags: r.rflags,
            orig_rax: u64::MAX,
            fs_base: FS_BASE,
            gs_base: GS_BASE,
            ..self.template
        };
        if mode != Mode::Long {
            let data = mode.data_segment().selector.into();
            let [fs, gs] = mode.far_segments().map(|s| u64::from(s.selector));
            regs = libc::user_regs_struct {
                cs: mode.code_segment().selector.into(),
                ss: data,
                ds: data,
                es: data,
                fs,
                gs,
                fs_base: mode.far_segments()[0].base,
                gs_base: mode.far_segments()[1].base,
                ..regs
            };
        }
        // SAFETY: a complete structure of the type this call takes.
        if unsafe { libc::ptrace(libc::PTRACE_SETREGS, self.child, 0, &regs) } < 0 {
            return Err(last());
        }
        self.xstate[..464].copy_from_slice(&r.xsave[..464]);
        self.xstate[512] = 7;
        if self.xstate.len() >= 832 {
            self.xstate[576..832].copy_from_slice(&r.xsave[576..832]);
        } else {
            self.xstate[512] = 3;
        }
        self.xstate_call(libc::PTRACE_SETREGSET).map(|_| ())
    }

    fn get(&mut self, r: &mut UserRegisters) -> io::Result<()> {
        let mut regs = MaybeUninit::<libc::user_regs_struct>::zeroed();
        // SAFETY: a buffer of the type this call fills in.
        let s = unsafe {
            if libc::ptrace(libc::PTRACE_GETREGS, self.child, 0, regs.as_mut_ptr()) < 0 {
                return Err(last());
            }
            regs.assume_init()
        };
        r.gpr = [
            s.rax, s.rcx, s.rdx, s.rbx, s.rsp, s.rbp, s.rsi, s.rdi, s.r8, s.r9, s.r10, s.r11, s.r12, s.r13, s.r14,
            s.r15,
        ];
        (r.rip, r.rflags) = (s.rip, s.eflags);
        self.get_xstate()?;
        r.xsave[..512].copy_from_slice(&self.xstate[..512]);
        if self.xstate.len() >= 832 {
            r.xsave[576..832].copy_from_slice(&self.xstate[576..832]);
        }
        Ok(())
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        // SAFETY: our child, our mapping.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            let mut status = 0;
            libc::waitpid(self.child, &mut status, 0);
            libc::munmap(self.shared.cast(), SHARED_BYTES);
        }
    }
}

/// The exception behind a signal. Linux arch/x86/kernel/traps.c.
fn classify(signal: libc::c_int, info: &libc::siginfo_t) -> io::Result<Native> {
    const SI_KERNEL: libc::c_int = 0x80;
    const SEGV_MAPERR: libc::c_int = 1;
    let exception = |vector| Native::Exception { vector, page: None };
    Ok(match (signal, info.si_code) {
        (libc::SIGTRAP, code) if code != SI_KERNEL => Native::Done,
        (libc::SIGTRAP, _) => exception(3),
        (libc::SIGSEGV, SI_KERNEL) => exception(13),
        (libc::SIGSEGV, code) => {
            // SAFETY: SIGSEGV with a memory code carries an address.
            let address = unsafe { info.si_addr() } as u64;
            Native::Exception { vector: 14, page: Some((address, code != SEGV_MAPERR)) }
        }
        (libc::SIGBUS, 1) => exception(17),
        (libc::SIGBUS, _) => exception(12),
        (libc::SIGILL, _) => exception(6),
        (libc::SIGFPE, 1) => exception(0),
        (libc::SIGFPE, _) => exception(16),
        _ => return Err(io::Error::other(format!("signal {signal} with code {}", info.si_code))),
    })
}
