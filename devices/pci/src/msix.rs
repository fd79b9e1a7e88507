//! MSI-X: vector table, pending bits, masking. PCI 6.8.2.

use std::sync::Arc;

use hv_core::{Msi, MsiSink, StateError};
use minicbor::{Decode, Encode};

use crate::ConfigSpace;

const CAPABILITY_ID: u8 = 0x11;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_BYTES: u64 = 16;
/// The table is a quarter of the page, which keeps the pending bits at a fixed place behind it.
pub(crate) const MAX_VECTORS: u16 = 128;

/// One table entry.
#[derive(Clone, Copy, Debug, PartialEq, Encode, Decode)]
struct EntryV1 {
    #[n(0)]
    address: u64,
    #[n(1)]
    data: u32,
    #[n(2)]
    control: u32,
}

/// Saved state of table and pending bits.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct MsixStateV1 {
    #[n(0)]
    entries: Vec<EntryV1>,
    /// Vectors that wait for their mask to open.
    #[n(1)]
    pending: Vec<bool>,
    /// Message control as last written.
    #[n(2)]
    control: u16,
}

/// The MSI-X structures of one function. The table starts at offset 0 of a page, the pending bits at [`Msix::PBA_OFFSET`].
pub struct Msix {
    entries: Vec<EntryV1>,
    pending: Vec<bool>,
    control: u16,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// Where the pending bits start, in bytes from the table.
    pub const PBA_OFFSET: u64 = 0x800;
    /// Bytes that table and pending bits take.
    pub const BYTES: u64 = 0x1000;

