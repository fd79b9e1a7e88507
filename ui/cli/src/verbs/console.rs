//! The console of a running domain on this terminal.

use std::io::{self, Write};
use std::os::fd::AsFd;

use client::{DomainRef, StreamPacket};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::failure::Failure;
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, option};
use crate::shell::Shell;

const CONSOLE: &[Opt] = &[
    DOMAIN,
    option("devname", Kind::Text, "alias of the console"),
    flag("force", "take it from whoever has it"),
    flag("safe", "only where two users cannot get into each other's way"),
];

pub const VERBS: &[Verb] = &[Verb {
    name: "console",
    group: Group::Domain,
    summary: "attach this terminal to a guest's console",
    options: CONSOLE,
    shows: false,
    run: console,
}];

fn console(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    if shell.connection()?.state(&domain, 0)?.0 == 5 {
        return Err(Failure::new("The domain is not running"));
    }
    let flags = u32::from(args.has("force")) | if args.has("safe") { 2 } else { 0 };
    attach(shell, &domain, args.text("devname"), flags)
}

/// The terminal's modes, put back at the end.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<RawTerminal, Failure> {
        let failed = |error: rustix::io::Errno| Failure::new(format!("unable to set the terminal's modes: {error}"));
        let before = tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no modes.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// Attaches until the escape character is typed or the guest ends.
pub fn attach(shell: &mut Shell, domain: &DomainRef, device: Option<&str>, flags: u32) -> Done {
    if !isatty(rustix::stdio::stdin()) {
        return Err(Failure::new("Cannot run interactive console without a controlling TTY"));
    }
    let escape = shell.escape;
    let name = domain.name.lossy().into_owned();
    let shown = format!("^{}", char::from(escape | 0x40));
    shell.remark(format!(
        "Connected to domain '{name}'\nEscape character is {shown} (Ctrl + {})\n",
        char::from(escape | 0x40)
    ));
    shell.flush();
    let stream = shell.connection()?.open_console(domain, device, flags)?;
    let terminal = RawTerminal::enter()?;
    let outcome = pump(shell, stream, escape);
    drop(terminal);
    outcome
}

fn pump(shell: &mut Shell, stream: client::StreamId, escape: u8) -> Done {
    let connection = shell.connection()?;
    let mut typed = [0; 1024];
    loop {
        while let Some(packet) = connection.buffered_stream_packet(stream)? {
            match packet {
                StreamPacket::Data(bytes) => {
                    let mut stdout = io::stdout().lock();
                    let written = stdout.write_all(&bytes).and_then(|()| stdout.flush());
                    written.map_err(|error| Failure::new(error.to_string()))?;
                }
                StreamPacket::End => return Ok(connection.finish_stream(stream)?),
                StreamPacket::Failed(error) => return Err(error.into()),
            }
        }
        let (keyboard, daemon) = {
            let mut fds = [
                PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN),
                PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Failure::new(error.to_string())),
            }
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if daemon {
            connection.receive()?;
        }
        if keyboard {
            let count = rustix::io::read(rustix::stdio::stdin().as_fd(), &mut typed).unwrap_or(0);
            let bytes = typed.get(..count).unwrap_or_default();
            let end = bytes.iter().position(|byte| *byte == escape);
            let sent = bytes.get(..end.unwrap_or(count)).unwrap_or_default();
            if !sent.is_empty() {
                connection.send_stream(stream, sent)?;
            }
            if end.is_some() || count == 0 {
                return leave(connection, stream);
            }
        }
    }
}

/// Ends the stream in good order and waits until the daemon says so.
fn leave(connection: &mut client::Connection, stream: client::StreamId) -> Done {
    connection.finish_stream(stream)?;
    loop {
        match connection.next_stream_packet(stream, None)? {
            Some(StreamPacket::Data(_)) => {}
            Some(StreamPacket::Failed(error)) => return Err(error.into()),
            Some(StreamPacket::End) | None => return Ok(()),
        }
    }
}
