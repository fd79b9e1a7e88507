//! `vireo-vmm run` with tiny guests: output, ends, statistics, mistakes.

mod support;

use std::io::Write;
use std::process::Stdio;
use support::{Guest, run, vmm};

#[test]
fn a_guest_prints_and_powers_off() {
    let (status, printed, words) = run(&Guest::default().print("hello\n").power_off(), &[]);
    assert_eq!((status.code(), printed.as_str(), words.as_str()), (Some(0), "hello\n", ""));
}

#[test]
fn a_reset_ends_the_run_only_where_asked() {
    let (status, printed, _) = run(&Guest::default().print("once\n").reset(), &["--no-reboot"]);
    assert_eq!((status.code(), printed.as_str()), (Some(0), "once\n"));
    let (status, printed, _) = run(&Guest::default().print("once\n").triple_fault(), &["--no-reboot"]);
    assert_eq!((status.code(), printed.as_str()), (Some(0), "once\n"));
}

#[test]
fn typed_bytes_reach_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let guest = (0..40).fold(Guest::default(), |guest, _| guest.echo_byte()).power_off();
    let kernel = guest.write(directory.path());
    let mut command = vmm();
    command.args(["run", "--memory", "32", "--kernel"]).arg(kernel);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let text = "forty bytes, more than a FIFO can hold!\n";
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap()), (Some(0), text.into()));
}

#[test]
fn two_runs_on_a_virtual_clock_are_the_same_run() {
    let guest = (0..200).fold(Guest::default(), |guest, i| guest.print(&format!("line {i}\n"))).power_off();
    let directory = tempfile::tempdir().unwrap();
    let stats = directory.path().join("stats");
    let once = || {
        let (status, printed, words) = run(&guest, &["--clock", "virtual", "--stats", stats.to_str().unwrap()]);
        assert_eq!((status.code(), words.as_str()), (Some(0), ""));
        (printed, std::fs::read_to_string(&stats).unwrap())
    };
    let first = once();
    assert_eq!(first, once());
    // Three instructions a byte, three to power off, and some turns of the last jump.
    let document: serde_json::Value = serde_json::from_str(&first.1).unwrap();
    assert_eq!(document["console_bytes"], first.0.len());
    assert_eq!(document["exits"]["port_writes"], first.0.len() + 1);
    assert_eq!(document["exits"]["port_reads"], 0);
    assert!(document["instructions"].as_u64().unwrap() >= 3 * first.0.len() as u64 + 3);
}

#[test]
fn a_signal_ends_the_run_and_the_status_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = Guest::default().print("up\n").spin().write(directory.path());
    let mut command = vmm();
    command.args(["run", "--memory", "32", "--kernel"]).arg(kernel);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = support::lines(child.stdout.take().unwrap());
    assert_eq!(lines.next().as_deref(), Some("up"));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn mistakes_are_explained() {
    let guest = Guest::default().power_off();
    for (options, code, message) in [
        (&["--memory", "8"][..], 1, "needs at least 33554432 bytes"),
        (&["--cpus", "0"], 1, "a machine needs at least one vCPU"),
        (&["--cpus", "2"], 1, "soft runs at most 1 vCPUs, not 2"),
        (&["--cpus", "2", "--clock", "virtual"], 1, "a virtual clock needs exactly one vCPU, not 2"),
        (&["--accel", "kvm", "--clock", "virtual"], 1, "virtual clock"),
        (&["--initrd", "/nonexistent/initrd"], 1, "/nonexistent/initrd: the initrd cannot be opened"),
        (&["--disk", "/nonexistent/disk"], 1, "disk 'vda' cannot be used: /nonexistent/disk"),
        (&["--disk", "/"], 1, "is a directory"),
        (&["--initrd", "/dev/null", "--frob"], 2, "'--frob' is no option"),
    ] {
        let (status, printed, words) = run(&guest, options);
        assert_eq!((status.code(), printed.as_str()), (Some(code), ""), "{options:?}: {words}");
        assert!(words.starts_with("vireo-vmm: ") && words.contains(message), "{options:?}: {words}");
    }
}

#[test]
fn ctrl_right_bracket_leaves_and_the_terminal_is_as_it_was() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    use std::fs::File;
    let person = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap().into_string().unwrap();
    let terminal = File::options().read(true).write(true).open(name).unwrap();
    let before = tcgetattr(&terminal).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kernel = Guest::default().print("up\n").spin().write(directory.path());
    let mut command = vmm();
    command.args(["run", "--memory", "32", "--kernel"]).arg(kernel);
    let side = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = command.stdin(side()).stdout(side()).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(support::lines(&person).next().as_deref(), Some("up"));
    let raw = tcgetattr(&terminal).unwrap();
    assert!(!raw.local_modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
    (&person).write_all(b"\x1d").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let after = tcgetattr(&terminal).unwrap();
    assert_eq!(
        (after.local_modes, after.input_modes, after.output_modes),
        (before.local_modes, before.input_modes, before.output_modes)
    );
}
