//! The server's side of the negotiation, on a socket and within its time.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::super::error::PeerError;
use super::super::socket::Stream;
use super::super::tls::{TlsServer, shake_hands};
use super::super::wire::{
    Fields, Negotiation, OPTION_MAGIC, OPTION_MAX_BYTES, Offer, PAYLOAD_MAX_BYTES, SERVER_MAGIC, Verdict, WireError,
    handshake_flag,
};

/// Most options of one client: each costs an answer.
const OPTIONS_MAX: usize = 1000;

/// A stream that fails when the time is over.
struct Limited<'s> {
    stream: &'s mut Stream,
    end: Option<Instant>,
    limit: Duration,
}

impl Limited<'_> {
    /// Gives the next call the time that is left.
    fn arm(&mut self) -> io::Result<()> {
        let Some(end) = self.end else { return Ok(()) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(Some(left))
    }

    fn fail(&self, error: io::Error) -> PeerError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => PeerError::TooSlow { seconds: self.limit.as_secs() },
            _ => error.into(),
        }
    }

    fn take(&mut self, room: &mut [u8]) -> Result<(), PeerError> {
        self.read_exact(room).map_err(|error| self.fail(error))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), PeerError> {
        self.write_all(bytes).map_err(|error| self.fail(error))
    }

    /// Shakes hands with a client that has asked for TLS.
    fn encrypt(&mut self, tls: &TlsServer) -> Result<(), PeerError> {
        let mut session = tls.start()?;
        shake_hands(&mut session, self).map_err(|error| self.fail(error))?;
        *self.stream = self.stream.encrypted(session)?;
        Ok(())
    }

    fn skip(&mut self, mut bytes: u64) -> Result<(), PeerError> {
        let mut room = [0; 4096];
        while bytes > 0 {
            let count = bytes.min(room.len() as u64);
            self.take(room.get_mut(..count as usize).unwrap_or_default())?;
            bytes -= count;
        }
        Ok(())
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        self.stream.read(room)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Greets a client and answers its options. `None`: it wants no more.
pub fn negotiate(
    stream: &mut Stream,
    offer: &Offer,
    tls: Option<&TlsServer>,
    limit: Option<Duration>,
) -> Result<Option<Negotiation>, PeerError> {
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    let mut limited = Limited { stream, end, limit: limit.unwrap_or_default() };
    let agreed = haggle(&mut limited, offer, tls)?;
    stream.set_timeout(None)?;
    Ok(agreed)
}

fn haggle(stream: &mut Limited<'_>, offer: &Offer, tls: Option<&TlsServer>) -> Result<Option<Negotiation>, PeerError> {
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    let greeting = [&SERVER_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat();
    stream.send(&greeting)?;
    let mut word = [0; 4];
    stream.take(&mut word)?;
    let mut negotiation = Negotiation::start(u32::from_be_bytes(word))?;
    let mut out = Vec::new();
    for _ in 0..OPTIONS_MAX {
        let mut head = [0; 16];
        stream.take(&mut head)?;
        let mut fields = Fields::of("an option", &head);
        let (magic, number, length) = (fields.u64()?, fields.u32()?, fields.u32()?);
        if magic != OPTION_MAGIC {
            return Err(WireError::Magic { what: "an option", found: magic }.into());
        }
        out.clear();
        let verdict = if length <= OPTION_MAX_BYTES {
            let mut data = vec![0; length as usize];
            stream.take(&mut data)?;
            negotiation.answer(offer, number, &data, &mut out)
        } else if length <= PAYLOAD_MAX_BYTES {
            stream.skip(u64::from(length))?;
            Negotiation::refuse_size(number, &mut out)
        } else {
            let (bytes, max) = (u64::from(length), u64::from(PAYLOAD_MAX_BYTES));
            return Err(WireError::TooBig { what: "an option", bytes, max }.into());
        };
        let written = stream.send(&out);
        match verdict {
            Verdict::Continue => written?,
            Verdict::StartTls => {
                written?;
                if let Some(tls) = tls {
                    stream.encrypt(tls)?;
                }
            }
            Verdict::Transmit => {
                written?;
                return Ok(Some(negotiation));
            }
            // A client that aborts need not wait for the answer.
            Verdict::Close => return Ok(None),
        }
    }
    Err(WireError::TooManyPieces { max: OPTIONS_MAX }.into())
}
