//! `bench manage`: the daemon against stock libvirtd, both driven by the same virsh and by the same raw client.
//!
//! CPU time comes from the process's clock, on daemons that run undisturbed; system calls from daemons that strace
//! follows, on the same definitions, afterwards. What belongs to guests (QEMU, vireo-vmm) is counted on neither side.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use client::{Connection, DomainRef};

use super::manage_daemon::{Cost, Daemon, Home, Side};
use super::orphans::Orphans;
use super::{median, tiny_guest};
use crate::packages::{self, Consent, Need};
use crate::run::{cargo, run, say, target};
use crate::usage::{self, Usage};

/// To measure against libvirtd.
const PEER: &[Need] = &[
    Need { program: "libvirtd", package: "libvirt-daemon-system", purpose: "the peer of bench manage", suite: None },
    Need { program: "virsh", package: "libvirt-clients", purpose: "driving both daemons", suite: None },
    Need { program: "strace", package: "strace", purpose: "counting their system calls", suite: None },
];

/// Domains that are defined, in steps.
const SIZES: [usize; 3] = [0, 1000, 3000];
/// Runs of each side; the median is printed.
const RUNS: usize = 5;
/// Of one line, in calls.
const CLIENTS: usize = 100;
const CALLS_PER_CLIENT: usize = 20;
const DEFINES: usize = 50;
const DOMINFOS: usize = 20;
const STARTS: usize = 10;

/// What a line must not exceed.
#[derive(Clone, Copy)]
enum Bar {
    /// This share of the peer's figure.
    Share(f64),
    /// This figure.
    Most(f64),
}

struct Line {
    what: String,
    unit: &'static str,
    ours: f64,
    peer: f64,
    bar: Bar,
}

#[derive(Default)]
struct Table(Vec<Line>);

impl Table {
    fn add(&mut self, what: impl Into<String>, unit: &'static str, figures: (f64, f64), bar: Bar) {
        self.0.push(Line { what: what.into(), unit, ours: figures.0, peer: figures.1, bar });
    }

    fn print(&self) {
        println!("{:<46} {:<6} {:>11} {:>11} {:>7}  bar", "", "unit", "vireod", "libvirtd", "ratio");
        for line in &self.0 {
            let (bar, kept) = match line.bar {
                Bar::Share(share) => (format!("ratio <= {share:.2}"), line.ours <= line.peer * share),
                Bar::Most(most) => (format!("<= {most} {}", line.unit), line.ours <= most),
            };
            let (what, unit, ours, peer) = (&line.what, line.unit, line.ours, line.peer);
            let verdict = if kept { "pass" } else { "FAIL" };
            println!("{what:<46} {unit:<6} {ours:>11.3} {peer:>11.3} {:>7.3}  {bar:<16} {verdict}", ours / peer);
        }
        let failed = self.0.iter().filter(|line| match line.bar {
            Bar::Share(share) => line.ours > line.peer * share,
            Bar::Most(most) => line.ours > most,
        });
        println!("{} lines, {} over their bar", self.0.len(), failed.count());
    }
}

/// Measures and prints the table.
pub fn go(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::QEMU, PEER], consent)?;
    say("building without checks (release)");
    run(cargo().args(["build", "--release", "-p", "daemon", "-p", "vmm", "-p", "cli"]))?;
    let homes = [Home::new(Side::Ours)?, Home::new(Side::Libvirt)?];
    let mut table = Table::default();
    let mut defined = 0;
    for size in SIZES {
        for home in &homes {
            let daemon = home.start()?;
            define(&mut daemon.connect()?, defined..size)?;
            daemon.stop()?;
        }
        defined = size;
        say(format!("daemon start with {size} domains"));
        starts(&homes, size, &mut table)?;
        if size == 0 {
            guests(&homes, &mut table)?;
        }
        if size == 1000 {
            loaded(&homes, &mut table)?;
        }
    }
    println!("\nmanage: {} against stock libvirtd, session daemons of one user", env!("CARGO_PKG_VERSION"));
    table.print();
    Ok(())
}

/// One figure per side, interleaved, the median of several runs.
fn compare(runs: usize, mut measure: impl FnMut(Side) -> Result<f64>) -> Result<(f64, f64)> {
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(measure(Side::Ours)?);
        peer.push(measure(Side::Libvirt)?);
    }
    Ok((median(ours), median(peer)))
}

fn of(homes: &[Home; 2], side: Side) -> &Home {
    let [ours, peer] = homes;
    if side == Side::Ours { ours } else { peer }
}

/// A document as people write them.
fn document(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os><features><acpi/><apic/></features>\
         <clock offset='utc'/><on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/nowhere/{name}.img'/>\
         <target dev='vda' bus='virtio'/></disk><serial type='pty'/></devices></domain>"
    )
}

fn define(connection: &mut Connection, numbers: std::ops::Range<usize>) -> Result<()> {
    numbers
        .into_iter()
        .try_for_each(|number| Ok(connection.define(&document(&format!("bench-{number:05}")), 0).map(drop)?))
}