    /// `vectors` masked vectors, 1 to 128.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Msix {
        let vectors = usize::from(vectors.clamp(1, MAX_VECTORS));
        let entry = EntryV1 { address: 0, data: 0, control: 1 };
        Msix { entries: vec![entry; vectors], pending: vec![false; vectors], control: 0, sink }
    }

    /// Adds the capability to `config`: structures at `offset` (a multiple of 8) of BAR `bar`. Returns where the
    /// capability is; writes to its control word go to [`Msix::write_control`].
    pub fn add_capability(&self, config: &mut ConfigSpace, bar: u8, offset: u32) -> u8 {
        let size = self.entries.len() as u16 - 1;
        let pba = offset + Self::PBA_OFFSET as u32;
        let mut body = size.to_le_bytes().to_vec();
        body.extend((offset | u32::from(bar)).to_le_bytes());
        body.extend((pba | u32::from(bar)).to_le_bytes());
        config.add_capability(CAPABILITY_ID, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }
    /// MSI-X is on: the interrupt pin is not used.
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }
    /// The message control word has been written.
    pub fn write_control(&mut self, control: u16) {
        self.control = control & (ENABLE | FUNCTION_MASK);
        self.send_pending();
    }

    /// Sends vector `vector`, or keeps it pending while it is masked. Vectors that do not exist, and any while MSI-X is
    /// off, are dropped.
    pub fn signal(&mut self, vector: u16) {
        let open = self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let (Some(entry), Some(pending)) =
            (self.entries.get(usize::from(vector)), self.pending.get_mut(usize::from(vector)))
        else {
            return;
        };
        if open && entry.control & 1 == 0 {
            self.sink.signal(Msi { address: entry.address, data: entry.data });
        } else if self.control & ENABLE != 0 {
            *pending = true;
        }
    }

    fn send_pending(&mut self) {
        if self.control & (ENABLE | FUNCTION_MASK) != ENABLE {
            return;
        }
        for (entry, pending) in self.entries.iter().zip(&mut self.pending) {
            if *pending && entry.control & 1 == 0 {
                *pending = false;
                self.sink.signal(Msi { address: entry.address, data: entry.data });
            }
        }
    }

    /// Reads 4 or 8 bytes of table or pending bits; other widths are not allowed by PCI 6.8.2 and read 0.
    pub fn read(&self, offset: u64, bytes: u8) -> u64 {
        match bytes {
            4 => self.read_dword(offset).into(),
            8 => u64::from(self.read_dword(offset)) | u64::from(self.read_dword(offset + 4)) << 32,
            _ => 0,
        }
    }
    fn read_dword(&self, offset: u64) -> u32 {
        if let Some(first) = offset.checked_sub(Self::PBA_OFFSET) {
            let first = (first as usize & !3) * 8;
            return (0..32)
                .fold(0, |word, i| word | u32::from(self.pending.get(first + i).copied().unwrap_or(false)) << i);
        }
        let Some(entry) = self.entries.get((offset / ENTRY_BYTES) as usize) else { return 0 };
        match offset & 0xc {
            0 => entry.address as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => entry.control,
        }
    }

    /// Writes 4 or 8 bytes of the table; pending bits are read-only.
    pub fn write(&mut self, offset: u64, bytes: u8, value: u64) {
        match bytes {
            4 => self.write_dword(offset, value as u32),
            8 => {
                self.write_dword(offset, value as u32);
                self.write_dword(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
        self.send_pending();
    }
    fn write_dword(&mut self, offset: u64, value: u32) {
        let Some(entry) = self.entries.get_mut((offset / ENTRY_BYTES) as usize) else { return };
        match offset & 0xc {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.data = value,
            _ => entry.control = value & 1,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = Msix::new(self.vectors(), self.sink.clone());
    }

    /// What a snapshot carries.
    pub fn save(&self) -> MsixStateV1 {
        let Msix { entries, pending, control, sink: _ } = self;
        MsixStateV1 { entries: entries.clone(), pending: pending.clone(), control: *control }
    }
    /// Builds the structures from a saved state. `Length`: not `vectors` entries.
    pub fn restore(state: MsixStateV1, vectors: u16, sink: Arc<dyn MsiSink>) -> Result<Msix, StateError> {
        let MsixStateV1 { mut entries, pending, control } = state;
        let want = usize::from(vectors);
        for got in [entries.len(), pending.len()] {
            if got != want {
                return Err(StateError::Length { field: "msix.entries", want, got });
            }
        }
        entries.iter_mut().for_each(|e| e.control &= 1);
        Ok(Msix { entries, pending, control: control & (ENABLE | FUNCTION_MASK), sink })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::MmioDevice;
    use hv_null::golden;
    use hv_null::script::{Bench, UnderTest, Words, check};

    struct Subject(Msix);
    impl MmioDevice for Subject {
        fn read(&mut self, offset: u64, bytes: u8) -> u64 {
            self.0.read(offset, bytes)
        }
        fn write(&mut self, offset: u64, bytes: u8, value: u64) {
            self.0.write(offset, bytes, value);
        }
    }
    impl UnderTest for Subject {
        fn build(bench: &Bench) -> Self {
            Subject(Msix::new(2, bench.probe.clone()))
        }
        fn reload(self, bench: &Bench) -> Self {
            Subject(Msix::restore(golden::recode(&self.0.save()), 2, bench.probe.clone()).unwrap())
        }
        fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
            Some(self)
        }
        fn word(&mut self, word: &str, words: &mut Words<'_>, _bench: &Bench) -> bool {
            match word {
                "control" => self.0.write_control(words.hex() as u16),
                "signal" => self.0.signal(words.dec() as u16),
                _ => return false,
            }
            true
        }
    }

    #[test]
    fn the_table_after_reset_is_masked_and_keeps_its_fields() {
        check::<Subject>("read4 c is 1  read4 1c is 1  read4 20 is 0  read4 800 is 0");
        check::<Subject>(
            "write4 0 = fee01003  write4 4 = 1  read8 0 is 1fee01000  write8 8 = ffffffff00000041  read8 8 is 100000041",
        );
    }

    #[test]
    fn a_vector_is_sent_only_while_everything_is_open() {
        check::<Subject>(
            "write8 10 = fee02000  write8 18 = 42  signal 1  msi none  read4 800 is 0   # off: dropped
             control 8000  signal 1  msi is fee02000 42  signal 2  signal 99  msi none
             control c000  signal 1  msi none  read4 800 is 2  control 8000  msi is fee02000 42  read4 800 is 0
             write4 1c = 1  signal 1  signal 1  msi none  read8 800 is 2  write4 1c = 0  msi is fee02000 42  msi none",
        );
    }

    #[test]
    fn the_shipped_state_decodes() {
        golden::check("testdata/states/msix-v1.hex".as_ref(), &Msix::new(2, Bench::new().probe).save());
    }
}
