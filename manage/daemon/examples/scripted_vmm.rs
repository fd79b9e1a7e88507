//! A stand-in for vireo-vmm in the daemon's tests: speaks the monitor protocol truthfully and has no machine behind it.
//! Words in the kernel command line choose what it does: the test's way of being the guest.
//!
//! - `fail=TEXT`: refuses the configuration. `die=TEXT`: prints the text and exits without an answer.
//! - `say=TEXT`: prints the text and goes on.
//! - `deaf`: the power button does nothing. `stuck`: `quit` does nothing. `mute`: the monitor never answers.
//! - limits of disks are printed as they come.
//! - otherwise the power button powers off, and the console repeats its input in capitals after printing `guest here`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::exit;
use std::sync::{Arc, Mutex};

use monitor::{
    Accel, Boot, Channel, Command, DiskStats, Event, Failure, FailureClass, Message, PROTOCOL, Reply, Request,
    RunReason, RunState, ShutdownCause, StartReply, Stats, Status, VcpuStats, VmConfig,
};

struct Machine {
    status: Status,
    peers: Vec<Channel>,
}

struct Guest {
    config: VmConfig,
    words: Vec<String>,
    machine: Mutex<Machine>,
}

impl Guest {
    fn has(&self, word: &str) -> bool {
        self.words.iter().any(|found| found == word)
    }

    fn emit(&self, event: Event) {
        for peer in &mut self.machine.lock().unwrap().peers {
            let _ = peer.send(&Message::Event(event.clone()), &[]);
        }
    }

    fn set(&self, state: RunState, reason: RunReason) -> bool {
        let mut machine = self.machine.lock().unwrap();
        let changed = machine.status.state != state;
        if changed {
            machine.status = Status { state, reason };
        }
        changed
    }

    fn end(&self, cause: ShutdownCause) -> ! {
        self.emit(Event::Shutdown { cause });
        exit(0)
    }

    fn carry_out(&self, command: &Command) -> Reply {
        match command {
            Command::QueryStatus => return Reply::Status(self.machine.lock().unwrap().status),
            Command::QueryStats => return Reply::Stats(self.stats()),
            Command::Cont if self.set(RunState::Running, RunReason::User) => self.emit(Event::Resumed),
            Command::Stop if self.set(RunState::Paused, RunReason::User) => {
                self.emit(Event::Stopped { reason: RunReason::User });
            }
            Command::SetDiskThrottle { target, throttle } => {
                println!("throttle {target} {}", serde_json::to_string(throttle).unwrap());
            }
            Command::ResizeDisk { target, bytes } => println!("resize {target} {bytes}"),
            Command::SystemReset => self.emit(Event::Reset { guest: false }),
            Command::Cont | Command::Stop | Command::SystemPowerdown | Command::InjectNmi | Command::Quit => {}
        }
        Reply::Done
    }

    fn stats(&self) -> Stats {
        let disks = self.config.disks.iter().map(|disk| DiskStats {
            target: disk.target.clone(),
            reads: 2,
            read_bytes: 4608,
            read_ns: 149_766,
            capacity_bytes: 1 << 20,
            allocation_bytes: 4096,
            physical_bytes: 8192,
            ..DiskStats::default()
        });
        let vcpu = VcpuStats { thread_id: std::process::id(), cpu_ns: 2_800_000_000, halted: false };
        Stats { vcpus: vec![vcpu; self.config.vcpus as usize], disks: disks.collect(), ram_resident_kib: 1024 }
    }

    fn serve(&self, socket: UnixStream) {
        let mut channel = Channel::new(socket);
        let Ok(mut writer) = channel.try_clone_writer() else { return };
        let greeting = Message::Greeting { protocol: PROTOCOL, uuid: self.config.uuid.clone() };
        if self.has("mute") || writer.send(&greeting, &[]).is_err() {
            std::thread::park();
        }
        self.machine.lock().unwrap().peers.push(channel.try_clone_writer().expect("a second handle"));
        while let Ok((Request { id, command }, _)) = channel.receive::<Request>() {
            let value = self.carry_out(&command);
            let _ = writer.send(&Message::Return { id, value }, &[]);
            match command {
                Command::SystemPowerdown if !self.has("deaf") => self.end(ShutdownCause::PowerOff),
                Command::Quit if !self.has("stuck") => self.end(ShutdownCause::Quit),
                _ => {}
            }
        }
    }
}

