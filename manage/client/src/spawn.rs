//! Starts a session's daemon where none runs.

use std::env;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::ClientError;

/// The daemon's program.
const PROGRAM: &str = "vireod";
/// A session daemon ends when nobody has needed it for so long, in seconds.
const IDLE_SECONDS: &str = "120";
/// How long it may take to come up.
const START_LIMIT: Duration = Duration::from_secs(15);

/// Starts the daemon that will listen at `socket` and waits until it does.
pub fn session_daemon(socket: &Path) -> Result<(), ClientError> {
    let program = find();
    let failed = |detail: String| ClientError::Spawn { program: program.clone(), detail };
    let io_failed = |error: io::Error| failed(error.to_string());
    let directory = socket.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).map_err(io_failed)?;
    // The name is ours alone while we run.
    let ready_path = directory.join(format!("vireod-ready-{}", std::process::id()));
    let _ = std::fs::remove_file(&ready_path);
    let ready = UnixDatagram::bind(&ready_path).map_err(io_failed)?;
    ready.set_read_timeout(Some(START_LIMIT)).map_err(io_failed)?;
    let spawned = Command::new(&program)
        .args(["--session", "--timeout", IDLE_SECONDS])
        .env("NOTIFY_SOCKET", &ready_path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    let outcome = spawned.map_err(io_failed).and_then(|mut child| {
        let mut message = [0; 16];
        match ready.recv(&mut message) {
            Ok(_) => Ok(()),
            Err(_) => Err(match child.try_wait() {
                Ok(Some(status)) => failed(format!("it ended with {status}; running it by hand shows why")),
                _ => failed(format!("it is not ready after {} s", START_LIMIT.as_secs())),
            }),
        }
    });
    let _ = std::fs::remove_file(&ready_path);
    outcome
}

/// Beside this program, else on the PATH.
fn find() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|own| Some(own.parent()?.join(PROGRAM)));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into())
}
