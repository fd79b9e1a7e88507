//! Definitions survive a daemon that is killed before any single system call of a change: strace kills it there. Takes
//! minutes and the Debian package strace, so it runs where `VIREO_TEST_LONG` is set.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::session::{Session, shown};

/// Every call that changes files.
const CALLS: [&str; 6] = ["openat", "write", "fsync", "rename", "unlink", "symlink"];
/// No change takes so many calls of one kind.
const CALLS_MAX: usize = 40;

/// strace on a running daemon; returns when it holds every thread.
fn attach(session: &Session, arguments: &[&str]) -> Child {
    let mut command = Command::new("strace");
    command.args(["-f", "-y"]).args(arguments).args(["-p", &session.daemon_pid().to_string()]);
    let mut strace = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("Debian package strace");
    let mut said = BufReader::new(strace.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("attached") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "strace does not attach: {line}");
    }
    // It goes on to say when threads come.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    strace
}

/// A session with one domain that starts by itself.
fn prepared() -> Session {
    let session = Session::start();
    session.define("vm", "first");
    assert_eq!(session.virsh("autostart vm"), "Domain 'vm' marked as autostarted\n");
    session.domain_file("vm", "second", "");
    let given = std::fs::read_to_string(session.path("vm.xml")).unwrap();
    let uuid = session.virsh("domuuid vm");
    let same = given.replace("<name>", &format!("<uuid>{}</uuid><name>", uuid.trim()));
    std::fs::write(session.path("vm.xml"), same).unwrap();
    session.domain_file("other", "", "");
    session
}

/// Names, command lines and autostart marks of what is defined.
fn found(session: &Session) -> String {
    let names = session.virsh("list --all --name");
    let mut names: Vec<&str> = names.lines().filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    let marked = session.virsh("list --all --name --autostart");
    let describe = |name: &&str| {
        let document = session.virsh(&format!("dumpxml {name}"));
        let cmdline = document.split("<cmdline>").nth(1).and_then(|rest| rest.split('<').next()).unwrap_or("");
        let mark = if marked.lines().any(|line| line == *name) { "*" } else { "" };
        format!("{name}{mark} {cmdline}")
    };
    names.iter().map(describe).collect::<Vec<_>>().join(", ").trim().to_owned()
}

/// Kills the daemon before the `nth` call `call` of `change`; whether it came so far.
fn killed(change: &str, call: &str, nth: usize, allowed: &[&str]) -> bool {
    let mut session = prepared();
    let inject = format!("inject={call}:signal=KILL:when={nth}");
    let mut strace = attach(&session, &["-e", &format!("trace={call}"), "-e", &inject, "-o", "/dev/null"]);
    let output = session.virsh_command("libvirt-sock", change).output().unwrap();
    let (survived, said) = (output.status.success(), shown(&output));
    session.kill_daemon();
    strace.wait().unwrap();
    session.start_daemon();
    let found = found(&session);
    assert!(allowed.contains(&found.as_str()), "'{change}' killed before {call} {nth}: '{found}'\n{}", session.log());
    if survived {
        assert_eq!(found, allowed[allowed.len() - 1], "'{change}' {call} {nth} was done: {said}");
    }
    let left = std::fs::read_dir(session.path("etc/libvirt/qemu")).unwrap().flatten();
    let broken = left.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "xml")).count();
    assert_eq!(broken, found.split(", ").filter(|name| !name.is_empty()).count(), "'{change}' {call} {nth}: {found}");
    !survived
}

#[test]
fn a_kill_before_any_call_leaves_the_old_or_the_new() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        return;
    }
    let mut kills = 0;
    for (change, allowed) in [
        ("define vm.xml", &["vm* first", "vm* second"][..]),
        ("define other.xml", &["vm* first", "other , vm* first"]),
        ("autostart vm --disable", &["vm* first", "vm first"]),
        ("domrename vm neu", &["vm* first", "neu* first"]),
        ("undefine vm", &["vm* first", "vm first", ""]),
    ] {
        for call in CALLS {
            let reached = (1..CALLS_MAX).take_while(|nth| killed(change, call, *nth, allowed)).count();
            assert!(reached + 1 < CALLS_MAX, "'{change}' makes too many calls {call}");
            kills += reached;
        }
    }
    assert!(kills > 20, "{kills} kills");
}

#[test]
fn a_definition_is_on_disk_before_it_has_its_name() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        return;
    }
    let mut session = prepared();
    let trace = session.path("trace");
    let mut strace = attach(&session, &["-e", "trace=write,fsync,fdatasync,rename", "-o", trace.to_str().unwrap()]);
    assert_eq!(session.virsh("define vm.xml"), "Domain 'vm' defined from vm.xml\n");
    session.kill_daemon();
    strace.wait().unwrap();
    let text = std::fs::read_to_string(trace).unwrap();
    let steps: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("/etc/libvirt/qemu"))
        .filter_map(|line| line.split_whitespace().nth(1)?.split('(').next())
        .collect();
    // The bytes, the file, the name, the directory that has the name.
    assert_eq!(steps, ["write", "fsync", "rename", "fsync"], "{text}");
}
