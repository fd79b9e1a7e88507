//! Reads and writes of many bytes at a linear address, for state images and wide operands.

use guest_ram::PAGE_BYTES;

use crate::cpu::{Cpu, Flow, Io, Stop};

impl Cpu {
    /// Reads `buf.len()` bytes at `va`. A fault leaves `buf` partly filled and the guest unchanged.
    pub fn read_block(&mut self, io: Io<'_>, va: u64, buf: &mut [u8]) -> Result<(), Stop> {
        let mut at = va;
        let mut rest = buf;
        while !rest.is_empty() {
            let step = step(at, rest.len());
            let value = match step {
                8 => self.load::<u64>(io, at)?,
                4 => self.load::<u32>(io, at)? as u64,
                2 => self.load::<u16>(io, at)? as u64,
                _ => self.load::<u8>(io, at)? as u64,
            };
            let (head, tail) = rest.split_at_mut(step);
            head.copy_from_slice(&value.to_le_bytes()[..step]);
            rest = tail;
            at = at.wrapping_add(step as u64);
        }
        Ok(())
    }

    /// Writes `bytes` at `va` after checking that all of it may be written. The caller ends with [`Cpu::settle`].
    pub fn write_block(&mut self, io: Io<'_>, va: u64, bytes: &[u8]) -> Flow {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut page = va;
        let last = va.wrapping_add(bytes.len() as u64 - 1);
        self.probe_write(va, 1)?;
        while (page ^ last) & !(PAGE_BYTES - 1) != 0 {
            page = (page | (PAGE_BYTES - 1)).wrapping_add(1);
            self.probe_write(page, 1)?;
        }
        let mut at = va;
        let mut rest = bytes;
        while !rest.is_empty() {
            let step = step(at, rest.len());
            let mut word = [0u8; 8];
            let (head, tail) = rest.split_at(step);
            word[..step].copy_from_slice(head);
            let value = u64::from_le_bytes(word);
            match step {
                8 => self.store_then(io, at, value)?,
                4 => self.store_then(io, at, value as u32)?,
                2 => self.store_then(io, at, value as u16)?,
                _ => self.store_then(io, at, value as u8)?,
            }
            rest = tail;
            at = at.wrapping_add(step as u64);
        }
        Ok(())
    }
}

/// The widest power-of-two step that fits `left` and does not cross a page.
fn step(at: u64, left: usize) -> usize {
    let room = (PAGE_BYTES - (at & (PAGE_BYTES - 1))) as usize;
    match left.min(room) {
        8.. => 8,
        4..8 => 4,
        2..4 => 2,
        _ => 1,
    }
}
