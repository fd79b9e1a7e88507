//! Model-specific registers, kvmclock's among them. SDM 4; KVM's paravirtual interface.

use guest_ram::Gpa;
use x86::msr;

use crate::cpu::{Cpu, FS, Flow, GS, Io, cr};
use crate::segment::canonical;

/// Registers with no other home.
pub(crate) struct Msrs {
    /// Added to guest time to give the TSC.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub tsc_aux: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pat: u64,
    misc_enable: u64,
    spec_ctrl: u64,
    mtrr_fixed: [u64; 11],
    mtrr_variable: [u64; 16],
    mtrr_default: u64,
    kvm_system_time: u64,
    kvm_wall_clock: u64,
    /// Unix time, in nanoseconds, when guest time was 0.
    pub wall_at_zero_ns: u64,
}

impl Msrs {
    pub fn new(wall_at_zero_ns: u64) -> Msrs {
        Msrs {
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            spec_ctrl: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mtrr_default: 0,
            kvm_system_time: 0,
            kvm_wall_clock: 0,
            wall_at_zero_ns,
        }
    }
}

/// Index into the fixed-range MTRRs.
fn fixed_mtrr(register: u32) -> Option<usize> {
    match register {
        msr::MTRR_FIX64K => Some(0),
        msr::MTRR_FIX16K_80000 => Some(1),
        msr::MTRR_FIX16K_A0000 => Some(2),
        msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000 => Some(3 + (register - msr::MTRR_FIX4K_C0000) as usize),
        _ => None,
    }
}

/// Every byte of a PAT or fixed MTRR is a memory type that exists.
fn memory_types(value: u64, uncached_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4 | 5 | 6) || uncached_minus && t == 7)
}

impl Cpu {
    /// RDMSR; `None` raises #GP(0).
    pub fn read_msr(&mut self, register: u32) -> Option<u64> {
        let m = &self.msrs;
        Some(match register {
            msr::TSC => self.tsc(),
            msr::APIC_BASE => self.lapic.base,
            msr::TSC_ADJUST => m.tsc_adjust,
            msr::SPEC_CTRL => m.spec_ctrl,
            // No microcode revision: a hypervisor's guests do not load any.
            msr::BIOS_SIGN_ID | 0x17 | msr::MCG_CAP | msr::MCG_STATUS | msr::XSS => 0,
            msr::MTRR_CAP => 0x508,
            msr::ARCH_CAPABILITIES => x86::cpuid::ARCH_CAPABILITIES,
            msr::SYSENTER_CS => m.sysenter_cs,
            msr::SYSENTER_ESP => m.sysenter_esp,
            msr::SYSENTER_EIP => m.sysenter_eip,
            msr::MISC_ENABLE => m.misc_enable,
            msr::MTRR_PHYS_BASE0..=msr::MTRR_PHYS_MASK7 => m.mtrr_variable[(register - msr::MTRR_PHYS_BASE0) as usize],
            msr::PAT => m.pat,
            msr::MTRR_DEF_TYPE => m.mtrr_default,
            msr::TSC_DEADLINE => self.lapic.tsc_deadline,
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.lapic.x2apic() => {
                return self.x2apic_read(register - msr::X2APIC_FIRST);
            }
            msr::EFER => self.efer,
            msr::STAR => m.star,
            msr::LSTAR => m.lstar,
            msr::CSTAR => m.cstar,
            msr::FMASK => m.fmask,
            msr::FS_BASE => self.seg[FS].base,
            msr::GS_BASE => self.seg[GS].base,
            msr::KERNEL_GS_BASE => m.kernel_gs_base,
            msr::TSC_AUX => m.tsc_aux,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => m.kvm_wall_clock,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => m.kvm_system_time,
            _ => return fixed_mtrr(register).map(|i| m.mtrr_fixed[i]),
        })
    }