fn starts(homes: &[Home; 2], size: usize, table: &mut Table) -> Result<()> {
    let runs = if size > 1000 { 3 } else { RUNS };
    let mut resident = [Vec::new(), Vec::new()];
    let cpu = compare(runs, |side| {
        let daemon = of(homes, side).start()?;
        let cpu_s = daemon.cpu_s()?;
        if size == 0 {
            daemon.cost()?;
            resident[side as usize].push(daemon.resident_mib()?);
        }
        daemon.stop()?;
        Ok(cpu_s * 1e3)
    })?;
    let calls = compare(1, |side| {
        let daemon = of(homes, side).start_counted()?;
        let calls = daemon.cost()?.calls;
        daemon.stop()?;
        Ok(calls as f64)
    })?;
    table.add(format!("start with {size} domains, CPU"), "ms", cpu, Bar::Share(0.5));
    table.add(format!("start with {size} domains, calls"), "", calls, Bar::Share(0.5));
    if size == 0 {
        let [ours, peer] = resident;
        table.add("resident, idle", "MiB", (median(ours), median(peer)), Bar::Most(15.0));
    }
    Ok(())
}

/// Something a daemon is made to do, `times` times over, and how it is taken back, which is not measured.
struct Load {
    what: &'static str,
    times: usize,
    act: fn(&Daemon) -> Result<()>,
    undo: fn(&Daemon) -> Result<()>,
}

const LOADS: [Load; 5] = [
    Load { what: "define", times: DEFINES, act: define_more, undo: undefine_more },
    load("virsh list --all, 1000 domains", 1, |d| virsh(d, &["list", "--all"]).map(drop)),
    load("virsh dominfo", DOMINFOS, dominfos),
    load("stats of 1000 domains", 1, |d| Ok(d.connect()?.stats(&[], 0, 0).map(drop)?)),
    load("100 clients at once, each 20 infos", 1, crowd),
];

const fn load(what: &'static str, times: usize, act: fn(&Daemon) -> Result<()>) -> Load {
    Load { what, times, act, undo: |_| Ok(()) }
}

fn define_more(daemon: &Daemon) -> Result<()> {
    let mut connection = daemon.connect()?;
    (0..DEFINES).try_for_each(|number| Ok(connection.define(&document(&format!("more-{number}")), 0).map(drop)?))
}

fn undefine_more(daemon: &Daemon) -> Result<()> {
    let mut connection = daemon.connect()?;
    (0..DEFINES).try_for_each(|number| {
        let domain = connection.lookup(&format!("more-{number}"), client::Lookup::UuidOrName)?;
        Ok(connection.undefine(&domain, 0)?)
    })
}

fn dominfos(daemon: &Daemon) -> Result<()> {
    (0..DOMINFOS).try_for_each(|_| virsh(daemon, &["dominfo", "bench-00500"]).map(drop))
}

fn crowd(daemon: &Daemon) -> Result<()> {
    let one = || -> Result<()> {
        let mut connection = daemon.connect()?;
        let domain = connection.lookup("bench-00500", client::Lookup::UuidOrName)?;
        (0..CALLS_PER_CLIENT).try_for_each(|_| Ok(connection.info(&domain).map(drop)?))
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(one)).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| bail!("a client panicked")))
    })
}

/// Everything that is asked of a daemon with 1000 domains.
fn loaded(homes: &[Home; 2], table: &mut Table) -> Result<()> {
    let daemons = [of(homes, Side::Ours).start()?, of(homes, Side::Libvirt).start()?];
    let counted = [of(homes, Side::Ours), of(homes, Side::Libvirt)];
    let listing = compare(1, |side| {
        let daemon = &daemons[side as usize];
        virsh(daemon, &["list", "--all"])?;
        daemon.connect()?.stats(&[], 0, 0)?;
        daemon.resident_mib()
    })?;
    let mut cpu = Vec::new();
    for load in &LOADS {
        say(load.what);
        cpu.push(compare(RUNS, |side| Ok(spent(&daemons[side as usize], load)?.cpu_s * 1e3))?);
    }
    let [ours, peer] = daemons;
    clients(&ours, table)?;
    ours.stop()?;
    peer.stop()?;
    say("the same with every system call counted");
    let mut calls = vec![(0.0, 0.0); LOADS.len()];
    for home in counted {
        let daemon = home.start_counted()?;
        for (load, calls) in LOADS.iter().zip(&mut calls) {
            let spent = spent(&daemon, load)?.calls as f64;
            *(if home.side == Side::Ours { &mut calls.0 } else { &mut calls.1 }) = spent;
        }
        daemon.stop()?;
    }
    for ((load, cpu), calls) in LOADS.iter().zip(cpu).zip(calls) {
        let each = |(ours, peer): (f64, f64)| (ours / load.times as f64, peer / load.times as f64);
        table.add(format!("{}, CPU", load.what), "ms", each(cpu), Bar::Share(0.5));
        table.add(format!("{}, calls", load.what), "", each(calls), Bar::Share(0.5));
    }
    table.add("resident, 1000 domains listed", "MiB", listing, Bar::Most(30.0));
    Ok(())
}

