//! Guest data in an encrypted file: through buffers of our own, in large runs of sectors.

use std::io;
use std::ops::Range;

use image::luks::{SECTOR_BYTES, SectorCipher};
use parking_lot::{Mutex, RwLock};

use crate::io::FileBackend;
use crate::page_buf::PageBuf;
use crate::sys::{ReadBufs, WriteBufs};

/// Bytes that go through the cipher and one system call together: they stay in the processor's cache in between.
const PIECE_BYTES: u64 = 256 << 10;
/// Buffers kept for the next request.
const BUFFERS_MAX: usize = 16;

/// The cipher of a layer, with what its requests share.
pub(crate) struct Sealed {
    cipher: SectorCipher,
    /// Held for writing while a request that begins or ends inside a sector reads and writes that sector.
    ragged: RwLock<()>,
    buffers: Mutex<Vec<PageBuf>>,
}

/// A part of a request, widened to whole sectors.
struct Piece {
    /// Where its sectors are in the file.
    place: u64,
    /// The number of the first.
    sector: u64,
    /// Bytes of all its sectors.
    bytes: usize,
    /// Which of them the request is about.
    part: Range<usize>,
    /// Where those start in the request.
    start: usize,
}

impl Sealed {
    pub(crate) fn new(cipher: SectorCipher) -> Sealed {
        Sealed { cipher, ragged: RwLock::new(()), buffers: Mutex::default() }
    }

    /// Fills `bufs` from `place` in the file. `numbered` is the byte offset that gives sectors their numbers; both are
    /// at the same place in a sector.
    pub(crate) fn read(
        &self,
        file: &dyn FileBackend,
        place: u64,
        numbered: u64,
        bufs: &ReadBufs<'_>,
    ) -> io::Result<()> {
        self.with_buffer(|buffer| {
            each_piece(place, numbered, bufs.len(), |piece| {
                buffer.set_len(piece.bytes);
                file.read_at(piece.place, &ReadBufs::from_slice(buffer))?;
                self.cipher.decrypt(piece.sector, buffer);
                bufs.range(piece.start, piece.part.len()).copy_from(buffer.get(piece.part).unwrap_or_default());
                Ok(())
            })
        })
    }

    /// Writes `bufs` to `place` in the file, numbered as in [`Sealed::read`].
    pub(crate) fn write(
        &self,
        file: &dyn FileBackend,
        place: u64,
        numbered: u64,
        bufs: &WriteBufs<'_>,
    ) -> io::Result<()> {
        let whole = place.is_multiple_of(SECTOR_BYTES) && (bufs.len() as u64).is_multiple_of(SECTOR_BYTES);
        // Whoever fills a part of a sector writes back the rest as it read it.
        let _shared = whole.then(|| self.ragged.read());
        let _alone = (!whole).then(|| self.ragged.write());
        self.with_buffer(|buffer| {
            each_piece(place, numbered, bufs.len(), |piece| {
                buffer.set_len(piece.bytes);
                if piece.part != (0..piece.bytes) {
                    self.read_ends(file, &piece, buffer)?;
                }
                let part = buffer.get_mut(piece.part.clone()).unwrap_or_default();
                bufs.range(piece.start, part.len()).copy_to(part);
                self.cipher.encrypt(piece.sector, buffer);
                file.write_at(piece.place, &WriteBufs::from_slice(buffer))
            })
        })
    }

    /// Reads the sectors that a piece covers a part of, the first and the last.
    fn read_ends(&self, file: &dyn FileBackend, piece: &Piece, buffer: &mut PageBuf) -> io::Result<()> {
        let sector_bytes = SECTOR_BYTES as usize;
        let last = piece.bytes.saturating_sub(sector_bytes);
        for (at, is_whole) in [(0, piece.part.start == 0), (last, piece.part.end == piece.bytes)] {
            let Some(sector) = buffer.get_mut(at..at + sector_bytes).filter(|_| !is_whole) else { continue };
            file.read_at(piece.place + at as u64, &ReadBufs::from_slice(sector))?;
            self.cipher.decrypt(piece.sector + at as u64 / SECTOR_BYTES, sector);
        }
        Ok(())
    }

    fn with_buffer<T>(&self, work: impl FnOnce(&mut PageBuf) -> T) -> T {
        let kept = self.buffers.lock().pop();
        let mut buffer = kept.unwrap_or_default();
        let done = work(&mut buffer);
        let mut kept = self.buffers.lock();
        if kept.len() < BUFFERS_MAX {
            kept.push(buffer);
        }
        done
    }
}

/// Calls `step` with each piece of a range in turn.
fn each_piece(place: u64, numbered: u64, len: usize, mut step: impl FnMut(Piece) -> io::Result<()>) -> io::Result<()> {
    let end = place.checked_add(len as u64).ok_or(io::ErrorKind::InvalidInput)?;
    let mut at = place;
    while at < end {
        let first = at - at % SECTOR_BYTES;
        let stop = end.min(first + PIECE_BYTES);
        let piece = Piece {
            place: first,
            sector: (numbered + (at - place)) / SECTOR_BYTES,
            bytes: (stop - first).next_multiple_of(SECTOR_BYTES) as usize,
            part: (at - first) as usize..(stop - first) as usize,
            start: (at - place) as usize,
        };
        step(piece)?;
        at = stop;
    }
    Ok(())
}

#[test]
fn pieces_cover_a_range_in_whole_sectors() {
    let mut pieces = Vec::new();
    each_piece(1000, 488, 2 * PIECE_BYTES as usize, |piece| {
        pieces.push((piece.place, piece.sector, piece.bytes, piece.part, piece.start));
        Ok(())
    })
    .unwrap();
    let piece = PIECE_BYTES as usize;
    assert_eq!(
        pieces,
        [
            (512, 0, piece, 488..piece, 0),
            (512 + PIECE_BYTES, 512, piece, 0..piece, piece - 488),
            (512 + 2 * PIECE_BYTES, 1024, 512, 0..488, 2 * piece - 488),
        ]
    );
    each_piece(7, 7, 0, |_| panic!("nothing to do")).unwrap();
    assert!(each_piece(u64::MAX, 0, 2, |_| Ok(())).is_err());
}
