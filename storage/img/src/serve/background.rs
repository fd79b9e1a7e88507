//! `--fork`: the server runs in a process of its own, and whoever started it goes on when clients can connect.
//!
//! The process is this program once more, with the same words and a sign in its environment, rather than a fork: it
//! starts with one thread and clean locks. It says on a pipe that it listens. What goes wrong before that it prints
//! itself, and its exit code is passed on.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::ServeError;
use crate::error::ImgError;

/// The sign.
const CHILD: &str = "VIREO_IMG_SERVE_CHILD";
/// What the child says.
const LISTENING: &[u8] = b"listening\n";

/// Whether this process was started by [`start`].
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Starts the server, and waits until clients can connect.
pub fn start() -> Result<u8, ImgError> {
    let failed = |source| ServeError::Background { source };
    let mut words = std::env::args_os();
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg0(words.next().unwrap_or_default()).args(words).env(CHILD, "1");
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

/// Writes this process's id, for its owner only, as qemu-nbd does. The file stays.
pub fn write_pid(path: &Path) -> Result<(), ServeError> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
    written.map_err(|source| ServeError::PidFile { path: path.to_owned(), source })
}
