//! Block device. VIRTIO 5.2

use std::os::fd::BorrowedFd;

use guest_ram::Memory;
use hv_core::{Begun, DiskBackend, DiskFault, GuestBuffer, Interest, Over, Transfer};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::{self, Buffers, Chain, Gathered, MAX_SEGMENTS};
use crate::model::{MAX_QUEUES, Model};
use crate::work::{Device, Ended, Served};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
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
/// Requests that a queue holds where nothing else is asked for. A chain is no longer than its queue, and 1 MiB in pages of
/// 4 KiB, with header and status, is a chain of 258: in half the queue a driver would make two requests of it.
pub(crate) const QUEUE_SIZE: u16 = 512;

/// How many queues, and how many requests each holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkQueues {
    /// 1 to 16.
    pub count: u16,
    /// A power of two, 2 to 1024.
    pub size: u16,
}

impl Default for BlkQueues {
    fn default() -> BlkQueues {
        BlkQueues { count: 1, size: QUEUE_SIZE }
    }
}

/// What the driver is told about `disk`.
pub(crate) fn model(disk: &dyn DiskBackend, queues: BlkQueues) -> Model {
    let count = queues.count.clamp(1, MAX_QUEUES);
    let size = if queues.size.is_power_of_two() { queues.size.clamp(2, 1024) } else { QUEUE_SIZE };
    let read_only = disk.read_only();
    let changes = if read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
    let mut config = vec![0u8; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = config.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &(disk.size_bytes() / SECTOR_BYTES).to_le_bytes());
    // Header and status take two descriptors, and no chain is longer than its queue.
    let segments = (MAX_SEGMENTS as u32).min(size.into()).saturating_sub(2).max(1);
    put(12, &segments.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    put(34, &count.to_le_bytes());
    if !read_only {
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &8u32.to_le_bytes()); // discard alignment: 4 KiB
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &(MAX_RANGES as u32).to_le_bytes());
        put(56, &[1]); // write zeroes may unmap
    }
    let flush = if disk.write_cache() { F_FLUSH } else { 0 };
    let several = if count > 1 { F_MQ } else { 0 };
    let features = F_SEG_MAX | F_BLK_SIZE | flush | several | changes;
    Model { device_type: 2, class: 0x01_0000, features, queue_sizes: vec![size; count.into()], config }
}

/// The working half.
pub(crate) struct Blk {
    disk: Box<dyn DiskBackend>,
    queues: BlkQueues,
    id: [u8; ID_BYTES],
    /// A request waits for the machine to resume.
    held: bool,
    /// A request waits for the disk's limits.
    waiting: bool,
    /// Requests that the disk works on; a place is the tag of one.
    under_way: Vec<Option<UnderWay>>,
    free: Vec<usize>,
}

/// A request that the disk works on.
#[derive(Clone, Copy)]
struct UnderWay {
    index: u16,
    head: u16,
    /// Where its status byte is.
    status_at: GuestAddress,
    /// Data bytes that are written to the guest.
    written: u32,
}

/// What became of a request that did not fail.
enum Answer {
    /// It is done, with so many data bytes written to the guest.
    Done(u32),
    /// The disk works on it.
    UnderWay,
}

type Outcome = Result<Answer, DiskFault>;

impl Blk {
    pub(crate) fn new(disk: Box<dyn DiskBackend>, queues: BlkQueues, serial: &str) -> Blk {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Blk { disk, queues, id, held: false, waiting: false, under_way: Vec::new(), free: Vec::new() }
    }

    fn request(
        &mut self,
        (kind, sector): (u32, u64),
        readable: &mut Buffers<'_>,
        writable: &Buffers<'_>,
        kept: Option<UnderWay>,
    ) -> Outcome {
        // The back end checks the end of the disk; here only what could not be said in bytes.
        let offset = || sector.checked_mul(SECTOR_BYTES).ok_or(DiskFault::Report);
        let done = |()| Answer::Done(0);
        match kind {
            T_IN => self.transfer(Transfer::Read, offset, writable, kept),
            T_OUT => self.transfer(Transfer::Write, offset, readable, kept),
            T_FLUSH => self.disk.flush().map(done),
            T_GET_ID => Ok(Answer::Done(chain::fill(writable, &self.id) as u32)),
            T_DISCARD | T_WRITE_ZEROES => self.ranges(kind, readable).map(done),
            _ => Err(DiskFault::Unsupported),
        }
    }

