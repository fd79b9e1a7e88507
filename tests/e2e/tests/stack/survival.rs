//! What survives what: guests their daemon, other guests a killed one.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::Stdio;
use std::time::Instant;

use e2e::DEADLINE;
use e2e::host::{Host, wait_for_text};
use e2e::process;
use e2e::screen::Screen;

#[test]
fn guests_do_not_notice_that_their_daemon_was_killed() {
    let mut host = Host::start();
    host.run("vm1");
    host.run("vm2");
    host.wait_printed("vm1", "up\n");
    host.wait_printed("vm2", "up\n");
    let lines = ["list --all", "dominfo vm1", "ttyconsole vm1", "ttyconsole vm2", "dumpxml vm2", "domid vm2"];
    // The time that a guest has run goes on.
    let ask = |host: &Host| lines.map(|line| without(&host.virsh(line), "CPU time:"));
    let before = ask(&host);
    let processes = ["vm1", "vm2"].map(|name| host.guest_pid(name));
    let terminal = host.virsh("ttyconsole vm1").trim().to_owned();
    let mut attached = Screen::run(host.virsh_command("console vm2"));
    attached.ask("hello", "HELLO");
    host.kill_daemon();
    drop(attached);
    // Typed and answered while there is no daemon.
    let mut keyboard = OpenOptions::new().write(true).open(terminal).unwrap();
    keyboard.write_all(b"is anybody there?\n").unwrap();
    host.wait_printed("vm1", "IS ANYBODY THERE?\n");
    drop(keyboard);
    host.start_daemon();
    assert_eq!(ask(&host), before, "{}", host.log());
    assert_eq!(["vm1", "vm2"].map(|name| host.guest_pid(name)), processes);
    for pid in &processes {
        assert_eq!(process::status(pid, "Name"), "vireo-vmm");
    }
    let mut screen = Screen::run(host.virsh_command("console vm1"));
    screen.wait_for("Escape character is ^]");
    screen.wait_for("IS ANYBODY THERE?");
    screen.ask("here again", "HERE AGAIN");
    assert!(screen.leave().success());
    // The monitor is back too.
    for (line, expected) in [
        ("suspend vm2", "Domain 'vm2' suspended\n"),
        ("domstate vm2 --reason", "paused (user)\n"),
        ("resume vm2", "Domain 'vm2' resumed\n"),
        ("shutdown vm1", "Domain 'vm1' is being shutdown\n"),
        ("destroy vm2", "Domain 'vm2' destroyed\n"),
        ("domstate vm2 --reason", "shut off (destroyed)\n"),
    ] {
        assert_eq!(host.virsh(line), expected, "{}", host.log());
    }
    host.wait_for("domstate vm1 --reason", "shut off (shutdown)\n");
    host.wait_printed("vm1", "bye\n");
}

#[test]
fn a_killed_guest_is_crashed_and_the_other_runs_on() {
    let host = Host::start();
    host.run("vm1");
    host.run("vm2");
    host.wait_printed("vm2", "up\n");
    let seen = host.path("events");
    let file = std::fs::File::create(&seen).unwrap();
    let mut watcher = host.virsh_command("event --all --loop").stdout(Stdio::from(file)).spawn().unwrap();
    // The watcher does not say when it has begun to watch, but shows what happens from then on.
    let start = Instant::now();
    while !std::fs::read_to_string(&seen).unwrap().contains("vm2") {
        assert!(start.elapsed() < DEADLINE, "no event is shown");
        host.virsh("suspend vm2");
        host.virsh("resume vm2");
    }
    process::kill(&host.guest_pid("vm1"));
    wait_for_text(&seen, "event 'lifecycle' for domain 'vm1': Stopped Failed\n");
    let _ = watcher.kill();
    let _ = watcher.wait();
    assert_eq!(host.virsh("domstate vm1 --reason"), "shut off (crashed)\n");
    assert_eq!(host.virsh("domstate vm2 --reason"), "running (unpaused)\n");
    let mut screen = Screen::run(host.virsh_command("console vm2"));
    screen.ask("undisturbed", "UNDISTURBED");
    assert!(screen.leave().success());
    assert_eq!(host.virsh("start vm1"), "Domain 'vm1' started\n");
}

/// `text` without the lines that begin with `label`.
fn without(text: &str, label: &str) -> String {
    text.lines().filter(|line| !line.starts_with(label)).map(|line| format!("{line}\n")).collect()
}
