//! The register half: configuration space, controller registers, doorbells. NVME 3

use std::sync::Arc;

use hv_core::{MsiSink, StateError};
use pci::config::COMMAND_INTX_OFF;
use pci::{BarKind, ConfigSpace, Identity, Msix, PciFunction, Window};

use crate::identify::{DEVICE, SUBSYSTEM, VENDOR, VERSION};
use crate::interrupt::QUEUES;
use crate::link::{AdminQueues, Link, Request, SHUTDOWN_BUSY, SHUTDOWN_COMPLETE};
use crate::state::NvmeStateV1;

/// Entries of the largest queue.
pub(crate) const MAX_ENTRIES: u32 = 1024;

const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;
const MSIX_TABLE: u64 = 0x2000;

/// Largest queue, contiguous queues only, 10 s to become ready, NVM command set; pages of 4 KiB only.
const CAP: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 3 << 14;
const CC_WRITABLE: u32 = 0x00ff_fff1;
/// Command set, page size and arbitration, of which 0 is the only choice.
const CC_FIXED: u32 = 0x3ff0;
/// Entry sizes: 64 and 16 bytes.
const CC_ENTRY_SIZES: u32 = 4 << 20 | 6 << 16;
const CC_ENTRY_MASK: u32 = 0xff << 16;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const AQA_WRITABLE: u32 = 0x0fff_0fff;

/// The register half of a controller.
pub struct NvmePci {
    config: ConfigSpace,
    msix_capability: u8,
    cc: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// The configuration written when it was enabled is not one there is.
    refused: bool,
    link: Arc<Link>,
}

fn config_space(msix: &Msix) -> (ConfigSpace, u8) {
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: DEVICE,
        revision: 1,
        class: 0x01_0802, // mass storage, non-volatile memory, NVM Express
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    })
    .with_bar(BAR, BarKind::Memory64, BAR_BYTES)
    .with_interrupt_pin();
    let capability = msix.add_capability(&mut config, BAR, MSIX_TABLE as u32);
    (config, capability)
}

impl NvmePci {
    pub(crate) fn new(link: Arc<Link>) -> NvmePci {
        let (config, msix_capability) = config_space(&link.interrupts.lock().msix);
        NvmePci { config, msix_capability, cc: 0, aqa: 0, asq: 0, acq: 0, refused: false, link }
    }

    /// Asks for the queues back; they are there when the working half has run.
    pub fn stop_queues(&mut self) {
        self.link.send(Request::Park);
    }

    /// What a snapshot carries: [`NvmePci::stop_queues`] was called, and the working half has run.
    pub fn save(&mut self) -> NvmeStateV1 {
        let controller = self.link.take_parked();
        let NvmePci { config, msix_capability: _, cc, aqa, asq, acq, refused, link } = self;
        let wires = link.interrupts.lock();
        NvmeStateV1 {
            config: config.save(),
            msix: wires.msix.save(),
            interrupt_mask: wires.mask,
            cc: *cc,
            aqa: *aqa,
            asq: *asq,
            acq: *acq,
            fatal: *refused || link.fatal(),
            shutdown: link.shutdown(),
            controller,
        }
    }

    /// Takes a saved state into a controller that was just built, and starts its queues. The state is untrusted: after an
    /// error the controller is not to be used.
    pub fn restore(mut self, state: NvmeStateV1, messages: Arc<dyn MsiSink>) -> Result<NvmePci, StateError> {
        let NvmeStateV1 { config, msix, interrupt_mask, cc, aqa, asq, acq, fatal, shutdown, controller } = state;
        self.config = self.config.restore(&config)?;
        let mut wires = self.link.interrupts.lock();
        wires.msix = Msix::restore(msix, QUEUES, messages)?;
        wires.mask = interrupt_mask & 1;
        wires.pin_off = self.config.command() & COMMAND_INTX_OFF != 0;
        drop(wires);
        (self.cc, self.aqa, self.asq, self.acq) = (cc & CC_WRITABLE, aqa & AQA_WRITABLE, asq & !0xfff, acq & !0xfff);
        self.refused = fatal;
        self.link.set_shutdown(if shutdown == 0 { 0 } else { SHUTDOWN_COMPLETE });
        if let Some(controller) = controller.filter(|_| self.cc & CC_ENABLE != 0) {
            self.link.send(Request::Unpark(Box::new(controller)));
        }
        Ok(self)
    }

    fn status(&self) -> u32 {
        // While the working half has not heard of it yet, a controller that is disabled still shows that it is ready.
        let ready = if self.link.ready() { CSTS_READY } else { 0 };
        let fatal = if self.refused || self.link.fatal() { CSTS_FATAL } else { 0 };
        ready | fatal | u32::from(self.link.shutdown()) << 2
    }

