//! Huge pages for large buffers.

/// Asks the kernel to back `memory`, which starts at a page, with huge pages. It is advice: a kernel that has none free,
/// or none at all, uses small ones.
pub(crate) fn advise_huge_pages(memory: &mut [u8]) {
    // SAFETY: the memory is borrowed for this call by nobody else, and the advice changes what backs it, never what it
    // holds.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
}
