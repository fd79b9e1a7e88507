//! Who has which console: one client at a time, because two would each see half of what the guest prints.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

#[derive(Debug)]
struct Holder {
    ticket: u64,
    kick: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Table {
    holders: HashMap<String, Holder>,
    next_ticket: u64,
}

/// All consoles that are held, by the path of their terminal.
#[derive(Clone, Debug, Default)]
pub struct ConsolePlaces(Arc<Mutex<Table>>);

/// A held console; given back when dropped.
#[derive(Debug)]
pub struct ConsolePlace {
    places: ConsolePlaces,
    path: String,
    ticket: u64,
}

impl ConsolePlaces {
    /// Takes the console at `path`; `None` where somebody has it and `force` is not given. The receiver resolves when
    /// somebody else takes it by force.
    pub fn enter(&self, path: &str, force: bool) -> Option<(ConsolePlace, oneshot::Receiver<()>)> {
        let mut table = self.0.lock();
        if !force && table.holders.contains_key(path) {
            return None;
        }
        table.next_ticket += 1;
        let ticket = table.next_ticket;
        let (kick, kicked) = oneshot::channel();
        if let Some(former) = table.holders.insert(path.into(), Holder { ticket, kick }) {
            // One that is just leaving does not listen any more.
            let _ = former.kick.send(());
        }
        Some((ConsolePlace { places: self.clone(), path: path.into(), ticket }, kicked))
    }
}

impl Drop for ConsolePlace {
    fn drop(&mut self) {
        let mut table = self.places.0.lock();
        if table.holders.get(&self.path).is_some_and(|holder| holder.ticket == self.ticket) {
            table.holders.remove(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_unless_forced() {
        let places = ConsolePlaces::default();
        let (first, mut kicked) = places.enter("/dev/pts/1", false).unwrap();
        assert!(places.enter("/dev/pts/1", false).is_none());
        assert!(places.enter("/dev/pts/2", false).is_some());
        let second = places.enter("/dev/pts/1", true).unwrap();
        assert_eq!(kicked.try_recv(), Ok(()));
        drop(first);
        assert!(places.enter("/dev/pts/1", false).is_none(), "the former holder gives back what is no longer its own");
        drop(second);
        assert!(places.enter("/dev/pts/1", false).is_some());
    }
}
