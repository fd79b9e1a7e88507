//! The monitor's server side: peers, their requests, and what they are sent. Runs on the owner's thread and never waits.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use monitor::{Channel, ChannelError, Event, Failure, FailureClass, Message, PROTOCOL, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Peers served at once; more are turned away.
const MAX_PEERS: usize = 32;
/// Messages kept for a peer that does not read; then it is let go.
const MAX_OUTBOX_BYTES: usize = 1 << 20;
/// Requests of one peer carried out before others get their turn.
const TURN_REQUESTS: usize = 16;
/// How long the last messages of a process may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);

/// A peer's number, unique in the life of the process.
pub type PeerId = u64;

/// A request as it arrived.
#[derive(Debug)]
pub struct Asked {
    /// By whom.
    pub peer: PeerId,
    /// What.
    pub request: Request,
}

struct Peer {
    id: PeerId,
    channel: Channel,
    outbox: VecDeque<u8>,
    gone: bool,
}

/// The server.
pub struct MonitorServer {
    listener: Option<UnixListener>,
    uuid: String,
    peers: Vec<Peer>,
    last_id: PeerId,
}

impl MonitorServer {
    /// Serves peers that connect to `listener`; `None`: there will be none.
    pub fn new(listener: Option<UnixListener>, uuid: String) -> io::Result<MonitorServer> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(MonitorServer { listener, uuid, peers: Vec::new(), last_id: 0 })
    }

    /// Adds what the owner has to poll.
    pub fn poll_fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        for peer in &self.peers {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, !peer.outbox.is_empty());
            fds.push(PollFd::new(peer.channel.socket(), flags));
        }
    }

    /// Moves bytes in both directions as far as they go. Returns the requests that have arrived; those that could not
    /// be read have been answered.
    pub fn turn(&mut self) -> Vec<Asked> {
        self.accept();
        let mut asked = Vec::new();
        for peer in &mut self.peers {
            peer.write();
            peer.read(&mut asked);
        }
        self.peers.retain(|peer| !peer.gone);
        asked
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok((socket, _)) = listener.accept() {
            if self.peers.len() < MAX_PEERS && socket.set_nonblocking(true).is_ok() {
                self.last_id += 1;
                let mut peer = Peer::new(self.last_id, socket);
                peer.send(&Message::Greeting { protocol: PROTOCOL, uuid: self.uuid.clone() });
                self.peers.push(peer);
            }
        }
    }

    /// Answers a request.
    pub fn answer(&mut self, peer: PeerId, id: u64, answer: Result<Reply, Failure>) {
        if let Some(peer) = self.peers.iter_mut().find(|p| p.id == peer) {
            peer.send(&match answer {
                Ok(value) => Message::Return { id, value },
                Err(error) => Message::Error { id, error },
            });
        }
    }

    /// Tells every peer.
    pub fn tell_all(&mut self, event: &Event) {
        let message = Message::Event(event.clone());
        self.peers.iter_mut().for_each(|peer| peer.send(&message));
    }

    /// Sends what is still waiting, before the process ends. Waits at most a second.
    pub fn farewell(&mut self) {
        let end = Instant::now() + FAREWELL;
        loop {
            self.peers.iter_mut().for_each(Peer::write);
            let waiting = self.peers.iter().filter(|peer| !peer.gone && !peer.outbox.is_empty());
            let mut fds: Vec<PollFd<'_>> =
                waiting.map(|peer| PollFd::new(peer.channel.socket(), PollFlags::OUT)).collect();
            let left = end.saturating_duration_since(Instant::now());
            if fds.is_empty() || left.is_zero() {
                return;
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let _ = poll(&mut fds, Some(&left));
        }
    }
}

impl Peer {
    fn new(id: PeerId, socket: UnixStream) -> Peer {
        Peer { id, channel: Channel::new(socket), outbox: VecDeque::new(), gone: false }
    }

