//! `bench image`: what people do with qemu-img, by both tools in turn.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::packages::{self, Consent};
use crate::programs;
use crate::run::{run, say, target};
use crate::usage;

const MIB: u64 = 1 << 20;
/// Size of the disk that is copied around.
const DISK_MIB: u64 = 2048;
/// Runs of each tool, interleaved, now one first and now the other. The cheapest counts.
const RUNS: usize = 3;
/// What the tool is measured against.
const PEER: &str = "qemu-img";
/// Memory that is touched before each run that fills a disk, at most: more than it fills, the page cache included.
const WARM_MIB: u64 = 2560;

/// What must be there before a run.
enum Before {
    Nothing,
    /// `w.qcow2` is a copy of the disk.
    Copy,
    /// The same, with a snapshot `s1`.
    Snapshot,
    /// `b.qcow2` is empty, `w.qcow2` is a copy of the disk on top of it.
    Overlay,
    /// `w.qcow2` is empty on top of the disk.
    EmptyOverlay,
    /// `w.qcow2` is empty.
    Empty,
    /// The peer's NBD server serves the disk.
    Served,
    /// The tool's own NBD server serves the disk, to the peer. Its memory and CPU time count, not the client's.
    Serving,
}

/// What a result must be equal to `base.raw` in.
const SAME: Option<&str> = Some("out");

struct Job {
    name: &'static str,
    /// Arguments; `out` is a name that does not exist yet.
    args: &'static str,
    before: Before,
    /// The file whose contents must be the disk's afterwards.
    same: Option<&'static str>,
}

const fn job(name: &'static str, args: &'static str, same: Option<&'static str>) -> Job {
    Job { name, args, before: Before::Nothing, same }
}

const fn on(before: Before, name: &'static str, args: &'static str, same: Option<&'static str>) -> Job {
    Job { name, args, before, same }
}

const JOBS: &[Job] = &[
    job("create-qcow2", "create -q -f qcow2 out 2048M", None),
    job("create-qcow2-1T", "create -q -f qcow2 out 1T", None),
    job("create-qcow2-prealloc-metadata", "create -q -f qcow2 -o preallocation=metadata out 2048M", None),
    job("create-qcow2-falloc", "create -q -f qcow2 -o preallocation=falloc out 2048M", None),
    job("raw-to-qcow2", "convert -f raw -O qcow2 base.raw out", SAME),
    job("raw-to-qcow2-W", "convert -W -f raw -O qcow2 base.raw out", SAME),
    job("raw-to-qcow2-direct", "convert -t none -T none -f raw -O qcow2 base.raw out", SAME),
    job("qcow2-to-raw", "convert -f qcow2 -O raw r.qcow2 out", SAME),
    job("qcow2-to-raw-direct", "convert -t none -T none -f qcow2 -O raw r.qcow2 out", SAME),
    job("raw-to-raw", "convert -f raw -O raw base.raw out", SAME),
    job("to-qcow2-zlib-m2", "convert -c -m 2 -f raw -O qcow2 base.raw out", SAME),
    job("to-qcow2-zstd-m2", "convert -c -m 2 -f raw -O qcow2 -o compression_type=zstd base.raw out", SAME),
    job("zlib-qcow2-to-raw", "convert -f qcow2 -O raw z.qcow2 out", SAME),
    job("zstd-qcow2-to-raw", "convert -f qcow2 -O raw zs.qcow2 out", SAME),
    job("to-vmdk-streamOptimized", "convert -f raw -O vmdk -o subformat=streamOptimized base.raw out", SAME),
    job("vmdk-streamOptimized-to-qcow2", "convert -f vmdk -O qcow2 s.vmdk out", SAME),
    job("to-vhdx", "convert -f raw -O vhdx base.raw out", SAME),
    job("info-json", "info --output=json r.qcow2", None),
    job("check", "check -q r.qcow2", None),
    job("map-json", "map --output=json r.qcow2", None),
    job("measure", "measure -f raw -O qcow2 base.raw", None),
    job("compare-raw-qcow2", "compare -q -f raw -F qcow2 base.raw r.qcow2", None),
    on(Before::Copy, "snapshot-create", "snapshot -c s1 w.qcow2", None),
    on(Before::Snapshot, "snapshot-apply", "snapshot -a s1 w.qcow2", None),
    on(Before::Snapshot, "snapshot-delete", "snapshot -d s1 w.qcow2", None),
    on(Before::Copy, "resize-grow", "resize -q w.qcow2 4G", None),
    on(Before::Overlay, "commit", "commit -q -f qcow2 w.qcow2", Some("b.qcow2")),
    on(Before::EmptyOverlay, "rebase-flatten", "rebase -q -f qcow2 -b {} w.qcow2", Some("w.qcow2")),
    on(
        Before::Empty,
        "bench-4k-alloc-write-writeback",
        "bench -c 4096 -d 16 -s 4096 -S 65536 -w -t writeback -f qcow2 w.qcow2",
        None,
    ),
    on(
        Before::Copy,
        "bench-4k-overwrite-writeback",
        "bench -c 16384 -d 16 -s 4096 -S 69632 -w -t writeback -f qcow2 w.qcow2",
        None,
    ),
    job("bench-4k-read-writeback", "bench -c 16384 -d 16 -s 4096 -S 69632 -t writeback -f qcow2 r.qcow2", None),
    on(
        Before::Empty,
        "bench-4k-alloc-write-none",
        "bench -c 4096 -d 16 -s 4096 -S 65536 -w -t none -f qcow2 w.qcow2",
        None,
    ),
    on(
        Before::Copy,
        "bench-4k-overwrite-none",
        "bench -c 16384 -d 16 -s 4096 -S 69632 -w -t none -f qcow2 w.qcow2",
        None,
    ),
    job("bench-4k-read-none", "bench -c 16384 -d 16 -s 4096 -S 69632 -t none -f qcow2 r.qcow2", None),
    on(
        Before::Empty,
        "bench-4k-alloc-write-flush64",
        "bench -c 4096 -d 16 -s 4096 -S 65536 -w --flush-interval=64 -t none -f qcow2 w.qcow2",
        None,
    ),
    on(Before::Served, "nbd-read", "convert -f raw -O raw nbd+unix:///?socket=nbd.sock out", SAME),
    on(Before::Serving, "nbd-serve", "convert -f raw -O raw nbd+unix:///?socket=nbd.sock out", SAME),
];

