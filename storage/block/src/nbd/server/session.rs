//! Requests of one client, after negotiation.

use std::io::{self, BufReader, IoSlice, Read};
use std::net::Shutdown;

use parking_lot::Mutex;

use super::super::error::PeerError;
use super::super::socket::{Stream, write_all_vectored};
use super::super::wire::{
    Chunk, Negotiation, PAYLOAD_MAX_BYTES, Request, WireError, chunk, command, encode_block_status, encode_chunk,
    encode_error, encode_simple,
};
use super::ServeOptions;
use super::perform::{Answer, PART_BYTES, Piece, Target};
use crate::crew::run_on_threads;
use crate::disk::Disk;

/// Read ahead for the heads of requests.
const AHEAD_BYTES: usize = 16 << 10;
/// Memory that a thread keeps between requests: what a part of a read takes.
const KEEP_BYTES: usize = PART_BYTES as usize;

/// What the threads of a connection share.
struct Session<'a> {
    target: Target<'a>,
    structured: bool,
    input: Mutex<Input>,
    output: Mutex<Output>,
    /// For ending it.
    stream: Stream,
    ended: Mutex<Option<PeerError>>,
}

struct Input {
    stream: BufReader<Stream>,
    /// Nothing more comes.
    ended: bool,
}

struct Output {
    stream: Stream,
    head: Vec<u8>,
}

/// Answers requests until the client leaves. An error tells how it left, if not well.
pub fn run(
    stream: Stream,
    disk: &Disk,
    flags: u16,
    options: &ServeOptions<'_>,
    agreed: &Negotiation,
    is_alone: &(dyn Fn() -> bool + Sync),
) -> Result<(), PeerError> {
    let input = Input { stream: BufReader::with_capacity(AHEAD_BYTES, stream.try_clone()?), ended: false };
    let offered = (1..).zip(super::contexts(options).map(|(_, context)| context));
    let session = Session {
        target: Target {
            disk,
            offset: options.offset,
            is_alone,
            flags,
            contexts: offered.filter(|(id, _)| agreed.contexts.contains(id)).collect(),
            structured: agreed.structured,
        },
        structured: agreed.structured,
        input: Mutex::new(input),
        output: Mutex::new(Output { stream: stream.try_clone()?, head: Vec::new() }),
        stream,
        ended: Mutex::new(None),
    };
    run_on_threads(options.workers.clamp(1, 16), &|| session.work());
    session.stream.shutdown(Shutdown::Both);
    match session.ended.into_inner() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Session<'_> {
    fn work(&self) {
        let mut room = Vec::new();
        loop {
            let request = match self.next(&mut room) {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(error) => return self.end(error),
            };
            if let Err(error) = self.answer(request, &mut room) {
                return self.end(error.into());
            }
            if room.capacity() > KEEP_BYTES {
                room = Vec::new();
            }
        }
    }

    /// Does what a request asks, and replies: part by part where that can be done.
    fn answer(&self, mut rest: Request, room: &mut Vec<u8>) -> io::Result<()> {
        let part_bytes = self.target.part_bytes(&rest);
        loop {
            let part = Request { length: rest.length.min(part_bytes), ..rest };
            let answer = self.target.perform(&part, room);
            let is_last = part.length == rest.length || matches!(answer, Answer::Error(..));
            self.reply(rest.cookie, &answer, room, is_last)?;
            if is_last {
                return Ok(());
            }
            rest = Request { offset: rest.offset + u64::from(part.length), length: rest.length - part.length, ..rest };
        }
    }

    fn end(&self, error: PeerError) {
        self.ended.lock().get_or_insert(error);
        // Threads that wait for requests or for the client to read wake up.
        self.stream.shutdown(Shutdown::Both);
    }

    /// Reads one request, with its payload. `None`: there are no more.
    fn next(&self, room: &mut Vec<u8>) -> Result<Option<Request>, PeerError> {
        let mut input = self.input.lock();
        if input.ended {
            return Ok(None);
        }
        let read = input.next(room);
        if !matches!(read, Ok(Some(_))) {
            input.ended = true;
        }
        read
    }

    /// Sends an answer. Only one of data may be followed by more (`is_last`).
    fn reply(&self, cookie: u64, answer: &Answer, room: &[u8], is_last: bool) -> io::Result<()> {
        let mut output = self.output.lock();
        let Output { stream, head } = &mut *output;
        head.clear();
        match answer {
            Answer::Data(pieces) if self.structured => {
                return reply_pieces(stream, head, cookie, pieces, room, is_last);
            }
            Answer::Data(_) => {
                encode_simple(head, 0, cookie);
                return write_all_vectored(stream, &mut [IoSlice::new(head), IoSlice::new(room)]);
            }
            Answer::Status(contexts) => {
                for (index, (id, runs)) in contexts.iter().enumerate() {
                    encode_block_status(head, cookie, *id, runs, index + 1 == contexts.len());
                }
            }
            Answer::Done => encode_simple(head, 0, cookie),
            Answer::Error(errno, text) if self.structured => encode_error(head, cookie, *errno, text),
            Answer::Error(errno, _) => encode_simple(head, *errno, cookie),
        }
        write_all_vectored(stream, &mut [IoSlice::new(head)])
    }
}

