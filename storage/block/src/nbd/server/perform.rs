//! What a request does to the disk.

use super::super::wire::{
    BlockRun, PAYLOAD_MAX_BYTES, Request, STATE_DIRTY, STATE_HOLE, STATE_ZERO, command, command_flag as flag,
    transmission_flag as can,
};
use super::Context;
use crate::create::Preallocation;
use crate::disk::{ChainExtent, Disk};
use crate::error::{BlockError, ErrorKind};
use crate::node::ExtentKind;

/// Reads from this length on leave holes out.
const SPARSE_BYTES: u64 = 64 << 10;
/// Longer reads are answered in parts of this many bytes: a client that asks for 32 MiB takes no more memory. QEMU's
/// tools ask for this much; in parts of half the length their reads take a tenth longer.
pub const PART_BYTES: u32 = 2 << 20;
/// Most chunks of one part of a read.
const PIECES_MAX: usize = 64;
/// Most runs in one answer about blocks.
const RUNS_MAX: usize = 1024;
/// Most questions to the disk for one answer about blocks.
const STEPS_MAX: usize = 4096;
/// Largest piece that a cache request reads at once.
const CACHE_BYTES: u64 = 1 << 20;

/// The export and what was agreed about it.
pub struct Target<'a> {
    pub disk: &'a Disk,
    /// Where in the disk the export starts.
    pub offset: u64,
    /// Whether no other client is there.
    pub is_alone: &'a (dyn Fn() -> bool + Sync),
    pub flags: u16,
    /// The metadata contexts that were agreed on, by their numbers.
    pub contexts: Vec<(u32, Context<'a>)>,
    pub structured: bool,
}

/// A part of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the export it starts.
    pub offset: u64,
    pub bytes: u32,
    /// Where its data is in the memory of the request; `None`: it is zeroes.
    pub data: Option<usize>,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// The parts of a read, in order. Without structured replies there is one, of data.
    Data(Vec<Piece>),
    /// By the number of the context.
    Status(Vec<(u32, Vec<BlockRun>)>),
    Error(u32, &'static str),
}

const READ_ONLY: Answer = Answer::Error(libc::EPERM as u32, "the export is read only");
const INVALID_FLAGS: Answer = Answer::Error(libc::EINVAL as u32, "the command does not have these flags");
const NO_COMMAND: Answer = Answer::Error(libc::EINVAL as u32, "the command is not supported");
const OUTSIDE: Answer = Answer::Error(libc::EINVAL as u32, "the range is outside the export");
const NO_ROOM: Answer = Answer::Error(libc::ENOSPC as u32, "the range is outside the export");
const TOO_LONG: Answer = Answer::Error(libc::EINVAL as u32, "a read of more than 32 MiB");
const NO_CONTEXT: Answer = Answer::Error(libc::EINVAL as u32, "block status was not negotiated");
const EMPTY: Answer = Answer::Error(libc::EINVAL as u32, "the range is empty");
const SIZE: Answer = Answer::Error(libc::EINVAL as u32, "the size is no multiple of 512 bytes");
const SHARED: Answer = Answer::Error(libc::EPERM as u32, "another client has the export, which would become smaller");
const SLOW: Answer = Answer::Error(libc::ENOTSUP as u32, "zeroes would be written as data");

/// Numbers of errors that a client knows. Texts tell nothing about the host.
fn refusal(error: &BlockError) -> Answer {
    match error.kind() {
        ErrorKind::NoSpace => Answer::Error(libc::ENOSPC as u32, "no space is left on the host"),
        ErrorKind::ReadOnly => READ_ONLY,
        ErrorKind::OutOfRange => OUTSIDE,
        ErrorKind::Corrupt => Answer::Error(libc::EIO as u32, "the image is damaged"),
        ErrorKind::Unsupported => Answer::Error(libc::ENOTSUP as u32, "the image does not support it"),
        ErrorKind::Io => Answer::Error(libc::EIO as u32, "the host failed"),
    }
}