    /// WRMSR.
    pub fn write_msr(&mut self, io: Io<'_>, register: u32, value: u64) -> Flow {
        let now_ns = self.now_ns();
        let address = canonical(value);
        match register {
            msr::TSC => {
                let offset = value.wrapping_sub(now_ns);
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(offset.wrapping_sub(self.msrs.tsc_offset));
                self.msrs.tsc_offset = offset;
            }
            msr::TSC_ADJUST => {
                let change = value.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(change);
                self.msrs.tsc_adjust = value;
            }
            msr::APIC_BASE => return self.set_apic_base(value),
            msr::SPEC_CTRL if value & !7 == 0 => self.msrs.spec_ctrl = value,
            msr::PRED_CMD if value & !1 == 0 => {}
            // Loading microcode does nothing, as under any hypervisor.
            msr::BIOS_SIGN_ID | 0x79 | msr::MCG_STATUS => {}
            msr::XSS if value == 0 => {}
            msr::SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            msr::SYSENTER_ESP if address => self.msrs.sysenter_esp = value,
            msr::SYSENTER_EIP if address => self.msrs.sysenter_eip = value,
            msr::MISC_ENABLE => self.msrs.misc_enable = value,
            msr::MTRR_PHYS_BASE0..=msr::MTRR_PHYS_MASK7 => {
                self.msrs.mtrr_variable[(register - msr::MTRR_PHYS_BASE0) as usize] = value;
            }
            msr::PAT if memory_types(value, true) => self.msrs.pat = value,
            msr::MTRR_DEF_TYPE if value & !0xcff == 0 => self.msrs.mtrr_default = value,
            msr::TSC_DEADLINE => self.set_tsc_deadline(value),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.lapic.x2apic() => {
                return match self.x2apic_write(io, register - msr::X2APIC_FIRST, value) {
                    Some(()) => Ok(()),
                    None => self.gp(0),
                };
            }
            msr::EFER => return self.write_efer(value),
            msr::STAR => self.msrs.star = value,
            msr::LSTAR if address => self.msrs.lstar = value,
            msr::CSTAR if address => self.msrs.cstar = value,
            msr::FMASK => self.msrs.fmask = value & 0xffff_ffff,
            msr::FS_BASE if address => self.set_segment_base(FS, value),
            msr::GS_BASE if address => self.set_segment_base(GS, value),
            msr::KERNEL_GS_BASE if address => self.msrs.kernel_gs_base = value,
            msr::TSC_AUX if value >> 32 == 0 => self.msrs.tsc_aux = value,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.msrs.kvm_wall_clock = value;
                self.write_wall_clock(value);
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.msrs.kvm_system_time = value;
                self.write_system_time();
            }
            _ => match fixed_mtrr(register) {
                Some(index) if memory_types(value, false) => self.msrs.mtrr_fixed[index] = value,
                _ => return self.gp(0),
            },
        }
        Ok(())
    }

    /// Takes a register of a saved state; values that WRMSR would refuse are ignored.
    pub fn restore_msr(&mut self, register: u32, value: u64) {
        match register {
            msr::TSC_ADJUST => self.msrs.tsc_adjust = value,
            msr::TSC_DEADLINE => self.set_tsc_deadline(value),
            // The guest has its record already.
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.msrs.kvm_wall_clock = value,
            _ => {
                // No local APIC register is among the saved ones, so nobody is asked anything.
                let _ = self.write_msr(&hv_null_io::NoIo, register, value);
            }
        }
    }

    /// Base of FS or GS, written by MSR or WRFSBASE.
    pub fn set_segment_base(&mut self, seg: usize, base: u64) {
        self.seg[seg].base = base;
        self.seg_base[seg] = base;
    }

    fn write_efer(&mut self, value: u64) -> Flow {
        let known = cr::SCE | cr::LME | cr::LMA | cr::NXE;
        let toggles_lme = (value ^ self.efer) & cr::LME != 0 && self.cr0 & cr::PG != 0;
        if value & !known != 0 || toggles_lme {
            return self.gp(0);
        }
        let old = self.efer;
        self.efer = value & !cr::LMA | self.efer & cr::LMA;
        if (old ^ self.efer) & cr::NXE != 0 {
            self.tlb.flush_all();
        }
        Ok(())
    }

    /// The pvclock page: with a TSC that ticks in nanoseconds, scale 1, it never needs another update.
    pub fn write_system_time(&mut self) {
        let address = self.msrs.kvm_system_time;
        if address & 1 == 0 {
            return;
        }
        let now_ns = self.now_ns();
        let mut page = [0u8; 32];
        page[0..4].copy_from_slice(&2u32.to_le_bytes());
        page[8..16].copy_from_slice(&now_ns.wrapping_add(self.msrs.tsc_offset).to_le_bytes());
        page[16..24].copy_from_slice(&now_ns.to_le_bytes());
        page[24..28].copy_from_slice(&0x8000_0000u32.to_le_bytes());
        page[28] = 1; // the multiplier is a fraction of 2^32: 1/2, shifted left by one
        page[29] = 1; // stable
        // A wrong address is the guest's loss: KVM too ignores it.
        let _ = self.ram.write(Gpa(address & !1), &page);
    }

    fn write_wall_clock(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        let ns = self.msrs.wall_at_zero_ns;
        let mut record = [0u8; 12];
        record[0..4].copy_from_slice(&2u32.to_le_bytes());
        record[4..8].copy_from_slice(&((ns / 1_000_000_000) as u32).to_le_bytes());
        record[8..12].copy_from_slice(&((ns % 1_000_000_000) as u32).to_le_bytes());
        let _ = self.ram.write(Gpa(address), &record);
    }
}

/// A machine that answers nothing, for register writes that reach no device.
mod hv_null_io {
    use hv_core::{Gpa, GuestNs, VcpuIo};

    pub(super) struct NoIo;
    impl VcpuIo for NoIo {
        fn port_read(&self, _: u16, _: u8) -> u32 {
            u32::MAX
        }
        fn port_write(&self, _: u16, _: u8, _: u32) {}
        fn mmio_read(&self, _: Gpa, _: u8) -> u64 {
            u64::MAX
        }
        fn mmio_write(&self, _: Gpa, _: u8, _: u64) {}
        fn pic_ack(&self) -> Option<u8> {
            None
        }
        fn eoi(&self, _: u8) {}
        fn run_due(&self, _: GuestNs) -> Option<GuestNs> {
            None
        }
    }
}
