//! Power cuts: of what was written since the last sync, any part may be on the disk, in any order, torn at 512
//! bytes. Whatever is left opens, has everything that was flushed, and shows nothing that was never written.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::tests::{Rng, check_with_qemu, create, read_all, write};
use crate::error::BlockError;
use crate::foreign::{ForeignImage, open_foreign};
use crate::io::FileBackend;
use crate::node::Node;
use crate::sys::{ReadBufs, WriteBufs};

#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    SetLen(u64),
    Sync,
}

/// A file in memory that remembers what was done to it.
#[derive(Default)]
struct LogFile {
    state: Mutex<(Vec<u8>, Vec<Op>)>,
    /// Seed of failures; 0 for none.
    faults: AtomicU64,
    /// Pages of 4 KiB that may hold something; 0 for any number.
    room_pages: AtomicU64,
}

const PAGE_BYTES: usize = 4096;

fn is_used(page: &[u8]) -> bool {
    page.iter().any(|byte| *byte != 0)
}

/// Applies an operation; of a write, those sectors of the file that `sector` agrees to.
fn apply(bytes: &mut Vec<u8>, op: &Op, sector: &mut dyn FnMut() -> bool) {
    match op {
        Op::Write(offset, data) => {
            let start = *offset as usize;
            let mut at = 0;
            while at < data.len() {
                let piece = (512 - (start + at) % 512).min(data.len() - at);
                if sector() {
                    let end = start + at + piece;
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    bytes[start + at..end].copy_from_slice(&data[at..at + piece]);
                }
                at += piece;
            }
        }
        Op::Zero(offset, len) => {
            let end = bytes.len().min((offset + len) as usize);
            if sector() && (*offset as usize) < end {
                bytes[*offset as usize..end].fill(0);
            }
        }
        Op::SetLen(len) => {
            if sector() {
                bytes.resize(*len as usize, 0);
            }
        }
        Op::Sync => {}
    }
}

impl LogFile {
    fn of(bytes: Vec<u8>) -> Arc<LogFile> {
        Arc::new(LogFile { state: Mutex::new((bytes, Vec::new())), ..LogFile::default() })
    }

    fn push(&self, op: Op) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let (bytes, ops) = &mut *state;
        apply(bytes, &op, &mut || true);
        ops.push(op);
        Ok(())
    }

    /// Whether this request finds no space.
    fn fails(&self) -> bool {
        let mut rng = Rng(self.faults.load(Ordering::Relaxed));
        let fails = rng.0 != 0 && rng.below(4) == 0;
        self.faults.store(rng.0, Ordering::Relaxed);
        fails
    }

    /// How many bytes of a write there is room for.
    fn fits(&self, offset: u64, bytes: usize) -> usize {
        let room = self.room_pages.load(Ordering::Relaxed) as usize;
        if room == 0 {
            return bytes;
        }
        let state = self.state.lock().unwrap();
        let mut used = state.0.chunks(PAGE_BYTES).filter(|page| is_used(page)).count();
        let (start, end) = (offset as usize, offset as usize + bytes);
        let mut at = start;
        while at < end {
            let page = at / PAGE_BYTES * PAGE_BYTES;
            let have = state.0.get(page..state.0.len().min(page + PAGE_BYTES)).is_some_and(is_used);
            used += usize::from(!have);
            if used > room && !have {
                return at - start;
            }
            at = page + PAGE_BYTES;
        }
        bytes
    }

    fn ops(&self) -> Vec<Op> {
        self.state.lock().unwrap().1.clone()
    }
}

impl FileBackend for LogFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        bufs.fill_zero();
        let start = (offset as usize).min(state.0.len());
        let end = (start + bufs.len()).min(state.0.len());
        bufs.copy_from(&state.0[start..end]);
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let mut bytes = vec![0; bufs.len()];
        bufs.copy_to(&mut bytes);
        if self.fails() {
            bytes.truncate(bytes.len() / 2 / 512 * 512);
            self.push(Op::Write(offset, bytes))?;
            return Err(io::Error::from_raw_os_error(28)); // ENOSPC
        }
        let fits = self.fits(offset, bytes.len());
        if fits < bytes.len() {
            bytes.truncate(fits);
            self.push(Op::Write(offset, bytes))?;
            return Err(io::Error::from_raw_os_error(28));
        }
        self.push(Op::Write(offset, bytes))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.push(Op::Sync)
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.push(Op::Zero(offset, bytes))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> io::Result<()> {
        if self.fails() {
            return Err(io::Error::from_raw_os_error(28));
        }
        self.push(Op::Zero(offset, bytes))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().0.len() as u64)
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        self.push(Op::SetLen(bytes))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len_bytes()
    }
}

