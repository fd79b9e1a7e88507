//! Sockets that the starter listens on already: sd_listen_fds(3).

use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// The first descriptor that is passed.
const FIRST: RawFd = 3;
/// No unit passes more.
const MOST: usize = 64;

/// A listening socket that was passed, and its name in the file system.
#[derive(Debug)]
pub struct Passed {
    /// The socket.
    pub socket: UnixListener,
    /// Where it is bound.
    pub path: PathBuf,
}

/// Every listening unix socket that was passed to this very process. What is none is left alone and said.
pub fn passed_sockets() -> Vec<Passed> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
    if number("LISTEN_PID") != usize::try_from(getpid().as_raw_nonzero().get()).ok() {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).min(MOST);
    (FIRST..).take(count).filter_map(take).collect()
}

/// Duplicates the descriptor: the number itself stays open, so that nothing else can be given it.
fn take(number: RawFd) -> Option<Passed> {
    let own = pidfd_open(getpid(), PidfdFlags::empty());
    let socket = own.and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
    let socket = socket.map_err(std::io::Error::from).and_then(|socket| {
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(std::io::Error::other("it does not listen"));
        }
        Ok(UnixListener::from(socket))
    });
    let passed = socket.and_then(|socket| {
        let address = socket.local_addr()?;
        let path = address.as_pathname().ok_or_else(|| std::io::Error::other("it is not a socket with a path"))?;
        Ok(Passed { path: path.to_owned(), socket })
    });
    passed.inspect_err(|error| eprintln!("vireod: descriptor {number} of LISTEN_FDS is not used: {error}")).ok()
}
