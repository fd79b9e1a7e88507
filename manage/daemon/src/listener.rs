//! Listening sockets: made with the right permissions, never taken from a living daemon, accepted from within a limit.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use crate::activation::{Passed, passed_sockets};
use crate::client::{Client, Peer};
use crate::connection;
use crate::daemon::Daemon;
use crate::options::Mode;

/// Most clients at once; further ones are accepted and closed, so that they do not hang.
pub const CLIENTS_MAX: usize = 10_000;
/// Pause after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon answers there.
    #[error("{path}: another daemon listens on this socket; stop it first, or give --root DIR")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has the name.
    #[error("{path}: exists and is not a socket; it is left alone")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("{path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    read_only: bool,
    /// The starter's: it stays when we go.
    passed: bool,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.passed {
            return;
        }
        // Nothing to do about a failure: the next start finds a socket nobody answers and replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Takes the sockets that the starter listens on, and opens every other of the daemon. Nothing is left behind where one of
/// them fails.
pub fn open_all(daemon: &Daemon) -> Result<Vec<Listener>, ListenError> {
    let paths = &daemon.paths;
    let taken: Result<Vec<Listener>, ListenError> = passed_sockets().into_iter().map(take).collect();
    let mut all = taken?;
    let writable = paths.sockets.iter().map(|path| (path, false));
    let read_only = paths.read_only_sockets.iter().map(|path| (path, true));
    for (path, read_only) in writable.chain(read_only) {
        if !all.iter().any(|listener| listener.path == *path) {
            all.push(open(path, read_only, daemon.mode)?);
        }
    }
    Ok(all)
}

/// A passed socket is read-only where its name says so, as libvirt's units name them.
fn take(passed: Passed) -> Result<Listener, ListenError> {
    let Passed { socket, path } = passed;
    let failed = |source| ListenError::Io { path: path.clone(), source };
    socket.set_nonblocking(true).map_err(failed)?;
    let socket = UnixListener::from_std(socket).map_err(failed)?;
    let read_only = path.as_os_str().as_encoded_bytes().ends_with(b"-ro");
    Ok(Listener { socket, path, read_only, passed: true })
}

fn open(path: &Path, read_only: bool, mode: Mode) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Io { path: path.into(), source };
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(ListenError::NotASocket { path: path.into() });
        }
        if StdStream::connect(path).is_ok() {
            return Err(ListenError::InUse { path: path.into() });
        }
        fs::remove_file(path).map_err(failed)?;
    }
    let socket = StdListener::bind(path).map_err(failed)?;
    // The directory is closed to others in session mode; in system mode access is by group, as packages set it up, and
    // the peer's user is checked on every connection besides.
    let bits = match (mode, read_only) {
        (Mode::Session, _) => 0o700,
        (Mode::System, false) => 0o770,
        (Mode::System, true) => 0o777,
    };
    fs::set_permissions(path, Permissions::from_mode(bits)).map_err(failed)?;
    if mode == Mode::System
        && !read_only
        && let Some(group) = libvirt_group()
    {
        // Without the right to do so the socket stays with our own group.
        let _ = std::os::unix::fs::chown(path, None, Some(group));
    }
    socket.set_nonblocking(true).map_err(failed)?;
    let socket = UnixListener::from_std(socket).map_err(failed)?;
    Ok(Listener { socket, path: path.into(), read_only, passed: false })
}

/// Number of the group whose members may manage the host, where it exists.
fn libvirt_group() -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| line.strip_prefix("libvirt:")?.split(':').nth(1)?.parse().ok())
}

/// Accepts clients for ever.
pub async fn accept_all(daemon: Arc<Daemon>, listener: Listener) {
    loop {
        match listener.socket.accept().await {
            Ok((socket, _)) => admit(&daemon, socket, listener.read_only),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

fn admit(daemon: &Arc<Daemon>, socket: UnixStream, read_only: bool) {
    let Ok(credentials) = socket.peer_cred() else { return };
    let peer = Peer { pid: credentials.pid().unwrap_or(-1), uid: credentials.uid() };
    let Some(slot) = daemon.clients.enter() else { return };
    let client = Arc::new(Client::new(slot.id(), peer, read_only));
    let daemon = daemon.clone();
    tokio::spawn(async move {
        let end = connection::serve(daemon, client.clone(), socket).await;
        if !matches!(end, connection::ConnectionEnd::Closed) {
            eprintln!("client {} (pid {}, uid {}): {end}", client.id, client.peer.pid, client.peer.uid);
        }
        drop(slot);
    });
}
