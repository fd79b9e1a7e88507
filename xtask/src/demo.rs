//! `cargo xtask demo`: from a checkout to a shell inside a virtual machine, without root and without KVM.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::guest::{self, Guest};
use crate::packages::{self, Consent};
use crate::run::{cargo, output, run, say, target};

/// How long a guest may take to its login prompt, and a command to its answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Attach this terminal to the console.
    Interactive,
    /// Prove it without a terminal.
    Check,
    /// Remove what a demo left.
    Clean,
}

/// Steps with their times, printed at the end.
struct Timings(Vec<(&'static str, Duration)>);

impl Timings {
    fn step<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        say(format!("{name} ..."));
        let start = Instant::now();
        let result = work()?;
        self.0.push((name, start.elapsed()));
        Ok(result)
    }
    fn print(&self) {
        println!("\n{:<44} {:>9}", "step", "seconds");
        for (name, took) in &self.0 {
            println!("{name:<44} {:>9.2}", took.as_secs_f64());
        }
        let total: Duration = self.0.iter().map(|(_, took)| *took).sum();
        println!("{:<44} {:>9.2}", "all", total.as_secs_f64());
    }
}

/// The demo's daemon and its files, in a place short enough for socket names.
struct Place {
    dir: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn new() -> Place {
        let dir = std::env::temp_dir().join(format!("vireo-demo-{}", rustix::process::getuid().as_raw()));
        let socket = dir.join("root/run/libvirt/libvirt-sock");
        Place { dir, socket }
    }
    fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}", self.socket.display())
    }
    fn program(name: &str) -> PathBuf {
        target().join("debug").join(name)
    }
    fn vireo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(Self::program("vireo"));
        command.arg("-c").arg(self.uri()).args(args);
        command
    }
    fn ask(&self, args: &[&str]) -> Result<String> {
        Ok(output(&mut self.vireo(args))?.trim().to_owned())
    }
    /// The running daemon's process, if it is one of ours.
    fn daemon(&self) -> Option<rustix::process::Pid> {
        let text = fs::read_to_string(self.dir.join("vireod.pid")).ok()?;
        let pid: i32 = text.trim().parse().ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        program.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vireod")).then_some(())?;
        rustix::process::Pid::from_raw(pid)
    }
}

/// Runs the demo.
pub fn go(consent: Consent, mode: Mode) -> Result<()> {
    let place = Place::new();
    if mode == Mode::Clean {
        return clean(&place);
    }
    if mode == Mode::Interactive && !std::io::stdin().is_terminal() {
        bail!("the demo attaches this terminal to the guest, and there is none: use `cargo xtask demo --check`");
    }
    let mut timings = Timings(Vec::new());
    packages::ensure(&[packages::BUILD, packages::GUEST], consent)?;
    timings.step("building vireod, vireo-vmm and vireo", || {
        run(cargo().args(["build", "-p", "daemon", "-p", "vmm", "-p", "cli"]))
    })?;
    let guest = timings.step("making the guest (kernel, initrd, disk)", || guest::build(consent))?;
    if mode == Mode::Check {
        clean(&place)?;
    }
    timings.step("starting an unprivileged session daemon", || start_daemon(&place))?;
    timings.step("defining the domain", || define(&place, &guest))?;
    if place.ask(&["domstate", "demo"])? != "running" {
        timings.step("starting the domain", || place.ask(&["start", "demo"]))?;
    }
    match mode {
        Mode::Check => {
            check(&place, &mut timings)?;
            timings.print();
            clean(&place)
        }
        _ => {
            attach(&place)?;
            timings.print();
            Ok(())
        }
    }
}