    fn send(&mut self, message: &Message) {
        let Ok(line) = serde_json::to_vec(message) else { return };
        if self.outbox.len() + line.len() > MAX_OUTBOX_BYTES {
            self.gone = true;
            return;
        }
        self.outbox.extend(line);
        self.outbox.push_back(b'\n');
        self.write();
    }

    fn write(&mut self) {
        while !self.gone && !self.outbox.is_empty() {
            let (front, _) = self.outbox.as_slices();
            match send(self.channel.socket().as_fd(), front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(bytes) => drop(self.outbox.drain(..bytes)),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
    }

    fn read(&mut self, asked: &mut Vec<Asked>) {
        for _ in 0..TURN_REQUESTS {
            if self.gone {
                return;
            }
            match self.channel.receive::<Request>() {
                Ok((request, _)) => asked.push(Asked { peer: self.id, request }),
                Err(ChannelError::Io(error)) if error.kind() == ErrorKind::WouldBlock => return,
                Err(ChannelError::Parse(error)) => {
                    let text = format!("the request does not parse: {error}");
                    self.send(&Message::Error { id: 0, error: Failure { class: FailureClass::Command, text } });
                }
                Err(_) => self.gone = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use monitor::Command;
    use std::io::{BufRead, BufReader, Write};

    fn server(directory: &tempfile::TempDir) -> (MonitorServer, UnixStream) {
        let path = directory.path().join("monitor");
        let mut server = MonitorServer::new(Some(UnixListener::bind(&path).unwrap()), "u-1".into()).unwrap();
        let peer = UnixStream::connect(&path).unwrap();
        assert!(server.turn().is_empty());
        (server, peer)
    }
    fn next_line(reader: &mut impl BufRead) -> String {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[test]
    fn greeting_requests_nonsense_and_events() {
        let directory = tempfile::tempdir().unwrap();
        let (mut server, mut peer) = server(&directory);
        peer.write_all(b"{\"id\":5,\"execute\":\"query-status\"}\nnonsense\n{\"id\":6,\"exe").unwrap();
        let asked = server.turn();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].request, Request { id: 5, command: Command::QueryStatus });
        server.answer(asked[0].peer, 5, Ok(Reply::Done));
        server.tell_all(&Event::Resumed);
        peer.write_all(b"cute\":\"cont\"}\n").unwrap();
        assert_eq!(server.turn()[0].request, Request { id: 6, command: Command::Cont });
        server.farewell();
        let mut reader = BufReader::new(peer);
        assert_eq!(next_line(&mut reader), r#"{"greeting":{"protocol":[1,0],"uuid":"u-1"}}"#);
        assert!(next_line(&mut reader).contains(r#""class":"command""#));
        assert_eq!(next_line(&mut reader), r#"{"return":{"id":5,"value":"done"}}"#);
        assert_eq!(next_line(&mut reader), r#"{"event":{"name":"resumed"}}"#);
    }

    #[test]
    fn a_peer_that_does_not_read_is_let_go_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let (mut server, deaf) = server(&directory);
        let other = UnixStream::connect(directory.path().join("monitor")).unwrap();
        server.turn();
        other.set_nonblocking(true).unwrap();
        let text = "x".repeat(1000);
        for _ in 0..2000 {
            server.tell_all(&Event::Crashed { text: text.clone() });
            let mut sink = [0; 65536];
            while std::io::Read::read(&mut (&other), &mut sink).is_ok() {}
            server.turn();
        }
        assert_eq!(server.peers.len(), 1);
        drop(deaf);
        drop(other);
        server.turn();
        assert!(server.peers.is_empty());
    }

    #[test]
    fn too_many_peers_are_turned_away() {
        let directory = tempfile::tempdir().unwrap();
        let (mut server, first) = server(&directory);
        let path = directory.path().join("monitor");
        let more: Vec<UnixStream> = (0..MAX_PEERS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        server.turn();
        assert_eq!(server.peers.len(), MAX_PEERS);
        drop((first, more));
    }
}
