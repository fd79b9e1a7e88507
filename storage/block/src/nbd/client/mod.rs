//! The client: an export as a file.

mod handshake;
mod link;
mod pending;
mod transport;

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

use super::error::NbdError;
use super::tls::TlsClient;
use super::wire::{
    BASE_ALLOCATION, BlockRun, PAYLOAD_MAX_BYTES, STATE_DIRTY, STATE_ZERO, command, command_flag,
    transmission_flag as can,
};
use crate::io::FileBackend;
use crate::spec::NbdSpec;
use crate::sys::{ReadBufs, WriteBufs};
use crate::zeroes::write_zero_data;
use link::Link;
use transport::Ask;

pub use handshake::Export;

/// Largest read or write sent as one request, so that what other threads' answers hold in memory stays small.
const REQUEST_MAX_BYTES: u64 = 4 << 20;
/// Largest range of a request that carries no data.
const RANGE_MAX_BYTES: u64 = 1 << 30;
/// Zeroes written as data, where a server knows no other way.
const ZEROES_BYTES: u64 = 1 << 20;

/// An export of an NBD server as a file. Its length changes when this client changes it, if the server lets it. Any
/// number of threads use it at once: their requests are in flight together on one connection. When that is lost, every
/// request fails from then on, unless [`NbdSpec::reconnect_delay_s`] gives it time to come back: requests are repeated
/// then.
pub struct NbdFile {
    server: String,
    link: Link,
    /// What is asked about blocks is which the server marks.
    marks: bool,
    /// A range known to hold data. What others do meanwhile does not matter: data can always be read.
    data_run: Mutex<Range<u64>>,
    /// Writes hold it shared, changes of a part of a block alone.
    blocks: RwLock<()>,
}

impl NbdFile {
    /// Connects to a server and opens an export; with `tls` nothing is said in the clear. A name that demands TLS needs
    /// it.
    pub fn connect(spec: &NbdSpec, tls: Option<&TlsClient>) -> Result<NbdFile, NbdError> {
        let link = Link::open(spec, tls)?;
        let marks = spec.context.as_deref().is_some_and(|context| context != BASE_ALLOCATION);
        Ok(NbdFile { server: spec.to_string(), link, marks, data_run: Mutex::new(0..0), blocks: RwLock::new(()) })
    }

    /// Whether the server lets nobody write.
    pub fn is_read_only(&self) -> bool {
        self.has(can::READ_ONLY)
    }

    /// The same file, or an error where nobody may write.
    pub fn for_writing(self) -> Result<NbdFile, NbdError> {
        if self.is_read_only() { Err(NbdError::ReadOnly { server: self.server.clone() }) } else { Ok(self) }
    }

    fn has(&self, flag: u16) -> bool {
        self.link.agreed.flags & flag != 0
    }

    fn min(&self) -> u64 {
        u64::from(self.link.agreed.sizes.min)
    }

    fn is_aligned(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(self.min()) && bytes.is_multiple_of(self.min())
    }

    /// Largest payload, in whole blocks.
    fn request_max(&self) -> u64 {
        let max = u64::from(self.link.agreed.sizes.max.min(PAYLOAD_MAX_BYTES)).min(REQUEST_MAX_BYTES);
        (max - max % self.min()).max(self.min())
    }

