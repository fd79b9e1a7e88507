//! The host's end of a console: a pseudo-terminal, a socket, a pipe or a terminal, read and written without waiting.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::event::Event;

/// Output kept for a reader who is not there; what is older is lost.
const BACKLOG_BYTES: usize = 65536;

/// What happens to output that the host does not take at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slow {
    /// The guest waits and sees that it has to.
    GuestWaits,
    /// The calling thread waits, so that the guest cannot tell: for a repeatable machine.
    ThreadWaits,
    /// The newest [`BACKLOG_BYTES`] are kept, the rest is lost: nobody has to be there.
    KeepNewest,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// There will be none any more.
    End,
}

/// A console's descriptors and what waits to be written.
#[derive(Debug)]
pub struct HostEnd {
    input: Option<OwnedFd>,
    output: OwnedFd,
    /// Held so that a pseudo-terminal without a reader does not hang up.
    _keep_open: Option<OwnedFd>,
    log: Option<File>,
    slow: Slow,
    backlog: Mutex<VecDeque<u8>>,
    /// Wakes the I/O thread.
    wake: Arc<Event>,
    ended: AtomicBool,
    printed_bytes: AtomicU64,
}

/// What a console is made of.
pub struct HostEndParts {
    /// Where input comes from; `None`: there is none.
    pub input: Option<OwnedFd>,
    /// Where output goes.
    pub output: OwnedFd,
    /// See [`monitor::Console::keep_open`].
    pub keep_open: Option<OwnedFd>,
    /// Gets everything that is printed, too.
    pub log: Option<OwnedFd>,
    /// What happens when output is not taken.
    pub slow: Slow,
    /// Wakes the I/O thread.
    pub wake: Arc<Event>,
}

impl HostEnd {
    /// A console. The descriptors must not block, except regular files.
    pub fn new(parts: HostEndParts) -> HostEnd {
        HostEnd {
            input: parts.input,
            output: parts.output,
            _keep_open: parts.keep_open,
            log: parts.log.map(File::from),
            slow: parts.slow,
            backlog: Mutex::default(),
            wake: parts.wake,
            ended: AtomicBool::new(false),
            printed_bytes: AtomicU64::new(0),
        }
    }

    /// The descriptor to poll for input, while there is any to come.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        if self.ended.load(Ordering::Relaxed) { None } else { self.input.as_ref().map(AsFd::as_fd) }
    }
    /// The descriptor to poll for room, while output waits.
    pub fn waiting_output(&self) -> Option<BorrowedFd<'_>> {
        (!self.backlog.lock().is_empty()).then(|| self.output.as_fd())
    }
    /// Bytes the guest has printed.
    pub fn printed_bytes(&self) -> u64 {
        self.printed_bytes.load(Ordering::Relaxed)
    }
    /// Wakes the I/O thread: there is room for input again.
    pub fn wake(&self) {
        self.wake.set();
    }

    /// Reads what is there.
    pub fn read(&self, buffer: &mut [u8]) -> Input {
        let Some(input) = self.input() else { return Input::End };
        match rustix::io::read(input, buffer) {
            Ok(0) => {
                self.ended.store(true, Ordering::Relaxed);
                Input::End
            }
            Ok(bytes) => Input::Bytes(bytes),
            Err(Errno::AGAIN | Errno::INTR) => Input::Nothing,
            Err(_) => {
                self.ended.store(true, Ordering::Relaxed);
                Input::End
            }
        }
    }

    /// Takes what the guest prints; returns how many bytes were taken.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let taken = match self.slow {
            Slow::KeepNewest => {
                self.write_or_keep(bytes);
                bytes.len()
            }
            Slow::GuestWaits => self.write_now(bytes),
            Slow::ThreadWaits => self.write_all(bytes),
        };
        self.printed_bytes.fetch_add(taken as u64, Ordering::Relaxed);
        if let (Some(mut log), Some(printed)) = (self.log.as_ref(), bytes.get(..taken)) {
            // A full disk must not stop the guest's console.
            let _ = log.write_all(printed);
        }
        taken
    }

    /// Writes as much as is taken now. A host end that is gone takes everything.
    fn write_now(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.output, rest) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(_) => return bytes.len(),
            }
        }
        done
    }

    fn write_all(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            done += self.write_now(rest);
            if done < bytes.len() {
                let _ = poll(&mut [PollFd::new(&self.output, PollFlags::OUT)], None);
            }
        }
        done
    }

    fn write_or_keep(&self, bytes: &[u8]) {
        let mut backlog = self.backlog.lock();
        let done = if backlog.is_empty() { self.write_now(bytes) } else { 0 };
        let rest = bytes.get(done..).unwrap_or(&[]);
        if rest.is_empty() {
            return;
        }
        let was_empty = backlog.is_empty();
        backlog.extend(rest);
        let too_many = backlog.len().saturating_sub(BACKLOG_BYTES);
        backlog.drain(..too_many);
        if was_empty {
            self.wake.set();
        }
    }

    /// Writes what waits, as far as it is taken now.
    pub fn flush(&self) {
        let mut backlog = self.backlog.lock();
        let done = self.write_now(backlog.make_contiguous());
        backlog.drain(..done);
        if backlog.is_empty() {
            backlog.shrink_to(0);
        }
    }
}