    /// A read or a write: the disk works on it by itself, or does it now. Without `kept` it must be done now.
    fn transfer(
        &mut self,
        transfer: Transfer,
        offset: impl Fn() -> Result<u64, DiskFault>,
        buffers: &[GuestBuffer<'_>],
        kept: Option<UnderWay>,
    ) -> Outcome {
        let bytes = chain::length(buffers);
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskFault::Report);
        }
        self.disk.admit(transfer, bytes)?;
        let offset = offset()?;
        let written = if transfer == Transfer::Read { u32::try_from(bytes).unwrap_or(u32::MAX) } else { 0 };
        if let Some(kept) = kept {
            let tag = self.free.pop().unwrap_or_else(|| {
                self.under_way.push(None);
                self.under_way.len() - 1
            });
            match self.disk.begin(transfer, offset, buffers, tag as u64) {
                Begun::Done => {
                    self.free.push(tag);
                    return Ok(Answer::Done(written));
                }
                Begun::UnderWay => {
                    if let Some(place) = self.under_way.get_mut(tag) {
                        *place = Some(UnderWay { written, ..kept });
                    }
                    return Ok(Answer::UnderWay);
                }
                Begun::Refused => self.free.push(tag),
            }
        }
        match transfer {
            Transfer::Read => self.disk.read(offset, buffers)?,
            Transfer::Write => self.disk.write(offset, buffers)?,
        }
        Ok(Answer::Done(written))
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
        if kind == T_WRITE_ZEROES {
            self.disk.admit(Transfer::Write, ranges.iter().map(|(_, bytes, _)| bytes).sum())?;
        }
        ranges.into_iter().try_for_each(|(offset, bytes, may_unmap)| match kind {
            T_DISCARD => self.disk.discard(offset, bytes),
            _ => self.disk.write_zeroes(offset, bytes, may_unmap),
        })
    }
}