/// The guest's side of a console: greets, then repeats what is typed in capitals. A line `crash` or `enospc` makes it
/// happen.
fn console(guest: &Guest, file: OwnedFd, log: Option<OwnedFd>) {
    let mut terminal = File::from(file);
    let mut log = log.map(File::from);
    let mut print = |terminal: &mut File, text: &[u8]| {
        let _ = terminal.write_all(text);
        if let Some(log) = &mut log {
            let _ = log.write_all(text);
        }
    };
    print(&mut terminal, b"guest here\r\n");
    let mut typed = Vec::new();
    let mut byte = [0];
    while terminal.read_exact(&mut byte).is_ok() {
        print(&mut terminal, &[byte[0].to_ascii_uppercase()]);
        typed.push(byte[0]);
        if byte[0] == b'\n' {
            match String::from_utf8_lossy(&typed).trim() {
                "abort" => {
                    eprintln!("the engine met opcode 0f ff at rip 0x1234");
                    exit(3)
                }
                "enospc" => {
                    guest.set(RunState::Paused, RunReason::IoError);
                    let (target, operation, reason) = ("vda".into(), "write".into(), "enospc".into());
                    guest.emit(Event::IoError { target, operation, reason, paused: true });
                }
                _ => {}
            }
            typed.clear();
        }
    }
}

fn main() {
    let socket = rustix::io::dup(rustix::stdio::stdin()).expect("the start-up socket on standard input");
    let mut start = Channel::new(UnixStream::from(socket));
    let (config, fds) = start.receive::<VmConfig>().expect("a configuration");
    let Boot::Kernel { cmdline, .. } = &config.boot;
    let words: Vec<String> = cmdline.split_whitespace().map(str::to_owned).collect();
    for word in &words {
        if let Some(text) = word.strip_prefix("fail=") {
            let failure = Failure { class: FailureClass::Boot, text: text.replace('_', " ") };
            start.send(&StartReply::Failed(failure), &[]).expect("an answer");
            exit(1)
        }
        if word == "show=disks" {
            let disks = config.disks.iter().map(|disk| format!("{} {:?} {:?}", disk.target, disk.cache, disk.io));
            let failure = Failure { class: FailureClass::Boot, text: disks.collect::<Vec<_>>().join(", ") };
            start.send(&StartReply::Failed(failure), &[]).expect("an answer");
            exit(1)
        }
        if let Some(text) = word.strip_prefix("say=") {
            eprintln!("{}", text.replace('_', " "));
        }
        if let Some(text) = word.strip_prefix("die=") {
            eprintln!("{}", text.replace('_', " "));
            exit(3)
        }
    }
    let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
    let mut take = |index: monitor::FdIndex| fds[index.0 as usize].take().expect("each descriptor is used once");
    let listener = UnixListener::from(take(config.monitor.expect("a monitor")));
    let state = if config.paused { RunState::Prelaunch } else { RunState::Running };
    let status = Status { state, reason: RunReason::Booted };
    let consoles: Vec<_> =
        config.consoles.iter().map(|c| (take(c.file), c.keep_open.map(&mut take), c.log.map(&mut take))).collect();
    let guest = Arc::new(Guest { config, words, machine: Mutex::new(Machine { status, peers: Vec::new() }) });
    for (file, keep_open, log) in consoles {
        let guest = guest.clone();
        std::thread::spawn(move || {
            console(&guest, file, log);
            drop(keep_open);
        });
    }
    start.send(&StartReply::Ready { accel: Accel::Soft }, &[]).expect("an answer");
    drop(start);
    for socket in listener.incoming().flatten() {
        let guest = guest.clone();
        std::thread::spawn(move || guest.serve(socket));
    }
}
