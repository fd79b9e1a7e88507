//! Guests of a few instructions, for measuring everything around a guest.

/// A PVH kernel of one instruction that matters: ACPI power-off.
pub fn power_off_kernel() -> Vec<u8> {
    // mov dx, 0x604; mov ax, 0x3c00 (SLP_EN, type 7); out dx, ax; hlt; jmp -3
    pvh_kernel(&[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x3c, 0x66, 0xef, 0xf4, 0xeb, 0xfd])
}

/// A PVH kernel that stands still until its machine ends.
pub fn standing_kernel() -> Vec<u8> {
    // cli; hlt; jmp -3
    pvh_kernel(&[0xfa, 0xf4, 0xeb, 0xfd])
}

/// `code` for 32-bit protected mode as an ELF file with the PVH entry note.
fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    let (header, program) = (64u64, 56u64);
    let note_at = header + 2 * program;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    let code_at = note_at + 20;
    note.extend_from_slice(&(LOAD + code_at as u32).to_le_bytes());
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend_from_slice(&2u16.to_le_bytes());
    elf.extend_from_slice(&62u16.to_le_bytes());
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [LOAD as u64 + code_at, header, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let bytes = code_at + code.len() as u64;
    for (kind, flags, offset, length) in [(1u32, 5u32, 0u64, bytes), (4, 4, note_at, 20)] {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&flags.to_le_bytes());
        for word in [offset, LOAD as u64 + offset, LOAD as u64 + offset, length, length, 4] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    }
    elf.extend_from_slice(&note);
    elf.extend_from_slice(code);
    elf
}

/// A firmware image whose reset vector writes to QEMU's debug-exit port.
pub fn exit_rom() -> Vec<u8> {
    let mut rom = vec![0xf4; 65536];
    // mov al, 0; out 0xf4, al
    rom[0xfff0..0xfff4].copy_from_slice(&[0xb0, 0x00, 0xe6, 0xf4]);
    rom
}