fn open(format: &str, file: Arc<LogFile>, read_only: bool) -> Result<Arc<dyn Node>, BlockError> {
    let format = format.parse::<image::Format>().unwrap();
    open_foreign(ForeignImage::new(file, Path::new("memory"), format), read_only, false)
}

/// What each sector of the disk may hold after a cut: what was flushed, and what was written since.
struct Moment {
    /// Operations that had been done when the flush returned.
    ops: usize,
    flushed: Vec<u8>,
    since: Vec<Vec<u8>>,
}

const SIZE_BYTES: usize = 9 << 20;
const SECTORS: usize = SIZE_BYTES / 512;

/// Writes sectors that hold one number each, and flushes now and then.
fn script(node: &dyn Node, file: &LogFile, seed: u64) -> Vec<Moment> {
    let mut rng = Rng(seed);
    let mut now = vec![0u8; SECTORS];
    let nothing = || vec![Vec::new(); SECTORS];
    let mut moments = vec![Moment { ops: 0, flushed: now.clone(), since: nothing() }];
    for step in 0..70u8 {
        let first = rng.below(SECTORS as u64) as usize;
        let count = (1 + rng.below(if step % 9 == 0 { 3000 } else { 100 }) as usize).min(SECTORS - first);
        let fill = if rng.below(6) == 0 { 0 } else { step + 1 };
        match fill {
            0 => node.write_zeroes(&[], first as u64 * 512, count as u64 * 512, true).unwrap(),
            fill => write(node, first * 512, &vec![fill; count * 512]),
        }
        let moment = moments.last_mut().unwrap();
        moment.since[first..first + count].iter_mut().for_each(|values| values.push(fill));
        now[first..first + count].fill(fill);
        if rng.below(5) == 0 {
            node.flush().unwrap();
            moments.push(Moment { ops: file.ops().len(), flushed: now.clone(), since: nothing() });
        }
    }
    moments
}

fn check_contents(contents: &[u8], moment: &Moment, what: &str) {
    for (sector, bytes) in contents.chunks(512).enumerate().take(SECTORS) {
        let value = bytes[0];
        assert!(bytes.iter().all(|byte| *byte == value), "{what}: sector {sector} is mixed");
        let allowed = value == moment.flushed[sector] || moment.since[sector].contains(&value);
        assert!(allowed, "{what}: sector {sector} holds {value}, flushed was {}", moment.flushed[sector]);
    }
}

