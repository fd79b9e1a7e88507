//! A driver for tests: one controller, its queues in a small memory, a disk in memory.
//!
//! With `reload` the controller is saved, encoded, decoded and restored before every access, so that each test is a
//! snapshot test too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_ram::{Gpa, GuestRam};
use hv_core::{DiskBackend, DiskFault, GuestBuffer, IrqLine, LineTarget, Msi, MsiSink, Ring, Transfer, Work};
use parking_lot::Mutex;
use pci::PciFunction;

use crate::command::Status;
use crate::work::Working;
use crate::{Lent, NvmePci, halves};

const RAM_BYTES: u64 = 4 << 20;
const DISK_BYTES: usize = 2 << 20;
const ADMIN_SUBMISSION: u64 = 0x1000;
const ADMIN_COMPLETION: u64 = 0x2000;
const IO_SUBMISSION: u64 = 0x3000;
const IO_COMPLETION: u64 = 0x4000;
const LIST: u64 = 0x6000;
const DATA: u64 = 0x10_0000;
const ENTRIES: u32 = 16;

#[derive(Default)]
struct Wires {
    rung: AtomicBool,
    messages: Mutex<Vec<Msi>>,
    pin: AtomicBool,
}
impl Ring for Wires {
    fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
    }
    fn eventfd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}
impl MsiSink for Wires {
    fn signal(&self, msi: Msi) {
        self.messages.lock().push(msi);
    }
}
impl LineTarget for Wires {
    fn set_level(&self, _pin: u8, high: bool) {
        self.pin.store(high, Ordering::SeqCst);
    }
}

#[derive(Clone, Default)]
struct MemoryDisk {
    bytes: Arc<Mutex<Vec<u8>>>,
    fault: Arc<Mutex<Option<DiskFault>>>,
    /// What [`DiskBackend::admit`] answers to writes; `None`: go.
    admission: Arc<Mutex<Option<DiskFault>>>,
    log: Arc<Mutex<Vec<String>>>,
    read_only: bool,
}

