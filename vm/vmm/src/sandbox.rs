//! What the process gives up before the guest runs: every file by path, and every system call it does not need.
//!
//! The guest reaches us through devices and images; code that it takes over finds open descriptors and nothing else. The
//! list was found by tracing boots, disk work, consoles, monitor commands and every way to end.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetError, RulesetStatus};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why the sandbox could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The filter is not what the kernel takes.
    #[error("the system call filter cannot be built")]
    Filter(#[from] BackendError),
    /// The kernel did not take it.
    #[error("the system call filter is refused by the kernel")]
    Seccomp(#[from] seccompiler::Error),
    /// Landlock failed in another way than being absent.
    #[error("the file system cannot be locked away")]
    Landlock(#[from] RulesetError),
}

/// Whether the file system is out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// It is.
    Denied,
    /// The kernel has no Landlock, or a container refuses it. The system call filter still refuses to open anything.
    NotEnforced,
}

/// Denies every file by path to the calling thread and the threads it starts.
pub fn deny_files() -> Result<Files, SandboxError> {
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(ABI::V5))?.create()?;
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(Files::Denied),
        RulesetStatus::NotEnforced => Ok(Files::NotEnforced),
    }
}

/// System calls without a condition.
#[rustfmt::skip] // by purpose
const ALLOWED: &[i64] = &[
    // Images, consoles, statistics, the kernel at a reset.
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64, libc::SYS_pwrite64,
    libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_preadv2, libc::SYS_pwritev2, libc::SYS_lseek, libc::SYS_fstat,
    libc::SYS_statx, libc::SYS_newfstatat, libc::SYS_fallocate, libc::SYS_ftruncate, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_close,
    libc::SYS_dup, libc::SYS_dup3,
    // Disks' rings, which are set up before and can do nothing but read and write.
    libc::SYS_io_uring_enter,
    // Waiting and time.
    libc::SYS_poll, libc::SYS_ppoll, libc::SYS_timerfd_settime, libc::SYS_clock_gettime, libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep, libc::SYS_gettimeofday, libc::SYS_restart_syscall,
    // Monitor peers.
    libc::SYS_accept4, libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_shutdown,
    // KVM's irqfds, made when a message turns out to come often.
    libc::SYS_eventfd2,
    // Threads, memory, signals, the end.
    libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_munmap, libc::SYS_mincore, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_brk,
    libc::SYS_getpid, libc::SYS_gettid, libc::SYS_tgkill, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn, libc::SYS_sigaltstack, libc::SYS_getrandom, libc::SYS_membarrier, libc::SYS_exit,
    libc::SYS_exit_group,
];

const PROT_EXEC: u64 = 4;
/// Duplicates with a lower bound, flags, open file description locks.
const FCNTL: &[i32] =
    &[libc::F_DUPFD_CLOEXEC, libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_OFD_SETLK, libc::F_OFD_GETLK];
/// Not blocking, and the terminal on the way out.
const IOCTL: &[u64] = &[
    libc::FIONBIO,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCGETS2,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TIOCGWINSZ,
];

/// The type byte of KVM's ioctls. Linux include/uapi/linux/kvm.h.
const KVM_IOCTL_TYPE: u64 = 0xae;

fn filter() -> Result<BpfProgram, SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|&number| (number, Vec::new())).collect();
    let when = |argument, operator, value| -> Result<SeccompRule, BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
    };
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(number, vec![when(2, SeccompCmpOp::MaskedEq(PROT_EXEC), 0)?]);
    }
    let fcntl: Result<_, BackendError> =
        FCNTL.iter().map(|&command| when(1, SeccompCmpOp::Eq, command as u64)).collect();
    rules.insert(libc::SYS_fcntl, fcntl?);
    let ioctl: Result<Vec<_>, BackendError> = IOCTL.iter().map(|&request| when(1, SeccompCmpOp::Eq, request)).collect();
    let mut ioctl = ioctl?;
    // KVM's calls, by their type byte: they work on descriptors of KVM alone.
    ioctl.push(when(1, SeccompCmpOp::MaskedEq(0xff00), KVM_IOCTL_TYPE << 8)?);
    rules.insert(libc::SYS_ioctl, ioctl);
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// From now on any other system call, on any thread, ends the process.
pub fn filter_system_calls() -> Result<(), SandboxError> {
    Ok(seccompiler::apply_filter_all_threads(&filter()?)?)
}

/// A forbidden deed, to see that it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Open a file.
    Open,
    /// Connect to a socket.
    Connect,
    /// Become another program.
    Execve,
}

/// Closes the sandbox and tries `deed`. It does not return where the sandbox holds: the kernel ends the process.
pub fn try_inside(deed: Deed) -> Result<std::io::Error, SandboxError> {
    deny_files()?;
    filter_system_calls()?;
    let error = match deed {
        Deed::Open => std::fs::File::open("/etc/passwd").err(),
        Deed::Connect => std::os::unix::net::UnixStream::connect("/nonexistent").err(),
        Deed::Execve => Some(std::os::unix::process::CommandExt::exec(&mut std::process::Command::new("/bin/true"))),
    };
    Ok(error.unwrap_or_else(|| std::io::Error::other("it was carried out")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{ErrorKind, Read, Seek};

    /// Landlock by itself, on a thread that has no system call filter.
    #[test]
    fn a_thread_that_gave_up_files_keeps_those_it_has_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "kept").unwrap();
        let mut open = File::open(&path).unwrap();
        let inside = std::thread::spawn({
            let path = path.clone();
            move || {
                if deny_files().unwrap() == Files::NotEnforced {
                    eprintln!("skipped: this kernel has no Landlock");
                    return;
                }
                let refused = |result: std::io::Result<()>| result.map_err(|e| e.kind());
                let denied = Err(ErrorKind::PermissionDenied);
                assert_eq!(refused(File::open(&path).map(drop)), denied);
                assert_eq!(refused(File::create(path.with_extension("new")).map(drop)), denied);
                assert_eq!(refused(std::fs::remove_file(&path)), denied);
                assert_eq!(refused(std::fs::read_dir("/").map(drop)), denied);
                let mut text = String::new();
                open.read_to_string(&mut text).unwrap();
                open.rewind().unwrap();
                assert_eq!(text, "kept");
            }
        });
        inside.join().unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "kept", "other threads are as they were");
    }
}
