//! What a client watching sees of a guest's life: the events of every turn in it, in order.

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::time::Instant;

use e2e::DEADLINE;
use e2e::guest::{PANIC, POWER_OFF, RESET};
use e2e::host::{Domain, Host, wait_for_text};
use e2e::screen::Screen;

/// `virsh event --all --loop`, writing to a file.
struct Watcher<'a> {
    host: &'a Host,
    child: Child,
    seen: usize,
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Watcher<'_> {
    /// Watches. The domain `probe` runs: it is paused and resumed until that is shown.
    fn start(host: &Host) -> Watcher<'_> {
        let file = File::create(host.path("events")).unwrap();
        let child = host.virsh_command("event --all --loop").stdout(Stdio::from(file)).spawn().unwrap();
        let watcher = Watcher { host, child, seen: 0 };
        let start = Instant::now();
        while watcher.text().is_empty() {
            assert!(start.elapsed() < DEADLINE, "no event is shown");
            host.virsh("suspend probe");
            host.virsh("resume probe");
        }
        watcher
    }

    fn text(&self) -> String {
        fs::read_to_string(self.host.path("events")).unwrap()
    }

    /// Waits for the events of `vm1` that `expected` lists; no other may come in between.
    fn expect(&mut self, expected: &[&str]) {
        let lines = |text: &str| -> Vec<String> {
            let own = text.lines().filter(|line| line.contains("domain 'vm1'"));
            own.map(|line| line.replacen("event ", "", 1).replacen(" for domain 'vm1'", "", 1)).collect()
        };
        let start = Instant::now();
        while lines(&self.text()).len() < self.seen + expected.len() {
            assert!(start.elapsed() < DEADLINE, "{expected:?} never came: {}", self.text());
            std::thread::yield_now();
        }
        let found = lines(&self.text());
        assert_eq!(found[self.seen..], *expected);
        self.seen = found.len();
    }
}

#[test]
fn every_turn_in_a_guests_life_is_told() {
    let host = Host::start();
    host.run("probe");
    host.wait_printed("probe", "up\n");
    let mut watcher = Watcher::start(&host);
    let file = host.domain_file(&Domain::named("vm1"));
    let mut turn = |line: &str, events: &[&str]| {
        let said = host.virsh(line);
        assert!(!said.contains("error"), "{line}: {said}");
        watcher.expect(events);
    };
    turn(&format!("define {file}"), &["'lifecycle': Defined Added"]);
    turn("start vm1", &["'lifecycle': Resumed Unpaused", "'lifecycle': Started Booted"]);
    turn("suspend vm1", &["'lifecycle': Suspended Paused"]);
    turn("resume vm1", &["'lifecycle': Resumed Unpaused"]);
    turn("reset vm1", &["'reboot'"]);
    turn("destroy vm1", &["'lifecycle': Shutdown Finished after host request", "'lifecycle': Stopped Destroyed"]);
    turn("start vm1 --paused", &["'lifecycle': Started Booted", "'lifecycle': Suspended Paused"]);
    turn("resume vm1", &["'lifecycle': Resumed Unpaused"]);
    turn("shutdown vm1", &["'lifecycle': Shutdown Finished after guest request", "'lifecycle': Stopped Shutdown"]);
    turn("undefine vm1", &["'lifecycle': Undefined Removed"]);
}

#[test]
fn what_a_guest_does_to_its_own_machine() {
    let host = Host::start();
    host.run("probe");
    host.wait_printed("probe", "up\n");
    host.run("vm1");
    let mut watcher = Watcher::start(&host);
    let ends = |key: u8, watcher: &mut Watcher<'_>, events: &[&str], state: &str| {
        let mut screen = Screen::run(host.virsh_command("console vm1"));
        screen.ask("ready", "READY");
        screen.type_in(&char::from(key).to_string());
        watcher.expect(events);
        host.wait_for("domstate vm1 --reason", &format!("{state}\n"));
    };
    ends(RESET, &mut watcher, &["'reboot'"], "running (booted)");
    wait_for_text(&host.console_log("vm1"), "READY\nup\n");
    let shutdown = "'lifecycle': Shutdown Finished after guest request";
    ends(POWER_OFF, &mut watcher, &[shutdown, "'lifecycle': Stopped Shutdown"], "shut off (shutdown)");
    host.virsh("start vm1");
    watcher.expect(&["'lifecycle': Resumed Unpaused", "'lifecycle': Started Booted"]);
    let crashed = ["'lifecycle': Crashed Panicked", "'lifecycle': Stopped Crashed"];
    ends(PANIC, &mut watcher, &crashed, "shut off (crashed)");
    assert!(host.log().contains("domain 'vm1': the guest crashed: the guest reports a panic"), "{}", host.log());
    assert_eq!(host.virsh("domstate probe"), "running\n");
}
