//! Buffers of a request: pieces of guest memory or of our own, handed to `preadv` and `pwritev` as they are.
//! A guest may change its memory while we look, so no Rust reference to it is ever made: bytes move by
//! system calls and by vm-memory's volatile copies.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use smallvec::SmallVec;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// `IOV_MAX` of Linux: vectors that one call takes.
pub(super) const IOV_MAX: usize = 1024;

/// Pieces up to this many need no heap.
pub(super) type Pieces = SmallVec<[libc::iovec; 16]>;

pub(super) fn total(pieces: &[libc::iovec]) -> usize {
    pieces.iter().map(|piece| piece.iov_len).sum()
}

/// The part of `pieces` from `start`, at most `len` bytes: never more than there is.
fn cut(pieces: &[libc::iovec], start: usize, len: usize) -> Pieces {
    let (mut skip, mut left) = (start, len);
    let mut out = Pieces::new();
    for piece in pieces {
        if left == 0 {
            break;
        }
        if skip >= piece.iov_len {
            skip -= piece.iov_len;
            continue;
        }
        let take = (piece.iov_len - skip).min(left);
        // `wrapping_add` stays inside the piece, because skip < iov_len.
        let base = piece.iov_base.cast::<u8>().wrapping_add(skip).cast();
        out.push(libc::iovec { iov_base: base, iov_len: take });
        skip = 0;
        left -= take;
    }
    out
}

fn volatile(piece: &libc::iovec) -> VolatileSlice<'_> {
    // SAFETY: every piece was made from a live buffer of at least this length by the constructors below, and
    // the lifetime of ReadBufs or WriteBufs, which own the piece, keeps that buffer borrowed.
    unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
}

/// Memory that a read fills. Borrowed from its owner for `'a`; tied to the thread that made it.
pub struct ReadBufs<'a> {
    pieces: Pieces,
    len: usize,
    owner: PhantomData<&'a mut [u8]>,
}

impl<'a> ReadBufs<'a> {
    /// Guest memory. The caller marks it dirty in its bitmap: see `Disk::read_at`.
    pub fn from_guest<B: BitmapSlice>(slices: &[VolatileSlice<'a, B>]) -> ReadBufs<'a> {
        let piece = |slice: &VolatileSlice<'a, B>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        let pieces: Pieces = slices.iter().map(piece).collect();
        ReadBufs { len: total(&pieces), pieces, owner: PhantomData }
    }

    /// Our own memory.
    pub fn from_slice(slice: &'a mut [u8]) -> ReadBufs<'a> {
        let piece = libc::iovec { iov_base: slice.as_mut_ptr().cast(), iov_len: slice.len() };
        ReadBufs { pieces: Pieces::from_slice(&[piece]), len: slice.len(), owner: PhantomData }
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to fill.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `start`, or what there is of them.
    pub fn range(&self, start: usize, len: usize) -> ReadBufs<'_> {
        let pieces = cut(&self.pieces, start, len);
        ReadBufs { len: total(&pieces), pieces, owner: PhantomData }
    }

    /// Copies `bytes` to the start, as many as fit.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        for piece in &self.pieces {
            let (now, rest) = bytes.split_at(bytes.len().min(piece.iov_len));
            volatile(piece).copy_from(now);
            bytes = rest;
        }
    }

    /// Fills everything with zeroes.
    pub fn fill_zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for piece in &self.pieces {
            let mut at = 0;
            while let Ok(rest) = volatile(piece).offset(at) {
                if rest.is_empty() {
                    break;
                }
                let now = rest.len().min(ZEROES.len());
                rest.copy_from(&ZEROES[..now]);
                at += now;
            }
        }
    }

    /// Whether every piece starts and ends on a multiple of `align`.
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        aligned(&self.pieces, align)
    }
}

