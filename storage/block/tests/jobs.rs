//! Jobs on disks that guests use: whatever moves, no guest sees a difference or loses a write; what a backup holds is
//! one moment of the disk; a cut at any point leaves images that hold what they held.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::job::{
    BackupOptions, Base, BitmapSync, CommitLayers, Ending, JobControl, JobState, LiveDisk, MirrorOptions, backup,
    backup_pull, commit, commit_active, mirror, stream,
};
use block::{BlockError, ChainBackend, ChainFile, Disk, Format, OpenOptions, Preallocation, create_raw};
use support::{
    MemFile, Pages, Rng, contents, every_cut, open_chain, open_disk, open_file, qemu_check, qemu_img, qemu_raw,
};

const BLOCK: usize = 4096;
/// Requests that a guest makes at most beside one job.
const REQUESTS_MAX: usize = 3000;
const GUESTS: usize = 3;
/// Not at a cluster.
const SIZE_BYTES: usize = (3 << 20) + 5 * 512;

/// Option sets of the images above the base.
const OPTIONS: [&str; 4] = [
    "cluster_size=64k",
    "cluster_size=512,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,refcount_bits=1",
];

/// base.raw, low.qcow2, mid.qcow2 (shorter than the others), top.qcow2: each with data and zeroes of its own.
struct Images {
    dir: tempfile::TempDir,
}

const NAMES: [&str; 4] = ["top.qcow2", "mid.qcow2", "low.qcow2", "base.raw"];

impl Images {
    fn new(options: &'static str) -> Images {
        let images = Images { dir: tempfile::tempdir().unwrap() };
        create_raw(&images.path(3), SIZE_BYTES as u64).unwrap();
        let mut rng = Rng(options.len() as u64);
        for layer in (0..4).rev() {
            let size = if layer == 1 { SIZE_BYTES - (1 << 20) } else { SIZE_BYTES };
            if layer < 3 {
                let (name, size) = (images.path(layer).display().to_string(), size.to_string());
                let format = if layer == 2 { "raw" } else { "qcow2" };
                let below = NAMES[layer + 1];
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", format, &name, &size]);
            }
            let disk = images.open(layer, false);
            for _ in 0..12 {
                let bytes = 512 * (1 + rng.below(120));
                let at = 512 * rng.below((size as u64 - bytes) / 512);
                match rng.below(4) {
                    0 => disk.write_zeroes(at, bytes, false).unwrap(),
                    _ => disk.write(at, &vec![1 + rng.below(255) as u8; bytes as usize]).unwrap(),
                }
            }
        }
        images
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.path().join(NAMES[layer])
    }

    fn format(layer: usize) -> Format {
        if layer == 3 { Format::Raw } else { Format::Qcow2 }
    }

    /// The disk from a layer on down.
    fn open(&self, layer: usize, read_only: bool) -> Disk {
        let paths: Vec<(PathBuf, Format)> = (layer..4).map(|layer| (self.path(layer), Images::format(layer))).collect();
        let files: Vec<(&Path, Format)> = paths.iter().map(|(path, format)| (path.as_path(), *format)).collect();
        open_chain(&files, &OpenOptions { read_only, format: Images::format(layer), ..OpenOptions::default() })
    }

    fn file(&self, layer: usize) -> ChainBackend {
        let (path_label, format) = (self.path(layer), Images::format(layer));
        let file = open_file(&path_label, true);
        ChainBackend::from_file(ChainFile { file, path_label, format, extents: Vec::new() }).unwrap()
    }
}

/// Stops the guests, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `job` while guests use the disk; `model` is what the disk holds before, and afterwards.
fn with_guests<T>(live: &LiveDisk, model: &mut [u8], seed: u64, job: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let start = model.to_vec();
        let guests: Vec<_> = (0..GUESTS)
            .map(|index| {
                let (stop, mut held) = (&stop, start.clone());
                scope.spawn(move || {
                    let mut rng = Rng(seed + index as u64);
                    // A job that copies behind its guests' backs need not catch up with guests that never rest.
                    for _ in 0..REQUESTS_MAX {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        request(live, &mut held, index, &mut rng);
                    }
                    held
                })
            })
            .collect();
        let stopping = Stop(&stop);
        let result = job();
        drop(stopping);
        for (index, guest) in guests.into_iter().enumerate() {
            let held = guest.join().unwrap();
            for at in (0..model.len()).step_by(BLOCK).skip(index).step_by(GUESTS) {
                let end = model.len().min(at + BLOCK);
                model[at..end].copy_from_slice(&held[at..end]);
            }
        }
        result
    })
}

