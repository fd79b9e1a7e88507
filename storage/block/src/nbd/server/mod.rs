//! The server: one disk for many clients. A client has a few threads, which take turns at reading its requests and
//! then work on them side by side: a slow request holds up no other, and a client that reads slowly holds up nobody
//! else. What a client can make the server keep is one payload for each of its threads.

mod listener;
mod negotiate;
mod perform;
mod session;

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::error::{NbdError, PeerError};
use super::socket::Stream;
use super::tls::TlsServer;
use super::wire::{ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Offer, transmission_flag as can};
use crate::disk::Disk;
use crate::qcow2::BitmapBits;

pub use listener::Listener;

/// [`ServeOptions::max_clients`]: as many as come.
pub const CLIENTS_UNLIMITED: usize = usize::MAX;
/// How long clients may take to read their last replies when the server stops.
const PARTING: Duration = Duration::from_secs(5);
/// Memory of a thread's stack.
const STACK_BYTES: usize = 512 << 10;

/// What is served, and to whom.
pub struct ServeOptions<'a> {
    /// Name of the export; clients that ask for another one are refused. At most 4096 bytes.
    pub name: String,
    /// What it is, for people. At most 4096 bytes.
    pub description: String,
    /// Clients may change the size of the disk (extension RESIZE), but not make it smaller while another one is there.
    pub resizable: bool,
    /// Nobody may write. It follows from the disk if that is read only.
    pub read_only: bool,
    /// Where in the disk the export starts, in bytes, before its end.
    pub offset: u64,
    /// Clients at once; more wait until one leaves.
    pub max_clients: usize,
    /// Whether clients can ask where data is.
    pub allocation: bool,
    /// Whether clients can ask which image of the chain data is in.
    pub allocation_depth: bool,
    /// What clients can ask which parts of the disk a bitmap marks, by the bitmaps' names; at most 30. The export is
    /// read only, or they say what was marked when it began.
    pub bitmaps: Vec<(String, BitmapBits)>,
    /// Go on when the last client has left.
    pub persistent: bool,
    /// How long a client may take to agree on options; `None`: for ever.
    pub handshake_limit: Option<Duration>,
    /// Requests of one client that are worked on at once, 1 to 16.
    pub workers: usize,
    /// Clients have to begin with TLS, under these credentials.
    pub tls: Option<TlsServer>,
    /// Is told how connections end that do not end well.
    pub report: Option<&'a (dyn Fn(&PeerError) + Sync)>,
}

impl Default for ServeOptions<'_> {
    /// A nameless writable export of the whole disk for one client after another, until stopped.
    fn default() -> ServeOptions<'static> {
        ServeOptions {
            name: String::new(),
            description: String::new(),
            resizable: false,
            read_only: false,
            offset: 0,
            max_clients: 1,
            allocation: true,
            allocation_depth: false,
            bitmaps: Vec::new(),
            persistent: true,
            handshake_limit: Some(Duration::from_secs(10)),
            workers: 4,
            tls: None,
            report: None,
        }
    }
}

/// Stops a server, from any thread or from a signal handler.
pub struct Stop {
    event: OwnedFd,
}

impl Stop {
    /// One that nobody has pulled.
    pub fn new() -> io::Result<Stop> {
        Ok(Stop { event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Tells the server to finish the requests it has and to return. Safe in a signal handler.
    pub fn stop(&self) {
        // It fails only when it was told very often already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// For the server: forgets what was told.
    fn clear(&self) {
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
    }
}

/// The connections of a server.
struct Clients {
    streams: Mutex<HashMap<u64, Stream>>,
    /// A connection has ended.
    ended: Stop,
    changed: Condvar,
    /// How many clients got as far as requests.
    served: AtomicU64,
}

impl Clients {
    fn count(&self) -> usize {
        self.streams.lock().len()
    }
}

/// Ends the bookkeeping of a connection, however its thread ends.
struct Registered<'c> {
    clients: &'c Clients,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.clients.streams.lock().remove(&self.id);
        self.clients.changed.notify_all();
        self.clients.ended.stop();
    }
}

/// Serves a disk on a socket until `stop` is pulled, or the last client has left and the server is not to persist.
/// Requests that were read are answered before it returns. The caller flushes the disk afterwards.
pub fn serve(listener: &Listener, disk: &Disk, options: &ServeOptions<'_>, stop: &Stop) -> Result<(), NbdError> {
    let failed = |source| NbdError::Accept { source };
    let clients = Clients {
        streams: Mutex::new(HashMap::new()),
        ended: Stop::new().map_err(failed)?,
        changed: Condvar::new(),
        served: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        let result = accept(listener, options, stop, &clients, &mut |stream, id| {
            let registered = Registered { clients: &clients, id };
            let clients = &clients;
            let work = move || {
                let _registered = registered;
                converse(stream, disk, options, clients);
            };
            // Without a thread the connection is closed; the client comes again.
            let _ = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        });
        part(&clients);
        result.map_err(failed)
    })
}

/// A question about blocks that a client can choose.
enum Context<'a> {
    /// Whether they take space, and whether they are zeroes.
    Allocation,
    /// How many images down they are.
    Depth,
    /// Whether a bitmap marks them.
    Bitmap(&'a BitmapBits),
}

/// By name, in the order of their numbers, which begin with 1.
fn contexts<'a>(options: &'a ServeOptions<'_>) -> impl Iterator<Item = (String, Context<'a>)> {
    let allocation = options.allocation.then(|| (BASE_ALLOCATION.to_owned(), Context::Allocation));
    let depth = options.allocation_depth.then(|| (ALLOCATION_DEPTH.to_owned(), Context::Depth));
    let bitmaps = options.bitmaps.iter().map(|(name, bits)| (format!("{DIRTY_BITMAP}{name}"), Context::Bitmap(bits)));
    allocation.into_iter().chain(depth).chain(bitmaps)
}