fn length(buffers: &[GuestBuffer<'_>]) -> usize {
    buffers.iter().map(|b| b.len()).sum()
}

impl MemoryDisk {
    fn new() -> MemoryDisk {
        let disk = MemoryDisk::default();
        disk.bytes.lock().extend((0..DISK_BYTES).map(|i| (i / 512) as u8));
        disk
    }
    fn request(&self, what: String) -> Result<(), DiskFault> {
        self.log.lock().push(what);
        self.fault.lock().map_or(Ok(()), Err)
    }
    fn asked(&self) -> String {
        std::mem::take(&mut *self.log.lock()).join(" ")
    }
}

impl DiskBackend for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn admit(&mut self, transfer: Transfer, _bytes: u64) -> Result<(), DiskFault> {
        self.admission.lock().filter(|_| transfer == Transfer::Write).map_or(Ok(()), Err)
    }
    fn read(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        self.request(format!("read {offset}+{}", length(buffers)))?;
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from(&self.bytes.lock()[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }
    fn write(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        self.request(format!("write {offset}+{}", length(buffers)))?;
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_to(&mut self.bytes.lock()[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }
    fn flush(&mut self) -> Result<(), DiskFault> {
        self.request("flush".into())
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault> {
        self.request(format!("discard {offset}+{bytes}"))
    }
    fn write_zeroes(&mut self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), DiskFault> {
        self.request(format!("zero {offset}+{bytes}{}", if may_unmap { " unmap" } else { "" }))
    }
}

/// A command: opcode, namespace, data pointers, dwords 10 to 12.
#[derive(Clone, Copy, Default)]
struct Sent {
    opcode: u8,
    namespace: u32,
    prp: [u64; 2],
    dwords: [u32; 3],
}

struct Rig {
    ram: GuestRam,
    function: Option<NvmePci>,
    work: Working,
    wires: Arc<Wires>,
    disk: MemoryDisk,
    reload: bool,
    tails: [u32; 2],
    heads: [u32; 2],
    next_id: u16,
}

fn make(ram: &GuestRam, wires: &Arc<Wires>, disk: &MemoryDisk) -> (NvmePci, Working) {
    let lent = Lent {
        memory: ram.memory().clone(),
        messages: wires.clone(),
        interrupt_pin: IrqLine::new(wires.clone(), 0),
        bell: wires.clone(),
    };
    halves(Box::new(disk.clone()), "disk 1", lent)
}

impl Rig {
    fn new(disk: &MemoryDisk, reload: bool) -> Rig {
        let ram = GuestRam::new(&[(Gpa(0), RAM_BYTES)]).unwrap();
        let wires = Arc::<Wires>::default();
        let (function, work) = make(&ram, &wires, disk);
        let disk = disk.clone();
        let (tails, heads) = ([0; 2], [0; 2]);
        Rig { ram, function: Some(function), work, wires, disk, reload, tails, heads, next_id: 0 }
    }
    fn settle(&mut self) {
        while self.wires.rung.swap(false, Ordering::SeqCst) {
            self.work.work();
        }
    }
    fn before_access(&mut self) {
        if !self.reload {
            return;
        }
        let mut old = self.function.take().unwrap();
        old.stop_queues();
        self.settle();
        let state = hv_null::golden::recode(&old.save());
        let (function, work) = make(&self.ram, &self.wires, &self.disk);
        self.work = work;
        self.function = Some(function.restore(state, self.wires.clone()).unwrap());
        self.settle();
    }
    fn read(&mut self, offset: u64, bytes: u8) -> u64 {
        self.before_access();
        let value = self.function.as_mut().unwrap().window_read(0, offset, bytes);
        self.settle();
        value
    }
    fn write(&mut self, offset: u64, bytes: u8, value: u64) {
        self.before_access();
        self.function.as_mut().unwrap().window_write(0, offset, bytes, value);
        self.settle();
    }
    fn enable(&mut self) {
        self.write(0x24, 4, u64::from((ENTRIES - 1) << 16 | (ENTRIES - 1)));
        self.write(0x28, 8, ADMIN_SUBMISSION);
        self.write(0x30, 8, ADMIN_COMPLETION);
        self.write(0x14, 4, 0x46_0001);
        assert_eq!(self.read(0x1c, 4), 1, "the controller is ready");
    }
    fn disable(&mut self) {
        self.write(0x14, 4, 0);
        (self.tails, self.heads) = ([0; 2], [0; 2]);
        self.ram.write(Gpa(0), &[0; 0x6000]).unwrap();
    }

    /// Puts a command into queue 0 or 1 and rings.
    fn submit(&mut self, queue: usize, sent: Sent) {
        self.next_id += 1;
        let mut entry = [0u8; 64];
        entry[0] = sent.opcode;
        entry[2..4].copy_from_slice(&self.next_id.to_le_bytes());
        entry[4..8].copy_from_slice(&sent.namespace.to_le_bytes());
        for (i, prp) in sent.prp.iter().enumerate() {
            entry[24 + 8 * i..32 + 8 * i].copy_from_slice(&prp.to_le_bytes());
        }
        for (i, dword) in sent.dwords.iter().enumerate() {
            entry[40 + 4 * i..44 + 4 * i].copy_from_slice(&dword.to_le_bytes());
        }
        let base = [ADMIN_SUBMISSION, IO_SUBMISSION][queue];
        self.ram.write(Gpa(base + 64 * u64::from(self.tails[queue] % ENTRIES)), &entry).unwrap();
        self.tails[queue] += 1;
        self.write(0x1000 + 8 * queue as u64, 4, (self.tails[queue] % ENTRIES).into());
    }
    /// The next completion of a queue: status, dword 0. `None`: there is none.
    fn completion(&mut self, queue: usize) -> Option<(Status, u32)> {
        let base = [ADMIN_COMPLETION, IO_COMPLETION][queue];
        let mut entry = [0u8; 16];
        self.ram.read(Gpa(base + 16 * u64::from(self.heads[queue] % ENTRIES)), &mut entry).unwrap();
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        let phase = (self.heads[queue] / ENTRIES).is_multiple_of(2);
        if (word(12) >> 16 & 1 == 1) != phase {
            return None;
        }
        assert_eq!(word(12) as u16, self.next_id);
        assert_eq!(word(8), (self.tails[queue] % ENTRIES) | (queue as u32) << 16);
        self.heads[queue] += 1;
        self.write(0x1004 + 8 * queue as u64, 4, (self.heads[queue] % ENTRIES).into());
        // Without the bits "do not retry" and "more".
        Some((Status((word(12) >> 17) as u16 & 0x7ff), word(0)))
    }
    fn admin(&mut self, sent: Sent) -> (Status, u32) {
        self.submit(0, sent);
        self.completion(0).expect("a completion")
    }
    fn io(&mut self, sent: Sent) -> Status {
        self.submit(1, Sent { namespace: 1, ..sent });
        self.completion(1).expect("a completion").0
    }
    /// An I/O queue pair with vector 1.
    fn create_queues(&mut self) {
        let size = (ENTRIES - 1) << 16 | 1;
        let made =
            self.admin(Sent { opcode: 5, prp: [IO_COMPLETION, 0], dwords: [size, 1 << 16 | 3, 0], ..Sent::default() });
        assert_eq!(made, (Status::SUCCESS, 0));
        let made =
            self.admin(Sent { opcode: 1, prp: [IO_SUBMISSION, 0], dwords: [size, 1 << 16 | 1, 0], ..Sent::default() });
        assert_eq!(made, (Status::SUCCESS, 0));
    }
    fn data(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.ram.read(Gpa(at), &mut data).unwrap();
        data
    }
    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Gpa(at), bytes).unwrap();
    }
}

fn twice(test: impl Fn(&MemoryDisk, Rig)) {
    for reload in [false, true] {
        let disk = MemoryDisk::new();
        let rig = Rig::new(&disk, reload);
        test(&disk, rig);
    }
}

#[test]
fn the_saved_state_keeps_its_encoding() {
    let mut rig = Rig::new(&MemoryDisk::new(), false);
    rig.enable();
    rig.create_queues();
    rig.submit(0, Sent { opcode: 0xc, ..Sent::default() });
    let function = rig.function.as_mut().unwrap();
    function.stop_queues();
    rig.settle();
    let state = rig.function.as_mut().unwrap().save();
    hv_null::golden::check("testdata/states/nvme-v1.hex".as_ref(), &state);
}

#[test]
fn registers_after_reset_and_their_read_only_bits() {
    twice(|_, mut rig| {
        for (offset, want) in [(0x00, 0x1401_03ff), (0x04, 0x20), (0x08, 0x0001_0400), (0x14, 0), (0x1c, 0)] {
            rig.write(offset, 4, 0);
            assert_eq!(rig.read(offset, 4), want, "{offset:#x}");
        }
        rig.write(0x24, 4, u32::MAX.into());
        rig.write(0x28, 8, u64::MAX);
        assert_eq!((rig.read(0x24, 4), rig.read(0x28, 8)), (0x0fff_0fff, !0xfff));
        rig.write(0x28, 2, 0);
        assert_eq!(rig.read(0x28, 8), !0xfff, "half a dword is not written");
        assert_eq!(rig.read(0x3f00, 4), 0);
    });
}

#[test]
fn a_controller_is_enabled_disabled_and_shut_down() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.write(0x28, 8, 0x5000);
        assert_eq!(rig.read(0x28, 8), ADMIN_SUBMISSION, "queues are fixed while the controller is on");
        rig.write(0x14, 4, 0x46_4001);
        assert_eq!((rig.read(0x1c, 4), disk.asked().as_str()), (0b1001, "flush"));
        rig.disable();
        assert_eq!(rig.read(0x1c, 4), 0);
        rig.enable();
    });
}

