//! A request that waits for its reply, and whether what comes is one. No I/O.

use super::super::wire::{BlockRun, WireError, chunk, decode_block_status, decode_error};

/// Most pieces of a read that are not joined yet.
const PIECES_MAX: usize = 4096;

/// What a reply has to bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every byte of the range.
    Data,
    /// Runs of this context.
    Status(u32),
    /// Nothing but that it was done.
    Nothing,
}

/// A request in flight.
#[derive(Debug)]
pub struct Pending {
    wanted: Wanted,
    offset: u64,
    length: u32,
    /// What of the range has come, from the start of the request, in order and joined.
    covered: Vec<(u64, u64)>,
    /// Its bytes, where another thread than the waiting one took them in.
    pub data: Vec<u8>,
    /// What was told about blocks.
    pub runs: Vec<BlockRun>,
    /// What the server could not do.
    pub error: Option<(u32, String)>,
    /// The reply has ended.
    pub done: bool,
}

impl Pending {
    pub fn new(wanted: Wanted, offset: u64, length: u32) -> Pending {
        let (covered, data, runs) = (Vec::new(), Vec::new(), Vec::new());
        Pending { wanted, offset, length, covered, data, runs, error: None, done: false }
    }

    /// A simple reply: how many bytes of data follow it.
    pub fn on_simple(&mut self, error: u32, structured: bool) -> Result<u32, WireError> {
        self.done = true;
        if error != 0 {
            self.error = Some((error, "no reason was given".to_owned()));
            return Ok(0);
        }
        match self.wanted {
            Wanted::Nothing => Ok(0),
            _ if structured => Err(WireError::SimpleRead),
            Wanted::Data => Ok(self.length),
            Wanted::Status(_) => Err(WireError::NoBlocks),
        }
    }

    /// A chunk of data or a hole: where in the request it starts.
    pub fn cover(&mut self, kind: u16, offset: u64, bytes: u64) -> Result<u64, WireError> {
        if self.wanted != Wanted::Data {
            return Err(WireError::ChunkKind { kind });
        }
        let refused = WireError::ChunkRange { offset, bytes };
        let start = offset.checked_sub(self.offset).ok_or(refused.clone())?;
        let end = start.checked_add(bytes).filter(|end| *end <= u64::from(self.length)).ok_or(refused.clone())?;
        if bytes == 0 {
            return Err(refused);
        }
        let at = self.covered.partition_point(|piece| piece.1 <= start);
        if self.covered.get(at).is_some_and(|next| next.0 < end) {
            return Err(refused);
        }
        let joins_before = at.checked_sub(1).and_then(|i| self.covered.get(i)).is_some_and(|before| before.1 == start);
        let joins_next = self.covered.get(at).is_some_and(|next| next.0 == end);
        let next_end = if joins_next { self.covered.remove(at).1 } else { end };
        match at.checked_sub(1).and_then(|i| self.covered.get_mut(i)).filter(|_| joins_before) {
            Some(before) => before.1 = next_end,
            None => self.covered.insert(at, (start, next_end)),
        }
        if self.covered.len() > PIECES_MAX {
            return Err(WireError::TooManyPieces { max: PIECES_MAX });
        }
        Ok(start)
    }

    /// A chunk with block status.
    pub fn on_status(&mut self, payload: &[u8]) -> Result<(), WireError> {
        let (Wanted::Status(want), true) = (self.wanted, self.runs.is_empty()) else {
            return Err(WireError::ChunkKind { kind: chunk::BLOCK_STATUS });
        };
        let (found, runs) = decode_block_status(payload)?;
        if found != want {
            return Err(WireError::Context { found, want });
        }
        self.runs = runs;
        Ok(())
    }

    /// A chunk with an error. The first one counts; more of the reply may follow.
    pub fn on_error(&mut self, kind: u16, payload: &[u8]) -> Result<(), WireError> {
        let (errno, text) = decode_error(kind, payload)?;
        let text = if text.is_empty() { "no reason was given".to_owned() } else { text };
        self.error.get_or_insert((errno, text));
        Ok(())
    }

