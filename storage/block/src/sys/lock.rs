//! Open file description locks, `fcntl(2)` "Open file description locks (non-POSIX)". They belong to the open
//! file, not to the process, so they travel with a descriptor that is passed on.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

fn request(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call because `file` is borrowed, and `lock` is a valid
    // flock that the kernel reads and, for F_OFD_GETLK, writes.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes a shared lock on one byte, without waiting.
pub(crate) fn lock_shared(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut request(libc::F_RDLCK, byte))
}

/// Drops a lock on one byte.
pub(crate) fn unlock(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK, byte))
}

/// Whether another open file holds a lock on this byte.
pub(crate) fn lock_byte_held_elsewhere(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
