//! An image with a model of it in memory: random operations done by this tool and by QEMU's in turn, and what must hold
//! afterwards. A failure prints the seed and the operations; the same seed repeats them.
#![allow(dead_code, reason = "each test binary uses its part")]

#[path = "../../../block/tests/support/rng.rs"]
mod rng;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};

pub use rng::Rng;

/// How an image is made, and what can be done with it.
#[derive(Clone, Copy)]
pub struct Kind {
    pub format: &'static str,
    pub options: &'static str,
    /// Over a backing file.
    pub has_backing: bool,
}

pub const fn alone(format: &'static str, options: &'static str) -> Kind {
    Kind { format, options, has_backing: false }
}

pub const fn over_base(options: &'static str) -> Kind {
    Kind { format: "qcow2", options, has_backing: true }
}

pub const KINDS: &[Kind] = &[
    alone("raw", "preallocation=off"),
    alone("qcow2", "cluster_size=4k"),
    alone("qcow2", "cluster_size=512,compat=0.10"),
    alone("qcow2", "cluster_size=64k,compression_type=zstd,lazy_refcounts=on"),
    alone("qcow2", "cluster_size=16k,extended_l2=on"),
    alone("qcow2", "cluster_size=4k,refcount_bits=64,preallocation=metadata"),
    over_base("cluster_size=4k,refcount_bits=8"),
    over_base("cluster_size=16k,extended_l2=on"),
    over_base("cluster_size=1k,compat=0.10"),
    alone("vmdk", "subformat=monolithicSparse"),
    alone("vdi", "preallocation=off"),
    alone("vhdx", "subformat=dynamic"),
    alone("vhdx", "subformat=fixed"),
    alone("vpc", "subformat=dynamic,force_size=on"),
    alone("vpc", "subformat=fixed,force_size=on"),
];

pub const SECTOR: usize = 512;
/// A whole number of the largest blocks of any format, so that all of them keep the size.
pub const SIZE: usize = 4 << 20;

/// An image with what it holds.
pub struct Model {
    pub dir: tempfile::TempDir,
    pub kind: Kind,
    pub rng: Rng,
    pub data: Vec<u8>,
    /// What shows through from below; empty without a backing file.
    pub base: Vec<u8>,
    pub snapshots: BTreeMap<String, Vec<u8>>,
    pub bitmaps: Vec<String>,
    /// How many bitmaps it may have at a time.
    pub bitmaps_max: usize,
    pub done: Vec<String>,
    pub next_name: usize,
}

impl Model {
    pub fn new(kind: Kind, seed: u64) -> Model {
        // Images of different kinds get different numbers.
        let mixed = kind.options.bytes().fold(seed, |mixed, byte| mixed.wrapping_mul(31).wrapping_add(byte.into()));
        let (dir, rng) = (tempfile::tempdir().unwrap(), Rng(mixed.max(1)));
        let mut model = Model {
            dir,
            kind,
            rng,
            data: vec![0; SIZE],
            base: Vec::new(),
            snapshots: BTreeMap::new(),
            bitmaps: Vec::new(),
            bitmaps_max: 3,
            done: vec![format!("seed {seed}, {} {}", kind.format, kind.options)],
            next_name: 0,
        };
        let (format, options) = (kind.format, kind.options);
        if kind.has_backing {
            model.base = (0..SIZE / 2).map(|at| (at / 3000) as u8).collect();
            model.data[..SIZE / 2].copy_from_slice(&model.base);
            std::fs::write(model.path("base.raw"), &model.base).unwrap();
            model.image(&format!("create -q -f {format} -o {options} -b base.raw -F raw image {SIZE}"));
        } else {
            model.image(&format!("create -q -f {format} -o {options} image {SIZE}"));
        }
        model
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, program: &str, words: &[&str]) -> Output {
        let out = Command::new(program).args(words).current_dir(self.dir.path()).env("LC_ALL", "C").output();
        out.unwrap_or_else(|error| panic!("{program} does not start: {error}"))
    }

    pub fn succeed(&mut self, program: &str, words: &[&str]) {
        self.done.push(format!("{} {}", program.rsplit('/').next().unwrap(), words.join(" ")));
        let out = self.call(program, words);
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{}\n{said}", self.done.join("\n"));
    }

    /// A command of qemu-img's, by either tool.
    pub fn image(&mut self, line: &str) {
        let tool = if self.below(3) == 0 { "qemu-img" } else { OURS };
        self.succeed(tool, &line.split(' ').collect::<Vec<_>>());
    }

    /// A command of qemu-io's, by either tool.
    pub fn io(&mut self, command: &str) {
        let format = self.kind.format;
        match self.below(3) {
            0 => self.succeed("qemu-io", &["-d", "unmap", "-f", format, "-c", command, "image"]),
            _ => self.succeed(OURS, &["io", "-d", "unmap", "-f", format, "-c", command, "image"]),
        }
    }

