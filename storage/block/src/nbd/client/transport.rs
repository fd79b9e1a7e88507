//! Requests and replies on one connection, shared by threads. There is no thread of its own: of those that wait for
//! replies, one reads, hands each reply to whom it belongs, and passes the reading on when its own has come. A lone
//! thread thus never changes hands with another.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::super::error::{NbdError, PeerError};
use super::super::socket::Stream;
use super::super::wire::{
    BlockRun, Chunk, OPTION_MAX_BYTES, ReplyHeader, Request, WireError, chunk, command, decode_hole, decode_offset,
};
use super::handshake::Agreed;
use super::pending::{Pending, Wanted};
use crate::sys::{ReadBufs, WriteBufs};

/// Bytes that go to or come from the socket in one piece.
const PIECE_BYTES: usize = 256 << 10;
/// Read ahead for the heads of replies.
const AHEAD_BYTES: usize = 4096;
/// Largest payload of a chunk that is no data: block status of a large range.
const STATUS_MAX_BYTES: u32 = 8 << 20;

/// A request, apart from its cookie.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub length: u32,
}

/// One connection.
pub struct Transport {
    server: String,
    structured: bool,
    context: Option<u32>,
    /// For ending it.
    stream: Stream,
    output: Mutex<Output>,
    input: Mutex<Input>,
    state: Mutex<State>,
    changed: Condvar,
}

struct Output {
    stream: Stream,
    next_cookie: u64,
    piece: Vec<u8>,
}

struct Input {
    stream: BufReader<Stream>,
    piece: Vec<u8>,
}

struct State {
    pending: HashMap<u64, Pending>,
    /// Somebody reads.
    reading: bool,
    lost: Option<Arc<PeerError>>,
}

impl Transport {
    pub fn new(stream: Stream, server: String, agreed: &Agreed) -> io::Result<Transport> {
        let output = Output { stream: stream.try_clone()?, next_cookie: 1, piece: Vec::new() };
        let input = Input { stream: BufReader::with_capacity(AHEAD_BYTES, stream.try_clone()?), piece: Vec::new() };
        Ok(Transport {
            server,
            structured: agreed.structured,
            context: agreed.context,
            stream,
            output: Mutex::new(output),
            input: Mutex::new(input),
            state: Mutex::new(State { pending: HashMap::new(), reading: false, lost: None }),
            changed: Condvar::new(),
        })
    }