#[test]
fn impossible_set_ups_are_fatal_until_the_next_reset() {
    twice(|_, mut rig| {
        for (asq, aqa, cc) in [
            (RAM_BYTES, 0xf_000f, 0x46_0001),
            (!0xfff, 0xf_000f, 0x46_0001),
            (ADMIN_SUBMISSION, 0xf_0000, 0x46_0001),
            (ADMIN_SUBMISSION, 0xf_000f, 0x46_0081),
            (ADMIN_SUBMISSION, 0xf_000f, 0x55_0001),
        ] {
            rig.write(0x24, 4, aqa);
            rig.write(0x28, 8, asq);
            rig.write(0x30, 8, ADMIN_COMPLETION);
            rig.write(0x14, 4, cc);
            assert_eq!(rig.read(0x1c, 4), 2, "{asq:#x} {aqa:#x} {cc:#x}");
            rig.write(0x1000, 4, 1);
            rig.disable();
            assert_eq!(rig.read(0x1c, 4), 0);
        }
        rig.enable();
    });
}

#[test]
fn identify_tells_what_there_is() {
    twice(|_, mut rig| {
        rig.enable();
        let mut identify = |cns, namespace| {
            let sent = Sent { opcode: 6, namespace, prp: [DATA, 0], dwords: [cns, 0, 0] };
            (rig.admin(sent).0, rig.data(DATA, 4096))
        };
        let (status, page) = identify(1, 0);
        assert_eq!(
            (status, &page[4..24], &page[24..39]),
            (Status::SUCCESS, &b"disk1               "[..], &b"Vireo NVMe disk"[..])
        );
        assert_eq!((page[77], &page[512..514], page[516], page[520], page[525]), (7, &[0x66, 0x44][..], 1, 0xc, 1));
        assert!(page[768..].starts_with(b"nqn.2026-01.org.vireo:nvme:disk1\0"));
        let (status, page) = identify(0, 1);
        assert_eq!((status, &page[..8], page[99], page[130]), (Status::SUCCESS, &4096u64.to_le_bytes()[..], 0, 9));
        let (status, page) = identify(2, 0);
        assert_eq!((status, &page[..8]), (Status::SUCCESS, &[1, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(identify(2, 1).1, [0; 4096]);
        assert_eq!((identify(0, 2).0, identify(3, 7).0), (Status::INVALID_NAMESPACE, Status::INVALID_NAMESPACE));
        assert_eq!(identify(9, 0).0, Status::INVALID_FIELD);
    });
}

#[test]
fn admin_commands_answer_as_the_specification_says() {
    let queue = |entries: u32, id: u32| (entries - 1) << 16 | id;
    let ok = Status::SUCCESS;
    // opcode, data pointer, dwords 10 to 12, status, dword 0
    let cases = [
        (9, 0, [7, 0x00ff_00ff, 0], ok, 0x000f_000f),
        (9, 0, [7, 0xffff, 0], Status::INVALID_FIELD, 0),
        (10, 0, [7, 0, 0], ok, 0x000f_000f),
        (10, 0, [6, 0, 0], ok, 1),
        (9, 0, [6, 0, 0], ok, 0),
        (10, 0, [6, 0, 0], ok, 0),
        (10, 0, [0x106, 0, 0], ok, 1),
        (9, 0, [0x2, 1, 0], Status::INVALID_FIELD, 0),
        (9, 0, [0x77, 0, 0], Status::INVALID_FIELD, 0),
        (10, 0, [0x77, 0, 0], Status::INVALID_FIELD, 0),
        (8, 0, [0, 0, 0], ok, 1),
        (2, DATA, [127 << 16 | 2, 0, 0], ok, 0),
        (2, DATA, [127 << 16 | 3, 0, 0], ok, 0),
        (2, DATA, [127 << 16 | 1, 0, 64], ok, 0),
        (2, DATA, [127 << 16 | 2, 0, 513], Status::INVALID_FIELD, 0),
        (2, DATA, [127 << 16 | 2, 0, 516], Status::INVALID_FIELD, 0),
        (2, DATA, [0x70, 0, 0], Status::LOG_PAGE, 0),
        (0x7f, 0, [0, 0, 0], Status::INVALID_OPCODE, 0),
        (1, IO_SUBMISSION, [queue(16, 1), 1 << 16 | 1, 0], Status::COMPLETION_QUEUE, 0),
        (5, IO_COMPLETION, [queue(16, 0), 3, 0], Status::QUEUE_ID, 0),
        (5, IO_COMPLETION, [queue(16, 17), 3, 0], Status::QUEUE_ID, 0),
        (5, IO_COMPLETION, [queue(1, 1), 3, 0], Status::QUEUE_SIZE, 0),
        (5, IO_COMPLETION, [queue(1025, 1), 3, 0], Status::QUEUE_SIZE, 0),
        (5, IO_COMPLETION, [queue(16, 1), 2, 0], Status::INVALID_FIELD, 0),
        (5, IO_COMPLETION, [queue(16, 1), 17 << 16 | 3, 0], Status::INTERRUPT_VECTOR, 0),
        (5, IO_COMPLETION + 8, [queue(16, 1), 3, 0], Status::PRP_OFFSET, 0),
        (5, RAM_BYTES, [queue(16, 1), 3, 0], Status::PRP_OFFSET, 0),
        (5, IO_COMPLETION, [queue(16, 1), 3, 0], ok, 0),
        (5, IO_COMPLETION, [queue(16, 1), 3, 0], Status::QUEUE_ID, 0),
        (1, IO_SUBMISSION, [queue(16, 1), 1 << 16 | 1, 0], ok, 0),
        (1, IO_SUBMISSION, [queue(16, 1), 1 << 16 | 1, 0], Status::QUEUE_ID, 0),
        (9, 0, [7, 0, 0], Status::SEQUENCE, 0),
        (4, 0, [1, 0, 0], Status::QUEUE_DELETION, 0),
        (0, 0, [1, 0, 0], ok, 0),
        (0, 0, [1, 0, 0], Status::QUEUE_ID, 0),
        (0, 0, [0, 0, 0], Status::QUEUE_ID, 0),
        (4, 0, [1, 0, 0], ok, 0),
        (4, 0, [1, 0, 0], Status::QUEUE_ID, 0),
    ];
    twice(|_, mut rig| {
        rig.enable();
        for (opcode, prp, dwords, status, dword0) in cases {
            let answer = rig.admin(Sent { opcode, prp: [prp, 0], dwords, ..Sent::default() });
            assert_eq!(answer, (status, dword0), "opcode {opcode:#x}, {dwords:x?}");
        }
    });
}

#[test]
fn event_requests_wait_and_a_fifth_is_refused() {
    twice(|_, mut rig| {
        rig.enable();
        for _ in 0..4 {
            rig.submit(0, Sent { opcode: 0xc, ..Sent::default() });
            assert_eq!(rig.completion(0), None);
        }
        assert_eq!(rig.admin(Sent { opcode: 0xc, ..Sent::default() }).0, Status::TOO_MANY_EVENT_REQUESTS);
    });
}

#[test]
fn io_commands_reach_the_disk() {
    let ok = Status::SUCCESS;
    // opcode, data pointers, first block, dword 12, status, what the disk was asked
    let cases = [
        (2, [DATA, 0], 3, 0, ok, "read 1536+512"),
        (2, [DATA + 512, DATA + 4096], 8, 7, ok, "read 4096+4096"),
        (2, [DATA, DATA + 8192], 0, 15, ok, "read 0+8192"),
        (2, [DATA, DATA + 8], 0, 15, Status::PRP_OFFSET, ""),
        (2, [DATA, LIST], 0, 31, ok, "read 0+16384"),
        (2, [DATA, LIST + 4], 0, 31, Status::PRP_OFFSET, ""),
        (2, [DATA, RAM_BYTES], 0, 31, Status::DATA_TRANSFER, ""),
        (2, [RAM_BYTES, 0], 0, 0, Status::DATA_TRANSFER, ""),
        (2, [u64::MAX, 0], 0, 0, Status::DATA_TRANSFER, ""),
        (2, [DATA, LIST], 0, 1024, Status::INVALID_FIELD, ""),
        (2, [DATA, 0], 4096, 0, Status::OUT_OF_RANGE, ""),
        (2, [DATA, 0], u64::MAX, 0, Status::OUT_OF_RANGE, ""),
        (1, [DATA, 0], 1, 0, ok, "write 512+512"),
        (1, [DATA, 0], 1, 1 << 30, ok, "write 512+512 flush"),
        (0, [0, 0], 0, 0, ok, "flush"),
        (8, [0, 0], 2, 1 << 25 | 3, ok, "zero 1024+2048 unmap"),
        (8, [0, 0], 2, 3, ok, "zero 1024+2048"),
        (8, [0, 0], 4095, 1, Status::OUT_OF_RANGE, ""),
        (0x55, [0, 0], 0, 0, Status::INVALID_OPCODE, ""),
    ];
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        let list: Vec<u8> = (1..8u64).flat_map(|page| (DATA + 4096 * (8 - page)).to_le_bytes()).collect();
        rig.put(LIST, &list);
        for (opcode, prp, first, dword12, status, asked) in cases {
            let dwords = [first as u32, (first >> 32) as u32, dword12];
            assert_eq!(rig.io(Sent { opcode, prp, dwords, ..Sent::default() }), status, "{opcode} {prp:x?} at {first}");
            assert_eq!(disk.asked(), asked, "{opcode} {prp:x?} at {first}");
        }
        rig.submit(1, Sent { opcode: 2, namespace: 2, ..Sent::default() });
        assert_eq!(rig.completion(1), Some((Status::INVALID_NAMESPACE, 0)));
        // Without a write cache every write is durable.
        assert_eq!(rig.admin(Sent { opcode: 9, dwords: [6, 0, 0], ..Sent::default() }).0, ok);
        assert_eq!(rig.io(Sent { opcode: 1, prp: [DATA, 0], ..Sent::default() }), ok);
        assert_eq!(disk.asked(), "write 0+512 flush");
    });
}

#[test]
fn data_lands_on_the_pages_of_the_list_in_its_order() {
    twice(|_, mut rig| {
        rig.enable();
        rig.create_queues();
        // 130 pages: the list starts at the end of a page, which then leads on.
        let page = |i: u64| DATA + 4096 * (i * 7 % 131);
        rig.put(LIST + 4096 - 16, &[page(1).to_le_bytes(), (LIST + 8192).to_le_bytes()].concat());
        let rest: Vec<u8> = (2..128).flat_map(|i| page(i).to_le_bytes()).collect();
        rig.put(LIST + 8192, &rest);
        let sent = Sent { opcode: 2, prp: [page(0), LIST + 4096 - 16], dwords: [0, 0, 1023], ..Sent::default() };
        assert_eq!(rig.io(sent), Status::SUCCESS);
        for i in 0..128u64 {
            assert_eq!(rig.data(page(i), 513)[511..], [(i * 8) as u8, (i * 8 + 1) as u8], "page {i}");
        }
        // A transfer that starts within a page goes on at the start of the next.
        let sent = Sent { opcode: 2, prp: [DATA + 4096 - 512, DATA + 65536], dwords: [1, 0, 2], ..Sent::default() };
        assert_eq!(rig.io(sent), Status::SUCCESS);
        assert_eq!(rig.data(DATA + 4096 - 512, 512), [1; 512]);
        assert_eq!((rig.data(DATA + 65536, 512), rig.data(DATA + 65536 + 512, 512)), (vec![2; 512], vec![3; 512]));
        // A list whose pages lead to their own last entries has no end, and is refused.
        let at = LIST + 4096 - 8;
        rig.put(at, &at.to_le_bytes());
        let sent = Sent { opcode: 2, prp: [DATA, at], dwords: [0, 0, 1023], ..Sent::default() };
        assert_eq!(rig.io(sent), Status::PRP_OFFSET);
    });
}

#[test]
fn ranges_are_discarded_only_where_that_is_asked() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        let range = |first: u64, blocks: u32| [&[0; 4][..], &blocks.to_le_bytes(), &first.to_le_bytes()].concat();
        rig.put(DATA, &[range(8, 16), range(100, 1)].concat());
        let manage = |count: u32, attributes| Sent {
            opcode: 9,
            prp: [DATA, 0],
            dwords: [count - 1, attributes, 0],
            ..Sent::default()
        };
        assert_eq!(
            (rig.io(manage(2, 4)), disk.asked().as_str()),
            (Status::SUCCESS, "discard 4096+8192 discard 51200+512")
        );
        assert_eq!((rig.io(manage(2, 3)), disk.asked().as_str()), (Status::SUCCESS, ""));
        rig.put(DATA + 16, &range(4096, 1));
        assert_eq!((rig.io(manage(2, 4)), disk.asked().as_str()), (Status::OUT_OF_RANGE, ""));
    });
}

