//! Start-up by vireod: one configuration in over a socket, one answer out.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use monitor::{Channel, StartReply, VmConfig};
use rustix::fs::{FileType, Mode, OFlags};

use crate::error::VmmError;
use crate::setup::Files;

/// How long the configuration may take: vireod sends it at once.
const RECEIVE_LIMIT: Duration = Duration::from_secs(30);

/// The start-up socket.
pub struct StartSocket {
    channel: Channel,
    fd: i32,
}

impl StartSocket {
    /// Takes the socket with number `fd`, which was open when the process started. Call it once, first.
    #[allow(unsafe_code)]
    pub fn take(fd: i32) -> Result<StartSocket, VmmError> {
        let failed = |source: io::Error| VmmError::StartFd { fd, source };
        let path = format!("/proc/self/fd/{fd}");
        let stat = rustix::fs::stat(path.as_str()).map_err(|e| failed(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(failed(io::Error::from(rustix::io::Errno::NOTSOCK)));
        }
        // SAFETY: the number is open, as stat has found, and came from whoever started this process for this purpose;
        // nothing in the process owns it, because `main` calls this before it opens anything.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        close_inherited(fd);
        let socket = UnixStream::from(move_from_stdio(socket).map_err(failed)?);
        socket.set_read_timeout(Some(RECEIVE_LIMIT)).map_err(failed)?;
        Ok(StartSocket { channel: Channel::new(socket), fd })
    }

    /// Receives the configuration and its descriptors.
    pub fn receive(&mut self) -> Result<(VmConfig, Files), VmmError> {
        let received = self.channel.receive().map_err(|source| VmmError::Receive { fd: self.fd, source });
        received.map(|(config, fds)| (config, Files(fds)))
    }

    /// Answers, and closes the socket.
    pub fn answer(mut self, reply: &StartReply) {
        // A vireod that is gone will find the machine by its monitor.
        let _ = self.channel.send(reply, &[]);
    }
}

/// Closes every descriptor but the standard streams and `kept`: what a guest that takes over this process finds open must
/// be what its configuration names, whatever the starting process forgot to keep to itself.
#[allow(unsafe_code)]
fn close_inherited(kept: i32) {
    let kept = kept.unsigned_abs().max(2);
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nothing in this process owns a descriptor in the range: it has opened none yet, see `take`. A kernel
            // without the call (before Linux 5.9) leaves them open, which costs tidiness only.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
}

/// A standard stream's number must stay taken, or the next file to be opened would become standard input.
fn move_from_stdio(socket: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    if socket.as_raw_fd() > 2 {
        return Ok(socket);
    }
    let moved = rustix::io::fcntl_dupfd_cloexec(&socket, 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    match socket.as_raw_fd() {
        0 => rustix::stdio::dup2_stdin(&null)?,
        1 => rustix::stdio::dup2_stdout(&null)?,
        _ => rustix::stdio::dup2_stderr(&null)?,
    }
    // The number now belongs to the standard stream.
    std::mem::forget(socket);
    Ok(moved)
}
