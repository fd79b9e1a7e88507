//! The guests.

mod exceptions;
mod modes;
mod rings;

use crate::suite::{Guest, Peer};

/// All guests.
pub fn all() -> Vec<Guest> {
    [modes::guests(), rings::guests(), exceptions::guests()].into_iter().flatten().collect()
}

/// QEMU's emulated processor does not check segment limits; it is the lab's processor too.
const fn no_limits(output: &'static str) -> Peer {
    Peer::Differs { output, why: "QEMU's processor checks no segment limits" }
}
