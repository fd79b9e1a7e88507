//! Random operations of every kind, done here or by qemu-img, against a model in memory: the disk, its snapshots, and
//! what each bitmap must have recorded. A failure prints its seed, and the seed replays it.

mod support;

use std::path::{Path, PathBuf};

use block::{Amend, Disk, Format, OpenOptions, Preallocation};
use support::{Rng, open_chain, open_image, qemu_check, qemu_img, qemu_raw};

const BASE_BYTES: u64 = 700_000 / 512 * 512;

struct Snapshot {
    id: u64,
    data: Vec<u8>,
}

struct BitmapModel {
    name: String,
    enabled: bool,
    /// Sectors that changed while it recorded.
    dirty: Vec<bool>,
}

struct Model {
    path: PathBuf,
    base: Option<PathBuf>,
    version: u32,
    data: Vec<u8>,
    snapshots: Vec<Snapshot>,
    next_id: u64,
    bitmaps: Vec<BitmapModel>,
    next_name: u64,
    /// One bit of refcount cannot be shared.
    shares: bool,
    extended: bool,
}

impl Model {
    fn open(&self) -> Disk {
        let mut files: Vec<(&Path, Format)> = vec![(&self.path, Format::Qcow2)];
        files.extend(self.base.as_deref().map(|base| (base, Format::Raw)));
        open_chain(&files, &OpenOptions::default())
    }

    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn changed(&mut self, range: std::ops::Range<usize>) {
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.dirty[range.start / 512..range.end.div_ceil(512)].fill(true);
        }
    }

    fn resized(&mut self, bytes: u64) {
        self.data.resize(bytes as usize, 0);
        self.bitmaps.iter_mut().for_each(|bitmap| bitmap.dirty.resize(bytes as usize / 512, false));
    }

    fn guest(&mut self, disk: &Disk, rng: &mut Rng) {
        let sectors = self.data.len() as u64 / 512;
        let start = rng.below(sectors);
        let longest = [1, 9, 300][rng.below(3) as usize];
        let count = (1 + rng.below(longest)).min(sectors - start);
        let (at, bytes) = (start * 512, count * 512);
        let range = at as usize..(at + bytes) as usize;
        match rng.below(6) {
            0 => {
                disk.write_zeroes(at, bytes, rng.below(2) == 0).unwrap();
                self.data[range.clone()].fill(0);
            }
            1 => {
                disk.discard(at, bytes).unwrap();
                let before = self.data[range.clone()].to_vec();
                disk.read(at, &mut self.data[range.clone()]).unwrap();
                // Parts of clusters stay as they are, and no bitmap has to say anything about them.
                for (index, was) in before.chunks(512).enumerate() {
                    let sector = range.start + index * 512..range.start + (index + 1) * 512;
                    if was != &self.data[sector.clone()] {
                        assert!(self.data[sector.clone()].iter().all(|byte| *byte == 0), "a discard left other data");
                        self.changed(sector);
                    }
                }
                return;
            }
            2 => {
                let cluster = disk.cluster_bytes();
                let at = at - at % cluster;
                let end = (at + cluster).min(self.data.len() as u64);
                let range = at as usize..end as usize;
                let seed = rng.next();
                let plain: Vec<u8> = (0..range.len() as u64).map(|i| (i / 50 + seed) as u8 | 1).collect();
                let mut packed = Vec::new();
                if disk.pack(&plain, &mut packed).unwrap() {
                    disk.write_packed(at, &packed, plain.len() as u64).unwrap();
                    self.data[range.clone()].copy_from_slice(&plain);
                    self.changed(range);
                }
                return;
            }
            _ => {
                let seed = rng.next();
                let plain: Vec<u8> = (0..bytes).map(|i| (i / 50 + seed) as u8 | 1).collect();
                disk.write(at, &plain).unwrap();
                self.data[range.clone()].copy_from_slice(&plain);
            }
        }
        self.changed(range);
    }

    /// An operation on the image as a whole, on the open disk.
    fn maintain(&mut self, disk: &Disk, rng: &mut Rng) {
        let image = disk.qcow2().unwrap();
        match rng.below(8) {
            0 if self.shares && self.snapshots.len() < 3 => {
                let name = format!("s{}", self.next_id);
                let id = if rng.below(3) == 0 {
                    image.create_snapshot_with_state(&name, &Default::default(), &mut [1; 5000].as_slice()).unwrap()
                } else {
                    image.create_snapshot(&name, &Default::default()).unwrap()
                };
                self.took(id.parse().unwrap());
            }
            1 if !self.snapshots.is_empty() => {
                let index = rng.below(self.snapshots.len() as u64) as usize;
                image.apply_snapshot(&format!("s{}", self.snapshots[index].id)).unwrap();
                self.applied(index);
            }
            2 if !self.snapshots.is_empty() => {
                let index = rng.below(self.snapshots.len() as u64) as usize;
                image.delete_snapshot(&format!("s{}", self.snapshots[index].id)).unwrap();
                self.deleted(index);
            }
            3 if self.version == 3 || self.snapshots.is_empty() => {
                let bytes = (1 + rng.below(2000)) * 512;
                let room = [Preallocation::Off, Preallocation::Metadata][rng.below(2) as usize];
                disk.resize(bytes, true, room).unwrap();
                self.resized(bytes);
            }
            4 if self.version == 3 && self.bitmaps.len() < 3 => {
                let name = format!("b{}", self.next_name);
                self.next_name += 1;
                let enabled = rng.below(4) > 0;
                image.add_bitmap(&name, 512 << rng.below(8), enabled).unwrap();
                self.bitmaps.push(BitmapModel { name, enabled, dirty: vec![false; self.data.len() / 512] });
            }
            5 if !self.bitmaps.is_empty() => {
                let index = rng.below(self.bitmaps.len() as u64) as usize;
                let bitmap = &mut self.bitmaps[index];
                match rng.below(3) {
                    0 => {
                        image.remove_bitmap(&bitmap.name).unwrap();
                        self.bitmaps.remove(index);
                    }
                    1 => {
                        image.clear_bitmap(&bitmap.name).unwrap();
                        bitmap.dirty.fill(false);
                    }
                    _ => {
                        bitmap.enabled = !bitmap.enabled;
                        image.enable_bitmap(&bitmap.name, bitmap.enabled).unwrap();
                    }
                }
            }
            6 => {
                let order = if self.version == 2 { 4 } else { [2, 3, 4, 6][rng.below(4) as usize] };
                image.amend(&Amend { refcount_order: Some(order), ..Amend::default() }).unwrap();
                self.shares = true;
            }
            7 if self.bitmaps.is_empty() && !self.extended && rng.below(3) == 0 => {
                self.version = 5 - self.version;
                let amend = Amend { version: Some(self.version), refcount_order: Some(4), ..Amend::default() };
                image.amend(&amend).unwrap();
                self.shares = true;
            }
            _ => disk.flush().unwrap(),
        }
    }

    fn took(&mut self, id: u64) {
        assert!(id < self.next_id + 1);
        self.snapshots.push(Snapshot { id: self.next_id, data: self.data.clone() });
        self.next_id += 1;
    }

    fn applied(&mut self, index: usize) {
        self.data = self.snapshots[index].data.clone();
        let sectors = self.data.len() / 512;
        for bitmap in &mut self.bitmaps {
            bitmap.dirty.resize(sectors, false);
            // All of the disk may have changed.
            if bitmap.enabled {
                bitmap.dirty.fill(true);
            }
        }
    }

    fn deleted(&mut self, index: usize) {
        self.snapshots.remove(index);
    }

    /// The same, by qemu-img on the closed image.
    fn by_qemu(&mut self, rng: &mut Rng) {
        let name = self.name().to_owned();
        match rng.below(5) {
            0 if self.shares && self.snapshots.len() < 3 => {
                qemu_img(&["snapshot", "-c", &format!("s{}", self.next_id), &name]);
                self.took(self.next_id);
            }
            // What QEMU does to bitmaps there is its own affair.
            1 if !self.snapshots.is_empty() && self.bitmaps.is_empty() => {
                let index = rng.below(self.snapshots.len() as u64) as usize;
                qemu_img(&["snapshot", "-a", &format!("s{}", self.snapshots[index].id), &name]);
                self.applied(index);
            }
            2 if !self.snapshots.is_empty() => {
                let index = rng.below(self.snapshots.len() as u64) as usize;
                qemu_img(&["snapshot", "-d", &format!("s{}", self.snapshots[index].id), &name]);
                self.deleted(index);
            }
            // QEMU cannot hide a longer backing file in version 2.
            3 if self.version == 3 || (self.snapshots.is_empty() && self.base.is_none()) => {
                let bytes = self.data.len() as u64 + rng.below(500) * 512;
                qemu_img(&["resize", "-f", "qcow2", &name, &bytes.to_string()]);
                self.resized(bytes);
            }
            4 if self.version == 3 && self.bitmaps.len() < 3 => {
                let bitmap = format!("b{}", self.next_name);
                self.next_name += 1;
                qemu_img(&["bitmap", "--add", "-g", "4096", &name, &bitmap]);
                let dirty = vec![false; self.data.len() / 512];
                self.bitmaps.push(BitmapModel { name: bitmap, enabled: true, dirty });
            }
            _ => {}
        }
    }

    fn check(&self, what: &str) {
        qemu_check(&self.path, what);
        assert!(qemu_raw(&self.path) == self.data, "{what}: the disk");
        let image = open_image(&self.path);
        let bitmaps = image.bitmaps().unwrap();
        assert_eq!(bitmaps.len(), self.bitmaps.len(), "{what}");
        for (have, want) in bitmaps.iter().zip(&self.bitmaps) {
            assert_eq!((&have.name, have.enabled, have.inconsistent), (&want.name, want.enabled, false), "{what}");
            let mut marked = vec![false; want.dirty.len()];
            for (offset, bytes) in image.bitmap_bits(&have.name).unwrap().ranges() {
                marked[offset as usize / 512..(offset + bytes) as usize / 512].fill(true);
            }
            let missed = want.dirty.iter().zip(&marked).position(|(dirty, marked)| *dirty && !marked);
            assert_eq!(missed, None, "{what}: bitmap {} misses a sector", want.name);
        }
        drop(image);
        for snapshot in &self.snapshots {
            let mut files: Vec<(&Path, Format)> = vec![(&self.path, Format::Qcow2)];
            files.extend(self.base.as_deref().map(|base| (base, Format::Raw)));
            let shown = open_chain(&files, &OpenOptions { read_only: true, ..OpenOptions::default() });
            shown.qcow2().unwrap().show_snapshot(&format!("s{}", snapshot.id)).unwrap();
            assert!(support::contents(&shown) == snapshot.data, "{what}: snapshot {}", snapshot.id);
        }
    }
}