/// One run of one tool.
#[derive(Clone, Copy, Default)]
struct Cost {
    wall_s: f64,
    cpu_s: f64,
    rss_mib: f64,
    out_mib: f64,
}

/// The least of both tools for a job.
struct Outcome {
    name: &'static str,
    ours: Cost,
    peer: Cost,
}

pub fn go(consent: Consent, only: Option<&str>) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::TEST, packages::TIME], consent)?;
    let ours = programs::image_tool()?;
    let dir = target().join("bench-image");
    fs::create_dir_all(&dir)?;
    say("making the disk: 2 GiB, half of it holes, a quarter random, a quarter text");
    prepare(&dir)?;
    println!(
        "\nimage: {:<31} {:>9} {:>9} {:>6} | {:>9} {:>9} {:>6} | {:>6} {:>6} {:>6} | {:>6}",
        "CPU s:", "vireo", "qemu-img", "ratio", "wall s", "qemu-img", "ratio", "RSS", "qemu", "ratio", "bytes"
    );
    let mut outcomes = Vec::new();
    for job in JOBS.iter().filter(|job| only.is_none_or(|only| job.name.contains(only))) {
        match outcome(&dir, job, &ours) {
            Ok(outcome) => {
                print_line(&outcome);
                outcomes.push(outcome);
            }
            Err(error) => println!("image: {:<31} FAILS: {error:#}", job.name),
        }
    }
    summary(&outcomes);
    if only.is_some() {
        say(format!("the disk stays in {} for the next run of some lines", dir.display()));
        return Ok(());
    }
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
}

fn outcome(dir: &Path, job: &Job, ours: &Path) -> Result<Outcome> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let peer = Path::new(PEER);
    for run in 0..RUNS {
        for turn in [run, run + 1] {
            match turn % 2 {
                0 => a.push(run_once(dir, job, ours)?),
                _ => b.push(run_once(dir, job, peer)?),
            }
        }
    }
    let least = |costs: &[Cost]| {
        let pick = |f: fn(&Cost) -> f64| costs.iter().map(f).fold(f64::INFINITY, f64::min);
        Cost {
            wall_s: pick(|c| c.wall_s),
            cpu_s: pick(|c| c.cpu_s),
            rss_mib: pick(|c| c.rss_mib),
            out_mib: pick(|c| c.out_mib),
        }
    };
    Ok(Outcome { name: job.name, ours: least(&a), peer: least(&b) })
}

