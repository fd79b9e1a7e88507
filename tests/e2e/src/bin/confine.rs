//! `confine PROGRAM ARGUMENTS…`: runs a program as in a container under docker's default profile.
//!
//! Root becomes `nobody` without groups; no new privileges can be had; a system call filter refuses io_uring, Landlock,
//! mounts and new namespaces. Everything the program starts is confined alike.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// `nobody` and `nogroup`.
const NOBODY: u32 = 65534;
/// CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, as
/// docker's profile masks them. clone(2)
const NAMESPACES: u64 = 0x7e02_0080;

#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error("usage: confine PROGRAM [ARGUMENTS]")]
    Usage,
    #[error("the filter cannot be built: {0}")]
    Filter(#[from] BackendError),
    #[error("the kernel does not take the filter: {0}")]
    Apply(#[from] seccompiler::Error),
    #[error("the program cannot be run: {0}")]
    Exec(std::io::Error),
}

fn main() -> ExitCode {
    let Err(error) = run();
    eprintln!("confine: {error}");
    ExitCode::from(125)
}

fn run() -> Result<std::convert::Infallible, ConfineError> {
    let mut args = std::env::args_os().skip(1);
    let mut command = Command::new(args.next().ok_or(ConfineError::Usage)?);
    command.args(args);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    // Applying a filter sets no_new_privs first.
    for filter in [not_permitted()?, not_there()?] {
        seccompiler::apply_filter(&filter)?;
    }
    Err(ConfineError::Exec(command.exec()))
}

/// Calls that docker's profile does not let through.
fn not_permitted() -> Result<BpfProgram, BackendError> {
    let new_namespace = |operator, value| {
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_landlock_create_ruleset,
        libc::SYS_landlock_add_rule,
        libc::SYS_landlock_restrict_self,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
    ]
    .map(|number| (number, Vec::new()))
    .into();
    let bits = (0..64).map(|bit| 1u64 << bit).filter(|bit| NAMESPACES & bit != 0);
    let clone: Result<_, _> = bits.map(|bit| new_namespace(SeccompCmpOp::MaskedEq(bit), bit)).collect();
    rules.insert(libc::SYS_clone, clone?);
    filter(rules, libc::EPERM)
}

/// clone3's flags lie in memory, where no filter sees them: programs are to fall back to clone.
fn not_there() -> Result<BpfProgram, BackendError> {
    filter([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> Result<BpfProgram, BackendError> {
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}