/// One request of a guest on a block of its own.
fn request(live: &LiveDisk, held: &mut [u8], index: usize, rng: &mut Rng) {
    let blocks = held.len().div_ceil(BLOCK) / GUESTS;
    let start = (rng.below(blocks as u64) as usize * GUESTS + index) * BLOCK;
    let block = start..held.len().min(start + BLOCK);
    let from = block.start + 512 * rng.below((block.len() / 512) as u64) as usize;
    let part = from..block.end;
    let disk = live.get();
    match rng.below(8) {
        0 => {
            disk.write_zeroes(part.start as u64, part.len() as u64, rng.below(2) == 0).unwrap();
            held[part].fill(0);
        }
        1 => {
            disk.discard(block.start as u64, block.len() as u64).unwrap();
            disk.read(block.start as u64, &mut held[block.clone()]).unwrap();
        }
        2..=4 => {
            held[part.clone()].fill(rng.next() as u8);
            disk.write(part.start as u64, &held[part]).unwrap();
        }
        _ => {
            let mut now = vec![0; block.len()];
            disk.read(block.start as u64, &mut now).unwrap();
            assert!(now == held[block.clone()], "guest {index} at {}", block.start);
        }
    }
    if rng.below(60) == 0 {
        disk.flush().unwrap();
    }
}

/// The disk holds the model, now and when it is opened again; qemu-img agrees.
fn judge(live: LiveDisk, path: &Path, model: &[u8], what: &str) {
    let disk = live.into_disk();
    assert!(contents(&disk) == model, "{what}: contents");
    disk.flush().unwrap();
    let format = if path.extension().unwrap() == "raw" { Format::Raw } else { Format::Qcow2 };
    drop(disk);
    if format == Format::Qcow2 {
        qemu_check(path, what);
        assert!(qemu_raw(path) == model, "{what}: contents for qemu-img");
    } else {
        assert!(std::fs::read(path).unwrap() == model, "{what}: contents of the file");
    }
}

#[test]
fn a_stream_makes_layers_superfluous() {
    for options in OPTIONS {
        for base in [None, Some(1), Some(2), Some(3)] {
            let images = Images::new(options);
            let live = LiveDisk::new(images.open(0, false));
            let mut model = contents(&live.get());
            let what = format!("{options}, base {base:?}");
            let base = base.map(|layer| Base { layer, name: NAMES[layer].to_owned(), format: Images::format(layer) });
            with_guests(&live, &mut model, 1, || stream(&live, base.as_ref(), &JobControl::default())).expect(&what);
            assert_eq!(live.get().layers(), base.as_ref().map_or(1, |base| 5 - base.layer), "{what}");
            for gone in 1..base.map_or(4, |base| base.layer) {
                std::fs::remove_file(images.path(gone)).unwrap();
            }
            judge(live, &images.path(0), &model, &what);
        }
    }
}

#[test]
fn committed_layers_are_superfluous() {
    for options in OPTIONS {
        for (first, base) in [(1, 2), (1, 3), (2, 3)] {
            let images = Images::new(options);
            let live = LiveDisk::new(images.open(0, false));
            let mut model = contents(&live.get());
            let what = format!("{options}, {first} to {base}");
            let layers = CommitLayers {
                first,
                base,
                base_file: images.file(base),
                overlay_file: (first > 1).then(|| images.file(first - 1)),
                base_name: NAMES[base].to_owned(),
                base_format: Images::format(base),
            };
            with_guests(&live, &mut model, 2, || commit(&live, layers, &JobControl::default())).expect(&what);
            assert_eq!(live.get().layers(), 4 - (base - first), "{what}");
            (first..base).for_each(|gone| std::fs::remove_file(images.path(gone)).unwrap());
            judge(live, &images.path(0), &model, &what);
        }
    }
}

#[test]
fn the_top_is_committed_under_its_guest() {
    for options in OPTIONS {
        for base in 1..4 {
            let images = Images::new(options);
            let live = LiveDisk::new(images.open(0, false));
            let mut model = contents(&live.get());
            let what = format!("{options}, {base}");
            let control = Arc::new(JobControl::default());
            let ending = with_guests(&live, &mut model, 3, || {
                let job = || commit_active(&live, base, images.file(base), &control);
                completing(&control, job)
            });
            assert_eq!(ending.expect(&what), Ending::Completed);
            (0..base).for_each(|gone| std::fs::remove_file(images.path(gone)).unwrap());
            judge(live, &images.path(base), &model, &what);
        }
    }
}

