//! Consoles: a stream between a client and the pseudo terminal of a running domain.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rpc_wire::frame::{Header, Status, write_frame};
use rpc_wire::remote::*;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use xml::DomainDefinition;

use crate::client::Client;
use crate::console_hold::ConsoleHold;
use crate::dispatch::Ctx;
use crate::drivers::domain_info::{live, snapshot};
use crate::error::DaemonError;
use crate::pty;
use crate::watched_fd::watch;

/// Open flag: whoever has the console loses it.
const FORCE: u32 = 1;
/// Open flag: only where we can keep two clients apart, which is always.
const SAFE: u32 = 2;
/// Bytes read from a console at once.
const CHUNK_BYTES: usize = 4096;
/// How long a terminal may take to hand out what its machine has written before it ended.
const REST_LIMIT: Duration = Duration::from_millis(50);
/// Unsent bytes of a client above which its console waits.
const BACKLOG_BYTES: usize = 64 << 10;

pub fn open_console(ctx: &Ctx, args: domain_open_console::Args) -> Result<domain_open_console::Reply, DaemonError> {
    ctx.check_flags(args.flags, FORCE | SAFE)?;
    let live = live(&*snapshot(ctx, &args.dom)?)?;
    let wanted = args.dev_name.map(|name| name.lossy().into_owned()).filter(|name| !name.is_empty());
    let definition = DomainDefinition::load(live.definition.xml.as_bytes())?;
    let missing = || DaemonError::NoConsole { alias: wanted.clone().unwrap_or_else(|| "serial0".into()) };
    let found = definition.console_pty(wanted.as_deref()).ok_or_else(missing)?;
    let place = ctx.daemon.consoles.enter(&found.path, args.flags & FORCE != 0).ok_or(DaemonError::ConsoleBusy)?;
    let failed = |source| DaemonError::ConsoleOpen { path: found.path.clone().into(), source };
    let terminal = pty::open_terminal(Path::new(&found.path)).map_err(failed)?;
    let terminal = watch(terminal).map_err(failed)?;
    let serial = ctx.header.serial;
    let input = ctx.client.open_stream(serial).ok_or(DaemonError::StreamBusy { serial })?;
    let (client, header) = (ctx.client.clone(), ctx.header);
    let hold = live.consoles.clone();
    // The reply is queued when this call returns, before the task has run: one thread runs both.
    tokio::spawn(async move {
        let (_place, kicked) = place;
        carry(&client, header, &terminal, &hold, input, kicked).await;
    });
    Ok(domain_open_console::Reply {})
}

/// Carries bytes until the client has enough, the machine ends, or another client takes over.
async fn carry(
    client: &Arc<Client>,
    call: Header,
    terminal: &AsyncFd<OwnedFd>,
    hold: &ConsoleHold,
    mut input: mpsc::Receiver<Vec<u8>>,
    mut kicked: oneshot::Receiver<()>,
) {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut typed: Vec<u8> = Vec::new();
    loop {
        tokio::select! {
            biased;
            _ = &mut kicked => break,
            written = write_some(terminal, &typed), if !typed.is_empty() => match written {
                Ok(count) => drop(typed.drain(..count.min(typed.len()))),
                Err(_) => break,
            },
            // A guest that does not read what was typed keeps nobody from reading what it prints.
            bytes = input.recv(), if typed.is_empty() => match bytes {
                Some(bytes) => typed = bytes,
                // The client has finished the stream itself and has been answered.
                None => return,
            },
            read = read_some(terminal, &mut chunk), if client.with_outbox(|outbox| outbox.pending_bytes()) <= BACKLOG_BYTES => {
                match read {
                    Ok(count) if count > 0 => send(client, call, chunk.get(..count).unwrap_or_default()),
                    _ => break,
                }
            }
            () = hold.ended() => {
                send_the_rest(client, call, terminal, &mut chunk).await;
                break;
            }
            () = client.drained_to(BACKLOG_BYTES), if client.with_outbox(|outbox| outbox.pending_bytes()) > BACKLOG_BYTES => {}
        }
    }
    // Nothing more comes: the client is told and finishes the stream.
    send(client, call, &[]);
    while input.recv().await.is_some() {}
}

/// Sends what an ended machine has left in its terminal; the terminal's buffer bounds it.
async fn send_the_rest(client: &Client, call: Header, terminal: &AsyncFd<OwnedFd>, chunk: &mut [u8]) {
    while let Ok(Ok(count @ 1..)) = timeout(REST_LIMIT, read_some(terminal, chunk)).await {
        send(client, call, chunk.get(..count).unwrap_or_default());
    }
}

fn send(client: &Client, call: Header, bytes: &[u8]) {
    let mut packet = Vec::with_capacity(bytes.len() + 32);
    write_frame(&mut packet, call.stream(Status::Continue), |out| out.extend_from_slice(bytes));
    client.send(packet);
}

async fn read_some(terminal: &AsyncFd<OwnedFd>, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = terminal.readable().await?;
        match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut *chunk)?)) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

async fn write_some(terminal: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut ready = terminal.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}
