//! A starter that listens before the daemon runs.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use crate::session::shown;

#[test]
fn sockets_of_the_starter_are_served_and_left() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    fs::create_dir_all(root.join("run/libvirt")).unwrap();
    let socket = root.join("run/libvirt/libvirt-sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // sd_listen_fds(3): descriptor 3, for exactly this process. The shell's own number is the daemon's after exec.
    let mut daemon = Command::new("sh")
        .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" --session --root \"$1\""])
        .arg(env!("CARGO_BIN_EXE_vireod"))
        .arg(&root)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .unwrap();
    // The connection waits in the listener's queue until the daemon is up.
    let mut virsh = Command::new("virsh");
    virsh.args(["-c", &format!("qemu+unix:///session?socket={}", socket.display()), "list", "--all", "--name"]);
    assert_eq!(shown(&virsh.output().expect("virsh runs (Debian package libvirt-clients)")), "\n");
    let other = root.join("run/libvirt/virtqemud-sock");
    assert!(other.exists(), "the daemon opens the sockets that it was not given");
    let pid = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(socket.exists() && !other.exists());
}
