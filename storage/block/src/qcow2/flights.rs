//! Requests that are between looking a cluster up and having read or written it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::Ticket;

/// Requests in flight, by the parity of the generation they joined. A generation opens only when the one before
/// the last has landed, so two counters tell all of them apart.
#[derive(Default)]
pub(super) struct Flights([AtomicU64; 2]);

/// One request; it lands when this is dropped.
pub(crate) struct Flight<'a>(&'a AtomicU64);

impl Flights {
    /// Counts a request in. Called under the lock of the tables, which orders it with [`Flights::landed`].
    pub(super) fn enter(&self, generation: u64) -> Flight<'_> {
        let counter = &self.0[(generation & 1) as usize];
        counter.fetch_add(1, Ordering::Relaxed);
        Flight(counter)
    }

    /// As [`Flights::enter`], for a request that outlives its caller: [`Flights::land`] must follow.
    pub(super) fn take_off(&self, generation: u64) -> Ticket {
        std::mem::forget(self.enter(generation));
        Ticket(generation & 1)
    }

    /// A request that took off has landed.
    pub(super) fn land(&self, ticket: Ticket) {
        drop(Flight(&self.0[(ticket.0 & 1) as usize]));
    }

    /// Whether no request of a generation's parity is in flight.
    pub(super) fn landed(&self, generation: u64) -> bool {
        self.0[(generation & 1) as usize].load(Ordering::Acquire) == 0
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // What the request read and wrote comes before whatever follows its landing.
        self.0.fetch_sub(1, Ordering::Release);
    }
}
