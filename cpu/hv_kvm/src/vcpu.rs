//! One vCPU: the run loop around KVM_RUN.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use hv_core::{AccelError, Gpa, Halt, InternalError, Kick, StopToken, Vcpu, VcpuIo};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVMIO, kvm_cpuid_entry2, kvm_interrupt, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use x86::{CpuidTable, State};

use crate::kick::{self, Kicker, Remote};
use crate::{KvmVm, host, registers};

vmm_sys_util::ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// One vCPU of a KVM guest.
pub struct KvmVcpu {
    fd: VcpuFd,
    vm: Arc<KvmVm>,
    remote: Arc<Remote>,
}

/// A port access as the kernel reports it: string instructions come with several elements at once.
#[derive(Clone, Copy)]
struct PortExit {
    port: u16,
    bytes: usize,
    count: usize,
    offset: usize,
}

impl KvmVcpu {
    pub(crate) fn new(vm: &Arc<KvmVm>, id: u32, cpuid: &CpuidTable) -> Result<KvmVcpu, AccelError> {
        kick::install_handler();
        let mut fd = vm.fd.create_vcpu(id as u64).map_err(host("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&cpuid_entries(cpuid, id)?).map_err(host("KVM_SET_CPUID2"))?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        let remote = Arc::new(Remote::new(immediate_exit));
        if id == 0 {
            *vm.boot_vcpu.lock() = Some(remote.clone());
        }
        Ok(KvmVcpu { fd, vm: vm.clone(), remote })
    }

    fn run_loop<I: VcpuIo>(&mut self, io: &I, stop: &StopToken) -> Halt {
        loop {
            if stop.is_stopped() {
                self.complete_access();
                return Halt::Stop;
            }
            self.offer_extint(io);
            if let Some(halt) = self.run_once(io) {
                return halt;
            }
        }
    }

    /// The 8259 wants to interrupt: take its vector if the guest can be interrupted now, else ask to be told when.
    fn offer_extint<I: VcpuIo>(&mut self, io: &I) {
        let wanted = self.vm.extint();
        let ready = self.fd.get_kvm_run().ready_for_interrupt_injection != 0;
        if wanted
            && ready
            && let Some(vector) = io.pic_ack()
        {
            let interrupt = kvm_interrupt { irq: vector as u32 };
            // SAFETY: the descriptor is a vCPU and the structure is the one this call takes. It fails only while
            // another interrupt waits, which `ready` excludes.
            unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        }
        let still = wanted && self.vm.extint();
        self.fd.get_kvm_run().request_interrupt_window = still as u8;
    }

    fn run_once<I: VcpuIo>(&mut self, io: &I) -> Option<Halt> {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(..)) => {
                let access = self.port_access();
                for i in 0..access.count {
                    let value = self.port_data(access, i, None);
                    io.port_write(access.port, access.bytes as u8, value);
                }
            }
            Ok(VcpuExit::IoIn(..)) => {
                let access = self.port_access();
                for i in 0..access.count {
                    let value = io.port_read(access.port, access.bytes as u8);
                    self.port_data(access, i, Some(value));
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                for (gpa, part) in mmio_parts(address, data.len()) {
                    let value = io.mmio_read(Gpa(gpa), part.len() as u8).to_le_bytes();
                    data[part.clone()].copy_from_slice(&value[..part.len()]);
                }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                for (gpa, part) in mmio_parts(address, data.len()) {
                    let mut value = [0; 8];
                    value[..part.len()].copy_from_slice(&data[part.clone()]);
                    io.mmio_write(Gpa(gpa), part.len() as u8, u64::from_le_bytes(value));
                }
            }
            Ok(VcpuExit::IoapicEoi(vector)) => io.eoi(vector),
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt) => {}
            Ok(VcpuExit::Shutdown) => return Some(Halt::TripleFault),
            Ok(VcpuExit::SystemEvent(..)) => return Some(Halt::TripleFault),
            Ok(VcpuExit::InternalError) => return Some(self.internal("KVM cannot emulate this instruction".into())),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Some(self.internal(format!("the processor refused to enter the guest (reason {reason:#x})")));
            }
            Ok(other) => {
                let what = format!("KVM left the guest for a reason that is not handled: {other:?}");
                return Some(self.internal(what));
            }
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => self.fd.set_kvm_immediate_exit(0),
            Err(e) => {
                let error = io::Error::from_raw_os_error(e.errno());
                return Some(self.internal(format!("KVM_RUN failed: {error}")));
            }
        }
        None
    }

    /// Finishes the port or memory access of the last exit, so that the state is at an instruction boundary.
    fn complete_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // Returns at once with EINTR by design; everything it could report is handled at the next run.
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn port_access(&mut self) -> PortExit {
        let run = self.fd.get_kvm_run();
        // SAFETY: the last exit was a port access, so this member of the union is the one the kernel filled in.
        let io = unsafe { run.__bindgen_anon_1.io };
        PortExit { port: io.port, bytes: io.size as usize, count: io.count as usize, offset: io.data_offset as usize }
    }

    /// Reads (or, with `Some`, writes) element `i` of a port access.
    fn port_data(&mut self, access: PortExit, i: usize, value: Option<u32>) -> u32 {
        let PortExit { bytes, offset, .. } = access;
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let mut word = value.unwrap_or(0).to_le_bytes();
        let bytes = bytes.min(4);
        // SAFETY: the kernel placed `count` elements of `bytes` at `data_offset` inside the mapping of `kvm_run`, which
        // we hold exclusively; `i` is below `count`.
        unsafe {
            let at = run.cast::<u8>().add(offset + i * access.bytes);
            match value {
                Some(_) => std::ptr::copy_nonoverlapping(word.as_ptr(), at, bytes),
                None => std::ptr::copy_nonoverlapping(at, word.as_mut_ptr(), bytes),
            }
        }
        u32::from_le_bytes(word)
    }

    fn internal(&mut self, what: String) -> Halt {
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        let mut bytes = Vec::new();
        if self.fd.get_kvm_run().exit_reason == kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says which member of the union the kernel filled in.
            let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
            if failure.ndata >= 2 && failure.flags & 1 != 0 {
                // SAFETY: with that flag the anonymous member holds the instruction.
                let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                let length = (insn.insn_size as usize).min(insn.insn_bytes.len());
                bytes.extend_from_slice(&insn.insn_bytes[..length]);
            }
        }
        Halt::InternalError(InternalError { rip, bytes, what })
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.remote.gone();
    }
}