fn print_line(Outcome { name, ours, peer }: &Outcome) {
    println!(
        "image: {name:<31} {:>9.4} {:>9.4} {:>6.2} | {:>9.3} {:>9.3} {:>6.2} | {:>6.1} {:>6.1} {:>6.2} | {:>6.3}",
        ours.cpu_s,
        peer.cpu_s,
        ours.cpu_s / peer.cpu_s,
        ours.wall_s,
        peer.wall_s,
        ours.wall_s / peer.wall_s,
        ours.rss_mib,
        peer.rss_mib,
        ours.rss_mib / peer.rss_mib,
        if peer.out_mib > 0.0 { ours.out_mib / peer.out_mib } else { 1.0 },
    );
}

/// What the tool has to keep to, each as a ratio to the peer: at most `most`, on every line that `lines` names, or as a
/// geometric mean over all of them.
struct Bar {
    what: &'static str,
    figure: fn(&Cost) -> f64,
    most: f64,
    lines: Lines,
}

enum Lines {
    Mean,
    Each,
    /// Those whose name begins with one of these.
    Named(&'static [&'static str]),
}

const QUICK: Lines = Lines::Named(&["info", "check", "map", "snapshot"]);
const BARS: &[Bar] = &[
    Bar { what: "CPU, geometric mean", figure: |c| c.cpu_s, most: 0.6, lines: Lines::Mean },
    Bar { what: "wall, geometric mean", figure: |c| c.wall_s, most: 0.6, lines: Lines::Mean },
    Bar { what: "CPU of each line", figure: |c| c.cpu_s, most: 1.0, lines: Lines::Each },
    Bar { what: "wall of each line", figure: |c| c.wall_s, most: 1.0, lines: Lines::Each },
    Bar { what: "peak memory of each line", figure: |c| c.rss_mib, most: 0.5, lines: Lines::Each },
    Bar { what: "CPU of info, check, map, snapshot", figure: |c| c.cpu_s, most: 0.8, lines: QUICK },
    Bar { what: "CPU of zlib", figure: |c| c.cpu_s, most: 0.5, lines: Lines::Named(&["to-qcow2-zlib"]) },
    Bar { what: "bytes of zlib", figure: |c| c.out_mib, most: 1.01, lines: Lines::Named(&["to-qcow2-zlib"]) },
    Bar {
        what: "wall of streamOptimized",
        figure: |c| c.wall_s,
        most: 0.5,
        lines: Lines::Named(&["to-vmdk-streamOptimized"]),
    },
];

impl Bar {
    fn ratio(&self, outcome: &Outcome) -> f64 {
        (self.figure)(&outcome.ours) / (self.figure)(&outcome.peer)
    }

    /// What it comes to over the lines it is about: the mean, or the worst of them; and the lines that miss it.
    fn judge<'o>(&self, outcomes: &'o [Outcome]) -> Option<(f64, Vec<(&'o str, f64)>)> {
        let named = |outcome: &&Outcome| match self.lines {
            Lines::Named(names) => names.iter().any(|name| outcome.name.starts_with(name)),
            Lines::Mean | Lines::Each => true,
        };
        let ratios: Vec<(&str, f64)> = outcomes.iter().filter(named).map(|o| (o.name, self.ratio(o))).collect();
        if ratios.is_empty() {
            return None;
        }
        if let Lines::Mean = self.lines {
            let logs: f64 = ratios.iter().map(|(_, ratio)| ratio.ln()).sum();
            return Some(((logs / ratios.len() as f64).exp(), Vec::new()));
        }
        let worst = ratios.iter().map(|(_, ratio)| *ratio).fold(0.0, f64::max);
        Some((worst, ratios.into_iter().filter(|(_, ratio)| *ratio > self.most).collect()))
    }
}

/// Every bar, whether it is met, and which lines miss it.
fn summary(outcomes: &[Outcome]) {
    println!();
    for bar in BARS {
        let Some((ratio, missing)) = bar.judge(outcomes) else { continue };
        let met = if ratio <= bar.most { "met" } else { "MISSED" };
        println!("bar: {:<34} at most {:>4.2}: {met}, {ratio:.2}", bar.what, bar.most);
        for (name, ratio) in missing {
            println!("bar:   {name}: {ratio:.2}");
        }
    }
}

