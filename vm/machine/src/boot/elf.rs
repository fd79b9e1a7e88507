//! ELF64 kernels: loadable segments and the PVH entry note.

use super::BootError;

/// Xen's note of a 32-bit entry point for the PVH boot protocol. xen/include/public/elfnote.h
const NOTE_PHYS32_ENTRY: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MACHINE_X86_64: u16 = 62;

/// A piece of the file and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Bytes from the file.
    pub(super) data: &'a [u8],
    /// Size in memory; what the file does not give is zero.
    pub(super) memory_bytes: u64,
}

/// What of an ELF file is needed to start it.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    pub(super) segments: Vec<Segment<'a>>,
    /// Guest-physical address of the PVH entry.
    pub(super) pvh_entry: Option<u64>,
}

struct Bytes<'a>(&'a [u8]);
impl<'a> Bytes<'a> {
    fn slice(&self, at: u64, bytes: u64) -> Result<&'a [u8], BootError> {
        let (start, len) = (usize::try_from(at), usize::try_from(bytes));
        let range = start.ok().zip(len.ok()).and_then(|(s, l)| Some(s..s.checked_add(l)?));
        range.and_then(|r| self.0.get(r)).ok_or(BootError::Truncated { what: "ELF file" })
    }
    fn u16(&self, at: u64) -> Result<u16, BootError> {
        Ok(self.slice(at, 2)?.try_into().map_or(0, u16::from_le_bytes))
    }
    fn u32(&self, at: u64) -> Result<u32, BootError> {
        Ok(self.slice(at, 4)?.try_into().map_or(0, u32::from_le_bytes))
    }
    fn u64(&self, at: u64) -> Result<u64, BootError> {
        Ok(self.slice(at, 8)?.try_into().map_or(0, u64::from_le_bytes))
    }
}

/// Reads the program headers of `file`. The file is untrusted.
pub(super) fn parse(file: &[u8]) -> Result<Elf<'_>, BootError> {
    let bytes = Bytes(file);
    let identification = bytes.slice(0, 16)?;
    if !identification.starts_with(b"\x7fELF\x02\x01") || bytes.u16(18)? != MACHINE_X86_64 {
        return Err(BootError::NotElf64);
    }
    let (table, entry_bytes, count) = (bytes.u64(32)?, bytes.u16(54)?, bytes.u16(56)?);
    if entry_bytes < 56 {
        return Err(BootError::NotElf64);
    }
    let mut elf = Elf { segments: Vec::new(), pvh_entry: None };
    for i in 0..count {
        let header = u64::from(entry_bytes)
            .checked_mul(i.into())
            .and_then(|offset| offset.checked_add(table))
            .ok_or(BootError::Truncated { what: "ELF file" })?;
        let field = |offset: u64| bytes.u64(header.saturating_add(offset));
        let kind = bytes.u32(header)?;
        let (offset, address, file_bytes, memory_bytes) = (field(8)?, field(24)?, field(32)?, field(40)?);
        match kind {
            PT_LOAD if memory_bytes != 0 => {
                let data = bytes.slice(offset, file_bytes.min(memory_bytes))?;
                elf.segments.push(Segment { address, data, memory_bytes });
            }
            PT_NOTE => {
                let entry = pvh_entry(&Bytes(bytes.slice(offset, file_bytes)?));
                elf.pvh_entry = elf.pvh_entry.or(entry);
            }
            _ => {}
        }
    }
    Ok(elf)
}

/// Looks for the note; damaged notes end the search.
fn pvh_entry(notes: &Bytes<'_>) -> Option<u64> {
    let mut at = 0u64;
    loop {
        let (name_bytes, value_bytes) = (notes.u32(at).ok()?, notes.u32(at + 4).ok()?);
        let kind = notes.u32(at + 8).ok()?;
        let name_at = at + 12;
        let value_at = name_at.checked_add(u64::from(name_bytes).next_multiple_of(4))?;
        if kind == NOTE_PHYS32_ENTRY && notes.slice(name_at, name_bytes.into()).ok()? == b"Xen\0" {
            return match value_bytes {
                4 => notes.u32(value_at).ok().map(u64::from),
                8 => notes.u64(value_at).ok(),
                _ => None,
            };
        }
        at = value_at.checked_add(u64::from(value_bytes).next_multiple_of(4))?;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A kernel with one segment at `address` holding `code`, and a PVH note if `entry` is given.
    pub(in super::super) fn kernel(address: u64, code: &[u8], entry: Option<u32>) -> Vec<u8> {
        let mut file = vec![0u8; 64 + 2 * 56];
        file[0..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 2;
        let mut note = Vec::new();
        if let Some(entry) = entry {
            for word in [4u32, 4, 7, u32::from_le_bytes(*b"Xen\0"), 0, 4, 4, NOTE_PHYS32_ENTRY] {
                note.extend(word.to_le_bytes());
            }
            note.extend(b"Xen\0");
            note.extend(entry.to_le_bytes());
        }
        let mut header = |index: usize, kind: u32, offset: usize, bytes: usize, memory: usize| {
            let at = 64 + 56 * index;
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (field, value) in [(8, offset as u64), (24, address), (32, bytes as u64), (40, memory as u64)] {
                file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        header(0, PT_LOAD, 176, code.len(), code.len() + 4096);
        header(1, PT_NOTE, 176 + code.len(), note.len(), note.len());
        file.extend(code);
        file.extend(note);
        file
    }

    #[test]
    fn segments_and_the_pvh_note_are_found() {
        let file = kernel(0x10_0000, b"code", Some(0x10_0002));
        let elf = parse(&file).unwrap();
        assert_eq!(elf.segments, [Segment { address: 0x10_0000, data: b"code", memory_bytes: 4100 }]);
        assert_eq!(elf.pvh_entry, Some(0x10_0002));
        assert_eq!(parse(&kernel(0, b"x", None)).unwrap().pvh_entry, None);
    }

    #[test]
    fn every_prefix_and_every_flipped_byte_is_survived() {
        let file = kernel(0x10_0000, b"code", Some(0x10_0002));
        for end in 0..file.len() {
            let _ = parse(&file[..end]);
        }
        for at in 0..file.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = file.clone();
                bad[at] = value;
                let _ = parse(&bad);
            }
        }
        assert!(matches!(parse(b"\x7fELF"), Err(BootError::Truncated { .. })));
        assert!(matches!(parse(&[0; 64]), Err(BootError::NotElf64)));
    }
}
