//! One client connection: bytes in, frames to the dispatcher, packets out, keepalive.
//!
//! A connection costs no buffer while it is idle, is not read from while it does not read, and can hold only a share of
//! one budget for packets that have not arrived whole.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rpc_wire::frame::{
    Frame, FrameReader, Header, KEEPALIVE_PING, KEEPALIVE_PONG, KEEPALIVE_PROGRAM, MessageType, Status, frame_of,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::dispatch;
use crate::outbox::HIGH_WATER_BYTES;

/// Bytes read from a socket at once.
const SCRATCH_BYTES: usize = 64 << 10;
/// Calls of one client that may wait for their answers; then it is not read from.
const IN_FLIGHT_MAX: u32 = 64;
/// Largest packet of a client that has not opened a connection yet.
const STRANGER_PACKET_MAX: usize = 64 << 10;
/// What all connections together may hold of packets that are not whole.
const PARTIAL_BUDGET_BYTES: usize = 256 << 20;
/// Partial packets up to this size are not counted: every connection may have one.
const PARTIAL_FREE_BYTES: usize = 16 << 10;
/// A client without a sign of life for this long is asked for one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// After so many questions without an answer it is gone.
const KEEPALIVE_COUNT: u32 = 5;

static PARTIAL_BYTES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// Why a connection ended, for the log.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionEnd {
    /// The client closed its side.
    #[error("closed by the client")]
    Closed,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    /// The bytes are not packets.
    #[error("{0}")]
    Frame(#[from] rpc_wire::FrameError),
    /// The partial packets of all clients exceed the budget.
    #[error("no memory left for a partial packet of {0} bytes")]
    PartialBudget(usize),
    /// No answer to keepalive.
    #[error("no sign of life for {} s", KEEPALIVE_INTERVAL.as_secs() * u64::from(KEEPALIVE_COUNT + 1))]
    Silent,
    /// Events pile up unread.
    #[error("does not read its events")]
    Overrun,
}

/// Serves one client until it goes away.
pub async fn serve(daemon: Arc<Daemon>, client: Arc<Client>, socket: UnixStream) -> ConnectionEnd {
    let mut connection = Connection { reader: FrameReader::new(), reserved: 0, daemon, client, socket, unanswered: 0 };
    connection.reader.set_packet_max(STRANGER_PACKET_MAX);
    let end = match connection.run().await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    connection.reserve(0).ok();
    connection.client.close_all_streams();
    connection.daemon.events.forget_client(connection.client.id);
    connection.daemon.end_runs(connection.client.take_tied_runs()).await;
    end
}

struct Connection {
    daemon: Arc<Daemon>,
    client: Arc<Client>,
    socket: UnixStream,
    reader: FrameReader,
    reserved: usize,
    unanswered: u32,
}

enum Never {}

