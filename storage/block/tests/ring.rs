//! Requests that a ring carries out, beside those that the engine makes itself: the disk is the same for both, clusters
//! under way go to nobody else, and memory that is not the guest's is refused.

mod support;

use std::path::Path;

use block::{Begun, CacheMode, ChainFile, Direction, Disk, Format, OpenOptions, Over, Qcow2Create, Ring};
use block::{Qcow2Image, create_qcow2, create_raw, use_direct_io};
use support::{Rng, open_file, qemu_img};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
/// What one request moves at most.
const MOST: u64 = 128 << 10;
/// Requests under way at once.
const DEPTH: usize = 16;

fn memory() -> Memory {
    // Two regions, so that a request may lie in either.
    Memory::from_ranges(&[(GuestAddress(0), MIB as usize), (GuestAddress(4 * MIB), (DEPTH as u64 * MOST) as usize)])
        .unwrap()
}

fn open(chain: &[(&Path, Format)], direct: bool) -> Disk {
    let files = chain.iter().enumerate().map(|(depth, (path, format))| {
        let file = open_file(path, depth == 0);
        if direct {
            use_direct_io(&file).unwrap();
        }
        ChainFile { file, path_label: path.into(), format: *format, extents: Vec::new() }
    });
    let cache = if direct { CacheMode::None } else { CacheMode::Writeback };
    Disk::open(files.collect(), &OpenOptions { format: chain[0].1, cache, ..OpenOptions::default() }).unwrap()
}

/// A disk that a ring and its caller use at the same time, and what it should hold.
struct Both {
    disk: Disk,
    memory: Memory,
    ring: Ring<AtomicBitmap>,
    holds: Vec<u8>,
    /// What is under way, by its tag: from where, how long, which way.
    flying: Vec<Option<(u64, u64, Direction)>>,
    /// Requests that the ring took.
    taken: [u64; 2],
}

impl Both {
    fn new(disk: Disk) -> Both {
        let memory = memory();
        let mut holds = vec![0; DISK as usize];
        disk.read(0, &mut holds).unwrap();
        let ring = Ring::new(64, memory.clone()).unwrap();
        Both { disk, memory, ring, holds, flying: vec![None; DEPTH], taken: [0; 2] }
    }

    fn place(tag: usize) -> GuestAddress {
        GuestAddress(4 * MIB + tag as u64 * MOST)
    }

    fn over(&mut self, over: Over<u64>) {
        let (offset, bytes, direction) = self.flying[over.tag as usize].take().unwrap();
        assert_eq!((over.bytes, over.direction), (bytes, direction));
        if direction == Direction::Write {
            return assert!(over.good);
        }
        // Where the last cluster of the file is not all there, the ring leaves the read to its caller.
        if !over.good {
            let slice = self.memory.get_slice(Self::place(over.tag as usize), bytes as usize).unwrap();
            self.disk.read_at(offset, &[slice]).unwrap();
        }
        self.compare(over.tag as usize, offset, bytes);
    }

    fn compare(&self, tag: usize, offset: u64, bytes: u64) {
        let mut got = vec![0; bytes as usize];
        self.memory.read_slice(&mut got, Self::place(tag)).unwrap();
        let wrong = got.iter().zip(&self.holds[offset as usize..]).position(|(got, want)| got != want);
        assert_eq!(wrong, None, "{} at {offset}", self.disk.path().display());
    }

    fn wait(&mut self) {
        self.ring.wait().unwrap();
        while let Some(over) = self.ring.next_over(&self.disk) {
            self.over(over);
        }
    }

    /// Nothing that touches the range is under way.
    fn make_room(&mut self, offset: u64, bytes: u64) {
        let touches = |(start, len, _): (u64, u64, Direction)| start < offset + bytes && offset < start + len;
        while self.flying.iter().flatten().any(|flying| touches(*flying)) {
            self.wait();
        }
    }