/// Runs a job and lets it complete when it is ready.
fn completing<T: Send>(control: &JobControl, job: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let job = scope.spawn(job);
        if control.wait_until_ready() {
            assert_eq!(control.status().state, JobState::Ready);
            control.complete();
        }
        job.join().unwrap()
    })
}

#[test]
fn a_guest_moves_to_its_mirror_or_stays() {
    for options in OPTIONS {
        for (format, stays) in [("raw", false), ("qcow2", false), ("qcow2", true)] {
            let images = Images::new(options);
            let live = LiveDisk::new(images.open(0, false));
            let mut model = contents(&live.get());
            let target = images.dir.path().join(format!("target.{format}"));
            qemu_img(&["create", "-q", "-f", format, target.to_str().unwrap(), &SIZE_BYTES.to_string()]);
            let format: Format = format.parse().unwrap();
            let opened = open_chain(&[(&target, format)], &OpenOptions { format, ..OpenOptions::default() });
            let control = Arc::new(JobControl::default());
            let ending = with_guests(&live, &mut model, 4, || {
                let options = MirrorOptions { target_is_zero: true, ..MirrorOptions::default() };
                let job = || mirror(&live, opened, &options, &control);
                match stays {
                    false => completing(&control, job),
                    true => std::thread::scope(|scope| {
                        let job = scope.spawn(job);
                        assert!(control.wait_until_ready());
                        control.cancel();
                        job.join().unwrap()
                    }),
                }
            });
            let what = format!("{options}, {format}, {stays}");
            assert_eq!(ending.expect(&what), if stays { Ending::Cancelled } else { Ending::Completed });
            assert_eq!(control.status().state, JobState::Ended);
            if !stays {
                (0..4).for_each(|gone| std::fs::remove_file(images.path(gone)).unwrap());
            }
            judge(live, if stays { images.path(0) } else { target }.as_path(), &model, &what);
        }
    }
}

/// Slots of one guest in tests of moments.
const SLOTS: u64 = 60;

/// A guest that writes the numbers from 1 on, number `n` to its slot `n % SLOTS`: at every moment one number tells
/// what all slots hold.
fn count(live: &LiveDisk, index: u64, stop: &AtomicBool) {
    for number in 1u64.. {
        let slot = number % SLOTS * GUESTS as u64 + index;
        let data = number.to_le_bytes().repeat(BLOCK / 8);
        live.get().write(slot * BLOCK as u64, &data).unwrap();
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
}

/// Whether what a disk holds is one moment of the guests that count.
fn is_a_moment(bytes: &[u8], what: &str) {
    for index in 0..GUESTS {
        let number_at = |slot: u64| {
            let at = (slot as usize * GUESTS + index) * BLOCK;
            let block = &bytes[at..at + BLOCK];
            assert!(block.chunks(8).all(|word| word == &block[..8]), "{what}: guest {index}, slot {slot} is torn");
            u64::from_le_bytes(block[..8].try_into().unwrap())
        };
        let last = (0..SLOTS).map(number_at).max().unwrap();
        for slot in 0..SLOTS {
            let want = if last >= slot { last - (last - slot) % SLOTS } else { 0 };
            assert_eq!(number_at(slot), want, "{what}: guest {index}, slot {slot}, moment {last}");
        }
    }
}

/// A disk of one image whose guests count while `job` runs.
fn with_counting<T>(live: &LiveDisk, job: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for index in 0..GUESTS as u64 {
            let stop = &stop;
            scope.spawn(move || count(live, index, stop));
        }
        let _stopping = Stop(&stop);
        job()
    })
}

fn counting_disk(dir: &Path, options: &str) -> LiveDisk {
    let path = dir.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "2M"]);
    LiveDisk::new(open_disk(&path))
}

fn empty_raw(path: &Path) -> Disk {
    create_raw(path, 2 << 20).unwrap();
    open_chain(&[(path, Format::Raw)], &OpenOptions { format: Format::Raw, ..OpenOptions::default() })
}

#[test]
fn a_backup_is_one_moment() {
    for options in OPTIONS {
        let dir = tempfile::tempdir().unwrap();
        let live = counting_disk(dir.path(), options);
        let target = dir.path().join("backup.raw");
        with_counting(&live, || {
            for round in 0..4 {
                let _ = std::fs::remove_file(&target);
                let control = Arc::new(JobControl::default());
                backup(&live, empty_raw(&target), &BackupOptions::default(), &control).unwrap();
                is_a_moment(&std::fs::read(&target).unwrap(), &format!("{options}, round {round}"));
            }
        });
    }
}

