//! Raw images through a pipe: they have no holes, no size and no second look.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileTypeExt;

use block::{Disk, ExtentKind, PageBuf};

use crate::error::ImgError;

/// Bytes in memory at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Whether a name is a pipe or socket, such as `/dev/stdout` in front of `|`.
pub fn is_stream(name: &OsStr) -> bool {
    std::fs::metadata(name).is_ok_and(|meta| meta.file_type().is_fifo() || meta.file_type().is_socket())
}

/// Opens it for writing.
pub fn open(name: &OsStr) -> Result<File, ImgError> {
    let failed = |source| ImgError::CreateHost { name: name.to_string_lossy().into_owned(), source };
    OpenOptions::new().write(true).open(name).map_err(failed)
}

/// Writes all of a disk. `told` hears how many bytes are written.
pub fn copy(disk: &Disk, out: &mut File, told: &mut dyn FnMut(u64)) -> Result<(), ImgError> {
    copy_part(disk, 0..disk.size_bytes(), out, told)
}

/// Writes a part of a disk.
pub fn copy_part(
    disk: &Disk,
    range: std::ops::Range<u64>,
    out: &mut File,
    told: &mut dyn FnMut(u64),
) -> Result<(), ImgError> {
    let mut room = PageBuf::new(PIECE_BYTES as usize);
    let mut at = range.start;
    while at < range.end {
        let failed = |source| ImgError::Reading { at, source };
        let run = disk.extent(at, range.end - at).map_err(failed)?.extent;
        let bytes = run.bytes.min(PIECE_BYTES);
        let piece = room.get_mut(..bytes as usize).unwrap_or_default();
        match run.kind {
            ExtentKind::Data => disk.read(at, piece).map_err(failed)?,
            ExtentKind::Zero | ExtentKind::Below => piece.fill(0),
        }
        out.write_all(piece).map_err(|source| ImgError::Writing { at, source })?;
        at += bytes;
        told(at - range.start);
    }
    Ok(())
}
