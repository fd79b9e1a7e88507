//! A session for a user who has no privileges at all: no capabilities, no groups, no home but a directory of its own.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::session::{DEADLINE, scripted_vmm, shown};

/// `nobody` and `nogroup`. Where the tests do not run as root, their own user takes the part.
const NOBODY: u32 = 65534;

/// The command as the user, with the user's directories and nothing else in its environment.
fn as_user(program: &Path, home: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").env("HOME", home);
    for (name, directory) in [("XDG_RUNTIME_DIR", "run"), ("XDG_CONFIG_HOME", "config"), ("XDG_CACHE_HOME", "cache")] {
        command.env(name, home.join(directory));
    }
    command.current_dir(home);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn a_user_without_privileges_runs_guests_in_a_session() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path();
    fs::set_permissions(home, Permissions::from_mode(0o755)).unwrap();
    // The checkout may be closed to the user.
    for (program, name) in [(Path::new(env!("CARGO_BIN_EXE_vireod")), "vireod"), (&scripted_vmm(), "vireo-vmm")] {
        fs::copy(program, home.join(name)).unwrap();
    }
    for name in ["run", "config", "cache"] {
        fs::create_dir(home.join(name)).unwrap();
    }
    fs::write(home.join("kernel"), "a kernel").unwrap();
    let document = format!(
        "<domain type='qemu'><name>vm1</name><memory unit='MiB'>64</memory><os><type>hvm</type><kernel>{}</kernel></os>\
         <devices><serial type='pty'/></devices></domain>",
        home.join("kernel").display()
    );
    fs::write(home.join("vm1.xml"), document).unwrap();
    if rustix::process::geteuid().is_root() {
        for name in ["run", "config", "cache"] {
            chown(home.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let log = fs::File::create(home.join("vireod.log")).unwrap();
    let mut daemon = as_user(&home.join("vireod"), home).arg("--session").stderr(log).spawn().unwrap();
    let log = || fs::read_to_string(home.join("vireod.log")).unwrap_or_default();
    let start = std::time::Instant::now();
    while std::os::unix::net::UnixStream::connect(home.join("run/libvirt/libvirt-sock")).is_err() {
        assert!(start.elapsed() < DEADLINE && daemon.try_wait().unwrap().is_none(), "no daemon: {}", log());
        std::thread::yield_now();
    }
    let virsh = |line: &str| {
        let mut command = as_user(Path::new("/usr/bin/virsh"), home);
        // Told where, because root's virsh, which takes the part elsewhere, would look for the host's daemon.
        let socket = home.join("run/libvirt/libvirt-sock");
        command.args(["-c", &format!("qemu+unix:///session?socket={}", socket.display()), line]);
        shown(&command.output().expect("virsh runs (Debian package libvirt-clients)"))
    };
    for (line, expected) in [
        ("define vm1.xml", "Domain 'vm1' defined from vm1.xml\n"),
        ("start vm1", "Domain 'vm1' started\n"),
        ("domstate vm1", "running\n"),
        ("shutdown vm1", "Domain 'vm1' is being shutdown\n"),
    ] {
        assert_eq!(virsh(line), expected, "{}", log());
    }
    while virsh("domstate vm1") != "shut off\n" {
        assert!(start.elapsed() < DEADLINE, "the guest does not end: {}", log());
    }
    assert_eq!(log(), "");
    let daemon_id = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(daemon_id, rustix::process::Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
