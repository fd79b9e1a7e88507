//! Console with one port. VIRTIO 5.3

use std::os::fd::BorrowedFd;

use guest_ram::Memory;
use hv_core::Interest;
use virtio_queue::DescriptorChain;

use crate::chain::{self, Gathered};
use crate::model::Model;
use crate::work::{Device, Served};

const F_SIZE: u64 = 1;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: &[u16] = &[64, 64];
/// Bytes moved at once; a larger buffer of the driver is served in pieces.
const PIECE_BYTES: usize = 4096;

/// The host's end of a console. Never waits.
pub trait ConsoleBackend: Send {
    /// Puts bytes from the host into `buffer`; 0: there are none now.
    fn read(&mut self, buffer: &mut [u8]) -> usize;
    /// Takes bytes for the host; returns how many.
    fn write(&mut self, bytes: &[u8]) -> usize;
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
    Model { device_type: 3, class: 0x07_8000, features, queue_sizes: QUEUE_SIZES, config }
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
    fn serve(&mut self, index: u16, memory: &Memory, chain: DescriptorChain<&Memory>) -> Served {
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
        Interest { readable: self.input.is_empty(), writable: self.jammed }
    }
}
