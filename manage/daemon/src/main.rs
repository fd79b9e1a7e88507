//! vireod: the management daemon. Speaks libvirt's protocol to clients and the monitor protocol to one vireo-vmm per
//! running domain; keeps definitions on disk and the state of running domains in the run directory.
//!
//! - [`listener`], [`connection`], [`client`], [`outbox`]: bytes to calls and back.
//! - [`dispatch`] and the `drivers`: one file per family of calls. [`error`]: the one table of libvirt's numbers.
//! - [`domain`], [`registry`]: what is, as readers see it. [`owner`]: the task that changes it.
//! - [`store`], [`state_file`]: what survives. [`launch`], [`process`], [`monitor_link`]: the processes of guests.
//!
//! One thread runs everything that does not block; files and process starts go to a few more. Invariant: knows no XDR
//! details and no guest devices.
#![forbid(unsafe_code)]

mod activation;
mod client;
mod clients;
mod connection;
mod console_hold;
mod console_places;
mod daemon;
mod dispatch;
mod domain;
mod drivers;
mod engine;
mod error;
mod events;
mod host;
mod image_chain;
mod launch;
mod listener;
mod monitor_link;
mod notify;
mod options;
mod outbox;
mod owner;
mod paths;
mod process;
mod pty;
mod registry;
mod state_file;
mod store;
mod vm_config;
mod watched_fd;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::daemon::Daemon;
use crate::error::DaemonError;
use crate::listener::{CLIENTS_MAX, ListenError};
use crate::options::{Options, OptionsError};
use crate::paths::{NoHome, Paths};

/// Descriptors that are not clients: files, monitors, consoles.
const RESERVED_FDS: usize = 512;
/// Threads for files and process starts.
const BLOCKING_THREADS: usize = 16;
/// Such a thread ends when it has had nothing to do for so long.
const BLOCKING_IDLE: Duration = Duration::from_secs(2);

/// Why the daemon does not come up.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Home(#[from] NoHome),
    #[error("{0}")]
    Daemon(#[from] DaemonError),
    #[error("{0}")]
    Listen(#[from] ListenError),
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
}

fn main() -> ExitCode {
    let root_user = rustix::process::geteuid().is_root();
    let options = match Options::parse(std::env::args_os().skip(1), root_user) {
        Ok(options) => options,
        Err(error @ (OptionsError::Help | OptionsError::Version)) => {
            println!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("vireod: {error}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireod: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), StartError> {
    // Sockets and files are made with the right mode, nothing depends on who starts us.
    rustix::process::umask(rustix::fs::Mode::RWXO | rustix::fs::Mode::RWXG);
    let client_limit = raise_fd_limit().saturating_sub(RESERVED_FDS).clamp(16, CLIENTS_MAX);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_IDLE)
        .build()
        .map_err(StartError::Runtime)?;
    runtime.block_on(serve(options, client_limit))
}

/// Raises the soft limit of open files to the hard one; returns it.
fn raise_fd_limit() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Without the right to do so the limit stays as it is.
    let _ = rustix::process::setrlimit(Resource::Nofile, wanted);
    let now = rustix::process::getrlimit(Resource::Nofile).current;
    now.map_or(usize::MAX, |now| usize::try_from(now).unwrap_or(usize::MAX))
}

async fn serve(options: &Options, client_limit: usize) -> Result<(), StartError> {
    let paths = Paths::new(options)?;
    let daemon = Arc::new(Daemon::new(options, paths, client_limit)?);
    // Taken before anything of a former daemon is touched: a living one keeps its domains.
    let listeners = listener::open_all(&daemon)?;
    daemon.adopt_running().await?;
    for listener in listeners {
        tokio::spawn(listener::accept_all(daemon.clone(), listener));
    }
    notify::ready();
    let starting = daemon.clone();
    tokio::spawn(async move { starting.autostart().await });
    let mut term = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(StartError::Signals)?;
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = interrupt.recv() => break,
            // A terminal that goes away takes nobody's guests along.
            _ = hangup.recv() => {}
            () = idle(&daemon, options.timeout) => break,
        }
    }
    Ok(())
}

/// Resolves when the daemon has had no client and no running domain for as long as `timeout` says.
async fn idle(daemon: &Daemon, timeout: Option<Duration>) {
    let Some(timeout) = timeout else { return std::future::pending().await };
    loop {
        tokio::time::sleep(timeout).await;
        if daemon.clients.count() == 0 && !daemon.has_running() {
            return;
        }
        if daemon.clients.count() > 0 {
            daemon.clients.left().await;
        }
    }
}
