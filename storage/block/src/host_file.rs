//! [`FileBackend`] over a file or block device of the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use crate::io::{FileBackend, RingFile};
use crate::page_buf::PageBuf;
use crate::sys::{ReadBufs, WriteBufs, pread, pwrite};
use crate::zeroes::{PIECE_BYTES, write_zero_data};

/// Alignment of offset, length and memory that satisfies `O_DIRECT` on every disk in use.
const DIRECT_ALIGN: u64 = 4096;
/// Largest piece of a bounced request held in memory.
const BOUNCE_BYTES: u64 = 256 << 10;

/// Handles one aligned piece: its offset, its bytes, which of them the request asks for, where in the request
/// they belong.
type BounceStep<'a> = dyn FnMut(u64, &mut [u8], std::ops::Range<usize>, usize) -> io::Result<()> + 'a;

/// An open file of the host. Opened with `O_DIRECT`, requests that are not aligned go through an aligned copy.
pub struct HostFile {
    file: File,
    direct: bool,
    /// It is a block device, whose length is not ours.
    device: bool,
    /// The file may become longer than what was written to it.
    growing: bool,
    /// Held while a request that is not aligned reads and writes the blocks around it.
    ragged: Mutex<()>,
}

/// Makes an open file bypass the host's page cache (`O_DIRECT`), for [`crate::CacheMode::None`]. Fails where
/// the file system has no direct I/O.
pub fn use_direct_io(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)?)
}

/// `f_type` of statfs(2) for file systems where `copy_file_range` may share blocks or leave the copy to a server: Btrfs,
/// XFS, Bcachefs, OCFS2, ZFS, NFS, SMB2, and overlays, which may lie on any of them.
const SHARING: [u32; 8] =
    [0x9123_683e, 0x5846_5342, 0xca45_1a4e, 0x7461_636f, 0x2fc1_2fc1, 0x6969, 0xfe53_4d42, 0x794c_7630];

/// Whether a copy inside the kernel may be more than moving bytes where this file is.
pub(crate) fn shares_blocks(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|host| SHARING.contains(&(host.f_type as u32)))
}

/// Copies a range from file to file inside the kernel, `copy_file_range(2)`. `false` when the files or their file
/// systems cannot: part of the range may have been copied. A range past the end of the source is not copied.
pub(crate) fn copy_inside_kernel(from: &File, mut at: u64, to: &File, mut target: u64, bytes: u64) -> io::Result<bool> {
    let mut left = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    while left > 0 {
        match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut target), left) {
            Ok(0) => return Ok(false),
            Ok(copied) => left = left.saturating_sub(copied),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno @ (rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT | rustix::io::Errno::IO)) => {
                return Err(errno.into());
            }
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

impl HostFile {
    /// Takes an open file; its flags say whether it is direct.
    pub fn new(file: File) -> io::Result<HostFile> {
        let direct = rustix::fs::fcntl_getfl(&file)?.contains(OFlags::DIRECT);
        let device = file.metadata()?.file_type().is_block_device();
        Ok(HostFile { file, direct, device, growing: false, ragged: Mutex::new(()) })
    }

    /// The same, as a file whose length means nothing: its end need not be kept at the byte.
    pub(crate) fn growing(self) -> HostFile {
        HostFile { growing: true, ..self }
    }

