//! Compressed clusters. The descriptor counts whole sectors, so the decoder sees trailing bytes of whatever
//! follows; the output is always exactly one cluster, which bounds what a hostile stream can produce.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use thiserror::Error;
use zstd::zstd_safe;

use crate::deflate::Deflater;

/// How clusters of an image are compressed. Header byte 104.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, RFC 1951.
    Zlib,
    /// Zstandard frames, RFC 8878.
    Zstd,
}

/// A compressed cluster does not unpack to one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecompressError {
    /// The stream is malformed.
    #[error("the {0:?} stream is malformed")]
    Malformed(CompressionType),
    /// The stream ends before the cluster is full.
    #[error("the {compression:?} stream ends after {got_bytes} bytes of the cluster's {want_bytes}")]
    Short {
        /// How the stream is compressed.
        compression: CompressionType,
        /// What came out.
        got_bytes: usize,
        /// The cluster size.
        want_bytes: usize,
    },
}

/// Unpacks one cluster into `out`, which must be a cluster long. `input` may carry trailing bytes.
/// On an error the contents of `out` are unspecified.
pub fn decompress(compression: CompressionType, input: &[u8], out: &mut [u8]) -> Result<(), DecompressError> {
    let got_bytes = match compression {
        CompressionType::Zlib => inflate(input, out)?,
        CompressionType::Zstd => unzstd(input, out)?,
    };
    if got_bytes == out.len() {
        return Ok(());
    }
    Err(DecompressError::Short { compression, got_bytes, want_bytes: out.len() })
}

thread_local! {
    /// What unpacking needs, allocated once a thread: making it anew costs as much as a cluster.
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
}

fn inflate(input: &[u8], out: &mut [u8]) -> Result<usize, DecompressError> {
    INFLATE.with_borrow_mut(|stream| inflate_with(stream, input, out))
}

fn inflate_with(stream: &mut Decompress, input: &[u8], out: &mut [u8]) -> Result<usize, DecompressError> {
    stream.reset(false);
    match stream.decompress(input, out, FlushDecompress::Finish) {
        // Output full with input left over is how trailing sectors look to the decoder.
        Ok(Status::StreamEnd | Status::Ok | Status::BufError) => Ok(stream.total_out() as usize),
        Err(_) => Err(DecompressError::Malformed(CompressionType::Zlib)),
    }
}

/// One call per frame into the output itself: no window is allocated, whatever the frame header asks for.
fn unzstd(mut input: &[u8], out: &mut [u8]) -> Result<usize, DecompressError> {
    let malformed = DecompressError::Malformed(CompressionType::Zstd);
    let mut filled = 0;
    while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let frame_bytes = zstd_safe::find_frame_compressed_size(input).map_err(|_| malformed)?;
        let frame = input.get(..frame_bytes).filter(|frame| !frame.is_empty()).ok_or(malformed)?;
        filled += UNZSTD.with_borrow_mut(|context| context.decompress(rest, frame)).map_err(|_| malformed)?;
        input = input.get(frame_bytes..).unwrap_or_default();
        if input.is_empty() {
            break;
        }
    }
    Ok(filled)
}

/// log2 of the window of zlib streams: QEMU's decoder looks back 4 KiB, no further.
const ZLIB_WINDOW_BITS: u32 = 12;

/// log2 of the positions that zstd's table of long matches holds.
const ZSTD_HASH_BITS: u32 = 15;

/// Packs clusters one after the other; what it needs is allocated once.
pub struct Compressor(Packer);

enum Packer {
    Zlib(Box<Deflater>),
    Zstd(zstd_safe::CCtx<'static>),
}

impl Compressor {
    /// A compressor with the levels that QEMU uses.
    pub fn new(compression: CompressionType) -> Compressor {
        Compressor(match compression {
            CompressionType::Zlib => Packer::Zlib(Box::new(Deflater::new(ZLIB_WINDOW_BITS))),
            CompressionType::Zstd => {
                let mut context = zstd_safe::CCtx::create();
                // Half of what the level takes for inputs as short as clusters: 128 KiB less for each thread, and an
                // output that is 0.02 % longer. A table that stays as it was is no harm.
                let _ = context.set_parameter(zstd_safe::CParameter::HashLog(ZSTD_HASH_BITS));
                Packer::Zstd(context)
            }
        })
    }

