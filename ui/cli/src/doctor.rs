//! `vireo doctor`: what works on this host, and what to do about the rest.

use std::env;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Access, access};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::grammar::{Args, Done};
use crate::run;
use crate::shell::Shell;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It works.
    Good,
    /// It does not, and something is slower or less safe for it.
    Lesser,
    /// It does not, and domains will not run.
    Bad,
}

/// One line of the report.
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    fix: Option<String>,
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Good, found: found.into(), fix: None }
}

fn lesser(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Lesser, found: found.into(), fix: Some(fix.into()) }
}

fn bad(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Bad, found: found.into(), fix: Some(fix.into()) }
}

/// The verb.
pub fn doctor(shell: &mut Shell, _: &Args) -> Done {
    let host = vmm_report("--probe-host");
    let findings = [
        programs(),
        kvm(),
        runtime_directory(),
        daemon(),
        io_uring(host.as_ref()),
        landlock(host.as_ref()),
        seccomp(),
        user_namespaces(host.as_ref()),
        kernels(),
        memory(),
        open_files(),
        virsh(),
    ];
    if shell.json {
        let list = findings.iter().map(|finding| {
            let verdict = match finding.verdict {
                Verdict::Good => "ok",
                Verdict::Lesser => "limited",
                Verdict::Bad => "broken",
            };
            json!({ "check": finding.what, "verdict": verdict, "found": finding.found, "fix": finding.fix })
        });
        let list: Vec<Value> = list.collect();
        shell.show(&Value::Array(list));
    } else {
        for finding in &findings {
            let mark = match finding.verdict {
                Verdict::Good => "ok  ",
                Verdict::Lesser => "--  ",
                Verdict::Bad => "FAIL",
            };
            shell.say(format!("{mark} {:<18} {}\n", finding.what, finding.found));
            if let Some(fix) = &finding.fix {
                shell.say(format!("{:>23} -> {fix}\n", ""));
            }
        }
    }
    if findings.iter().any(|finding| finding.verdict == Verdict::Bad) { Err(Failure::silent()) } else { Ok(()) }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}

fn programs() -> Finding {
    let vmm = run::vmm();
    let found = if vmm.is_absolute() { Some(vmm) } else { on_path("vireo-vmm") };
    match found {
        Some(path) => good("vireo-vmm", path.display().to_string()),
        None => bad("vireo-vmm", "not found beside vireo or on the PATH", "cargo xtask build makes it"),
    }
}

fn kvm() -> Finding {
    let what = "KVM";
    let slower = "domains of type 'qemu' run on the software CPU meanwhile";
    if !Path::new("/dev/kvm").exists() {
        let fix =
            format!("modprobe kvm-intel or kvm-amd; in a virtual machine, turn on nested virtualisation; {slower}");
        return lesser(what, "/dev/kvm does not exist", fix);
    }
    if access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).is_err() {
        let fix = format!("adduser $USER kvm, and log in again; {slower}");
        return lesser(what, "/dev/kvm may not be opened by this user", fix);
    }
    match vmm_report("--probe-kvm") {
        Some(report) if report.get("usable").and_then(Value::as_bool) == Some(true) => good(what, "a test guest ran"),
        Some(report) => {
            let reason = report.get("reason").and_then(Value::as_str).unwrap_or("no reason given");
            lesser(what, reason, "run on hardware, or on a host with nested virtualisation turned on")
        }
        None => lesser(what, "vireo-vmm --probe-kvm gives no report", slower),
    }
}

fn runtime_directory() -> Finding {
    let what = "session directory";
    let fix = "log in through PAM (ssh, login), or set XDG_RUNTIME_DIR to a directory of yours with mode 0700";
    let variable = |name| env::var_os(name).filter(|value: &std::ffi::OsString| !value.is_empty()).map(PathBuf::from);
    let Some(directory) = variable("XDG_RUNTIME_DIR").or_else(|| variable("HOME").map(|home| home.join(".cache")))
    else {
        return bad(what, "neither XDG_RUNTIME_DIR nor HOME is set", fix);
    };
    let shown = directory.display().to_string();
    if directory.is_dir() && access(&directory, Access::WRITE_OK).is_err() {
        return bad(what, format!("{shown} may not be written"), fix);
    }
    good(what, shown)
}

fn daemon() -> Finding {
    let what = "daemon";
    let mut places = vec![PathBuf::from("/run/libvirt")];
    places.extend(env::var_os("XDG_RUNTIME_DIR").map(|directory| PathBuf::from(directory).join("libvirt")));
    let names = ["virtqemud-sock", "libvirt-sock"];
    let sockets = places.iter().flat_map(|place| names.map(|name| place.join(name)));
    let answering: Vec<_> = sockets.filter(|path| UnixStream::connect(path).is_ok()).collect();
    match answering.first() {
        Some(path) => good(what, format!("answers at {}", path.display())),
        None => {
            let fix = "vireo starts one for your session by itself; vireod --system serves the whole host";
            lesser(what, "none runs", fix)
        }
    }
}

