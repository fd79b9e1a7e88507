//! The compressed kernel inside a bzImage, unpacked on the host.

use std::io::Read;

use super::BootError;

/// A guest kernel is not larger than this when unpacked.
const MAX_UNPACKED_BYTES: u64 = 512 << 20;
/// Blocks of a legacy LZ4 stream unpack to at most this. LZ4 frame format, "Legacy frame".
const LZ4_BLOCK_BYTES: usize = 8 << 20;

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const ELF: &[u8] = b"\x7fELF";

/// Unpacks `payload`, whose compression its first bytes tell. Bytes behind the stream (the kernel's size trailer) are
/// ignored.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, BootError> {
    if payload.starts_with(ELF) {
        return Ok(payload.to_vec());
    }
    if payload.starts_with(LZ4_LEGACY) {
        return unpack_lz4(payload);
    }
    if payload.starts_with(GZIP) {
        return read_all("gzip", flate2::read::GzDecoder::new(payload));
    }
    if payload.starts_with(ZSTD) {
        let decoder = zstd::stream::read::Decoder::with_buffer(payload).map_err(|e| unreadable("zstd", e))?;
        return read_all("zstd", decoder.single_frame());
    }
    if payload.starts_with(XZ) {
        return read_all("xz", lzma_rust2::XzReader::new(payload, false));
    }
    Err(BootError::Compression { magic: payload.iter().copied().take(4).collect() })
}

fn unreadable(method: &'static str, source: std::io::Error) -> BootError {
    BootError::Unpack { method, source }
}

fn read_all(method: &'static str, reader: impl Read) -> Result<Vec<u8>, BootError> {
    let mut out = Vec::new();
    let mut reader = reader.take(MAX_UNPACKED_BYTES + 1);
    reader.read_to_end(&mut out).map_err(|e| unreadable(method, e))?;
    if out.len() as u64 > MAX_UNPACKED_BYTES {
        return Err(BootError::TooLarge { max_bytes: MAX_UNPACKED_BYTES });
    }
    Ok(out)
}

fn unpack_lz4(payload: &[u8]) -> Result<Vec<u8>, BootError> {
    let mut out = Vec::new();
    let mut rest = payload.get(LZ4_LEGACY.len()..).unwrap_or(&[]);
    let mut block = vec![0; LZ4_BLOCK_BYTES];
    // The stream ends where no block fits any more: the kernel appends its unpacked size, which reads as a length.
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some((packed, next)) = after.split_at_checked(length).filter(|_| length != 0) else { break };
        let bytes = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|e| unreadable("lz4", std::io::Error::other(e)))?;
        out.extend_from_slice(block.get(..bytes).unwrap_or(&[]));
        if out.len() as u64 > MAX_UNPACKED_BYTES {
            return Err(BootError::TooLarge { max_bytes: MAX_UNPACKED_BYTES });
        }
        rest = next;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn text() -> Vec<u8> {
        (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect()
    }

    #[test]
    fn every_compression_unpacks_with_a_size_trailer_behind_it() {
        let text = text();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut lz4 = LZ4_LEGACY.to_vec();
        let block = lz4_flex::block::compress(&text);
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(block);
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&text).unwrap();
        let streams = [
            ("gzip", gzip.finish().unwrap()),
            ("zstd", zstd::encode_all(&text[..], 1).unwrap()),
            ("lz4", lz4),
            ("xz", xz.finish().unwrap()),
        ];
        for (name, mut stream) in streams {
            stream.extend((text.len() as u32).to_le_bytes());
            assert!(unpack(&stream).unwrap() == text, "{name}");
            stream.truncate(stream.len() / 2);
            if name != "lz4" {
                assert!(matches!(unpack(&stream), Err(BootError::Unpack { .. })), "{name} cut short");
            }
        }
    }

    #[test]
    fn an_unknown_compression_is_named() {
        assert!(matches!(unpack(b"BZh9..."), Err(BootError::Compression { magic }) if magic == b"BZh9"));
        assert!(matches!(unpack(b""), Err(BootError::Compression { .. })));
    }
}
