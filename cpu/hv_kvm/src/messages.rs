//! Message interrupts into the kernel. A message that keeps coming gets an irqfd: a write to an eventfd, which the kernel
//! resolves through a route it has prepared. Any other goes by a call that carries it. KVM API 4.71, 4.75
//!
//! Invariant: once a message has an irqfd it keeps it, so that a write which the kernel completes later cannot deliver
//! another message.

use hv_core::Msi;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::IOAPIC_PINS;

/// Messages that can have an irqfd: more than the vectors of a machine's busy queues.
pub(crate) const IRQFDS: usize = 16;
/// A message is given an irqfd when it comes for this many-th time: a route costs more than many calls.
pub(crate) const OFTEN: u32 = 16;
/// Messages counted at once. A guest that sends more different ones sends them by calls.
const COUNTED: usize = 64;

/// How a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By the call that carries it.
    Call,
    /// Through irqfd `slot`, whose route it is.
    Irqfd(usize),
    /// Through irqfd `slot`, which needs its route first.
    NewIrqfd(usize),
}

/// Which messages come often.
#[derive(Default)]
pub(crate) struct Frequent {
    counts: Vec<(Msi, u32)>,
    routed: Vec<Msi>,
}

impl Frequent {
    /// Counts `msi` and says how it goes; there can be `slots` irqfds.
    pub(crate) fn way(&mut self, msi: Msi, slots: usize) -> Way {
        if let Some(slot) = self.routed.iter().position(|routed| *routed == msi) {
            return Way::Irqfd(slot);
        }
        if self.routed.len() >= slots {
            return Way::Call;
        }
        let Some((_, count)) = self.counts.iter_mut().find(|(counted, _)| *counted == msi) else {
            if self.counts.len() < COUNTED {
                self.counts.push((msi, 1));
            }
            return Way::Call;
        };
        *count += 1;
        if *count < OFTEN {
            return Way::Call;
        }
        self.counts.retain(|(counted, _)| *counted != msi);
        self.routed.push(msi);
        Way::NewIrqfd(self.routed.len() - 1)
    }
    /// The routes of the irqfds, by slot.
    pub(crate) fn routed(&self) -> &[Msi] {
        &self.routed
    }
    /// The host did not give the newest irqfd.
    pub(crate) fn take_back(&mut self) {
        self.routed.pop();
    }
}

/// The interrupt number of irqfd `slot`: behind those of the IOAPIC.
pub(crate) fn gsi(slot: usize) -> u32 {
    (IOAPIC_PINS + slot) as u32
}

/// Makes the irqfd of `slot`.
pub(crate) fn irqfd(vm: &VmFd, slot: usize) -> Result<EventFd, kvm_ioctls::Error> {
    let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
        .map_err(|e| kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(libc::EMFILE)))?;
    vm.register_irqfd(&event, gsi(slot))?;
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(vector: u32) -> Msi {
        Msi { address: 0xfee0_0000, data: vector }
    }

    #[test]
    fn what_comes_often_gets_an_irqfd_and_keeps_it() {
        let mut frequent = Frequent::default();
        for vector in [0x41, 0x42] {
            for _ in 1..OFTEN {
                assert_eq!(frequent.way(message(vector), IRQFDS), Way::Call);
            }
        }
        assert_eq!(frequent.way(message(0x42), IRQFDS), Way::NewIrqfd(0));
        assert_eq!(frequent.way(message(0x41), IRQFDS), Way::NewIrqfd(1));
        assert_eq!(frequent.way(message(0x42), IRQFDS), Way::Irqfd(0));
        assert_eq!(frequent.routed(), [message(0x42), message(0x41)]);
    }

    #[test]
    fn a_guest_that_invents_messages_takes_bounded_memory_and_no_irqfd() {
        let mut frequent = Frequent::default();
        for vector in (0..100_000).cycle().take(300_000) {
            let way = frequent.way(message(vector), IRQFDS);
            assert!(way == Way::Call || vector < COUNTED as u32, "{vector}");
        }
        assert_eq!((frequent.counts.len(), frequent.routed().len()), (COUNTED, 0));
        for _ in 0..2 * OFTEN {
            for vector in 0..COUNTED as u32 {
                frequent.way(message(vector), IRQFDS);
            }
        }
        assert_eq!(frequent.routed().len(), IRQFDS);
        assert_eq!(frequent.way(message(63), IRQFDS), Way::Call, "all are given");
        assert_eq!(Frequent::default().way(message(1), 0), Way::Call, "there can be none");
    }
}
