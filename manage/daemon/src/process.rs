//! A vireo-vmm process: recognised across daemon restarts, watched through a pidfd, never mistaken for another.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::watched_fd::watch;

/// A process id with the time it began, which together are unique until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Start in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
}

/// A living process.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Watches a child that has just been made.
    pub fn of_child(pid: i32) -> io::Result<Process> {
        let pidfd = open_pidfd(pid)?;
        let start_ticks = start_ticks(pid)?;
        Ok(Process { id: ProcessId { pid, start_ticks }, pidfd: watch(pidfd)? })
    }

    /// Finds a process again; `None` where it has ended, whoever has its number now.
    pub fn find(id: ProcessId) -> Option<Process> {
        let pidfd = open_pidfd(id.pid).ok()?;
        // Checked after opening: from here on the descriptor means this process and no later one.
        let fields = stat_fields(id.pid).ok()?;
        // A zombie has ended, whether or not somebody has asked how.
        let lives = fields.first().is_some_and(|state| !matches!(state.as_str(), "Z" | "X"));
        let same = fields.get(START).and_then(|field| field.parse().ok()) == Some(id.start_ticks) && lives;
        let pidfd = watch(pidfd).ok()?;
        same.then_some(Process { id, pidfd })
    }

    /// Its identity.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Kills it.
    pub fn kill(&self) {
        // A process that is gone already is what was wanted.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Resolves when it has ended; reaps it if it is our child.
    pub async fn ended(&self) {
        loop {
            match self.pidfd.readable().await {
                Ok(_guard) => break,
                Err(_) => tokio::task::yield_now().await,
            }
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // After a restart it is init's child, not ours.
        let _ = rustix::process::waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(self.pidfd.get_ref())), options);
    }

    /// User and system time so far, in nanoseconds.
    pub fn cpu_times_ns(pid: i32) -> Option<(u64, u64)> {
        let fields = stat_fields(pid).ok()?;
        let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
        let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
        Some((ticks(UTIME)? * tick_ns, ticks(STIME)? * tick_ns))
    }
}

impl Process {
    /// The host CPU that a thread of a process ran on last.
    pub fn last_cpu(pid: i32, thread_id: u32) -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread_id}/stat")).ok()?;
        split_stat(&stat).get(PROCESSOR)?.parse().ok()
    }
}

/// Indices of fields in `/proc/PID/stat`, counted after the command's closing parenthesis.
const UTIME: usize = 11;
const STIME: usize = 12;
const START: usize = 19;
const PROCESSOR: usize = 36;

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

fn start_ticks(pid: i32) -> io::Result<u64> {
    let fields = stat_fields(pid)?;
    fields.get(START).and_then(|field| field.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn stat_fields(pid: i32) -> io::Result<Vec<String>> {
    Ok(split_stat(&fs::read_to_string(format!("/proc/{pid}/stat"))?))
}

fn split_stat(stat: &str) -> Vec<String> {
    // The command may contain anything, even parentheses: fields start after the last one.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().map(str::to_owned).collect()
}
