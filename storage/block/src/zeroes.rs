//! Finding zeroes in memory.

/// Whether every byte is zero. Data that is not costs a look at its first bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    first.iter().all(|byte| *byte == 0)
        // A fold over a fixed length becomes vector instructions; a search that may stop at any byte does not.
        && rest.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
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
