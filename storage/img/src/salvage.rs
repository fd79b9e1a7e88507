//! `convert --salvage`: what can be read of a damaged source; the rest becomes zeroes.

use block::{CopyOptions, Disk, ExtentKind, PageBuf};

use crate::error::{ImgError, why};
use crate::progress::Progress;

/// Bytes read together while nothing is wrong.
const PIECE_BYTES: u64 = 64 << 10;
/// Bytes given up together: one sector.
const SECTOR_BYTES: u64 = 512;

/// Copies all of `source`, piece by piece, in order. `before` bytes of a longer copy are done already.
pub fn copy(
    source: &Disk,
    target: &Disk,
    options: &CopyOptions,
    progress: &Progress,
    (before, total): (u64, u64),
) -> Result<(), ImgError> {
    let compressed = options.compressed || target.is_stream();
    let mut room = PageBuf::default();
    let mut at = 0;
    while at < source.size_bytes() {
        let to = options.target_offset + at;
        let failed = |source| ImgError::WritingDisk { at: to, source };
        let left = source.size_bytes() - at;
        let unit = if compressed { target.cluster_bytes().max(SECTOR_BYTES) } else { PIECE_BYTES };
        let mut bytes = unit.min(left);
        // A map that cannot be read says nothing of what is there: the pieces are tried one by one.
        let kind = match source.extent(at, left) {
            Ok(found) => {
                if found.extent.kind != ExtentKind::Data && found.extent.bytes >= unit {
                    bytes = found.extent.bytes / unit * unit;
                }
                if found.extent.bytes >= bytes { found.extent.kind } else { ExtentKind::Data }
            }
            Err(_) => ExtentKind::Data,
        };
        if kind != ExtentKind::Data {
            if !options.target_is_zero {
                target.write_zeroes(to, bytes, true).map_err(failed)?;
            }
        } else {
            room.set_len(bytes as usize);
            read(source, at, &mut room);
            let mut packed = Vec::new();
            if compressed && target.pack(&room, &mut packed).map_err(failed)? {
                target.write_packed(to, &packed, bytes).map_err(failed)?;
            } else {
                target.write(to, &room).map_err(failed)?;
            }
        }
        at += bytes;
        progress.report(before + at, total);
    }
    Ok(())
}

/// Reads what can be read; sectors that cannot are zeroes, and are named.
fn read(source: &Disk, at: u64, room: &mut [u8]) {
    if source.read(at, room).is_ok() {
        return;
    }
    let mut sector_at = at;
    for sector in room.chunks_mut(SECTOR_BYTES as usize) {
        if let Err(error) = source.read(sector_at, sector) {
            crate::warn(&format!("error while reading offset {sector_at}: {}", why(&error)));
            sector.fill(0);
        }
        sector_at += sector.len() as u64;
    }
}
