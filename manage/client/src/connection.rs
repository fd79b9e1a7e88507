//! The socket, calls and their replies, and what comes in between.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rpc_wire::frame::{
    Frame, FrameReader, Header, KEEPALIVE_PING, KEEPALIVE_PONG, KEEPALIVE_PROGRAM, MessageType, PROGRAM_VERSION,
    REMOTE_PROGRAM, Status, frame_of, write_frame,
};
use rpc_wire::remote::{auth_list, connect_close, connect_open, connect_supports_feature};
use rpc_wire::xdr::from_bytes;
use rpc_wire::{Call, ErrorBody};

use crate::error::ClientError;
use crate::event::{self, Event};
use crate::spawn;
use crate::uri::Target;

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// AUTH_LIST type: none.
const AUTH_NONE: i32 = 0;
/// CONNECT_OPEN flag.
const READ_ONLY: u32 = 1;
/// Feature: keepalive. Asking for it also has the daemon watch us.
const FEATURE_KEEPALIVE: i32 = 10;

/// A stream that a call has opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamId {
    header: Header,
}

/// What came on a stream.
#[derive(Debug)]
pub enum StreamPacket {
    /// Bytes.
    Data(Vec<u8>),
    /// The other side has no more.
    End,
    /// It broke off.
    Failed(ClientError),
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    reader: FrameReader,
    next_serial: u32,
    uri: String,
    events: VecDeque<Event>,
    stream_packets: VecDeque<(u32, StreamPacket)>,
    chunk: Vec<u8>,
    /// As the socket has it: most calls leave it as it is.
    read_timeout: Option<Duration>,
}

