//! The allocator of this process.

/// All threads allocate from one heap. An arena of their own, which glibc gives to every further thread, grows by a
/// page and a system call at a time, and holds what it has; no thread here allocates often enough to wait for another.
#[allow(unsafe_code)]
pub fn share() {
    // SAFETY: mallopt only sets a limit of the allocator, before there is a second thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
