//! What machines in these tests boot, and an engine that shows what devices did to it.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use guest_ram::GuestRam;
use hv_core::{Accel, AccelError, AccelReport, Clock, Topology, VmParts};
use hv_null::{NullAccel, NullVcpu, NullVm};

/// An ELF kernel of one byte with a PVH note.
pub fn kernel() -> File {
    let mut elf = vec![0u8; 176];
    elf[0..6].copy_from_slice(b"\x7fELF\x02\x01");
    for (at, value) in [(18, 62), (32, 64), (54, 56), (56, 2)] {
        elf[at] = value;
    }
    let mut note = Vec::new();
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        note.extend(word.to_le_bytes());
    }
    for (index, kind, offset, bytes) in [(0usize, 1u32, 176u64, 1u64), (1, 4, 177, note.len() as u64)] {
        let at = 64 + 56 * index;
        elf[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, 0x10_0000), (32, bytes), (40, bytes)] {
            elf[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    elf.push(0xf4);
    elf.extend(note);
    let mut file = File::from(rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&elf).unwrap();
    file
}

/// The engine without a CPU, whose machine half the test can look at.
#[derive(Default)]
pub struct Spy(pub Mutex<Option<Arc<NullVm>>>);

impl Spy {
    pub fn vm(&self) -> Arc<NullVm> {
        self.0.lock().unwrap().clone().expect("a machine was built")
    }
}

impl Accel for Spy {
    type Vm = NullVm;
    type Vcpu = NullVcpu;
    fn probe(&self) -> AccelReport {
        NullAccel::idle().probe()
    }
    fn cpuid(&self) -> x86::CpuidTable {
        x86::CpuidTable::default()
    }
    fn build(
        &self,
        ram: GuestRam,
        topology: &Topology,
        cpuid: &x86::CpuidTable,
        clock: Clock,
    ) -> Result<VmParts<NullVm, NullVcpu>, AccelError> {
        let parts = NullAccel::idle().build(ram, topology, cpuid, clock)?;
        *self.0.lock().unwrap() = Some(parts.vm.clone());
        Ok(parts)
    }
}