    /// Whether nothing works any more.
    pub fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }

    /// A read: fills `bufs`, which are as long as the request.
    pub fn read(&self, ask: &Ask, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let done = self.call(ask, Wanted::Data, None, Some(bufs))?;
        // Taken in by another thread; otherwise the bytes are there already.
        if !done.data.is_empty() {
            bufs.copy_from(&done.data);
        }
        Ok(())
    }

    /// A write of `bufs`.
    pub fn write(&self, ask: &Ask, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.call(ask, Wanted::Nothing, Some(bufs), None).map(|_| ())
    }

    /// A request whose reply has no payload.
    pub fn plain(&self, ask: &Ask) -> io::Result<()> {
        self.call(ask, Wanted::Nothing, None, None).map(|_| ())
    }

    /// Block status.
    pub fn status(&self, ask: &Ask) -> io::Result<Vec<BlockRun>> {
        let context = self.context.unwrap_or(0);
        self.call(ask, Wanted::Status(context), None, None).map(|done| done.runs)
    }

    fn call(
        &self,
        ask: &Ask,
        wanted: Wanted,
        payload: Option<&WriteBufs<'_>>,
        bufs: Option<&ReadBufs<'_>>,
    ) -> io::Result<Pending> {
        let sent = self.send(ask, wanted, payload);
        let done = sent.and_then(|cookie| self.wait(cookie, bufs));
        let done = done.map_err(|source| {
            let server = self.server.clone();
            io::Error::new(io::ErrorKind::ConnectionAborted, NbdError::Lost { server, source })
        })?;
        match done.error {
            None => Ok(done),
            Some((errno, text)) => Err(self.refused(errno, text)),
        }
    }

    /// The host's own error where it has one and callers decide on it, such as a lack of space.
    fn refused(&self, errno: u32, text: String) -> io::Error {
        match i32::try_from(errno) {
            Ok(errno @ (libc::ENOSPC | libc::EPERM)) => io::Error::from_raw_os_error(errno),
            _ => io::Error::other(NbdError::Refused { server: self.server.clone(), errno, text }),
        }
    }

    fn send(&self, ask: &Ask, wanted: Wanted, payload: Option<&WriteBufs<'_>>) -> Result<u64, Arc<PeerError>> {
        let mut output = self.output.lock();
        let cookie = output.next_cookie;
        output.next_cookie = cookie.wrapping_add(1);
        {
            let mut state = self.state.lock();
            if let Some(lost) = &state.lost {
                return Err(lost.clone());
            }
            state.pending.insert(cookie, Pending::new(wanted, ask.offset, ask.length));
        }
        let Ask { command, flags, offset, length } = *ask;
        let Output { stream, piece, .. } = &mut *output;
        piece.clear();
        Request { flags, command, cookie, offset, length }.encode(piece);
        match send_all(stream, piece, payload) {
            Ok(()) => Ok(cookie),
            Err(error) => Err(self.lose(error.into())),
        }
    }

    /// Waits for a reply, and reads replies while nobody else does.
    fn wait(&self, cookie: u64, bufs: Option<&ReadBufs<'_>>) -> Result<Pending, Arc<PeerError>> {
        loop {
            let mut state = self.state.lock();
            loop {
                if state.pending.get(&cookie).is_some_and(|pending| pending.done) {
                    return state.pending.remove(&cookie).ok_or_else(|| Arc::new(PeerError::Closed));
                }
                if let Some(lost) = state.lost.clone() {
                    state.pending.remove(&cookie);
                    return Err(lost);
                }
                if !state.reading {
                    break;
                }
                self.changed.wait(&mut state);
            }
            state.reading = true;
            drop(state);
            let received = self.receive_until(cookie, bufs);
            self.state.lock().reading = false;
            match received {
                Ok(()) => {
                    self.changed.notify_all();
                }
                Err(error) => drop(self.lose(error)),
            }
        }
    }

    /// Nothing works from now on. The first reason is kept.
    fn lose(&self, error: PeerError) -> Arc<PeerError> {
        let lost = self.state.lock().lost.get_or_insert_with(|| Arc::new(error)).clone();
        self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
        lost
    }

    /// Reads replies until that to one's own request has ended. All of its data that comes from now on goes to one
    /// place: nobody else reads in between.
    fn receive_until(&self, mine: u64, bufs: Option<&ReadBufs<'_>>) -> Result<(), PeerError> {
        while !self.receive(mine, bufs)? {}
        Ok(())
    }

    /// Reads one reply, or one chunk of it. `true`: one's own has ended.
    fn receive(&self, mine: u64, bufs: Option<&ReadBufs<'_>>) -> Result<bool, PeerError> {
        let mut input = self.input.lock();
        let header = input.header()?;
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk(Chunk { cookie, .. })) = header;
        // While it is out, nobody else touches it: this thread alone reads.
        let taken = self.state.lock().pending.remove(&cookie).filter(|pending| !pending.done);
        let mut pending = taken.ok_or(WireError::Cookie { cookie })?;
        // What another thread took in before stays together with the rest.
        let bufs = bufs.filter(|_| cookie == mine && pending.data.is_empty());
        match header {
            ReplyHeader::Simple { error, .. } => {
                let bytes = pending.on_simple(error, self.structured)?;
                input.data(&mut pending, bufs, 0, bytes as usize)?;
            }
            ReplyHeader::Chunk(_) if !self.structured => return Err(WireError::Structured.into()),
            ReplyHeader::Chunk(head) => input.chunk(&head, &mut pending, bufs)?,
        }
        let done = pending.done;
        self.state.lock().pending.insert(cookie, pending);
        if done && cookie != mine {
            self.changed.notify_all();
        }
        Ok(done && cookie == mine)
    }
}

