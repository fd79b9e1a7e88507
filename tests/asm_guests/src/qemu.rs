//! Runs a guest in QEMU, emulated, for comparison.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::image::BuildError;
use crate::suite::{End, Guest, Outcome, Peer, Ran, Verdict, judge};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The longest run; QEMU's start is part of it.
const LIMIT: Duration = Duration::from_secs(30);
/// Output beyond this is not read.
const OUTPUT_LIMIT: u64 = 64 << 10;
/// What isa-debug-exit makes of a written 0.
const STOPPED: i32 = 1;

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// Its image cannot be built.
    #[error("its image cannot be built")]
    Build(#[from] BuildError),
    /// QEMU or its files failed.
    #[error("{PROGRAM}: {doing} failed")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> QemuError {
    move |source| QemuError::Io { doing, source }
}

/// Whether QEMU is installed.
pub fn installed() -> bool {
    Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// Runs `guest` and judges it.
pub fn check(guest: &Guest) -> Result<Verdict, QemuError> {
    if let Peer::Skipped(why) = guest.qemu {
        return Ok(Verdict::Skipped(why.to_owned()));
    }
    Ok(judge(guest, Ran::Qemu, run(&guest.image()?)?))
}

fn run(image: &[u8]) -> Result<Outcome, QemuError> {
    let dir = tempfile::tempdir().map_err(io("a directory for the image"))?;
    let path = dir.path().join("guest.bin");
    std::fs::write(&path, image).map_err(io("writing the image"))?;
    let mut command = Command::new(PROGRAM);
    command.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "16", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-no-reboot", "-debugcon", "stdio", "-global", "isa-debugcon.iobase=0x402"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"]).arg(&path);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(io("starting it"))?;
    let outcome = watch(&mut child);
    // Already ended, unless it was late or something failed.
    let _ = child.kill();
    let _ = child.wait();
    outcome
}

/// Reads the output to its end, which is QEMU's end too; a late QEMU is left to the caller.
fn watch(child: &mut Child) -> Result<Outcome, QemuError> {
    let stdout = child.stdout.take();
    let (done, reading) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(OUTPUT_LIMIT).read_to_end(&mut text);
        }
        let _ = done.send(text);
    });
    let Ok(text) = reading.recv_timeout(LIMIT) else {
        return Ok(Outcome { output: String::new(), end: End::TimedOut });
    };
    let status = child.wait().map_err(io("waiting for it"))?;
    let end = match status.code() {
        Some(STOPPED) => End::Stop,
        Some(0) => End::TripleFault,
        _ => End::Failed(status.to_string()),
    };
    Ok(Outcome { output: String::from_utf8_lossy(&text).into_owned(), end })
}
