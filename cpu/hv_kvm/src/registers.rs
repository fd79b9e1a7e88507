//! The neutral CPU state to and from KVM's structures.

use hv_core::AccelError;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use x86::{Segment, State, Table, msr};

use crate::host;

/// Registers that [`State::msrs`] carries; TSC_DEADLINE last, since it arms a timer that the others configure.
const SAVED_MSRS: [u32; 18] = [
    msr::TSC_ADJUST,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::MISC_ENABLE,
    msr::MTRR_PHYS_BASE0,
    msr::MTRR_PHYS_MASK7,
    msr::PAT,
    msr::MTRR_DEF_TYPE,
    msr::MTRR_FIX64K,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::KERNEL_GS_BASE,
    msr::KVM_WALL_CLOCK_NEW,
    msr::KVM_SYSTEM_TIME_NEW,
    msr::TSC_DEADLINE,
];

fn segment(s: &kvm_segment) -> Segment {
    let attributes = s.type_ as u32
        | (s.s as u32) << 4
        | (s.dpl as u32) << 5
        | (s.present as u32) << 7
        | (s.avl as u32) << 12
        | (s.l as u32) << 13
        | (s.db as u32) << 14
        | (s.g as u32) << 15
        | if s.unusable != 0 { Segment::UNUSABLE } else { 0 };
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attributes >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: bit(7),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: !s.usable() as u8,
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> Table {
    Table { base: t.base, limit: t.limit }
}
fn kvm_table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

/// The XSAVE area as bytes.
fn xsave_bytes(area: &kvm_xsave) -> Vec<u8> {
    area.region.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn save(fd: &VcpuFd) -> Result<State, AccelError> {
    let r = fd.get_regs().map_err(host("KVM_GET_REGS"))?;
    let s = fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    let d = fd.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?;
    let xcrs = fd.get_xcrs().map_err(host("KVM_GET_XCRS"))?;
    let xsave = fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?;
    let lapic = fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?;
    let mp = fd.get_mp_state().map_err(host("KVM_GET_MP_STATE"))?;
    let events = fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
    let read = |registers: &[u32]| -> Result<Vec<(u32, u64)>, AccelError> {
        let entries: Vec<_> = registers.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| AccelError::State { engine: "kvm", what: "the list of MSRs".into() })?;
        let read = fd.get_msrs(&mut msrs).map_err(host("KVM_GET_MSRS"))?;
        Ok(msrs.as_slice()[..read].iter().map(|e| (e.index, e.data)).collect())
    };
    // One at a time: the kernel stops at the first register that this host does not have.
    let mut msrs = Vec::new();
    for register in SAVED_MSRS {
        msrs.extend(read(&[register])?);
    }
    let tsc = read(&[msr::TSC])?.first().map_or(0, |&(_, value)| value);
    Ok(State {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
        segments: [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment),
        ldtr: segment(&s.ldt),
        tr: segment(&s.tr),
        gdtr: table(&s.gdt),
        idtr: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        xcr0: xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value),
        efer: s.efer,
        dr: [d.db[0], d.db[1], d.db[2], d.db[3], d.dr6, d.dr7],
        xsave: xsave_bytes(&xsave),
        msrs,
        tsc,
        lapic: put_back(lapic.regs.map(|b| b as u8).to_vec(), &events),
        apic_base: s.apic_base,
        halted: mp.mp_state == KVM_MP_STATE_HALTED,
        interrupt_shadow: events.interrupt.shadow != 0,
        // One that the kernel was about to deliver has not been: it waits, and blocks nothing yet.
        nmi_blocked: events.nmi.masked != 0 && events.nmi.injected == 0,
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
    })
}

/// The local APIC as it is when an interrupt that the kernel was about to deliver is requested again.
fn put_back(mut registers: Vec<u8>, events: &kvm_vcpu_events) -> Vec<u8> {
    let vector = events.interrupt.nr as usize;
    let (isr, irr) = (0x100 + vector / 32 * 16 + vector / 8 % 4, 0x200 + vector / 32 * 16 + vector / 8 % 4);
    let bit = 1 << (vector % 8);
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 && registers[isr] & bit != 0 {
        registers[isr] &= !bit;
        registers[irr] |= bit;
    }
    registers
}