/// A console behind a serial port.
pub struct SerialEnd(pub Arc<HostEnd>);

impl chipset::serial::SerialSink for SerialEnd {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }
    fn lossy(&self) -> bool {
        self.0.slow == Slow::KeepNewest
    }
    fn room_again(&mut self) {
        self.0.wake();
    }
}

/// A console behind a virtio device.
pub struct VirtioEnd(pub Arc<HostEnd>);

impl virtio::ConsoleBackend for VirtioEnd {
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self.0.read(buffer) {
            Input::Bytes(bytes) => bytes,
            Input::Nothing | Input::End => 0,
        }
    }
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }
    fn at_end(&self) -> bool {
        self.0.input().is_none()
    }
    fn size(&self) -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(&self.0.output).ok()?;
        (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.output.as_fd())
    }
}

/// Makes a descriptor not block, for everyone who has it.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn end(slow: Slow) -> (HostEnd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let input = Some(OwnedFd::from(ours.try_clone().unwrap()));
        let wake = Arc::new(Event::new().unwrap());
        let parts = HostEndParts { input, output: ours.into(), keep_open: None, log: None, slow, wake };
        (HostEnd::new(parts), theirs)
    }
    fn drain(mut stream: &UnixStream) -> Vec<u8> {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all); // ends with "would block"
        all
    }

    #[test]
    fn a_reader_who_comes_late_finds_the_newest_output() {
        let (end, reader) = end(Slow::KeepNewest);
        let mut printed = Vec::new();
        for line in 0..60_000u32 {
            let text = format!("{line:07}\n");
            assert_eq!(end.write(text.as_bytes()), 8);
            printed.extend(text.into_bytes());
        }
        assert!(end.waiting_output().is_some());
        assert_eq!(end.backlog.lock().len(), BACKLOG_BYTES);
        let mut seen = drain(&reader);
        while end.waiting_output().is_some() {
            end.flush();
            seen.extend(drain(&reader));
        }
        assert_eq!(seen[seen.len() - BACKLOG_BYTES..], printed[printed.len() - BACKLOG_BYTES..]);
        assert_eq!(end.printed_bytes(), 480_000);
    }

    #[test]
    fn a_guest_that_waits_loses_nothing() {
        let (end, reader) = end(Slow::GuestWaits);
        let data: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
        let (mut at, mut seen) = (0, Vec::new());
        while at < data.len() {
            at += end.write(&data[at..]);
            seen.extend(drain(&reader));
        }
        assert_eq!(seen, data);
    }

    #[test]
    fn input_ends_when_the_other_side_goes() {
        let (end, writer) = end(Slow::GuestWaits);
        let mut buffer = [0; 4];
        assert_eq!(end.read(&mut buffer), Input::Nothing);
        (&writer).write_all(b"abcdef").unwrap();
        drop(writer);
        assert_eq!((end.read(&mut buffer), end.read(&mut buffer)), (Input::Bytes(4), Input::Bytes(2)));
        assert_eq!(end.read(&mut buffer), Input::End);
        assert!(end.input().is_none());
    }
}
