//! The connection to a server: tried for until the server is there, and made again when it is lost, for as long as the
//! name of the export says.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::super::error::{NbdError, PeerError};
use super::super::socket::Stream;
use super::super::tls::{TlsClient, TlsError, shake_hands};
use super::super::wire::{BASE_ALLOCATION, NAME_MAX_BYTES, transmission_flag as can};
use super::handshake::{self, Agreed, Haggle};
use super::transport::Transport;
use crate::spec::{NbdAddress, NbdSpec};

/// Waits between attempts begin with this, and become longer.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// An export, over one connection after another.
pub struct Link {
    spec: NbdSpec,
    tls: Option<TlsClient>,
    /// What holds for every connection.
    pub agreed: Agreed,
    /// In whole blocks. It changes when this client changes it.
    pub size_bytes: AtomicU64,
    current: RwLock<Arc<Transport>>,
    /// Since when there is no connection. Whoever makes a new one holds it.
    lost_since: Mutex<Option<Instant>>,
}

impl Link {
    pub fn open(spec: &NbdSpec, tls: Option<&TlsClient>) -> Result<Link, NbdError> {
        let limit = Duration::from_secs(u64::from(spec.open_timeout_s));
        let (transport, agreed) = persist(Instant::now(), limit, |left| connect(spec, tls, left))?;
        Ok(Link {
            spec: spec.clone(),
            tls: tls.cloned(),
            size_bytes: AtomicU64::new(whole_blocks(&agreed)),
            agreed,
            current: RwLock::new(Arc::new(transport)),
            lost_since: Mutex::new(None),
        })
    }

    /// Sends a request, and once more on the next connection if one is lost.
    pub fn call<T>(&self, ask: impl Fn(&Transport) -> io::Result<T>) -> io::Result<T> {
        let delay = Duration::from_secs(u64::from(self.spec.reconnect_delay_s));
        let mut first_lost = None;
        loop {
            let transport = self.current.read().clone();
            let error = match ask(&transport) {
                Err(error) if !delay.is_zero() && transport.is_lost() => error,
                done => return done,
            };
            // A request at which every server dies comes to an end, too.
            if first_lost.get_or_insert_with(Instant::now).elapsed() > delay || !self.renew(&transport, delay) {
                return Err(error);
            }
        }
    }

    /// Whether there is another connection than `old`. One that has been lost for too long is tried for only once.
    fn renew(&self, old: &Arc<Transport>, delay: Duration) -> bool {
        let mut lost_since = self.lost_since.lock();
        if !Arc::ptr_eq(&self.current.read(), old) {
            return true;
        }
        let since = *lost_since.get_or_insert_with(Instant::now);
        match persist(since, delay, |left| self.connect_again(left)) {
            Ok(transport) => {
                *self.current.write() = Arc::new(transport);
                *lost_since = None;
                true
            }
            Err(_) => false,
        }
    }

    fn connect_again(&self, left: Duration) -> Result<Transport, NbdError> {
        let (transport, agreed) = connect(&self.spec, self.tls.as_ref(), left)?;
        let old = &self.agreed;
        let is_same = old.sizes == agreed.sizes
            && old.structured == agreed.structured
            && old.context.is_some() == agreed.context.is_some()
            && old.flags & !agreed.flags == 0
            && (old.flags ^ agreed.flags) & can::READ_ONLY == 0
            && self.size_bytes.load(Ordering::Acquire) == whole_blocks(&agreed);
        match is_same {
            true => Ok(transport),
            false => Err(NbdError::Handshake { server: self.spec.to_string(), source: PeerError::Changed }),
        }
    }
}

/// Spec, "Block size constraints": what is behind the last whole block cannot be reached.
fn whole_blocks(agreed: &Agreed) -> u64 {
    agreed.size_bytes - agreed.size_bytes % u64::from(agreed.sizes.min)
}

/// Tries once, and again while that may help until `limit` has passed since `start`; says how much of it is left.
fn persist<T>(
    start: Instant,
    limit: Duration,
    mut attempt: impl FnMut(Duration) -> Result<T, NbdError>,
) -> Result<T, NbdError> {
    let mut pause = PAUSE;
    loop {
        let error = match attempt(limit.saturating_sub(start.elapsed())) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let left = limit.saturating_sub(start.elapsed());
        let may_change = match &error {
            NbdError::Handshake { source, .. } => {
                matches!(source, PeerError::Closed | PeerError::Io(_) | PeerError::NoExport { .. })
            }
            other => matches!(other, NbdError::Connect { .. }),
        };
        if left.is_zero() || !may_change {
            return Err(error);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Connects and opens the export. With time `left`, the server has that much of it for each answer.
fn connect(spec: &NbdSpec, tls: Option<&TlsClient>, left: Duration) -> Result<(Transport, Agreed), NbdError> {
    let mut haggle = open(spec, tls, Some(left).filter(|left| !left.is_zero()))?;
    let server = spec.to_string();
    let failed = |source| refused(&server, tls, source);
    let context = spec.context.as_deref();
    let agreed = handshake::negotiate(&mut haggle, &spec.export, context.unwrap_or(BASE_ALLOCATION)).map_err(failed)?;
    if let (Some(context), None) = (context, agreed.context) {
        return Err(failed(PeerError::NoContext { context: context.to_owned() }));
    }
    haggle.stream.set_timeout(None).map_err(|error| failed(error.into()))?;
    let transport = Transport::new(haggle.stream, server.clone(), &agreed).map_err(|error| failed(error.into()))?;
    Ok((transport, agreed))
}

/// Connects and greets, up to the first option, with TLS or without. The peer gets `limit` for each of its answers.
pub fn open(spec: &NbdSpec, tls: Option<&TlsClient>, limit: Option<Duration>) -> Result<Haggle<Stream>, NbdError> {
    let server = || spec.to_string();
    if spec.export.len() > NAME_MAX_BYTES {
        return Err(NbdError::Name { name: spec.export.clone() });
    }
    if spec.tls.is_some() && tls.is_none() {
        return Err(NbdError::NoCredentials { server: server() });
    }
    let stream = Stream::connect(&spec.address)?;
    let failed = |source| NbdError::Handshake { server: server(), source };
    stream.set_timeout(limit).map_err(|error| failed(error.into()))?;
    let haggle = Haggle::greet(stream).map_err(failed)?;
    match tls {
        None => Ok(haggle),
        Some(tls) => encrypt(haggle, spec, tls).map_err(|source| refused(&server(), Some(tls), source)),
    }
}

/// Asks for TLS and shakes hands. A server on TCP has to show the name that it was called by, if no other is given.
fn encrypt(mut haggle: Haggle<Stream>, spec: &NbdSpec, tls: &TlsClient) -> Result<Haggle<Stream>, PeerError> {
    let called = match &spec.address {
        NbdAddress::Tcp { host, .. } => Some(host.as_str()),
        NbdAddress::Unix(_) => None,
    };
    let hostname = spec.tls.as_ref().and_then(|tls| tls.hostname.as_deref()).or(called);
    let mut session = tls.start(hostname)?;
    haggle.start_tls()?;
    shake_hands(&mut session, &mut haggle.stream)?;
    haggle.stream = haggle.stream.encrypted(session)?;
    Ok(haggle)
}

/// A server that does not like a client's certificate may just go.
pub fn refused(server: &str, tls: Option<&TlsClient>, source: PeerError) -> NbdError {
    let source = match source {
        PeerError::Closed if tls.is_some() => TlsError::Dropped.into(),
        source => source,
    };
    NbdError::Handshake { server: server.to_owned(), source }
}
