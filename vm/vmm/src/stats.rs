//! Counters of a whole run, as JSON.

use machine::Exits;
use serde_json::{Map, Value, json};

/// What a run did.
pub struct RunStats {
    /// Guest instructions retired, all vCPUs together.
    pub instructions: u64,
    /// Accesses and interrupts by class.
    pub exits: Exits,
    /// Bytes printed on all consoles.
    pub console_bytes: u64,
    /// Guest time at the end, in nanoseconds.
    pub guest_ns: u64,
}

impl RunStats {
    /// One JSON document, ending with a line feed.
    pub fn to_json(&self) -> String {
        let exits: Map<String, Value> =
            self.exits.list().into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect();
        let document = json!({
            "instructions": self.instructions,
            "exits": exits,
            "console_bytes": self.console_bytes,
            "guest_ns": self.guest_ns,
        });
        format!("{document}\n")
    }
}
