//! A program on a pseudo terminal of its own, as a person at the keyboard sees it.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::OpenptFlags;
use rustix::time::Timespec;

use crate::DEADLINE;

/// When a line is typed again.
const RETYPE: Duration = Duration::from_millis(200);

/// The terminal and what runs on it. Dropped, it ends the program.
pub struct Screen {
    child: Child,
    keyboard: File,
    printed: Receiver<Vec<u8>>,
    shown: String,
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Screen {
    /// Runs `command` on a new terminal.
    ///
    /// # Panics
    /// Where the host gives no terminal or the program does not start.
    pub fn run(mut command: Command) -> Screen {
        let controller = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("the host gives a pseudo terminal");
        rustix::pty::grantpt(&controller).expect("a new terminal is ours");
        rustix::pty::unlockpt(&controller).expect("a new terminal is ours");
        let path = rustix::pty::ptsname(&controller, Vec::new()).expect("a new terminal has a name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(path, flags, Mode::empty()).expect("a new terminal opens");
        let side = || Stdio::from(terminal.try_clone().expect("a descriptor can be duplicated"));
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn();
        let child = child.unwrap_or_else(|e| panic!("{}: {e}", command.get_program().display()));
        let keyboard = File::from(controller);
        let mut reader = keyboard.try_clone().expect("a descriptor can be duplicated");
        let (sender, printed) = channel();
        // Ends when the last holder of the other side does: reading then fails.
        std::thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Screen { child, keyboard, printed, shown: String::new() }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// Where the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("the terminal takes what is typed");
    }

    /// Waits until `expected` has been shown since the last wait.
    ///
    /// # Panics
    /// Where it does not come in time.
    pub fn wait_for(&mut self, expected: &str) {
        let start = Instant::now();
        while !self.take(expected) {
            let left = DEADLINE.saturating_sub(start.elapsed());
            match self.printed.recv_timeout(left) {
                Ok(more) => self.shown.push_str(&String::from_utf8_lossy(&more)),
                Err(_) => panic!("'{expected}' never came; shown since: {}", self.shown),
            }
        }
    }

    /// Whether `text` is among what has been shown since the last wait, now.
    pub fn shows(&mut self, text: &str) -> bool {
        while let Ok(more) = self.printed.try_recv() {
            self.shown.push_str(&String::from_utf8_lossy(&more));
        }
        self.shown.contains(text)
    }

    /// Types a line until `answer` is shown: virsh throws away what was typed before it had set its terminal, and does not
    /// show when it has.
    ///
    /// # Panics
    /// Where it does not come in time.
    pub fn ask(&mut self, line: &str, answer: &str) {
        let start = Instant::now();
        while !self.take(answer) {
            assert!(start.elapsed() < DEADLINE, "'{answer}' never came; shown since: {}", self.shown);
            self.type_in(&format!("{line}\n"));
            match self.printed.recv_timeout(RETYPE) {
                Ok(more) => self.shown.push_str(&String::from_utf8_lossy(&more)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("'{answer}' never came; shown since: {}", self.shown),
            }
        }
    }

    /// Types Ctrl+] until the program ends by itself, and returns how: virsh takes it for itself only when it comes first
    /// in what virsh reads at once, not behind a line typed shortly before.
    ///
    /// # Panics
    /// Where it does not in time.
    pub fn leave(mut self) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            self.type_in("\u{1d}");
            if self.ended_within(RETYPE) {
                break;
            }
        }
        self.end()
    }

    fn ended_within(&self, limit: Duration) -> bool {
        let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).expect("the program is our child");
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)) == Ok(1)
    }

    /// Waits for the program to end by itself, and returns how.
    ///
    /// # Panics
    /// Where it does not in time.
    pub fn end(mut self) -> ExitStatus {
        let ended = self.ended_within(DEADLINE);
        assert!(ended, "the program does not end; shown since: {}", self.shown);
        self.child.wait().expect("the program is our child")
    }

    fn take(&mut self, expected: &str) -> bool {
        let Some(at) = self.shown.find(expected) else { return false };
        self.shown.drain(..at + expected.len());
        true
    }
}
