//! A server in this process for NBD tests, and programs that may not be there.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use block::nbd::{Listener, NbdError, NbdFile, ServeOptions, Stop, serve};
use block::spec::{NbdAddress, NbdSpec};
use block::{ChainFile, Disk, Format, OpenOptions};

/// A disk that is served until this is dropped.
pub struct Served {
    pub dir: tempfile::TempDir,
    pub disk: Arc<Disk>,
    pub export: String,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<Result<(), NbdError>>>,
}

impl Served {
    pub fn new(disk: Disk, options: ServeOptions<'static>) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::unix(&dir.path().join("nbd")).unwrap();
        let (disk, stop) = (Arc::new(disk), Arc::new(Stop::new().unwrap()));
        let export = options.name.clone();
        let (lent, told) = (disk.clone(), stop.clone());
        let thread = std::thread::spawn(move || serve(&listener, &lent, &options, &told));
        Served { dir, disk, export, stop, thread: Some(thread) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket().display())
    }

    pub fn connect(&self) -> Result<NbdFile, NbdError> {
        connect(&self.socket(), &self.export)
    }

    /// Stops the server, and says how it ended.
    pub fn end(mut self) -> Result<(), NbdError> {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap()
    }

    /// Waits until the server ends by itself.
    pub fn join(mut self) -> Result<(), NbdError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.unwrap().is_ok());
        }
    }
}

pub fn connect(socket: &Path, export: &str) -> Result<NbdFile, NbdError> {
    let address = NbdAddress::Unix(socket.to_owned());
    NbdFile::connect(&NbdSpec::new(address, export), None)
}

/// Opens an image of one file for writing.
pub fn open_image(path: &Path, format: Format) -> Disk {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let chain = vec![ChainFile { file, path_label: path.to_owned(), format, extents: Vec::new() }];
    Disk::open(chain, &OpenOptions { format, ..OpenOptions::default() }).unwrap()
}

/// A new image in a file whose directory is kept.
pub fn new_image(dir: &Path, format: Format, bytes: u64) -> Disk {
    let path = dir.join("image");
    match format {
        Format::Raw => std::fs::File::create(&path).unwrap().set_len(bytes).unwrap(),
        _ => drop(run(
            "qemu-img",
            &["create", "-q", "-f", format.name(), &path.display().to_string(), &bytes.to_string()],
        )),
    }
    open_image(&path, format)
}

/// Runs a program that must be there and succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

pub fn output(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| panic!("{program} does not start: {error}"))
}

/// A server program that goes into the background when it listens and writes its process id to `pid`.
pub struct Peer {
    pub dir: tempfile::TempDir,
}

impl Peer {
    /// `args` may name `SOCKET`, `PID` and `DIR`.
    pub fn start(dir: tempfile::TempDir, program: &str, args: &[&str]) -> Peer {
        let path = |name: &str| dir.path().join(name).display().to_string();
        let place = |arg: &&str| {
            arg.replace("SOCKET", &path("nbd"))
                .replace("PID", &path("pid"))
                .replace("DIR", &dir.path().display().to_string())
        };
        let words: Vec<String> = args.iter().map(place).collect();
        let status = Command::new(program).args(&words).stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{program} {words:?}: {status}");
        Peer { dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    /// Ends the program.
    pub fn kill(&self) {
        let Ok(text) = std::fs::read_to_string(self.dir.path().join("pid")) else { return };
        let pid = rustix::process::Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = std::fs::remove_file(self.dir.path().join("pid"));
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}
