//! Benchmarks: our figure, the peer's measured in the same run, the ratio.

mod disk;
mod image;
mod manage;
mod manage_daemon;
mod memory;
mod orphans;
mod tiny_guest;

pub use image::make_disk;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::{self, Guest};
use crate::lab;
use crate::packages::{self, Consent};
use crate::programs;
use crate::run::{say, target};
use crate::usage::{self, Usage};

/// Runs of each side, interleaved; the median is printed.
const RUNS: usize = 5;

/// No single run takes longer.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs the benchmark `name`; of `image`, the lines that `only` is a part of.
pub fn go(consent: Consent, name: &str, only: Option<&str>) -> Result<()> {
    match name {
        "boot" => boot(consent),
        "vmm" => vmm(consent),
        "manage" => manage::go(consent),
        "image" => image::go(consent, only),
        "disk" => disk::go(consent),
        _ => bail!("there is no benchmark {name:?}: there are boot, disk, image, manage and vmm"),
    }
}

/// One line of a result table.
pub fn line(what: &str, unit: &str, ours: f64, peer: f64) {
    println!("{what:<44} {unit:<8} {ours:>12.3} {peer:>12.3} {:>8.2}", ours / peer);
}
pub fn header(peer: &str) {
    println!("{:<44} {:<8} {:>12} {:>12} {:>8}", "", "unit", "vireo", peer, "ratio");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A finished run: wall time and cost.
struct Run {
    wall_s: f64,
    usage: Usage,
    printed: String,
}

fn measure(command: &mut Command) -> Result<Run> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    end_after(&child, LIMIT)?;
    let mut printed = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut stdout, &mut bytes)?;
        printed = String::from_utf8_lossy(&bytes).into_owned();
    }
    let (status, usage) = usage::wait(&child)?;
    // QEMU's debug-exit device ends with an odd status of the guest's choice.
    if status.code().is_none_or(|code| code != 0 && code % 2 == 0) {
        bail!("{command:?} failed: {status}");
    }
    Ok(Run { wall_s: start.elapsed().as_secs_f64(), usage, printed })
}

/// Ends `child` if it runs longer than `limit`.
fn end_after(child: &std::process::Child, limit: Duration) -> Result<()> {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    std::thread::spawn(move || {
        let timeout = rustix::time::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&timeout)) == Ok(0) {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        }
    });
    Ok(())
}

fn boot(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::QEMU], consent)?;
    let guest = guest::build(consent)?;
    let program = programs::vmm()?;
    let ours = || -> Result<Run> {
        let run = measure(our_boot(&program, &guest).args(["--accel", "soft"]))?;
        reached_init(run)
    };
    let qemu = || -> Result<Run> { reached_init(measure(&mut qemu_boot(&guest))?) };
    say("boots, interleaved");
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        a.push(ours()?);
        b.push(qemu()?);
    }
    let pick = |runs: &[Run], f: fn(&Run) -> f64| median(runs.iter().map(f).collect());
    println!("\nboot: Debian cloud kernel, busybox initrd, reset to /sbin/init and power-off, software CPU, 512 MiB");
    header("qemu tcg");
    for (what, unit, f) in [
        ("CPU time of the monitor", "s", (|r: &Run| r.usage.cpu_s) as fn(&Run) -> f64),
        ("wall time", "s", |r| r.wall_s),
        ("largest resident size", "MiB", |r| r.usage.max_rss_kib as f64 / 1024.0),
    ] {
        line(what, unit, pick(&a, f), pick(&b, f));
    }
    let stats = target().join("guest/boot-stats.json");
    measure(our_boot(&program, &guest).args(["--accel", "soft", "--clock", "virtual", "--stats"]).arg(&stats))?;
    println!("\nwith the virtual clock (the same in every run):\n{}", fs::read_to_string(&stats)?.trim());
    let counted = lab::go(consent, &lab::Job::Exits)?;
    let exits = count(&counted, "kvm_exit")?;
    let to_monitor = count(&counted, "kvm_userspace_exit")?;
    println!(
        "\nunder KVM, in the lab, quiet kernel, reset to power-off (QEMU q35 as measured once: 25,400 and 19,100):"
    );
    println!("{:<44} {exits:>12}", "all exits");
    println!("{:<44} {to_monitor:>12}", "exits to the monitor");
    Ok(())
}

fn count(text: &str, event: &str) -> Result<u64> {
    let prefix = format!("LAB-COUNT {event} ");
    let found = text.lines().find_map(|l| l.strip_prefix(&prefix)).and_then(|n| n.trim().parse().ok());
    found.with_context(|| format!("the lab counted no {event}"))
}

fn our_boot(program: &Path, guest: &Guest) -> Command {
    let mut command = Command::new(program);
    command.arg("run").arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.bench_initrd);
    command.args(["--append", "console=ttyS0 quiet", "--memory", "512"]);
    command
}

fn qemu_boot(guest: &Guest) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-M", "q35", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-serial", "stdio", "-no-reboot", "-append", "console=ttyS0 quiet"]);
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.bench_initrd);
    command
}

fn reached_init(run: Run) -> Result<Run> {
    if !run.printed.contains("INIT-REACHED") {
        bail!("a boot did not reach /sbin/init; it printed: {}", run.printed);
    }
    Ok(run)
}

fn vmm(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::QEMU], consent)?;
    let program = programs::vmm()?;
    let dir = target().join("guest");
    fs::create_dir_all(&dir)?;
    let (kernel, rom) = (dir.join("tiny.elf"), dir.join("tiny.rom"));
    fs::write(&kernel, tiny_guest::power_off_kernel())?;
    fs::write(&rom, tiny_guest::exit_rom())?;
    let ours = || {
        let mut command = Command::new(&program);
        command.arg("run").arg("--kernel").arg(&kernel).args(["--accel", "soft", "--memory", "128"]);
        measure(&mut command)
    };
    let qemu = || {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-M", "q35", "-m", "128", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"]).arg(&rom);
        measure(&mut command)
    };
    say("exec to first guest instruction, interleaved");
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..21 {
        a.push(ours()?);
        b.push(qemu()?);
    }
    let pick = |runs: &[Run], f: fn(&Run) -> f64| median(runs.iter().map(f).collect());
    println!("\nvmm: exec to the first guest instruction and out, q35, 128 MiB");
    header("qemu tcg");
    for (what, unit, f) in [
        ("CPU time", "ms", (|r: &Run| r.usage.cpu_s * 1e3) as fn(&Run) -> f64),
        ("wall time", "ms", |r| r.wall_s * 1e3),
        ("minor page faults", "", |r| r.usage.minor_faults as f64),
        ("largest resident size", "MiB", |r| r.usage.max_rss_kib as f64 / 1024.0),
    ] {
        line(what, unit, pick(&a, f), pick(&b, f));
    }
    let size = |path: &Path| fs::metadata(path).map_or(f64::NAN, |m| m.len() as f64 / (1 << 20) as f64);
    line("program on disk, without libraries", "MiB", size(&program), size(Path::new("/usr/bin/qemu-system-x86_64")));
    memory::print(&program, &guest::build(consent)?)
}
