//! The daemon's end of a vireo-vmm's monitor: requests with their replies, events for the owner.
//!
//! One task per running domain reads the socket; requests go through a queue, so that a reader of statistics and the
//! owner can ask at once. A monitor that does not answer costs the asker a time limit and nobody else anything.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use monitor::{Command, Event, MAX_LINE_BYTES, Message, PROTOCOL, Reply, Request};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::error::DaemonError;

/// How long a command may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long the greeting may take.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Requests that wait for the socket.
const QUEUE: usize = 64;

type Answer = oneshot::Sender<Result<Reply, monitor::Failure>>;

/// A handle to ask with. Cheap to clone; the connection ends when the process does.
#[derive(Clone, Debug)]
pub struct MonitorLink {
    requests: mpsc::Sender<(Command, Answer)>,
}

impl MonitorLink {
    /// Connects and checks that the right process answers. Events arrive on the receiver; it closes with the connection.
    pub async fn connect(
        path: &Path,
        name: &str,
        uuid: &str,
    ) -> Result<(MonitorLink, mpsc::UnboundedReceiver<Event>), DaemonError> {
        let failed = |detail: String| DaemonError::Monitor { name: name.into(), detail };
        let socket = UnixStream::connect(path).await.map_err(|error| failed(error.to_string()))?;
        let (read, write) = socket.into_split();
        let mut reader = LineReader { reader: BufReader::new(read), line: Vec::new() };
        let greeting = timeout(GREETING_LIMIT, reader.next()).await;
        let greeting =
            greeting.map_err(|_| DaemonError::VmmSilent { name: name.into(), seconds: GREETING_LIMIT.as_secs() })?;
        match greeting {
            Some(Message::Greeting { protocol, uuid: found }) if protocol.0 == PROTOCOL.0 && found == uuid => {}
            Some(Message::Greeting { protocol, uuid: found }) => {
                let (ours, theirs) = (PROTOCOL.0, protocol.0);
                return Err(failed(format!(
                    "speaks protocol {theirs} (we: {ours}) for domain {found} (wanted: {uuid})"
                )));
            }
            _ => return Err(failed("no greeting".into())),
        }
        let (requests, inbox) = mpsc::channel(QUEUE);
        let (event_sender, events) = mpsc::unbounded_channel();
        tokio::spawn(run(reader, write, inbox, event_sender));
        Ok((MonitorLink { requests }, events))
    }

    /// Tells whoever listens at `path` to end. A socket without a process is as well.
    pub async fn quit_stranger(path: &Path) {
        let Ok(mut socket) = UnixStream::connect(path).await else { return };
        let Ok(mut line) = serde_json::to_vec(&Request { id: 1, command: Command::Quit }) else { return };
        line.push(b'\n');
        if socket.write_all(&line).await.is_ok() {
            // Its end closes the connection; one that hangs is left to the administrator.
            let mut rest = Vec::new();
            let end = tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut rest);
            if timeout(GREETING_LIMIT, end).await.is_err() {
                eprintln!("{}: a vireo-vmm that nobody knows does not end", path.display());
            }
        }
    }

    /// Carries out a command.
    pub async fn ask(&self, name: &str, command: Command) -> Result<Reply, DaemonError> {
        let gone = || DaemonError::Monitor { name: name.into(), detail: "the connection has ended".into() };
        let (sender, answer) = oneshot::channel();
        let exchange = async {
            self.requests.send((command, sender)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?.map_err(DaemonError::Vmm)
        };
        let silent = |_| DaemonError::VmmSilent { name: name.into(), seconds: ANSWER_LIMIT.as_secs() };
        timeout(ANSWER_LIMIT, exchange).await.map_err(silent)?
    }

    /// Sends a command whose answer nobody waits for.
    pub fn tell(&self, command: Command) {
        let (sender, _) = oneshot::channel();
        // A full queue means a process that does not read: it is about to be killed anyway.
        let _ = self.requests.try_send((command, sender));
    }
}

struct LineReader {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl LineReader {
    /// The next message; `None` at the end, or when what comes is not the protocol: the process is ours to judge, and one
    /// that talks nonsense is as good as gone.
    async fn next(&mut self) -> Option<Message> {
        use tokio::io::{AsyncBufReadExt, AsyncReadExt};
        self.line.clear();
        let mut limited = (&mut self.reader).take(MAX_LINE_BYTES as u64);
        let count = limited.read_until(b'\n', &mut self.line).await.ok()?;
        if count == 0 || self.line.last() != Some(&b'\n') {
            return None;
        }
        serde_json::from_slice(&self.line).ok()
    }
}

async fn run(
    mut reader: LineReader,
    mut writer: OwnedWriteHalf,
    mut inbox: mpsc::Receiver<(Command, Answer)>,
    events: mpsc::UnboundedSender<Event>,
) {
    let (messages_in, mut messages) = mpsc::channel(QUEUE);
    // A partly read line must not be lost when a request comes in between, so reading has a task of its own.
    let reading = tokio::spawn(async move {
        while let Some(message) = reader.next().await {
            if messages_in.send(message).await.is_err() {
                break;
            }
        }
    });
    let mut waiting: HashMap<u64, Answer> = HashMap::new();
    let mut next_id = 1;
    let mut unwritable = false;
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Return { id, value }) => answer(&mut waiting, id, Ok(value)),
                Some(Message::Error { id, error }) => answer(&mut waiting, id, Err(error)),
                Some(Message::Event(event)) => drop(events.send(event)),
                Some(Message::Greeting { .. }) => {}
                None => break,
            },
            request = inbox.recv(), if !unwritable => {
                let Some((command, sender)) = request else { break };
                let Ok(mut line) = serde_json::to_vec(&Request { id: next_id, command }) else { continue };
                line.push(b'\n');
                waiting.insert(next_id, sender);
                next_id += 1;
                // The process has ended; what it said before that is still read.
                unwritable = writer.write_all(&line).await.is_err();
                if unwritable {
                    inbox.close();
                }
            }
        }
    }
    reading.abort();
}

fn answer(waiting: &mut HashMap<u64, Answer>, id: u64, result: Result<Reply, monitor::Failure>) {
    if let Some(sender) = waiting.remove(&id) {
        // The asker may have given up; then nobody wants to know.
        let _ = sender.send(result);
    }
}
