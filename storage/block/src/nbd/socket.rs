//! A stream socket of either kind, as it is or below TLS.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::error::NbdError;
use super::tls::Channel;
use crate::spec::NbdAddress;

/// A socket of either kind. Its clones, and references to it, are the same connection.
pub enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub fn shutdown(&self, how: Shutdown) {
        // The connection may be gone already.
        let _ = match self {
            Socket::Unix(socket) => socket.shutdown(how),
            Socket::Tcp(socket) => socket.shutdown(how),
        };
    }

    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(socket) => socket.set_read_timeout(limit).and_then(|()| socket.set_write_timeout(limit)),
            Socket::Tcp(socket) => socket.set_read_timeout(limit).and_then(|()| socket.set_write_timeout(limit)),
        }
    }

    fn try_clone(&self) -> io::Result<Socket> {
        match self {
            Socket::Unix(socket) => socket.try_clone().map(Socket::Unix),
            Socket::Tcp(socket) => socket.try_clone().map(Socket::Tcp),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&*socket).read(buf),
            Socket::Tcp(socket) => (&*socket).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&*socket).write_vectored(bufs),
            Socket::Tcp(socket) => (&*socket).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection. Clones are the same connection.
pub(super) enum Stream {
    Plain(Socket),
    Encrypted(Arc<Channel>),
}

impl Stream {
    /// Connects to a server.
    pub(super) fn connect(address: &NbdAddress) -> Result<Stream, NbdError> {
        let stream = match address {
            NbdAddress::Unix(path) => UnixStream::connect(path).map(Stream::unix),
            NbdAddress::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).and_then(Stream::tcp),
        };
        stream.map_err(|source| {
            let server = match address {
                NbdAddress::Unix(path) => path.display().to_string(),
                NbdAddress::Tcp { host, port } => format!("{host}:{port}"),
            };
            NbdError::Connect { server, source }
        })
    }

    pub(super) fn unix(stream: UnixStream) -> Stream {
        Stream::Plain(Socket::Unix(stream))
    }

    /// Small requests go out at once: a peer waits for each.
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        Ok(Stream::Plain(Socket::Tcp(stream)))
    }

    /// The same connection from here on inside a session that has shaken hands on it.
    pub(super) fn encrypted(&self, session: rustls::Connection) -> io::Result<Stream> {
        match self {
            Stream::Plain(socket) => Ok(Stream::Encrypted(Arc::new(Channel::new(socket.try_clone()?, session)))),
            Stream::Encrypted(_) => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Stream> {
        match self {
            Stream::Plain(socket) => socket.try_clone().map(Stream::Plain),
            Stream::Encrypted(channel) => Ok(Stream::Encrypted(channel.clone())),
        }
    }

    /// Ends one or both directions, for every clone.
    pub(super) fn shutdown(&self, how: Shutdown) {
        match self {
            Stream::Plain(socket) => socket.shutdown(how),
            Stream::Encrypted(channel) => channel.shutdown(how),
        }
    }

    /// Limits how long each read and write waits.
    pub(super) fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.set_timeout(limit),
            Stream::Encrypted(channel) => channel.set_timeout(limit),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => (&*socket).read(buf),
            Stream::Encrypted(channel) => channel.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => (&*socket).write_vectored(bufs),
            Stream::Encrypted(channel) => channel.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all of several buffers, in as few calls as the host takes.
pub(super) fn write_all_vectored(stream: &mut impl Write, mut bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut bufs, 0);
    while !bufs.is_empty() {
        match stream.write_vectored(bufs) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut bufs, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[test]
fn buffers_are_written_in_order_whatever_the_host_takes() {
    struct Stingy(Vec<u8>);
    impl Write for Stingy {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let taken = buf.len().min(3);
            self.0.extend(&buf[..taken]);
            Ok(taken)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut out = Stingy(Vec::new());
    write_all_vectored(&mut out, &mut [&b""[..], b"ab", b"cdefgh", b"", b"i"].map(IoSlice::new)).unwrap();
    assert_eq!(out.0, b"abcdefghi");
}