/// Sends the chunks of a read in as few calls as possible. With the last ones it ends.
fn reply_pieces(
    stream: &mut Stream,
    head: &mut Vec<u8>,
    cookie: u64,
    pieces: &[Piece],
    room: &[u8],
    is_last: bool,
) -> io::Result<()> {
    if pieces.is_empty() {
        // Spec, "Structured replies": a read is never answered with a simple reply, whatever its length.
        encode_chunk(head, &Chunk { flags: chunk::DONE, kind: chunk::NONE, cookie, length: 0 });
        return write_all_vectored(stream, &mut [IoSlice::new(head)]);
    }
    let mut cuts = Vec::with_capacity(pieces.len());
    for (index, piece) in pieces.iter().enumerate() {
        let start = head.len();
        let flags = if is_last && index + 1 == pieces.len() { chunk::DONE } else { 0 };
        let (kind, length) = match piece.data {
            Some(_) => (chunk::OFFSET_DATA, 8 + piece.bytes),
            None => (chunk::OFFSET_HOLE, 12),
        };
        encode_chunk(head, &Chunk { flags, kind, cookie, length });
        head.extend(piece.offset.to_be_bytes());
        if piece.data.is_none() {
            head.extend(piece.bytes.to_be_bytes());
        }
        cuts.push(start..head.len());
    }
    let mut slices = Vec::with_capacity(2 * pieces.len());
    for (piece, cut) in pieces.iter().zip(cuts) {
        slices.push(IoSlice::new(head.get(cut).unwrap_or_default()));
        if let Some(at) = piece.data {
            slices.push(IoSlice::new(room.get(at..at + piece.bytes as usize).unwrap_or_default()));
        }
    }
    write_all_vectored(stream, &mut slices)
}

impl Input {
    fn next(&mut self, room: &mut Vec<u8>) -> Result<Option<Request>, PeerError> {
        let mut head = [0; Request::BYTES];
        let (first, rest) = head.split_at_mut(1);
        loop {
            match self.stream.read(first) {
                // Without a goodbye, but between requests.
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.stream.read_exact(rest)?;
        let request = Request::decode(&head)?;
        match request.command {
            command::DISC => return Ok(None),
            command::WRITE if request.length > PAYLOAD_MAX_BYTES => {
                let (bytes, max) = (u64::from(request.length), u64::from(PAYLOAD_MAX_BYTES));
                return Err(WireError::TooBig { what: "the payload of a write", bytes, max }.into());
            }
            command::WRITE => {
                room.resize(request.length as usize, 0);
                self.stream.read_exact(room)?;
            }
            _ => {}
        }
        Ok(Some(request))
    }
}
