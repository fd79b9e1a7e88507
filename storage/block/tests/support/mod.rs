//! What the tests share: a seeded random source, a file in memory that records and fails, qemu-img.
#![allow(dead_code, reason = "each test binary uses its part")]

mod rng;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{
    ChainBackend, ChainFile, Disk, FileBackend, Format, HostFile, OpenOptions, Qcow2Image, ReadBufs, WriteBufs,
};
pub use rng::Rng;

/// What a test is told of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Read,
    /// A write, zeroes, or a hole.
    Change,
    Sync,
}

type Watcher = Box<dyn Fn(Request) + Send + Sync>;

/// A file whose requests a test hears of before they go to the one below, and after.
pub struct Watched<F> {
    pub file: F,
    pub before: Watcher,
    pub after: Watcher,
}

impl<F> Watched<F> {
    pub fn before(file: F, before: impl Fn(Request) + Send + Sync + 'static) -> Watched<F> {
        Watched { file, before: Box::new(before), after: Box::new(|_| {}) }
    }

    pub fn after(file: F, after: impl Fn(Request) + Send + Sync + 'static) -> Watched<F> {
        Watched { file, before: Box::new(|_| {}), after: Box::new(after) }
    }

    fn told<T>(&self, request: Request, act: impl FnOnce(&F) -> io::Result<T>) -> io::Result<T> {
        (self.before)(request);
        let done = act(&self.file);
        (self.after)(request);
        done
    }
}

impl<F: FileBackend> FileBackend for Watched<F> {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        self.told(Request::Read, |file| file.read_at(offset, bufs))
    }
    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.told(Request::Change, |file| file.write_at(offset, bufs))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.told(Request::Sync, F::sync_data)
    }
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.told(Request::Change, |file| file.punch_hole(offset, bytes))
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.told(Request::Change, |file| file.write_zeroes(offset, bytes, may_unmap))
    }
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }
    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len_bytes(bytes)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }
}

/// A file one of whose writes in `every` lets the other threads run first, so that what can overtake it does; with
/// `reads` one of its reads and writes.
pub fn slow(path: &Path, every: u64, reads: bool) -> impl FileBackend + 'static {
    let requests = AtomicU64::new(0);
    Watched::before(HostFile::new(open_file(path, true)).unwrap(), move |request| {
        let counts = request == Request::Change || reads && request == Request::Read;
        if counts && requests.fetch_add(1, Ordering::Relaxed).is_multiple_of(every) {
            (0..300).for_each(|_| std::thread::yield_now());
        }
    })
}

const PAGE: u64 = 512;

/// A sparse file.
#[derive(Clone, Default)]
pub struct Pages {
    pages: HashMap<u64, [u8; PAGE as usize]>,
    pub len: u64,
}

impl Pages {
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let mut at = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let within = (at % PAGE) as usize;
            let take = rest.len().min(PAGE as usize - within);
            let (now, later) = rest.split_at_mut(take);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => now.copy_from_slice(&page[within..within + now.len()]),
                None => now.fill(0),
            }
            at = at.wrapping_add(now.len() as u64);
            rest = later;
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = (at % PAGE) as usize;
            let (now, later) = rest.split_at(rest.len().min(PAGE as usize - within));
            let page = self.pages.entry(at / PAGE).or_insert([0; PAGE as usize]);
            page[within..within + now.len()].copy_from_slice(now);
            at += now.len() as u64;
            rest = later;
        }
        self.len = self.len.max(at);
    }

    pub fn zero(&mut self, offset: u64, bytes: u64) {
        let end = offset + bytes;
        let touched: Vec<u64> =
            self.pages.keys().copied().filter(|p| (p + 1) * PAGE > offset && p * PAGE < end).collect();
        for page in touched {
            for at in (page * PAGE).max(offset)..((page + 1) * PAGE).min(end) {
                self.pages.get_mut(&page).unwrap()[(at % PAGE) as usize] = 0;
            }
        }
    }

    fn missing(&self, offset: u64, bytes: u64) -> u64 {
        (offset / PAGE..(offset + bytes).div_ceil(PAGE)).filter(|page| !self.pages.contains_key(page)).count() as u64
    }

    pub fn load(path: &Path) -> Pages {
        let mut pages = Pages::default();
        let bytes = std::fs::read(path).unwrap();
        for (i, chunk) in bytes.chunks(PAGE as usize).enumerate() {
            if chunk.iter().any(|b| *b != 0) {
                pages.write(i as u64 * PAGE, chunk);
            }
        }
        pages.len = bytes.len() as u64;
        pages
    }

    pub fn store(&self, path: &Path) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path).unwrap();
        file.set_len(self.len).unwrap();
        for (page, bytes) in &self.pages {
            file.write_all_at(bytes, page * PAGE).unwrap();
        }
        file.set_len(self.len).unwrap();
    }

    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(offset, bytes) => self.write(*offset, bytes),
            Op::Zero(offset, bytes) => self.zero(*offset, *bytes),
            Op::Sync => {}
        }
    }

    /// Our own checker over this file.
    pub fn check(&self) -> image::qcow2::check::Report {
        let mut area = vec![0; self.len.min(2 << 20) as usize];
        self.read(0, &mut area);
        let cluster_bytes = image::qcow2::header_area_bytes(&area).unwrap();
        area.truncate(cluster_bytes as usize);
        let header = image::qcow2::Header::parse(&area).unwrap();
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
            self.read(offset, out);
            Ok(())
        };
        image::qcow2::check::check(&header, self.len, &mut read).unwrap()
    }
}

