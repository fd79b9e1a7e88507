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

/// Pins of the IOAPIC; the kernel is told their routes so that it reports ends of interrupt.
const IOAPIC_PINS: usize = 24;
/// Three pages that Intel processors need in real mode, below the firmware and above any RAM we map under 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// The machine-wide half of a KVM guest.
pub struct KvmVm {
    pub(crate) fd: VmFd,
    /// Keeps the mappings that the kernel was given.
    _ram: GuestRam,
    routes: Mutex<[Option<Msi>; IOAPIC_PINS]>,
    doorbells: Mutex<Vec<(Doorbell, EventFd)>>,
    extint: AtomicBool,
    pub(crate) boot_vcpu: Mutex<Option<Arc<Remote>>>,
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
            routes: Mutex::new([None; IOAPIC_PINS]),
            doorbells: Mutex::default(),
            extint: AtomicBool::new(false),
            boot_vcpu: Mutex::new(None),
        })
    }

    pub(crate) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    fn update_routes(&self, routes: &[Option<Msi>; IOAPIC_PINS]) {
        let entries: Vec<kvm_irq_routing_entry> = (0..)
            .zip(routes)
            .filter_map(|(gsi, route)| route.map(|msi| (gsi, msi)))
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
        // Routes only tell the kernel which vectors to report; a failure costs the end-of-interrupt of a level
        // interrupt, which a guest survives by polling, and there is nobody to report it to.
        if let Ok(table) = KvmIrqRouting::from_entries(&entries) {
            let _ = self.fd.set_gsi_routing(&table);
        }
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
        if let Some(slot) = routes.get_mut(pin as usize)
            && *slot != route
        {
            *slot = route;
            self.update_routes(&routes);
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