#[test]
fn faults_are_reported_or_held_until_the_machine_resumes() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        let write = Sent { opcode: 1, namespace: 1, prp: [DATA, 0], ..Sent::default() };
        *disk.fault.lock() = Some(DiskFault::Report);
        assert_eq!(rig.io(write), Status::WRITE_FAULT);
        assert_eq!(rig.io(Sent { opcode: 2, ..write }), Status::READ_ERROR);
        *disk.fault.lock() = Some(DiskFault::Hold);
        rig.submit(1, write);
        assert_eq!(rig.completion(1), None);
        *disk.fault.lock() = None;
        rig.work.resumed();
        rig.work.work();
        assert_eq!(rig.completion(1), Some((Status::SUCCESS, 0)));
    });
}

#[test]
fn a_command_that_must_wait_is_tried_again_and_other_queues_go_on() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        let write = Sent { opcode: 1, namespace: 1, prp: [DATA, 0], ..Sent::default() };
        *disk.admission.lock() = Some(DiskFault::Wait);
        rig.submit(1, write);
        assert_eq!((rig.completion(1), rig.work.interest().readable), (None, true));
        rig.admin(Sent { opcode: 6, namespace: 1, prp: [DATA, 0], ..Sent::default() });
        assert_eq!((rig.completion(1), rig.work.interest().readable), (None, true), "it is not time yet");
        *disk.admission.lock() = None;
        rig.work.work();
        // The answer to the command before the last.
        rig.next_id -= 1;
        assert_eq!((rig.completion(1), rig.work.interest().readable), (Some((Status::SUCCESS, 0)), false));
    });
}

