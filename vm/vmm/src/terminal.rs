//! The person's terminal: raw while a guest has it, and as it was afterwards, whatever happens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The key that leaves: Ctrl and ].
pub const LEAVE_KEY: u8 = 0x1d;

static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Makes `terminal` raw; [`restore`] undoes it. Something that is no terminal stays as it is; returns whether it is one.
pub fn make_raw(terminal: impl AsFd) -> io::Result<bool> {
    let Ok(before) = tcgetattr(&terminal) else { return Ok(false) };
    let mut raw = before.clone();
    raw.make_raw();
    let fd = terminal.as_fd().try_clone_to_owned()?;
    tcsetattr(&fd, OptionalActions::Now, &raw)?;
    *BEFORE.lock() = Some((fd, before));
    Ok(true)
}

/// Puts the terminal back. Does nothing if there is nothing to undo; from any thread.
pub fn restore() {
    // `try_lock`: a panic inside `make_raw` must not wait for itself.
    if let Some((fd, before)) = BEFORE.try_lock().and_then(|mut before| before.take()) {
        let _ = tcsetattr(&fd, OptionalActions::Drain, &before);
    }
}

/// The same file as `fd` with an open file description of our own that does not block: other programs share the
/// original. What cannot be opened again (a socket) is made not to block itself.
pub fn reopen_nonblocking(fd: impl AsFd, write: bool) -> io::Result<OwnedFd> {
    use rustix::fs::FileType;
    let fd = fd.as_fd();
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    match kind {
        FileType::CharacterDevice | FileType::Fifo => {
            let access = if write { OFlags::WRONLY } else { OFlags::RDONLY };
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
            match rustix::fs::open(path, flags, Mode::empty()) {
                Ok(own) => return Ok(own),
                // Without /proc or permission for the device the shared description has to do.
                Err(_) => crate::console::set_nonblocking(fd)?,
            }
        }
        FileType::Socket => crate::console::set_nonblocking(fd)?,
        _ => {}
    }
    fd.try_clone_to_owned()
}
