//! Console with one port. VIRTIO 5.3

use std::os::fd::BorrowedFd;

use guest_ram::Memory;
use hv_core::Interest;

use crate::chain::{self, Chain, Gathered};
use crate::model::Model;
use crate::work::{Device, Served};

const F_SIZE: u64 = 1;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Bytes moved at once; a larger buffer of the driver is served in pieces.
const PIECE_BYTES: usize = 4096;

/// The host's end of a console. Never waits.
pub trait ConsoleBackend: Send {
    /// Puts bytes from the host into `buffer`; 0: there are none now.
    fn read(&mut self, buffer: &mut [u8]) -> usize;
    /// Takes bytes for the host; returns how many.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// There will never be input any more; the descriptor is not worth waiting for.
    fn at_end(&self) -> bool {
        false
    }
    /// Columns and rows, if they are known.
    fn size(&self) -> Option<(u16, u16)>;
    /// The descriptor that becomes readable and writable.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What the driver is told.
pub(crate) fn model(backend: &dyn ConsoleBackend) -> Model {
    let mut config = vec![0; 12];
    let mut features = 0;
    if let Some((columns, rows)) = backend.size() {
        features |= F_SIZE;
        let size = columns.to_le_bytes().into_iter().chain(rows.to_le_bytes());
        config.iter_mut().zip(size).for_each(|(to, from)| *to = from);
    }
    Model { device_type: 3, class: 0x07_8000, features, queue_sizes: QUEUE_SIZES.to_vec(), config }
}

/// The working half.
pub(crate) struct Console {
    backend: Box<dyn ConsoleBackend>,
    /// Read from the host, not yet given to the driver.
    input: Vec<u8>,
    /// Bytes of the transmit chain in front that the host has taken already.
    sent: usize,
    /// The host does not take more now.
    jammed: bool,
}

impl Console {
    pub(crate) fn new(backend: Box<dyn ConsoleBackend>) -> Console {
        Console { backend, input: Vec::new(), sent: 0, jammed: false }
    }

    fn transmit(&mut self, gathered: &Gathered<'_>) -> Served {
        let mut skip = self.sent;
        let mut piece = [0; PIECE_BYTES];
        for buffer in &gathered.readable {
            let mut at = skip.min(buffer.len());
            skip -= at;
            while at < buffer.len() {
                let bytes = (buffer.len() - at).min(PIECE_BYTES);
                let Some(piece) = piece.get_mut(..bytes) else { break };
                let copied = buffer.subslice(at, bytes).map(|from| from.copy_to(piece)).unwrap_or(0);
                let taken = self.backend.write(piece).min(copied);
                at += taken;
                self.sent += taken;
                if taken < bytes {
                    self.jammed = true;
                    return Served::Later;
                }
            }
        }
        self.sent = 0;
        self.jammed = false;
        Served::Used(0)
    }
}

impl Device for Console {
    fn serve(&mut self, index: u16, memory: &Memory, chain: Chain, _again: bool) -> Served {
        let Ok(gathered) = chain::gather(memory, chain) else { return Served::Used(0) };
        if index == TRANSMIT {
            return self.transmit(&gathered);
        }
        let bytes = chain::fill(&gathered.writable, &self.input);
        self.input.drain(..bytes);
        Served::Used(bytes as u32)
    }
    fn ready(&mut self, index: u16) -> bool {
        match index {
            RECEIVE if self.input.is_empty() => {
                let mut piece = [0; PIECE_BYTES];
                let bytes = self.backend.read(&mut piece);
                self.input.extend_from_slice(piece.get(..bytes).unwrap_or(&[]));
                !self.input.is_empty()
            }
            _ => true, // a host that took nothing is tried again whenever something happens
        }
    }
    fn stop(&mut self) {
        self.sent = 0;
        self.jammed = false;
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.fd()
    }
    fn interest(&self) -> Interest {
        // With input in hand the driver has given no buffer: more can wait where it is.
        Interest { readable: self.input.is_empty() && !self.backend.at_end(), writable: self.jammed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Rig, WRITE_ONLY, twice};
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// What the host typed, what it has seen, and how much more it takes.
    #[derive(Default)]
    struct Host {
        typed: Vec<u8>,
        seen: Vec<u8>,
        room: usize,
    }
    #[derive(Clone, Default)]
    struct End(Arc<Mutex<Host>>);
    impl ConsoleBackend for End {
        fn read(&mut self, buffer: &mut [u8]) -> usize {
            let typed = std::mem::take(&mut self.0.lock().typed);
            buffer[..typed.len()].copy_from_slice(&typed);
            typed.len()
        }
        fn write(&mut self, bytes: &[u8]) -> usize {
            let mut host = self.0.lock();
            let taken = bytes.len().min(host.room);
            host.room -= taken;
            host.seen.extend(&bytes[..taken]);
            taken
        }
        fn size(&self) -> Option<(u16, u16)> {
            Some((80, 25))
        }
        fn fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }
    fn rig(end: &End, reload: bool) -> Rig {
        let end = end.clone();
        let mut rig = Rig::new(reload, move || (model(&end), Console::new(Box::new(end.clone()))));
        rig.start(2, 0);
        rig
    }

    #[test]
    fn output_that_the_host_does_not_take_waits_and_is_not_repeated() {
        let end = End::default();
        let mut rig = rig(&end, false);
        end.0.lock().room = 3;
        rig.put(DATA, b"hello");
        rig.offer(1, &[(DATA, 2, 0), (DATA + 2, 3, 0)]);
        assert_eq!((rig.used(1), end.0.lock().seen.clone()), (None, b"hel".to_vec()));
        end.0.lock().room = 10;
        rig.work();
        assert_eq!((rig.used(1), end.0.lock().seen.clone()), (Some(0), b"hello".to_vec()));
    }

    #[test]
    fn input_waits_for_buffers_and_is_split_over_them() {
        twice(|reload| {
            let end = End::default();
            let mut rig = rig(&end, reload);
            rig.offer(0, &[(DATA, 3, WRITE_ONLY)]);
            assert_eq!(rig.used(0), None);
            end.0.lock().typed = b"abc".to_vec();
            rig.work();
            assert_eq!((rig.used(0), rig.get(DATA, 3), rig.messages()), (Some(3), b"abc".to_vec(), vec![0x41]));
            assert_eq!((rig.read(0x2000, 2), rig.read(0x2002, 2)), (80, 25));
        });
        let end = End::default();
        let mut rig = rig(&end, false);
        end.0.lock().typed = b"defg".to_vec();
        rig.offer(0, &[(DATA, 3, WRITE_ONLY)]);
        assert_eq!((rig.used(0), rig.get(DATA, 3)), (Some(3), b"def".to_vec()));
        rig.offer(0, &[(DATA, 3, WRITE_ONLY)]);
        assert_eq!((rig.used(0), rig.get(DATA, 1)), (Some(1), b"g".to_vec()));
    }
}
