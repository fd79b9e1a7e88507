//! The pieces of a `streamOptimized` file: markers, compressed grains, footer. "Virtual Disk Format 5.0",
//! "Stream-Optimized Compressed Sparse Extents".

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};

use crate::deflate::Deflater;

use super::{HEADER_BYTES, SECTOR_BYTES, SparseHeader, VmdkError};
use crate::bytes::{le32, le64, put};

/// Bytes in front of a compressed grain: its first sector on the disk (u64), the bytes that follow (u32).
pub const GRAIN_MARKER_BYTES: usize = 12;
/// The end of a stream: footer marker, footer, end-of-stream marker.
pub const FOOTER_AREA_BYTES: u64 = 3 * SECTOR_BYTES;

/// What a marker sector announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// The end of the stream.
    EndOfStream,
    /// A grain table follows.
    GrainTable,
    /// The grain directory follows.
    GrainDirectory,
    /// The footer follows.
    Footer,
}

impl Marker {
    /// The marker's sector, for what takes `sectors` after it.
    pub fn sector(self, sectors: u64) -> Vec<u8> {
        let mut out = vec![0; SECTOR_BYTES as usize];
        put(&mut out, 0, &sectors.to_le_bytes());
        put(&mut out, 12, &(self as u32).to_le_bytes());
        out
    }
}

/// The 12 bytes in front of a grain's deflate stream.
pub fn grain_header(guest_sector: u64, compressed_bytes: u32) -> [u8; GRAIN_MARKER_BYTES] {
    let mut out = [0; GRAIN_MARKER_BYTES];
    put(&mut out, 0, &guest_sector.to_le_bytes());
    put(&mut out, 8, &compressed_bytes.to_le_bytes());
    out
}

/// Bytes of the deflate stream behind the grain marker `marker`. At most twice the grain size, QEMU's limit.
pub fn compressed_span(marker: &[u8], header: &SparseHeader, guest_sector: u64) -> Result<usize, VmdkError> {
    let max = header.grain_bytes() * 2 - GRAIN_MARKER_BYTES as u64;
    let bytes = u64::from(le32(marker, 8).ok_or(VmdkError::Truncated { have_bytes: marker.len() })?);
    if bytes == 0 || bytes > max {
        return Err(VmdkError::CompressedSize { guest_sector, bytes, max });
    }
    Ok(bytes as usize)
}

/// Unpacks a grain (RFC 1950) into `out`, which is a grain long. The last grain of a disk may be short, what it
/// lacks is zeroes; a stream that holds more than a grain is refused, which bounds what a hostile one produces.
pub fn inflate_grain(stream: &[u8], out: &mut [u8], guest_sector: u64) -> Result<(), VmdkError> {
    let unpacked = INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(true);
        match inflate.decompress(stream, out, FlushDecompress::Finish) {
            Ok(Status::StreamEnd) => Ok(inflate.total_out() as usize),
            _ => Err(VmdkError::Inflate { guest_sector }),
        }
    })?;
    if let Some(rest) = out.get_mut(unpacked..) {
        rest.fill(0);
    }
    Ok(())
}

thread_local! {
    /// What packing needs, allocated once a thread.
    static DEFLATER: RefCell<Deflater> = RefCell::new(Deflater::new(15));
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(true));
}

/// Packs a grain (RFC 1950) into `out`, replacing what it holds.
pub fn deflate_grain(grain: &[u8], out: &mut Vec<u8>) {
    out.clear();
    // A window of 32 KiB, the default level; the pair is a multiple of 31.
    out.extend([0x78, 0x9c]);
    DEFLATER.with_borrow_mut(|deflater| deflater.deflate(grain, out, usize::MAX));
    out.extend(crate::deflate::adler32(grain).to_be_bytes());
}

/// A grain table with its marker.
pub fn pack_table(entries: &[u32]) -> Vec<u8> {
    pack_entries(Marker::GrainTable, entries)
}

fn pack_entries(marker: Marker, entries: &[u32]) -> Vec<u8> {
    let bytes = (entries.len() * 4).next_multiple_of(SECTOR_BYTES as usize);
    let mut out = marker.sector(bytes as u64 / SECTOR_BYTES);
    out.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
    out.resize(SECTOR_BYTES as usize + bytes, 0);
    out
}

/// What ends a stream at `sector`: directory, footer, end. `header` is the one at the start of the file.
pub fn stream_end(header: &SparseHeader, directory: &[u32], sector: u64) -> Vec<u8> {
    let mut out = pack_entries(Marker::GrainDirectory, directory);
    out.extend(Marker::Footer.sector(1));
    out.extend(SparseHeader { gd_sector: sector + 1, ..header.clone() }.serialise());
    out.extend(Marker::EndOfStream.sector(0));
    out
}