/// What reached the file.
#[derive(Clone)]
pub enum Op {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Sync,
}

/// A file in memory with its history and its faults.
#[derive(Default)]
pub struct MemState {
    pub pages: Pages,
    pub log: Vec<Op>,
    /// New 512-byte pages that may still be written; then ENOSPC.
    pub room: Option<u64>,
    /// One write in this many fails with EIO, after writing a part.
    pub fail_one_in: Option<(u64, u64)>,
    pub sync_fails: bool,
    pub reads: u64,
}

#[derive(Clone, Default)]
pub struct MemFile(pub Arc<Mutex<MemState>>);

impl MemFile {
    pub fn of(pages: Pages) -> MemFile {
        MemFile(Arc::new(Mutex::new(MemState { pages, ..MemState::default() })))
    }

    pub fn layer(&self, format: Format) -> ChainBackend {
        ChainBackend { file: Box::new(self.clone()), path_label: "memory".into(), format, extents: Vec::new() }
    }
}

impl FileBackend for MemFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.reads += 1;
        let mut out = vec![0; bufs.len()];
        state.pages.read(offset, &mut out);
        bufs.copy_from(&out);
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let mut bytes = vec![0; bufs.len()];
        bufs.copy_to(&mut bytes);
        let mut result = Ok(());
        if let Some(room) = state.room {
            let need = state.pages.missing(offset, bytes.len() as u64);
            if need > room {
                bytes.truncate(bytes.len() / 2 / 512 * 512);
                let need = state.pages.missing(offset, bytes.len() as u64);
                bytes.truncate(if need > room { 0 } else { bytes.len() });
                result = Err(io::Error::from_raw_os_error(28)); // ENOSPC
            }
            let need = state.pages.missing(offset, bytes.len() as u64);
            state.room = Some(room - need);
        }
        if let Some((every, seed)) = &mut state.fail_one_in {
            let mut rng = Rng(*seed);
            let fails = rng.below(*every) == 0;
            *seed = rng.0;
            if fails {
                bytes.truncate(bytes.len() / 2 / 8 * 8);
                result = Err(io::Error::from_raw_os_error(5)); // EIO
            }
        }
        state.pages.write(offset, &bytes);
        state.log.push(Op::Write(offset, bytes));
        result
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if state.sync_fails {
            return Err(io::Error::from_raw_os_error(5));
        }
        state.log.push(Op::Sync);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.write_zeroes(offset, bytes, true)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.pages.zero(offset, bytes);
        state.log.push(Op::Zero(offset, bytes));
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().pages.len)
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        let pages = &mut self.0.lock().unwrap().pages;
        // What is cut off does not come back.
        pages.zero(bytes, pages.len.saturating_sub(bytes));
        pages.len = bytes;
        Ok(())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().pages.pages.len() as u64 * PAGE)
    }
}

