//! Our compressor against another's decompressor.

use flate2::{Decompress, FlushDecompress, Status};
use image::deflate::{Deflater, adler32};

/// Longest text that is made of an input.
const TEXT_MAX_BYTES: usize = 256 << 10;

/// Compresses what the input describes: a byte for the window and the bound, then pieces.
pub fn deflate(data: &[u8]) -> bool {
    let Some((first, rest)) = data.split_first() else { return false };
    let text = text(rest);
    let window_bits = 9 + u32::from(first % 7);
    // A bound that is sure to do, and one that may not.
    let loose = text.len() + text.len() / 1000 + 32;
    let max_bytes = if first & 0x80 == 0 { loose } else { text.len() * usize::from(first >> 3 & 15) / 15 };
    let mut out = vec![0x5a];
    let done = Deflater::new(window_bits).deflate(&text, &mut out, max_bytes);
    assert_eq!(out.first(), Some(&0x5a), "what was there is gone");
    if !done {
        assert!(out.len() == 1 && max_bytes < loose, "{} bytes do not fit into {max_bytes}", text.len());
        return true;
    }
    let stream = out.get(1..).unwrap_or_default();
    assert!(stream.len() <= max_bytes);
    assert!(inflated(stream, text.len(), 15) == text, "{} bytes come back as others", text.len());
    let framed = [&[0x78, 0x9c], stream, &adler32(&text).to_be_bytes()].concat();
    let mut back = Vec::with_capacity(text.len() + 1);
    let status = Decompress::new(true).decompress_vec(&framed, &mut back, FlushDecompress::Finish);
    assert!(status.is_ok_and(|status| status == Status::StreamEnd) && back == text, "the checksum is wrong");
    true
}

/// The text: pieces of literals, of one byte repeated, of what came before, of a few symbols.
fn text(mut rest: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    while let Some(([kind, low, high], tail)) = rest.split_first_chunk::<3>() {
        let count = usize::from(u16::from_le_bytes([*low, *high]));
        let literal = tail.get(..count.min(tail.len())).unwrap_or_default();
        rest = tail;
        match kind % 4 {
            0 => {
                text.extend(literal);
                rest = tail.get(literal.len()..).unwrap_or_default();
            }
            1 => text.resize(text.len() + count, *kind),
            2 => {
                let distance = 1 + count % text.len().max(1);
                for _ in 0..usize::from(*kind) * 8 {
                    let byte = text.len().checked_sub(distance).and_then(|at| text.get(at)).copied();
                    text.push(byte.unwrap_or(*low));
                }
            }
            _ => text.extend((0..count).map(|i| (i.wrapping_mul(usize::from(*low) | 1) >> (*kind >> 5)) as u8 & kind)),
        }
        if text.len() >= TEXT_MAX_BYTES {
            break;
        }
    }
    text.truncate(TEXT_MAX_BYTES);
    text
}

/// Unpacks a raw stream that must end where the text ends.
fn inflated(stream: &[u8], bytes: usize, window_bits: u8) -> Vec<u8> {
    let mut decoder = Decompress::new_with_window_bits(false, window_bits);
    let mut out = vec![0; bytes + 1];
    let status = decoder.decompress(stream, &mut out, FlushDecompress::Finish);
    let ended = status.is_ok_and(|status| status == Status::StreamEnd);
    let (read, written) = (decoder.total_in() as usize, decoder.total_out() as usize);
    assert!(ended && read == stream.len() && written == bytes, "the stream ends at {read}, the text at {written}");
    out.truncate(bytes);
    out
}