/// Makes what jobs read, once, with the peer's tool.
fn prepare(dir: &Path) -> Result<()> {
    let base = dir.join("base.raw");
    if !base.exists() {
        let partial = dir.join("base.partial");
        make_disk(&partial, DISK_MIB)?;
        fs::rename(&partial, &base)?;
    }
    for args in [
        "convert -f raw -O qcow2 base.raw r.qcow2",
        "convert -c -m 2 -W -f raw -O qcow2 base.raw z.qcow2",
        "convert -c -m 2 -W -f raw -O qcow2 -o compression_type=zstd base.raw zs.qcow2",
        "convert -f raw -O vmdk -o subformat=streamOptimized base.raw s.vmdk",
    ] {
        if !dir.join(args.rsplit(' ').next().unwrap_or_default()).exists() {
            run(Command::new(PEER).current_dir(dir).args(args.split(' ')))?;
        }
    }
    Ok(())
}

/// Runs of 1 to 16 MiB: half of them holes, a quarter random bytes, a quarter words. The same in every run.
pub fn make_disk(path: &Path, disk_mib: u64) -> Result<()> {
    let mut state = 0x0123_4567_89ab_cdefu64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<String> =
        (0..4096).map(|_| (0..2 + next() % 9).map(|_| char::from(b'a' + (next() % 26) as u8)).collect()).collect();
    let file = File::create(path)?;
    file.set_len(disk_mib * MIB)?;
    let mut at = 0;
    while at < disk_mib {
        let run_mib = (1 + next() % 16).min(disk_mib - at);
        let kind = next() % 4;
        for mib in at..at + if kind < 2 { 0 } else { run_mib } {
            let mut bytes = Vec::with_capacity(MIB as usize + 128);
            while bytes.len() < MIB as usize {
                if kind == 2 {
                    bytes.extend(next().to_le_bytes());
                    continue;
                }
                for _ in 0..12 {
                    bytes.extend(words[(next() % 4096) as usize].as_bytes());
                    bytes.push(b' ');
                }
                bytes.push(b'\n');
            }
            file.write_all_at(&bytes[..MIB as usize], mib * MIB)?;
        }
        at += run_mib;
    }
    Ok(())
}

fn run_once(dir: &Path, job: &Job, tool: &Path) -> Result<Cost> {
    for name in ["out", "w.qcow2", "b.qcow2", "rss"] {
        remove(&dir.join(name))?;
    }
    let peer = |args: &str| run(Command::new(PEER).current_dir(dir).args(args.split(' ')));
    match job.before {
        Before::Nothing | Before::Served | Before::Serving => {}
        Before::Copy | Before::Snapshot | Before::Overlay => {
            run(Command::new("cp").current_dir(dir).args(["--sparse=always", "r.qcow2", "w.qcow2"]))?;
        }
        Before::EmptyOverlay => peer("create -q -f qcow2 -b r.qcow2 -F qcow2 w.qcow2")?,
        Before::Empty => peer(&format!("create -q -f qcow2 w.qcow2 {DISK_MIB}M"))?,
    }
    match job.before {
        Before::Snapshot => peer("snapshot -c s1 w.qcow2")?,
        Before::Overlay => {
            peer(&format!("create -q -f qcow2 b.qcow2 {DISK_MIB}M"))?;
            peer("rebase -q -u -f qcow2 -F qcow2 -b b.qcow2 w.qcow2")?;
        }
        _ => {}
    }
    if dir.join("w.qcow2").exists() {
        // What the preparation left in the page cache is not the tool's to write.
        File::open(dir.join("w.qcow2"))?.sync_all()?;
    }
    let cost = match job.before {
        Before::Served | Before::Serving => measure_nbd(dir, job, tool)?,
        _ => measure(dir, job, tool)?,
    };
    if let Some(file) = job.same {
        let same =
            Command::new(PEER).current_dir(dir).args(["compare", "-q", "-f", "raw", "base.raw", file]).status()?;
        if !same.success() {
            bail!("{} by {}: {file} does not hold what base.raw holds", job.name, tool.display());
        }
    }
    Ok(cost)
}

/// Where this machine is itself a guest, its host takes free memory back, and a run that has to get it again takes up to
/// three times as long. This gets it beforehand.
fn warm_memory() -> Result<()> {
    let bytes = (usage::proc_kib("/proc/meminfo", "MemAvailable")? / 2 * 1024).min(WARM_MIB * MIB);
    drop(std::hint::black_box(vec![1u8; bytes as usize]));
    Ok(())
}

