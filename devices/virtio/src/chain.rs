//! One descriptor chain, gathered into buffers once and bounded.

use guest_ram::Memory;
use hv_core::GuestBuffer;
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

/// Buffers of one direction, in order.
pub(crate) type Buffers<'a> = SmallVec<[GuestBuffer<'a>; 8]>;

/// The most descriptors of one chain that are looked at; the most segments a driver is told it may use lies below.
pub(crate) const MAX_SEGMENTS: usize = 512;

/// A chain that cannot be used: too long, outside guest memory, or readable parts behind writable ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadChain;

/// Where a chain begins. It stays the device's until its head is in the used ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    /// Descriptor table of the queue.
    pub(crate) table: GuestAddress,
    /// Its entries.
    pub(crate) entries: u16,
    /// The first descriptor.
    pub(crate) head: u16,
}

/// A chain's buffers: first what the device reads, then what it writes.
pub(crate) struct Gathered<'a> {
    pub(crate) readable: Buffers<'a>,
    pub(crate) writable: Buffers<'a>,
    /// Where the last byte is that the device writes.
    pub(crate) last_byte: Option<GuestAddress>,
}

/// The way along a chain. VIRTIO 2.7.5
struct Walk<'a> {
    memory: &'a Memory,
    table: GuestAddress,
    entries: u32,
    /// The table is one that a descriptor of the queue's table refers to.
    indirect: bool,
    next: Option<u16>,
}

impl Walk<'_> {
    fn next(&mut self) -> Result<Option<Descriptor>, BadChain> {
        const ENTRY_BYTES: u32 = 16;
        let Some(index) = self.next.take() else { return Ok(None) };
        if u32::from(index) >= self.entries {
            return Err(BadChain);
        }
        let at = self.table.checked_add(u64::from(index) * u64::from(ENTRY_BYTES)).ok_or(BadChain)?;
        let descriptor: Descriptor = self.memory.read_obj(at).map_err(|_| BadChain)?;
        if !descriptor.refers_to_indirect_table() {
            self.next = descriptor.has_next().then(|| descriptor.next());
            return Ok(Some(descriptor));
        }
        // Only the queue's own table refers to others. VIRTIO 2.7.5.3.1
        if self.indirect || !descriptor.len().is_multiple_of(ENTRY_BYTES) {
            return Err(BadChain);
        }
        let (table, entries) = (descriptor.addr(), descriptor.len() / ENTRY_BYTES);
        *self = Walk { table, entries, indirect: true, next: Some(0), ..*self };
        self.next()
    }
}

/// Walks `chain`. After a failure nothing of it is used.
pub(crate) fn gather(memory: &Memory, chain: Chain) -> Result<Gathered<'_>, BadChain> {
    let mut gathered = Gathered { readable: SmallVec::new(), writable: SmallVec::new(), last_byte: None };
    let Chain { table, entries, head } = chain;
    let mut walk = Walk { memory, table, entries: entries.into(), indirect: false, next: Some(head) };
    let mut count = 0;
    while let Some(descriptor) = walk.next()? {
        count += 1;
        if count > MAX_SEGMENTS {
            return Err(BadChain);
        }
        let buffers = if descriptor.is_write_only() {
            &mut gathered.writable
        } else if gathered.writable.is_empty() {
            &mut gathered.readable
        } else {
            return Err(BadChain); // VIRTIO 2.7.4.2
        };
        let length = descriptor.len() as usize;
        if length == 0 {
            continue;
        }
        if descriptor.is_write_only() {
            gathered.last_byte = Some(descriptor.addr().checked_add(length as u64 - 1).ok_or(BadChain)?);
        }
        // A buffer may cross from one memory region into the next.
        for slice in memory.get_slices(GuestAddress(descriptor.addr().0), length) {
            buffers.push(slice.map_err(|_| BadChain)?);
        }
    }
    Ok(gathered)
}

/// Bytes in `buffers`.
pub(crate) fn length(buffers: &[GuestBuffer<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

/// Takes `out.len()` bytes from the front of `buffers`; `None` if there are fewer.
pub(crate) fn take_front(buffers: &mut Buffers<'_>, out: &mut [u8]) -> Option<()> {
    let mut done = 0;
    while done < out.len() {
        let first = *buffers.first()?;
        let piece = out.get_mut(done..)?;
        let bytes = piece.len().min(first.len());
        first.subslice(0, bytes).ok()?.copy_to(piece);
        done += bytes;
        if bytes == first.len() {
            buffers.remove(0);
        } else {
            *buffers.first_mut()? = first.offset(bytes).ok()?;
        }
    }
    Some(())
}

/// Takes the last byte of `buffers` away and returns where it is.
pub(crate) fn take_last_byte<'a>(buffers: &mut Buffers<'a>) -> Option<GuestBuffer<'a>> {
    let last = buffers.pop()?;
    let at = last.len().checked_sub(1)?;
    if at != 0 {
        buffers.push(last.subslice(0, at).ok()?);
    }
    last.offset(at).ok()
}

/// Copies `data` into `buffers`, as far as both reach; returns the bytes copied.
pub(crate) fn fill(buffers: &[GuestBuffer<'_>], data: &[u8]) -> usize {
    let mut done = 0;
    for buffer in buffers {
        let rest = data.get(done..).unwrap_or(&[]);
        let bytes = rest.len().min(buffer.len());
        buffer.copy_from(rest.get(..bytes).unwrap_or(&[]));
        done += bytes;
    }
    done
}
