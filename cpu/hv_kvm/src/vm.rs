//! The machine-wide half: memory, interrupt routes, doorbells.

use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_ram::GuestRam;
use hv_core::{AccelError, Doorbell, DoorbellError, Msi, MsiSink, Space, Vm};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_msi, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::host;
use crate::kick::Remote;
use crate::messages::{self, Frequent, Way};

/// Pins of the IOAPIC; the kernel is told their routes so that it reports ends of interrupt.
pub(crate) const IOAPIC_PINS: usize = 24;
/// Three pages that Intel processors need in real mode, below the firmware and above any RAM we map under 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// The machine-wide half of a KVM guest.
pub struct KvmVm {
    pub(crate) fd: VmFd,
    /// Keeps the mappings that the kernel was given.
    _ram: GuestRam,
    routes: Mutex<Routes>,
    doorbells: Mutex<Vec<(Doorbell, EventFd)>>,
    extint: AtomicBool,
    pub(crate) boot_vcpu: Mutex<Option<Arc<Remote>>>,
}

/// What the kernel's routing table is made of.
#[derive(Default)]
struct Routes {
    pins: [Option<Msi>; IOAPIC_PINS],
    frequent: Frequent,
    /// In the order of `frequent`.
    irqfds: Vec<EventFd>,
    /// The host gives no more of them.
    no_more_irqfds: bool,
}