    /// The last chunk has come: a reply without an error brings all that was asked.
    pub fn end(&mut self) -> Result<(), WireError> {
        self.done = true;
        if self.error.is_some() {
            return Ok(());
        }
        let have: u64 = self.covered.iter().map(|(start, end)| end - start).sum();
        match self.wanted {
            Wanted::Data if have < u64::from(self.length) => {
                Err(WireError::Incomplete { missing: u64::from(self.length) - have })
            }
            Wanted::Status(_) if self.runs.is_empty() => Err(WireError::NoBlocks),
            _ => Ok(()),
        }
    }

    /// Room for the data of a request that another thread waits for.
    pub fn room(&mut self) -> &mut [u8] {
        self.data.resize(self.length as usize, 0);
        &mut self.data
    }
}

#[test]
fn every_byte_comes_once() {
    let range = |offset, bytes| Err(WireError::ChunkRange { offset, bytes });
    // A read of 100 bytes at 1000: chunks, and what is said to each; then what is missing at the end.
    for (chunks, missing) in [
        (vec![(1000, 100, Ok(0))], 0),
        (vec![(1050, 50, Ok(50)), (1000, 50, Ok(0))], 0),
        (vec![(1000, 10, Ok(0)), (1020, 10, Ok(20)), (1010, 10, Ok(10)), (1090, 10, Ok(90))], 60),
        (vec![(999, 10, range(999, 10)), (1099, 2, range(1099, 2)), (u64::MAX, 2, range(u64::MAX, 2))], 100),
        (vec![(1000, u64::MAX, range(1000, u64::MAX)), (1000, 0, range(1000, 0))], 100),
        (vec![(1010, 10, Ok(10)), (1010, 10, range(1010, 10)), (1005, 10, range(1005, 10))], 90),
        (vec![(1010, 10, Ok(10)), (1019, 5, range(1019, 5)), (1000, 100, range(1000, 100))], 90),
    ] {
        let mut pending = Pending::new(Wanted::Data, 1000, 100);
        for (offset, bytes, want) in &chunks {
            assert_eq!(pending.cover(chunk::OFFSET_DATA, *offset, *bytes), *want, "{chunks:?}");
        }
        let want = if missing == 0 { Ok(()) } else { Err(WireError::Incomplete { missing }) };
        assert_eq!(pending.end(), want, "{chunks:?}");
    }
}

#[test]
fn a_reply_is_of_the_kind_that_was_asked_for() {
    let mut status = Pending::new(Wanted::Status(7), 0, 512);
    assert_eq!(status.cover(1, 0, 512), Err(WireError::ChunkKind { kind: 1 }));
    assert_eq!(status.end(), Err(WireError::NoBlocks));
    let other = b"\0\0\0\x08\0\0\x02\0\0\0\0\0";
    assert_eq!(status.on_status(other), Err(WireError::Context { found: 8, want: 7 }));
    let right = b"\0\0\0\x07\0\0\x02\0\0\0\0\0";
    assert_eq!(status.on_status(right), Ok(()));
    assert_eq!(status.on_status(right), Err(WireError::ChunkKind { kind: 5 }));
    let mut plain = Pending::new(Wanted::Nothing, 0, 0);
    assert_eq!(plain.on_status(right), Err(WireError::ChunkKind { kind: 5 }));
    assert_eq!((plain.on_simple(0, true), plain.done), (Ok(0), true));
    let mut read = Pending::new(Wanted::Data, 0, 512);
    assert_eq!(read.on_simple(0, true), Err(WireError::SimpleRead));
    assert_eq!(read.on_simple(0, false), Ok(512));
    assert_eq!((read.on_simple(5, true), read.error.map(|e| e.0)), (Ok(0), Some(5)));
}