impl Device for Blk {
    fn serve(&mut self, index: u16, memory: &Memory, chain: Chain, again: bool) -> Served {
        // A chain that cannot be gathered has no status byte to say so: it goes back with nothing written.
        let Ok(Gathered { mut readable, mut writable, last_byte }) = chain::gather(memory, chain) else {
            return Served::Used(0);
        };
        let (Some(status_at), Some(last_byte)) = (chain::take_last_byte(&mut writable), last_byte) else {
            return Served::Used(0);
        };
        let kept = UnderWay { index, head: chain.head, status_at: last_byte, written: 0 };
        let kept = (!again).then_some(kept);
        let mut header = [0; HEADER_BYTES];
        let outcome = match chain::take_front(&mut readable, &mut header) {
            Some(()) => {
                let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
                let asked = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
                self.request(asked, &mut readable, &writable, kept)
            }
            None => Err(DiskFault::Report),
        };
        let (status, written) = match outcome {
            Ok(Answer::Done(written)) => (S_OK, written),
            Ok(Answer::UnderWay) => return Served::UnderWay,
            Err(DiskFault::Report) => (S_IOERR, 0),
            Err(DiskFault::Unsupported) => (S_UNSUPP, 0),
            Err(DiskFault::Hold) => {
                self.held = true;
                return Served::Later;
            }
            Err(DiskFault::Wait) => {
                self.waiting = true;
                return Served::Later;
            }
        };
        status_at.copy_from(&[status]);
        Served::Used(written.saturating_add(1))
    }
    fn attach(&mut self, memory: &Memory) {
        self.disk.attach(memory);
    }
    fn submit(&mut self) {
        self.disk.submit();
    }
    fn next_over(&mut self, memory: &Memory) -> Option<Ended> {
        let Over { tag, good } = self.disk.next_over()?;
        let tag = usize::try_from(tag).ok()?;
        let UnderWay { index, head, status_at, written } = self.under_way.get_mut(tag)?.take()?;
        self.free.push(tag);
        // The byte was in guest memory when the chain was gathered.
        let told = good && memory.write_obj(S_OK, status_at).is_ok();
        Some(Ended { index, head, used: told.then_some(written.saturating_add(1)) })
    }
    fn wait(&mut self) -> bool {
        let any = self.under_way.len() > self.free.len();
        if any {
            self.disk.wait();
        }
        any
    }
    fn ready(&mut self, _index: u16) -> bool {
        !self.held && !self.waiting
    }
    fn woken(&mut self) {
        self.waiting = false;
    }
    fn resumed(&mut self) {
        self.held = false;
    }
    fn stop(&mut self) {
        self.held = false;
        self.waiting = false;
    }
    fn back_end_changed(&mut self) -> Option<Vec<u8>> {
        Some(model(&*self.disk, self.queues).config)
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.wait_fd()
    }
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.over_fd()
    }
    fn interest(&self) -> Interest {
        Interest { readable: self.waiting, writable: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::F_EVENT_IDX;
    use crate::testing::{
        DATA, Descriptor, Flights, INDIRECT, MemoryDisk, RAM_BYTES, RING_FEATURES, Rig, WRITE_ONLY, twice,
    };

    const DISK_BYTES: usize = 64 << 10;
    const STATUS: u64 = DATA + 0x8000;
    const BODY: u64 = DATA + 0x1000;

    fn rig(disk: &MemoryDisk, reload: bool) -> Rig {
        let disk = disk.clone();
        Rig::new(reload, move || {
            let queues = BlkQueues::default();
            (model(&disk, queues), Blk::new(Box::new(disk.clone()), queues, "serial-1"))
        })
    }
    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }
    /// Sends one request with `body` between header and status; used length and status byte.
    fn request(rig: &mut Rig, kind: u32, sector: u64, body: &[Descriptor]) -> (Option<u32>, u8) {
        rig.put(DATA, &header(kind, sector));
        rig.put(STATUS, &[0xee]);
        let mut chain = vec![(DATA, 16, 0)];
        chain.extend(body);
        chain.push((STATUS, 1, WRITE_ONLY));
        rig.offer(0, &chain);
        (rig.used(0), rig.get(STATUS, 1)[0])
    }

    #[test]
    fn requests_are_carried_out_and_answered() {
        let range = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        let max = MAX_RANGE_SECTORS;
        let read = |bytes| vec![(BODY, bytes, WRITE_ONLY)];
        let write = |bytes| vec![(BODY, bytes, 0)];
        // kind, sector, what lies in the body, descriptors, used, status, what the disk was asked
        type Case = (u32, u64, Vec<u8>, Vec<Descriptor>, u32, u8, &'static str);
        let cases: Vec<Case> = vec![
            (T_IN, 2, vec![], read(1024), 1025, S_OK, "read 1024+1024"),
            (T_IN, 0, vec![], vec![(BODY, 100, 2), (BODY + 512, 412, 2)], 513, S_OK, "read 0+512"),
            (T_IN, 0, vec![], read(100), 1, S_IOERR, ""),
            (T_IN, 128, vec![], read(512), 1, S_IOERR, "read 65536+512"),
            (T_IN, u64::MAX, vec![], read(512), 1, S_IOERR, ""),
            (T_OUT, 4, vec![9; 512], write(512), 1, S_OK, "write 2048+512"),
            (T_FLUSH, 0, vec![], vec![], 1, S_OK, "flush"),
            (T_GET_ID, 0, vec![], read(20), 21, S_OK, ""),
            (T_DISCARD, 0, range(8, 8, 0), write(16), 1, S_OK, "discard 4096+4096"),
            (T_DISCARD, 0, range(8, 8, 1), write(16), 1, S_UNSUPP, ""),
            (T_DISCARD, 0, range(u64::MAX, 8, 0), write(16), 1, S_IOERR, ""),
            (T_DISCARD, 0, range(0, max + 1, 0), write(16), 1, S_IOERR, ""),
            (T_DISCARD, 0, vec![], write(15), 1, S_IOERR, ""),
            (T_DISCARD, 0, vec![], vec![], 1, S_IOERR, ""),
            (T_WRITE_ZEROES, 0, range(1, 2, 1), write(16), 1, S_OK, "zero 512+1024 unmap"),
            (T_WRITE_ZEROES, 0, range(1, 2, 2), write(16), 1, S_UNSUPP, ""),
            (77, 0, vec![], read(512), 1, S_UNSUPP, ""),
        ];
        twice(|reload| {
            for without in RING_FEATURES {
                let disk = MemoryDisk::new(DISK_BYTES);
                let mut rig = rig(&disk, reload);
                rig.start(1, without);
                for (kind, sector, body, descriptors, used, status, asked) in &cases {
                    rig.put(BODY, body);
                    let answer = request(&mut rig, *kind, *sector, descriptors);
                    assert_eq!(answer, (Some(*used), *status), "{kind} at {sector}: {descriptors:?}");
                    let log = std::mem::take(&mut *disk.log.lock());
                    assert_eq!(log.join(" "), *asked, "{kind} at {sector}");
                    assert_eq!(rig.messages(), [0x41], "{kind} at {sector}");
                }
                assert_eq!(disk.bytes.lock()[2048..2560], [9; 512]);
                assert_eq!(disk.bytes.lock()[512..1536], [0; 1024]);
            }
        });
    }

    #[test]
    fn the_saved_state_keeps_its_encoding() {
        let disk = MemoryDisk::new(DISK_BYTES);
        let mut rig = rig(&disk, false);
        rig.start(1, 0);
        request(&mut rig, T_FLUSH, 0, &[]);
        let state = rig.save();
        hv_null::golden::check("testdata/states/virtio-v1.hex".as_ref(), &state);
    }

    #[test]
    fn data_arrives_where_the_chain_says() {
        twice(|reload| {
            let disk = MemoryDisk::new(DISK_BYTES);
            let mut rig = rig(&disk, reload);
            rig.start(1, 0);
            request(&mut rig, T_IN, 1, &[(BODY, 100, WRITE_ONLY), (BODY + 4096, 924, WRITE_ONLY)]);
            assert_eq!(rig.get(BODY, 101), [[1; 100].as_slice(), &[0]].concat());
            assert_eq!(rig.get(BODY + 4096, 924), [[1; 412].as_slice(), &[2; 512]].concat());
            request(&mut rig, T_GET_ID, 0, &[(BODY, 20, WRITE_ONLY)]);
            assert_eq!(rig.get(BODY, 20), b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
            // The same through an indirect table.
            let table = DATA + 0x4000;
            rig.put(DATA, &header(T_IN, 5));
            rig.put_table(table, &[(DATA, 16, 0), (BODY, 512, WRITE_ONLY), (STATUS, 1, WRITE_ONLY)]);
            rig.offer(0, &[(table, 48, INDIRECT)]);
            assert_eq!((rig.used(0), rig.get(BODY, 2)), (Some(513), vec![5, 5]));
        });
    }

    #[test]
    fn a_mebibyte_in_pages_is_one_request() {
        const PAGE: u32 = 4096;
        let disk = MemoryDisk::new(1 << 20);
        let mut segments = [0; 4];
        segments.copy_from_slice(&model(&disk, BlkQueues::default()).config[12..16]);
        assert!(u32::from_le_bytes(segments) >= 256, "a driver would split it");
        let mut rig = rig(&disk, false);
        rig.start(1, 0);
        rig.put(DATA, &header(T_OUT, 0));
        rig.put(BODY, &[9; PAGE as usize]);
        let mut chain = vec![(DATA, 16, 0)];
        chain.resize(257, (BODY, PAGE, 0));
        chain.push((STATUS, 1, WRITE_ONLY));
        let table = DATA + 0x4000;
        rig.put_table(table, &chain);
        rig.offer(0, &[(table, 16 * chain.len() as u32, INDIRECT)]);
        assert_eq!((rig.used(0), rig.get(STATUS, 1)[0]), (Some(1), S_OK));
        assert!(disk.bytes.lock().iter().all(|&byte| byte == 9));
    }

    /// Starts a rig with a write of sector 3, which the disk must not take yet.
    fn rig_with_a_write_that_waits(disk: &MemoryDisk, reload: bool) -> Rig {
        let mut rig = rig(disk, reload);
        rig.start(1, 0);
        rig.put(BODY, &[7; 512]);
        assert_eq!(request(&mut rig, T_OUT, 3, &[(BODY, 512, 0)]), (None, 0xee));
        rig
    }
    fn assert_written(rig: &mut Rig, disk: &MemoryDisk) {
        assert_eq!((rig.used(0), rig.get(STATUS, 1)[0], rig.messages()), (Some(1), S_OK, vec![0x41]));
        assert_eq!(disk.bytes.lock()[1536..2048], [7; 512]);
    }

    #[test]
    fn a_held_request_is_tried_again_when_the_machine_resumes() {
        twice(|reload| {
            let disk = MemoryDisk::new(DISK_BYTES);
            *disk.fault.lock() = Some(DiskFault::Hold);
            let mut rig = rig_with_a_write_that_waits(&disk, reload);
            rig.resume();
            assert_eq!((rig.used(0), rig.messages().len()), (None, 0), "there is still no room");
            *disk.fault.lock() = None;
            rig.resume();
            assert_written(&mut rig, &disk);
        });
    }

    #[test]
    fn a_request_that_must_wait_is_tried_again_when_the_disk_says_so() {
        twice(|reload| {
            let disk = MemoryDisk::new(DISK_BYTES);
            *disk.admission.lock() = Some(DiskFault::Wait);
            let mut rig = rig_with_a_write_that_waits(&disk, reload);
            assert!(rig.waits(), "for the disk");
            rig.work();
            assert_eq!((rig.used(0), rig.waits()), (None, true), "it is not time yet");
            *disk.admission.lock() = None;
            rig.work();
            assert_written(&mut rig, &disk);
            assert_eq!((disk.log.lock().join(" "), rig.waits()), ("write 1536+512".into(), false));
            assert!(disk.admitted.lock().iter().all(|asked| *asked == (Transfer::Write, 512)));
            // A reset forgets it.
            *disk.admission.lock() = Some(DiskFault::Wait);
            request(&mut rig, T_OUT, 3, &[(BODY, 512, 0)]);
            rig.start(1, 0);
            assert!(!rig.waits());
        });
    }

    /// A disk that works by itself, without event indices, so that every interrupt counts.
    fn busy_rig(disk: &MemoryDisk) -> Rig {
        *disk.flights.lock() = Some(Flights::default());
        let mut rig = rig(disk, false);
        rig.start(1, F_EVENT_IDX);
        rig
    }
    fn body(head: u16) -> u64 {
        DATA + 0x1000 * u64::from(head) + 0x200
    }
    fn status(rig: &Rig, head: u16) -> u8 {
        rig.get(body(head) + 0x400, 1)[0]
    }
    /// Makes a request for a sector available, with everything it needs in a page of its own.
    fn offer(rig: &mut Rig, head: u16, kind: u32, sector: u64) {
        let at = DATA + 0x1000 * u64::from(head);
        rig.put(at, &header(kind, sector));
        rig.put(at + 0x600, &[0xee]);
        let flags = if kind == T_IN { WRITE_ONLY } else { 0 };
        rig.put_table(at + 0x800, &[(at, 16, 0), (at + 0x200, 512, flags), (at + 0x600, 1, WRITE_ONLY)]);
        rig.offer_table(0, head, at + 0x800, 3);
    }

    #[test]
    fn requests_that_the_disk_works_on_end_in_any_order() {
        let disk = MemoryDisk::new(DISK_BYTES);
        let mut rig = busy_rig(&disk);
        (0..4).for_each(|head| offer(&mut rig, head, T_IN, 10 + u64::from(head)));
        assert_eq!((rig.used_chain(0), rig.messages().len()), (None, 0));
        // What ends together is told once.
        for place in [2, 0] {
            disk.flights.lock().as_mut().unwrap().end(place, true);
        }
        rig.work();
        assert_eq!((rig.used_chain(0), rig.used_chain(0)), (Some((0, 513)), Some((2, 513))));
        assert_eq!((rig.used_chain(0), rig.messages()), (None, vec![0x41]));
        assert_eq!([0, 1, 2, 3].map(|head| status(&rig, head)), [S_OK, 0xee, S_OK, 0xee]);
        assert_eq!(rig.get(body(2), 2), [12, 12]);
        // A request that is done at once overtakes them.
        rig.put(DATA, &header(T_FLUSH, 0));
        rig.put_table(DATA + 0x800, &[(DATA, 16, 0), (DATA + 0x600, 1, WRITE_ONLY)]);
        rig.offer_table(0, 0, DATA + 0x800, 2);
        assert_eq!((rig.used_chain(0), rig.used_chain(0)), (Some((0, 1)), None));
        // A machine that is about to stand waits for the others.
        rig.save();
        let ended = [rig.used_chain(0), rig.used_chain(0), rig.used_chain(0)];
        assert_eq!(ended, [Some((1, 513)), Some((3, 513)), None]);
        assert_eq!(rig.messages().len(), 2);
    }

    #[test]
    fn a_request_that_failed_under_way_is_done_again_and_answered() {
        let disk = MemoryDisk::new(DISK_BYTES);
        let mut rig = busy_rig(&disk);
        (0..3).for_each(|head| offer(&mut rig, head, T_OUT, u64::from(head)));
        disk.log.lock().clear();
        for (place, fault) in [(1, None), (1, Some(DiskFault::Report)), (0, Some(DiskFault::Unsupported))] {
            *disk.fault.lock() = fault;
            disk.flights.lock().as_mut().unwrap().end(place, false);
            rig.work();
        }
        assert_eq!(disk.log.lock().join(" "), "write 512+512 write 1024+512 write 0+512");
        let ended = [rig.used_chain(0), rig.used_chain(0), rig.used_chain(0)];
        assert_eq!(ended, [Some((1, 1)), Some((2, 1)), Some((0, 1))]);
        assert_eq!([0, 1, 2].map(|head| status(&rig, head)), [S_UNSUPP, S_OK, S_IOERR]);
    }

    #[test]
    fn a_request_that_is_held_after_it_was_under_way_travels_with_its_queue() {
        let disk = MemoryDisk::new(DISK_BYTES);
        let mut rig = busy_rig(&disk);
        *disk.fault.lock() = Some(DiskFault::Hold);
        (0..3).for_each(|head| offer(&mut rig, head, T_OUT, u64::from(head)));
        disk.flights.lock().as_mut().unwrap().end(1, false);
        rig.work();
        assert_eq!(rig.used_chain(0), None);
        let state = rig.save();
        assert_eq!((state.queues[0].next_avail, state.queues[0].unfinished.as_slice()), (3, &[1, 0, 2][..]));
        let mut long = state.clone();
        long.queues[0].unfinished = vec![0; 9];
        let refused = rig.restore(long).unwrap_err();
        assert!(refused.to_string().contains("unfinished"), "{refused}");
        *disk.fault.lock() = None;
        disk.log.lock().clear();
        rig.restore(hv_null::golden::recode(&state)).unwrap();
        assert_eq!(disk.log.lock().join(" "), "write 512+512 write 0+512 write 1024+512");
        let ended = [rig.used_chain(0), rig.used_chain(0), rig.used_chain(0)];
        assert_eq!(ended, [Some((1, 1)), Some((0, 1)), Some((2, 1))]);
        assert_eq!([0, 1, 2].map(|head| status(&rig, head)), [S_OK; 3]);
    }

    #[test]
    fn a_reset_forgets_what_is_under_way() {
        let disk = MemoryDisk::new(DISK_BYTES);
        let mut rig = busy_rig(&disk);
        for fault in [None, Some(DiskFault::Hold)] {
            *disk.fault.lock() = fault;
            (0..3).for_each(|head| offer(&mut rig, head, T_IN, u64::from(head)));
            rig.start(1, F_EVENT_IDX);
            *disk.fault.lock() = None;
            rig.work();
            assert_eq!(rig.used_chain(0), None);
            offer(&mut rig, 2, T_IN, 5);
            disk.flights.lock().as_mut().unwrap().end(0, true);
            rig.work();
            assert_eq!((rig.used_chain(0), rig.used_chain(0)), (Some((2, 513)), None));
        }
    }

    #[test]
    fn a_resized_disk_tells_its_driver() {
        twice(|reload| {
            let disk = MemoryDisk::new(DISK_BYTES);
            let mut rig = rig(&disk, reload);
            let capacity = |rig: &mut Rig| (rig.read(0x2000, 4), rig.read(0x2004, 4));
            rig.start(1, 0);
            assert_eq!((capacity(&mut rig), rig.messages()), ((128, 0), vec![]));
            let before = rig.read(0x15, 1);
            disk.bytes.lock().resize(2 * DISK_BYTES, 9);
            rig.back_end_changed();
            // Vector 0 is that of the configuration.
            assert_eq!((capacity(&mut rig), rig.messages()), ((256, 0), vec![0x40]));
            if !reload {
                assert_ne!(rig.read(0x15, 1), before);
            }
            request(&mut rig, T_IN, 255, &[(BODY, 512, WRITE_ONLY)]);
            assert_eq!((rig.used(0), rig.get(STATUS, 1)[0]), (None, S_OK));
            // Nothing has changed: nothing is said.
            rig.messages();
            rig.back_end_changed();
            assert!(rig.messages().is_empty());
        });
    }

    #[test]
    fn several_queues_are_offered_and_each_lane_serves_its_own() {
        let queues = BlkQueues { count: 4, size: 8 };
        let disk = MemoryDisk::new(DISK_BYTES);
        let offered = model(&disk, queues);
        assert_eq!((offered.features & F_MQ, offered.queue_sizes.as_slice()), (F_MQ, &[8; 4][..]));
        assert_eq!((offered.config[34..36].to_vec(), offered.config[12]), (vec![4, 0], 6));
        assert_eq!(model(&disk, BlkQueues::default()).features & F_MQ, 0);
        for lanes in [1, 2, 4] {
            let disk = disk.clone();
            let mut rig =
                Rig::with_lanes(lanes, move || (model(&disk, queues), Blk::new(Box::new(disk.clone()), queues, "s")));
            rig.start(4, 0);
            for queue in 0..4u16 {
                let at = DATA + 0x100 * u64::from(queue);
                rig.put(at, &header(T_IN, queue.into()));
                rig.offer(queue, &[(at, 16, 0), (BODY, 512, WRITE_ONLY), (STATUS, 1, WRITE_ONLY)]);
                assert_eq!((rig.used(queue), rig.get(BODY, 2)), (Some(513), vec![queue as u8; 2]), "{lanes} lanes");
                assert_eq!(rig.rung(), [usize::from(queue) % lanes], "only its lane hears of it");
            }
            rig.reset_machine();
            rig.start(4, 0);
            rig.put(DATA, &header(T_FLUSH, 0));
            rig.offer(3, &[(DATA, 16, 0), (STATUS, 1, WRITE_ONLY)]);
            assert_eq!(rig.used(3), Some(1));
        }
    }

    #[test]
    fn a_read_only_disk_offers_no_changes_and_refuses_them() {
        let disk = MemoryDisk { read_only: true, ..MemoryDisk::new(DISK_BYTES) };
        let offered = model(&disk, BlkQueues::default()).features;
        assert_eq!(offered & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        let mut rig = rig(&disk, false);
        rig.start(1, 0);
        assert_eq!(request(&mut rig, T_DISCARD, 0, &[(BODY, 16, 0)]), (Some(1), S_IOERR));
    }

    #[test]
    fn a_disk_that_writes_through_offers_no_flush() {
        let cached = MemoryDisk::new(DISK_BYTES);
        assert_eq!(model(&cached, BlkQueues::default()).features & F_FLUSH, F_FLUSH);
        assert_eq!(model(&MemoryDisk { writes_through: true, ..cached }, BlkQueues::default()).features & F_FLUSH, 0);
    }

    #[test]
    fn hostile_chains_are_returned_or_break_the_device_but_nothing_else() {
        let cases: [(&str, Vec<Descriptor>, Option<u32>); 6] = [
            ("nothing writable", vec![(DATA, 16, 0)], Some(0)),
            ("readable behind writable", vec![(STATUS, 1, WRITE_ONLY), (DATA, 16, 0)], Some(0)),
            ("outside memory", vec![(RAM_BYTES - 8, 16, 0), (STATUS, 1, WRITE_ONLY)], Some(0)),
            ("wraps around", vec![(u64::MAX - 3, 16, 0), (STATUS, 1, WRITE_ONLY)], Some(0)),
            ("short header", vec![(DATA, 15, 0), (STATUS, 1, WRITE_ONLY)], Some(1)),
            ("everything", vec![(0, RAM_BYTES as u32, 0), (STATUS, 1, WRITE_ONLY)], Some(1)),
        ];
        for (name, chain, used) in cases {
            let disk = MemoryDisk::new(DISK_BYTES);
            let mut rig = rig(&disk, false);
            rig.start(1, 0);
            rig.offer(0, &chain);
            assert_eq!(rig.used(0), used, "{name}");
        }
        // A chain that leads to itself ends with the table.
        let mut rig = rig(&MemoryDisk::new(DISK_BYTES), false);
        rig.start(1, 0);
        rig.put(0, &[&DATA.to_le_bytes()[..], &16u32.to_le_bytes(), &1u16.to_le_bytes(), &0u16.to_le_bytes()].concat());
        rig.put(0x1004, &[0, 0]);
        rig.put(0x1002, &[1, 0]);
        rig.write(0x3000, 2, 0);
        // More chains than the ring holds: the device needs a reset, and works after it.
        rig.put(0x1002, &[0, 0x40]);
        rig.write(0x3000, 2, 0);
        assert_eq!(rig.read(0x14, 1) & 0x40, 0x40);
        rig.start(1, 0);
        for at in (0..0x3000).step_by(0x1000) {
            rig.put(at, &[0; 0x1000]);
        }
        rig.start(1, 0);
        assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (Some(1), S_OK));
    }
}