    fn step(&mut self, rng: &mut Rng) {
        let bytes = (1 + rng.below(MOST / 4096)) * 4096;
        let offset = rng.below((DISK - bytes) / 4096 + 1) * 4096;
        self.make_room(offset, bytes);
        let tag = loop {
            match self.flying.iter().position(Option::is_none) {
                Some(tag) => break tag,
                None => self.wait(),
            }
        };
        let range = offset as usize..(offset + bytes) as usize;
        match rng.below(12) {
            0 => {
                self.disk.write_zeroes(offset, bytes, rng.below(2) == 0).unwrap();
                return self.holds[range].fill(0);
            }
            1 => {
                self.disk.discard(offset, bytes).unwrap();
                return self.disk.read(offset, &mut self.holds[range]).unwrap();
            }
            2 => return self.disk.flush().unwrap(),
            _ => {}
        }
        let direction = if rng.below(2) == 0 { Direction::Read } else { Direction::Write };
        if direction == Direction::Write {
            self.holds[range.clone()].fill(rng.next() as u8);
            self.memory.write_slice(&self.holds[range], Self::place(tag)).unwrap();
        }
        // In two pieces now and then.
        let memory = self.memory.clone();
        let piece =
            |from: u64, len: u64| memory.get_slice(GuestAddress(Self::place(tag).0 + from), len as usize).unwrap();
        let cut = rng.below(bytes / 4096) * 4096;
        let whole = if cut == 0 { vec![piece(0, bytes)] } else { vec![piece(0, cut), piece(cut, bytes - cut)] };
        let begun = match direction {
            Direction::Read => self.ring.read(&self.disk, offset, &whole, tag as u64),
            Direction::Write => self.ring.write(&self.disk, offset, &whole, tag as u64),
        };
        match (begun, direction) {
            (Begun::UnderWay, _) => {
                self.taken[(direction == Direction::Write) as usize] += 1;
                self.flying[tag] = Some((offset, bytes, direction));
                if rng.below(3) == 0 {
                    self.ring.submit().unwrap();
                }
            }
            (Begun::Done, _) => self.compare(tag, offset, bytes),
            (Begun::Refused, Direction::Write) => self.disk.write_at(offset, &whole).unwrap(),
            (Begun::Refused, Direction::Read) => {
                self.disk.read_at(offset, &whole).unwrap();
                self.compare(tag, offset, bytes);
            }
        }
    }

    fn finish(mut self) -> [u64; 2] {
        self.make_room(0, DISK);
        assert_eq!(self.ring.under_way(), 0);
        let mut got = vec![0; DISK as usize];
        self.disk.read(0, &mut got).unwrap();
        assert!(got == self.holds);
        self.disk.flush().unwrap();
        self.taken
    }
}

#[test]
fn a_ring_and_its_caller_see_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    create_qcow2(&base, DISK, &Qcow2Create::default()).unwrap();
    open(&[(&base, Format::Qcow2)], false).write(MIB, &vec![7; 3 * MIB as usize]).unwrap();
    let plain = Qcow2Create::default();
    let extended = Qcow2Create { extended_l2: true, ..Qcow2Create::default() };
    for direct in [true, false] {
        for (name, format, create, below) in [
            ("raw", Format::Raw, None, false),
            ("qcow2", Format::Qcow2, Some(&plain), false),
            ("chain", Format::Qcow2, Some(&plain), true),
            ("extended", Format::Qcow2, Some(&extended), true),
        ] {
            let image = dir.path().join(format!("{name}-{direct}"));
            match create {
                None => create_raw(&image, DISK).unwrap(),
                Some(create) if below => {
                    let backing = Some(("base.qcow2".into(), "qcow2".into()));
                    create_qcow2(&image, DISK, &Qcow2Create { backing, ..create.clone() }).unwrap();
                }
                Some(create) => create_qcow2(&image, DISK, create).unwrap(),
            }
            let chain: &[(&Path, Format)] =
                if below { &[(&image, format), (&base, Format::Qcow2)] } else { &[(&image, format)] };
            let mut both = Both::new(open(chain, direct));
            let mut rng = Rng(77 + u64::from(direct));
            (0..1500).for_each(|_| both.step(&mut rng));
            let [reads, writes] = both.finish();
            if direct {
                assert!(reads > 50 && writes > 50, "{name}: the ring took {reads} reads and {writes} writes");
            }
            if format == Format::Qcow2 {
                qemu_img(&["check", image.to_str().unwrap()]);
            }
        }
    }
}