    /// Returns when data and everything the host knows about the file are on stable storage.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn must_bounce(&self, offset: u64, aligned_memory: bool) -> bool {
        self.direct && (!aligned_memory || !offset.is_multiple_of(DIRECT_ALIGN))
    }

    /// Calls `step` with aligned pieces that cover the range.
    fn bounce(&self, offset: u64, len: usize, step: &mut BounceStep<'_>) -> io::Result<()> {
        let end = offset.checked_add(len as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mut piece = PageBuf::default();
        let mut at = offset;
        while at < end {
            let start = at - at % DIRECT_ALIGN;
            let stop = end.min(start + BOUNCE_BYTES);
            piece.set_len((stop - start).next_multiple_of(DIRECT_ALIGN) as usize);
            let part = (at - start) as usize..(stop - start) as usize;
            step(start, &mut piece, part, (at - offset) as usize)?;
            at = stop;
        }
        Ok(())
    }

    fn read_plain(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let got = pread(&self.file, offset, bufs)?;
        if got < bufs.len() {
            bufs.range(got, bufs.len() - got).fill_zero();
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> io::Result<bool> {
        match rustix::fs::fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => Ok(true),
            Err(
                rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::NODEV
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::NOSYS,
            ) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl FileBackend for HostFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        if !self.must_bounce(offset, bufs.is_aligned(DIRECT_ALIGN as usize)) {
            return self.read_plain(offset, bufs);
        }
        self.bounce(offset, bufs.len(), &mut |start, piece, part, at| {
            self.read_plain(start, &ReadBufs::from_slice(piece))?;
            let bytes = piece.get(part).unwrap_or_default();
            bufs.range(at, bytes.len()).copy_from(bytes);
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        if !self.must_bounce(offset, bufs.is_aligned(DIRECT_ALIGN as usize)) {
            return pwrite(&self.file, offset, bufs);
        }
        let end = offset.saturating_add(bufs.len() as u64);
        let whole = offset.is_multiple_of(DIRECT_ALIGN) && end.is_multiple_of(DIRECT_ALIGN);
        // Two requests that share a block must not write back what the other one replaced.
        let _ragged = if whole { None } else { Some(self.ragged.lock()) };
        // The file must not grow by the padding of the last piece, where its length means something.
        let want_len = if whole || self.growing { u64::MAX } else { self.len_bytes()?.max(end) };
        self.bounce(offset, bufs.len(), &mut |start, piece, part, at| {
            if part != (0..piece.len()) {
                self.read_plain(start, &ReadBufs::from_slice(piece))?;
            }
            let target = piece.get_mut(part).unwrap_or_default();
            bufs.range(at, target.len()).copy_to(target);
            pwrite(&self.file, start, &WriteBufs::from_slice(piece))
        })?;
        let padded_end = end.next_multiple_of(DIRECT_ALIGN);
        if want_len < padded_end && self.file.metadata()?.is_file() && self.len_bytes()? == padded_end {
            self.set_len_bytes(want_len)
        } else {
            Ok(())
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.fallocate(FallocateFlags::PUNCH_HOLE, offset, bytes).map(|_| ())
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let mode = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        if self.fallocate(mode, offset, bytes)? {
            return Ok(());
        }
        write_zero_data(offset..offset.saturating_add(bytes), PIECE_BYTES, |at, zeroes| self.write_at(at, zeroes))
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let end = offset.saturating_add(bytes);
        let seek = |to: SeekFrom| match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(at),
            // Nothing but a hole follows, up to the end of the file and past it.
            Err(rustix::io::Errno::NXIO) => Ok(end),
            // A file system that keeps no such knowledge.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(offset),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let data = seek(SeekFrom::Data(offset))?.min(end);
        if data > offset {
            return Ok((data - offset, false));
        }
        let hole = seek(SeekFrom::Hole(offset))?.min(end);
        Ok((if hole > offset { hole - offset } else { bytes }, true))
    }

    fn as_host_file(&self) -> Option<&File> {
        Some(&self.file).filter(|_| !self.direct)
    }

    fn ring_file(&self, offset: u64, _bytes: u64, is_aligned: &dyn Fn(usize) -> bool) -> Option<RingFile<'_>> {
        // Pieces that are aligned add up to a length that is.
        let bounces = self.direct && self.must_bounce(offset, is_aligned(DIRECT_ALIGN as usize));
        (!bounces).then_some(RingFile { file: &self.file, is_direct: self.direct })
    }

    fn len_bytes(&self) -> io::Result<u64> {
        // Seeking serves block devices too, whose metadata says 0. Positioned I/O does not use the position.
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        match self.device {
            false => self.file.set_len(bytes),
            true if bytes <= self.len_bytes()? => Ok(()),
            true => Err(io::Error::new(io::ErrorKind::InvalidInput, "Cannot grow device files")),
        }
    }

    fn keeps_len(&self) -> bool {
        self.device
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }
}