#[test]
fn a_backup_is_pulled_while_the_disk_changes() {
    for options in OPTIONS {
        let dir = tempfile::tempdir().unwrap();
        let live = counting_disk(dir.path(), options);
        with_counting(&live, || {
            for round in 0..4 {
                let scratch = dir.path().join(format!("scratch{round}"));
                let control = Arc::new(JobControl::default());
                let (first, again) = backup_pull(&live, empty_raw(&scratch), &control, |moment| {
                    let first = contents(moment);
                    (first, contents(moment))
                })
                .unwrap();
                is_a_moment(&first, options);
                assert!(first == again, "{options}: the moment moved");
            }
        });
    }
}

#[test]
fn increments_make_the_last_backup_current() {
    let dir = tempfile::tempdir().unwrap();
    let live = counting_disk(dir.path(), "cluster_size=64k");
    let target = dir.path().join("backup.raw");
    live.get().qcow2().unwrap().add_bitmap("b", 65_536, true).unwrap();
    let full = empty_raw(&target);
    backup(&live, full, &BackupOptions::default(), &Arc::default()).unwrap();
    let increment = |sync| BackupOptions { bitmap: Some(("b".to_owned(), sync)) };
    let open = || open_chain(&[(&target, Format::Raw)], &OpenOptions { format: Format::Raw, ..OpenOptions::default() });
    with_counting(&live, || {
        for round in 0..6 {
            let sync = if round % 2 == 0 { BitmapSync::OnSuccess } else { BitmapSync::Never };
            let control = Arc::new(JobControl::default());
            if round == 3 {
                // One that is cut off leaves the bitmap with all that the next one needs.
                control.cancel();
                let ended = backup(&live, open(), &increment(BitmapSync::OnSuccess), &control);
                assert!(matches!(ended, Err(BlockError::Stopped)), "{ended:?}");
            }
            backup(&live, open(), &increment(sync), &Arc::default()).unwrap();
            is_a_moment(&std::fs::read(&target).unwrap(), &format!("round {round}"));
        }
    });
    backup(&live, open(), &increment(BitmapSync::OnSuccess), &Arc::default()).unwrap();
    assert!(std::fs::read(&target).unwrap() == contents(&live.get()));
    assert_eq!(live.get().qcow2().unwrap().bitmap_bits("b").unwrap().ranges(), []);
}

#[test]
fn jobs_pause_go_slowly_and_end_when_told() {
    let images = Images::new(OPTIONS[0]);
    let live = LiveDisk::new(images.open(0, false));
    let model = contents(&live.get());
    // So slow that it would take years: it ends because it is told to.
    let control = JobControl::new(1);
    std::thread::scope(|scope| {
        let job = scope.spawn(|| stream(&live, None, &control));
        while control.status().done_bytes == 0 {
            std::thread::yield_now();
        }
        let status = control.status();
        assert_eq!((status.state, status.total_bytes), (JobState::Running, SIZE_BYTES as u64));
        let other = stream(&live, None, &JobControl::default());
        assert!(matches!(other, Err(BlockError::BusyWithJob { .. })), "{other:?}");
        control.pause();
        assert_eq!(control.status().state, JobState::Paused);
        control.set_speed(0);
        control.resume();
        job.join().unwrap().unwrap();
    });
    assert!(contents(&live.get()) == model);
    let control = JobControl::default();
    control.cancel();
    let images = Images::new(OPTIONS[1]);
    let live = LiveDisk::new(images.open(0, false));
    assert!(matches!(stream(&live, None, &control), Err(BlockError::Stopped)));
    assert_eq!((control.status().state, live.get().layers()), (JobState::Ended, 4));
}

