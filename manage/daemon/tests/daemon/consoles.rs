//! Consoles as people use them: virsh on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;

use crate::session::{DEADLINE, Session};

/// When a line is typed again.
const RETYPE: Duration = Duration::from_millis(200);

/// A program on a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    shown: String,
}

impl Terminal {
    fn run(mut command: Command) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&controller).unwrap();
        rustix::pty::unlockpt(&controller).unwrap();
        let path = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
        let terminal = rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let side = || Stdio::from(terminal.try_clone().unwrap());
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let keyboard = File::from(controller);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        // Ends when the last holder of the other side does, with an error that says so.
        std::thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Terminal { child, keyboard, screen, shown: String::new() }
    }

    fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    fn wait_for(&mut self, expected: &str) {
        while !self.shown.contains(expected) {
            let more = self.screen.recv_timeout(DEADLINE);
            let more = more.unwrap_or_else(|_| panic!("'{expected}' never came: {}", self.shown));
            self.shown.push_str(&String::from_utf8_lossy(&more));
        }
    }

    /// Types a line until its echo comes back from the guest. virsh throws away what was typed before it had set its
    /// terminal, and does not show when it has.
    fn type_line(&mut self, line: &str) {
        let echo = line.to_uppercase();
        let start = Instant::now();
        while !self.shown.contains(&echo) {
            assert!(start.elapsed() < DEADLINE, "'{echo}' never came: {}", self.shown);
            self.type_in(&format!("{line}\n"));
            match self.screen.recv_timeout(RETYPE) {
                Ok(more) => self.shown.push_str(&String::from_utf8_lossy(&more)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("'{echo}' never came: {}", self.shown),
            }
        }
    }

    fn wait_for_end(mut self) -> String {
        assert!(self.child.wait().unwrap().success(), "{}", self.shown);
        while let Ok(more) = self.screen.recv_timeout(std::time::Duration::ZERO) {
            self.shown.push_str(&String::from_utf8_lossy(&more));
        }
        self.shown
    }
}

#[test]
fn what_is_typed_reaches_the_guest_and_its_answer_the_terminal() {
    let session = Session::start();
    session.define("vm1", "");
    let mut terminal = Terminal::run(session.virsh_command("libvirt-sock", "start vm1 --console"));
    terminal.wait_for("guest here");
    terminal.type_line("hello");
    // One terminal at a time, unless the second insists.
    let said = session.virsh("ttyconsole vm1");
    assert!(said.starts_with("/dev/pts/"), "{said}");
    let mut second = Terminal::run(session.virsh_command("libvirt-sock", "console vm1"));
    second.wait_for("error: operation failed: Active console session exists for this domain");
    let mut third = Terminal::run(session.virsh_command("libvirt-sock", "console vm1 --force"));
    third.wait_for("Escape character is ^]");
    third.type_line("again");
    terminal.wait_for_end();
    // Ctrl+] leaves, and the guest runs on.
    third.type_in("\u{1d}");
    third.wait_for_end();
    assert_eq!(session.virsh("domstate vm1"), "running\n");
}

#[test]
fn a_console_ends_with_its_guest_and_survives_its_daemon() {
    let mut session = Session::start();
    session.define("vm1", "");
    session.virsh("start vm1");
    session.kill_daemon();
    session.start_daemon();
    let mut terminal = Terminal::run(session.virsh_command("libvirt-sock", "console vm1"));
    terminal.wait_for("Escape character is ^]");
    terminal.type_line("still there");
    session.virsh("destroy vm1");
    terminal.wait_for_end();
}

#[test]
fn the_last_words_of_a_machine_are_kept() {
    let session = Session::start();
    session.define("vm1", "");
    session.virsh("start vm1");
    let mut terminal = Terminal::run(session.virsh_command("libvirt-sock", "console vm1"));
    terminal.wait_for("Escape character is ^]");
    // Its answer arrives although the guest has ended by then.
    terminal.type_line("abort");
    terminal.wait_for_end();
    session.wait_for("domstate vm1 --reason", "shut off (crashed)");
    assert!(session.log().contains("the engine met opcode 0f ff at rip 0x1234"), "{}", session.log());
}

#[test]
fn a_full_disk_pauses_the_guest_until_it_is_resumed() {
    let session = Session::start();
    std::fs::write(session.path("disk.raw"), vec![0; 4096]).unwrap();
    let disk = format!("<disk><source file='{}'/><target dev='vda'/></disk>", session.path("disk.raw").display());
    let file = session.domain_file("vm1", "", &disk);
    session.virsh(&format!("define {file}"));
    session.virsh("start vm1");
    let mut terminal = Terminal::run(session.virsh_command("libvirt-sock", "console vm1"));
    terminal.wait_for("Escape character is ^]");
    terminal.type_line("enospc");
    session.wait_for("domstate vm1 --reason", "paused (I/O error)");
    assert_eq!(session.virsh("domblkerror vm1"), "vda: no space\n");
    assert_eq!(session.virsh("resume vm1"), "Domain 'vm1' resumed\n");
    assert_eq!(session.virsh("domblkerror vm1"), "No errors found\n");
    terminal.type_in("\u{1d}");
    terminal.wait_for_end();
}