    fn write_cc(&mut self, value: u32) {
        let old = std::mem::replace(&mut self.cc, value & CC_WRITABLE);
        let changed = old ^ self.cc;
        if changed & CC_ENABLE != 0 {
            if self.cc & CC_ENABLE != 0 { self.enable() } else { self.disable() }
        }
        if changed & CC_SHUTDOWN != 0 && self.cc & CC_SHUTDOWN != 0 {
            self.link.set_shutdown(SHUTDOWN_BUSY);
            self.link.send(Request::Shutdown);
        }
    }

    fn enable(&mut self) {
        let sizes = self.cc & CC_ENTRY_MASK;
        // Entry sizes may be set later, before the first I/O queue; where they are set they must be right.
        if self.cc & CC_FIXED != 0 || sizes != 0 && sizes != CC_ENTRY_SIZES {
            self.refused = true;
            return;
        }
        self.link.set_shutdown(0);
        self.link.send(Request::Enable(AdminQueues {
            submission: self.asq,
            submission_size: (self.aqa & 0xfff) + 1,
            completion: self.acq,
            completion_size: (self.aqa >> 16 & 0xfff) + 1,
        }));
    }

    fn disable(&mut self) {
        self.refused = false;
        self.link.set_shutdown(0);
        self.link.send(Request::Disable);
    }

    fn read_dword(&self, offset: u64) -> u32 {
        match offset {
            0x00 => CAP as u32,
            0x04 => (CAP >> 32) as u32,
            0x08 => VERSION,
            0x0c | 0x10 => self.link.interrupts.lock().mask,
            0x14 => self.cc,
            0x1c => self.status(),
            0x24 => self.aqa,
            0x28 => self.asq as u32,
            0x2c => (self.asq >> 32) as u32,
            0x30 => self.acq as u32,
            0x34 => (self.acq >> 32) as u32,
            _ => 0,
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0x0c | 0x10 => {
                let mut wires = self.link.interrupts.lock();
                wires.mask = if offset == 0x0c { wires.mask | value & 1 } else { wires.mask & !value };
                wires.drive_pin();
            }
            0x14 => self.write_cc(value),
            // Admin queue registers are the driver's while the controller is off. NVME 3.1.8
            0x24 if self.cc & CC_ENABLE == 0 => self.aqa = value & AQA_WRITABLE,
            0x28 if self.cc & CC_ENABLE == 0 => self.asq = low(self.asq),
            0x2c if self.cc & CC_ENABLE == 0 => self.asq = high(self.asq),
            0x30 if self.cc & CC_ENABLE == 0 => self.acq = low(self.acq),
            0x34 if self.cc & CC_ENABLE == 0 => self.acq = high(self.acq),
            DOORBELLS.. => self.link.ring(((offset - DOORBELLS) / 4) as usize, value),
            _ => {}
        }
    }
}

impl PciFunction for NvmePci {
    fn config_read(&mut self, offset: u8, bytes: u8) -> u32 {
        self.config.read(offset, bytes)
    }
    fn config_write(&mut self, offset: u8, bytes: u8, value: u32) -> bool {
        let changed = self.config.write(offset, bytes, value);
        let mut wires = self.link.interrupts.lock();
        wires.msix.write_control(self.config.read(self.msix_capability + 2, 2) as u16);
        wires.pin_off = self.config.command() & COMMAND_INTX_OFF != 0;
        wires.drive_pin();
        changed
    }
    fn windows(&self, windows: &mut Vec<Window>) {
        self.config.windows(windows);
    }
    fn window_read(&mut self, _id: u8, offset: u64, bytes: u8) -> u64 {
        if offset >= MSIX_TABLE {
            return self.link.interrupts.lock().msix.read(offset - MSIX_TABLE, bytes);
        }
        let aligned = offset & !3;
        match bytes {
            8 => u64::from(self.read_dword(aligned)) | u64::from(self.read_dword(aligned + 4)) << 32,
            _ => u64::from(self.read_dword(aligned)) >> (8 * (offset & 3)),
        }
    }
    fn window_write(&mut self, _id: u8, offset: u64, bytes: u8, value: u64) {
        if offset >= MSIX_TABLE {
            return self.link.interrupts.lock().msix.write(offset - MSIX_TABLE, bytes, value);
        }
        // Registers are written in whole dwords; other widths have no effect. NVME 3.1
        match bytes {
            4 if offset.is_multiple_of(4) => self.write_dword(offset, value as u32),
            8 if offset.is_multiple_of(4) => {
                self.write_dword(offset, value as u32);
                self.write_dword(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
    }
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn reset(&mut self) {
        self.config.reset();
        (self.cc, self.aqa, self.asq, self.acq) = (0, 0, 0, 0);
        self.disable();
        let mut wires = self.link.interrupts.lock();
        wires.msix.reset();
        wires.mask = 0;
        wires.pin_off = false;
        wires.drive_pin();
    }
}
