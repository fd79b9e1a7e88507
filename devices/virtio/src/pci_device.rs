//! The register half: configuration space, capabilities, common configuration. VIRTIO 4.1

use std::sync::Arc;

use guest_ram::{Gpa, Memory};
use hv_core::{Doorbell, Ring, Space, StateError};
use pci::config::COMMAND_INTX_OFF;
use pci::{BarKind, ConfigSpace, Identity, Msix, PciFunction, Window};
use virtio_queue::{Queue, QueueT};

use crate::Lent;
use crate::interrupt::{Interrupts, NO_VECTOR};
use crate::link::{Lanes, Link, Moved, Shared};
use crate::model::{F_EVENT_IDX, F_VERSION_1, MAX_QUEUES, Model};
use crate::state::{QueueStateV1, VirtioStateV1, check_size};
use crate::work::{Device, Working};

/// Memory BAR with the MSI-X structures.
const MSIX_BAR: u8 = 1;
/// Memory BAR with everything else.
const REGISTER_BAR: u8 = 4;
const REGISTER_BYTES: u64 = 0x4000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const REGION_BYTES: u64 = 0x1000;
/// Bytes between the doorbells of two queues.
const NOTIFY_STEP: u32 = 4;
const COMMON_BYTES: u32 = 0x3c;

const CAP_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 0x40;
const STATUS_WRITABLE: u8 = 0x8f;

/// A queue as the driver sets it up.
#[derive(Clone, Debug)]
struct Setup {
    size: u16,
    max_size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_avail: u16,
    next_used: u16,
    /// See [`Moved::unfinished`].
    unfinished: Vec<u16>,
}

impl Setup {
    fn new(max_size: u16) -> Setup {
        Setup {
            size: max_size,
            max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
            unfinished: Vec::new(),
        }
    }

    /// The queue, if its rings lie in guest memory.
    fn queue(&self, memory: &Memory, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.device)).ok()?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// The register half of a device.
pub struct VirtioPci {
    model: Model,
    config: ConfigSpace,
    /// Offsets of the MSI-X and the configuration access capabilities.
    msix_capability: u8,
    access_capability: u8,
    status: u8,
    /// A reset waits for the working half: the status shown until then.
    resetting: Option<u8>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<Setup>,
    lanes: Lanes,
    memory: Memory,
}

/// Builds both halves of a device that one thread serves.
pub(crate) fn build<D: Device>(model: Model, device: D, lent: Lent) -> (VirtioPci, Working<D>) {
    let shared = shared(&model, &lent);
    let link = Arc::new(Link::new(shared.clone(), lent.bell));
    let working = Working::new(device, link.clone(), lent.memory.clone());
    (VirtioPci::new(model, Lanes::new(shared, vec![link]), lent.memory), working)
}

/// Builds a device with several lanes: each has its bell. The bell of `lent` is that of the first.
pub(crate) fn build_lanes<D: Device>(
    model: Model,
    devices: Vec<D>,
    lent: Lent,
    more_bells: Vec<Arc<dyn Ring>>,
) -> (VirtioPci, Vec<Working<D>>) {
    let shared = shared(&model, &lent);
    let bells = std::iter::once(lent.bell).chain(more_bells);
    let lanes: Vec<_> = devices.into_iter().zip(bells).collect();
    let (links, working) = lanes
        .into_iter()
        .map(|(device, bell)| {
            let link = Arc::new(Link::new(shared.clone(), bell));
            (link.clone(), Working::new(device, link, lent.memory.clone()))
        })
        .unzip();
    (VirtioPci::new(model, Lanes::new(shared, links), lent.memory), working)
}

fn shared(model: &Model, lent: &Lent) -> Arc<Shared> {
    let count = (model.queue_sizes.len() as u16).min(MAX_QUEUES);
    let interrupts = Interrupts::new(count, lent.messages.clone(), lent.interrupt_pin.clone());
    Shared::new(model.config.clone(), interrupts)
}

