//! Bytes on their way to one client: whole packets in order, bounded.
//!
//! Replies need no bound of their own, because a client with much unread is not read from. Events do: a client that
//! registers for them and stops reading is cut off rather than kept in memory for ever.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

/// A client with this many unread bytes is not read from until it catches up.
pub const HIGH_WATER_BYTES: usize = 1 << 20;
/// A client with this many unread bytes gets no more events, it is disconnected.
pub const EVENT_LIMIT_BYTES: usize = 8 << 20;
/// Packets handed to the kernel in one call.
const BATCH: usize = 16;

/// The queue.
#[derive(Debug, Default)]
pub struct Outbox {
    packets: VecDeque<Vec<u8>>,
    sent_of_first: usize,
    bytes: usize,
    overrun: bool,
}

impl Outbox {
    /// Appends a reply or a stream packet.
    pub fn push(&mut self, packet: Vec<u8>) {
        self.bytes += packet.len();
        self.packets.push_back(packet);
    }

    /// Appends an event, or marks the client as hopelessly slow.
    pub fn push_event(&mut self, packet: Vec<u8>) {
        if self.bytes + packet.len() > EVENT_LIMIT_BYTES {
            self.overrun = true;
        } else {
            self.push(packet);
        }
    }

    /// An event had no room: the connection must end.
    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    /// Unsent bytes.
    pub fn pending_bytes(&self) -> usize {
        self.bytes
    }

    /// Writes until the queue is empty or `write` would block.
    pub fn flush(&mut self, mut write: impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>) -> io::Result<()> {
        while self.bytes > 0 {
            let mut slices = Vec::with_capacity(self.packets.len().min(BATCH));
            for (index, packet) in self.packets.iter().take(BATCH).enumerate() {
                let start = if index == 0 { self.sent_of_first } else { 0 };
                slices.push(IoSlice::new(packet.get(start..).unwrap_or_default()));
            }
            match write(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // An idle connection holds no memory.
        self.packets = VecDeque::new();
        Ok(())
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(first) = self.packets.front() {
            let rest = first.len() - self.sent_of_first;
            if written < rest {
                self.sent_of_first += written;
                return;
            }
            written -= rest;
            self.sent_of_first = 0;
            self.packets.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_partial_writes_deliver_all_bytes_in_order() {
        for step in 1..12 {
            let mut outbox = Outbox::default();
            let packets: Vec<Vec<u8>> = (1..40u8).map(|n| vec![n; n as usize]).collect();
            packets.iter().for_each(|packet| outbox.push(packet.clone()));
            let mut seen = Vec::new();
            let mut blocked = false;
            while outbox.pending_bytes() > 0 {
                outbox
                    .flush(|slices| {
                        blocked = !blocked;
                        if blocked {
                            return Err(io::ErrorKind::WouldBlock.into());
                        }
                        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                        let written = all.len().min(step);
                        seen.extend_from_slice(&all[..written]);
                        Ok(written)
                    })
                    .unwrap();
            }
            assert_eq!(seen, packets.concat(), "step {step}");
        }
    }

    #[test]
    fn events_for_a_client_that_does_not_read_are_bounded() {
        let mut outbox = Outbox::default();
        for _ in 0..100 {
            outbox.push_event(vec![0; 1 << 20]);
        }
        assert!(outbox.is_overrun());
        assert!(outbox.pending_bytes() <= EVENT_LIMIT_BYTES);
    }
}