#[test]
fn what_cannot_be_is_refused() {
    let images = Images::new(OPTIONS[0]);
    let live = LiveDisk::new(images.open(0, false));
    let control = Arc::new(JobControl::default());
    for layer in [0, 4, 9] {
        let base = Base { layer, name: "x".to_owned(), format: Format::Raw };
        let refused = stream(&live, Some(&base), &control);
        assert!(matches!(refused, Err(BlockError::NoSuchLayer { layers: 4, .. })), "{refused:?}");
    }
    let small = images.dir.path().join("small.raw");
    create_raw(&small, 512).unwrap();
    let small = || open_chain(&[(&small, Format::Raw)], &OpenOptions { format: Format::Raw, ..OpenOptions::default() });
    let refused = mirror(&live, small(), &MirrorOptions::default(), &control);
    assert!(matches!(refused, Err(BlockError::TargetTooSmall { have: 512, .. })), "{refused:?}");
    let refused = backup(&live, small(), &BackupOptions::default(), &control);
    assert!(matches!(refused, Err(BlockError::TargetTooSmall { .. })), "{refused:?}");
    let raw = LiveDisk::new(images.open(3, false));
    assert!(matches!(stream(&raw, None, &control), Err(BlockError::NoPull { .. })));
    // While a job follows the disk, it keeps its size.
    let target = images.dir.path().join("target.raw");
    create_raw(&target, SIZE_BYTES as u64).unwrap();
    let target = open_chain(&[(&target, Format::Raw)], &OpenOptions { format: Format::Raw, ..OpenOptions::default() });
    let control = Arc::new(JobControl::default());
    std::thread::scope(|scope| {
        let job = scope.spawn(|| mirror(&live, target, &MirrorOptions::default(), &control));
        assert!(control.wait_until_ready());
        let refused = live.get().resize(4 << 20, false, Preallocation::Off);
        assert!(matches!(refused, Err(BlockError::BusyWithJob { .. })), "{refused:?}");
        control.cancel();
        assert_eq!(job.join().unwrap().unwrap(), Ending::Cancelled);
    });
    live.get().resize(4 << 20, false, Preallocation::Off).unwrap();
}

/// Three layers in memory: two of qcow2 over a raw one, each with data of its own.
struct InMemory {
    files: [MemFile; 3],
    held: Vec<u8>,
}

impl InMemory {
    fn new(options: &str) -> InMemory {
        let dir = tempfile::tempdir().unwrap();
        let size = 64 << 10;
        let mut base = Pages::default();
        base.write(0, &vec![9; size]);
        let [top, mid] = ["mid", "base"].map(|below| {
            let path = dir.path().join("image");
            let (name, format) = (path.to_str().unwrap(), if below == "mid" { "qcow2" } else { "raw" });
            qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-o", options, "-b", below, "-F", format, name, "64k"]);
            MemFile::of(Pages::load(&path))
        });
        let files = [top, mid, MemFile::of(base)];
        for (layer, step) in [(1, 3), (0, 5)] {
            let disk = InMemory::open(&files[layer..], layer, false);
            for at in (0..size as u64).step_by(4096 * step) {
                disk.write(at + 512, &[layer as u8 + 1; 2048]).unwrap();
            }
            disk.write_zeroes(40 << 10, 4096 * step as u64, false).unwrap();
        }
        let held = contents(&InMemory::open(&files, 0, true));
        files.iter().for_each(|file| file.0.lock().unwrap().log.clear());
        InMemory { files, held }
    }

    fn layer(file: &MemFile, layer: usize) -> ChainBackend {
        file.layer(if layer == 2 { Format::Raw } else { Format::Qcow2 })
    }

    fn open(files: &[MemFile], first: usize, read_only: bool) -> Disk {
        let layers = (first..).zip(files).map(|(layer, file)| InMemory::layer(file, layer)).collect();
        let format = if first == 2 { Format::Raw } else { Format::Qcow2 };
        Disk::open_backends(layers, &OpenOptions { read_only, format, ..OpenOptions::default() }).unwrap()
    }

    fn start(&self) -> [Pages; 3] {
        std::array::from_fn(|layer| self.files[layer].0.lock().unwrap().pages.clone())
    }