fn offer(disk: &Disk, options: &ServeOptions<'_>) -> Offer {
    let mut flags = can::HAS_FLAGS | can::SEND_FLUSH | can::SEND_FUA | can::SEND_CACHE;
    if options.read_only || disk.is_read_only() {
        flags |= can::READ_ONLY;
    } else {
        flags |= can::SEND_TRIM | can::SEND_WRITE_ZEROES | can::SEND_FAST_ZERO;
        flags |= if options.resizable { can::SEND_RESIZE } else { 0 };
    }
    if options.max_clients > 1 {
        // All write to one disk, and a flush of one is a flush of all.
        flags |= can::CAN_MULTI_CONN;
    }
    let contexts = contexts(options).map(|(name, _)| name).collect();
    Offer {
        name: options.name.clone(),
        description: options.description.clone(),
        size_bytes: disk.size_bytes().saturating_sub(options.offset),
        flags,
        contexts,
        tls: options.tls.is_some(),
    }
}

/// Takes connections until it is time to stop.
fn accept(
    listener: &Listener,
    options: &ServeOptions<'_>,
    stop: &Stop,
    clients: &Clients,
    start: &mut dyn FnMut(Stream, u64),
) -> io::Result<()> {
    let mut next_id = 0;
    let mut is_short = false;
    loop {
        let count = clients.count();
        if !options.persistent && count == 0 && clients.served.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let mut wanted = vec![
            PollFd::from_borrowed_fd(stop.event.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(clients.ended.event.as_fd(), PollFlags::IN),
        ];
        if count < options.max_clients.max(1) && !is_short {
            wanted.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
        }
        match poll(&mut wanted, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => drop(other?),
        }
        let is_ready = |at: usize| wanted.get(at).is_some_and(|fd| !fd.revents().is_empty());
        if is_ready(0) {
            return Ok(());
        }
        if is_ready(1) {
            clients.ended.clear();
            is_short = false;
        }
        if !is_ready(2) {
            continue;
        }
        match listener.accept() {
            Ok(Some(stream)) => {
                if let Ok(clone) = stream.try_clone() {
                    next_id += 1;
                    clients.streams.lock().insert(next_id, clone);
                    start(stream, next_id);
                }
            }
            Ok(None) => {}
            // Out of descriptors or memory: it may work when a client has left.
            Err(_) if clients.count() > 0 => is_short = true,
            Err(error) => return Err(error),
        }
    }
}

/// Lets clients have the replies they wait for, but not for ever.
fn part(clients: &Clients) {
    let mut streams = clients.streams.lock();
    streams.values().for_each(|stream| stream.shutdown(Shutdown::Read));
    let end = Instant::now() + PARTING;
    while !streams.is_empty() {
        if clients.changed.wait_until(&mut streams, end).timed_out() {
            break;
        }
    }
    streams.values().for_each(|stream| stream.shutdown(Shutdown::Both));
}

/// One connection from greeting to end.
fn converse(mut stream: Stream, disk: &Disk, options: &ServeOptions<'_>, clients: &Clients) {
    let limit = options.handshake_limit;
    let offer = offer(disk, options);
    let ended =
        negotiate::negotiate(&mut stream, &offer, options.tls.as_ref(), limit).and_then(|agreed| match agreed {
            Some(agreed) => {
                clients.served.fetch_add(1, Ordering::Relaxed);
                session::run(stream, disk, offer.flags, options, &agreed, &|| clients.count() == 1)
            }
            None => Ok(()),
        });
    if let (Err(error), Some(report)) = (ended, options.report) {
        report(&error);
    }
}
