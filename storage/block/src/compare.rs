//! Comparing what two disks hold.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::copy::CHUNK_BYTES;
use crate::crew::Crew;
use crate::disk::Disk;
use crate::error::BlockError;
use crate::node::ExtentKind;
use crate::page_buf::PageBuf;
use crate::runs::Runs;
use crate::zeroes::is_zero;

/// Differences are told by the sector they are in.
const SECTOR_BYTES: usize = 512;

struct Shared<'a> {
    disks: [&'a Disk; 2],
    size_bytes: u64,
    /// Where the next piece starts, and what is known of both disks there.
    next: Mutex<(u64, [Runs; 2])>,
    /// The lowest difference so far; `u64::MAX` when there is none.
    differs: AtomicU64,
    stop: AtomicBool,
    error: Mutex<Option<BlockError>>,
    crew: Crew,
    progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// Where the first sector is that two disks do not share, as a byte offset; `None` when they hold the same. Past
/// the end of the shorter disk the longer one must hold zeroes. `workers` threads, 1 to 16, share the work.
/// `progress` is told bytes done and bytes in all, from any thread.
pub fn compare(
    first: &Disk,
    second: &Disk,
    workers: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Option<u64>, BlockError> {
    let size_bytes = first.size_bytes().max(second.size_bytes());
    let shared = Shared {
        disks: [first, second],
        size_bytes,
        next: Mutex::new((0, <[Runs; 2]>::default())),
        differs: AtomicU64::new(u64::MAX),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        crew: Crew::new(workers, first.is_remote() || second.is_remote()),
        progress,
    };
    shared.crew.run(&|| shared.work());
    let differs = shared.differs.into_inner();
    match shared.error.into_inner() {
        // A difference before what could not be read is an answer all the same, but which is first is not known.
        Some(error) => Err(error),
        None => Ok(Some(differs).filter(|at| *at != u64::MAX)),
    }
}

/// What one disk holds in a piece.
struct Piece {
    bytes: u64,
    data: bool,
}

fn piece(runs: &mut Runs, disk: &Disk, offset: u64, max: u64) -> Result<Piece, BlockError> {
    let inside = disk.size_bytes().saturating_sub(offset).min(max);
    if inside == 0 {
        return Ok(Piece { bytes: max, data: false });
    }
    let extent = runs.at(disk, offset, inside)?.extent;
    Ok(Piece { bytes: extent.bytes, data: extent.kind == ExtentKind::Data })
}

impl Shared<'_> {
    fn work(&self) {
        let mut room = [PageBuf::default(), PageBuf::default()];
        while !self.stop.load(Ordering::Relaxed) {
            let result = match self.take() {
                Ok(Some((offset, bytes, data))) => self.crew.step(|| self.compare(offset, bytes, data, &mut room)),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.error.lock().get_or_insert(error);
                self.stop.store(true, Ordering::Relaxed);
            }
        }
    }

    /// The next piece that may differ, and which of the disks hold data there. A difference that was found ends
    /// the search: pieces are taken in order, so those before it are with other threads already.
    fn take(&self) -> Result<Option<(u64, u64, [bool; 2])>, BlockError> {
        let mut next = self.next.lock();
        let (next, runs) = &mut *next;
        while *next < self.size_bytes && self.differs.load(Ordering::Relaxed) == u64::MAX {
            let offset = *next;
            let left = self.size_bytes - offset;
            let first = piece(&mut runs[0], self.disks[0], offset, left)?;
            let second = piece(&mut runs[1], self.disks[1], offset, first.bytes)?;
            let mut bytes = second.bytes.min(left);
            let data = [first.data, second.data];
            if data != [false; 2] {
                bytes = bytes.min(CHUNK_BYTES - offset % CHUNK_BYTES);
            }
            *next = offset + bytes;
            (self.progress)(offset + bytes, self.size_bytes);
            if data != [false; 2] {
                return Ok(Some((offset, bytes, data)));
            }
        }
        Ok(None)
    }

    fn compare(&self, offset: u64, bytes: u64, data: [bool; 2], room: &mut [PageBuf; 2]) -> Result<(), BlockError> {
        let bytes = bytes as usize;
        for ((disk, data), room) in self.disks.iter().zip(data).zip(room.iter_mut()) {
            room.set_len(bytes.max(CHUNK_BYTES as usize));
            if data {
                disk.read(offset, room.get_mut(..bytes).unwrap_or_default())?;
            }
        }
        let [first, second] = room.each_ref().map(|room| room.get(..bytes).unwrap_or_default());
        let at = match data {
            [true, true] if first == second => None,
            [true, true] => {
                let sectors = first.chunks(SECTOR_BYTES).zip(second.chunks(SECTOR_BYTES));
                sectors.enumerate().find(|(_, (a, b))| a != b).map(|(index, _)| index)
            }
            [true, false] => first.chunks(SECTOR_BYTES).position(|sector| !is_zero(sector)),
            _ => second.chunks(SECTOR_BYTES).position(|sector| !is_zero(sector)),
        };
        if let Some(index) = at {
            self.differs.fetch_min(offset + (index * SECTOR_BYTES) as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}