#[test]
fn a_cluster_that_is_being_written_goes_to_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    create_qcow2(&image, DISK, &Qcow2Create::default()).unwrap();
    let disk = open(&[(&image, Format::Qcow2)], true);
    let cluster = disk.cluster_bytes();
    disk.write(0, &vec![1; cluster as usize]).unwrap();
    disk.flush().unwrap();
    let memory = memory();
    let mut ring = Ring::new(8, memory.clone()).unwrap();
    memory.write_slice(&[2; 4096], GuestAddress(0)).unwrap();
    let piece = memory.get_slice(GuestAddress(0), 4096).unwrap();
    assert_eq!(ring.write(&disk, 0, &[piece], 1), Begun::UnderWay);
    // The request found its cluster. Now the guest gives it up, and others look for room.
    disk.discard(0, cluster).unwrap();
    (0..3).for_each(|_| disk.flush().unwrap());
    disk.write(cluster, &vec![3; 2 * cluster as usize]).unwrap();
    disk.flush().unwrap();
    ring.wait().unwrap();
    assert_eq!(ring.next_over(&disk), Some(Over { tag: 1, direction: Direction::Write, bytes: 4096, good: true }));
    let mut got = vec![0; 3 * cluster as usize];
    disk.read(0, &mut got).unwrap();
    let (gone, others) = got.split_at(cluster as usize);
    assert!(gone.iter().all(|byte| *byte == 0) && others.iter().all(|byte| *byte == 3));
    // Once it has landed, the room is there.
    (0..3).for_each(|_| disk.flush().unwrap());
    let before = disk.counters().allocated_bytes;
    disk.write(4 * cluster, &vec![4; cluster as usize]).unwrap();
    disk.flush().unwrap();
    let names = disk.qcow2().map(|image: Qcow2Image| image.snapshots().unwrap().len());
    assert_eq!((names, disk.counters().allocated_bytes <= before + cluster), (Some(0), true));
    qemu_img(&["check", image.to_str().unwrap()]);
}

#[test]
fn what_a_ring_cannot_do_is_left_to_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    create_raw(&image, DISK).unwrap();
    // The last sector of the disk is not all in the file.
    open_file(&image, true).set_len(DISK + 100).unwrap();
    let disk = open(&[(&image, Format::Raw)], true);
    let memory = memory();
    let mut ring = Ring::new(1, memory.clone()).unwrap();
    let piece = |at: u64, bytes: usize| memory.get_slice(GuestAddress(at), bytes).unwrap();
    let mut elsewhere = vec![0; 8192];
    let elsewhere = VolatileSlice::from(&mut elsewhere[..]);
    for (what, offset, begun) in [
        ("another's memory", 0, ring.read(&disk, 0, &[elsewhere], 0)),
        ("memory that is not aligned", 0, ring.read(&disk, 0, &[piece(512, 4096)], 0)),
        ("a place that is not aligned", 512, ring.write(&disk, 512, &[piece(0, 4096)], 0)),
        ("what lies past the end", DISK, ring.read(&disk, DISK, &[piece(0, 4096)], 0)),
        ("nothing", 0, ring.read(&disk, 0, &[] as &[VolatileSlice<'_>], 0)),
    ] {
        assert_eq!(begun, Begun::Refused, "{what} at {offset}");
    }
    assert_eq!(ring.read(&disk, 0, &[piece(0, 4096)], 5), Begun::UnderWay);
    assert_eq!(ring.read(&disk, 0, &[piece(4096, 4096)], 6), Begun::Refused, "there is room for one");
    ring.wait().unwrap();
    assert!(ring.next_over(&disk).is_some_and(|over| over.tag == 5 && over.good));
    assert_eq!(ring.next_over(&disk), None);
    // A file that became shorter than the disk: the engine fills what is missing with zeroes.
    open_file(&image, true).set_len(4096).unwrap();
    assert_eq!(ring.read(&disk, 0, &[piece(0, 8192)], 7), Begun::UnderWay);
    ring.wait().unwrap();
    assert!(ring.next_over(&disk).is_some_and(|over| over.tag == 7 && !over.good));
    let read_only = OpenOptions { read_only: true, format: Format::Raw, ..OpenOptions::default() };
    let disk = support::open_chain(&[(&image, Format::Raw)], &read_only);
    assert_eq!(ring.write(&disk, 0, &[piece(0, 4096)], 0), Begun::Refused, "a disk that is read only");
}

#[test]
fn pages_are_marked_when_their_data_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    create_raw(&image, DISK).unwrap();
    for direct in [true, false] {
        let disk = open(&[(&image, Format::Raw)], direct);
        let memory = memory();
        let mut ring = Ring::new(8, memory.clone()).unwrap();
        let at = GuestAddress(4 * MIB + 8192);
        let region = memory.find_region(at).unwrap();
        let begun = ring.read(&disk, 0, &[memory.get_slice(at, 4096).unwrap()], 0);
        assert!(direct || begun != Begun::Refused);
        ring.wait().unwrap();
        if begun == Begun::UnderWay {
            assert!(!region.bitmap().dirty_at(8192), "a migration would send the page before its data is there");
        }
        while ring.next_over(&disk).is_some() {}
        assert!(region.bitmap().dirty_at(8192) && !region.bitmap().dirty_at(12288) && !region.bitmap().dirty_at(0));
        // A ring that goes away waits for what is under way, and its clusters land.
        let _ = ring.write(&disk, 0, &[memory.get_slice(at, 4096).unwrap()], 1);
        drop(ring);
    }
}
