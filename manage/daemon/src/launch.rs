//! Starts a vireo-vmm: the process, the configuration over a socket pair, its one answer.
//!
//! The pair's end is the child's standard input, so that no descriptor has to be inheritable for a moment. The process
//! has a process group of its own: a Ctrl+C on the daemon's terminal is not meant for guests.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use monitor::{Channel, ChannelError, StartReply};
use xml::{DomainConfig, LivePty};

use crate::error::DaemonError;
use crate::vm_config;

/// How long a machine may take to be built.
const START_LIMIT: Duration = Duration::from_secs(60);
/// What is read of the log to find a process's last words.
const LAST_WORDS_BYTES: u64 = 4096;

/// What a start needs to know.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// The machine.
    pub domain: DomainConfig,
    /// Left standing until resumed.
    pub paused: bool,
    /// The vireo-vmm program.
    pub program: PathBuf,
    /// Its monitor's socket.
    pub monitor_path: PathBuf,
    /// Where it prints.
    pub log_path: PathBuf,
}

/// A machine that exists.
#[derive(Debug)]
pub struct Launched {
    /// Process id of vireo-vmm, our child.
    pub pid: i32,
    /// Consoles.
    pub ptys: Vec<LivePty>,
    /// Their controlling sides.
    pub controllers: Vec<OwnedFd>,
    /// Backing files per disk.
    pub backing: Vec<Vec<(String, String)>>,
}

/// Starts the process and waits for its answer. Blocks; where it fails nothing is left: no process and no socket.
pub fn launch(plan: &LaunchPlan) -> Result<Launched, DaemonError> {
    let socket = &plan.monitor_path;
    remove_stale(socket).map_err(file_error("replace", socket))?;
    let listener = UnixListener::bind(socket).map_err(file_error("listen on", socket))?;
    start(plan, listener).inspect_err(|_| {
        let _ = fs::remove_file(socket);
    })
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DaemonError + use<> {
    let path = path.to_owned();
    move |source| DaemonError::File { action, path, source }
}

fn start(plan: &LaunchPlan, listener: UnixListener) -> Result<Launched, DaemonError> {
    let machine = vm_config::build(&plan.domain, OwnedFd::from(listener), plan.paused)?;
    let mut log = open_log(&plan.log_path).map_err(file_error("open", &plan.log_path))?;
    let log_start = log.seek(SeekFrom::End(0)).map_err(file_error("read", &plan.log_path))?;
    let (ours, theirs) = UnixStream::pair().map_err(file_error("make the start-up socket of", &plan.program))?;
    let mut child = spawn(plan, theirs, &log)
        .map_err(|source| DaemonError::VmmProgram { program: plan.program.clone(), source })?;
    match handshake(ours, &machine) {
        Ok(StartReply::Ready { .. }) => {
            // The owner reaps through a pidfd; the handle would only warn about an unawaited child.
            let vm_config::Machine { ptys, controllers, backing, .. } = machine;
            Ok(Launched { pid: child.id() as i32, ptys, controllers, backing })
        }
        Ok(StartReply::Failed(failure)) => {
            end(&mut child);
            Err(DaemonError::Vmm(failure))
        }
        Err(error) => {
            let silent = matches!(&error, ChannelError::Io(e) if e.kind() == io::ErrorKind::WouldBlock);
            let status = end(&mut child);
            if silent {
                let (name, seconds) = (plan.domain.name.clone(), START_LIMIT.as_secs());
                return Err(DaemonError::VmmSilent { name, seconds });
            }
            let mut words = last_words(&plan.log_path, log_start);
            if words.is_empty() {
                words = status.map_or_else(|| error.to_string(), |status| status.to_string());
            }
            Err(DaemonError::VmmEnded { when: "before the machine was built", last_words: words })
        }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    let mut log = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
    log.write_all(b"starting up\n")?;
    Ok(log)
}

fn spawn(plan: &LaunchPlan, start: UnixStream, log: &File) -> io::Result<std::process::Child> {
    Command::new(&plan.program)
        .args(["--start-fd", "0", "--name", &plan.domain.name, "--uuid", &plan.domain.uuid.to_string()])
        .stdin(Stdio::from(OwnedFd::from(start)))
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .process_group(0)
        .spawn()
}

fn handshake(socket: UnixStream, machine: &vm_config::Machine) -> Result<StartReply, ChannelError> {
    socket.set_read_timeout(Some(START_LIMIT))?;
    socket.set_write_timeout(Some(START_LIMIT))?;
    let mut channel = Channel::new(socket);
    let fds: Vec<_> = machine.fds.iter().map(AsFd::as_fd).collect();
    channel.send(&machine.config, &fds)?;
    channel.receive::<StartReply>().map(|(reply, _)| reply)
}

/// Ends a process that did not become a machine, and says how it ended by itself.
fn end(child: &mut std::process::Child) -> Option<String> {
    let _ = child.kill();
    let status = child.wait().ok()?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Some(format!("exit status {code}")),
        // Our own kill says nothing.
        (None, Some(signal)) if signal != libc::SIGKILL => Some(format!("signal {signal}")),
        _ => None,
    }
}

/// The last line a process printed since `start`, without what is ours.
pub fn last_words(log: &Path, start: u64) -> String {
    let read = || {
        let mut file = File::open(log).ok()?;
        let end = file.seek(SeekFrom::End(0)).ok()?;
        file.seek(SeekFrom::Start(start.max(end.saturating_sub(LAST_WORDS_BYTES)))).ok()?;
        let mut bytes = Vec::new();
        file.take(LAST_WORDS_BYTES).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let line = text.lines().rev().find(|line| !line.trim().is_empty() && *line != "starting up")?;
        Some(line.trim().to_owned())
    };
    read().unwrap_or_default()
}
