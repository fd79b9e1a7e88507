//! What survives what: guests their daemon, other guests a killed one, definitions everything.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use rpc_wire::events::Lifecycle;
use rpc_wire::frame::{Header, QEMU_PROGRAM, REMOTE_PROGRAM, frame_of};
use rpc_wire::qemu::{EVENT_MESSAGE, EVENT_REGISTER, EventMessage, EventRegisterArgs};
use rpc_wire::remote::connect_domain_event_callback_register_any;
use rpc_wire::xdr::from_bytes;

use crate::abuse::Raw;
use crate::session::Session;

#[test]
fn guests_do_not_notice_that_their_daemon_was_killed() {
    let mut session = Session::start();
    session.define("vm1", "");
    session.domain_file("vm2", "", "");
    for (line, expected) in [
        ("start vm1", "Domain 'vm1' started\n"),
        ("create vm2.xml --paused", "Domain 'vm2' created from vm2.xml\n"),
        ("define vm1.xml", "error"),
    ] {
        let said = session.virsh(line);
        assert!(said.contains(expected), "{said}");
    }
    let before: Vec<_> = ["vm1", "vm2"].map(|name| session.guest_pid(name)).into();
    let listed = session.virsh("list --all");
    let document = session.virsh("dumpxml vm1");
    session.kill_daemon();
    session.start_daemon();
    assert_eq!(session.virsh("list --all"), listed, "{}", session.log());
    assert_eq!(session.virsh("dumpxml vm1"), document);
    let after: Vec<_> = ["vm1", "vm2"].map(|name| session.guest_pid(name)).into();
    assert_eq!(after, before);
    assert_eq!(session.virsh("domstate vm1 --reason"), "running (booted)\n");
    // The monitor is there again, ids go on, and a transient domain is still one.
    assert_eq!(session.virsh("resume vm2"), "Domain 'vm2' resumed\n");
    assert_eq!(session.virsh("destroy vm2"), "Domain 'vm2' destroyed\n");
    assert_eq!(session.virsh("list --all --name"), "vm1\n");
    session.define("vm3", "");
    session.virsh("start vm3");
    assert_eq!(session.virsh("domid vm3"), "3\n");
    assert_eq!(session.virsh("shutdown vm1"), "Domain 'vm1' is being shutdown\n");
    session.wait_for("domstate vm1 --reason", "shut off (shutdown)");
}

#[test]
fn a_guest_that_ended_while_no_daemon_watched_is_found_crashed() {
    let mut session = Session::start();
    session.define("vm1", "");
    session.virsh("start vm1");
    session.kill_daemon();
    session.kill_guest("vm1");
    session.start_daemon();
    assert_eq!(session.virsh("domstate vm1 --reason"), "shut off (crashed)\n");
    assert_eq!(session.virsh("start vm1"), "Domain 'vm1' started\n");
}

#[test]
fn a_machine_that_was_never_written_down_is_ended() {
    let mut session = Session::start();
    session.define("vm1", "");
    session.virsh("start vm1");
    let pid = session.guest_pid("vm1");
    session.kill_daemon();
    // As if the daemon had been killed between building the machine and writing it down.
    fs::remove_file(session.path("run/libvirt/qemu/vm1.run")).unwrap();
    session.start_daemon();
    assert_eq!(session.virsh("domstate vm1"), "shut off\n");
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "the machine runs on: {state}");
    assert_eq!(session.virsh("start vm1"), "Domain 'vm1' started\n");
}

#[test]
fn a_killed_guest_is_crashed_and_the_others_run_on() {
    let session = Session::start();
    session.define("vm1", "");
    session.define("vm2", "");
    session.virsh("start vm1");
    session.virsh("start vm2");
    session.kill_guest("vm1");
    session.wait_for("domstate vm1 --reason", "shut off (crashed)");
    assert_eq!(session.virsh("domstate vm2 --reason"), "running (booted)\n");
    assert_eq!(session.virsh("start vm1"), "Domain 'vm1' started\n");
}

/// Message number of a lifecycle event for a client with callback ids.
const LIFECYCLE_MESSAGE: u32 = 318;

#[test]
fn the_end_of_a_killed_machine_is_told_with_its_last_words() {
    let session = Session::start();
    session.define("vm1", "say=the_disk_is_slow");
    session.define("vm2", "");
    session.virsh("start vm1");
    session.virsh("start vm2");
    let mut raw = Raw::opened(&session);
    let lifecycle = connect_domain_event_callback_register_any::Args { event_id: 0, dom: None };
    raw.call::<connect_domain_event_callback_register_any::Proc>(1, &lifecycle);
    let monitor = EventRegisterArgs { dom: None, event: None, flags: 0 };
    raw.send(&frame_of(Header::call(QEMU_PROGRAM, EVENT_REGISTER, 2), &monitor));
    assert_eq!(raw.next().unwrap().header.serial, 2);
    session.kill_guest("vm1");
    let told = raw.next().unwrap();
    assert_eq!((told.header.program, told.header.procedure), (QEMU_PROGRAM, EVENT_MESSAGE));
    let told: EventMessage = from_bytes(&told.payload).unwrap();
    assert_eq!((told.dom.name.lossy(), told.event.lossy()), ("vm1".into(), "VIREO_VMM_ENDED".into()));
    assert_eq!(told.details.unwrap().lossy(), "{\"last-words\":\"the disk is slow\"}");
    let ended = raw.next().unwrap();
    assert_eq!((ended.header.program, ended.header.procedure), (REMOTE_PROGRAM, LIFECYCLE_MESSAGE));
    let (_, ended): (i32, Lifecycle) = from_bytes(&ended.payload).unwrap();
    // VIR_DOMAIN_EVENT_STOPPED, VIR_DOMAIN_EVENT_STOPPED_FAILED
    assert_eq!((ended.dom.name.lossy(), ended.event, ended.detail), ("vm1".into(), 5, 5));
    assert_eq!(session.virsh("domstate vm1 --reason"), "shut off (crashed)\n");
    assert_eq!(session.virsh("domstate vm2 --reason"), "running (booted)\n");
}