    /// Packs one cluster into `out`, whose contents are replaced. False when it would not become shorter.
    pub fn compress(&mut self, plain: &[u8], out: &mut Vec<u8>) -> bool {
        // The result must be shorter than the cluster, so no more room is needed.
        let max_bytes = plain.len().saturating_sub(1);
        let context = match &mut self.0 {
            Packer::Zlib(deflater) => {
                out.clear();
                // At once: a vector that grows leaves what it was behind it. A block may be a little longer than that.
                out.reserve(plain.len() + plain.len() / 8);
                return deflater.deflate(plain, out, max_bytes);
            }
            Packer::Zstd(context) => context,
        };
        out.resize(max_bytes, 0);
        let packed_bytes = context.compress2(out.as_mut_slice(), plain).ok();
        out.truncate(packed_bytes.unwrap_or(0));
        packed_bytes.is_some()
    }
}

#[cfg(test)]
fn packed(compression: CompressionType, plain: &[u8]) -> Vec<u8> {
    match compression {
        CompressionType::Zlib => {
            let mut out = Vec::with_capacity(plain.len() + 1024);
            let mut stream = flate2::Compress::new(flate2::Compression::default(), false);
            stream.compress_vec(plain, &mut out, flate2::FlushCompress::Finish).unwrap();
            out
        }
        CompressionType::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
    }
}

#[test]
fn one_cluster_comes_out_whatever_follows_it() {
    let plain: Vec<u8> = (0..4096u32).map(|i| (i / 7) as u8).collect();
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        let mut stream = packed(compression, &plain);
        let exact_bytes = stream.len();
        stream.extend([0xa5; 511]);
        let mut out = vec![0; 4096];
        assert_eq!(decompress(compression, &stream, &mut out), Ok(()));
        assert_eq!(out, plain);
        // A cluster twice as long is short by half; one byte less of the stream is short or malformed.
        let short = DecompressError::Short { compression, got_bytes: 4096, want_bytes: 8192 };
        assert_eq!(decompress(compression, &stream[..exact_bytes], &mut [0; 8192]), Err(short));
        assert!(decompress(compression, &stream[..exact_bytes / 2], &mut out).is_err());
    }
}

#[test]
fn zstd_takes_several_frames_and_refuses_a_bomb() {
    let mut stream = packed(CompressionType::Zstd, &[1; 256]);
    stream.extend(packed(CompressionType::Zstd, &[2; 256]));
    let mut out = [0; 512];
    decompress(CompressionType::Zstd, &stream, &mut out).unwrap();
    assert_eq!((out[255], out[256]), (1, 2));
    let bomb = packed(CompressionType::Zstd, &vec![0; 1 << 20]);
    assert_eq!(
        decompress(CompressionType::Zstd, &bomb, &mut out),
        Err(DecompressError::Malformed(CompressionType::Zstd))
    );
}

#[test]
fn what_is_packed_comes_out_again() {
    let texts: Vec<u8> = (0..65536u32).map(|i| (i.wrapping_mul(i) >> 11) as u8).collect();
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        let mut compressor = Compressor::new(compression);
        let mut out = Vec::new();
        for plain in [&texts[..], &[0; 65536], &texts[100..612], &texts[..]] {
            assert!(compressor.compress(plain, &mut out), "{compression:?}");
            assert!(out.len() < plain.len());
            let mut back = vec![0; plain.len()];
            decompress(compression, &out, &mut back).unwrap();
            assert!(back == plain);
        }
        // A cluster that fails leaves nothing behind for those after it.
        for bytes in [512usize, 4096, 65536] {
            let mut seed = 7u64;
            let mut number = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed
            };
            let mut compressor = Compressor::new(compression);
            for round in 0..200u64 {
                let noisy = number() % 3 == 0;
                let plain: Vec<u8> = match noisy {
                    true => (0..bytes).map(|_| number() as u8).collect(),
                    false => (0..bytes as u64).map(|i| (i / 50 + round) as u8 | 1).collect(),
                };
                if !compressor.compress(&plain, &mut out) {
                    assert!(noisy, "{compression:?} {bytes} round {round}");
                    continue;
                }
                let mut back = vec![0; bytes];
                decompress(compression, &out, &mut back).unwrap();
                assert!(back == plain, "{compression:?} {bytes} round {round}");
            }
        }
        // xorshift: nothing to gain.
        let mut seed = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        })
        .take(4096)
        .collect();
        assert!(!compressor.compress(&noise, &mut out), "{compression:?}");
    }
}

#[test]
fn zlib_streams_never_look_back_further_than_qemu_can() {
    // The same 1000 bytes twice, 5000 bytes apart: only a window above 12 bits would find them.
    let mut plain = vec![0u8; 65536];
    for (i, byte) in plain.iter_mut().enumerate() {
        *byte = ((i * 7919) ^ (i >> 3)) as u8;
    }
    plain.copy_within(0..1000, 6000);
    let mut out = Vec::new();
    assert!(Compressor::new(CompressionType::Zlib).compress(&plain, &mut out));
    let mut back = vec![0; plain.len()];
    let mut small_window = Decompress::new_with_window_bits(false, ZLIB_WINDOW_BITS as u8);
    // In pieces, so that the decoder has only its window to look back into.
    let mut piece = [0; 512];
    let mut done = 0;
    while done < back.len() {
        let input = &out[small_window.total_in() as usize..];
        let before = small_window.total_out() as usize;
        small_window.decompress(input, &mut piece, FlushDecompress::None).unwrap();
        let got = small_window.total_out() as usize - before;
        assert!(got > 0);
        back[done..done + got].copy_from_slice(&piece[..got]);
        done += got;
    }
    assert!(back == plain);
}
