//! Pseudo terminals for consoles: the controlling side goes to vireo-vmm, the other to whoever opens the path.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;

/// A new pseudo terminal.
#[derive(Debug)]
pub struct Pty {
    /// For vireo-vmm to read and write.
    pub controller: OwnedFd,
    /// Its other side, kept open so that the first never hangs up.
    pub terminal: OwnedFd,
    /// The other side's path.
    pub path: PathBuf,
}

/// Makes one, in raw mode: bytes pass as they are, whoever opens it.
pub fn open() -> io::Result<Pty> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&controller)?;
    rustix::pty::unlockpt(&controller)?;
    let path = rustix::pty::ptsname(&controller, Vec::new())?;
    let path = PathBuf::from(std::ffi::OsString::from(path.to_string_lossy().into_owned()));
    let terminal = open_terminal(&path)?;
    let mut modes = rustix::termios::tcgetattr(&terminal)?;
    modes.make_raw();
    rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &modes)?;
    Ok(Pty { controller, terminal, path })
}

/// Opens a terminal's path for reading and writing, without making it our controlling terminal.
pub fn open_terminal(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file: File = rustix::fs::open(path, flags, Mode::empty())?.into();
    Ok(file.into())
}
