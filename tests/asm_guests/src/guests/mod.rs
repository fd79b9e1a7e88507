//! The guests.

mod exceptions;
mod interrupts;
mod memory;
mod modes;
mod paging;
mod registers;
mod rings;

use crate::suite::{Guest, Peer};

/// All guests.
pub fn all() -> Vec<Guest> {
    [
        modes::guests(),
        rings::guests(),
        exceptions::guests(),
        paging::guests(),
        interrupts::guests(),
        registers::guests(),
        memory::guests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A difference of QEMU's emulated processor, which is the lab's processor too.
fn emulated(guest: Guest, output: &'static str, why: &'static str) -> Guest {
    let peer = Peer::Differs { output, why };
    guest.on_qemu(peer).on_kvm(peer)
}

/// QEMU's emulated processor does not check segment limits; it is the lab's processor too.
const fn no_limits(output: &'static str) -> Peer {
    Peer::Differs { output, why: "QEMU's processor checks no segment limits" }
}
