//! How many clients there are, and when the last one left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The count, its limit, and the next identifier.
#[derive(Debug)]
pub struct Clients {
    limit: usize,
    count: Arc<AtomicUsize>,
    next_id: AtomicU64,
    changed: Arc<Notify>,
}

/// A client's place; dropping it frees the place.
#[derive(Debug)]
pub struct Slot {
    id: u64,
    count: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

impl Slot {
    /// Identifier of the client, unique in the daemon's life.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.changed.notify_one();
    }
}

impl Clients {
    /// No clients yet, at most `limit` at once.
    pub fn new(limit: usize) -> Clients {
        Clients { limit, count: Arc::default(), next_id: AtomicU64::new(1), changed: Arc::default() }
    }

    /// Takes a place; `None` where all are taken.
    pub fn enter(&self) -> Option<Slot> {
        let taken = self.count.fetch_add(1, Ordering::Relaxed);
        let slot = Slot {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            count: self.count.clone(),
            changed: self.changed.clone(),
        };
        (taken < self.limit).then_some(slot)
    }

    /// Clients connected now.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Resolves when a client has left since the last time.
    pub async fn left(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let clients = Clients::new(2);
        let (a, b) = (clients.enter(), clients.enter());
        assert!(a.is_some() && b.is_some() && clients.enter().is_none());
        assert_eq!(clients.count(), 2);
        drop(a);
        assert_eq!(clients.enter().map(|slot| slot.id()), Some(4));
    }
}
