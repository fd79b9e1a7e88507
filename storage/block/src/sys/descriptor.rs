//! Descriptors that a process inherits and knows by number only.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A descriptor of one's own for what an inherited one refers to. The inherited one stays open.
pub(crate) fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory of this process, and for a number that is not open it fails.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor just now, so that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[test]
fn a_number_that_is_not_open_is_refused() {
    assert_eq!(duplicate(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert!(duplicate(0).is_ok() || duplicate(1).is_ok() || duplicate(2).is_ok());
}
