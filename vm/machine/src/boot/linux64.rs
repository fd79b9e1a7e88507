//! The 64-bit boot protocol of a bzImage: long mode with identity-mapped memory, RSI points to the boot parameters.
//! "BP" is the kernel's Documentation/arch/x86/boot.rst, "ZP" its zero-page.rst.

use x86::{State, Table, gpr};

use super::bzimage::{BzImage, HEADER};
use super::{BootError, BootSource, CMDLINE, Target, after_firmware, flat};
use crate::layout::HIGH_LOAD;

const GDT: u64 = 0x500;
const BOOT_PARAMS: u64 = 0x7000;
const BOOT_PARAMS_BYTES: usize = 4096;
const PAGE_TABLES: u64 = 0x9000;
/// 2 MiB pages below 4 GiB.
const LARGE_PAGES: u64 = 2048;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
/// Protection, extension type, write protection off, paging.
const CR0: u64 = 0x8000_0011;
const CR4_PAE: u64 = 1 << 5;
/// Long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// A loader without a number of its own. BP "type_of_loader"
const LOADER: u8 = 0xff;
/// Loaded high, heap usable. BP "loadflags"
const LOAD_FLAGS: u8 = 0x81;

pub(super) fn load(source: &BootSource, image: &BzImage<'_>, target: &Target<'_>) -> Result<State, BootError> {
    let need_bytes = image.init_bytes.max(image.code.len() as u64);
    let end = image.load_address.checked_add(need_bytes);
    let Some(end) = end.filter(|&end| image.load_address >= HIGH_LOAD && end <= target.low_end) else {
        return Err(BootError::NoRoom { what: "the kernel", need_bytes });
    };
    target.write(image.load_address, image.code)?;
    target.write_cmdline(&source.cmdline, image.cmdline_max)?;
    let initrd = match &source.initrd {
        Some(file) => target.place_initrd(file, end, image.initrd_max.saturating_add(1))?,
        None => (0, 0),
    };
    target.write(BOOT_PARAMS, &boot_params(image, target, initrd))?;
    write_page_tables(target)?;
    // BP "64-bit boot protocol": code selector 0x10, data selector 0x18, in a table that is loaded.
    let descriptors = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffffu64];
    let gdt: Vec<u8> = descriptors.iter().flat_map(|d| d.to_le_bytes()).collect();
    target.write(GDT, &gdt)?;
    let mut state = after_firmware();
    state.segments[1] = flat(0x10, 0xb, true);
    state.gdtr = Table { base: GDT, limit: gdt.len() as u16 - 1 };
    state.cr0 = CR0;
    state.cr3 = PAGE_TABLES;
    state.cr4 = CR4_PAE;
    state.efer = EFER;
    state.rip = image.load_address + 0x200;
    state.gpr[gpr::RSI] = BOOT_PARAMS;
    Ok(state)
}

fn boot_params(image: &BzImage<'_>, target: &Target<'_>, initrd: (u64, u64)) -> Vec<u8> {
    let mut params = vec![0u8; BOOT_PARAMS_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = params.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(HEADER, image.header);
    put(0x070, &target.rsdp.to_le_bytes()); // acpi_rsdp_addr
    put(0x210, &[LOADER]);
    put(0x211, &[LOAD_FLAGS]);
    for (low, high, value) in [(0x218, 0x0c0, initrd.0), (0x21c, 0x0c4, initrd.1), (0x228, 0x0c8, CMDLINE)] {
        put(low, &(value as u32).to_le_bytes());
        put(high, &((value >> 32) as u32).to_le_bytes());
    }
    put(0x1e8, &[target.map.len() as u8]); // e820_entries
    for (i, range) in target.map.iter().enumerate() {
        let at = 0x2d0 + 20 * i;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &range.bytes.to_le_bytes());
        put(at + 16, &(range.kind as u32).to_le_bytes());
    }
    params
}

/// Maps the first 4 GiB to themselves in pages of 2 MiB.
fn write_page_tables(target: &Target<'_>) -> Result<(), BootError> {
    let (pdpt, directories) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let mut pml4 = vec![0u8; 4096];
    pml4[..8].copy_from_slice(&(pdpt | PRESENT_WRITABLE).to_le_bytes());
    let mut tables = pml4;
    let pointers: Vec<u8> =
        (0..LARGE_PAGES / 512).flat_map(|i| ((directories + i * 0x1000) | PRESENT_WRITABLE).to_le_bytes()).collect();
    tables.extend(&pointers);
    tables.resize(0x2000, 0);
    tables.extend((0..LARGE_PAGES).flat_map(|i| (i << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes()));
    target.write(PAGE_TABLES, &tables)
}
