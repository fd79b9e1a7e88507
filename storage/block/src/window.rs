//! A part of a file as a file of its own: a disk in an archive, or behind somebody else's header.

use std::io;
use std::sync::Arc;

use crate::blkdebug::{Breakpoints, Event};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// A part of a file. With a fixed size it neither grows nor shrinks, and nothing outside it is touched; without one it
/// goes up to the end of the file, and grows with it.
pub struct Window {
    below: Box<dyn FileBackend>,
    offset: u64,
    size: Option<u64>,
}

impl Window {
    /// From a byte of a file on. The caller sees to it that a window of fixed size lies inside the file.
    pub fn new(below: Box<dyn FileBackend>, offset: u64, size: Option<u64>) -> Window {
        Window { below, offset, size }
    }

    /// Where a range is in the file below; an error if it is not all inside.
    fn place(&self, at: u64, bytes: u64) -> io::Result<u64> {
        let end = at.checked_add(bytes).filter(|end| self.size.is_none_or(|size| *end <= size));
        let last = end.and_then(|end| self.offset.checked_add(end));
        last.map(|last| last - bytes).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn inside(&self, at: u64, bytes: u64) -> io::Result<u64> {
        Ok(self.len_bytes()?.saturating_sub(at).min(bytes))
    }
}

impl FileBackend for Window {
    fn read_at(&self, at: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let inside = usize::try_from(self.inside(at, bufs.len() as u64)?).unwrap_or(usize::MAX);
        bufs.range(inside, bufs.len() - inside).fill_zero();
        if inside == 0 {
            return Ok(());
        }
        self.below.read_at(self.place(at, inside as u64)?, &bufs.range(0, inside))
    }
    fn write_at(&self, at: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.below.write_at(self.place(at, bufs.len() as u64)?, bufs)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.below.sync_data()
    }
    fn punch_hole(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.below.punch_hole(self.place(at, bytes)?, bytes)
    }
    fn write_zeroes(&self, at: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.below.write_zeroes(self.place(at, bytes)?, bytes, may_unmap)
    }
    fn extent(&self, at: u64, bytes: u64) -> io::Result<(u64, bool)> {
        match self.inside(at, bytes)? {
            0 => Ok((bytes, false)),
            inside => self.below.extent(self.place(at, inside)?, inside),
        }
    }
    fn event(&self, event: Event) {
        self.below.event(event);
    }
    fn breakpoints(&self) -> Option<Arc<Breakpoints>> {
        self.below.breakpoints()
    }
    fn len_bytes(&self) -> io::Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(self.below.len_bytes()?.saturating_sub(self.offset)),
        }
    }
    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        match self.size {
            Some(size) if size != bytes => Err(io::ErrorKind::InvalidInput.into()),
            Some(_) => Ok(()),
            None => self.below.set_len_bytes(self.place(bytes, 0)?),
        }
    }
    fn keeps_len(&self) -> bool {
        self.below.keeps_len()
    }
    fn is_remote(&self) -> bool {
        self.below.is_remote()
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.below.allocated_bytes()
    }
}

#[test]
fn a_window_shows_its_part_and_no_more() {
    use crate::host_file::HostFile;
    use std::io::{Seek, Write};
    let open = |offset, size| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        file.rewind().unwrap();
        Window::new(Box::new(HostFile::new(file).unwrap()), offset, size)
    };
    let read = |window: &Window, at| {
        let mut out = [b'?'; 4];
        window.read_at(at, &ReadBufs::from_slice(&mut out)).unwrap();
        out
    };
    let fixed = open(2, Some(5));
    assert_eq!((read(&fixed, 0), read(&fixed, 3), read(&fixed, u64::MAX)), (*b"2345", *b"56\0\0", [0; 4]));
    assert!(fixed.write_at(2, &WriteBufs::from_slice(b"abcd")).is_err() && fixed.set_len_bytes(6).is_err());
    fixed.write_at(1, &WriteBufs::from_slice(b"abcd")).unwrap();
    assert_eq!((read(&fixed, 1), fixed.len_bytes().unwrap()), (*b"abcd", 5));
    let growing = open(8, None);
    growing.write_at(1, &WriteBufs::from_slice(b"xyz")).unwrap();
    assert_eq!((read(&growing, 0), growing.len_bytes().unwrap()), (*b"8xyz", 4));
    growing.set_len_bytes(1).unwrap();
    assert_eq!(read(&growing, 0), *b"8\0\0\0");
    assert!(growing.place(u64::MAX, 1).is_err());
}
