//! Debian packages: what is missing is named, asked for and installed; what is only read is unpacked beside the build.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{output, run, say};

/// Whether packages may be installed without a question.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    Ask,
    Given,
}

/// A program the tasks call, the package that brings it, and what for.
pub struct Need {
    pub program: &'static str,
    pub package: &'static str,
    pub purpose: &'static str,
    /// The suite to take it from where the stable one does not do.
    pub suite: Option<&'static str>,
}

const fn need(program: &'static str, package: &'static str, purpose: &'static str) -> Need {
    Need { program, package, purpose, suite: None }
}

/// To compile and link.
pub const BUILD: &[Need] =
    &[need("cc", "gcc", "linking, and the C parts of zstd and ring"), need("ld", "binutils", "linking")];
/// To build the demo guest.
pub const GUEST: &[Need] = &[need("mke2fs", "e2fsprogs", "the file system of the demo guest")];
/// To test against the peers.
pub const TEST: &[Need] = &[
    need("qemu-img", "qemu-utils", "checking our images against QEMU's tools"),
    need("nbdkit", "nbdkit", "checking the NBD client against another server"),
    need("nbdinfo", "libnbd-bin", "checking the NBD server against other clients"),
    need("debugfs", "e2fsprogs", "reading a guest's file system from outside"),
    need("virsh", "libvirt-clients", "driving vireod with an unmodified client"),
    need("openssl", "openssl", "making certificates for encrypted connections"),
    need("strace", "strace", "ending programs before each of their system calls"),
];
/// What calls qemu-img, with ours in its place; after [`QEMU`], which they would take from the stable suite.
pub const CALLERS: &[Need] = &[
    need("virt-sparsify", "libguestfs-tools", "libguestfs with our qemu-img"),
    need("libvirtd", "libvirt-daemon-system", "libvirt's storage driver with our qemu-img"),
    need("virt-install", "virtinst", "virt-install with our qemu-img"),
    need("setpriv", "util-linux", "running libvirtd as a user"),
    need("depmod", "kmod", "the modules of libguestfs' kernel"),
];
/// To know the largest resident size of a program.
pub const TIME: &[Need] = &[need("time", "time", "measuring the memory of a program")];
/// To see what a program runs.
pub const TRACE: &[Need] = &[need("valgrind", "valgrind", "seeing which code a command runs")];
/// To measure against QEMU.
pub const QEMU: &[Need] = &[Need {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
    purpose: "the peer of the benchmarks",
    suite: Some("bookworm-backports"),
}];

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).any(|dir| dir.join(program).is_file())
}

