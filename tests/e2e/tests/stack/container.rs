//! As in a container: an unprivileged user, no new privileges, and neither io_uring nor Landlock nor namespaces.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use e2e::host::{Domain, shown, wait_for_text};
use e2e::programs::program;
use e2e::screen::Screen;
use e2e::{DEADLINE, guest, process};

/// `nobody` and `nogroup`, whom `confine` makes of root.
const NOBODY: u32 = 65534;

/// The inside: a home, with the programs where its user may run them.
struct Container {
    directory: tempfile::TempDir,
    daemon: Child,
}

impl Drop for Container {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.home().join("run/libvirt/qemu/run")).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "pid") {
                process::kill(&fs::read_to_string(entry.path()).unwrap_or_default());
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A program inside, with the user's directories and nothing else in its environment.
fn inside(home: &Path, program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_confine"));
    command.arg(program.as_ref()).env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").env("HOME", home);
    for (name, directory) in [("XDG_RUNTIME_DIR", "run"), ("XDG_CONFIG_HOME", "config"), ("XDG_CACHE_HOME", "cache")] {
        command.env(name, home.join(directory));
    }
    command.current_dir(home).stdin(Stdio::null());
    command
}

impl Container {
    fn start() -> Container {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path();
        fs::set_permissions(home, Permissions::from_mode(0o755)).unwrap();
        // The checkout may be closed to the user.
        for name in ["vireod", "vireo-vmm", "vireo"] {
            fs::copy(program(name), home.join(name)).unwrap();
        }
        for name in ["run", "config", "cache"] {
            fs::create_dir(home.join(name)).unwrap();
            if rustix::process::geteuid().is_root() {
                chown(home.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        fs::write(home.join("kernel"), guest::kernel()).unwrap();
        let log = fs::File::create(home.join("vireod.log")).unwrap();
        let mut daemon = inside(home, home.join("vireod")).arg("--session").stderr(log).spawn().unwrap();
        let start = Instant::now();
        while UnixStream::connect(home.join("run/libvirt/libvirt-sock")).is_err() {
            let lives = daemon.try_wait().unwrap().is_none();
            let log = || fs::read_to_string(home.join("vireod.log")).unwrap_or_default();
            assert!(lives && start.elapsed() < DEADLINE, "no daemon: {}", log());
            std::thread::yield_now();
        }
        Container { directory, daemon }
    }

    fn home(&self) -> &Path {
        self.directory.path()
    }

    fn virsh_command(&self, line: &str) -> Command {
        let mut command = inside(self.home(), "/usr/bin/virsh");
        command.args(["-c", "qemu:///session", line]);
        command
    }

    fn virsh(&self, line: &str) -> String {
        shown(&self.virsh_command(line).output().expect("virsh runs (Debian package libvirt-clients)"))
    }

    fn guest_pid(&self, name: &str) -> String {
        fs::read_to_string(self.home().join(format!("run/libvirt/qemu/run/{name}.pid"))).unwrap().trim().to_owned()
    }

    fn vmm_log(&self, name: &str) -> PathBuf {
        self.home().join(format!("cache/libvirt/qemu/log/{name}.log"))
    }

    fn wait_for(&self, line: &str, expected: &str) {
        let start = Instant::now();
        while self.virsh(line) != expected {
            assert!(start.elapsed() < DEADLINE, "virsh {line} never said '{expected}'");
        }
    }
}

#[test]
fn guests_run_where_nothing_more_is_allowed_than_in_a_container() {
    let container = Container::start();
    let document = Domain::named("vm1").document(&container.home().join("kernel"));
    fs::write(container.home().join("vm1.xml"), document).unwrap();
    for (line, expected) in [
        ("define vm1.xml", "Domain 'vm1' defined from vm1.xml\n"),
        ("start vm1", "Domain 'vm1' started\n"),
        ("domstate vm1", "running\n"),
    ] {
        assert_eq!(container.virsh(line), expected);
    }
    let daemon = container.daemon.id().to_string();
    let guest = container.guest_pid("vm1");
    // The confinement's two filters, and beneath them the machine's own. seccomp mode 2 is a filter.
    assert_eq!(process::status(&daemon, "Seccomp_filters"), "2");
    for thread in process::threads(&guest) {
        let fields = ["NoNewPrivs", "Seccomp", "Seccomp_filters"].map(|field| process::status(&thread, field));
        assert_eq!(fields, ["1", "2", "3"], "{thread}");
    }
    wait_for_text(&container.vmm_log("vm1"), "no Landlock");
    let mut screen = Screen::run(container.virsh_command("console vm1"));
    screen.wait_for("up");
    screen.ask("hello", "HELLO");
    assert!(screen.leave().success());
    assert_eq!(container.virsh("shutdown vm1"), "Domain 'vm1' is being shutdown\n");
    container.wait_for("domstate vm1 --reason", "shut off (shutdown)\n");
    for (line, expected) in [
        ("start vm1", "Domain 'vm1' started\n"),
        ("destroy vm1", "Domain 'vm1' destroyed\n"),
        ("domstate vm1 --reason", "shut off (destroyed)\n"),
    ] {
        assert_eq!(container.virsh(line), expected);
    }
    assert_eq!(fs::read_to_string(container.home().join("vireod.log")).unwrap(), "");
}

#[test]
fn vireo_starts_the_daemon_of_its_session_by_itself() {
    let mut container = Container::start();
    container.daemon.kill().unwrap();
    container.daemon.wait().unwrap();
    let vireo = |line: &str| {
        let mut command = inside(container.home(), container.home().join("vireo"));
        shown(&command.args(["-c", "qemu:///session"]).args(line.split(' ')).output().unwrap())
    };
    fs::write(container.home().join("vm1.xml"), Domain::named("vm1").document(&container.home().join("kernel")))
        .unwrap();
    assert_eq!(vireo("define vm1.xml"), "Domain 'vm1' defined from vm1.xml\n");
    assert_eq!(vireo("start vm1"), "Domain 'vm1' started\n");
    assert_eq!(container.virsh("domstate vm1"), "running\n");
    let guest = container.guest_pid("vm1");
    let daemon = process::status(&guest, "PPid");
    assert_eq!(process::status(&daemon, "Name"), "vireod");
    assert_eq!(vireo("destroy vm1"), "Domain 'vm1' destroyed\n");
    process::kill(&daemon);
}

#[test]
fn doctor_says_what_a_container_lacks_and_what_that_means() {
    let container = Container::start();
    let output = inside(container.home(), container.home().join("vireo")).arg("doctor").output().unwrap();
    let said = shown(&output);
    let refused = "refused: Operation not permitted";
    for (check, found, fix) in [
        ("io_uring", refused, "nothing: disks use plain reads and writes"),
        (
            "Landlock",
            refused,
            "allow the landlock calls in the container's seccomp profile; guests are kept from files by their system call \
             filter alone meanwhile",
        ),
        ("user namespaces", refused, "nothing: no part of Vireo needs them"),
    ] {
        let expected = format!("--   {check:<18} {found}\n{:>23} -> {fix}\n", "");
        assert!(said.contains(&expected), "{expected}is not in\n{said}");
    }
    // None of it keeps a domain from running.
    assert_eq!(output.status.code(), Some(0), "{said}");
}