#[test]
fn a_start_that_fails_says_why_through_the_failing_call() {
    let session = Session::start();
    for (name, cmdline, expected) in [
        ("refused", "fail=the_kernel_is_truncated", "error: internal error: the kernel is truncated\n"),
        (
            "dead",
            "die=no_such_engine",
            "error: internal error: vireo-vmm ended before the machine was built: no such engine\n",
        ),
    ] {
        session.define(name, cmdline);
        let said = session.virsh(&format!("start {name}"));
        assert_eq!(said, format!("error: Failed to start domain '{name}'\n{expected}"));
        assert_eq!(session.virsh(&format!("domstate {name} --reason")), "shut off (failed)\n");
        assert_eq!(session.virsh(&format!("create {name}.xml")).lines().count(), 2);
    }
    let left = fs::read_dir(session.path("run/libvirt/qemu")).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).filter(|name| name != "autostarted").collect();
    assert!(left.is_empty(), "a failed start leaves {left:?}");
}

#[test]
fn destroy_does_not_wait_for_a_guest_that_hangs() {
    let session = Session::start();
    session.define("vm1", "stuck deaf");
    session.virsh("start vm1");
    assert_eq!(session.virsh("shutdown vm1"), "Domain 'vm1' is being shutdown\n");
    assert_eq!(session.virsh("domstate vm1"), "running\n");
    assert_eq!(session.virsh("destroy vm1"), "Domain 'vm1' destroyed\n");
    assert_eq!(session.virsh("domstate vm1 --reason"), "shut off (destroyed)\n");
}

#[test]
fn marked_domains_start_once_per_boot_of_the_host() {
    let mut session = Session::start();
    session.define("vm1", "");
    session.define("vm2", "");
    session.virsh("autostart vm1");
    session.kill_daemon();
    // A reboot empties the run directory.
    fs::remove_dir_all(session.path("run")).unwrap();
    session.start_daemon();
    session.wait_for("list --name", "vm1");
    assert_eq!(session.virsh("list --name"), "vm1\n");
    session.virsh("destroy vm1");
    session.kill_daemon();
    session.start_daemon();
    assert_eq!(session.virsh("list --name"), "\n");
}

#[test]
fn a_domain_tied_to_its_client_ends_with_it() {
    let session = Session::start();
    session.domain_file("vm1", "", "");
    let mut command =
        session.virsh_command("libvirt-sock", "create vm1.xml --autodestroy; list --name; event --event reboot");
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    session.wait_for("list --name", "vm1");
    client.kill().unwrap();
    client.wait().unwrap();
    session.wait_for("list --all", "----\n");
    let mut said = String::new();
    client.stdout.take().unwrap().read_to_string(&mut said).unwrap();
}

#[test]
fn a_session_serves_its_user_and_ends_when_idle() {
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    fs::create_dir(&run).unwrap();
    let virsh = |line: &str| {
        let mut command = std::process::Command::new("virsh");
        // Root's virsh would look for the host's daemon without being told.
        let socket = run.join("libvirt/libvirt-sock");
        command.args(["-c", &format!("qemu+unix:///session?socket={}", socket.display()), line]).env("LC_ALL", "C");
        command.env("XDG_RUNTIME_DIR", &run).env("XDG_CONFIG_HOME", directory.path().join("config"));
        command.env("XDG_CACHE_HOME", directory.path().join("cache")).env("HOME", directory.path());
        crate::session::shown(&command.output().expect("virsh runs (Debian package libvirt-clients)"))
    };
    let mut daemon = std::process::Command::new(env!("CARGO_BIN_EXE_vireod"))
        .args(["--session", "--timeout", "1"])
        .env("XDG_RUNTIME_DIR", &run)
        .env("XDG_CONFIG_HOME", directory.path().join("config"))
        .env("XDG_CACHE_HOME", directory.path().join("cache"))
        .env("HOME", directory.path())
        .spawn()
        .unwrap();
    let socket = run.join("libvirt/virtqemud-sock");
    let start = std::time::Instant::now();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(start.elapsed() < crate::session::DEADLINE);
        std::thread::yield_now();
    }
    assert_eq!(virsh("maxvcpus"), "1\n");
    assert_eq!(virsh("list --all --name"), "\n");
    assert!(daemon.wait().unwrap().success());
    assert!(!socket.exists());
}

#[test]
fn a_living_daemons_socket_is_left_alone() {
    let session = Session::start();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vireod"))
        .args(["--system", "--root"])
        .arg(session.path(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("another daemon listens on this socket"), "{said}");
    assert_eq!(session.virsh("list --name"), "\n");
}
