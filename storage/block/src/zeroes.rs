//! Zeroes: found in memory, and written as data where they must be.

use std::ops::Range;

use crate::sys::WriteBufs;

/// Piece of zeroes that is written at once.
pub(crate) const PIECE_BYTES: u64 = 256 << 10;

/// Writes zeroes as data over a range in pieces that end at multiples of `piece_bytes`, which is at least 1; stops at
/// the first error of `write`.
pub(crate) fn write_zero_data<E>(
    range: Range<u64>,
    piece_bytes: u64,
    mut write: impl FnMut(u64, &WriteBufs<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let zeroes = vec![0; piece_bytes.min(range.end.saturating_sub(range.start)) as usize];
    let mut at = range.start;
    while at < range.end {
        let bytes = (range.end - at).min(piece_bytes - at % piece_bytes);
        let piece = zeroes.get(..bytes as usize).unwrap_or_default();
        write(at, &WriteBufs::from_slice(piece))?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Whether every byte is zero. Data that is not costs a look at its first bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    // A fold over a fixed length becomes vector instructions; a search that may stop at any byte does not.
    let (chunks, tail) = rest.as_chunks::<256>();
    first.iter().chain(tail).all(|byte| *byte == 0)
        && chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Splits `bytes`, which lie at `offset`, into runs that hold data and runs of whole zero blocks. Blocks start at
/// multiples of `block_bytes` of the offset; calls `each` with the start in `bytes`, the length and whether it
/// is data, and stops at its first error.
pub(crate) fn for_each_run<E>(
    bytes: &[u8],
    offset: u64,
    block_bytes: u64,
    mut each: impl FnMut(usize, usize, bool) -> Result<(), E>,
) -> Result<(), E> {
    let block_at = |at: usize| {
        let next = block_bytes - (offset + at as u64) % block_bytes;
        at..at.saturating_add(next as usize).min(bytes.len())
    };
    let holds_data = |at: usize| !is_zero(bytes.get(block_at(at)).unwrap_or_default());
    let mut start = 0;
    while start < bytes.len() {
        let data = holds_data(start);
        let mut end = block_at(start).end;
        while end < bytes.len() && holds_data(end) == data {
            end = block_at(end).end;
        }
        each(start, end - start, data)?;
        start = end;
    }
    Ok(())
}

#[test]
fn one_byte_anywhere_is_found() {
    let mut bytes = vec![0; 1000];
    assert!(is_zero(&bytes) && is_zero(&[]));
    for at in [0, 15, 16, 271, 272, 999] {
        bytes[at] = 1;
        assert!(!is_zero(&bytes), "{at}");
        bytes[at] = 0;
    }
}

#[test]
fn zero_data_covers_its_range_in_pieces() {
    for (range, want) in [
        (10..10, vec![]),
        (5..6, vec![(5, 1)]),
        (3..35, vec![(3, 13), (16, 16), (32, 3)]),
        (3..30, vec![(3, 13), (16, 14)]),
    ] {
        let mut pieces = Vec::new();
        let done: Result<(), ()> = write_zero_data(range, 16, |at, zeroes| {
            assert!(zeroes.is_zero());
            pieces.push((at, zeroes.len()));
            Ok(())
        });
        assert_eq!((done, pieces), (Ok(()), want));
    }
}

#[test]
fn runs_follow_the_blocks_of_the_disk() {
    // Blocks of 8 at offset 4: 4 bytes, then 8 each. Byte 5 and byte 30 are set.
    let mut bytes = [0; 34];
    (bytes[5], bytes[30]) = (1, 1);
    let mut runs = Vec::new();
    let done: Result<(), ()> = for_each_run(&bytes, 4, 8, |start, len, data| {
        runs.push((start, len, data));
        Ok(())
    });
    assert_eq!((done, runs), (Ok(()), vec![(0, 4, false), (4, 8, true), (12, 16, false), (28, 6, true)]));
}
