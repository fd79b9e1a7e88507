//! KVM as an engine, and the only place that makes KVM calls.
//!
//! The interrupt controller is split: local APICs are the kernel's, IOAPIC, PIC and PIT are the machine's, as under every
//! other engine. Whether KVM is usable is found out by running a small guest ([`probe`]), not by opening the device: some
//! hosts offer a /dev/kvm that emulates instructions and cannot run a stock kernel.
//!
//! Invariant: no device is known here.

mod kick;
mod messages;
mod probe;
mod registers;
mod vcpu;
mod vm;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;
use std::sync::Arc;

use guest_ram::GuestRam;
use hv_core::{Accel, AccelError, AccelReport, Clock, Topology, VmParts};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
use x86::{CpuidLeaf, CpuidTable};

pub use probe::Refusal;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

/// What every host's /dev/kvm must have for us.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "user memory"),
    (Cap::SplitIrqchip, "a split interrupt controller"),
    (Cap::SignalMsi, "message interrupts"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::Xsave, "XSAVE"),
];

fn host(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> AccelError {
    move |e| AccelError::Host { engine: "kvm", call, source: io::Error::from_raw_os_error(e.errno()) }
}

/// KVM as an engine.
pub struct KvmAccel {
    kvm: Kvm,
}

impl KvmAccel {
    /// Opens /dev/kvm. `Unusable`: it is missing or this user may not open it.
    pub fn open() -> Result<KvmAccel, AccelError> {
        let path = Path::new("/dev/kvm");
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => KvmAccel::from_file(file),
            Err(e) => Err(AccelError::Unusable { engine: "kvm", reason: Refusal::open(path, &e).to_string() }),
        }
    }

    /// Takes an open /dev/kvm.
    pub fn from_file(file: File) -> Result<KvmAccel, AccelError> {
        // SAFETY: the descriptor is open, ours, and given up here.
        let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != 12 {
            let reason = match version {
                ..0 => {
                    "/dev/kvm is open, and does not answer as KVM: make it anew, as character device 10, 232".to_owned()
                }
                _ => format!("its interface has version {version}, not 12"),
            };
            return Err(AccelError::Unusable { engine: "kvm", reason });
        }
        if let Some((_, what)) = NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            let reason = format!("this kernel's KVM lacks {what}");
            return Err(AccelError::Unusable { engine: "kvm", reason });
        }
        Ok(KvmAccel { kvm })
    }
}

impl Accel for KvmAccel {
    type Vm = KvmVm;
    type Vcpu = KvmVcpu;

    fn probe(&self) -> AccelReport {
        let physical_bits = self.cpuid().get(0x8000_0008, 0).map_or(36, |l| l.eax as u8);
        AccelReport {
            name: "kvm",
            refusal: probe::run(&self.kvm).err().map(|refusal| refusal.to_string()),
            physical_bits,
            max_vcpus: 1,
        }
    }

    fn cpuid(&self) -> CpuidTable {
        let Ok(supported) = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) else { return CpuidTable::default() };
        let mut table = CpuidTable(supported.as_slice().iter().map(leaf).collect());
        if let Some(one) = table.get_mut(1, 0) {
            one.ecx |= 1 << 31;
            if self.kvm.check_extension(Cap::TscDeadlineTimer) {
                one.ecx |= 1 << 24;
            }
        }
        table
    }

    fn build(
        &self,
        ram: GuestRam,
        topology: &Topology,
        cpuid: &CpuidTable,
        _clock: Clock,
    ) -> Result<VmParts<KvmVm, KvmVcpu>, AccelError> {
        if topology.vcpus != 1 {
            return Err(AccelError::TooManyVcpus { engine: "kvm", max: 1, asked: topology.vcpus });
        }
        let fd = self.kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        let vm = Arc::new(KvmVm::new(fd, ram)?);
        let vcpus = (0..topology.vcpus).map(|id| KvmVcpu::new(&vm, id, cpuid)).collect::<Result<_, _>>()?;
        Ok(VmParts { vm, vcpus })
    }
}

fn leaf(e: &kvm_bindings::kvm_cpuid_entry2) -> CpuidLeaf {
    let indexed = e.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidLeaf { leaf: e.function, subleaf: indexed.then_some(e.index), eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx }
}