fn check(format: &str, options: &str, states: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(format, options, &path, SIZE_BYTES as u64);
    let empty = std::fs::read(&path).unwrap();
    let file = LogFile::of(empty.clone());
    let node = open(format, file.clone(), false).unwrap();
    let moments = script(&*node, &file, 11);
    let ops = file.ops();
    assert!(moments.len() > 8 && ops.len() > 60);
    let mut rng = Rng(5);
    for state in 0..states {
        let cut = rng.below(ops.len() as u64 + 1) as usize;
        let synced = ops[..cut].iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
        let mut bytes = empty.clone();
        for op in &ops[..synced] {
            apply(&mut bytes, op, &mut || true);
        }
        for op in &ops[synced..cut] {
            // Whole, missing, or torn.
            match rng.below(3) {
                0 => apply(&mut bytes, op, &mut || true),
                1 => {}
                _ => apply(&mut bytes, op, &mut || rng.below(2) == 0),
            }
        }
        let moment = moments.iter().rev().find(|moment| moment.ops <= cut).unwrap();
        let what = format!("{format} {options}, state {state}, cut at {cut} of {}", ops.len());
        let left = LogFile::of(bytes.clone());
        let node = open(format, left.clone(), true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let before = read_all(&*node).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        check_contents(&before, moment, &what);
        // The work goes on, and new blocks show nothing of what was left behind.
        let node = open(format, left.clone(), false).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let mut after = before;
        for block in 0..9 {
            let at = (block << 20) + 512 * 77;
            write(&*node, at, &[0xfe; 512]);
            after[at..at + 512].fill(0xfe);
        }
        drop(node);
        assert!(read_all(&*open(format, left.clone(), true).unwrap()).unwrap() == after, "{what}");
        if state % 16 == 0 {
            std::fs::write(&path, &left.state.lock().unwrap().0).unwrap();
            check_contents_with_qemu(format, &path, &after, dir.path());
        }
    }
}

/// After a cut, QEMU counts a vdi's unused blocks as errors, as it does with its own; contents agree.
fn check_contents_with_qemu(format: &str, path: &Path, want: &[u8], dir: &Path) {
    if format != "vdi" {
        return check_with_qemu(format, path, want, dir);
    }
    let flat = dir.join("flat.raw");
    std::fs::write(&flat, want).unwrap();
    super::tests::qemu_img(&["compare", "-f", format, "-F", "raw", path.to_str().unwrap(), flat.to_str().unwrap()]);
}

/// A new image, logged and open for writing.
fn fresh(format: &str, options: &str, path: &Path) -> (Arc<LogFile>, Arc<dyn Node>) {
    let _ = std::fs::remove_file(path);
    create(format, options, path, SIZE_BYTES as u64);
    let file = LogFile::of(std::fs::read(path).unwrap());
    (file.clone(), open(format, file, false).unwrap())
}

/// Repeats a request until there is space.
fn insist(mut request: impl FnMut() -> Result<(), BlockError>) {
    while let Err(error) = request() {
        assert!(matches!(error, BlockError::NoSpace { .. }), "{error:?}");
    }
}

#[test]
fn requests_can_be_repeated_when_there_is_space_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (format, options) in [("vdi", ""), ("vpc", ""), ("vmdk", ""), ("vhdx", "block_size=1M")] {
        let (file, node) = fresh(format, options, &path);
        file.faults.store(9, Ordering::Relaxed);
        let mut want = vec![0; node.size_bytes() as usize];
        let mut rng = Rng(3);
        for step in 0..200u8 {
            let first = rng.below(SECTORS as u64) as usize * 512;
            let end = (first + 512 * (1 + rng.below(400) as usize)).min(SIZE_BYTES);
            want[first..end].fill(step);
            let bytes = want[first..end].to_vec();
            insist(|| node.write(&[], first as u64, &WriteBufs::from_slice(&bytes)));
            if rng.below(9) == 0 {
                insist(|| node.flush());
            }
        }
        insist(|| node.flush());
        assert!(read_all(&*node).unwrap() == want, "{format}");
        file.faults.store(0, Ordering::Relaxed);
        drop(node);
        std::fs::write(&path, &file.state.lock().unwrap().0).unwrap();
        check_with_qemu(format, &path, &want, dir.path());
    }
}

#[test]
fn a_write_that_finds_no_space_takes_none_from_those_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (format, options) in [("vdi", ""), ("vpc", ""), ("vmdk", ""), ("vhdx", "block_size=1M")] {
        let (file, node) = fresh(format, options, &path);
        let mut want = vec![0; node.size_bytes() as usize];
        let used_pages = file.state.lock().unwrap().0.chunks(PAGE_BYTES).filter(|page| is_used(page)).count();
        file.room_pages.store(used_pages as u64 + (11 << 19) / PAGE_BYTES as u64, Ordering::Relaxed);
        want[..2 << 20].fill(1);
        write(&*node, 0, &want[..2 << 20]);
        let no_room = node.write(&[], 3 << 20, &WriteBufs::from_slice(&vec![2; 6 << 20]));
        assert!(matches!(no_room, Err(BlockError::NoSpace { .. })), "{format}");
        node.flush().unwrap_or_else(|e| panic!("{format}: {e:?}"));
        drop(node);
        // Blocks of the second write that were complete may be there.
        let left = read_all(&*open(format, file.clone(), true).unwrap()).unwrap();
        assert!(left[..3 << 20] == want[..3 << 20], "{format}");
        assert!(left[3 << 20..].iter().all(|byte| [0, 2].contains(byte)), "{format}");
        std::fs::write(&path, &file.state.lock().unwrap().0).unwrap();
        check_with_qemu(format, &path, &left, dir.path());
        // And there is room for as much as before.
        let node = open(format, file.clone(), false).unwrap();
        write(&*node, 7 << 20, &[3; 256 << 10]);
        node.flush().unwrap_or_else(|e| panic!("{format}: {e:?}"));
    }
}

#[test]
fn power_cuts_of_vdi() {
    check("vdi", "", 64);
}

#[test]
fn power_cuts_of_vpc() {
    check("vpc", "", 64);
}

#[test]
fn power_cuts_of_vmdk() {
    check("vmdk", "", 64);
}

#[test]
fn power_cuts_of_vhdx() {
    check("vhdx", "block_size=1M", 64);
}
