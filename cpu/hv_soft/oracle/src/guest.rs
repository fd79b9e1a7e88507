//! The software CPU with the same memory: long mode and its compatibility modes, ring 3.

use guest_ram::{Gpa, GuestRam};
use hv_core::{Accel, Clock, GuestNs, Topology, Vcpu, VcpuIo};
use hv_soft::{SoftAccel, SoftVcpu, Stepped, UserRegisters};
use x86::{Segment, State};

use crate::layout::{CODE, DATA, DATA_BYTES, FS_BASE, GS_BASE, Mode, RO_BYTES, SHARED_BYTES, UserSegment};

/// Guest-physical address of the shared bytes; page tables lie below.
const MEMORY: u64 = 0x10_0000;

struct NoIo;
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

/// A guest at ring 3.
pub struct Guest {
    ram: GuestRam,
    vcpu: SoftVcpu,
}

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const NX: u64 = 1 << 63;

impl Guest {
    /// Builds it for code of `mode`, memory zeroed.
    pub fn new(mode: Mode) -> Result<Guest, Box<dyn std::error::Error>> {
        let ram = GuestRam::new(&[(Gpa(0), MEMORY + SHARED_BYTES as u64)])?;
        let accel = SoftAccel::new(Default::default());
        let parts = accel.build(ram.clone(), &Topology { vcpus: 1 }, &accel.cpuid(), Clock::virtual_clock())?;
        let mut vcpu = parts.vcpus.into_iter().next().ok_or("no vCPU")?;
        let mut tables = Tables { ram: &ram, next: 0x2000 };
        tables.map(CODE, MEMORY, 1, US)?;
        tables.map(DATA, MEMORY + 4096, DATA_BYTES / 4096, RW | US | NX)?;
        tables.map(DATA + DATA_BYTES as u64, MEMORY + 4096 + DATA_BYTES as u64, RO_BYTES / 4096, US | NX)?;
        vcpu.set_state(&user_state(mode))?;
        Ok(Guest { ram, vcpu })
    }

    /// The features that this guest is offered.
    pub fn offered(&self) -> std::collections::HashSet<iced_x86::CpuidFeature> {
        self.vcpu.offered_features().clone()
    }

    /// Replaces all shared memory.
    pub fn set_memory(&mut self, bytes: &[u8]) {
        // The size is the layout's, so it fits.
        let _ = self.ram.write(Gpa(MEMORY), bytes);
    }
    /// Reads all shared memory.
    pub fn memory(&self, into: &mut [u8]) {
        let _ = self.ram.read(Gpa(MEMORY), into);
    }

    /// Executes the instruction at `registers.rip`.
    pub fn step(&mut self, registers: &mut UserRegisters) -> (Stepped, u64) {
        self.vcpu.set_user_registers(registers);
        let stepped = self.vcpu.step(&NoIo);
        *registers = self.vcpu.user_registers();
        (stepped, self.vcpu.cr2())
    }
}

struct Tables<'a> {
    ram: &'a GuestRam,
    next: u64,
}
impl Tables<'_> {
    fn map(&mut self, va: u64, gpa: u64, pages: usize, rights: u64) -> Result<(), guest_ram::RamError> {
        for i in 0..pages as u64 {
            let va = va + i * 4096;
            let mut table = 0x1000;
            for shift in [39, 30, 21] {
                let at = table + (va >> shift & 511) * 8;
                let mut entry = [0; 8];
                self.ram.read(Gpa(at), &mut entry)?;
                let mut entry = u64::from_le_bytes(entry);
                if entry & P == 0 {
                    entry = self.next | P | RW | US;
                    self.next += 4096;
                    self.ram.write(Gpa(at), &entry.to_le_bytes())?;
                }
                table = entry & 0xf_ffff_f000;
            }
            let entry = (gpa + i * 4096) | P | rights;
            self.ram.write(Gpa(table + (va >> 12 & 511) * 8), &entry.to_le_bytes())?;
        }
        Ok(())
    }
}

fn hidden(segment: UserSegment) -> Segment {
    // Present, ring 3, accessed: execute-read code or read-write data, with the default size. SDM 3A 3.4.5.
    let attributes = 0x00f3 | if segment.code { 8 } else { 0 } | if segment.big { 0x4000 } else { 0 };
    Segment { selector: segment.selector, base: segment.base, limit: segment.limit, attributes }
}

/// Ring 3 with vector state enabled.
fn user_state(mode: Mode) -> State {
    let data = hidden(mode.data_segment());
    let far = |selector, base| Segment { selector, base, limit: u32::MAX, attributes: 0xc0f3 };
    let (code, fs, gs) = match mode {
        Mode::Long => {
            let code = Segment { selector: 0x33, base: 0, limit: u32::MAX, attributes: 0xa0fb };
            (code, far(0, FS_BASE), far(0, GS_BASE))
        }
        _ => {
            let [fs, gs] = mode.far_segments().map(hidden);
            (hidden(mode.code_segment()), fs, gs)
        }
    };
    State {
        segments: [data, code, data, data, fs, gs],
        // A task state without an I/O permission map: no port is open.
        tr: Segment { selector: 0x40, base: 0, limit: 0x66, attributes: 0x8b },
        cr0: 0x8005_0033,
        cr3: 0x1000,
        // PAE PGE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE, as Linux has it.
        cr4: 0x0005_0ea0,
        efer: 0xd01,
        xcr0: 7,
        ..State::power_on()
    }
}