    fn size_bytes(&self) -> u64 {
        self.link.size_bytes.load(Ordering::Acquire)
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.is_read_only() { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    /// How much of a range is inside the export.
    fn inside(&self, offset: u64, bytes: u64) -> u64 {
        self.size_bytes().saturating_sub(offset).min(bytes)
    }

    fn read_piece(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let bytes = bufs.len() as u64;
        if self.is_aligned(offset, bytes) {
            let ask = Ask { command: command::READ, flags: 0, offset, length: bytes as u32 };
            return self.link.call(|transport| transport.read(&ask, bufs));
        }
        let (start, mut blocks) = self.blocks_around(offset, bytes);
        self.read_piece(start, &ReadBufs::from_slice(&mut blocks))?;
        let skip = (offset - start) as usize;
        bufs.copy_from(blocks.get(skip..skip + bufs.len()).unwrap_or_default());
        Ok(())
    }

    /// Where the blocks that hold a range start, and room for them.
    fn blocks_around(&self, offset: u64, bytes: u64) -> (u64, Vec<u8>) {
        let start = offset - offset % self.min();
        let end = (offset + bytes).next_multiple_of(self.min());
        (start, vec![0; (end - start) as usize])
    }

    fn write_piece(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let bytes = bufs.len() as u64;
        let send = |offset, bufs: &WriteBufs<'_>| {
            let ask = Ask { command: command::WRITE, flags: 0, offset, length: bufs.len() as u32 };
            self.link.call(|transport| transport.write(&ask, bufs))
        };
        if self.is_aligned(offset, bytes) {
            let _shared = self.blocks.read();
            return send(offset, bufs);
        }
        let _alone = self.blocks.write();
        let (start, mut blocks) = self.blocks_around(offset, bytes);
        self.read_piece(start, &ReadBufs::from_slice(&mut blocks))?;
        let skip = (offset - start) as usize;
        bufs.copy_to(blocks.get_mut(skip..skip + bufs.len()).unwrap_or_default());
        send(start, &WriteBufs::from_slice(&blocks))
    }

    /// Sends a command about a range in pieces. The range is in whole blocks.
    fn range(&self, command: u16, flags: u16, offset: u64, bytes: u64) -> io::Result<()> {
        let _shared = self.blocks.read();
        pieces(offset, bytes, RANGE_MAX_BYTES)
            .try_for_each(|(offset, bytes)| self.plain(Ask { command, flags, offset, length: bytes as u32 }))
    }

    fn plain(&self, ask: Ask) -> io::Result<()> {
        self.link.call(|transport| transport.plain(&ask))
    }

    fn write_zero_data(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let piece_bytes = ZEROES_BYTES.min(self.request_max());
        write_zero_data(offset..offset + bytes, piece_bytes, |at, zeroes| self.write_piece(at, zeroes))
    }

    /// The whole blocks of a range.
    fn whole_blocks(&self, offset: u64, bytes: u64) -> Range<u64> {
        let end = offset + bytes;
        let start = offset.next_multiple_of(self.min()).min(end);
        start..(end - end % self.min()).max(start)
    }

    /// What the server tells of a range, and where that starts.
    fn runs(&self, offset: u64, bytes: u64) -> io::Result<(u64, Vec<BlockRun>)> {
        let start = offset - offset % self.min();
        let length = (offset + bytes).next_multiple_of(self.min()) - start;
        let length = length.min(RANGE_MAX_BYTES);
        let ask = Ask { command: command::BLOCK_STATUS, flags: 0, offset: start, length: length as u32 };
        Ok((start, self.link.call(|transport| transport.status(&ask))?))
    }

    /// How much of a range is told by runs that start before it, of which the first are so many bytes long.
    fn reached(&self, start: u64, first_bytes: u64, offset: u64, bytes: u64) -> Option<u64> {
        // A server may describe more than was asked, but not less than something of it.
        let reached = start.saturating_add(first_bytes).saturating_sub(offset).min(bytes);
        (reached > 0).then_some(reached)
    }

    fn status(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let (start, runs) = self.runs(offset, bytes)?;
        let (first_bytes, is_data) = first_run(&runs, is_data);
        if let Some(run) = first_data(start, &runs) {
            *self.data_run.lock() = run;
        }
        match self.reached(start, first_bytes, offset, bytes) {
            Some(reached) => Ok((reached, is_data)),
            None => Ok((bytes.min(self.min() - (offset - start)), true)),
        }
    }
}

/// Everything that a server offers; `tls` as in [`NbdFile::connect`].
pub fn list_exports(spec: &NbdSpec, tls: Option<&TlsClient>) -> Result<Vec<Export>, NbdError> {
    let mut haggle = link::open(spec, tls, None)?;
    handshake::list(&mut haggle).map_err(|source| link::refused(&spec.to_string(), tls, source))
}

/// Cuts a range into pieces of at most `max` bytes, not 0, that end at multiples of it.
fn pieces(offset: u64, bytes: u64, max: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset.saturating_add(bytes);
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = (max - at % max).min(end - at);
        let found = (piece > 0).then_some((at, piece));
        at += piece;
        found
    })
}

/// Runs that do not read as zeroes count as data, whether they take space or not.
fn is_data(run: &BlockRun) -> bool {
    run.state & STATE_ZERO == 0
}

/// How long the first runs of one kind are together, and which that is: data, for example.
fn first_run(runs: &[BlockRun], is: impl Fn(&BlockRun) -> bool) -> (u64, bool) {
    let kind = runs.first().is_none_or(&is);
    let bytes = runs.iter().take_while(|run| is(run) == kind).map(|run| u64::from(run.bytes)).sum();
    (bytes, kind)
}

/// Where the first data is.
fn first_data(start: u64, runs: &[BlockRun]) -> Option<Range<u64>> {
    let (skipped, kind) = first_run(runs, is_data);
    if kind {
        return Some(start..start.saturating_add(skipped));
    }
    let rest: Vec<BlockRun> = runs.iter().skip_while(|run| !is_data(run)).copied().collect();
    let start = start.saturating_add(skipped);
    (!rest.is_empty()).then(|| start..start.saturating_add(first_run(&rest, is_data).0))
}