impl KvmVm {
    pub(crate) fn new(fd: VmFd, ram: GuestRam) -> Result<KvmVm, AccelError> {
        fd.set_tss_address(TSS_ADDRESS).map_err(host("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = IOAPIC_PINS as u64;
        fd.enable_cap(&split).map_err(host("KVM_ENABLE_CAP(SPLIT_IRQCHIP)"))?;
        for (slot, region) in (0..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa.0,
                memory_size: region.bytes,
                userspace_addr: region.host as u64,
            };
            // SAFETY: the range is mapped by `ram`, which lives as long as the VM's descriptor (both are in `KvmVm`).
            unsafe { fd.set_user_memory_region(region) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(KvmVm {
            fd,
            _ram: ram,
            routes: Mutex::default(),
            doorbells: Mutex::default(),
            extint: AtomicBool::new(false),
            boot_vcpu: Mutex::new(None),
        })
    }

    pub(crate) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    fn update_routes(&self, routes: &Routes) -> Result<(), kvm_ioctls::Error> {
        let pins = (0..).zip(&routes.pins).filter_map(|(pin, route)| route.map(|msi| (pin, msi)));
        let frequent = routes.frequent.routed().iter().enumerate().map(|(slot, msi)| (messages::gsi(slot), *msi));
        let entries: Vec<kvm_irq_routing_entry> = pins
            .chain(frequent)
            .map(|(gsi, msi)| {
                let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: msi.address as u32,
                    address_hi: (msi.address >> 32) as u32,
                    data: msi.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.fd.set_gsi_routing(&table)
    }

    /// True: the message went through an irqfd.
    fn signal_irqfd(&self, msi: Msi) -> bool {
        let mut routes = self.routes.lock();
        let slots = if routes.no_more_irqfds { 0 } else { messages::IRQFDS };
        let slot = match routes.frequent.way(msi, slots) {
            Way::Call => return false,
            Way::Irqfd(slot) => slot,
            Way::NewIrqfd(slot) => {
                let made = self.update_routes(&routes).and_then(|()| messages::irqfd(&self.fd, slot));
                let Ok(irqfd) = made else {
                    routes.frequent.take_back();
                    routes.no_more_irqfds = true;
                    return false;
                };
                routes.irqfds.push(irqfd);
                slot
            }
        };
        routes.irqfds.get(slot).is_some_and(|irqfd| irqfd.write(1).is_ok())
    }
}

fn ioevent_address(doorbell: &Doorbell) -> IoEventAddress {
    match doorbell.space {
        Space::Port => IoEventAddress::Pio(doorbell.address.0),
        Space::Memory => IoEventAddress::Mmio(doorbell.address.0),
    }
}

impl MsiSink for KvmVm {
    fn signal(&self, msi: Msi) {
        if self.signal_irqfd(msi) {
            return;
        }
        let msi = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // A message that no APIC takes is lost on hardware too.
        let _ = self.fd.signal_msi(msi);
    }
}

impl Vm for KvmVm {
    fn set_ioapic_route(&self, pin: u8, route: Option<Msi>) {
        let mut routes = self.routes.lock();
        if let Some(place) = routes.pins.get_mut(usize::from(pin))
            && *place != route
        {
            *place = route;
            // These routes only tell the kernel which vectors to report; a failure costs the end-of-interrupt of a level
            // interrupt, which a guest survives by polling, and there is nobody to report it to.
            let _ = self.update_routes(&routes);
        }
    }

    fn set_extint(&self, high: bool) {
        if !self.extint.swap(high, Ordering::SeqCst)
            && high
            && let Some(remote) = &*self.boot_vcpu.lock()
        {
            remote.interrupt();
        }
    }

    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), DoorbellError> {
        let refused = |source| DoorbellError::Refused { address: doorbell.address, source };
        let Some(event) = doorbell.target.eventfd() else { return Ok(()) };
        let copy = event.try_clone_to_owned().map_err(refused)?;
        // SAFETY: a fresh duplicate that nothing else owns.
        let event = unsafe { EventFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(copy)) };
        let address = ioevent_address(doorbell);
        let registered = match (doorbell.value, doorbell.bytes) {
            (None, _) => self.fd.register_ioevent(&event, &address, NoDatamatch),
            (Some(value), 1) => self.fd.register_ioevent(&event, &address, value as u8),
            (Some(value), 2) => self.fd.register_ioevent(&event, &address, value as u16),
            (Some(value), 4) => self.fd.register_ioevent(&event, &address, value as u32),
            (Some(value), _) => self.fd.register_ioevent(&event, &address, value),
        };
        registered.map_err(|e| refused(std::io::Error::from_raw_os_error(e.errno())))?;
        self.doorbells.lock().push((doorbell.clone(), event));
        Ok(())
    }

    fn remove_doorbell(&self, doorbell: &Doorbell) {
        let same = |d: &Doorbell| {
            (d.space, d.address, d.bytes, d.value) == (doorbell.space, doorbell.address, doorbell.bytes, doorbell.value)
        };
        let mut doorbells = self.doorbells.lock();
        let Some(index) = doorbells.iter().position(|(d, _)| same(d)) else { return };
        let (d, event) = doorbells.swap_remove(index);
        let address = ioevent_address(&d);
        debug_assert!(event.as_raw_fd() >= 0);
        // It was registered just so; a failure would leave a doorbell that nobody listens to.
        let _ = match (d.value, d.bytes) {
            (None, _) => self.fd.unregister_ioevent(&event, &address, NoDatamatch),
            (Some(value), 1) => self.fd.unregister_ioevent(&event, &address, value as u8),
            (Some(value), 2) => self.fd.unregister_ioevent(&event, &address, value as u16),
            (Some(value), 4) => self.fd.unregister_ioevent(&event, &address, value as u32),
            (Some(value), _) => self.fd.unregister_ioevent(&event, &address, value),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use guest_ram::Gpa;
    use hv_core::{Accel, Clock, Topology, Vcpu, VmParts};

    use super::*;
    use crate::KvmAccel;

    #[test]
    fn messages_arrive_by_calls_and_then_through_an_irqfd() {
        let Ok(accel) = KvmAccel::open() else {
            eprintln!("skipped: this host has no KVM, or none for this user");
            return;
        };
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap();
        let parts = accel.build(ram, &Topology { vcpus: 1 }, &accel.cpuid(), Clock::host()).unwrap();
        let VmParts { vm, mut vcpus } = parts;
        let vcpu = vcpus.first_mut().unwrap();
        let mut state = vcpu.state().unwrap();
        state.lapic[0xf1] |= 1; // the APIC is on. SDM 3A 11.9
        vcpu.set_state(&state).unwrap();
        let msi = Msi { address: 0xfee0_0000, data: 0x41 };
        // Bit 0x41 of the interrupt request register. SDM 3A 11.8.4
        const REQUEST: usize = 0x200 + 0x10 * 2;
        let mut arrives = |what: &str| {
            vm.signal(msi);
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                state = vcpu.state().unwrap();
                if state.lapic[REQUEST] & 2 != 0 {
                    break;
                }
                assert!(Instant::now() < deadline, "{what} did not arrive");
                std::thread::yield_now();
            }
            state.lapic[REQUEST] = 0;
            vcpu.set_state(&state).unwrap();
        };
        for number in 1..=2 * messages::OFTEN {
            arrives(&format!("message {number}"));
            let routed = vm.routes.lock().frequent.routed().to_vec();
            assert_eq!(routed, if number < messages::OFTEN { vec![] } else { vec![msi] }, "message {number}");
        }
        // Routes of the IOAPIC come and go beside it.
        vm.set_ioapic_route(4, Some(Msi { address: 0xfee0_0000, data: 0x34 }));
        arrives("the message after another route");
    }
}