/// The header from the last [`FOOTER_AREA_BYTES`] of a stream.
pub fn parse_footer(area: &[u8], file_bytes: u64) -> Result<SparseHeader, VmdkError> {
    let damaged = |what| VmdkError::Footer { what };
    let sector = |i: usize| area.get(i * HEADER_BYTES..(i + 1) * HEADER_BYTES);
    let (Some(marker), Some(footer), Some(end)) = (sector(0), sector(1), sector(2)) else {
        return Err(damaged("the file is too short for one"));
    };
    let kind = |marker: &[u8]| (le32(marker, 8), le32(marker, 12));
    if kind(marker) != (Some(0), Some(Marker::Footer as u32)) {
        return Err(damaged("its marker is missing"));
    }
    if kind(end) != (Some(0), Some(Marker::EndOfStream as u32)) || le64(end, 0) != Some(0) {
        return Err(damaged("the end-of-stream marker is missing"));
    }
    let header = SparseHeader::parse(footer, file_bytes)?;
    if header.has_footer() {
        return Err(damaged("it does not say where the grain directory is"));
    }
    Ok(header)
}

#[cfg(test)]
fn stream_header() -> SparseHeader {
    super::layout::stream_header(204_800)
}

#[test]
fn a_footer_is_found_behind_the_directory() {
    let end = stream_end(&stream_header(), &[7, 0, 9, 11], 200);
    // One sector each: marker, directory, marker, footer, end.
    assert_eq!(end.len(), 5 * 512);
    assert_eq!(
        (&end[..16], &end[512..524]),
        (&b"\x01\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0"[..], &b"\x07\0\0\0\0\0\0\0\x09\0\0\0"[..])
    );
    assert_eq!(&end[1024..1040], b"\x01\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0");
    let area = &end[end.len() - FOOTER_AREA_BYTES as usize..];
    assert_eq!(parse_footer(area, 1 << 20).unwrap().gd_sector, 201);
    for (at, value) in [(8, 1), (12, 2), (512, 0), (1024, 1), (1032, 1), (1036, 3)] {
        let mut area = area.to_vec();
        area[at] = value;
        assert!(parse_footer(&area, 1 << 20).is_err(), "{at}");
    }
    let mut recursive = area.to_vec();
    recursive[512 + 56..512 + 64].fill(0xff);
    assert!(matches!(parse_footer(&recursive, 1 << 20), Err(VmdkError::Footer { .. })));
    assert!(parse_footer(&area[..1535], 1 << 20).is_err());
}

#[test]
fn a_grain_comes_back_and_a_bomb_does_not() {
    let header = stream_header();
    let plain: Vec<u8> = (0..65536u32).map(|i| (i / 300) as u8).collect();
    let mut stream = vec![9; 7];
    deflate_grain(&plain, &mut stream);
    let marker = grain_header(128, stream.len() as u32);
    assert_eq!((le64(&marker, 0), compressed_span(&marker, &header, 128)), (Some(128), Ok(stream.len())));
    let stream = stream.as_slice();
    let mut out = vec![1; 65536];
    inflate_grain(stream, &mut out, 128).unwrap();
    assert!(out == plain);
    // Noise does not shrink, and still fits.
    let noise: Vec<u8> = (0..65536u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect();
    let mut packed_noise = Vec::new();
    deflate_grain(&noise, &mut packed_noise);
    assert!(compressed_span(&grain_header(0, packed_noise.len() as u32), &header, 0).is_ok());
    inflate_grain(&packed_noise, &mut out, 0).unwrap();
    assert!(out == noise);

    let error = Err(VmdkError::Inflate { guest_sector: 128 });
    assert_eq!(inflate_grain(stream, &mut [0; 65535], 128), error, "more than a grain");
    assert_eq!(inflate_grain(&stream[..stream.len() - 1], &mut out, 128), error, "cut off");
    let mut flipped = stream.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    assert_eq!(inflate_grain(&flipped, &mut out, 128), error, "wrong Adler-32");
    let mut short = Vec::new();
    deflate_grain(&[7; 512], &mut short);
    inflate_grain(&short, &mut out, 0).unwrap();
    assert_eq!((out[511], out[512], out[65535]), (7, 0, 0));
    for (bytes, fits) in [(0u32, false), (1, true), (131_060, true), (131_061, false), (u32::MAX, false)] {
        assert_eq!(compressed_span(&grain_header(0, bytes), &header, 0).is_ok(), fits, "{bytes}");
    }
}
