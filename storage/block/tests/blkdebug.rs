//! A fault at every event of the engine: what was reported as written and flushed is there, nothing is damaged, and
//! the open disk shows what the file holds.

mod support;

use std::collections::BTreeSet;
use std::io;

use block::blkdebug::{Blkdebug, BlkdebugOptions, Limits, read_rules};
use block::{
    BlockError, ChainBackend, Disk, Event, FileBackend, Format, OpenOptions, Preallocation, ReadBufs, WriteBufs,
};
use support::{MemFile, Pages, Rng, qemu_img};

const SIZE_BYTES: u64 = 2 << 20;
/// How much of the disk holds 8s at first.
const FILLED_BYTES: usize = 1_900_544;
const SECTOR: usize = 512;

/// Events that these operations come past; the others need more than they do.
const REACHED: &[&str] = &[
    "l1_update",
    "l1_grow_write_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "refblock_load",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev",
    "pwritev_done",
    "none",
];

/// Layouts that between them come past all of [`REACHED`].
const LAYOUTS: [&str; 2] = ["cluster_size=512,refcount_bits=64", "cluster_size=4k"];

/// An image over a disk of 7s, three quarters full of 8s, with a snapshot of qemu-img's, which shares its tables.
fn start(layout: &str) -> Pages {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    let size = SIZE_BYTES.to_string();
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-o", layout, "-b", "below", "-F", "raw", name, &size]);
    let file = MemFile::of(Pages::load(&path));
    open(&file, None, false).unwrap().write(0, &vec![8; FILLED_BYTES]).unwrap();
    file.0.lock().unwrap().pages.store(&path);
    std::fs::write(dir.path().join("below"), vec![7; SIZE_BYTES as usize]).unwrap();
    qemu_img(&["snapshot", "-c", "shared", name]);
    Pages::load(&path)
}

fn below() -> ChainBackend {
    let mut pages = Pages::default();
    pages.write(0, &vec![7; SIZE_BYTES as usize]);
    MemFile::of(pages).layer(Format::Raw)
}

fn open(file: &MemFile, rules: Option<BlkdebugOptions>, read_only: bool) -> Result<Disk, BlockError> {
    let layer = file.layer(Format::Qcow2);
    let layer = match rules {
        Some(rules) => ChainBackend { file: Box::new(Blkdebug::new(layer.file, rules)), ..layer },
        None => layer,
    };
    Disk::open_backends(vec![layer, below()], &OpenOptions { read_only, ..OpenOptions::default() })
}

/// What each sector may hold.
struct Model {
    /// In the open disk. A write that failed may have happened.
    shown: Vec<Vec<u8>>,
    /// In the file: what was shown at the last flush, or came later.
    stored: Vec<Vec<u8>>,
}

impl Model {
    fn new() -> Model {
        let start = |index: usize| vec![if index * SECTOR < FILLED_BYTES { 8 } else { 7 }];
        let shown: Vec<Vec<u8>> = (0..SIZE_BYTES as usize / SECTOR).map(start).collect();
        Model { stored: shown.clone(), shown }
    }

    fn wrote(&mut self, (offset, bytes): (usize, usize), value: u8, sure: bool) {
        for index in offset / SECTOR..(offset + bytes) / SECTOR {
            if sure {
                self.shown[index].clear();
            }
            self.shown[index].push(value);
            self.stored[index].push(value);
        }
    }

    fn flushed(&mut self) {
        self.stored.clone_from(&self.shown);
    }
}

/// Writes and reads all over the disk; returns what it may hold, and whether anything failed.
fn work(disk: &Disk, seed: u64) -> (Model, bool) {
    let mut rng = Rng(seed);
    let mut model = Model::new();
    let mut failed = false;
    for step in 0..80u64 {
        let offset = rng.below(SIZE_BYTES / 512 - 80) * 512;
        let range = (offset as usize, (1 + rng.below(70) as usize) * 512);
        let value = 10 + step as u8;
        let done = match step % 10 {
            4 => disk.read(offset, &mut vec![0; range.1]),
            7 => disk.flush().inspect(|()| model.flushed()),
            8 => {
                let unit = disk.cluster_bytes() as usize;
                let offset = range.0 / unit * unit;
                let mut packed = Vec::new();
                let done = disk.pack(&vec![value; unit], &mut packed);
                let done = done.and_then(|_| disk.write_packed(offset as u64, &packed, unit as u64));
                model.wrote((offset, unit), value, done.is_ok());
                done.and_then(|()| disk.read(offset as u64, &mut vec![0; unit]))
            }
            9 => {
                let done = disk.write_zeroes(offset, range.1 as u64, true);
                model.wrote(range, 0, done.is_ok());
                done
            }
            _ => {
                let done = disk.write(offset, &vec![value; range.1]);
                model.wrote(range, value, done.is_ok());
                done
            }
        };
        failed |= done.is_err();
        if step == 50 {
            failed |= disk.qcow2().unwrap().create_snapshot("s", &Default::default()).is_err();
        }
    }
    let larger = disk.resize(SIZE_BYTES * 20, false, Preallocation::Off);
    failed |= larger.is_err();
    (model, failed)
}