fn start_daemon(place: &Place) -> Result<()> {
    if place.daemon().is_some() && place.ask(&["uri"]).is_ok() {
        return Ok(());
    }
    fs::create_dir_all(&place.dir)?;
    let log = File::create(place.dir.join("vireod.log"))?;
    let mut command = Command::new(Place::program("vireod"));
    command.arg("--session").arg("--root").arg(place.dir.join("root"));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let child = command.spawn().context("cannot start vireod")?;
    fs::write(place.dir.join("vireod.pid"), child.id().to_string())?;
    let start = Instant::now();
    while !place.socket.exists() || place.vireo(&["uri"]).output()?.status.code() != Some(0) {
        if start.elapsed() > PATIENCE {
            bail!("vireod did not answer; its words: {}", fs::read_to_string(place.dir.join("vireod.log"))?);
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn define(place: &Place, guest: &Guest) -> Result<String> {
    let disk = place.dir.join("demo.qcow2");
    if !disk.exists() {
        fs::copy(&guest.disk, &disk)?;
    }
    let xml = place.dir.join("demo.xml");
    fs::write(&xml, domain_xml(guest, &disk))?;
    place.ask(&["define", &xml.display().to_string()])
}

fn domain_xml(guest: &Guest, disk: &Path) -> String {
    format!(
        "\
<domain type='qemu'>
  <name>demo</name>
  <description>Debian's stock kernel with a busybox root file system</description>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='pty'><target port='0'/></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
",
        guest.kernel.display(),
        guest.initrd.display(),
        disk.display()
    )
}

fn attach(place: &Place) -> Result<()> {
    let vireo = Place::program("vireo");
    println!("\nAttaching to the console; Ctrl+] leaves it. Log in as root, no password.");
    let _ = place.vireo(&["console", "demo"]).status()?;
    println!("\nThe guest runs on without you.");
    println!("  come back:   {} -c '{}' console demo", vireo.display(), place.uri());
    println!("  or:          virsh -c '{}' list", place.uri());
    println!("  clean up:    cargo xtask demo --clean");
    Ok(())
}

/// Logs in, writes a file, shuts down through ACPI, starts again, finds the file.
fn check(place: &Place, timings: &mut Timings) -> Result<()> {
    let mut console = Console::open(place)?;
    timings.step("booting to the login prompt", || console.wait_for("login: "))?;
    timings.step("logging in and writing a file", || {
        console.log_in()?;
        console.say("echo proof-$((6 * 7)) > /root/proof; sync; cat /root/proof")?;
        console.wait_for("proof-42")
    })?;
    timings.step("shutting down through ACPI", || {
        place.ask(&["shutdown", "demo"])?;
        place.wait_until_off()
    })?;
    let reason = place.ask(&["domstate", "demo", "--reason"])?;
    if reason != "shut off (shutdown)" {
        bail!("the domain is '{reason}' after its shutdown, not 'shut off (shutdown)'");
    }
    timings.step("starting again", || place.ask(&["start", "demo"]))?;
    let mut console = Console::open(place)?;
    timings.step("booting to the login prompt, second time", || console.wait_for("login: "))?;
    timings.step("finding the file", || {
        console.log_in()?;
        console.say("cat /root/proof")?;
        console.wait_for("proof-42")
    })?;
    say("the guest kept its file; everything works");
    Ok(())
}

impl Place {
    fn wait_until_off(&self) -> Result<()> {
        let start = Instant::now();
        while self.ask(&["domstate", "demo"])? != "shut off" {
            if start.elapsed() > PATIENCE {
                bail!("the guest did not shut down within {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// The guest's serial console, through its terminal.
struct Console {
    terminal: File,
    seen: String,
}

impl Console {
    fn open(place: &Place) -> Result<Console> {
        let path = place.ask(&["ttyconsole", "demo"])?;
        let terminal =
            OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"))?;
        let mut mode = tcgetattr(&terminal)?;
        mode.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &mode)?;
        Ok(Console { terminal, seen: String::new() })
    }

    fn say(&mut self, line: &str) -> Result<()> {
        Ok(self.terminal.write_all(format!("{line}\n").as_bytes())?)
    }

    fn log_in(&mut self) -> Result<()> {
        self.say("root")?;
        self.wait_for("demo:")
    }

    /// Reads until `text` has been printed since the last call.
    fn wait_for(&mut self, text: &str) -> Result<()> {
        let start = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(start.elapsed());
            let timeout = rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
            if left.is_zero() || rustix::event::poll(&mut fds, Some(&timeout))? == 0 {
                bail!("the guest did not print {text:?}; what it printed: {}", self.seen);
            }
            let got = self.terminal.read(&mut buffer).context("the console has hung up")?;
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..got]));
        }
    }
}

fn clean(place: &Place) -> Result<()> {
    if let Some(pid) = place.daemon() {
        let _ = place.vireo(&["destroy", "demo"]).output();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        if let Ok(pidfd) = pidfd {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            let limit = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
            rustix::event::poll(&mut fds, Some(&limit))?;
        }
    }
    if place.dir.exists() {
        fs::remove_dir_all(&place.dir).with_context(|| format!("{} cannot be removed", place.dir.display()))?;
    }
    Ok(())
}
