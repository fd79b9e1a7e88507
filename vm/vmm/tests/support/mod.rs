//! Tiny guests, and a vireo-vmm to run them.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod blk;

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use monitor::{
    Accel, Boot, Channel, ClockMode, Console, ConsoleTarget, Event, FdIndex, Message, PowerAction, Reply, Request,
    StartReply, VmConfig,
};

/// How long anything here may take before the test fails.
const LIMIT: Duration = Duration::from_secs(120);

/// Where the code of a guest lies; its PVH entry.
const ENTRY: u32 = 0x10_0000;

/// A guest, instruction by instruction, in 32-bit code.
#[derive(Default)]
pub struct Guest(Vec<u8>);

impl Guest {
    fn code(mut self, bytes: &[u8]) -> Guest {
        self.0.extend_from_slice(bytes);
        self
    }
    /// OUT DX, AL
    pub fn out8(self, port: u16, value: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.code(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }
    /// OUT DX, AX
    pub fn out16(self, port: u16, value: u16) -> Guest {
        let ([low, high], [v0, v1]) = (port.to_le_bytes(), value.to_le_bytes());
        self.code(&[0x66, 0xba, low, high, 0x66, 0xb8, v0, v1, 0x66, 0xef])
    }
    /// OUT DX, EAX
    pub fn out32(self, port: u16, value: u32) -> Guest {
        let ([low, high], v) = (port.to_le_bytes(), value.to_le_bytes());
        self.code(&[0x66, 0xba, low, high, 0xb8]).code(&v).code(&[0xef])
    }
    /// MOV BYTE PTR [address], value
    pub fn store8(self, address: u32, value: u8) -> Guest {
        self.code(&[0xc6, 0x05]).code(&address.to_le_bytes()).code(&[value])
    }
    /// MOV WORD PTR [address], value
    pub fn store16(self, address: u32, value: u16) -> Guest {
        self.code(&[0x66, 0xc7, 0x05]).code(&address.to_le_bytes()).code(&value.to_le_bytes())
    }
    /// MOV DWORD PTR [address], value
    pub fn store32(self, address: u32, value: u32) -> Guest {
        self.code(&[0xc7, 0x05]).code(&address.to_le_bytes()).code(&value.to_le_bytes())
    }
    /// Fills `bytes` (a multiple of 4) from `address` on with `value`: REP STOSD.
    pub fn fill32(self, address: u32, bytes: u32, value: u32) -> Guest {
        let guest = self.code(&[0xbf]).code(&address.to_le_bytes()).code(&[0xb9]).code(&(bytes / 4).to_le_bytes());
        guest.code(&[0xb8]).code(&value.to_le_bytes()).code(&[0xfc, 0xf3, 0xab])
    }
    /// Waits until the word at `address` is `value`: CMP WORD PTR [address], value; JNE back to it.
    pub fn wait16(self, address: u32, value: u16) -> Guest {
        let guest = self.code(&[0x66, 0x81, 0x3d]).code(&address.to_le_bytes()).code(&value.to_le_bytes());
        guest.code(&[0x75, 0xf5])
    }
    /// The same for a byte: CMP BYTE PTR [address], value; JNE back to it.
    pub fn wait8(self, address: u32, value: u8) -> Guest {
        let guest = self.code(&[0x80, 0x3d]).code(&address.to_le_bytes()).code(&[value]);
        guest.code(&[0x75, 0xf7])
    }
    /// Writes a dword of the configuration space of function 0 of `device` on bus 0.
    pub fn configure(self, device: u32, offset: u32, value: u32) -> Guest {
        self.out32(0xcf8, 1 << 31 | device << 11 | offset).out32(0xcfc, value)
    }
    /// Prints on the first serial port.
    pub fn print(self, text: &str) -> Guest {
        text.bytes().fold(self, |guest, byte| guest.out8(0x3f8, byte))
    }
    /// Waits for a byte on the first serial port and prints it.
    pub fn echo_byte(self) -> Guest {
        // wait: mov dx,3fd; in al,dx; test al,1; jz wait; mov dx,3f8; in al,dx; out dx,al
        self.code(&[0x66, 0xba, 0xfd, 3, 0xec, 0xa8, 1, 0x74, 0xf7, 0x66, 0xba, 0xf8, 3, 0xec, 0xee])
    }
    /// ACPI S5: SLP_TYP 7 and SLP_EN in PM1_CNT.
    pub fn power_off(self) -> Guest {
        self.out16(0x604, 7 << 10 | 1 << 13).spin()
    }
    /// Reset through port CF9.
    pub fn reset(self) -> Guest {
        self.out8(0xcf9, 6).spin()
    }
    /// Waits until the power button is pressed: PWRBTN_STS in PM1_STS.
    pub fn wait_for_power_button(self) -> Guest {
        // mov dx,600; in ax,dx; test ah,1; jz the in
        self.code(&[0x66, 0xba, 0, 6, 0x66, 0xed, 0xf6, 0xc4, 1, 0x74, 0xf9])
    }
    /// UD2 with no interrupt table: a triple fault.
    pub fn triple_fault(self) -> Guest {
        self.code(&[0x0f, 0x0b])
    }
    /// For ever.
    pub fn spin(self) -> Guest {
        self.code(&[0xeb, 0xfe])
    }

    /// The guest as an ELF kernel with a PVH note.
    pub fn elf(&self) -> Vec<u8> {
        let mut file = vec![0u8; 64 + 2 * 56];
        file[0..6].copy_from_slice(b"\x7fELF\x02\x01");
        for (at, value) in [(18, 62), (32, 64), (54, 56), (56, 2)] {
            file[at] = value;
        }
        let mut note = Vec::new();
        for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
            note.extend(word.to_le_bytes());
        }
        let mut header = |index: usize, kind: u32, offset: usize, bytes: usize| {
            let at = 64 + 56 * index;
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (field, value) in [(8, offset as u64), (24, ENTRY.into()), (32, bytes as u64), (40, bytes as u64)] {
                file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        header(0, 1, 176, self.0.len());
        header(1, 4, 176 + self.0.len(), note.len());
        file.extend(&self.0);
        file.extend(note);
        file
    }
    /// The same, in a file.
    pub fn write(&self, directory: &Path) -> PathBuf {
        let path = directory.join("guest.elf");
        std::fs::write(&path, self.elf()).unwrap();
        path
    }
}

/// A file or directory that `cargo xtask test` names.
pub fn built(variable: &str) -> PathBuf {
    let Some(value) = std::env::var_os(variable) else {
        panic!(
            "{variable} is not set: `cargo xtask test` builds the guests and sets it, `cargo xtask guest` says where"
        );
    };
    let path = PathBuf::from(value);
    assert!(path.exists(), "{variable} names {}, which does not exist: `cargo xtask guest` builds it", path.display());
    path
}

/// The program under test.
pub fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-vmm"));
    command.stdin(Stdio::null());
    command
}

/// Runs `guest` on the terminal with more options; exit status, what it printed, what the program said.
pub fn run(guest: &Guest, options: &[&str]) -> (ExitStatus, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest.write(directory.path());
    let output =
        vmm().args(["run", "--accel", "soft", "--memory", "32", "--kernel"]).arg(kernel).args(options).output();
    let output = output.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status, text(output.stdout), text(output.stderr))
}

