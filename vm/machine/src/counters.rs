//! How often a guest left its instructions, by reason.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Running counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: Count),* }
        /// The counters at some moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Exits { $($(#[$doc])* pub $name: u64),* }
        impl Counters {
            pub(crate) fn now(&self) -> Exits {
                Exits { $($name: self.$name.0.load(Ordering::Relaxed)),* }
            }
        }
        impl Exits {
            /// Names and values, in a fixed order.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

/// One counter; several vCPUs may count at once.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);
impl Count {
    pub(crate) fn up(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

counters! {
    /// Port reads.
    port_reads,
    /// Port writes.
    port_writes,
    /// Reads of memory-mapped registers.
    mmio_reads,
    /// Writes of memory-mapped registers, doorbells included.
    mmio_writes,
    /// Doorbells rung through the plain write path.
    doorbells,
    /// Message interrupts signalled, those of the IOAPIC included.
    msis,
    /// Interrupts acknowledged at the 8259 pair.
    pic_acknowledges,
    /// Ends of level-triggered interrupts.
    ends_of_interrupt,
    /// Deadlines of devices that came due.
    deadlines,
}
