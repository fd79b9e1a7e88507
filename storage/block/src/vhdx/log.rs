//! Writing through the log: sectors of the BAT are on stable storage in the log before they change in place, so
//! that a torn write can be made again.

use std::sync::{Mutex, PoisonError};

use image::vhdx::header::HEADER_OFFSETS;
use image::vhdx::log::{Change, NewEntry, REPLAY_MAX_BYTES, active, sectors_that_fit};
use image::vhdx::{Guid, Header, Region, VhdxError};

use crate::error::BlockError;
use crate::mapped::{DirtyPage, Store, random_uuid};

/// The image's identity and its log, while it is open for writing.
pub(super) struct Journal {
    state: Mutex<State>,
}

struct State {
    /// As it is on the disk.
    header: Header,
    /// Which of the two headers that is.
    index: usize,
    /// Number of the next log entry.
    sequence: u64,
}

impl Journal {
    pub(super) fn new(header: Header, index: usize) -> Journal {
        Journal { state: Mutex::new(State { header, index, sequence: 1 }) }
    }

    /// The image is about to change: it gets new identities, and the log is opened.
    pub(super) fn begin(&self, store: &Store) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let header = Header {
            file_write_guid: random_uuid(&store.path)?,
            data_write_guid: random_uuid(&store.path)?,
            log_guid: random_uuid(&store.path)?,
            ..state.header.clone()
        };
        state.put(store, header)
    }

    /// The image is whole: the log is empty.
    pub(super) fn close(&self, store: &Store) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let header = Header { log_guid: [0; 16], ..state.header.clone() };
        state.put(store, header)
    }

    /// Makes pages of the BAT change on stable storage. Each entry is a sequence of its own and in the other half
    /// of the log than the one before: while an entry is written, the newest whole one is not touched, and that
    /// one's changes are in place already. The file keeps at least `used_end` bytes; more that it has now may be
    /// given back, and a file shorter than its log says would not be replayed.
    pub(super) fn commit(&self, store: &Store, pages: &[DirtyPage], used_end: u64) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Region { offset, bytes } = state.header.log;
        let half = bytes / 2;
        for pages in pages.chunks(sectors_that_fit(half)) {
            let at = if state.sequence.is_multiple_of(2) { half } else { 0 };
            let sectors: Vec<(u64, &[u8])> = pages.iter().map(|page| (page.offset, &*page.bytes)).collect();
            let entry = NewEntry {
                guid: &state.header.log_guid,
                sequence: state.sequence,
                at: at as u32,
                file_bytes: store.len_bytes()?.min(used_end),
                sectors: &sectors,
            };
            store.write_slice(offset + at, &entry.serialise())?;
            store.sync()?;
            // Only now: one that failed is repeated in the same half.
            state.sequence += 1;
            for page in pages {
                store.write_slice(page.offset, &page.bytes)?;
            }
            store.sync()?;
        }
        Ok(())
    }
}

impl State {
    /// Writes a header over the older one; a torn write leaves the other, which is still true.
    fn put(&mut self, store: &Store, header: Header) -> Result<(), BlockError> {
        let header = Header { sequence: header.sequence.wrapping_add(1), ..header };
        let index = 1 - self.index;
        let offset = HEADER_OFFSETS.get(index).copied().unwrap_or_default();
        store.write_slice(offset, &header.serialise())?;
        store.sync()?;
        (self.header, self.index) = (header, index);
        Ok(())
    }
}

/// What a log that was not emptied says is to be done: the changes, and how long the file is then.
pub(super) fn replay(store: &Store, header: &Header) -> Result<(Vec<Change>, u64), BlockError> {
    let file_bytes = store.len_bytes()?;
    let bytes = header.log.bytes;
    if bytes > REPLAY_MAX_BYTES {
        return Err(store.refused(VhdxError::LogTooLarge { bytes, max: REPLAY_MAX_BYTES }));
    }
    let log = store.read_vec(header.log.offset, bytes)?;
    let guid: &Guid = &header.log_guid;
    let Some(sequence) = active(&log, guid) else { return Ok((Vec::new(), file_bytes)) };
    let changes = sequence.changes(header.log, file_bytes).map_err(|e| store.refused(e))?;
    Ok((changes, sequence.last_bytes().max(file_bytes)))
}

/// Makes the changes of a log in the file, and empties the log.
pub(super) fn apply(
    store: &Store,
    header: &Header,
    index: usize,
    changes: &[Change],
    len_bytes: u64,
) -> Result<(Header, usize), BlockError> {
    if store.len_bytes()? < len_bytes {
        store.set_len_bytes(len_bytes)?;
    }
    for change in changes {
        match change {
            Change::Sector { offset, bytes } => store.write_slice(*offset, bytes)?,
            Change::Zero { offset, bytes } => store.write_zeroes(*offset, *bytes, true)?,
        }
    }
    store.sync()?;
    let mut state = State { header: header.clone(), index, sequence: 1 };
    state.put(store, Header { log_guid: [0; 16], ..header.clone() })?;
    Ok((state.header, state.index))
}