/// Sends a head and its payload. Small ones go out as one.
fn send_all(stream: &mut Stream, piece: &mut Vec<u8>, payload: Option<&WriteBufs<'_>>) -> io::Result<()> {
    let (mut at, end) = (0, payload.map_or(0, WriteBufs::len));
    while at < end {
        let head = piece.len();
        let bytes = (end - at).min(PIECE_BYTES);
        piece.resize(head + bytes, 0);
        if let (Some(payload), Some(room)) = (payload, piece.get_mut(head..)) {
            payload.range(at, bytes).copy_to(room);
        }
        stream.write_all(piece)?;
        piece.clear();
        at += bytes;
    }
    stream.write_all(piece)
}

impl Input {
    fn header(&mut self) -> Result<ReplyHeader, PeerError> {
        let mut head = [0; ReplyHeader::SHORT_BYTES + ReplyHeader::MORE_BYTES];
        let (short, more) = head.split_at_mut(ReplyHeader::SHORT_BYTES);
        self.stream.read_exact(short)?;
        let is_long = short.first_chunk().is_some_and(ReplyHeader::is_long);
        if is_long {
            self.stream.read_exact(more)?;
        }
        Ok(ReplyHeader::decode(&head)?)
    }

    /// Takes in data of a read: into the buffers of the thread that reads, or into memory for one that waits.
    fn data(
        &mut self,
        pending: &mut Pending,
        bufs: Option<&ReadBufs<'_>>,
        start: usize,
        bytes: usize,
    ) -> Result<(), PeerError> {
        let Some(bufs) = bufs else {
            if bytes > 0 {
                let room = pending.room().get_mut(start..start + bytes).unwrap_or_default();
                self.stream.read_exact(room)?;
            }
            return Ok(());
        };
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(PIECE_BYTES);
            if self.piece.len() < count {
                self.piece.resize(count, 0);
            }
            let piece = self.piece.get_mut(..count).unwrap_or_default();
            self.stream.read_exact(piece)?;
            bufs.range(start + done, count).copy_from(piece);
            done += count;
        }
        Ok(())
    }

    fn chunk(&mut self, head: &Chunk, pending: &mut Pending, bufs: Option<&ReadBufs<'_>>) -> Result<(), PeerError> {
        let Chunk { flags, kind, length, .. } = *head;
        match kind {
            chunk::NONE if flags & chunk::DONE == 0 || length != 0 => return Err(WireError::ChunkKind { kind }.into()),
            chunk::NONE => {}
            chunk::OFFSET_DATA => {
                let bytes = length.checked_sub(8).ok_or(WireError::Short { what: "a chunk of data" })?;
                let offset = decode_offset(&self.payload(8, 8)?)?;
                let start = pending.cover(kind, offset, u64::from(bytes))?;
                self.data(pending, bufs, start as usize, bytes as usize)?;
            }
            chunk::OFFSET_HOLE => {
                let (offset, bytes) = decode_hole(&self.payload(length, 12)?)?;
                let start = pending.cover(kind, offset, u64::from(bytes))? as usize;
                match bufs {
                    Some(bufs) => bufs.range(start, bytes as usize).fill_zero(),
                    // Memory for one that waits starts as zeroes.
                    None => drop(pending.room()),
                }
            }
            chunk::BLOCK_STATUS => {
                let payload = self.payload(length, STATUS_MAX_BYTES)?;
                pending.on_status(&payload)?;
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let payload = self.payload(length, OPTION_MAX_BYTES)?;
                pending.on_error(kind, &payload)?;
            }
            kind => return Err(WireError::ChunkKind { kind }.into()),
        }
        if flags & chunk::DONE != 0 {
            pending.end()?;
        }
        Ok(())
    }

    fn payload(&mut self, length: u32, max: u32) -> Result<Vec<u8>, PeerError> {
        if length > max {
            let (bytes, max) = (u64::from(length), u64::from(max));
            return Err(WireError::TooBig { what: "the payload of a chunk", bytes, max }.into());
        }
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(payload)
    }
}

impl Drop for Transport {
    /// Says goodbye, so that the server knows that nothing was cut off.
    fn drop(&mut self) {
        let output = self.output.get_mut();
        if self.state.get_mut().lost.is_none() {
            let mut request = Vec::new();
            Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 }.encode(&mut request);
            // Whoever is dropped has nobody to tell.
            let _ = output.stream.write_all(&request);
        }
        self.stream.shutdown(Shutdown::Both);
    }
}
