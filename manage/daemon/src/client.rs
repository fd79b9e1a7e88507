//! One connected client, as drivers see it: who it is, what it may do, and the way back to it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use rpc_wire::frame::{Header, Status, frame_of};
use rpc_wire::{ErrorBody, Xdr};
use tokio::sync::{Notify, mpsc};
use uuid::Uuid;

use crate::outbox::Outbox;

/// Most streams one client has open.
const STREAMS_MAX: usize = 64;
/// Packets of one stream that wait for its task.
const STREAM_QUEUE_PACKETS: usize = 32;

/// Who is at the other end of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id at the time of connecting.
    pub pid: i32,
    /// User id.
    pub uid: u32,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    /// Unique among the clients of this daemon's life.
    pub id: u64,
    /// Process and user.
    pub peer: Peer,
    read_only: AtomicBool,
    opened: AtomicBool,
    keepalive: AtomicBool,
    in_flight: AtomicU32,
    outbox: Mutex<Outbox>,
    wake: Notify,
    drained: Notify,
    streams: Mutex<HashMap<u32, mpsc::Sender<Vec<u8>>>>,
    tied_runs: Mutex<Vec<(Uuid, i32)>>,
}

impl Client {
    /// A client that has just connected.
    pub fn new(id: u64, peer: Peer, read_only: bool) -> Client {
        Client {
            id,
            peer,
            read_only: AtomicBool::new(read_only),
            opened: AtomicBool::new(false),
            keepalive: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            outbox: Mutex::new(Outbox::default()),
            wake: Notify::new(),
            drained: Notify::new(),
            streams: Mutex::new(HashMap::new()),
            tied_runs: Mutex::new(Vec::new()),
        }
    }

    /// May change nothing, by its socket or by its own wish.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// The client asked for less at CONNECT_OPEN; it cannot ask for more.
    pub fn drop_write_access(&self) {
        self.read_only.store(true, Ordering::Relaxed);
    }

    /// CONNECT_OPEN has succeeded.
    pub fn is_opened(&self) -> bool {
        self.opened.load(Ordering::Relaxed)
    }

    /// Records CONNECT_OPEN and CONNECT_CLOSE.
    pub fn set_opened(&self, opened: bool) {
        self.opened.store(opened, Ordering::Relaxed);
    }

    /// The client speaks keepalive.
    pub fn has_keepalive(&self) -> bool {
        self.keepalive.load(Ordering::Relaxed)
    }

    /// The client asked whether we speak keepalive: it does.
    pub fn enable_keepalive(&self) {
        self.keepalive.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Calls that wait for an answer.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// A call has begun that is answered later.
    pub fn begin_call(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Such a call has been answered.
    pub fn end_call(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Queues the answer to `call`.
    pub fn reply<T: Xdr>(&self, call: Header, payload: &T) {
        self.send(frame_of(call.reply(Status::Ok), payload));
    }

    /// Queues a refusal of `call`.
    pub fn reply_error(&self, call: Header, error: &ErrorBody) {
        self.send(frame_of(call.reply(Status::Error), error));
    }

    /// Queues a whole packet.
    pub fn send(&self, packet: Vec<u8>) {
        self.outbox.lock().push(packet);
        self.wake.notify_one();
    }

    /// Queues an event, unless the client has stopped reading.
    pub fn send_event(&self, packet: Vec<u8>) {
        self.outbox.lock().push_event(packet);
        self.wake.notify_one();
    }

    /// Runs `f` on the queue.
    pub fn with_outbox<T>(&self, f: impl FnOnce(&mut Outbox) -> T) -> T {
        f(&mut self.outbox.lock())
    }

    /// Resolves when something was queued or answered since the last time.
    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// The connection has handed bytes to the kernel.
    pub fn flushed(&self) {
        self.drained.notify_waiters();
    }

    /// Resolves when at most `bytes` are unsent: how a stream waits for a slow reader.
    pub async fn drained_to(&self, bytes: usize) {
        loop {
            let drained = self.drained.notified();
            if self.outbox.lock().pending_bytes() <= bytes {
                return;
            }
            drained.await;
        }
    }

    /// Opens a stream under the serial of the call that asked for it; `None` where the serial has one already or the
    /// client has too many. The receiver gets the client's bytes; the channel closes when the client finishes, aborts
    /// or goes away.
    pub fn open_stream(&self, serial: u32) -> Option<mpsc::Receiver<Vec<u8>>> {
        let mut streams = self.streams.lock();
        if streams.contains_key(&serial) || streams.len() >= STREAMS_MAX {
            return None;
        }
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE_PACKETS);
        streams.insert(serial, sender);
        Some(receiver)
    }

    /// The stream of a serial.
    pub fn stream(&self, serial: u32) -> Option<mpsc::Sender<Vec<u8>>> {
        self.streams.lock().get(&serial).cloned()
    }

    /// Forgets a stream; what still arrives for it is dropped in silence. Says whether there was one.
    pub fn close_stream(&self, serial: u32) -> bool {
        self.streams.lock().remove(&serial).is_some()
    }

    /// The run `id` of domain `uuid` ends when this client goes away.
    pub fn tie_run(&self, uuid: Uuid, id: i32) {
        self.tied_runs.lock().push((uuid, id));
    }

    /// Takes the runs that end with the client.
    pub fn take_tied_runs(&self) -> Vec<(Uuid, i32)> {
        std::mem::take(&mut self.tied_runs.lock())
    }

    /// Ends every stream: the client is gone.
    pub fn close_all_streams(&self) {
        self.streams.lock().clear();
    }
}
