//! Files that a user names: disk images and kernels.

use std::fs::File;
use std::io::Write;

use hv_core::Clock;
use hv_null::NullAccel;
use image::qcow2::{Header, L1Entry, L2Entry, check, header_area_bytes, parse_snapshots};
use machine::{BootSource, Entry, Machine, MachineConfig};

/// A whole qcow2 image: header, snapshot table, every table that a check walks.
pub fn qcow2(data: &[u8]) -> bool {
    let _ = header_area_bytes(data);
    let Ok(header) = Header::parse(data) else { return false };
    if let Ok(area) = header.serialise() {
        assert_eq!(Header::parse(&area).ok().as_ref(), Some(&header));
    }
    let _ = parse_snapshots(&header, data);
    for raw in data.chunks_exact(8).take(512) {
        let raw = u64::from_be_bytes(raw.try_into().unwrap_or_default());
        let _ = L1Entry::decode(raw, &header.geometry);
        let _ = L2Entry::decode(raw, &header.geometry);
    }
    // Tables of many MiB that lie past the end of a small file cost time and find nothing.
    if header.l1_entries <= 1 << 12 && header.reftable_clusters <= 16 {
        let mut reads = 0u32;
        let mut read = |at: u64, out: &mut [u8]| {
            reads += 1;
            if reads > 4096 {
                return Err("enough");
            }
            out.fill(0);
            let from = data.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
            out.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
            Ok(())
        };
        let _ = check::check(&header, data.len() as u64, &mut read);
    }
    true
}

/// A kernel image, loaded into a machine without a CPU.
pub fn kernel(data: &[u8]) -> bool {
    let Ok(fd) = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC) else { return false };
    let mut kernel = File::from(fd);
    if kernel.write_all(data).is_err() {
        return false;
    }
    let config = MachineConfig {
        ram_bytes: 32 << 20,
        vcpus: 1,
        clock: Clock::virtual_clock(),
        unix_s: 0,
        serial: std::array::from_fn(|_| Some(Box::new(chipset::serial::NoSink) as Box<_>)),
        debug_console: None,
        devices: Vec::new(),
        boot: BootSource { kernel, initrd: None, cmdline: "quiet".into(), entry: Entry::Fastest },
    };
    Machine::build(&NullAccel::idle(), config).is_ok_and(|(mut machine, _)| machine.reset().is_ok())
}
