//! Where clients come in.

use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::AddressFamily;

use super::super::error::NbdError;
use super::super::socket::Stream;
use crate::sys::duplicate;

/// A socket that listens. A Unix socket's file goes away with it.
pub struct Listener {
    socket: Socket,
}

enum Socket {
    /// With its file, if that is ours.
    Unix(UnixListener, Option<PathBuf>),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on a socket file. The file appears under its name when clients can connect. One that a dead server
    /// left behind is replaced, one that is listened on is not.
    pub fn unix(path: &Path) -> Result<Listener, NbdError> {
        let failed = |source| NbdError::Listen { at: path.display().to_string(), source };
        if UnixStream::connect(path).is_ok() {
            return Err(NbdError::InUse { path: path.to_owned() });
        }
        // Bound beside it and renamed: between bind and listen a client would be refused.
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        let socket = UnixListener::bind(&beside).map_err(failed)?;
        let renamed = socket.set_nonblocking(true).and_then(|()| {
            // What is there is a dead socket or nothing: anything else stays.
            match std::fs::symlink_metadata(path) {
                Ok(meta) if !std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                    Err(io::ErrorKind::AddrInUse.into())
                }
                _ => std::fs::rename(&beside, path),
            }
        });
        if let Err(error) = renamed {
            let _ = std::fs::remove_file(&beside);
            return Err(failed(error));
        }
        Ok(Listener { socket: Socket::Unix(socket, Some(path.to_owned())) })
    }

    /// Listens on a TCP port of the host's addresses that `address` names.
    pub fn tcp(address: &str, port: u16) -> Result<Listener, NbdError> {
        let failed = |source| NbdError::Listen { at: format!("{address}:{port}"), source };
        let addresses: Vec<_> = (address, port).to_socket_addrs().map_err(failed)?.collect();
        let socket = TcpListener::bind(&addresses[..]).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Listener { socket: Socket::Tcp(socket) })
    }

    /// Listens on a socket that whoever started this process has opened: its number, as in systemd's protocol.
    pub fn inherited(number: RawFd) -> Result<Listener, NbdError> {
        let failed = |source| NbdError::Listen { at: format!("descriptor {number}"), source };
        let socket = duplicate(number).map_err(failed)?;
        let domain = rustix::net::sockopt::socket_domain(&socket).map_err(|errno| failed(errno.into()))?;
        let listens = rustix::net::sockopt::socket_acceptconn(&socket).map_err(|errno| failed(errno.into()))?;
        let socket = match domain {
            _ if !listens => return Err(failed(io::ErrorKind::InvalidInput.into())),
            AddressFamily::UNIX => Socket::Unix(UnixListener::from(socket), None),
            AddressFamily::INET | AddressFamily::INET6 => Socket::Tcp(TcpListener::from(socket)),
            _ => return Err(failed(io::ErrorKind::Unsupported.into())),
        };
        let done = match &socket {
            Socket::Unix(socket, _) => socket.set_nonblocking(true),
            Socket::Tcp(socket) => socket.set_nonblocking(true),
        };
        done.map_err(failed)?;
        Ok(Listener { socket })
    }

    /// The port of a TCP listener: it differs from what was asked for when that was 0.
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Unix(..) => None,
            Socket::Tcp(socket) => socket.local_addr().ok().map(|address| address.port()),
        }
    }

    /// The next client; `None` when it is gone already.
    pub(super) fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match &self.socket {
            Socket::Unix(socket, _) => socket.accept().map(|(stream, _)| Stream::unix(stream)),
            Socket::Tcp(socket) => socket.accept().and_then(|(stream, _)| Stream::tcp(stream)),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(socket, _) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, Some(path)) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}