fn run(options: &str, backing: bool, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut data = vec![0; BASE_BYTES as usize];
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    let base = backing.then(|| dir.path().join("base.raw"));
    if let Some(base) = &base {
        data = (0..BASE_BYTES).map(|i| (i / 333) as u8).collect();
        std::fs::write(base, &data).unwrap();
        args.extend(["-b", "base.raw", "-F", "raw"]);
    }
    let size = BASE_BYTES.to_string();
    args.extend([path.to_str().unwrap(), &size]);
    qemu_img(&args);
    let mut model = Model {
        path,
        base,
        version: if options.contains("0.10") { 2 } else { 3 },
        data,
        snapshots: Vec::new(),
        next_id: 1,
        bitmaps: Vec::new(),
        next_name: 0,
        shares: !options.ends_with("refcount_bits=1"),
        extended: options.contains("extended_l2") || options.contains("zstd"),
    };
    let mut rng = Rng(seed);
    for round in 0..6 {
        let disk = model.open();
        for _ in 0..25 {
            match rng.below(4) {
                0 => model.maintain(&disk, &mut rng),
                _ => model.guest(&disk, &mut rng),
            }
        }
        let what = format!("{options} backing {backing} seed {seed:#x} round {round}");
        assert!(support::contents(&disk) == model.data, "{what}: the open disk");
        drop(disk);
        model.check(&what);
        model.by_qemu(&mut rng);
        model.check(&format!("{what}, after qemu-img"));
    }
}

#[test]
fn images_hold_what_the_model_holds() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k,lazy_refcounts=on",
        "cluster_size=4k,compat=0.10",
        "cluster_size=1k,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,compression_type=zstd",
    ] {
        // `MODEL_SEEDS` asks for a longer run.
        let seeds = std::env::var("MODEL_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(3u64);
        for seed in 0x51..0x51 + seeds {
            let backing = seed % 2 == 0;
            run(options, backing, seed);
        }
    }
}
