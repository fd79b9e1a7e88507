//! Requests that wait for each other: one that is padded reads and writes bytes that are not its own.

use std::ops::Range;

use parking_lot::{Condvar, Mutex};

/// The requests in flight.
#[derive(Default)]
pub(super) struct Overlaps {
    ranges: Mutex<Vec<Entry>>,
    ended: Condvar,
}

#[derive(PartialEq, Eq)]
struct Entry {
    range: Range<u64>,
    is_padded: bool,
}

/// A request in flight; it has ended when this is dropped.
pub(super) struct InFlight<'a> {
    all: &'a Overlaps,
    entry: Entry,
}

impl Overlaps {
    /// Counts a request in: a padded one waits for every other one that it overlaps, and they for it.
    pub(super) fn begin(&self, range: Range<u64>, is_padded: bool) -> InFlight<'_> {
        let mut ranges = self.ranges.lock();
        let conflicts = |other: &Entry| {
            (is_padded || other.is_padded) && other.range.start < range.end && range.start < other.range.end
        };
        while ranges.iter().any(conflicts) {
            self.ended.wait(&mut ranges);
        }
        let entry = || Entry { range: range.clone(), is_padded };
        ranges.push(entry());
        InFlight { all: self, entry: entry() }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut ranges = self.all.ranges.lock();
        if let Some(at) = ranges.iter().position(|entry| *entry == self.entry) {
            ranges.swap_remove(at);
        }
        self.all.ended.notify_all();
    }
}

#[test]
fn only_padded_requests_wait() {
    let overlaps = Overlaps::default();
    let plain = [overlaps.begin(0..8, false), overlaps.begin(4..12, false)];
    drop(overlaps.begin(12..16, true));
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _padded = overlaps.begin(8..16, true);
            ended.send(overlaps.ranges.lock().len()).unwrap();
        });
        // It does not overlap the first, and waits for the second alone.
        let [first, second] = plain;
        drop(second);
        assert_eq!(end.recv(), Ok(2));
        drop(first);
    });
}