fn capability(kind: u8, offset: u64, bytes: u32, extra: Option<u32>) -> Vec<u8> {
    let length = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![length, kind, REGISTER_BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(bytes.to_le_bytes());
    body.extend(extra.into_iter().flat_map(u32::to_le_bytes));
    body
}

fn config_space(model: &Model, msix: &Msix) -> (ConfigSpace, u8, u8) {
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1af4,
        device: 0x1040 + model.device_type,
        revision: 1,
        class: model.class,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    })
    .with_bar(MSIX_BAR, BarKind::Memory32, Msix::BYTES)
    .with_bar(REGISTER_BAR, BarKind::Memory64, REGISTER_BYTES)
    .with_interrupt_pin();
    let queues = model.queue_sizes.len() as u32;
    for body in [
        capability(CFG_COMMON, COMMON, COMMON_BYTES, None),
        capability(CFG_ISR, ISR, 1, None),
        capability(CFG_DEVICE, DEVICE, REGION_BYTES as u32, None),
        capability(CFG_NOTIFY, NOTIFY, queues * NOTIFY_STEP, Some(NOTIFY_STEP)),
    ] {
        config.add_capability(CAP_VENDOR, &body, &[]);
    }
    // BAR, offset, length and data of the access window are the driver's. VIRTIO 4.1.4.9
    let access = capability(CFG_PCI, 0, 0, Some(0));
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.resize(access.len(), 0xff);
    let access = config.add_capability(CAP_VENDOR, &access, &writable);
    let msix = msix.add_capability(&mut config, MSIX_BAR, 0);
    (config, msix, access)
}

impl VirtioPci {
    fn new(model: Model, lanes: Lanes, memory: Memory) -> VirtioPci {
        let (config, msix_capability, access_capability) = config_space(&model, &lanes.interrupts().lock().msix);
        let queues = model.queue_sizes.iter().map(|&max| Setup::new(max)).collect();
        VirtioPci {
            model,
            config,
            msix_capability,
            access_capability,
            status: 0,
            resetting: None,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            lanes,
            memory,
        }
    }

    /// Asks for the queues back; they are there when the working half has run.
    pub fn stop_queues(&mut self) {
        if self.status & STATUS_DRIVER_OK != 0 {
            self.lanes.stop();
        }
    }

    /// Gives queues that [`VirtioPci::stop_queues`] took back to the working half.
    pub fn start_queues(&mut self) {
        self.take_back();
        if self.status & STATUS_DRIVER_OK == 0 || self.lanes.broken() {
            return;
        }
        let mut queues = Vec::new();
        for (setup, index) in self.queues.iter().zip(0u16..).filter(|(setup, _)| setup.enabled) {
            match setup.queue(&self.memory, self.driver_features) {
                Some(queue) => queues.push(Moved { index, queue, unfinished: setup.unfinished.clone() }),
                None => return self.lanes.give_up(),
            }
        }
        self.lanes.start(queues, self.driver_features);
    }

    fn take_back(&mut self) {
        for Moved { index, queue, unfinished } in self.lanes.take_returned() {
            if let Some(setup) = self.queues.get_mut(usize::from(index)) {
                setup.next_avail = queue.next_avail();
                setup.next_used = queue.next_used();
                setup.unfinished = unfinished;
            }
        }
    }

    /// What a snapshot carries. The queues are here: [`VirtioPci::stop_queues`], and the working half has run.
    pub fn save(&mut self) -> VirtioStateV1 {
        self.take_back();
        let VirtioPci { config, status, queues, driver_features, queue_select, lanes, .. } = self;
        let VirtioPci { device_feature_select, driver_feature_select, .. } = self;
        // The model and the capabilities follow from the device; a reset that waits has nothing left to save.
        let VirtioPci { model: _, msix_capability: _, access_capability: _, resetting: _, memory: _, .. } = self;
        let wires = lanes.interrupts().lock();
        let vectors = wires.queue_vectors.iter();
        let queues = queues.iter().zip(vectors).map(|(setup, &vector)| {
            let Setup { size, max_size: _, enabled, descriptors, driver, device, next_avail, next_used, unfinished } =
                setup.clone();
            QueueStateV1 { size, enabled, descriptors, driver, device, vector, next_avail, next_used, unfinished }
        });
        VirtioStateV1 {
            config: config.save(),
            msix: wires.msix.save(),
            isr: wires.isr,
            config_vector: wires.config_vector,
            status: *status | if lanes.broken() { STATUS_NEEDS_RESET } else { 0 },
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.collect(),
        }
    }

