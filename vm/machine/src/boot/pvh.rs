//! The PVH entry: 32-bit protected mode, paging off, EBX points to the start info. xen/include/public/arch-x86/hvm/start_info.h

use x86::State;

use super::elf::Elf;
use super::{BootError, BootSource, CMDLINE, CMDLINE_BYTES, Target, after_firmware};
use crate::layout::HIGH_LOAD;

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;
const MAGIC: u32 = 0x336e_c578;
/// CR0 with protection on; the extension type bit is fixed.
const CR0: u64 = 0x11;

pub(super) fn load(source: &BootSource, elf: &Elf<'_>, target: &Target<'_>) -> Result<State, BootError> {
    let entry = elf.pvh_entry.ok_or(BootError::NoPvhEntry)?;
    let mut end = 0;
    for segment in &elf.segments {
        let need_bytes = segment.memory_bytes;
        let segment_end = segment.address.checked_add(need_bytes);
        match segment_end.filter(|&e| segment.address >= HIGH_LOAD && e <= target.low_end) {
            Some(segment_end) => end = segment_end.max(end),
            None => return Err(BootError::NoRoom { what: "the kernel", need_bytes }),
        }
        target.write(segment.address, segment.data)?;
        let loaded = segment.data.len() as u64;
        target.clear(segment.address + loaded, need_bytes - loaded)?;
    }
    target.write_cmdline(&source.cmdline, CMDLINE_BYTES - 1)?;
    let initrd = match &source.initrd {
        Some(file) => Some(target.place_initrd(file, end, u64::MAX)?),
        None => None,
    };
    write_start_info(target, initrd)?;
    let mut state = after_firmware();
    state.cr0 = CR0;
    state.rip = entry;
    state.gpr[x86::gpr::RBX] = START_INFO;
    Ok(state)
}

fn write_start_info(target: &Target<'_>, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let mut info = Vec::new();
    for word in [MAGIC, 1, 0, initrd.is_some().into()] {
        info.extend(word.to_le_bytes());
    }
    for address in [MODULES, CMDLINE, target.rsdp, MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((target.map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    target.write(START_INFO, &info)?;
    if let Some((start, bytes)) = initrd {
        let module: Vec<u8> = [start, bytes, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        target.write(MODULES, &module)?;
    }
    let mut map = Vec::new();
    for range in target.map {
        map.extend(range.start.to_le_bytes());
        map.extend(range.bytes.to_le_bytes());
        map.extend((range.kind as u32).to_le_bytes());
        map.extend(0u32.to_le_bytes());
    }
    target.write(MEMORY_MAP, &map)
}