/// An NBD server of the disk, ended when dropped.
struct Server {
    pid: u32,
}

impl Server {
    fn start(dir: &Path, tool: &Path) -> Result<Server> {
        let mut command = Command::new(if tool == Path::new(PEER) { Path::new("qemu-nbd") } else { tool });
        if tool != Path::new(PEER) {
            command.arg("serve");
        }
        command.args(["-r", "-t", "-f", "qcow2", "--fork", "--pid-file", "nbd.pid", "-k"]);
        run(command.current_dir(dir).arg(dir.join("nbd.sock")).arg("r.qcow2"))?;
        let pid = fs::read_to_string(dir.join("nbd.pid"))?;
        Ok(Server { pid: pid.trim().parse().with_context(|| format!("nbd.pid says {pid:?}"))? })
    }

    /// CPU seconds and the most memory in MiB so far.
    fn cost(&self) -> Result<(f64, f64)> {
        let peak_kib = usage::proc_kib(&format!("/proc/{}/status", self.pid), "VmHWM")?;
        Ok((usage::cpu_of(self.pid)?, peak_kib as f64 / 1024.0))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
        // One that has ended by itself is no matter.
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
    }
}

fn measure_nbd(dir: &Path, job: &Job, tool: &Path) -> Result<Cost> {
    let peer = Path::new(PEER);
    if let Before::Served = job.before {
        let _server = Server::start(dir, peer)?;
        return measure(dir, job, tool);
    }
    let server = Server::start(dir, tool)?;
    let read = measure(dir, job, peer)?;
    let (cpu_s, rss_mib) = server.cost()?;
    Ok(Cost { cpu_s, rss_mib, ..read })
}

/// Time and memory. A process keeps the largest resident size of the one it was forked from, so a small one, GNU
/// time, stands between and says what the tool had.
fn measure(dir: &Path, job: &Job, tool: &Path) -> Result<Cost> {
    let args = job.args.split(' ').map(|arg| if arg == "{}" { "" } else { arg });
    let mut command = Command::new("/usr/bin/time");
    command.current_dir(dir).args(["-q", "-o", "rss", "-f", "%M"]).arg(tool).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if job.same.is_some() {
        warm_memory()?;
    }
    let start = Instant::now();
    let mut child = command.spawn().context("cannot start /usr/bin/time")?;
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        std::io::Read::read_to_string(&mut stderr, &mut said)?;
    }
    let (status, used) = usage::wait(&child)?;
    let wall_s = start.elapsed().as_secs_f64();
    if !status.success() {
        bail!("{} {}: {status}: {}", tool.display(), job.args, said.trim());
    }
    let rss = fs::read_to_string(dir.join("rss"))?;
    let rss_kib: f64 = rss.trim().parse().with_context(|| format!("GNU time said {rss:?}"))?;
    let out: PathBuf = dir.join(job.same.unwrap_or("out"));
    let out_mib = fs::metadata(out).map_or(0.0, |meta| meta.blocks() as f64 * 512.0 / MIB as f64);
    Ok(Cost { wall_s, cpu_s: used.cpu_s, rss_mib: rss_kib / 1024.0, out_mib })
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[test]
fn bars_are_judged_line_by_line_and_as_a_mean() {
    let outcome = |name, cpu_s, rss_mib| {
        let peer = Cost { wall_s: 1.0, cpu_s: 1.0, rss_mib: 8.0, out_mib: 0.0 };
        Outcome { name, ours: Cost { cpu_s, rss_mib, ..peer }, peer }
    };
    let outcomes = [outcome("info-json", 0.9, 4.0), outcome("commit", 0.4, 4.1)];
    let judged: Vec<String> = BARS
        .iter()
        .filter_map(|bar| bar.judge(&outcomes).map(|(ratio, missing)| (bar.what, ratio, missing)))
        .filter(|(what, ..)| !what.starts_with("wall"))
        .map(|(what, ratio, missing)| {
            format!("{what} {ratio:.2} {:?}", missing.iter().map(|(name, _)| *name).collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(
        judged,
        [
            "CPU, geometric mean 0.60 []",
            "CPU of each line 0.90 []",
            "peak memory of each line 0.51 [\"commit\"]",
            "CPU of info, check, map, snapshot 0.90 [\"info-json\"]",
        ]
    );
}