    /// Takes a saved state into a device that was just built; then [`VirtioPci::start_queues`]. The state is untrusted:
    /// after an error the device is not to be used.
    pub fn restore(
        mut self,
        state: VirtioStateV1,
        messages: Arc<dyn hv_core::MsiSink>,
    ) -> Result<VirtioPci, StateError> {
        let VirtioStateV1 { config, msix, isr, config_vector, status, queues, driver_features, queue_select, .. } =
            state;
        let (device_feature_select, driver_feature_select) = (state.device_feature_select, state.driver_feature_select);
        if queues.len() != self.queues.len() {
            return Err(StateError::Length { field: "virtio.queues", want: self.queues.len(), got: queues.len() });
        }
        // A driver may ask for anything while it negotiates; it is refused when it says that it is done.
        if status & STATUS_FEATURES_OK != 0 && driver_features & !self.model.offered() != 0 {
            return Err(StateError::Value { field: "virtio.driver_features", got: driver_features });
        }
        self.config = self.config.restore(&config)?;
        let mut wires = self.lanes.interrupts().lock();
        wires.msix = Msix::restore(msix, wires.msix.vectors(), messages)?;
        for (index, saved) in queues.into_iter().enumerate() {
            let Some(setup) = self.queues.get_mut(index) else { continue };
            let QueueStateV1 { size, enabled, descriptors, driver, device, vector, .. } = saved;
            let QueueStateV1 { next_avail, next_used, unfinished, .. } = saved;
            let max_size = setup.max_size;
            let size = check_size(size, max_size)?;
            if unfinished.len() > usize::from(size) {
                let (want, got) = (size.into(), unfinished.len());
                return Err(StateError::Length { field: "virtio.queue.unfinished", want, got });
            }
            *setup = Setup { size, max_size, enabled, descriptors, driver, device, next_avail, next_used, unfinished };
            let vector = wires.valid_vector(vector);
            if let Some(place) = wires.queue_vectors.get_mut(index) {
                *place = vector;
            }
        }
        wires.isr = isr & 3;
        wires.config_vector = wires.valid_vector(config_vector);
        wires.pin_off = self.config.command() & COMMAND_INTX_OFF != 0;
        wires.drive_pin();
        drop(wires);
        if status & STATUS_NEEDS_RESET != 0 {
            self.lanes.give_up();
        }
        self.status = status & STATUS_WRITABLE;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.driver_features = driver_features;
        self.queue_select = queue_select;
        Ok(self)
    }

