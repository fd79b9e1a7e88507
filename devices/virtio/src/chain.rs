//! One descriptor chain, gathered into buffers once and bounded.

use guest_ram::Memory;
use hv_core::GuestBuffer;
use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Buffers of one direction, in order.
pub(crate) type Buffers<'a> = SmallVec<[GuestBuffer<'a>; 8]>;

/// The most descriptors of one chain that are looked at; the most segments a driver is told it may use lies below.
pub(crate) const MAX_SEGMENTS: usize = 256;

/// A chain that cannot be used: too long, outside guest memory, or readable parts behind writable ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadChain;

/// A chain's buffers: first what the device reads, then what it writes.
pub(crate) struct Gathered<'a> {
    pub(crate) readable: Buffers<'a>,
    pub(crate) writable: Buffers<'a>,
}

/// Walks `chain`. After a failure nothing of it is used.
pub(crate) fn gather<'a>(memory: &'a Memory, chain: DescriptorChain<&Memory>) -> Result<Gathered<'a>, BadChain> {
    let mut gathered = Gathered { readable: SmallVec::new(), writable: SmallVec::new() };
    let mut count = 0;
    for descriptor in chain {
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
