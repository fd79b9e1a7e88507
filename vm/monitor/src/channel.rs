//! Lines of JSON with descriptors over a unix stream socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest line either side accepts, in bytes. A configuration with hundreds of disks is far below.
pub const MAX_LINE_BYTES: usize = 1 << 20;
/// The most descriptors one message carries; the kernel's SCM_MAX_FD is 253.
pub const MAX_FDS: usize = 253;

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("monitor socket")]
    Io(#[from] io::Error),
    /// The other side is gone.
    #[error("the other side of the monitor socket is gone")]
    Closed,
    /// More than [`MAX_LINE_BYTES`] without a line end.
    #[error("a monitor message is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// More than [`MAX_FDS`] descriptors.
    #[error("{0} descriptors are more than one message carries ({MAX_FDS}): the domain has too many images")]
    TooManyFds(usize),
    /// Not the JSON that was expected.
    #[error("a monitor message does not parse")]
    Parse(#[source] serde_json::Error),
}

/// One end of a connection. Blocking or not as the socket is; a would-block error surfaces as [`ChannelError::Io`].
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    input: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Channel {
    /// Wraps a connected socket.
    pub fn new(socket: UnixStream) -> Channel {
        Channel { socket, input: Vec::new(), fds: VecDeque::new() }
    }

    /// The socket, to poll it or to set timeouts.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// A second handle on the same socket for writing from another thread.
    pub fn try_clone_writer(&self) -> io::Result<Channel> {
        Ok(Channel::new(self.socket.try_clone()?))
    }

    /// Sends one message; `fds` travel with its first byte.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        if fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds(fds.len()));
        }
        let mut line = serde_json::to_vec(message).map_err(ChannelError::Parse)?;
        line.push(b'\n');
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut sent = 0;
        while sent < line.len() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let rest = [IoSlice::new(&line[sent..])];
            match rustix::net::sendmsg(self.socket.as_fd(), &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(bytes) => sent += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ChannelError::Io(e.into())),
            }
        }
        Ok(())
    }

    /// Reads the next message and takes every descriptor that has arrived up to it. [`ChannelError::Closed`] at the end.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        loop {
            if let Some(end) = self.input.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                let message = serde_json::from_slice(&line[..end]).map_err(ChannelError::Parse)?;
                return Ok((message, self.fds.drain(..).collect()));
            }
            if self.input.len() > MAX_LINE_BYTES {
                return Err(ChannelError::TooLong);
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Result<(), ChannelError> {
        let mut chunk = [0u8; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut chunk)];
            match rustix::net::recvmsg(self.socket.as_fd(), &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(io::Error::from)?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds(self.fds.len()));
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        self.input.extend_from_slice(&chunk[..received.bytes]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, Request};
    use std::io::{Read, Write};

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a), Channel::new(b));
        let (mut reader, writer) = rustix::pipe::pipe().map(|(r, w)| (std::fs::File::from(r), w)).unwrap();
        let request = Request { id: 7, command: Command::Stop };
        a.send(&request, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (got, fds): (Request, _) = b.receive().unwrap();
        assert_eq!(got, request);
        let mut passed = std::fs::File::from(fds.into_iter().next().unwrap());
        passed.write_all(b"x").unwrap();
        drop(passed);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn the_wire_form_is_json_per_line() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b);
        (&a).write_all(b"{\"id\":1,\"execute\":\"query-status\"}\n{\"id\":2,\"execute\":\"cont\"}\n{]\n").unwrap();
        drop(a);
        assert_eq!(b.receive::<Request>().unwrap().0, Request { id: 1, command: Command::QueryStatus });
        assert_eq!(b.receive::<Request>().unwrap().0, Request { id: 2, command: Command::Cont });
        assert!(matches!(b.receive::<Request>(), Err(ChannelError::Parse(_))));
        assert!(matches!(b.receive::<Request>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn an_endless_line_is_refused_with_bounded_memory() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b);
        let feeder = std::thread::spawn(move || {
            let chunk = [b'x'; 65536];
            while (&a).write_all(&chunk).is_ok() {}
        });
        assert!(matches!(b.receive::<Request>(), Err(ChannelError::TooLong)));
        assert!(b.input.len() <= MAX_LINE_BYTES + 8192);
        drop(b);
        feeder.join().unwrap();
    }
}