/// A configuration as vireod sends it, and the descriptors it refers to.
pub struct Plan {
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
}

impl Plan {
    pub fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.fds.push(fd.into());
        FdIndex(self.fds.len() as u32 - 1)
    }
}

/// A machine under a monitor, with its serial port.
pub struct Vm {
    pub child: Child,
    pub serial: UnixStream,
    monitor: Channel,
    next_id: u64,
    events: Vec<Event>,
    _directory: tempfile::TempDir,
}

/// Plans a machine for `guest`, without a monitor or console.
pub fn plan(guest: &Guest, directory: &Path) -> Plan {
    let config = VmConfig {
        name: "test".into(),
        uuid: "11111111-2222-3333-4444-555555555555".into(),
        machine: "vireo-q35-1".into(),
        accel: Accel::Soft,
        memory_kib: 32768,
        vcpus: 1,
        boot: Boot::Kernel { kernel: FdIndex(0), initrd: None, cmdline: String::new() },
        disks: Vec::new(),
        consoles: Vec::new(),
        rng: false,
        clock: ClockMode::Host,
        rtc_localtime: false,
        paused: false,
        on_poweroff: PowerAction::Destroy,
        on_reboot: PowerAction::Restart,
        on_crash: PowerAction::Destroy,
        monitor: None,
        sandbox: true,
        block_cache_bytes: 1 << 20,
    };
    let kernel = std::fs::File::open(guest.write(directory)).unwrap();
    Plan { config, fds: vec![kernel.into()] }
}