/// Each sector of a write reaches the disk or does not; writes to the same place keep their order.
pub fn apply_torn(pages: &mut Pages, op: &Op, rng: &mut Rng) {
    match op {
        Op::Write(offset, bytes) => {
            if rng.below(4) == 0 {
                return;
            }
            let whole = rng.below(2) == 0;
            let mut at = 0;
            while at < bytes.len() {
                let to_boundary = 512 - ((offset + at as u64) % 512) as usize;
                let end = (at + to_boundary).min(bytes.len());
                if whole || rng.below(2) == 0 {
                    pages.write(offset + at as u64, &bytes[at..end]);
                }
                at = end;
            }
            // The length of a file may be on disk before its data.
            pages.len = pages.len.max(offset + bytes.len() as u64);
        }
        Op::Zero(offset, bytes) if rng.below(2) == 0 => pages.zero(*offset, *bytes),
        _ => {}
    }
}

/// Every state that a power cut could leave: at each position of the log, with what came before the last barrier and
/// three random parts of what followed it. `judge` gets the file, a text for messages, and whether to look closer.
pub fn every_cut(start: &Pages, log: &[Op], judge: &mut dyn FnMut(&Pages, &str, bool)) {
    let (mut synced, mut since, mut rng) = (start.clone(), 0, Rng(9));
    for cut in 0..=log.len() {
        for variant in 0..3 {
            let mut torn = synced.clone();
            log[since..cut].iter().for_each(|op| apply_torn(&mut torn, op, &mut rng));
            judge(&torn, &format!("cut {cut} of {} variant {variant}", log.len()), variant == 0 && cut % 5 == 1);
        }
        if matches!(log.get(cut), Some(Op::Sync)) {
            log[since..cut].iter().for_each(|op| synced.apply(op));
            since = cut + 1;
        }
    }
}

/// qemu-img finds nothing wrong, not even a leak.
pub fn qemu_check(path: &Path, what: &str) {
    let (status, text) = qemu_img_status(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert_eq!(status, 0, "{what}: {text}");
}

/// Opens a qcow2 image on its own for changes.
pub fn open_image(path: &Path) -> Qcow2Image {
    let file = ChainFile {
        file: open_file(path, true),
        path_label: path.to_owned(),
        format: Format::Qcow2,
        extents: Vec::new(),
    };
    Qcow2Image::open(file, false).unwrap()
}

/// Opens one qcow2 image as a disk.
pub fn open_disk(path: &Path) -> Disk {
    open_chain(&[(path, Format::Qcow2)], &OpenOptions::default())
}

/// The disk as raw bytes, from qemu-img.
pub fn qemu_raw(path: &Path) -> Vec<u8> {
    let out = path.with_extension("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), out.to_str().unwrap()]);
    std::fs::read(&out).unwrap()
}

/// Runs qemu-img and returns its exit code and output.
pub fn qemu_img_status(args: &[&str]) -> (i32, String) {
    let run = Command::new("qemu-img").args(args).output();
    let run = run.unwrap_or_else(|e| panic!("qemu-img does not run ({e}): install the Debian package qemu-utils"));
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    (run.status.code().unwrap_or(-1), text)
}

/// Runs qemu-img, which must succeed.
pub fn qemu_img(args: &[&str]) -> String {
    let (status, text) = qemu_img_status(args);
    assert_eq!(status, 0, "qemu-img {}: {text}", args.join(" "));
    text
}

pub fn open_file(path: &Path, writable: bool) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(writable).open(path).unwrap()
}

/// Opens a chain of files, the top one writable.
pub fn open_chain(files: &[(&Path, Format)], opts: &OpenOptions) -> Disk {
    let chain = files.iter().enumerate().map(|(depth, (path, format))| ChainFile {
        file: open_file(path, depth == 0 && !opts.read_only),
        path_label: PathBuf::from(path),
        format: *format,
        extents: Vec::new(),
    });
    Disk::open(chain.collect(), opts).unwrap()
}

/// All bytes of a disk.
pub fn contents(disk: &Disk) -> Vec<u8> {
    let mut out = vec![0; disk.size_bytes() as usize];
    let chunk = 1 << 20;
    for (i, part) in out.chunks_mut(chunk).enumerate() {
        disk.read((i * chunk) as u64, part).unwrap();
    }
    out
}
