//! Physical region pages: where the data of a command lies in guest memory. NVME 4.3

use guest_ram::{Memory, PAGE_BYTES};
use hv_core::GuestBuffer;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::command::{Command, Status};

/// The largest transfer: 2 to the power of MDTS pages.
pub(crate) const MAX_TRANSFER_BYTES: u64 = PAGE_BYTES << MDTS;
/// As the driver is told.
pub(crate) const MDTS: u8 = 7;

/// Pieces of guest memory, in order.
pub(crate) type Buffers<'a> = SmallVec<[GuestBuffer<'a>; 8]>;

const ENTRY_BYTES: u64 = 8;

/// The memory of `command`'s data, `bytes` long, at most [`MAX_TRANSFER_BYTES`].
pub(crate) fn buffers<'a>(memory: &'a Memory, command: &Command, bytes: u64) -> Result<Buffers<'a>, Status> {
    if bytes > MAX_TRANSFER_BYTES || command.flags != 0 {
        return Err(Status::INVALID_FIELD);
    }
    let mut ranges = Ranges::default();
    let first = bytes.min(PAGE_BYTES - command.prp1 % PAGE_BYTES);
    ranges.add(command.prp1, first);
    let rest = bytes - first;
    if rest > PAGE_BYTES {
        walk_list(memory, command.prp2, rest, &mut ranges)?;
    } else if rest > 0 {
        ranges.add_page(command.prp2, rest)?;
    }
    let mut buffers = Buffers::new();
    for (address, length) in ranges.0 {
        let length = usize::try_from(length).map_err(|_| Status::INVALID_FIELD)?;
        for slice in memory.get_slices(GuestAddress(address), length) {
            buffers.push(slice.map_err(|_| Status::DATA_TRANSFER)?);
        }
    }
    Ok(buffers)
}

/// Address and length; neighbours are joined.
#[derive(Default)]
struct Ranges(SmallVec<[(u64, u64); 8]>);

impl Ranges {
    fn add(&mut self, address: u64, bytes: u64) {
        match self.0.last_mut() {
            Some((start, length)) if start.checked_add(*length) == Some(address) => *length += bytes,
            _ => self.0.push((address, bytes)),
        }
    }
    fn add_page(&mut self, address: u64, bytes: u64) -> Result<(), Status> {
        if !address.is_multiple_of(PAGE_BYTES) {
            return Err(Status::PRP_OFFSET);
        }
        self.add(address, bytes);
        Ok(())
    }
}

/// Follows a list of `rest` bytes' worth of pages. The transfer is bounded, so the walk is too.
fn walk_list(memory: &Memory, list: u64, mut rest: u64, ranges: &mut Ranges) -> Result<(), Status> {
    let mut at = list;
    while rest > 0 {
        if !at.is_multiple_of(ENTRY_BYTES) {
            return Err(Status::PRP_OFFSET);
        }
        let room = ((PAGE_BYTES - at % PAGE_BYTES) / ENTRY_BYTES) as usize;
        let wanted = rest.div_ceil(PAGE_BYTES) as usize;
        // The last entry of a page leads on where the page is too short for what is left.
        let (here, leads_on) = if wanted > room { (room - 1, true) } else { (wanted, false) };
        let mut entries = [0u8; PAGE_BYTES as usize];
        let bytes = (here + usize::from(leads_on)) * ENTRY_BYTES as usize;
        let entries = entries.get_mut(..bytes).ok_or(Status::INVALID_FIELD)?;
        memory.read_slice(entries, GuestAddress(at)).map_err(|_| Status::DATA_TRANSFER)?;
        let mut entries = entries.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
        for address in entries.by_ref().take(here) {
            let length = rest.min(PAGE_BYTES);
            ranges.add_page(address, length)?;
            rest -= length;
        }
        if leads_on {
            at = entries.next().unwrap_or(0);
            // From its start a page gives hundreds of entries; without this, lists of one pointer would have no end.
            if !at.is_multiple_of(PAGE_BYTES) {
                return Err(Status::PRP_OFFSET);
            }
        }
    }
    Ok(())
}