    /// The image `top` with the layers that its header says it has shows what was held.
    fn judge(&self, top: &Pages, below: [&Pages; 2], what: &str) {
        assert_eq!(top.check().corruptions, 0, "{what}");
        let [top, mid, base] = [top, below[0], below[1]].map(|pages| MemFile::of(pages.clone()));
        let image = block::Qcow2Image::open_backend(top.layer(Format::Qcow2), true).unwrap();
        let mut layers = vec![top.layer(Format::Qcow2)];
        match image.header().backing_name.as_deref() {
            Some("mid") => layers.extend([InMemory::layer(&mid, 1), InMemory::layer(&base, 2)]),
            Some("base") => layers.push(InMemory::layer(&base, 2)),
            _ => {}
        }
        let disk = Disk::open_backends(layers, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
        assert!(contents(&disk) == self.held, "{what}");
    }
}

#[test]
fn a_cut_in_a_stream_loses_nothing() {
    for options in ["cluster_size=4k", "cluster_size=512,compat=0.10", "cluster_size=16k,extended_l2=on"] {
        for base in [None, Some(Base { layer: 2, name: "base".to_owned(), format: Format::Raw })] {
            let images = InMemory::new(options);
            let [top, mid, low] = images.start();
            let live = LiveDisk::new(InMemory::open(&images.files, 0, false));
            stream(&live, base.as_ref(), &JobControl::default()).unwrap();
            drop(live);
            let log = images.files[0].0.lock().unwrap().log.clone();
            every_cut(&top, &log, &mut |torn, what, _| images.judge(torn, [&mid, &low], &format!("{options} {what}")));
        }
    }
}

#[test]
fn a_cut_in_a_commit_loses_nothing() {
    for options in ["cluster_size=4k", "cluster_size=512,compat=0.10", "cluster_size=16k,extended_l2=on"] {
        let images = InMemory::new(options);
        let [top, mid, low] = images.start();
        let live = LiveDisk::new(InMemory::open(&images.files, 0, false));
        let layers = CommitLayers {
            first: 1,
            base: 2,
            base_file: InMemory::layer(&images.files[2], 2),
            overlay_file: None,
            base_name: "base".to_owned(),
            base_format: Format::Raw,
        };
        commit(&live, layers, &JobControl::default()).unwrap();
        drop(live);
        // The base is written first, and all of it is safe before the layer above it changes.
        let log = images.files[2].0.lock().unwrap().log.clone();
        assert!(matches!(log.last(), Some(support::Op::Sync)), "{options}");
        every_cut(&low, &log, &mut |torn, what, _| images.judge(&top, [&mid, torn], &format!("{options} {what}")));
        let done = images.files[2].0.lock().unwrap().pages.clone();
        let log = images.files[0].0.lock().unwrap().log.clone();
        every_cut(&top, &log, &mut |torn, what, _| images.judge(torn, [&mid, &done], &format!("{options} {what}")));
    }
}

#[test]
fn a_cut_under_a_commit_of_the_top_loses_nothing() {
    let images = InMemory::new("cluster_size=4k");
    let [top, mid, low] = images.start();
    let live = LiveDisk::new(InMemory::open(&images.files, 0, false));
    let control = Arc::new(JobControl::default());
    let job = || commit_active(&live, 2, InMemory::layer(&images.files[2], 2), &control);
    assert_eq!(completing(&control, job).unwrap(), Ending::Completed);
    assert!(contents(&live.get()) == images.held);
    drop(live);
    let log = images.files[2].0.lock().unwrap().log.clone();
    every_cut(&low, &log, &mut |torn, what, _| images.judge(&top, [&mid, torn], what));
}

#[test]
fn a_client_fetches_a_moment_and_what_changed_before_it() {
    use block::nbd::{Listener, ServeOptions, Stop, serve};
    let dir = tempfile::tempdir().unwrap();
    let live = counting_disk(dir.path(), "cluster_size=64k");
    live.get().qcow2().unwrap().add_bitmap("b", 65_536, true).unwrap();
    // Behind what the guests use.
    live.get().write(1 << 20, &[1; 10]).unwrap();
    let bits = live.get().qcow2().unwrap().bitmap_bits("b").unwrap();
    let (socket, scratch) = (dir.path().join("socket"), empty_raw(&dir.path().join("scratch")));
    let options = ServeOptions { bitmaps: vec![("b".to_owned(), bits)], ..ServeOptions::default() };
    let address = format!("nbd+unix:///?socket={}", socket.display());
    with_counting(&live, || {
        let served = backup_pull(&live, scratch, &Arc::default(), |moment| {
            let (listener, stop) = (Listener::unix(&socket).unwrap(), Stop::new().unwrap());
            std::thread::scope(|scope| {
                let server = scope.spawn(|| serve(&listener, moment, &options, &stop));
                for name in ["first", "again"] {
                    let target = dir.path().join(name);
                    qemu_img(&["convert", "-f", "raw", "-O", "raw", &address, target.to_str().unwrap()]);
                }
                let path = socket.display();
                let marks =
                    format!("driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:b");
                let map = qemu_img(&["map", "--output=json", "--image-opts", &marks]);
                assert!(map.contains("\"start\": 1048576, \"length\": 65536"), "{map}");
                stop.stop();
                server.join().unwrap()
            })
        });
        served.unwrap().unwrap();
    });
    let [first, again] = ["first", "again"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
    is_a_moment(&first, "over NBD");
    assert!(first == again, "the moment moved");
}