/// What vireo-vmm reports about this host: it tries, as a guest's process would.
fn vmm_report(option: &str) -> Option<Value> {
    let probe = Command::new(run::vmm()).arg(option).stdin(Stdio::null()).stderr(Stdio::null()).output();
    probe.ok().and_then(|output| serde_json::from_slice(&output.stdout).ok())
}

/// How a facility of the kernel answered vireo-vmm: it works, or was refused with a number and a text. `None`: untold.
fn facility(host: Option<&Value>, name: &str) -> Option<Result<(), (i64, String)>> {
    let answer = host?.get(name)?;
    if answer.is_null() {
        return Some(Ok(()));
    }
    Some(Err((answer.get("errno")?.as_i64()?, answer.get("text")?.as_str()?.to_owned())))
}

fn untold(what: &'static str) -> Finding {
    lesser(what, "cannot be told", "vireo-vmm --probe-host gives no report; cargo xtask build makes vireo-vmm")
}

fn io_uring(host: Option<&Value>) -> Finding {
    let what = "io_uring";
    match facility(host, what) {
        Some(Ok(())) => good(what, "allowed; disks use plain reads and writes all the same"),
        Some(Err((_, text))) => lesser(what, format!("refused: {text}"), "nothing: disks use plain reads and writes"),
        None => untold(what),
    }
}

/// `ENOSYS` and `EOPNOTSUPP` are the kernel's own answers. landlock_create_ruleset(2)
const NOT_BUILT_IN: i64 = 38;
const NOT_ACTIVE: i64 = 95;

fn landlock(host: Option<&Value>) -> Finding {
    let what = "Landlock";
    match facility(host, "landlock") {
        Some(Ok(())) => good(what, "allowed"),
        Some(Err((errno, text))) => {
            let helps = match errno {
                NOT_BUILT_IN => "use a kernel from 5.13 on with CONFIG_SECURITY_LANDLOCK",
                NOT_ACTIVE => "boot with lsm=landlock,…",
                _ => "allow the landlock calls in the container's seccomp profile",
            };
            let fix = format!("{helps}; guests are kept from files by their system call filter alone meanwhile");
            lesser(what, format!("refused: {text}"), fix)
        }
        None => untold(what),
    }
}

fn seccomp() -> Finding {
    let what = "seccomp";
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("kill_process") => good(what, "filters work"),
        _ => {
            bad(what, "the kernel has no filters", "use a kernel with CONFIG_SECCOMP_FILTER; guests need their sandbox")
        }
    }
}

fn user_namespaces(host: Option<&Value>) -> Finding {
    let what = "user namespaces";
    match facility(host, "user_namespaces") {
        Some(Ok(())) => good(what, "allowed; nothing here needs them"),
        Some(Err((_, text))) => lesser(what, format!("refused: {text}"), "nothing: no part of Vireo needs them"),
        None => untold(what),
    }
}

fn kernels() -> Finding {
    let what = "guest kernels";
    let entries = fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut kernels: Vec<_> = entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .collect();
    kernels.sort();
    match kernels.iter().find(|path| access(path.as_path(), Access::READ_OK).is_ok()) {
        Some(path) => good(what, path.display().to_string()),
        None => {
            let found = if kernels.is_empty() { "none in /boot" } else { "those in /boot may not be read" };
            lesser(what, found, "apt-get install linux-image-cloud-amd64, or take any bzImage: <kernel> names a file")
        }
    }
}

fn memory() -> Finding {
    let what = "memory";
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    match kib {
        Some(kib) if kib >= 256 << 10 => good(what, format!("{} MiB available", kib >> 10)),
        Some(kib) => lesser(what, format!("{} MiB available", kib >> 10), "stop other programs, or give domains less"),
        None => lesser(what, "cannot be told", "mount /proc"),
    }
}

fn open_files() -> Finding {
    let what = "open files";
    match rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum {
        Some(limit) if limit < 4096 => lesser(
            what,
            format!("at most {limit}"),
            "raise LimitNOFILE or `ulimit -Hn`: every client and disk needs one",
        ),
        Some(limit) => good(what, format!("at most {limit}")),
        None => good(what, "no limit"),
    }
}

fn virsh() -> Finding {
    match on_path("virsh") {
        Some(path) => good("virsh", path.display().to_string()),
        None => lesser(
            "virsh",
            "not installed",
            "apt-get install libvirt-clients, if you want it: vireo takes the same verbs",
        ),
    }
}