impl FileBackend for NbdFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let inside = self.inside(offset, bufs.len() as u64);
        if inside < bufs.len() as u64 {
            bufs.range(inside as usize, bufs.len() - inside as usize).fill_zero();
        }
        pieces(offset, inside, self.request_max())
            .try_for_each(|(at, bytes)| self.read_piece(at, &bufs.range((at - offset) as usize, bytes as usize)))
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.check_writable()?;
        let inside = self.inside(offset, bufs.len() as u64);
        // An export of no whole number of sectors is rounded up above; the zeroes of its last sector need no room.
        if inside < bufs.len() as u64 && !bufs.range(inside as usize, bufs.len() - inside as usize).is_zero() {
            let (server, size_bytes) = (self.server.clone(), self.size_bytes());
            return Err(io::Error::other(NbdError::PastEnd { server, offset, size_bytes }));
        }
        pieces(offset, inside, self.request_max())
            .try_for_each(|(at, bytes)| self.write_piece(at, &bufs.range((at - offset) as usize, bytes as usize)))
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.has(can::SEND_FLUSH) || self.is_read_only() {
            return Ok(());
        }
        self.plain(Ask { command: command::FLUSH, flags: 0, offset: 0, length: 0 })
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.check_writable()?;
        let whole = self.whole_blocks(offset, self.inside(offset, bytes));
        if !self.has(can::SEND_TRIM) || whole.is_empty() {
            return Ok(());
        }
        self.range(command::TRIM, 0, whole.start, whole.end - whole.start)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.check_writable()?;
        let inside = self.inside(offset, bytes);
        let whole = self.whole_blocks(offset, inside);
        if !self.has(can::SEND_WRITE_ZEROES) || whole.is_empty() {
            return self.write_zero_data(offset, inside);
        }
        self.write_zero_data(offset, whole.start - offset)?;
        let flags = if may_unmap { 0 } else { command_flag::NO_HOLE };
        self.range(command::WRITE_ZEROES, flags, whole.start, whole.end - whole.start)?;
        self.write_zero_data(whole.end, offset + inside - whole.end)
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let inside = self.inside(offset, bytes);
        if inside == 0 {
            return Ok((bytes, false));
        }
        let known = self.data_run.lock().clone();
        if known.contains(&offset) {
            return Ok(((known.end - offset).min(inside), true));
        }
        if self.link.agreed.context.is_none() || self.marks { Ok((inside, true)) } else { self.status(offset, inside) }
    }

    fn mark(&self, offset: u64, bytes: u64) -> io::Result<Option<(u64, bool)>> {
        let inside = self.inside(offset, bytes);
        if !self.marks || inside == 0 {
            return Ok(None);
        }
        let (start, runs) = self.runs(offset, inside)?;
        let (first_bytes, is_marked) = first_run(&runs, |run| run.state & STATE_DIRTY != 0);
        // What a server leaves out may be marked.
        Ok(Some(
            self.reached(start, first_bytes, offset, inside).map_or((inside, true), |reached| (reached, is_marked)),
        ))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.size_bytes())
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        if bytes == self.size_bytes() {
            return Ok(());
        }
        if !self.has(can::SEND_RESIZE) || !self.is_aligned(bytes, 0) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, NbdError::NoResize { server: self.server.clone() }));
        }
        // No write may be under way.
        let _alone = self.blocks.write();
        *self.data_run.lock() = 0..0;
        self.plain(Ask { command: command::RESIZE, flags: 0, offset: bytes, length: 0 })?;
        self.link.size_bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    fn keeps_len(&self) -> bool {
        !self.has(can::SEND_RESIZE)
    }

    fn is_remote(&self) -> bool {
        true
    }

    /// A server does not say.
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
}

#[test]
fn ranges_are_cut_at_multiples() {
    for (offset, bytes, max, want) in [
        (0, 0, 8, vec![]),
        (0, 8, 8, vec![(0, 8)]),
        (3, 20, 8, vec![(3, 5), (8, 8), (16, 7)]),
        (u64::MAX - 3, 3, 8, vec![(u64::MAX - 3, 3)]),
    ] {
        assert_eq!(pieces(offset, bytes, max).collect::<Vec<_>>(), want);
    }
}

#[test]
fn runs_of_one_kind_are_one() {
    let runs = |states: &[u32]| states.iter().map(|state| BlockRun { bytes: 10, state: *state }).collect::<Vec<_>>();
    for (states, first, data) in [
        (&[0, 1, 3][..], (20, true), Some(100..120)),
        (&[3, 2, 0, 0, 3], (20, false), Some(120..140)),
        (&[3], (10, false), None),
    ] {
        let runs = runs(states);
        assert_eq!((first_run(&runs, is_data), first_data(100, &runs)), (first, data), "{states:?}");
    }
}