fn rules(event: &str, once: bool, errno: i32) -> BlkdebugOptions {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules");
    let once = if once { "on" } else { "off" };
    let text = format!("[inject-error]\nevent = \"{event}\"\nonce = \"{once}\"\nerrno = \"{errno}\"\n");
    std::fs::write(&path, text).unwrap();
    BlkdebugOptions { rules: read_rules(&path).unwrap(), ..BlkdebugOptions::default() }
}

fn check(start: &Pages, layout: &str, event: &str, once: bool, errno: i32) -> bool {
    let what = format!("{layout} {event}, once: {once}, errno {errno}");
    let file = MemFile::of(start.clone());
    let Ok(disk) = open(&file, Some(rules(event, once, errno)), false) else { return true };
    let (mut model, mut failed) = work(&disk, 77);
    let flushed = disk.flush().inspect(|()| model.flushed()).is_ok();
    failed |= !flushed;
    let mut shown = vec![0; SIZE_BYTES as usize];
    let readable = disk.read(0, &mut shown).is_ok();
    drop(disk);
    let report = file.0.lock().unwrap().pages.check();
    assert_eq!(report.corruptions, 0, "{what}: {:?}", report.findings);
    // The image goes on, for whoever opens it next.
    let disk = open(&file, None, false).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut held = vec![0; SIZE_BYTES as usize];
    disk.read(0, &mut held).unwrap();
    for (index, (now, before)) in held.chunks(SECTOR).zip(shown.chunks(SECTOR)).enumerate() {
        let (stored, wanted) = (&model.stored[index], &model.shown[index]);
        assert!(now.iter().all(|byte| stored.contains(byte)), "{what}: sector {index}: {} of {stored:?}", now[0]);
        assert!(!readable || before.iter().all(|byte| wanted.contains(byte)), "{what}: sector {index}: {}", before[0]);
        // Memory and file agree, or the disk has refused to go on.
        assert!(!(readable && flushed) || now == before, "{what}: sector {index}: {} and {}", now[0], before[0]);
    }
    disk.write(0, &[5; 4096]).unwrap();
    disk.flush().unwrap();
    failed
}

#[test]
fn no_fault_at_any_event_leaves_damage() {
    let mut seen = BTreeSet::new();
    for layout in LAYOUTS {
        let start = start(layout);
        for event in Event::all().map(Event::name) {
            for (once, errno) in [(true, 28), (false, 5)] {
                if check(&start, layout, event, once, errno) {
                    seen.insert(event);
                }
            }
        }
    }
    let missed: Vec<&&str> = REACHED.iter().filter(|event| !seen.contains(**event)).collect();
    assert!(missed.is_empty(), "no fault at {missed:?}");
}

#[test]
fn without_rules_nothing_changes() {
    let start = start(LAYOUTS[1]);
    let [plain, ruled] = [None, Some(BlkdebugOptions::default())].map(|rules| {
        let file = MemFile::of(start.clone());
        let disk = open(&file, rules, false).unwrap();
        assert!(!work(&disk, 5).1);
        drop(disk);
        let mut all = vec![0; file.0.lock().unwrap().pages.len as usize];
        file.0.lock().unwrap().pages.read(0, &mut all);
        all
    });
    assert!(plain == ruled);
}

/// A file that holds requests to limits: those of [`Limits::OPTIONS`].
struct Strict {
    file: Box<dyn FileBackend>,
    limits: [u64; 6],
}

