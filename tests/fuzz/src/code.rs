//! Bytes as instructions of a guest, in every code size.

use std::cell::RefCell;

use hv_soft::{Stepped, UserRegisters};
use oracle::guest::Guest;
use oracle::layout::{Mode, SHARED_BYTES};

/// Instructions of one input.
const STEPS: usize = 64;

thread_local! {
    /// Building page tables for every input would be most of the work.
    static GUESTS: RefCell<Vec<(Mode, Guest)>> = const { RefCell::new(Vec::new()) };
}

/// Executes the bytes. The first decides the mode; the rest is code, then registers.
pub fn code(data: &[u8]) -> bool {
    GUESTS.with_borrow_mut(|guests| {
        if guests.is_empty() {
            guests.extend(Mode::ALL.into_iter().filter_map(|mode| Some((mode, Guest::new(mode).ok()?))));
        }
        let Some((first, rest)) = data.split_first() else { return false };
        let count = guests.len().max(1);
        guests.get_mut(*first as usize % count).is_some_and(|(mode, guest)| execute(*mode, guest, rest))
    })
}

fn execute(mode: Mode, guest: &mut Guest, bytes: &[u8]) -> bool {
    let mut memory = vec![0x90; SHARED_BYTES];
    memory.iter_mut().zip(bytes.iter().take(4096)).for_each(|(to, byte)| *to = *byte);
    guest.set_memory(&memory);
    let mut tail = bytes.rchunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()));
    let mut xsave = [0; 832];
    xsave[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    xsave[512] = 7;
    let mut gpr = std::array::from_fn(|_| tail.next().unwrap_or(oracle::layout::DATA) & mode.register_mask());
    gpr[4] = (oracle::layout::DATA + 0x2000).wrapping_sub(mode.data_base());
    let mut registers = UserRegisters { gpr, rip: mode.code(), rflags: 2, xsave };
    // Any outcome is right but a panic; after an exception there is nothing that would handle it.
    (0..STEPS).take_while(|_| guest.step(&mut registers).0 == Stepped::Done).count() > 0
}
