//! Every target on its corpus and on a bounded number of inputs made from it. A failure prints the input.
//!
//! `VIREO_FUZZ_ROUNDS` sets how many inputs a target gets, `VIREO_FUZZ_SEED` another order.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rustix::process::{Resource, Rlimit, setrlimit};

/// SplitMix64.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no corpus");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Changes an input where it hurts: bytes, words, lengths, pieces doubled, dropped and taken from another input.
fn mutate(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len());
        let edge = [0u64, 1, u64::MAX, 0x7fff_ffff, 0x8000_0000, 0xffff, 1 << 63][random.below(7)];
        match random.below(8) {
            0 if !data.is_empty() => data[at] = random.next() as u8,
            1 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            2 | 3 => {
                let width = [1, 2, 4, 8][random.below(4)];
                let bytes = if random.below(2) == 0 { edge.to_be_bytes() } else { edge.to_le_bytes() };
                data.iter_mut().skip(at).zip(&bytes[8 - width..]).for_each(|(to, byte)| *to = *byte);
            }
            4 => data.truncate(at),
            5 if data.len() < 1 << 17 => {
                let piece: Vec<u8> = data[at..].iter().take(1 + random.below(64)).copied().collect();
                data.splice(at..at, piece);
            }
            6 => {
                let from = random.below(other.len());
                let piece = other[from..].iter().take(random.below(64)).copied();
                let end = data.len().min(at + random.below(16));
                data.splice(at..end, piece);
            }
            _ => data.extend((0..random.below(32)).map(|_| random.next() as u8)),
        }
    }
}

fn run(target: &str, data: &[u8]) -> bool {
    let outcome = catch_unwind(AssertUnwindSafe(|| fuzz::run(target, data)));
    outcome.unwrap_or_else(|_| panic!("{target} failed on {data:02x?}"))
}

/// Address space that the process may take: a table that is believed where it lies asks for more.
const ADDRESS_SPACE_MAX_BYTES: u64 = 4 << 30;

fn bounded(target: &str, rounds: u64) {
    let limit = Rlimit { current: Some(ADDRESS_SPACE_MAX_BYTES), maximum: None };
    setrlimit(Resource::As, limit).unwrap();
    let corpus = corpus(target);
    let mut random = Random(number("VIREO_FUZZ_SEED", 1));
    // Inputs that the parser takes: changes to them reach what lies behind its first checks.
    let taken = corpus.iter().filter(|data| run(target, data)).count();
    assert!(2 * taken >= corpus.len(), "{target} takes only {taken} of its corpus of {}", corpus.len());
    for _ in 0..number("VIREO_FUZZ_ROUNDS", rounds) {
        let mut data = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        mutate(&mut data, other, &mut random);
        run(target, &data);
    }
}

/// As [`bounded`], with inputs that are a byte of the corpus and then anything: for targets that read an input as changes.
fn invented(target: &str, rounds: u64) {
    bounded(target, rounds / 2);
    let corpus = corpus(target);
    let mut random = Random(number("VIREO_FUZZ_SEED", 1) ^ 0x5eed);
    for _ in 0..number("VIREO_FUZZ_ROUNDS", rounds) / 2 {
        let mut data: Vec<u8> = corpus[random.below(corpus.len())].iter().take(1).copied().collect();
        data.extend((0..8 * (1 + random.below(6))).map(|_| random.next() as u8));
        run(target, &data);
    }
}

#[test]
fn frames() {
    bounded("frames", 30_000);
}
#[test]
fn monitor() {
    bounded("monitor", 10_000);
}
#[test]
fn domain_xml() {
    bounded("domain_xml", 4_000);
}
#[test]
fn qcow2() {
    bounded("qcow2", 6_000);
}
#[test]
fn kernel() {
    bounded("kernel", 1_500);
}
#[test]
fn code() {
    bounded("code", 30_000);
}
#[test]
fn vmdk() {
    invented("vmdk", 6_000);
}
#[test]
fn vdi() {
    invented("vdi", 3_000);
}
#[test]
fn vpc() {
    invented("vpc", 4_000);
}
#[test]
fn vhdx() {
    invented("vhdx", 500);
}
#[test]
fn qcow2_disk() {
    invented("qcow2_disk", 1_000);
}
#[test]
fn luks() {
    invented("luks", 600);
}
#[test]
fn names() {
    bounded("names", 40_000);
}
#[test]
fn nbd() {
    bounded("nbd", 60_000);
}
#[test]
fn deflate() {
    bounded("deflate", 3_000);
}
#[test]
fn ova() {
    bounded("ova", 20_000);
}
#[test]
fn every_target_is_run() {
    let mut names: Vec<&str> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    let tested = [
        "code",
        "deflate",
        "domain_xml",
        "frames",
        "kernel",
        "luks",
        "monitor",
        "names",
        "nbd",
        "ova",
        "qcow2",
        "qcow2_disk",
        "vdi",
        "vhdx",
        "vmdk",
        "vpc",
    ];
    assert_eq!(names, tested);
}
