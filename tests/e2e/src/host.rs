//! A daemon of the test's own, its files below a temporary directory, and virsh to drive it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use crate::programs::program;
use crate::{DEADLINE, guest, process};

/// A running daemon. Dropped, it takes its guests along.
pub struct Host {
    directory: tempfile::TempDir,
    options: Vec<&'static str>,
    daemon: Option<Child>,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Guests outlive their daemon, which is the point of them.
        for entry in fs::read_dir(self.path("run/libvirt/qemu")).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "pid") {
                process::kill(&fs::read_to_string(entry.path()).unwrap_or_default());
            }
        }
        self.kill_daemon();
    }
}

impl Host {
    /// Starts a daemon on an empty directory, in which lies the `kernel` of [`guest`].
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn start() -> Host {
        Host::start_with(&[])
    }

    /// The same, with more options for vireod.
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn start_with(options: &[&'static str]) -> Host {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let mut host = Host { directory, options: options.to_vec(), daemon: None };
        fs::write(host.path("kernel"), guest::kernel()).expect("the directory is ours");
        host.start_daemon();
        host
    }

    /// A path below the daemon's root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the daemon, once more after [`Host::kill_daemon`]; returns when it answers.
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn start_daemon(&mut self) {
        let ready = self.path("ready");
        let _ = fs::remove_file(&ready);
        let socket = UnixDatagram::bind(&ready).expect("the directory is ours");
        socket.set_read_timeout(Some(DEADLINE)).expect("a socket takes a time limit");
        let log = OpenOptions::new().create(true).append(true).open(self.path("vireod.log"));
        let mut command = Command::new(program("vireod"));
        command.args(["--system", "--root"]).arg(self.directory.path()).args(&self.options);
        command.env("NOTIFY_SOCKET", &ready);
        let child = command.stdin(Stdio::null()).stderr(log.expect("the directory is ours")).spawn();
        self.daemon = Some(child.expect("vireod can be run"));
        let got = socket.recv(&mut [0; 16]);
        assert!(got.is_ok(), "the daemon does not come up: {got:?}\n{}", self.log());
    }

    /// `kill -9`.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// What the daemon has printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("vireod.log")).unwrap_or_default()
    }

    /// The address of the daemon.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path("run/libvirt/libvirt-sock").display())
    }

    /// A virsh that is about to run one line, given as virsh's own words, in the daemon's directory.
    pub fn virsh_command(&self, line: &str) -> Command {
        virsh(&self.uri(), line, self.directory.path())
    }

    /// Runs virsh; what it prints, as [`shown`].
    ///
    /// # Panics
    /// Where there is no virsh.
    pub fn virsh(&self, line: &str) -> String {
        shown(&self.virsh_command(line).output().expect("virsh runs (Debian package libvirt-clients)"))
    }

    /// Runs virsh until it says `expected`.
    ///
    /// # Panics
    /// Where it does not in time.
    pub fn wait_for(&self, line: &str, expected: &str) {
        let start = Instant::now();
        loop {
            let said = self.virsh(line);
            if said == expected {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "virsh {line} never said '{expected}': {said}\n{}", self.log());
        }
    }

    /// Writes a domain's document and returns its file name.
    ///
    /// # Panics
    /// Where the file cannot be written.
    pub fn domain_file(&self, domain: &Domain<'_>) -> String {
        let file = format!("{}.xml", domain.name);
        fs::write(self.path(&file), domain.document(&self.path("kernel"))).expect("the directory is ours");
        file
    }

    /// Defines a domain.
    ///
    /// # Panics
    /// Where that is refused.
    pub fn define(&self, domain: &Domain<'_>) {
        let (name, file) = (domain.name, self.domain_file(domain));
        assert_eq!(self.virsh(&format!("define {file}")), format!("Domain '{name}' defined from {file}\n"));
    }

    /// Defines a domain with a console whose log is `NAME.console`, and starts it.
    ///
    /// # Panics
    /// Where that is refused.
    pub fn run(&self, name: &str) {
        let log = format!("<serial type='pty'><log file='{}'/></serial>", self.console_log(name).display());
        self.define(&Domain { devices: &log, ..Domain::named(name) });
        assert_eq!(self.virsh(&format!("start {name}")), format!("Domain '{name}' started\n"), "{}", self.log());
    }

    /// Where [`Host::run`] has the guest's output logged.
    pub fn console_log(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.console"))
    }

    /// Waits until the guest has printed `text`, going by its log.
    ///
    /// # Panics
    /// Where it does not in time.
    pub fn wait_printed(&self, name: &str, text: &str) {
        wait_for_text(&self.console_log(name), text);
    }

    /// Process id of a running guest.
    ///
    /// # Panics
    /// Where it does not run.
    pub fn guest_pid(&self, name: &str) -> String {
        let path = self.path(&format!("run/libvirt/qemu/{name}.pid"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    }
}

/// What a document says; the rest is the same for all.
pub struct Domain<'a> {
    /// Its name.
    pub name: &'a str,
    /// `qemu` or `kvm`.
    pub kind: &'a str,
    /// In MiB.
    pub memory_mib: u64,
    /// In place of the kernel that every host has.
    pub kernel: Option<&'a Path>,
    /// What else stands in `<os>`.
    pub os: &'a str,
    /// What stands in `<devices>`.
    pub devices: &'a str,
}

impl<'a> Domain<'a> {
    /// A small domain with one console.
    pub fn named(name: &'a str) -> Domain<'a> {
        Domain { name, kind: "qemu", memory_mib: 32, kernel: None, os: "", devices: "<serial type='pty'/>" }
    }

    /// The document. `kernel` is taken where the domain names none.
    pub fn document(&self, kernel: &Path) -> String {
        let Domain { name, kind, memory_mib, kernel: own_kernel, os, devices } = self;
        format!(
            "<domain type='{kind}'>\n  <name>{name}</name>\n  <memory unit='MiB'>{memory_mib}</memory>\n  <vcpu>1</vcpu>\n  \
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel>{os}</os>\n  \
             <features><acpi/><apic/></features>\n  <devices>{devices}</devices>\n</domain>\n",
            own_kernel.unwrap_or(kernel).display()
        )
    }
}

/// A virsh that is about to run one line on the daemon at `uri`.
pub fn virsh(uri: &str, line: &str, directory: &Path) -> Command {
    let mut command = Command::new("virsh");
    command.args(["-c", uri, line]).current_dir(directory).stdin(Stdio::null());
    command.env("LC_ALL", "C").env_remove("LIBVIRT_DEFAULT_URI");
    command
}

/// Waits until a file that grows holds `text`.
///
/// # Panics
/// Where it does not in time.
pub fn wait_for_text(path: &Path, text: &str) {
    let start = Instant::now();
    let read = || File::open(path).and_then(std::io::read_to_string).unwrap_or_default();
    while !read().contains(text) {
        assert!(start.elapsed() < DEADLINE, "{}: '{text}' never came: {}", path.display(), read());
        std::thread::yield_now();
    }
}

/// Standard output, then standard error; virsh's final empty line and trailing blanks of table rows left out.
pub fn shown(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.join("\n") + "\n"
}
