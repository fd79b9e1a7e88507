//! Block device. VIRTIO 5.2

use guest_ram::Memory;
use hv_core::{DiskBackend, DiskFault};
use virtio_queue::DescriptorChain;

use crate::chain::{self, Buffers, Gathered, MAX_SEGMENTS};
use crate::model::Model;
use crate::work::{Device, Served};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const SECTOR_BYTES: u64 = 512;
const ID_BYTES: usize = 20;
const HEADER_BYTES: usize = 16;
/// Ranges in one discard or write-zeroes request.
const MAX_RANGES: usize = 16;
/// Sectors in one such range: 1 GiB, so that one request does not take the thread for long.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const QUEUE_SIZES: &[u16] = &[256];

/// What the driver is told about `disk`.
pub(crate) fn model(disk: &dyn DiskBackend) -> Model {
    let read_only = disk.read_only();
    let changes = if read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
    let mut config = vec![0u8; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = config.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &(disk.size_bytes() / SECTOR_BYTES).to_le_bytes());
    put(12, &(MAX_SEGMENTS as u32 - 2).to_le_bytes()); // header and status take two descriptors
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    if !read_only {
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &8u32.to_le_bytes()); // discard alignment: 4 KiB
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &(MAX_RANGES as u32).to_le_bytes());
        put(56, &[1]); // write zeroes may unmap
    }
    let features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | changes;
    Model { device_type: 2, class: 0x01_0000, features, queue_sizes: QUEUE_SIZES, config }
}

/// The working half.
pub(crate) struct Blk {
    disk: Box<dyn DiskBackend>,
    id: [u8; ID_BYTES],
    /// A request waits for the machine to resume.
    held: bool,
}

/// How a request ended: its status, and data bytes written to the guest.
type Outcome = Result<u32, DiskFault>;

impl Blk {
    pub(crate) fn new(disk: Box<dyn DiskBackend>, serial: &str) -> Blk {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Blk { disk, id, held: false }
    }

    fn request(&mut self, kind: u32, sector: u64, readable: &mut Buffers<'_>, writable: &Buffers<'_>) -> Outcome {
        // The back end checks the end of the disk; here only what could not be said in bytes.
        let offset = || sector.checked_mul(SECTOR_BYTES).ok_or(DiskFault::Report);
        let whole = |bytes: u64| if bytes.is_multiple_of(SECTOR_BYTES) { Ok(bytes) } else { Err(DiskFault::Report) };
        match kind {
            T_IN => {
                let bytes = whole(chain::length(writable))?;
                self.disk.read(offset()?, writable)?;
                Ok(u32::try_from(bytes).unwrap_or(u32::MAX))
            }
            T_OUT => {
                whole(chain::length(readable))?;
                self.disk.write(offset()?, readable).map(|()| 0)
            }
            T_FLUSH => self.disk.flush().map(|()| 0),
            T_GET_ID => Ok(chain::fill(writable, &self.id) as u32),
            T_DISCARD | T_WRITE_ZEROES => self.ranges(kind, readable).map(|()| 0),
            _ => Err(DiskFault::Unsupported),
        }
    }

    /// Ranges of a discard or write-zeroes request: sector, sectors, flags. VIRTIO 5.2.6
    fn ranges(&mut self, kind: u32, readable: &mut Buffers<'_>) -> Result<(), DiskFault> {
        let bytes = chain::length(readable) as usize;
        if self.disk.read_only() || !bytes.is_multiple_of(16) || bytes == 0 || bytes > 16 * MAX_RANGES {
            return Err(DiskFault::Report);
        }
        let mut list = [0u8; 16 * MAX_RANGES];
        let list = list.get_mut(..bytes).ok_or(DiskFault::Report)?;
        chain::take_front(readable, list).ok_or(DiskFault::Report)?;
        let mut ranges = Vec::with_capacity(MAX_RANGES);
        for range in list.as_chunks::<16>().0 {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            // Only write zeroes knows a flag: it may unmap.
            if flags & !1 != 0 || kind == T_DISCARD && flags != 0 {
                return Err(DiskFault::Unsupported);
            }
            let offset = sector.checked_mul(SECTOR_BYTES).ok_or(DiskFault::Report)?;
            if sectors > MAX_RANGE_SECTORS {
                return Err(DiskFault::Report);
            }
            ranges.push((offset, u64::from(sectors) * SECTOR_BYTES, flags & 1 != 0));
        }
        ranges.into_iter().try_for_each(|(offset, bytes, may_unmap)| match kind {
            T_DISCARD => self.disk.discard(offset, bytes),
            _ => self.disk.write_zeroes(offset, bytes, may_unmap),
        })
    }
}

impl Device for Blk {
    fn serve(&mut self, _index: u16, memory: &Memory, chain: DescriptorChain<&Memory>) -> Served {
        // A chain that cannot be gathered has no status byte to say so: it goes back with nothing written.
        let Ok(Gathered { mut readable, mut writable, .. }) = chain::gather(memory, chain) else {
            return Served::Used(0);
        };
        let Some(status_at) = chain::take_last_byte(&mut writable) else { return Served::Used(0) };
        let mut header = [0; HEADER_BYTES];
        let outcome = match chain::take_front(&mut readable, &mut header) {
            Some(()) => {
                let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
                self.request(u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector), &mut readable, &writable)
            }
            None => Err(DiskFault::Report),
        };
        let (status, written) = match outcome {
            Ok(written) => (S_OK, written),
            Err(DiskFault::Report) => (S_IOERR, 0),
            Err(DiskFault::Unsupported) => (S_UNSUPP, 0),
            Err(DiskFault::Hold) => {
                self.held = true;
                return Served::Later;
            }
        };
        status_at.copy_from(&[status]);
        Served::Used(written.saturating_add(1))
    }
    fn ready(&mut self, _index: u16) -> bool {
        !self.held
    }
    fn resumed(&mut self) {
        self.held = false;
    }
    fn stop(&mut self) {
        self.held = false;
    }
}
