//! The engine's state to and from the neutral one.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use guest_ram::GuestRam;
use hv_core::{AccelError, Clock};
use x86::{CpuidTable, State};

use crate::cpu::{Cpu, Fault, Mode, StackKind, attention, cr};
use crate::fpu::{Fpu, at};
use crate::lapic::Lapic;
use crate::mailbox::Mailbox;
use crate::mmu::Tlb;
use crate::msrs::Msrs;

/// The wall clock of a machine whose time is virtual: 2000-01-01, the same in every run.
const VIRTUAL_EPOCH_NS: u64 = 946_684_800_000_000_000;

/// Registers that [`State::msrs`] carries.
const SAVED_MSRS: [u32; 22] = {
    use x86::msr::*;
    [
        TSC_ADJUST,
        SPEC_CTRL,
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        MISC_ENABLE,
        MTRR_PHYS_BASE0,
        MTRR_PHYS_MASK7,
        PAT,
        MTRR_DEF_TYPE,
        MTRR_FIX64K,
        MTRR_FIX16K_80000,
        MTRR_FIX16K_A0000,
        STAR,
        LSTAR,
        CSTAR,
        FMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
        KVM_WALL_CLOCK_NEW,
        KVM_SYSTEM_TIME_NEW,
        TSC_DEADLINE,
    ]
};

impl Cpu {
    pub fn new(id: u32, ram: GuestRam, cpuid: Arc<CpuidTable>, clock: Clock, mailbox: Arc<Mailbox>) -> Cpu {
        let wall = if clock.is_virtual() {
            VIRTUAL_EPOCH_NS
        } else {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
            now.saturating_sub(clock.now().0)
        };
        let mut cpu = Cpu {
            gpr: [0; 32],
            flags: 0,
            rflags: 0,
            rip: 0,
            cpl: 0,
            mode: Mode::default(),
            stack: StackKind::Segmented,
            seg_base: [0; 8],
            seg: Default::default(),
            ldtr: Default::default(),
            tr: Default::default(),
            gdtr: Default::default(),
            idtr: Default::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            dr: [0; 6],
            pdpte: [0; 4],
            tlb: Tlb::new(),
            fault: Fault::default(),
            faults_delivered: 0,
            interrupts: 0,
            attention: 0,
            halted: false,
            nmi_blocked: false,
            icount: 0,
            clock_skew: 0,
            look_at_clock: 0,
            fpu: Fpu::new(),
            msrs: Msrs::new(wall),
            lapic: Lapic::new(id),
            cpuid,
            ram,
            clock,
            code_map: Default::default(),
            mailbox,
            cannot: String::new(),
            random: 0,
        };
        cpu.take(&State::power_on());
        cpu
    }

    /// The whole state, at an instruction boundary.
    pub fn save(&mut self) -> State {
        self.lapic.merge(self.mailbox.take_requests());
        let now_ns = self.now_ns();
        let msrs = SAVED_MSRS.iter().filter_map(|&m| self.read_msr(m).map(|v| (m, v))).collect();
        State {
            gpr: std::array::from_fn(|i| self.gpr[i]),
            rip: self.rip,
            rflags: self.full_rflags(),
            segments: self.seg,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.lapic.cr8(),
            xcr0: self.xcr0,
            efer: self.efer,
            dr: self.dr,
            xsave: {
                let mut image = self.fpu.image.to_vec();
                image[at::HEADER] = (self.xcr0 & 7) as u8;
                image
            },
            msrs,
            tsc: self.tsc(),
            lapic: self.lapic.save(now_ns),
            apic_base: self.lapic.base,
            halted: self.halted,
            interrupt_shadow: self.attention & attention::SHADOW != 0,
            nmi_blocked: self.nmi_blocked,
            nmi_pending: self.mailbox.nmi_pending(),
        }
    }

    /// Replaces the whole state. After an error the old state stands.
    pub fn restore(&mut self, state: &State) -> Result<(), AccelError> {
        let refuse = |what: &str| Err(AccelError::State { engine: "soft", what: what.to_owned() });
        if state.xsave.len() < at::END {
            return refuse("its XSAVE area is shorter than 832 bytes");
        }
        if state.cr4 & (1 << 12 | cr::PCIDE) != 0 {
            return refuse("five-level paging or process-context identifiers are on");
        }
        if state.dr[5] & 0xff != 0 {
            return refuse("hardware breakpoints are set");
        }
        if !state.lapic.is_empty() && state.lapic.len() != 1024 {
            return refuse("its local APIC area is not 1024 bytes");
        }
        self.take(state);
        Ok(())
    }

    fn take(&mut self, s: &State) {
        self.gpr = [0; 32];
        self.gpr[..16].copy_from_slice(&s.gpr);
        self.rip = s.rip;
        (self.seg, self.ldtr, self.tr, self.gdtr, self.idtr) = (s.segments, s.ldtr, s.tr, s.gdtr, s.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
        (self.xcr0, self.efer, self.dr) = (s.xcr0, s.efer, s.dr);
        self.fpu.image.copy_from_slice(&s.xsave[..at::END]);
        let mxcsr = self.fpu.mxcsr() & crate::fpu::MXCSR_MASK;
        self.fpu.set_mxcsr(mxcsr);
        self.msrs.tsc_offset = s.tsc.wrapping_sub(self.now_ns());
        self.lapic.base = s.apic_base;
        if s.lapic.is_empty() {
            self.lapic.reset(s.apic_base);
        } else {
            let now_ns = self.now_ns();
            self.lapic.restore(&s.lapic, now_ns);
        }
        self.lapic.set_cr8(s.cr8);
        for &(register, value) in &s.msrs {
            self.restore_msr(register, value);
        }
        self.halted = s.halted;
        self.nmi_blocked = s.nmi_blocked;
        if s.nmi_pending {
            self.mailbox.post_nmi();
        }
        self.attention = if s.interrupt_shadow { attention::SHADOW } else { 0 };
        self.cpl = if self.cr0 & cr::PE == 0 { 0 } else { self.seg[crate::cpu::SS].dpl() };
        self.tlb.flush_all();
        if self.cr0 & cr::PG != 0 && self.cr4 & cr::PAE != 0 && !self.long_mode() {
            self.load_pdptes(self.cr3);
        }
        self.set_full_rflags(s.rflags);
        self.update_mode();
        self.look_at_clock = 0;
    }
}
