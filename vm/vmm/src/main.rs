//! The process of one virtual machine; see the library.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use monitor::{ShutdownCause, StartReply};
use vmm::error::{VmmError, causes};
use vmm::notes::Notes;
use vmm::owner::{End, Owner};
use vmm::run_args::{self, ArgsError, RunArgs, USAGE};
use vmm::sandbox::{self, Deed};
use vmm::setup::{self, Files, OwnTerminal};
use vmm::start::StartSocket;
use vmm::words::say;
use vmm::{engine, heap, host_probe, signals, terminal};

fn main() -> ExitCode {
    install_last_words();
    heap::share();
    let mut args = std::env::args_os().skip(1);
    let command = args.next().unwrap_or_default();
    let result = match command.to_str().unwrap_or_default() {
        "run" => run(args),
        "--start-fd" => start(args),
        "--probe-kvm" => probe_kvm(),
        "--probe-host" => {
            println!("{}", host_probe::probe().to_json());
            Ok(ExitCode::SUCCESS)
        }
        "--try-inside" => try_inside(args),
        "--version" => {
            println!("vireo-vmm {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            eprint!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    };
    result.unwrap_or_else(|error| {
        terminal::restore();
        say(causes(&error));
        ExitCode::from(if matches!(error, VmmError::Args(_)) { 2 } else { 1 })
    })
}

/// A panic is a bug of ours, on whichever thread: the process says so and ends, because half a machine helps nobody.
fn install_last_words() {
    std::panic::set_hook(Box::new(|info| {
        terminal::restore();
        let thread = std::thread::current();
        say(format_args!("internal error in thread {}: {info}", thread.name().unwrap_or("?")));
        std::process::exit(101);
    }));
}

fn run(args: impl Iterator<Item = OsString>) -> Result<ExitCode, VmmError> {
    let Some(args) = run_args::parse(args)? else {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    let stats = open_stats(&args)?;
    let (config, files) = args.open()?;
    let notes = Arc::new(Notes::new().map_err(VmmError::host("make an event descriptor"))?);
    let signals = signals::catch().map_err(VmmError::host("catch signals"))?;
    let terminal = own_terminal()?;
    let setup = setup::prepare(&config, &Files(files), Some(terminal), &notes)?;
    let mut owner = engine::build(&config, setup, notes, signals)?.owner;
    if config.sandbox {
        confine(&mut owner)?;
    }
    terminal::make_raw(io::stdin()).map_err(VmmError::host("set the terminal"))?;
    let end = owner.run(false);
    owner.finish();
    terminal::restore();
    if let Some(mut file) = stats {
        let written = file.write_all(owner.stats().to_json().as_bytes());
        written.map_err(VmmError::host("write the statistics"))?;
    }
    Ok(exit_code(end?))
}

/// Started by vireod. What follows the number (`--name`, `--uuid`) is there for people who look at process lists.
fn start(mut args: impl Iterator<Item = OsString>) -> Result<ExitCode, VmmError> {
    let number = args.next().unwrap_or_default().to_string_lossy().into_owned();
    let want = "the number of an open socket";
    let fd = number.parse().map_err(|_| ArgsError::Value { option: "--start-fd", value: number, want })?;
    let mut socket = StartSocket::take(fd)?;
    let built = socket.receive().and_then(|(config, files)| {
        let notes = Arc::new(Notes::new().map_err(VmmError::host("make an event descriptor"))?);
        let signals = signals::catch().map_err(VmmError::host("catch signals"))?;
        let setup = setup::prepare(&config, &files, None, &notes)?;
        let mut built = engine::build(&config, setup, notes, signals)?;
        if config.sandbox {
            confine(&mut built.owner)?;
        }
        Ok((built, config.paused))
    });
    let (built, paused) = match built {
        Ok(built) => built,
        Err(error) => {
            socket.answer(&StartReply::Failed(error.failure()));
            return Err(error);
        }
    };
    let mut owner = built.owner;
    socket.answer(&StartReply::Ready { accel: built.accel });
    let end = owner.run(paused);
    owner.finish();
    Ok(exit_code(end?))
}

fn confine(owner: &mut Owner) -> Result<(), VmmError> {
    if owner.confine()? == sandbox::Files::NotEnforced {
        say("there is no Landlock here; the system call filter alone keeps files away (vireo doctor says why)");
    }
    Ok(())
}

/// `--try-inside open|connect|execve`: shows that the sandbox holds. The kernel ends the process with SIGSYS.
fn try_inside(mut args: impl Iterator<Item = OsString>) -> Result<ExitCode, VmmError> {
    let deed = match args.next().unwrap_or_default().to_str() {
        Some("open") => Deed::Open,
        Some("connect") => Deed::Connect,
        Some("execve") => Deed::Execve,
        other => {
            let value = other.unwrap_or_default().to_owned();
            return Err(ArgsError::Value { option: "--try-inside", value, want: "open, connect or execve" }.into());
        }
    };
    let error = sandbox::try_inside(deed)?;
    say(format_args!("the sandbox did not stop {deed:?}: {error}"));
    Ok(ExitCode::FAILURE)
}

/// Says whether KVM works here.
fn probe_kvm() -> Result<ExitCode, VmmError> {
    let refusal = engine::kvm().err();
    let report = serde_json::json!({ "usable": refusal.is_none(), "reason": refusal });
    println!("{report}");
    Ok(if refusal.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn open_stats(args: &RunArgs) -> Result<Option<File>, VmmError> {
    let create = |path: &std::path::PathBuf| {
        let failed = |source| VmmError::Open { what: "statistics file", path: path.clone(), source };
        File::create(path).map_err(failed)
    };
    args.stats.as_ref().map(create).transpose()
}

fn own_terminal() -> Result<OwnTerminal, VmmError> {
    let reopen = |fd: &dyn Fn(bool) -> io::Result<std::os::fd::OwnedFd>, write| {
        fd(write).map_err(VmmError::host("open the terminal"))
    };
    let input = reopen(&|write| terminal::reopen_nonblocking(io::stdin().as_fd(), write), false)?;
    let output = reopen(&|write| terminal::reopen_nonblocking(io::stdout().as_fd(), write), true)?;
    let leave_key = io::stdin().is_terminal().then_some(terminal::LEAVE_KEY);
    Ok(OwnTerminal { input, output, leave_key })
}

/// A guest that ends as it wanted is a success; 1 after a crash, 128 and the number after a signal, as shells do.
fn exit_code(end: End) -> ExitCode {
    match end {
        End::Machine(ShutdownCause::PowerOff | ShutdownCause::Reset | ShutdownCause::Quit) | End::LeaveKey => {
            ExitCode::SUCCESS
        }
        End::Machine(ShutdownCause::Crash) => ExitCode::FAILURE,
        End::Signal(number) => ExitCode::from(128u8.saturating_add(number as u8)),
    }
}