    fn shown_status(&mut self) -> u8 {
        if let Some(old) = self.resetting {
            if !self.lanes.idle() {
                return old; // not 0 until the reset is complete. VIRTIO 4.1.4.3.1
            }
            self.resetting = None;
        }
        self.status | if self.lanes.broken() { STATUS_NEEDS_RESET } else { 0 }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let mut added = value & STATUS_WRITABLE & !self.status;
        if added & STATUS_FEATURES_OK != 0 {
            let unknown = self.driver_features & !self.model.offered() != 0;
            if unknown || self.driver_features & F_VERSION_1 == 0 {
                added &= !STATUS_FEATURES_OK;
            }
        }
        if (self.status | added) & STATUS_FEATURES_OK == 0 {
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added;
        if added & STATUS_DRIVER_OK != 0 {
            self.start_queues();
        }
    }

    fn reset_device(&mut self) {
        let shown = self.shown_status();
        if self.status & STATUS_DRIVER_OK != 0 {
            self.lanes.forget();
        }
        self.lanes.take_returned();
        self.resetting = (shown != 0).then_some(shown);
        self.status = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(|setup| *setup = Setup::new(setup.max_size));
        self.lanes.mend();
        self.lanes.interrupts().reset_device();
    }

    fn selected(&self) -> Option<&Setup> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn read_common(&mut self, offset: u64) -> u64 {
        let setup = self.selected();
        let queue = |get: fn(&Setup) -> u64| setup.map_or(0, get);
        match offset {
            0x00 => self.device_feature_select.into(),
            0x04 => match self.device_feature_select {
                0 => self.model.offered() & 0xffff_ffff,
                1 => self.model.offered() >> 32,
                _ => 0,
            },
            0x08 => self.driver_feature_select.into(),
            0x0c => match self.driver_feature_select {
                0 => self.driver_features & 0xffff_ffff,
                1 => self.driver_features >> 32,
                _ => 0,
            },
            0x10 => self.lanes.interrupts().lock().config_vector.into(),
            0x12 => self.queues.len() as u64,
            0x14 => self.shown_status().into(),
            0x15 => self.lanes.config_generation().into(),
            0x16 => self.queue_select.into(),
            0x18 => queue(|s| s.size.into()),
            0x1a => {
                let wires = self.lanes.interrupts().lock();
                wires.queue_vectors.get(usize::from(self.queue_select)).copied().unwrap_or(NO_VECTOR).into()
            }
            0x1c => queue(|s| s.enabled.into()),
            0x1e => setup.map_or(0, |_| self.queue_select.into()),
            0x20 => queue(|s| s.descriptors),
            0x24 => queue(|s| s.descriptors >> 32),
            0x28 => queue(|s| s.driver),
            0x2c => queue(|s| s.driver >> 32),
            0x30 => queue(|s| s.device),
            0x34 => queue(|s| s.device >> 32),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, bytes: u8, value: u64) {
        match offset {
            0x00 => self.device_feature_select = value as u32,
            0x08 => self.driver_feature_select = value as u32,
            0x0c if self.status & STATUS_FEATURES_OK == 0 => {
                let (keep, value) = match self.driver_feature_select {
                    0 => (!0xffff_ffff, value & 0xffff_ffff),
                    1 => (0xffff_ffff, value << 32),
                    _ => return,
                };
                self.driver_features = self.driver_features & keep | value;
            }
            0x10 => {
                let mut wires = self.lanes.interrupts().lock();
                wires.config_vector = wires.valid_vector(value as u16);
            }
            0x14 => self.write_status(value as u8),
            0x16 => self.queue_select = value as u16,
            0x1a => {
                let mut wires = self.lanes.interrupts().lock();
                let vector = wires.valid_vector(value as u16);
                if let Some(place) = wires.queue_vectors.get_mut(usize::from(self.queue_select)) {
                    *place = vector;
                }
            }
            0x18 | 0x1c | 0x20..=0x37 => self.write_queue(offset, bytes, value),
            _ => {}
        }
    }

    /// Set-up of the selected queue; fixed once it is enabled. VIRTIO 4.1.4.3.2
    fn write_queue(&mut self, offset: u64, bytes: u8, value: u64) {
        let index = usize::from(self.queue_select);
        let Some(setup) = self.queues.get_mut(index).filter(|s| !s.enabled) else { return };
        let (low, high) = (0xffff_ffffu64, value << 32);
        let place = |old: u64| match (offset & 4, bytes) {
            (0, 8) => value,
            (0, _) => old & !low | value & low,
            _ => old & low | high,
        };
        match offset {
            0x18 => {
                if let Ok(size) = check_size(value as u16, setup.max_size) {
                    setup.size = size;
                }
            }
            0x1c => setup.enabled = value & 1 != 0,
            0x20..=0x27 => setup.descriptors = place(setup.descriptors),
            0x28..=0x2f => setup.driver = place(setup.driver),
            _ => setup.device = place(setup.device),
        }
    }

    fn read_isr(&mut self) -> u8 {
        let mut wires = self.lanes.interrupts().lock();
        let isr = std::mem::take(&mut wires.isr);
        wires.drive_pin();
        isr
    }

    /// The window into BARs through configuration space: BAR 4 only, 1, 2 or 4 bytes.
    fn access_target(&self) -> Option<(u64, u8)> {
        let at = self.access_capability;
        let offset = u64::from(self.config.read(at + 8, 4));
        let bytes = self.config.read(at + 12, 4);
        let fits = matches!(bytes, 1 | 2 | 4) && offset.is_multiple_of(bytes.into()) && offset < REGISTER_BYTES;
        (self.config.read(at + 4, 1) == u32::from(REGISTER_BAR) && fits).then_some((offset, bytes as u8))
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u8, bytes: u8) -> u32 {
        if offset & !3 == self.access_capability + 16
            && let Some((at, width)) = self.access_target()
        {
            let value = self.window_read(REGISTER_BAR, at, width) as u32;
            return value >> (8 * (offset & 3));
        }
        let status = offset <= 6 && offset + bytes > 6;
        if status {
            let pending = self.lanes.interrupts().lock().isr != 0;
            self.config.show_interrupt(pending);
        }
        self.config.read(offset, bytes)
    }

    fn config_write(&mut self, offset: u8, bytes: u8, value: u32) -> bool {
        let changed = self.config.write(offset, bytes, value);
        if offset & !3 == self.access_capability + 16
            && let Some((at, width)) = self.access_target()
        {
            let data = self.config.read(self.access_capability + 16, 4);
            self.window_write(REGISTER_BAR, at, width, data.into());
            if at >= NOTIFY {
                self.lanes.ring_all();
            }
        }
        let control = self.config.read(self.msix_capability + 2, 2) as u16;
        let mut wires = self.lanes.interrupts().lock();
        wires.pin_off = self.config.command() & COMMAND_INTX_OFF != 0;
        wires.msix.write_control(control);
        wires.drive_pin();
        changed
    }

    fn windows(&self, windows: &mut Vec<Window>) {
        self.config.windows(windows);
    }

    fn doorbells(&self, doorbells: &mut Vec<Doorbell>) {
        let mut windows = Vec::new();
        self.config.windows(&mut windows);
        for window in windows.iter().filter(|w| w.id == REGISTER_BAR) {
            doorbells.extend((0..self.queues.len()).filter_map(|queue| {
                Some(Doorbell {
                    space: Space::Memory,
                    address: Gpa(window.base + NOTIFY + queue as u64 * u64::from(NOTIFY_STEP)),
                    bytes: 0,
                    value: None,
                    target: self.lanes.bell(queue)?.clone(),
                })
            }));
        }
    }

    fn window_read(&mut self, id: u8, offset: u64, bytes: u8) -> u64 {
        match (id, offset & !(REGION_BYTES - 1)) {
            (MSIX_BAR, _) => self.lanes.interrupts().lock().msix.read(offset, bytes),
            (REGISTER_BAR, COMMON) => self.read_common(offset),
            (REGISTER_BAR, ISR) if offset == ISR => self.read_isr().into(),
            (REGISTER_BAR, DEVICE) => self.lanes.config(offset - DEVICE, bytes),
            _ => 0,
        }
    }

    fn window_write(&mut self, id: u8, offset: u64, bytes: u8, value: u64) {
        match (id, offset & !(REGION_BYTES - 1)) {
            (MSIX_BAR, _) => self.lanes.interrupts().lock().msix.write(offset, bytes, value),
            (REGISTER_BAR, COMMON) => self.write_common(offset, bytes, value),
            _ => {} // doorbells are rung by the bus; nothing else is writable
        }
    }

    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn reset(&mut self) {
        self.reset_device();
        self.resetting = None;
        self.config.reset();
        let mut wires = self.lanes.interrupts().lock();
        wires.msix.reset();
        wires.pin_off = false;
        wires.drive_pin();
    }
}