/// Memory that a write takes its bytes from. Borrowed from its owner for `'a`; tied to the thread that made it.
pub struct WriteBufs<'a> {
    pieces: Pieces,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> WriteBufs<'a> {
    /// Guest memory.
    pub fn from_guest<B: BitmapSlice>(slices: &[VolatileSlice<'a, B>]) -> WriteBufs<'a> {
        let piece = |slice: &VolatileSlice<'a, B>| libc::iovec {
            iov_base: slice.ptr_guard().as_ptr().cast_mut().cast(),
            iov_len: slice.len(),
        };
        let pieces: Pieces = slices.iter().map(piece).collect();
        WriteBufs { len: total(&pieces), pieces, owner: PhantomData }
    }

    /// Our own memory.
    pub fn from_slice(slice: &'a [u8]) -> WriteBufs<'a> {
        // The pointer is only ever read through: a WriteBufs has no method that writes.
        let piece = libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        WriteBufs { pieces: Pieces::from_slice(&[piece]), len: slice.len(), owner: PhantomData }
    }

    /// One buffer after the other, as a single request.
    pub fn concat(parts: &[&WriteBufs<'a>]) -> WriteBufs<'a> {
        let mut pieces = Pieces::new();
        for part in parts {
            pieces.extend(part.pieces.iter().copied().filter(|piece| piece.iov_len > 0));
        }
        WriteBufs { len: total(&pieces), pieces, owner: PhantomData }
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `start`, or what there is of them.
    pub fn range(&self, start: usize, len: usize) -> WriteBufs<'_> {
        let pieces = cut(&self.pieces, start, len);
        WriteBufs { len: total(&pieces), pieces, owner: PhantomData }
    }

    /// Copies from the start into `out`, as much as fits; returns how much that was.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut at = 0;
        for piece in &self.pieces {
            let end = (at + piece.iov_len).min(out.len());
            at += volatile(piece).copy_to(&mut out[at..end]);
        }
        at
    }

    /// Whether all bytes are zero at the moment. A guest may change them right after.
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0u8; 4096];
        let mut at = 0;
        while at < self.len {
            let got = self.range(at, chunk.len()).copy_to(&mut chunk);
            if got == 0 || chunk[..got].iter().any(|byte| *byte != 0) {
                return false;
            }
            at += got;
        }
        true
    }

    /// Whether every piece starts and ends on a multiple of `align`.
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        aligned(&self.pieces, align)
    }
}

pub(super) fn aligned(pieces: &[libc::iovec], align: usize) -> bool {
    pieces.iter().all(|piece| (piece.iov_base as usize | piece.iov_len).is_multiple_of(align))
}

fn io_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// `preadv` until everything is filled or the file ends; returns the bytes that were read.
pub(crate) fn pread(file: &File, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<usize> {
    let mut done = 0;
    while done < bufs.len {
        let rest;
        let pieces = if done == 0 {
            &bufs.pieces
        } else {
            rest = cut(&bufs.pieces, done, bufs.len);
            &rest
        };
        let count = pieces.len().min(IOV_MAX) as libc::c_int;
        let at = io_offset(offset.saturating_add(done as u64))?;
        // SAFETY: the pieces point to live memory that may be written (see `volatile`), `count` is at most
        // their number, and the descriptor is borrowed.
        let got = unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, at) };
        match usize::try_from(got) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(_) => retry_interrupted()?,
        }
    }
    Ok(done)
}

/// `pwritev` until everything is written.
pub(crate) fn pwrite(file: &File, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < bufs.len {
        let rest;
        let pieces = if done == 0 {
            &bufs.pieces
        } else {
            rest = cut(&bufs.pieces, done, bufs.len);
            &rest
        };
        let count = pieces.len().min(IOV_MAX) as libc::c_int;
        let at = io_offset(offset.saturating_add(done as u64))?;
        // SAFETY: the pieces point to live memory (see `volatile`), `count` is at most their number, and the
        // descriptor is borrowed.
        let put = unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), count, at) };
        match usize::try_from(put) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(put) => done += put,
            Err(_) => retry_interrupted()?,
        }
    }
    Ok(())
}

fn retry_interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

#[test]
fn ranges_cross_pieces_and_stop_at_the_end() {
    let mut memory = *b"abcdefghij";
    {
        let (left, right) = memory.split_at_mut(4);
        let slices = [VolatileSlice::from(left), VolatileSlice::from(right)];
        let write = WriteBufs::from_guest(&slices);
        for (start, len, want) in
            [(0, 10, "abcdefghij"), (2, 4, "cdef"), (4, 2, "ef"), (8, 99, "ij"), (10, 1, ""), (99, 1, "")]
        {
            let mut out = [0; 10];
            let got = write.range(start, len).copy_to(&mut out);
            assert_eq!(&out[..got], want.as_bytes(), "{start} {len}");
        }
        assert!(!write.is_zero());
        let read = ReadBufs::from_guest(&slices);
        read.range(3, 2).copy_from(b"XY");
        read.range(5, 5).fill_zero();
        assert!(write.range(5, 5).is_zero());
    }
    assert_eq!(&memory, b"abcXY\0\0\0\0\0");
}
