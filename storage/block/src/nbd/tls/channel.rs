//! An encrypted connection for one reader and one writer at once.
//!
//! The session is locked for computing only, never while the host waits for the peer: a peer that does not read holds up
//! the writer alone. Records go out in the order in which they were encrypted, since `outgoing` is held from one to the
//! other. Both directions keep at most about 64 KiB.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::RecvFlags;
use rustls::Connection;

use super::super::socket::Socket;
use super::TlsError;

/// Encrypted bytes taken from the host in one call.
const AHEAD_BYTES: usize = 64 << 10;

/// One connection.
pub struct Channel {
    socket: Socket,
    session: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Vec<u8>>,
}

/// Encrypted bytes that the session has not seen.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// Agrees on keys over `stream`, which is the socket of the session, and finds out who the peer is.
pub fn shake_hands(session: &mut Connection, stream: &mut (impl Read + Write)) -> io::Result<()> {
    let told = |session: &mut Connection, stream: &mut _| {
        while session.is_handshaking() {
            session.complete_io(stream)?;
        }
        // What the handshake's last step left to send.
        while session.wants_write() {
            session.write_tls(stream)?;
        }
        Ok(())
    };
    told(session, stream).map_err(|error| match is_gone(&error) {
        false => explained(error),
        true => match session.read_tls(stream).map(|_| session.process_new_packets()) {
            Ok(Err(reason)) => explained(io::Error::other(reason)),
            _ => error,
        },
    })
}

/// Whether a write has met a peer that has gone. What it said before, such as why, lies unread.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// The session's own errors as [`TlsError`], inside the host's.
fn explained(error: io::Error) -> io::Error {
    match error.downcast::<rustls::Error>() {
        Ok(error) => io::Error::other(TlsError::from(error)),
        Err(error) => error,
    }
}

impl Channel {
    /// Over a session that has shaken hands.
    pub fn new(socket: Socket, session: Connection) -> Channel {
        let (incoming, outgoing) = (Mutex::new(Incoming::default()), Mutex::new(Vec::new()));
        Channel { socket, session: Mutex::new(session), incoming, outgoing }
    }

    /// As [`Read::read`]. A connection that ends without a goodbye has ended too: the protocol above knows its lengths.
    pub fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.incoming.lock();
        loop {
            let taken = self.session.lock().reader().read(room);
            match taken {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                taken => return taken,
            }
            if incoming.start == incoming.end {
                incoming.fill(&self.socket, RecvFlags::empty())?;
            }
            self.decrypt(&mut incoming)?;
        }
    }

    /// Gives the session some of what has come in, or the end.
    fn decrypt(&self, incoming: &mut Incoming) -> io::Result<()> {
        let mut session = self.session.lock();
        let mut fresh = incoming.bytes.get(incoming.start..incoming.end).unwrap_or_default();
        incoming.start += session.read_tls(&mut fresh)?;
        let done = session.process_new_packets();
        drop(session);
        done.map(drop).map_err(|error| {
            self.say_without_waiting();
            io::Error::other(TlsError::from(error))
        })
    }

    /// Why a peer has gone that a write could not reach, if it said so. A reader finds it out by itself.
    fn reason(&self, error: io::Error) -> io::Error {
        let Some(mut incoming) = self.incoming.try_lock().filter(|_| is_gone(&error)) else { return error };
        loop {
            if incoming.start == incoming.end {
                let filled = incoming.fill(&self.socket, RecvFlags::DONTWAIT);
                if filled.is_err() || incoming.end == 0 {
                    return error;
                }
            }
            match self.decrypt(&mut incoming) {
                Ok(()) => {}
                Err(reason) if reason.get_ref().is_some_and(|reason| reason.is::<TlsError>()) => return reason,
                Err(_) => return error,
            }
        }
    }

    /// As [`Write::write_vectored`].
    pub fn write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.lock();
        let taken = {
            let mut session = self.session.lock();
            let taken = session.writer().write_vectored(bufs)?;
            outgoing.clear();
            while session.wants_write() {
                session.write_tls(&mut *outgoing)?;
            }
            taken
        };
        (&self.socket).write_all(&outgoing).map_err(|error| self.reason(error))?;
        Ok(taken)
    }

    /// Sends what the session has to say, such as a goodbye, if the host takes it at once and nobody writes.
    fn say_without_waiting(&self) {
        let Some(mut outgoing) = self.outgoing.try_lock() else { return };
        let mut session = self.session.lock();
        outgoing.clear();
        while session.wants_write() {
            if session.write_tls(&mut *outgoing).is_err() {
                return;
            }
        }
        let _ = rustix::net::send(&self.socket, &outgoing, rustix::net::SendFlags::DONTWAIT);
    }

    /// Ends one or both directions; the peer is told if nothing more is to be sent.
    pub fn shutdown(&self, how: Shutdown) {
        if how != Shutdown::Read {
            self.session.lock().send_close_notify();
            self.say_without_waiting();
        }
        self.socket.shutdown(how);
    }

    /// Limits how long each read and write waits.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_timeout(limit)
    }
}

impl Incoming {
    /// Waits for more. At the end there is nothing, which the session takes for the end.
    fn fill(&mut self, socket: &Socket, flags: RecvFlags) -> io::Result<()> {
        self.bytes.resize(AHEAD_BYTES, 0);
        self.start = 0;
        self.end = 0;
        self.end = rustix::net::recv(socket, &mut self.bytes[..], flags)?.0;
        Ok(())
    }
}
