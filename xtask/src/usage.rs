//! Running a program and knowing what it cost.

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};

use anyhow::{Context, Result};

/// What a finished process used, its waited-for children included.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time, in seconds.
    pub cpu_s: f64,
    /// Largest resident size, in KiB.
    pub max_rss_kib: u64,
    /// Page faults without I/O.
    pub minor_faults: u64,
}

/// Waits for `child` and reports what it used. The handle must not be waited for again.
pub fn wait(child: &Child) -> io::Result<(ExitStatus, Usage)> {
    let mut status = 0;
    // SAFETY: all-zero bytes are a valid `rusage`; both pointers are to live locals of the types the call takes.
    let (got, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage), usage)
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    let usage = Usage {
        cpu_s: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        max_rss_kib: usage.ru_maxrss as u64,
        minor_faults: usage.ru_minflt as u64,
    };
    Ok((ExitStatus::from_raw(status), usage))
}

/// A field of a file under `/proc` that counts in kB, such as `VmHWM` of `/proc/PID/status`.
pub fn proc_kib(path: &str, field: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.strip_suffix("kB"));
    let value = value.with_context(|| format!("{path} has no {field}"))?;
    value.trim().parse().with_context(|| format!("{path}: {field} is {value:?}"))
}

/// CPU time a living process has used so far, its ended threads included, in seconds. Exact, unlike the clock ticks of
/// `/proc/PID/stat`.
pub fn cpu_of(pid: u32) -> io::Result<f64> {
    let mut clock = 0;
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to live locals of the types the calls take.
    let failed = unsafe {
        let found = libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock);
        if found == 0 { libc::clock_gettime(clock, &mut now) } else { found }
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(now.tv_sec as f64 + now.tv_nsec as f64 / 1e9)
}

#[test]
fn fields_of_proc_are_read_by_their_whole_name() {
    // Neither changes while other tests run: the code of the program, and all its addresses are more.
    let [code, all] = ["VmExe", "VmSize"].map(|field| proc_kib("/proc/self/status", field).unwrap());
    assert!(0 < code && code < all);
    assert!(proc_kib("/proc/self/status", "VmHW").is_err() && proc_kib("/proc/nothing", "VmHWM").is_err());
}