impl Connection {
    async fn run(&mut self) -> Result<Never, ConnectionEnd> {
        let mut deadline = Instant::now() + KEEPALIVE_INTERVAL;
        loop {
            let pending = self.flush()?;
            let may_read = pending < HIGH_WATER_BYTES && self.client.in_flight() < IN_FLIGHT_MAX;
            let interest = match (may_read, pending > 0) {
                (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
                (true, false) => Some(Interest::READABLE),
                (false, true) => Some(Interest::WRITABLE),
                (false, false) => None,
            };
            let mut readable = false;
            tokio::select! {
                ready = async { self.socket.ready(interest.unwrap_or(Interest::ERROR)).await }, if interest.is_some() => {
                    readable = ready?.is_readable() && may_read;
                }
                () = self.client.changed() => {}
                () = sleep_until(deadline), if self.client.has_keepalive() => {
                    self.ping()?;
                    deadline = Instant::now() + KEEPALIVE_INTERVAL;
                }
            }
            if readable && self.read()? {
                self.unanswered = 0;
                deadline = Instant::now() + KEEPALIVE_INTERVAL;
                self.handle_frames()?;
            }
        }
    }

    /// Sends what can be sent; returns what is left.
    fn flush(&mut self) -> Result<usize, ConnectionEnd> {
        let (overrun, before, pending) = self.client.with_outbox(|outbox| {
            let before = outbox.pending_bytes();
            outbox.flush(|slices| self.socket.try_write_vectored(slices))?;
            Ok::<_, io::Error>((outbox.is_overrun(), before, outbox.pending_bytes()))
        })?;
        if overrun {
            return Err(ConnectionEnd::Overrun);
        }
        if pending < before {
            self.client.flushed();
        }
        Ok(pending)
    }

    /// Reads once; false when there was nothing after all.
    fn read(&mut self) -> Result<bool, ConnectionEnd> {
        SCRATCH.with_borrow_mut(|scratch| match self.socket.try_read(scratch) {
            Ok(0) => Err(ConnectionEnd::Closed),
            Ok(count) => {
                self.reader.push(scratch.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        })
    }

    fn handle_frames(&mut self) -> Result<(), ConnectionEnd> {
        while let Some(frame) = self.reader.next_frame()? {
            self.handle(frame);
            if self.client.is_opened() {
                self.reader.set_packet_max(rpc_wire::frame::PACKET_MAX);
            }
        }
        self.reserve(self.reader.pending_bytes())
    }

    /// Accounts for the bytes of a packet that is not whole.
    fn reserve(&mut self, partial: usize) -> Result<(), ConnectionEnd> {
        let counted = if partial > PARTIAL_FREE_BYTES { partial } else { 0 };
        PARTIAL_BYTES.fetch_sub(self.reserved, Ordering::Relaxed);
        self.reserved = 0;
        if PARTIAL_BYTES.load(Ordering::Relaxed) + counted > PARTIAL_BUDGET_BYTES {
            return Err(ConnectionEnd::PartialBudget(counted));
        }
        PARTIAL_BYTES.fetch_add(counted, Ordering::Relaxed);
        self.reserved = counted;
        Ok(())
    }

    fn handle(&mut self, frame: Frame) {
        let header = frame.header;
        if header.program == KEEPALIVE_PROGRAM {
            if header.kind == MessageType::Message && header.procedure == KEEPALIVE_PING {
                self.client.send(frame_of(Header::keepalive(KEEPALIVE_PONG), &()));
            }
            return;
        }
        match header.kind {
            MessageType::Call | MessageType::CallWithFds => dispatch::call(&self.daemon, &self.client, frame),
            MessageType::Stream | MessageType::StreamHole => self.stream_packet(frame),
            // Replies and events come from servers; a client that sends one gets no answer, as nothing waits for it.
            MessageType::Reply | MessageType::ReplyWithFds | MessageType::Message => {}
        }
    }

    fn stream_packet(&mut self, frame: Frame) {
        let serial = frame.header.serial;
        match (frame.header.kind, frame.header.status) {
            (MessageType::StreamHole, _) => dispatch::refuse_hole(&self.client, frame.header),
            // An empty packet only says that the client still waits.
            (_, Status::Continue) if frame.payload.is_empty() => {}
            (_, Status::Continue) => {
                if let Some(sender) = self.client.stream(serial) {
                    // A guest that does not read its console loses characters, as on a real line.
                    let _ = sender.try_send(frame.payload);
                }
            }
            (_, Status::Ok | Status::Error) => {
                if self.client.close_stream(serial) {
                    self.client.send(frame_of(frame.header.stream(Status::Ok), &()));
                }
            }
        }
    }

    fn ping(&mut self) -> Result<(), ConnectionEnd> {
        if self.unanswered >= KEEPALIVE_COUNT {
            return Err(ConnectionEnd::Silent);
        }
        self.unanswered += 1;
        self.client.send(frame_of(Header::keepalive(KEEPALIVE_PING), &()));
        Ok(())
    }
}