    /// A request of a guest.
    pub fn request(&mut self) {
        let sectors = self.data.len() / SECTOR;
        let longest = [1, 9, 300, 2000][self.below(4)];
        let start = self.below(sectors);
        let count = (1 + self.below(longest)).min(sectors - start);
        let (range, bytes) = (start * SECTOR..(start + count) * SECTOR, count * SECTOR);
        let at = range.start;
        match self.below(8) {
            0 | 1 => {
                let unmap = if self.below(2) == 0 { "-u " } else { "" };
                self.io(&format!("write -z {unmap}{at} {bytes}"));
                self.data[range].fill(0);
            }
            2 => {
                self.io(&format!("discard {at} {bytes}"));
                let seen = self.seen_by("qemu-img");
                for (index, sector) in self.data.chunks_mut(SECTOR).enumerate() {
                    let now = &seen[index * SECTOR..(index + 1) * SECTOR];
                    let free = range.contains(&(index * SECTOR)) && now.iter().all(|byte| *byte == 0);
                    assert!(now == sector || free, "{}: sector {index}", self.done.join("\n"));
                    sector.copy_from_slice(now);
                }
            }
            3 if self.kind.format == "qcow2" => {
                let cluster = 64 << 10;
                let at = at / cluster * cluster;
                let pattern = 1 + self.below(255) as u8;
                // QEMU refuses to compress what is written already.
                let command = format!("write -c -P {pattern} {at} {cluster}");
                self.succeed(OURS, &["io", "-f", "qcow2", "-c", &command, "image"]);
                self.data[at..at + cluster].fill(pattern);
            }
            _ => {
                let pattern = 1 + self.below(255) as u8;
                self.io(&format!("write -P {pattern} {at} {bytes}"));
                self.data[range].fill(pattern);
            }
        }
    }

    /// Something about the image as a whole.
    pub fn maintain(&mut self) {
        let (format, options) = (self.kind.format, self.kind.options);
        match (format, self.below(10)) {
            ("qcow2", 0) if self.snapshots.len() < 3 => {
                let name = self.name("s");
                self.image(&format!("snapshot -c {name} image"));
                self.snapshots.insert(name, self.data.clone());
            }
            ("qcow2", 1) if !self.snapshots.is_empty() => {
                let (name, held) = self.snapshot();
                // Sizes come with a snapshot only in version 3, and bitmaps would have to follow.
                if held.len() == self.data.len() {
                    // QEMU's does not do it to an image with bitmaps.
                    match self.bitmaps.is_empty() {
                        true => self.image(&format!("snapshot -a {name} image")),
                        false => self.succeed(OURS, &["snapshot", "-a", &name, "image"]),
                    }
                    self.data = held;
                }
            }
            ("qcow2", 2) if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshot();
                self.image(&format!("snapshot -d {name} image"));
                self.snapshots.remove(&name);
            }
            ("qcow2", 3) if self.kind.has_backing && self.snapshots.is_empty() && self.data.len() == SIZE => {
                self.image("commit -q image");
                self.base = self.seen("base.raw");
                assert!(self.base == self.data, "{}: base", self.done.join("\n"));
            }
            ("qcow2", 4) if self.kind.has_backing => {
                let kept = self.seen("base.raw");
                let other: Vec<u8> = (0..kept.len()).map(|at| (at / 777) as u8).collect();
                std::fs::write(self.path("other.raw"), &other).unwrap();
                self.image("rebase -f qcow2 -b other.raw -F raw image");
                self.image("rebase -f qcow2 -b base.raw -F raw image");
            }
            ("qcow2", 5) if !options.contains("0.10") && self.bitmaps.len() < self.bitmaps_max => {
                let name = self.name("b");
                self.image(&format!("bitmap --add image {name}"));
                self.bitmaps.push(name);
            }
            ("qcow2", 6) if !self.bitmaps.is_empty() => {
                let name = self.bitmaps.remove(0);
                self.image(&format!("bitmap --remove image {name}"));
            }
            ("qcow2", 7) if !options.contains("0.10") => {
                let lazy = if self.below(2) == 0 { "on" } else { "off" };
                self.image(&format!("amend -f qcow2 -o lazy_refcounts={lazy} image"));
            }
            ("qcow2" | "raw", 8) if !options.contains("0.10") || self.snapshots.is_empty() => {
                let new = SIZE - 65_536 * self.below(8) + 65_536 * self.below(8);
                let shrink = if new < self.data.len() { "--shrink " } else { "" };
                // A snapshot of another size keeps qemu-img from shrinking.
                if shrink.is_empty() || self.snapshots.is_empty() && self.bitmaps.is_empty() {
                    self.image(&format!("resize -q -f {format} {shrink}image {new}"));
                    self.data.resize(new, 0);
                }
            }
            _ if !self.kind.has_backing && self.snapshots.is_empty() && self.bitmaps.is_empty() => {
                self.image(&format!("convert -f {format} -O {format} -o {options} image new"));
                std::fs::rename(self.path("new"), self.path("image")).unwrap();
            }
            _ => self.request(),
        }
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.rng.below(end as u64) as usize
    }

    fn name(&mut self, kind: &str) -> String {
        self.next_name += 1;
        format!("{kind}{}", self.next_name)
    }

    fn snapshot(&mut self) -> (String, Vec<u8>) {
        let index = self.below(self.snapshots.len());
        self.snapshots.iter().nth(index).map(|(name, held)| (name.clone(), held.clone())).unwrap()
    }

    pub fn seen(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// What the image shows to a tool.
    pub fn seen_by(&self, tool: &str) -> Vec<u8> {
        let out = self.call(tool, &["convert", "-f", self.kind.format, "-O", "raw", "image", "seen.raw"]);
        assert!(out.status.success(), "{}: {}", self.done.join("\n"), String::from_utf8_lossy(&out.stderr));
        self.seen("seen.raw")
    }

    /// Both tools see what the model holds, the same map, and nothing wrong.
    pub fn judge(&self) {
        let format = self.kind.format;
        let done = || self.done.join("\n");
        for tool in [OURS, "qemu-img"] {
            let seen = self.seen_by(tool);
            assert_eq!(seen.len(), self.data.len(), "{}: size for {tool}", done());
            let differs = seen.iter().zip(&self.data).position(|(seen, held)| seen != held);
            assert_eq!(differs, None, "{}: contents for {tool}", done());
            let check = self.call(tool, &["check", "-f", format, "image"]);
            let text = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
            assert!(matches!(check.status.code(), Some(0 | 63)), "{}: {tool} check: {text}", done());
        }
        if format == "vhdx" {
            // QEMU does not know where the data of one is.
            return;
        }
        let [ours, theirs] = [OURS, "qemu-img"].map(|tool| {
            let out = self.call(tool, &["map", "-f", format, "--output=json", "image"]);
            serde_json::from_slice::<Vec<serde_json::Value>>(&out.stdout).map(runs)
        });
        assert!(ours.is_ok(), "{}: {ours:?}", done());
        let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
        let differs = ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs);
        assert!(ours == theirs, "{}: maps {differs:?}", done());
    }

    /// Each snapshot still shows what it held.
    pub fn judge_snapshots(&mut self) {
        for (name, held) in std::mem::take(&mut self.snapshots) {
            if held.len() == self.data.len() {
                let out = self.call(OURS, &["convert", "-l", &name, "-f", "qcow2", "-O", "raw", "image", "seen.raw"]);
                assert!(out.status.success() && self.seen("seen.raw") == held, "{}: {name}", self.done.join("\n"));
            }
        }
    }
}