impl Target<'_> {
    /// Does what a request asks. `room` holds the payload of a write, and gets the data of a read.
    pub fn perform(&self, request: &Request, room: &mut Vec<u8>) -> Answer {
        if let Err(refused) = self.check(request) {
            return refused;
        }
        self.attempt(request, room).unwrap_or_else(|error| refusal(&error))
    }

    /// How much of a request is answered at once. A client that wants one chunk gets one.
    pub fn part_bytes(&self, request: &Request) -> u32 {
        let in_parts = self.structured && request.command == command::READ && request.flags & flag::DF == 0;
        // What is wrong with the whole of it is said before any of it is done.
        if in_parts && request.length > PART_BYTES && self.check(request).is_ok() { PART_BYTES } else { request.length }
    }

    fn check(&self, request: &Request) -> Result<(), Answer> {
        let writes = request.writes();
        let known = match request.command {
            command::READ if self.structured => flag::DF | flag::FUA,
            command::READ | command::WRITE | command::TRIM | command::CACHE | command::FLUSH => flag::FUA,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            command::RESIZE if self.flags & can::SEND_RESIZE != 0 => flag::FUA,
            _ => return Err(NO_COMMAND),
        };
        if request.flags & !known != 0 {
            return Err(INVALID_FLAGS);
        }
        if writes && self.flags & can::READ_ONLY != 0 {
            return Err(READ_ONLY);
        }
        if matches!(request.command, command::FLUSH | command::RESIZE) {
            return Ok(());
        }
        let end = request.offset.checked_add(u64::from(request.length));
        if end.is_none_or(|end| end > self.size_bytes()) {
            // Spec, "Error values": there is no room for data; what gives space back needs none.
            let needs_room = matches!(request.command, command::WRITE | command::WRITE_ZEROES);
            return Err(if needs_room { NO_ROOM } else { OUTSIDE });
        }
        match request.command {
            command::READ if request.length > PAYLOAD_MAX_BYTES => Err(TOO_LONG),
            command::BLOCK_STATUS if self.contexts.is_empty() => Err(NO_CONTEXT),
            command::BLOCK_STATUS if request.length == 0 => Err(EMPTY),
            _ => Ok(()),
        }
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes().saturating_sub(self.offset)
    }

    fn attempt(&self, request: &Request, room: &mut Vec<u8>) -> Result<Answer, BlockError> {
        if request.command == command::RESIZE {
            return self.resize(request);
        }
        let (at, bytes) = (self.offset + request.offset, u64::from(request.length));
        let has = |flag| request.flags & flag != 0;
        match request.command {
            command::READ => return self.read(request, room),
            command::BLOCK_STATUS => return self.status(at, bytes, has(flag::REQ_ONE)),
            command::FLUSH => self.disk.flush()?,
            command::CACHE => self.cache(at, bytes, room)?,
            command::WRITE if bytes > 0 => self.disk.write(at, room)?,
            command::TRIM if bytes > 0 => self.disk.discard(at, bytes)?,
            command::WRITE_ZEROES if has(flag::FAST_ZERO) && !self.zeroes_are_fast(has(flag::NO_HOLE)) => {
                return Ok(SLOW);
            }
            command::WRITE_ZEROES if bytes > 0 => self.disk.write_zeroes(at, bytes, !has(flag::NO_HOLE))?,
            _ => {}
        }
        if request.writes() && has(flag::FUA) {
            self.disk.flush()?;
        }
        Ok(Answer::Done)
    }

    /// Gives the disk the size that the offset says. Every client sees it from then on.
    fn resize(&self, request: &Request) -> Result<Answer, BlockError> {
        let to_bytes = self.offset.checked_add(request.offset).filter(|bytes| bytes.is_multiple_of(512));
        let Some(to_bytes) = to_bytes else { return Ok(SIZE) };
        let shrink = request.offset < self.size_bytes();
        if shrink && !(self.is_alone)() {
            return Ok(SHARED);
        }
        self.disk.resize(to_bytes, shrink, Preallocation::Off)?;
        if request.flags & flag::FUA != 0 {
            self.disk.flush()?;
        }
        Ok(Answer::Done)
    }

    /// Zeroes are a change of tables in qcow2, and a hole in a raw image if it may be one.
    fn zeroes_are_fast(&self, must_allocate: bool) -> bool {
        self.disk.cluster_bytes() > 0 || !must_allocate
    }

    fn read(&self, request: &Request, room: &mut Vec<u8>) -> Result<Answer, BlockError> {
        let (offset, bytes) = (request.offset, u64::from(request.length));
        let whole = vec![Piece { offset, bytes: request.length, data: Some(0) }];
        if bytes == 0 {
            room.clear();
            // A chunk of no data is not allowed.
            return Ok(Answer::Data(if self.structured { Vec::new() } else { whole }));
        }
        let in_pieces = self.structured && bytes >= SPARSE_BYTES && request.flags & flag::DF == 0;
        let mut pieces = if in_pieces { self.pieces(offset, bytes)? } else { whole };
        let mut filled = 0;
        for piece in pieces.iter_mut().filter(|piece| piece.data.is_some()) {
            piece.data = Some(filled);
            filled += piece.bytes as usize;
        }
        // Stale bytes of earlier requests are all overwritten.
        room.resize(filled, 0);
        for piece in &pieces {
            let Some(data) = piece.data else { continue };
            let part = room.get_mut(data..data + piece.bytes as usize).unwrap_or_default();
            self.disk.read(self.offset + piece.offset, part)?;
        }
        Ok(Answer::Data(pieces))
    }

    /// Cuts a read into data and holes. The last piece takes all that is left when there are many.
    fn pieces(&self, offset: u64, bytes: u64) -> Result<Vec<Piece>, BlockError> {
        let end = offset + bytes;
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = offset;
        while at < end {
            let (found, is_data) = self.run(self.offset + at, end - at)?;
            let is_last = pieces.len() + 1 >= PIECES_MAX;
            let (found, is_data) = if is_last { (end - at, true) } else { (found, is_data) };
            match pieces.last_mut().filter(|last| last.data.is_some() == is_data) {
                Some(last) => last.bytes += found as u32,
                None => pieces.push(Piece { offset: at, bytes: found as u32, data: is_data.then_some(0) }),
            }
            at += found;
        }
        Ok(pieces)
    }

    /// How long the disk is all data, or all zeroes.
    fn run(&self, at: u64, bytes: u64) -> Result<(u64, bool), BlockError> {
        let extent = self.disk.extent(at, bytes)?.extent;
        Ok((extent.bytes.clamp(1, bytes), extent.kind == ExtentKind::Data))
    }

    fn status(&self, at: u64, bytes: u64, only_one: bool) -> Result<Answer, BlockError> {
        let mut contexts = Vec::with_capacity(self.contexts.len());
        for (id, context) in &self.contexts {
            contexts.push((*id, runs_of(at, bytes, only_one, |at, bytes| self.state(context, at, bytes))?));
        }
        Ok(Answer::Status(contexts))
    }

    /// For how long all blocks have the same state, and which.
    fn state(&self, context: &Context<'_>, at: u64, bytes: u64) -> Result<(u64, u32), BlockError> {
        match context {
            Context::Allocation => {
                let (found, is_data) = self.run(at, bytes)?;
                // As QEMU: what is not data takes no space that matters, and reads as zeroes.
                Ok((found, if is_data { 0 } else { STATE_HOLE | STATE_ZERO }))
            }
            Context::Depth => {
                let ChainExtent { depth, extent } = self.disk.extent(at, bytes)?;
                let state = if depth < self.disk.layers() { depth as u32 + 1 } else { 0 };
                Ok((extent.bytes.clamp(1, bytes), state))
            }
            Context::Bitmap(bits) => {
                let (found, is_marked) = bits.run(at, bytes);
                Ok((found, if is_marked { STATE_DIRTY } else { 0 }))
            }
        }
    }

    /// Reads a range so that the host has it in memory.
    fn cache(&self, at: u64, bytes: u64, room: &mut Vec<u8>) -> Result<(), BlockError> {
        room.resize(bytes.min(CACHE_BYTES) as usize, 0);
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(CACHE_BYTES);
            self.disk.read(at + done, room.get_mut(..count as usize).unwrap_or_default())?;
            done += count;
        }
        Ok(())
    }
}

/// The states of a range, as `ask` tells them piece by piece: a part of it if there are many.
fn runs_of(
    at: u64,
    bytes: u64,
    only_one: bool,
    ask: impl Fn(u64, u64) -> Result<(u64, u32), BlockError>,
) -> Result<Vec<BlockRun>, BlockError> {
    let mut runs: Vec<BlockRun> = Vec::new();
    let mut done = 0;
    for _ in 0..STEPS_MAX {
        if done == bytes {
            break;
        }
        let (found, state) = ask(at + done, bytes - done)?;
        let most = if only_one { 1 } else { RUNS_MAX };
        let has_room = runs.len() < most;
        match runs.last_mut().filter(|last| last.state == state) {
            Some(last) => last.bytes += found as u32,
            None if !has_room => break,
            None => runs.push(BlockRun { bytes: found as u32, state }),
        }
        done += found;
    }
    Ok(runs)
}