fn is_debian() -> bool {
    Path::new("/etc/debian_version").exists() && in_path("apt-get")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A command that needs root: through sudo for everybody else.
fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Makes sure that every program of `needs` is there.
pub fn ensure(needs: &[&[Need]], consent: Consent) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().copied().flatten().filter(|n| !in_path(n.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    say("these programs are missing:");
    for n in &missing {
        eprintln!("  {:<20} Debian package {:<18} {}", n.program, n.package, n.purpose);
    }
    if !is_debian() {
        bail!("install the programs above with this system's package manager, then run the command again");
    }
    let mut by_suite: BTreeMap<Option<&str>, Vec<&str>> = BTreeMap::new();
    for n in &missing {
        by_suite.entry(n.suite).or_default().push(n.package);
    }
    confirm("install them with apt-get from the configured Debian mirror?", consent)?;
    run(as_root("apt-get").args(["-q", "update"]))?;
    for (suite, packages) in by_suite {
        let mut command = as_root("apt-get");
        command.args(["-q", "-y", "--no-install-recommends", "install"]);
        if let Some(suite) = suite {
            add_suite(suite, consent)?;
            command.args(["-t", suite]);
        }
        run(command.args(packages).env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    match missing.iter().find(|n| !in_path(n.program)) {
        Some(n) => bail!("package {} was installed and still there is no {}", n.package, n.program),
        None => Ok(()),
    }
}

/// Makes the packages of `suite` known to apt. Stable keeps its priority: nothing is upgraded by this.
pub fn add_suite(suite: &str, consent: Consent) -> Result<()> {
    if !is_debian() {
        bail!("the suite {suite} is one of Debian's, which needs apt-get: run this on a Debian system");
    }
    let known = output(Command::new("apt-cache").arg("policy"))?;
    if known.contains(&format!("n={suite}")) {
        return Ok(());
    }
    let file = format!("/etc/apt/sources.list.d/{suite}.list");
    confirm(&format!("add the suite {suite} to apt ({file})?"), consent)?;
    let line = format!("deb http://deb.debian.org/debian {suite} main\n");
    let mut tee =
        as_root("tee").arg(&file).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn()?;
    tee.stdin.take().context("no pipe to tee")?.write_all(line.as_bytes())?;
    if !tee.wait()?.success() {
        bail!("{file} could not be written");
    }
    run(as_root("apt-get").args(["-q", "update"]))
}

fn confirm(question: &str, consent: Consent) -> Result<()> {
    if consent == Consent::Given {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask: {question} Run again with --yes to agree");
    }
    eprint!("xtask: {question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => bail!("not installed; the command needs it"),
    }
}

/// The files of a Debian package, unpacked below `dir` and never installed. Downloads it unless it is there already.
/// `suite`: where to take it from if not from the default one.
pub fn unpack(package: &str, dir: &Path, suite: Option<&str>, consent: Consent) -> Result<PathBuf> {
    let out = dir.join(package);
    if out.join(".complete").exists() {
        return Ok(out);
    }
    if !is_debian() {
        bail!("package {package} is read out of Debian's archive, which needs apt-get: run this on a Debian system");
    }
    if let Some(suite) = suite {
        add_suite(suite, consent)?;
    }
    say(format!("downloading {package} (to read files out of it; it is not installed)"));
    let downloads = dir.join("download");
    std::fs::create_dir_all(&downloads)?;
    let fetch = || {
        let mut command = Command::new("apt-get");
        command.current_dir(&downloads).args(["-q", "-o", "APT::Sandbox::User=root", "download"]);
        command.arg(match suite {
            Some(suite) => format!("{package}/{suite}"),
            None => package.to_owned(),
        });
        run(&mut command)
    };
    if fetch().is_err() {
        run(as_root("apt-get").args(["-q", "update"]))?;
        fetch()?;
    }
    let prefix = format!("{package}_");
    let deb = std::fs::read_dir(&downloads)?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
        .max_by_key(|p| std::fs::metadata(p).and_then(|m| m.modified()).ok())
        .with_context(|| format!("apt-get downloaded no {package}"))?;
    std::fs::create_dir_all(&out)?;
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&out))?;
    std::fs::write(out.join(".complete"), "")?;
    std::fs::remove_file(deb)?;
    Ok(out)
}

/// The package that `meta` (a metapackage such as linux-image-cloud-amd64) stands for today.
pub fn depends_on(meta: &str, prefix: &str, suite: Option<&str>) -> Result<String> {
    let query = || -> Result<Option<String>> {
        let mut command = Command::new("apt-cache");
        command.args(["show", "--no-all-versions"]);
        command.arg(match suite {
            Some(suite) => format!("{meta}/{suite}"),
            None => meta.to_owned(),
        });
        let text = output(&mut command).unwrap_or_default();
        let depends = text.lines().find_map(|l| l.strip_prefix("Depends: "));
        let name = depends.and_then(|d| d.split([',', '|']).map(str::trim).find(|p| p.starts_with(prefix)));
        Ok(name.and_then(|n| n.split_whitespace().next()).map(str::to_owned))
    };
    if let Some(name) = query()? {
        return Ok(name);
    }
    run(as_root("apt-get").args(["-q", "update"]))?;
    query()?.with_context(|| format!("apt knows no package {meta}"))
}