fn spent(daemon: &Daemon, load: &Load) -> Result<Cost> {
    let before = daemon.cost()?;
    (load.act)(daemon).with_context(|| load.what)?;
    let after = daemon.cost()?;
    (load.undo)(daemon)?;
    Ok(Cost { cpu_s: after.cpu_s - before.cpu_s, calls: after.calls - before.calls })
}

/// The programs people wait for, each with the same daemon.
fn clients(daemon: &Daemon, table: &mut Table) -> Result<()> {
    let figures = compare(4 * RUNS, |side| {
        let program = match side {
            Side::Ours => target().join("release/vireo"),
            Side::Libvirt => PathBuf::from("virsh"),
        };
        Ok(program_of(&program, daemon, &["dominfo", "bench-00500"])?.cpu_s * 1e3)
    })?;
    table.add("dominfo as a process (vireo, virsh), CPU", "ms", figures, Bar::Most(3.0));
    Ok(())
}

fn virsh(daemon: &Daemon, words: &[&str]) -> Result<Usage> {
    program_of(Path::new("virsh"), daemon, words)
}

fn program_of(program: &Path, daemon: &Daemon, words: &[&str]) -> Result<Usage> {
    let mut command = Command::new(program);
    command.args(["-c", &daemon.uri()]).args(words).env("LC_ALL", "C");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let child = child.with_context(|| format!("cannot start {}", program.display()))?;
    let (status, usage) = usage::wait(&child)?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(usage)
}

/// Start and destroy of a guest that does nothing.
fn guests(homes: &[Home; 2], table: &mut Table) -> Result<()> {
    say("guests that start and are destroyed");
    let orphans = Orphans::adopt()?;
    let mut costs = [Vec::new(), Vec::new()];
    let daemons = [of(homes, Side::Ours).start()?, of(homes, Side::Libvirt).start()?];
    for home in homes {
        let daemon = &daemons[home.side as usize];
        costs[home.side as usize] = live_and_die(home, daemon, STARTS)?;
    }
    for daemon in daemons {
        daemon.stop()?;
    }
    let mut calls = [Vec::new(), Vec::new()];
    for home in homes {
        let daemon = home.start_counted()?;
        calls[home.side as usize] = live_and_die(home, &daemon, 1)?;
        daemon.stop()?;
    }
    drop(orphans);
    let pick = |lives: &[Vec<Life>; 2], f: fn(&Life) -> f64| {
        let [ours, peer] = lives;
        (median(ours.iter().map(f).collect()), median(peer.iter().map(f).collect()))
    };
    table.add("start of a guest, CPU", "ms", pick(&costs, |life| life.start.cpu_s * 1e3), Bar::Share(0.5));
    table.add("start of a guest, calls", "", pick(&calls, |life| life.start.calls as f64), Bar::Share(0.5));
    table.add("start of a guest, wall", "ms", pick(&costs, |life| life.start_s * 1e3), Bar::Share(1.0 / 3.0));
    table.add("destroy, CPU", "ms", pick(&costs, |life| life.destroy.cpu_s * 1e3), Bar::Share(0.5));
    table.add("destroy, calls", "", pick(&calls, |life| life.destroy.calls as f64), Bar::Share(0.5));
    table.add("destroy, wall", "ms", pick(&costs, |life| life.destroy_s * 1e3), Bar::Most(20.0));
    Ok(())
}

struct Life {
    start: Cost,
    destroy: Cost,
    start_s: f64,
    destroy_s: f64,
}

fn live_and_die(home: &Home, daemon: &Daemon, times: usize) -> Result<Vec<Life>> {
    let kernel = home.path("kernel");
    std::fs::write(&kernel, tiny_guest::standing_kernel())?;
    let document = format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel></os><features><acpi/><apic/></features>\
         <devices><serial type='pty'/></devices></domain>",
        kernel.display()
    );
    let mut connection = daemon.connect()?;
    let domain: DomainRef = connection.define(&document, 0)?;
    let mut lives = Vec::new();
    for _ in 0..times {
        let before = daemon.cost()?;
        let start = Instant::now();
        let running = connection.start(&domain, 0)?;
        let start_s = start.elapsed().as_secs_f64();
        let between = daemon.cost()?;
        let start = Instant::now();
        connection.destroy(&running, 0)?;
        let destroy_s = start.elapsed().as_secs_f64();
        let after = daemon.cost()?;
        let difference = |a: Cost, b: Cost| Cost { cpu_s: b.cpu_s - a.cpu_s, calls: b.calls - a.calls };
        let (start, destroy) = (difference(before, between), difference(between, after));
        lives.push(Life { start, destroy, start_s, destroy_s });
    }
    connection.undefine(&domain, 0)?;
    Ok(lives)
}