pub(crate) fn restore(fd: &VcpuFd, state: &State) -> Result<(), AccelError> {
    let mut s = fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(kvm_segment_of);
    (s.es, s.cs, s.ss, s.ds, s.fs, s.gs) = (es, cs, ss, ds, fs, gs);
    (s.ldt, s.tr) = (kvm_segment_of(&state.ldtr), kvm_segment_of(&state.tr));
    (s.gdt, s.idt) = (kvm_table(&state.gdtr), kvm_table(&state.idtr));
    (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8) = (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8);
    (s.efer, s.apic_base) = (state.efer, state.apic_base);
    s.interrupt_bitmap = [0; 4];
    fd.set_sregs(&s).map_err(host("KVM_SET_SREGS"))?;
    let g = &state.gpr;
    let regs = kvm_regs {
        rax: g[0],
        rcx: g[1],
        rdx: g[2],
        rbx: g[3],
        rsp: g[4],
        rbp: g[5],
        rsi: g[6],
        rdi: g[7],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: state.rip,
        rflags: state.rflags,
    };
    fd.set_regs(&regs).map_err(host("KVM_SET_REGS"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = state.xcr0;
    fd.set_xcrs(&xcrs).map_err(host("KVM_SET_XCRS"))?;
    restore_xsave(fd, state)?;
    let [a, b, c, d, dr6, dr7] = state.dr;
    fd.set_debug_regs(&kvm_debugregs { db: [a, b, c, d], dr6, dr7, ..Default::default() })
        .map_err(host("KVM_SET_DEBUGREGS"))?;
    if state.lapic.len() == 1024 {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs.iter_mut().zip(&state.lapic).for_each(|(to, &from)| *to = from as _);
        fd.set_lapic(&lapic).map_err(host("KVM_SET_LAPIC"))?;
    }
    restore_msrs(fd, state)?;
    let mp_state = if state.halted { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(host("KVM_SET_MP_STATE"))?;
    let mut events = fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
    events.interrupt.shadow = state.interrupt_shadow as u8;
    events.nmi.masked = state.nmi_blocked as u8;
    events.flags = kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW | kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
    (events.exception.injected, events.interrupt.injected, events.nmi.injected) = (0, 0, 0);
    events.nmi.pending = state.nmi_pending as u8;
    fd.set_vcpu_events(&events).map_err(host("KVM_SET_VCPU_EVENTS"))
}

fn restore_xsave(fd: &VcpuFd, state: &State) -> Result<(), AccelError> {
    let mut area = kvm_xsave::default();
    if state.xsave.len() > size_of_val(&area.region) {
        return Err(AccelError::State { engine: "kvm", what: format!("{} bytes of XSAVE area", state.xsave.len()) });
    }
    for (to, from) in area.region.iter_mut().zip(state.xsave.chunks(4)) {
        let mut word = [0; 4];
        word[..from.len()].copy_from_slice(from);
        *to = u32::from_le_bytes(word);
    }
    // SAFETY: the structure is complete; no feature that needs a larger area was asked for.
    unsafe { fd.set_xsave(&area) }.map_err(host("KVM_SET_XSAVE"))
}

fn restore_msrs(fd: &VcpuFd, state: &State) -> Result<(), AccelError> {
    let tsc = (msr::TSC, state.tsc);
    for (index, data) in std::iter::once(tsc).chain(state.msrs.iter().copied()) {
        let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
            .map_err(|_| AccelError::State { engine: "kvm", what: "an MSR".into() })?;
        let written = fd.set_msrs(&msrs).map_err(host("KVM_SET_MSRS"))?;
        if written != 1 && data != 0 {
            return Err(AccelError::State { engine: "kvm", what: format!("MSR {index:#x} = {data:#x}") });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_on_its_way_is_requested_again() {
        let mut events = kvm_vcpu_events::default();
        (events.interrupt.injected, events.interrupt.nr) = (1, 0x61);
        let mut registers = vec![0; 1024];
        registers[0x130] = 2; // ISR, vectors 96 to 103
        let back = put_back(registers, &events);
        assert_eq!((back[0x130], back[0x230]), (0, 2));
        // The 8259's are in no register.
        assert_eq!(put_back(vec![0; 1024], &events), vec![0; 1024]);
    }

    #[test]
    fn segments_survive_the_way_through_kvm() {
        for s in State::power_on().segments {
            assert_eq!(segment(&kvm_segment_of(&s)), s);
        }
        let null = Segment { selector: 0, base: 0, limit: 0, attributes: Segment::UNUSABLE };
        assert_eq!(segment(&kvm_segment_of(&null)), null);
    }
}
