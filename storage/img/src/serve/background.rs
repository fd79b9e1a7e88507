//! `--fork`: the server runs in a process of its own, and whoever started it goes on when clients can connect.
//!
//! The process is this program once more, with the same words and a sign in its environment, rather than a fork: it
//! starts with one thread and clean locks. It says on a pipe that it listens. What goes wrong before that it prints
//! itself, and its exit code is passed on.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, fcntl_lock};

use super::ServeError;
use crate::error::ImgError;

/// The sign.
const CHILD: &str = "VIREO_IMG_SERVE_CHILD";
/// What it says where the child inherits sockets that were meant for its parent: `LISTEN_PID` names the wrong process.
const WITH_SOCKETS: &str = "sockets";
/// What the child says.
const LISTENING: &[u8] = b"listening\n";

/// Whether this process was started by [`start`].
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Whether this process was started by [`start`] to serve the sockets that its parent got.
pub fn has_sockets_of_parent() -> bool {
    std::env::var_os(CHILD).is_some_and(|sign| sign == WITH_SOCKETS)
}

/// Starts the server, with the sockets of socket activation if there are any, and waits until clients can connect.
pub fn start(with_sockets: bool) -> Result<u8, ImgError> {
    let failed = |source| ServeError::Background { source };
    let mut words = std::env::args_os();
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command
        .arg0(words.next().unwrap_or_default())
        .args(words)
        .env(CHILD, if with_sockets { WITH_SOCKETS } else { "1" });
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut said = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_end(&mut said).map_err(failed)?;
    }
    if said == LISTENING {
        return Ok(0);
    }
    let status = child.wait().map_err(failed)?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1))
}

/// Tells that clients can connect, and leaves the terminal. Messages are kept for `verbose` only: a caller that reads
/// them to their end would wait for the server's.
pub fn detach(verbose: bool) -> Result<(), ServeError> {
    let failed = |source| ServeError::Background { source };
    // It fails for a process that leads a session already.
    let _ = rustix::process::setsid();
    std::io::stdout().write_all(LISTENING).map_err(failed)?;
    std::io::stdout().flush().map_err(failed)?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
    if !verbose {
        rustix::stdio::dup2_stderr(&null).map_err(|errno| failed(errno.into()))?;
    }
    rustix::stdio::dup2_stdout(&null).map_err(|errno| failed(errno.into()))
}

/// Writes this process's id, for its owner only, as qemu-nbd does, and locks the file while it is open. It stays. A file
/// that another server has locked is left as it is.
pub fn write_pid(path: &Path) -> Result<File, ServeError> {
    let failed = |source| ServeError::PidFile { path: path.to_owned(), source };
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = open.map_err(failed)?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| ServeError::PidLock { source: errno.into() })?;
    let text = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(failed)?;
    Ok(file)
}