#[test]
fn a_resized_disk_is_noticed_by_a_driver_that_waits_for_it() {
    let disk = MemoryDisk::new();
    let mut rig = Rig::new(&disk, false);
    rig.enable();
    let features = Sent { opcode: 9, dwords: [0x0b, 1 << 8, 0], ..Sent::default() };
    assert_eq!(rig.admin(features), (Status::SUCCESS, 0));
    rig.submit(0, Sent { opcode: 0x0c, ..Sent::default() });
    assert_eq!(rig.completion(0), None);
    disk.bytes.lock().resize(2 * DISK_BYTES, 0);
    rig.work.back_end_changed();
    rig.work.work();
    // Notice, namespace attributes, log page 4.
    assert_eq!(rig.completion(0), Some((Status::SUCCESS, 0x0004_0002)));
    let log = Sent { opcode: 2, namespace: u32::MAX, prp: [DATA, 0], dwords: [1023 << 16 | 4, 0, 0] };
    for (dword, expected) in [(1 << 15, 1), (0, 1), (0, 0)] {
        let log = Sent { dwords: [log.dwords[0] | dword, 0, 0], ..log };
        assert_eq!(rig.admin(log), (Status::SUCCESS, 0));
        assert_eq!(rig.data(DATA, 4), [expected, 0, 0, 0]);
    }
    rig.admin(Sent { opcode: 6, namespace: 1, prp: [DATA, 0], ..Sent::default() });
    assert_eq!(rig.data(DATA, 8), (2 * DISK_BYTES as u64 / 512).to_le_bytes());
    // A driver that did not ask is not told.
    rig.admin(Sent { dwords: [0x0b, 0, 0], ..features });
    rig.submit(0, Sent { opcode: 0x0c, ..Sent::default() });
    rig.work.back_end_changed();
    rig.work.work();
    assert_eq!(rig.completion(0), None);
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let disk = MemoryDisk { read_only: true, ..MemoryDisk::new() };
    let mut rig = Rig::new(&disk, false);
    rig.enable();
    rig.create_queues();
    for opcode in [1, 8] {
        assert_eq!(rig.io(Sent { opcode, prp: [DATA, 0], ..Sent::default() }), Status::READ_ONLY);
    }
    rig.admin(Sent { opcode: 6, namespace: 1, prp: [DATA, 0], ..Sent::default() });
    assert_eq!(rig.data(DATA, 100)[99], 1);
}

