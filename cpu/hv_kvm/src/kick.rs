//! Making a vCPU leave the guest, without losing the request when it is about to enter.

use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, Ordering};

use hv_core::Kick;
use parking_lot::Mutex;

/// The signal that interrupts KVM_RUN. Real-time signals are free for programs.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler of the kick signal, once per process: it does nothing, the interruption is the point.
pub(crate) fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a handler that touches nothing may run at any point; the action is fully initialised.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
        }
    });
}

/// What others may touch of a vCPU.
#[derive(Default)]
pub(crate) struct Remote {
    /// `kvm_run.immediate_exit`, null once the vCPU is gone. The lock keeps the mapping alive during a kick.
    immediate_exit: Mutex<AtomicPtr<u8>>,
    /// Thread inside `run`, 0 outside.
    thread: AtomicI32,
}

impl Remote {
    /// `immediate_exit` is that byte of the vCPU's `kvm_run`, mapped until [`Remote::gone`].
    pub fn new(immediate_exit: *mut u8) -> Remote {
        Remote { immediate_exit: Mutex::new(AtomicPtr::new(immediate_exit)), thread: AtomicI32::new(0) }
    }
    /// The mapping goes away.
    pub fn gone(&self) {
        self.immediate_exit.lock().store(std::ptr::null_mut(), Ordering::SeqCst);
    }
    /// The calling thread is about to run the vCPU.
    pub fn enter(&self) {
        // SAFETY: gettid has no preconditions.
        self.thread.store(unsafe { libc::gettid() }, Ordering::SeqCst);
    }
    /// It does not any more.
    pub fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }
    /// The next KVM_RUN returns at once; one under way is interrupted.
    pub fn interrupt(&self) {
        let guard = self.immediate_exit.lock();
        let at = guard.load(Ordering::SeqCst);
        if at.is_null() {
            return;
        }
        // SAFETY: not null, so the mapping exists, and the lock keeps `gone` from ending it; the kernel only reads it.
        unsafe { AtomicU8::from_ptr(at) }.store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a signal with a handler that does nothing, to a thread of this process.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }
}

/// The handle the machine holds.
pub(crate) struct Kicker(pub Arc<Remote>);
impl Kick for Kicker {
    fn kick(&self) {
        self.0.interrupt();
    }
}