/// Sends `plan` to a new process; its answer, and the process.
pub fn start(plan: &Plan) -> (Child, StartReply) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = vmm();
    command.args(["--start-fd", "0", "--name", "test"]).stdin(Stdio::from(OwnedFd::from(theirs)));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let mut channel = Channel::new(ours);
    let fds: Vec<_> = plan.fds.iter().map(AsFd::as_fd).collect();
    channel.send(&plan.config, &fds).unwrap();
    let (reply, _) = channel.receive().unwrap();
    (child, reply)
}

impl Vm {
    /// Starts `guest` under a monitor; `change` may change the plan.
    pub fn start(guest: &Guest, change: impl FnOnce(&mut Plan)) -> Vm {
        let directory = tempfile::tempdir().unwrap();
        let mut plan = plan(guest, directory.path());
        let (serial, theirs) = UnixStream::pair().unwrap();
        let file = plan.add(theirs);
        plan.config.consoles.push(Console {
            target: ConsoleTarget::Serial { port: 0 },
            file,
            keep_open: None,
            log: None,
        });
        let path = directory.path().join("monitor");
        let listener = UnixListener::bind(&path).unwrap();
        plan.config.monitor = Some(plan.add(listener));
        change(&mut plan);
        let (child, reply) = start(&plan);
        assert_eq!(reply, StartReply::Ready { accel: Accel::Soft });
        drop(plan);
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        serial.set_read_timeout(Some(LIMIT)).unwrap();
        let mut monitor = Channel::new(socket);
        let (greeting, _) = monitor.receive::<Message>().unwrap();
        assert!(matches!(greeting, Message::Greeting { protocol: (1, _), .. }), "{greeting:?}");
        Vm { child, serial, monitor, next_id: 0, events: Vec::new(), _directory: directory }
    }

    /// Sends a command and returns its answer; events are kept.
    pub fn ask(&mut self, command: monitor::Command) -> Result<Reply, monitor::Failure> {
        self.next_id += 1;
        self.monitor.send(&Request { id: self.next_id, command }, &[]).unwrap();
        loop {
            match self.monitor.receive::<Message>().unwrap().0 {
                Message::Return { id, value } if id == self.next_id => return Ok(value),
                Message::Error { id, error } if id == self.next_id => return Err(error),
                Message::Event(event) => self.events.push(event),
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    /// The next event.
    pub fn event(&mut self) -> Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.monitor.receive::<Message>().unwrap().0 {
            Message::Event(event) => event,
            other => panic!("unexpected {other:?}"),
        }
    }
    /// Reads the serial port up to a line feed.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            self.serial.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap().trim_end().to_owned()
    }
    /// Waits for the end of the process; its status and last words.
    pub fn end(mut self) -> (ExitStatus, String) {
        let mut words = String::new();
        BufReader::new(self.child.stderr.take().unwrap()).read_to_string(&mut words).unwrap();
        (self.child.wait().unwrap(), words)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The signal that ended a process.
pub fn signal(status: ExitStatus) -> Option<i32> {
    status.signal()
}

/// Ends `child` if it is still there after [`LIMIT`]: a guest that hangs must not hang the tests.
pub fn end_by(child: &Child) {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap();
    std::thread::spawn(move || {
        let limit = rustix::time::Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&limit)) == Ok(0) {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    });
}

/// Lines of a stream, for tests that wait for one.
pub fn lines(stream: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(stream).lines().map_while(Result::ok)
}