impl Strict {
    fn hold(&self, offset: u64, bytes: u64, unit: u64, max: u64) {
        let unit = unit.max(1);
        assert!(offset.is_multiple_of(unit) && bytes.is_multiple_of(unit), "{offset}+{bytes} of {unit}");
        assert!(max == 0 || bytes <= max, "{bytes} past {max}");
    }
}

impl FileBackend for Strict {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        self.hold(offset, bufs.len() as u64, self.limits[0], self.limits[1]);
        // Others get between a read and the write that follows it.
        std::thread::yield_now();
        self.file.read_at(offset, bufs)
    }
    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        self.hold(offset, bufs.len() as u64, self.limits[0], self.limits[1]);
        std::thread::yield_now();
        self.file.write_at(offset, bufs)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.hold(offset, bytes, self.limits[0], self.limits[5]);
        self.file.punch_hole(offset, bytes)
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.hold(offset, bytes, self.limits[0].max(self.limits[2]), self.limits[3]);
        self.file.write_zeroes(offset, bytes, may_unmap)
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

fn limited(limits: [u64; 6]) -> Blkdebug {
    let options = BlkdebugOptions { limits: Limits::new(limits).unwrap(), ..BlkdebugOptions::default() };
    let file = MemFile::of(Pages::default()).layer(Format::Raw).file;
    Blkdebug::new(Box::new(Strict { file, limits }), options)
}

/// Limits of every kind, between them all that [`Limits::new`] knows.
const LIMITS: [[u64; 6]; 6] = [
    [0; 6],
    [512, 1024, 4096, 8192, 4096, 8192],
    [4096, 0, 0, 0, 0, 0],
    [1024, 3072, 3072, 6144, 5120, 5120],
    [0, 1000, 3000, 3000, 700, 1400],
    [65536, 65536, 0, 65536, 0, 65536],
];

#[test]
fn every_request_below_obeys_the_limits_and_means_the_same() {
    const SIZE: u64 = 300_000;
    for limits in LIMITS {
        let file = limited(limits);
        let mut model = vec![0u8; SIZE as usize];
        let mut rng = Rng(11);
        for step in 0..400u64 {
            let offset = rng.below(SIZE);
            let bytes = rng.below((SIZE - offset).min(if step % 4 == 0 { 200_000 } else { 9000 }));
            let range = offset as usize..(offset + bytes) as usize;
            match step % 5 {
                0 | 1 => {
                    model[range.clone()].fill(step as u8 | 1);
                    file.write_at(offset, &WriteBufs::from_slice(&model[range])).unwrap();
                }
                2 => {
                    model[range].fill(0);
                    file.write_zeroes(offset, bytes, step % 2 == 0).unwrap();
                }
                3 => {
                    file.punch_hole(offset, bytes).unwrap();
                    // What goes back reads as zeroes, or stays.
                    let mut now = vec![0; range.len()];
                    file.read_at(offset, &ReadBufs::from_slice(&mut now)).unwrap();
                    for (now, then) in now.iter().zip(&mut model[range]) {
                        assert!(*now == *then || *now == 0);
                        *then = *now;
                    }
                }
                _ => {
                    let mut now = vec![1; range.len()];
                    file.read_at(offset, &ReadBufs::from_slice(&mut now)).unwrap();
                    assert!(now == model[range], "{limits:?}, step {step}: {offset}+{bytes}");
                }
            }
        }
        let mut all = vec![1; SIZE as usize];
        file.read_at(0, &ReadBufs::from_slice(&mut all)).unwrap();
        assert!(all == model, "{limits:?}");
    }
}

#[test]
fn requests_that_share_a_block_keep_each_other_s_bytes() {
    const PART: usize = 512;
    for limits in LIMITS {
        let file = limited(limits);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let file = &file;
                scope.spawn(move || {
                    for part in (thread..256).step_by(4) {
                        let offset = (part * PART) as u64;
                        if thread == 0 {
                            file.write_zeroes(offset, PART as u64, false).unwrap();
                        } else {
                            file.write_at(offset, &WriteBufs::from_slice(&[thread as u8; PART])).unwrap();
                        }
                    }
                });
            }
        });
        let mut all = vec![9; 256 * PART];
        file.read_at(0, &ReadBufs::from_slice(&mut all)).unwrap();
        let wrong = all.chunks(PART).enumerate().find(|(part, bytes)| bytes.iter().any(|b| *b as usize != part % 4));
        assert!(wrong.is_none(), "{limits:?}: part {:?}", wrong.map(|(part, _)| part));
    }
}
