//! The software CPU: x86-64 executed by an interpreter, where KVM is absent or unusable.
//!
//! Instructions are decoded once into operations (`cache`, `decode`) and executed by small handlers (`ops`); guest memory
//! is reached through a software TLB (`mmu`); arithmetic and vector instructions are the host's own (`alu`, `native`).
//! Exceptions are precise. An instruction or a state that is not implemented stops the guest with
//! [`hv_core::Halt::InternalError`]: nothing is approximated in silence.
//!
//! `unsafe` is confined to `hostmem` (single loads and stores on guest memory), `alu` (register arithmetic in assembly),
//! `native` (generated code) and one system call in `ops::system`.
//!
//! Invariant: no device and no XML is known here.

mod alu;
mod block_io;
mod cache;
mod code_map;
mod cpu;
mod decode;
mod exception;
mod fpu;
mod hostmem;
mod lapic;
mod mailbox;
mod mmu;
mod msrs;
mod native;
mod ops;
mod run;
mod segment;
mod state;
mod step;

use std::sync::Arc;

use guest_ram::GuestRam;
use hv_core::{Accel, AccelError, AccelReport, Clock, Doorbell, DoorbellError, Msi, MsiSink, Topology, Vm, VmParts};
use x86::CpuidTable;

pub use run::SoftVcpu;
pub use step::{Stepped, UserRegisters};

use mailbox::{Mailbox, Watcher};

/// What the owner of a machine decides about the engine.
#[derive(Clone, Debug)]
pub struct SoftConfig {
    /// Bytes that decoded blocks may take per vCPU; when they are used up, all blocks are decoded anew.
    pub block_cache_bytes: u64,
}

impl Default for SoftConfig {
    fn default() -> SoftConfig {
        SoftConfig { block_cache_bytes: 16 << 20 }
    }
}

/// The software CPU as an engine.
#[derive(Clone, Debug, Default)]
pub struct SoftAccel {
    config: SoftConfig,
}

impl SoftAccel {
    /// An engine with this configuration. Works on every x86-64 host.
    pub fn new(config: SoftConfig) -> SoftAccel {
        SoftAccel { config }
    }
}

impl Accel for SoftAccel {
    type Vm = SoftVm;
    type Vcpu = SoftVcpu;

    fn probe(&self) -> AccelReport {
        AccelReport { name: "soft", refusal: None, physical_bits: mmu::PHYS_BITS as u8, max_vcpus: 1 }
    }

    fn cpuid(&self) -> CpuidTable {
        let features = x86::cpuid::Features::soft(&native::host_features());
        x86::cpuid::soft_model(&features, mmu::PHYS_BITS)
    }

    fn build(
        &self,
        ram: GuestRam,
        topology: &Topology,
        cpuid: &CpuidTable,
        clock: Clock,
    ) -> Result<VmParts<SoftVm, SoftVcpu>, AccelError> {
        if topology.vcpus != 1 {
            return Err(AccelError::TooManyVcpus { engine: "soft", max: 1, asked: topology.vcpus });
        }
        let boxes: Vec<Arc<Mailbox>> = (0..topology.vcpus).map(|id| Arc::new(Mailbox::new(id))).collect();
        ram.watch_code(Arc::new(Watcher(boxes.clone())));
        let mut vcpus = Vec::with_capacity(boxes.len());
        for (id, mailbox) in boxes.iter().enumerate() {
            let native = native::Native::new(cpuid).map_err(|source| AccelError::Host {
                engine: "soft",
                call: "memory for generated code",
                source,
            })?;
            let cpu = cpu::Cpu::new(id as u32, ram.clone(), Arc::new(cpuid.clone()), clock.clone(), mailbox.clone());
            vcpus.push(SoftVcpu {
                cpu: Box::new(cpu),
                cache: cache::BlockCache::new(self.config.block_cache_bytes),
                native,
            });
        }
        Ok(VmParts { vm: Arc::new(SoftVm { boxes }), vcpus })
    }
}

/// The machine-wide half: the mailboxes of all vCPUs.
pub struct SoftVm {
    boxes: Vec<Arc<Mailbox>>,
}

impl MsiSink for SoftVm {
    fn signal(&self, msi: Msi) {
        mailbox::deliver_msi(&self.boxes, msi);
    }
}

impl Vm for SoftVm {
    // The trigger mode travels in the message, so routes need not be known.
    fn set_ioapic_route(&self, _pin: u8, _route: Option<Msi>) {}

    fn set_extint(&self, high: bool) {
        if let Some(first) = self.boxes.first() {
            first.set_extint(high);
        }
    }

    // Every guest write comes through `VcpuIo::mmio_write`, which rings; there is no faster way to register for.
    fn add_doorbell(&self, _doorbell: &Doorbell) -> Result<(), DoorbellError> {
        Ok(())
    }

    fn remove_doorbell(&self, _doorbell: &Doorbell) {}
}
