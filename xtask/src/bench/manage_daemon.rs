//! A daemon under measurement: ours or stock libvirtd, each as the session daemon of a user without privileges, in
//! directories of its own.
//!
//! Both get the same environment, the same documents and the same clients. libvirtd turns itself into the host's daemon
//! for root, so under root both run as `nobody`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use client::{Connection, Target};

use crate::run::target;
use crate::usage;

/// A daemon that has not answered by then is broken.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two tries to reach it.
const RETRY: Duration = Duration::from_millis(2);
/// What a daemon still does after its last answer is over by then.
const SETTLE: Duration = Duration::from_millis(60);
/// User and group `nobody` and `nogroup`, which every Debian system has under these numbers.
const NOBODY: u32 = 65534;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Ours,
    Libvirt,
}

/// Directories of one side; they outlive its daemons.
pub struct Home {
    pub side: Side,
    directory: tempfile::TempDir,
}

/// A running daemon.
pub struct Daemon {
    child: Child,
    /// Of the daemon itself; the child may be the program that counts for it.
    pid: u32,
    socket: PathBuf,
    trace: Option<PathBuf>,
}

impl Home {
    pub fn new(side: Side) -> Result<Home> {
        let directory = tempfile::Builder::new().prefix("vireo-bench-").tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let home = Home { side, directory };
        for name in ["run", "config", "cache", "data"] {
            let path = home.path(name);
            fs::create_dir(&path)?;
            if unprivileged() {
                std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY))?;
            }
        }
        Ok(home)
    }

    /// A path in the directories.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn program(&self) -> PathBuf {
        match self.side {
            Side::Ours => target().join("release/vireod"),
            Side::Libvirt => "/usr/sbin/libvirtd".into(),
        }
    }

    /// Starts the daemon and waits for its first reply.
    pub fn start(&self) -> Result<Daemon> {
        let mut command = Command::new(self.program());
        self.launch(&mut command, None)
    }

    /// The same with every system call written down.
    pub fn start_counted(&self) -> Result<Daemon> {
        let trace = self.path("run/trace");
        // strace appends nothing: it begins a new file.
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-a0", "-s0", "-o"]).arg(&trace).arg(self.program());
        self.launch(&mut command, Some(trace))
    }

    fn launch(&self, command: &mut Command, trace: Option<PathBuf>) -> Result<Daemon> {
        if self.side == Side::Ours {
            command.arg("--session");
        }
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", self.path("data"));
        command.env("XDG_RUNTIME_DIR", self.path("run")).env("XDG_CONFIG_HOME", self.path("config"));
        command.env("XDG_CACHE_HOME", self.path("cache")).env("XDG_DATA_HOME", self.path("data"));
        if unprivileged() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let log = fs::File::create(self.path("daemon.log"))?;
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut daemon = Daemon { pid: child.id(), child, socket: self.path("run/libvirt/libvirt-sock"), trace };
        let first = daemon.first_reply().with_context(|| self.log());
        if let Err(error) = first {
            let _ = daemon.child.kill();
            let _ = daemon.child.wait();
            return Err(error);
        }
        Ok(daemon)
    }

    /// What the daemon printed, for an error.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.path("daemon.log")).unwrap_or_default();
        format!("{} does not answer; it printed: {}", self.program().display(), text.trim())
    }

    /// Ends the helper that libvirtd starts with its first guest and leaves behind.
    fn end_helper(&self) {
        let pid = fs::read_to_string(self.path("run/libvirt/virtlogd.pid")).ok();
        let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.trim().parse().ok()?));
        pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.end_helper();
    }
}

fn unprivileged() -> bool {
    rustix::process::geteuid().is_root()
}

impl Daemon {
    fn first_reply(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.connect().and_then(|mut connection| Ok(connection.hostname()?)) {
                Ok(_) => break,
                Err(_) if self.child.try_wait()?.is_none() && start.elapsed() < LIMIT => std::thread::sleep(RETRY),
                Err(error) => return Err(error),
            }
        }
        if let Some(trace) = &self.trace {
            // Every line of strace begins with the thread it is about; the first is the daemon.
            let text = fs::read_to_string(trace)?;
            let pid = text.split_whitespace().next().and_then(|pid| pid.parse().ok());
            self.pid = pid.context("strace has written nothing")?;
        }
        Ok(())
    }

    /// The URI for other programs.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}", self.socket.display())
    }

    /// A connection of the raw protocol client.
    pub fn connect(&self) -> Result<Connection> {
        let target = Target::resolve(Some(&self.uri()), false, false)?;
        Ok(Connection::open(&target, false)?)
    }

    /// CPU seconds of the daemon so far.
    pub fn cpu_s(&self) -> Result<f64> {
        Ok(usage::cpu_of(self.pid)?)
    }

    /// CPU seconds and system calls of the daemon so far: the second only of one started to be counted.
    pub fn cost(&self) -> Result<Cost> {
        std::thread::sleep(SETTLE);
        let calls = self.trace.as_deref().map_or(Ok(0), |trace| calls_of(trace, self.pid))?;
        Ok(Cost { cpu_s: self.cpu_s()?, calls })
    }

    /// Resident memory in MiB.
    pub fn resident_mib(&self) -> Result<f64> {
        Ok(usage::proc_kib(&format!("/proc/{}/status", self.pid), "VmRSS")? as f64 / 1024.0)
    }

    /// Ends the daemon.
    pub fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid as i32).context("no process id")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the daemon ended with {status}");
        }
        Ok(())
    }
}

/// What a daemon has spent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub cpu_s: f64,
    pub calls: u64,
}

/// System calls in a trace that threads of process `pid` made: what it starts is followed too, and not its own.
fn calls_of(trace: &Path, pid: u32) -> Result<u64> {
    let bytes = fs::read(trace)?;
    let mut own = std::collections::HashSet::from([pid]);
    let mut cloning = std::collections::HashSet::new();
    let mut calls = 0;
    for line in bytes.split(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(line);
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let Ok(thread) = thread.parse::<u32>() else { continue };
        let rest = rest.trim_start();
        // Signals and ends are no calls.
        if !own.contains(&thread) || rest.starts_with(['-', '+']) {
            continue;
        }
        let resumed = rest.starts_with("<... ");
        calls += u64::from(!resumed);
        if rest.contains("CLONE_THREAD") {
            cloning.insert(thread);
        }
        let whole = !rest.ends_with("<unfinished ...>");
        if whole
            && rest.contains("clone")
            && cloning.remove(&thread)
            && let Some(made) = rest.rsplit("= ").next().and_then(|made| made.trim().parse().ok())
        {
            own.insert(made);
        }
    }
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_the_daemons_own_threads_are_counted_once() {
        let trace = "\
10 execve(\"d\"..., ..., 0x1) = 0
10 clone3({flags=CLONE_VM|CLONE_THREAD, stack=0x1} => {parent_tid=[11]}, 88) = 11
11 read(3, <unfinished ...>
10 clone3({flags=CLONE_VM|CLONE_THREAD, stack=0x1} <unfinished ...>
12 gettid() = 12
10 <... clone3 resumed> => {parent_tid=[12]}, 88) = 12
12 write(1, \"\"..., 1) = 1
11 <... read resumed>\"\"..., 1) = 1
10 clone3({flags=CLONE_VM|CLONE_VFORK, stack=0x1}, 88) = 13
13 execve(\"guest\"..., ..., 0x1) = 0
10 --- SIGCHLD {si_signo=SIGCHLD} ---
11 +++ exited with 0 +++
";
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        fs::write(&path, trace).unwrap();
        assert_eq!(calls_of(&path, 10).unwrap(), 6);
    }
}