/// A run of a map: where it starts, what it is, where its data is.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    start: u64,
    bytes: u64,
    depth: u64,
    /// Zeroes, data, compressed.
    kind: [bool; 3],
    offset: Option<u64>,
}

/// The runs of a map, neighbours that are one joined. QEMU guesses sometimes that data is a hole of the file, and says
/// then that it is zeroes too.
fn runs(map: Vec<serde_json::Value>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for entry in map {
        let number = |name: &str| entry[name].as_u64();
        let is = |name: &str| entry[name].as_bool().unwrap();
        let next = Run {
            start: number("start").unwrap(),
            bytes: number("length").unwrap(),
            depth: number("depth").unwrap(),
            kind: [is("zero") && !is("data"), is("data"), is("compressed")],
            offset: number("offset").filter(|_| is("data")),
        };
        match runs.last_mut() {
            Some(last)
                if (last.depth, last.kind) == (next.depth, next.kind)
                    && last.offset.map(|offset| offset + last.bytes) == next.offset =>
            {
                last.bytes += next.bytes;
            }
            _ => runs.push(next),
        }
    }
    runs
}

pub const OURS: &str = env!("CARGO_BIN_EXE_vireo-img");

/// The seeds of a run: always the same one, or with `VIREO_TEST_LONG` as many, which are others each time.
/// `VIREO_TEST_SEED` is the one to repeat.
pub fn seeds(long: u64) -> std::ops::Range<u64> {
    let (first, count) = match (std::env::var("VIREO_TEST_SEED"), std::env::var_os("VIREO_TEST_LONG")) {
        (Ok(seed), _) => (seed.parse().expect("VIREO_TEST_SEED is a number"), 1),
        (Err(_), Some(_)) => (std::time::UNIX_EPOCH.elapsed().unwrap().as_secs(), long),
        (Err(_), None) => (1, 1),
    };
    first..first + count
}

/// Whether the installed QEMU is of the release whose texts and maps are compared.
pub fn has_peer() -> bool {
    let version = Command::new("qemu-img").arg("--version").output().unwrap();
    String::from_utf8_lossy(&version.stdout).starts_with("qemu-img version 10.")
}