#[test]
fn completions_interrupt_by_pin_or_by_their_vector() {
    twice(|_, mut rig| {
        rig.enable();
        let pin = |rig: &Rig| rig.wires.pin.load(Ordering::SeqCst);
        rig.submit(0, Sent { opcode: 8, ..Sent::default() });
        assert!(pin(&rig));
        rig.write(0x0c, 4, 1);
        assert!(!pin(&rig), "masked");
        rig.write(0x10, 4, 1);
        assert!(pin(&rig));
        rig.completion(0).unwrap();
        assert!(!pin(&rig), "the driver has taken everything");
        for vector in 0..2u64 {
            rig.write(0x2000 + 16 * vector, 4, 0xfee0_0000);
            rig.write(0x2000 + 16 * vector + 8, 4, 0x50 + vector);
            rig.write(0x2000 + 16 * vector + 12, 4, 0);
        }
        let function = rig.function.as_mut().unwrap();
        let at = function.config_read(0x34, 1) as u8;
        function.config_write(at + 2, 2, 0x8000);
        rig.create_queues();
        rig.io(Sent { opcode: 0, ..Sent::default() });
        let data: Vec<u32> = rig.wires.messages.lock().iter().map(|msi| msi.data).collect();
        assert_eq!((data, pin(&rig)), (vec![0x50, 0x50, 0x51], false));
    });
}

#[test]
fn a_full_completion_queue_holds_commands_back() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        for _ in 0..ENTRIES - 1 {
            rig.submit(1, Sent { opcode: 0, namespace: 1, ..Sent::default() });
        }
        disk.asked();
        rig.submit(1, Sent { opcode: 0, namespace: 1, ..Sent::default() });
        assert_eq!(disk.asked(), "", "15 of 16 entries are taken, one stays free");
        rig.write(0x100c, 4, 3);
        assert_eq!(disk.asked(), "flush");
    });
}

#[test]
fn doorbells_that_say_nonsense_are_ignored() {
    twice(|disk, mut rig| {
        rig.enable();
        rig.create_queues();
        disk.asked();
        for (offset, value) in [(0x1008, 16), (0x1008, u64::from(u32::MAX)), (0x1010, 1), (0x1ffc, 1), (0x1088, 1)] {
            rig.write(offset, 4, value);
        }
        assert_eq!((rig.completion(0), rig.completion(1), disk.asked().as_str()), (None, None, ""));
        rig.write(0x1008, 4, 0);
        assert_eq!(rig.io(Sent { opcode: 0, ..Sent::default() }), Status::SUCCESS);
    });
}