impl Connection {
    /// Connects, starting a session's daemon where none listens.
    pub fn open(target: &Target, read_only: bool) -> Result<Connection, ClientError> {
        let path = target.sockets.iter().find(|path| path.exists()).or(target.sockets.last());
        let path = path.cloned().unwrap_or_default();
        let connect = |path: &std::path::Path| {
            UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.into(), source })
        };
        let socket = match connect(&path) {
            Err(ClientError::Connect { source, .. }) if target.may_spawn && nobody_listens(&source) => {
                spawn::session_daemon(&path)?;
                connect(&path)?
            }
            other => other?,
        };
        let mut connection = Connection {
            socket,
            reader: FrameReader::new(),
            next_serial: 0,
            uri: target.uri.clone(),
            events: VecDeque::new(),
            stream_packets: VecDeque::new(),
            chunk: vec![0; CHUNK_BYTES],
            read_timeout: None,
        };
        let types = connection.call::<auth_list::Proc>(&auth_list::Args {})?.types.0;
        if !types.contains(&AUTH_NONE) {
            return Err(ClientError::Authentication { types });
        }
        let flags = if read_only { READ_ONLY } else { 0 };
        let name = Some(target.name.as_str().into());
        connection.call::<connect_open::Proc>(&connect_open::Args { name, flags })?;
        Ok(connection)
    }

    /// The URI that led here.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// To wait for something to read.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Has the daemon watch over the connection; for programs that stay connected.
    pub fn start_keepalive(&mut self) -> Result<(), ClientError> {
        let args = connect_supports_feature::Args { feature: FEATURE_KEEPALIVE };
        self.call::<connect_supports_feature::Proc>(&args).map(drop)
    }

    /// Says goodbye.
    pub fn close(mut self) -> Result<(), ClientError> {
        self.call::<connect_close::Proc>(&connect_close::Args {}).map(drop)
    }

    /// Makes a call and waits for its reply.
    pub fn call<P: Call>(&mut self, args: &P::Args) -> Result<P::Reply, ClientError> {
        self.call_with_header::<P>(args).map(|(_, reply)| reply)
    }

    /// Makes a call that opens a stream.
    pub fn open_stream<P: Call>(&mut self, args: &P::Args) -> Result<StreamId, ClientError> {
        self.call_with_header::<P>(args).map(|(header, _)| StreamId { header })
    }

    fn call_with_header<P: Call>(&mut self, args: &P::Args) -> Result<(Header, P::Reply), ClientError> {
        let header = Header::call(P::PROGRAM, P::NUMBER, self.next_serial);
        self.next_serial = self.next_serial.wrapping_add(1);
        self.socket.write_all(&frame_of(header, args))?;
        loop {
            while let Some(frame) = self.reader.next_frame()? {
                let is_reply = matches!(frame.header.kind, MessageType::Reply | MessageType::ReplyWithFds);
                if is_reply && frame.header.serial == header.serial && frame.header.program == header.program {
                    return match frame.header.status {
                        Status::Ok => Ok((header, from_bytes(&frame.payload)?)),
                        Status::Error | Status::Continue => Err(from_bytes::<ErrorBody>(&frame.payload)?.into()),
                    };
                }
                self.keep(frame)?;
            }
            self.read(None)?;
        }
    }

    /// Reads what is there, waiting at most as long as given; false when nothing came.
    fn read(&mut self, limit: Option<Duration>) -> Result<bool, ClientError> {
        // A limit of zero would mean none to the system.
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        if limit != self.read_timeout {
            self.socket.set_read_timeout(limit)?;
            self.read_timeout = limit;
        }
        loop {
            match self.socket.read(&mut self.chunk) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => {
                    self.reader.push(self.chunk.get(..count).unwrap_or_default());
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Puts away what is no reply.
    fn keep(&mut self, frame: Frame) -> Result<(), ClientError> {
        let Header { program, kind, procedure, serial, status, version } = frame.header;
        match kind {
            MessageType::Message if program == KEEPALIVE_PROGRAM && procedure == KEEPALIVE_PING => {
                self.socket.write_all(&frame_of(Header::keepalive(KEEPALIVE_PONG), &()))?;
            }
            MessageType::Message if program == REMOTE_PROGRAM && version == PROGRAM_VERSION => {
                // Events of kinds that are not known here are none of ours.
                self.events.extend(event::decode(procedure, &frame.payload)?);
            }
            MessageType::Stream => {
                let packet = match status {
                    Status::Error => StreamPacket::Failed(from_bytes::<ErrorBody>(&frame.payload)?.into()),
                    Status::Continue if !frame.payload.is_empty() => StreamPacket::Data(frame.payload),
                    Status::Continue | Status::Ok => StreamPacket::End,
                };
                self.stream_packets.push_back((serial, packet));
            }
            _ => {}
        }
        Ok(())
    }

    /// Puts away everything that has arrived whole.
    fn keep_all(&mut self) -> Result<(), ClientError> {
        while let Some(frame) = self.reader.next_frame()? {
            self.keep(frame)?;
        }
        Ok(())
    }

    /// The next event; `None` when none came within `limit`.
    pub fn next_event(&mut self, limit: Option<Duration>) -> Result<Option<Event>, ClientError> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            self.keep_all()?;
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.read(left)?;
        }
    }

    /// The next packet of a stream; `None` when none came within `limit`.
    pub fn next_stream_packet(
        &mut self,
        stream: StreamId,
        limit: Option<Duration>,
    ) -> Result<Option<StreamPacket>, ClientError> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            self.keep_all()?;
            let at = self.stream_packets.iter().position(|(serial, _)| *serial == stream.header.serial);
            if let Some((_, packet)) = at.and_then(|at| self.stream_packets.remove(at)) {
                return Ok(Some(packet));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.read(left)?;
        }
    }

    /// Reads what has arrived, once, and puts it away. For callers that have polled [`Connection::as_fd`].
    pub fn receive(&mut self) -> Result<(), ClientError> {
        self.read(None)?;
        self.keep_all()
    }

    /// A packet that has been read already, without reading more.
    pub fn buffered_stream_packet(&mut self, stream: StreamId) -> Result<Option<StreamPacket>, ClientError> {
        self.keep_all()?;
        let at = self.stream_packets.iter().position(|(serial, _)| *serial == stream.header.serial);
        Ok(at.and_then(|at| self.stream_packets.remove(at)).map(|(_, packet)| packet))
    }

    /// Sends bytes on a stream.
    pub fn send_stream(&mut self, stream: StreamId, bytes: &[u8]) -> Result<(), ClientError> {
        let mut packet = Vec::with_capacity(bytes.len() + 32);
        write_frame(&mut packet, stream.header.stream(Status::Continue), |out| out.extend_from_slice(bytes));
        Ok(self.socket.write_all(&packet)?)
    }

    /// Ends a stream in good order.
    pub fn finish_stream(&mut self, stream: StreamId) -> Result<(), ClientError> {
        Ok(self.socket.write_all(&frame_of(stream.header.stream(Status::Ok), &()))?)
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}