/// Naturally sized pieces of a memory access; KVM reports up to eight bytes, of any length.
fn mmio_parts(address: u64, length: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let bytes = match length.checked_sub(done)? {
            0 => return None,
            8.. => 8,
            4..8 => 4,
            2..4 => 2,
            _ => 1,
        };
        let part = (address.wrapping_add(done as u64), done..done + bytes);
        done += bytes;
        Some(part)
    })
}

fn cpuid_entries(table: &CpuidTable, id: u32) -> Result<CpuId, AccelError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .0
        .iter()
        .map(|l| {
            let mut e = kvm_cpuid_entry2 {
                function: l.leaf,
                index: l.subleaf.unwrap_or(0),
                flags: if l.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: l.eax,
                ebx: l.ebx,
                ecx: l.ecx,
                edx: l.edx,
                ..Default::default()
            };
            match l.leaf {
                1 => e.ebx = e.ebx & 0x0000_ffff | 1 << 16 | id << 24,
                0xb | 0x1f => e.edx = id,
                _ => {}
            }
            e
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| AccelError::State { engine: "kvm", what: format!("{} CPUID leaves", entries.len()) })
}

impl Vcpu for KvmVcpu {
    fn run<I: VcpuIo>(&mut self, io: &I, stop: &StopToken) -> Halt {
        debug_assert!(self.fd.as_raw_fd() >= 0);
        self.remote.enter();
        let halt = self.run_loop(io, stop);
        self.remote.leave();
        halt
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.remote.clone()))
    }
    fn state(&mut self) -> Result<State, AccelError> {
        registers::save(&self.fd)
    }
    fn set_state(&mut self, state: &State) -> Result<(), AccelError> {
        registers::restore(&self.fd, state)
    }
    fn instructions(&self) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::mmio_parts;

    #[test]
    fn memory_accesses_are_cut_into_sizes_that_devices_know() {
        for (length, expected) in [
            (1, vec![(0x10, 0..1)]),
            (3, vec![(0x10, 0..2), (0x12, 2..3)]),
            (7, vec![(0x10, 0..4), (0x14, 4..6), (0x16, 6..7)]),
            (8, vec![(0x10, 0..8)]),
        ] {
            assert_eq!(mmio_parts(0x10, length).collect::<Vec<_>>(), expected);
        }
    }
}
