//! A daemon of the test's own: its files below a temporary directory, its guests played by the `scripted_vmm` example.

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Nothing in these tests takes so long unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A running daemon.
pub struct Session {
    directory: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // Guests outlive their daemon, which is the point of them.
        for entry in fs::read_dir(self.path("run/libvirt/qemu")).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "pid") {
                let pid = fs::read_to_string(entry.path()).unwrap_or_default();
                kill(pid.trim());
            }
        }
        self.kill_daemon();
    }
}

fn kill(pid: &str) {
    let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
    pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
}

/// The program that plays vireo-vmm.
pub fn scripted_vmm() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.parent().and_then(Path::parent).unwrap().join("examples/scripted_vmm");
    assert!(path.is_file(), "{} is built by `cargo test -p daemon`", path.display());
    path
}

impl Session {
    /// Starts a daemon on an empty directory.
    pub fn start() -> Session {
        let mut session = Session { directory: tempfile::tempdir().unwrap(), daemon: None };
        fs::write(session.path("kernel"), b"a kernel").unwrap();
        session.start_daemon();
        session
    }

    /// A path below the root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the daemon again; returns when it answers.
    pub fn start_daemon(&mut self) {
        let ready = self.path("ready");
        let _ = fs::remove_file(&ready);
        let socket = UnixDatagram::bind(&ready).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("vireod.log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vireod"))
            .args(["--system", "--root"])
            .arg(self.directory.path())
            .arg("--vmm")
            .arg(scripted_vmm())
            .env("NOTIFY_SOCKET", &ready)
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(child);
        let mut message = [0; 16];
        let got = socket.recv(&mut message);
        assert!(got.is_ok(), "the daemon does not come up: {got:?}\n{}", self.log());
    }

    /// Ends the daemon without a warning.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// What the daemon has printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("vireod.log")).unwrap_or_default()
    }

    /// The writable socket.
    pub fn socket(&self) -> PathBuf {
        self.path("run/libvirt/libvirt-sock")
    }

    /// A raw connection.
    pub fn connect(&self) -> UnixStream {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    /// The URI for a socket.
    pub fn uri_of(&self, socket: &str) -> String {
        format!("qemu+unix:///system?socket={}", self.path(&format!("run/libvirt/{socket}")).display())
    }

    /// A virsh that is about to run one command line (given as virsh's own words), in the root directory.
    pub fn virsh_command(&self, socket: &str, line: &str) -> Command {
        let mut command = Command::new("virsh");
        command.args(["-c", &self.uri_of(socket), line]).current_dir(self.directory.path());
        command.env("LC_ALL", "C").env_remove("LIBVIRT_DEFAULT_URI").stdin(Stdio::null());
        command
    }

    /// Runs virsh; its standard output and error as a person sees them.
    pub fn virsh(&self, line: &str) -> String {
        self.virsh_on("libvirt-sock", line)
    }

    /// Runs virsh on another socket.
    pub fn virsh_on(&self, socket: &str, line: &str) -> String {
        let output = self.virsh_command(socket, line).output();
        shown(&output.expect("virsh runs (Debian package libvirt-clients)"))
    }

    /// Runs virsh until what it says contains `expected`.
    pub fn wait_for(&self, line: &str, expected: &str) {
        let start = Instant::now();
        loop {
            let said = self.virsh(line);
            if said.contains(expected) {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "virsh {line} never said '{expected}': {said}\n{}", self.log());
        }
    }

    /// Writes a domain's document and returns its file name. `cmdline` tells the scripted guest what to be.
    pub fn domain_file(&self, name: &str, cmdline: &str, devices: &str) -> String {
        let kernel = self.path("kernel");
        let document = format!(
            "<domain type='qemu'>\n  <name>{name}</name>\n  <memory unit='MiB'>64</memory>\n  <vcpu>1</vcpu>\n  <os>\n    \
             <type arch='x86_64' machine='q35'>hvm</type>\n    <kernel>{}</kernel>\n    <cmdline>{cmdline}</cmdline>\n  \
             </os>\n  <features><acpi/><apic/></features>\n  <devices>\n    <serial type='pty'/>\n    {devices}\n  \
             </devices>\n</domain>\n",
            kernel.display()
        );
        let file = format!("{name}.xml");
        fs::write(self.path(&file), document).unwrap();
        file
    }

    /// A raw image of 1 MiB in the session's directory, as a disk for [`Session::domain_file`] with `more` elements.
    pub fn raw_disk(&self, file: &str, target: &str, more: &str) -> String {
        let path = self.path(file);
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        format!("<disk><source file='{}'/><target dev='{target}'/>{more}</disk>", path.display())
    }

    /// Defines a domain with a console and nothing else.
    pub fn define(&self, name: &str, cmdline: &str) {
        let file = self.domain_file(name, cmdline, "");
        assert_eq!(self.virsh(&format!("define {file}")), format!("Domain '{name}' defined from {file}\n"));
    }

    /// Process id of a running guest.
    pub fn guest_pid(&self, name: &str) -> String {
        let path = self.path(&format!("run/libvirt/qemu/{name}.pid"));
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// Kills a guest's process as an administrator would.
    pub fn kill_guest(&self, name: &str) {
        kill(&self.guest_pid(name));
    }
}

/// Standard output, then standard error; virsh's final empty line and trailing blanks of table rows left out.
pub fn shown(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.join("\n") + "\n"
}
