//! A driver for tests: one device, its rings in a small memory, an in-memory back end.
//!
//! With `reload` the device is saved, encoded, decoded and restored before every access, so that each test is a snapshot
//! test too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_ram::{Gpa, GuestRam};
use hv_core::{Begun, DiskBackend, DiskFault, GuestBuffer, IrqLine, Msi, MsiSink, Over, Ring, Transfer, Work};
use parking_lot::Mutex;
use pci::PciFunction;

use crate::model::{F_EVENT_IDX, F_VERSION_1, Model};
use crate::work::Device;
use crate::{Lent, VirtioPci, pci_device};

pub(crate) const RAM_BYTES: u64 = 1 << 20;
const QUEUE_ENTRIES: u16 = 8;
/// Rings of queue `n` start at `n * RING_STEP`: descriptors, available ring, used ring.
const RING_STEP: u64 = 0x3000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where tests put data.
pub(crate) const DATA: u64 = 0x1_0000;
const BAR: u64 = 0xfe00_0000;
pub(crate) const WRITE_ONLY: u16 = 2;
pub(crate) const NEXT: u16 = 1;
pub(crate) const INDIRECT: u16 = 4;

#[derive(Default)]
pub(crate) struct Bell(AtomicBool);
impl Ring for Bell {
    fn ring(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn eventfd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

#[derive(Default)]
pub(crate) struct Messages(Mutex<Vec<Msi>>);
impl MsiSink for Messages {
    fn signal(&self, msi: Msi) {
        self.0.lock().push(msi);
    }
}

/// A disk in memory, with a fault to answer with.
#[derive(Clone, Default)]
pub(crate) struct MemoryDisk {
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
    pub(crate) fault: Arc<Mutex<Option<DiskFault>>>,
    /// What [`DiskBackend::admit`] answers; `None`: go.
    pub(crate) admission: Arc<Mutex<Option<DiskFault>>>,
    /// What it was asked.
    pub(crate) admitted: Arc<Mutex<Vec<(Transfer, u64)>>>,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    pub(crate) read_only: bool,
    /// Every write is stable at once.
    pub(crate) writes_through: bool,
    /// What goes on by itself; `None`: nothing does.
    pub(crate) flights: Arc<Mutex<Option<Flights>>>,
}

/// Transfers of a disk that go on by themselves. Their data moves when they begin.
#[derive(Default)]
pub(crate) struct Flights {
    under_way: Vec<u64>,
    over: Vec<Over>,
}

impl Flights {
    /// Lets the transfer that is `place`th end.
    pub(crate) fn end(&mut self, place: usize, good: bool) {
        let tag = self.under_way.remove(place);
        self.over.push(Over { tag, good });
    }
}

impl MemoryDisk {
    pub(crate) fn new(bytes: usize) -> MemoryDisk {
        let disk = MemoryDisk::default();
        disk.bytes.lock().extend((0..bytes).map(|i| (i / 512) as u8));
        disk
    }
    fn request(&self, what: String, offset: u64, bytes: u64) -> Result<std::ops::Range<usize>, DiskFault> {
        self.log.lock().push(what);
        if let Some(fault) = *self.fault.lock() {
            return Err(fault);
        }
        let end = offset.checked_add(bytes).filter(|&end| end <= self.bytes.lock().len() as u64);
        end.map(|end| offset as usize..end as usize).ok_or(DiskFault::Report)
    }
}

fn length(buffers: &[GuestBuffer<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

impl DiskBackend for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn write_cache(&self) -> bool {
        !self.writes_through
    }
    fn admit(&mut self, transfer: Transfer, bytes: u64) -> Result<(), DiskFault> {
        self.admitted.lock().push((transfer, bytes));
        self.admission.lock().map_or(Ok(()), Err)
    }
    fn begin(&mut self, transfer: Transfer, offset: u64, buffers: &[GuestBuffer<'_>], tag: u64) -> Begun {
        let flights = self.flights.clone();
        let mut flights = flights.lock();
        let Some(flights) = &mut *flights else { return Begun::Refused };
        let fault = self.fault.lock().take();
        let begun = match transfer {
            Transfer::Read => self.read(offset, buffers),
            Transfer::Write => self.write(offset, buffers),
        };
        *self.fault.lock() = fault;
        assert!(begun.is_ok());
        flights.under_way.push(tag);
        Begun::UnderWay
    }
    fn next_over(&mut self) -> Option<Over> {
        self.flights.lock().as_mut()?.over.pop()
    }
    fn wait(&mut self) {
        if let Some(flights) = &mut *self.flights.lock() {
            flights.end(0, self.fault.lock().is_none());
        }
    }
    fn read(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        let range = self.request(format!("read {offset}+{}", length(buffers)), offset, length(buffers))?;
        let mut at = range.start;
        for buffer in buffers {
            buffer.copy_from(&self.bytes.lock()[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }
    fn write(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        let range = self.request(format!("write {offset}+{}", length(buffers)), offset, length(buffers))?;
        let mut at = range.start;
        for buffer in buffers {
            buffer.copy_to(&mut self.bytes.lock()[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }
    fn flush(&mut self) -> Result<(), DiskFault> {
        self.request("flush".into(), 0, 0).map(|_| ())
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault> {
        self.request(format!("discard {offset}+{bytes}"), offset, bytes).map(|_| ())
    }
    fn write_zeroes(&mut self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), DiskFault> {
        let unmap = if may_unmap { " unmap" } else { "" };
        let range = self.request(format!("zero {offset}+{bytes}{unmap}"), offset, bytes)?;
        self.bytes.lock()[range].fill(0);
        Ok(())
    }
}

/// One descriptor: address, length, flags.
pub(crate) type Descriptor = (u64, u32, u16);

type Make = Box<dyn Fn(Lent) -> (VirtioPci, Box<dyn Work>)>;

/// Further lanes of a device: working halves with their bells.
type MoreLanes = Vec<(Box<dyn Work>, Arc<Bell>)>;

/// A device and its driver.
pub(crate) struct Rig {
    pub(crate) ram: GuestRam,
    function: Option<VirtioPci>,
    work: Box<dyn Work>,
    bell: Arc<Bell>,
    more_lanes: MoreLanes,
    /// Lanes that were rung.
    rung: Vec<usize>,
    messages: Arc<Messages>,
    make: Make,
    reload: bool,
    available: [u16; 4],
    seen: [u16; 4],
}

impl Rig {
    /// The device that `parts` describes, BAR 4 mapped, its MSI-X vectors 0 and 1 open.
    pub(crate) fn new<D: Device + 'static>(reload: bool, parts: impl Fn() -> (Model, D) + 'static) -> Rig {
        let make: Make = Box::new(move |lent| {
            let (model, device) = parts();
            let (function, working) = pci_device::build(model, device, lent);
            (function, Box::new(working) as Box<dyn Work>)
        });
        let ram = GuestRam::new(&[(Gpa(0), RAM_BYTES)]).unwrap();
        let (bell, messages) = (Arc::<Bell>::default(), Arc::<Messages>::default());
        let lent = lent(&ram, &bell, &messages);
        let (mut function, work) = make(lent);
        function.config_write(0x20, 4, BAR as u32);
        function.config_write(4, 2, 6);
        let mut rig = Rig {
            ram,
            function: Some(function),
            work,
            bell,
            more_lanes: Vec::new(),
            rung: Vec::new(),
            messages,
            make,
            reload,
            available: [0; 4],
            seen: [0; 4],
        };
        rig.open_vectors();
        rig
    }

    /// The device that `parts` describes, each lane with a device of its own.
    pub(crate) fn with_lanes<D: Device + 'static>(lanes: usize, parts: impl Fn() -> (Model, D) + 'static) -> Rig {
        let parts = Arc::new(parts);
        let first = parts.clone();
        let mut rig = Rig::new(false, move || first());
        let bells: Vec<Arc<Bell>> = (1..lanes).map(|_| Arc::default()).collect();
        let devices = (0..lanes).map(|_| parts().1).collect();
        let more = bells.iter().map(|bell| bell.clone() as Arc<dyn Ring>).collect();
        let lent = lent(&rig.ram, &rig.bell, &rig.messages);
        let (function, working) = pci_device::build_lanes(parts().0, devices, lent, more);
        let mut working = working.into_iter().map(|lane| Box::new(lane) as Box<dyn Work>);
        rig.work = working.next().unwrap();
        rig.more_lanes = working.zip(bells).collect();
        rig.function = Some(function);
        rig.function().config_write(0x20, 4, BAR as u32);
        rig.function().config_write(4, 2, 6);
        rig.open_vectors();
        rig
    }

    /// Lanes that were rung since last asked.
    pub(crate) fn rung(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.rung)
    }

    pub(crate) fn function(&mut self) -> &mut VirtioPci {
        self.function.as_mut().unwrap()
    }

    fn open_vectors(&mut self) {
        let function = self.function();
        for vector in 0..2u64 {
            function.window_write(1, 16 * vector, 4, 0xfee0_0000);
            function.window_write(1, 16 * vector + 8, 4, 0x40 + vector);
            function.window_write(1, 16 * vector + 12, 4, 0);
        }
        let mut at = function.config_read(0x34, 1) as u8;
        while function.config_read(at, 1) != 0x11 {
            at = function.config_read(at + 1, 1) as u8;
        }
        function.config_write(at + 2, 2, 0x8000);
    }

    fn settle(&mut self) {
        while self.bell.0.swap(false, Ordering::SeqCst) {
            self.rung.push(0);
            self.work.work();
        }
        for (lane, (work, bell)) in (1..).zip(&mut self.more_lanes) {
            while bell.0.swap(false, Ordering::SeqCst) {
                self.rung.push(lane);
                work.work();
            }
        }
    }

    /// What a snapshot carries; the queues stay with the register half.
    pub(crate) fn save(&mut self) -> crate::VirtioStateV1 {
        self.function().stop_queues();
        self.settle();
        self.function().save()
    }

    /// The machine is reset; its firmware maps BAR 4 again and the driver opens its vectors.
    pub(crate) fn reset_machine(&mut self) {
        self.function().reset();
        self.settle();
        self.function().config_write(0x20, 4, BAR as u32);
        self.function().config_write(4, 2, 6);
        self.open_vectors();
    }

    fn before_access(&mut self) {
        if self.reload {
            let state = hv_null::golden::recode(&self.save());
            self.restore(state).unwrap();
        }
    }

    /// Goes on with a new device that takes a saved state.
    pub(crate) fn restore(&mut self, state: crate::VirtioStateV1) -> Result<(), hv_core::StateError> {
        let (function, work) = (self.make)(lent(&self.ram, &self.bell, &self.messages));
        let mut function = function.restore(state, self.messages.clone())?;
        function.start_queues();
        (self.work, self.function) = (work, Some(function));
        self.settle();
        Ok(())
    }

    pub(crate) fn read(&mut self, offset: u64, bytes: u8) -> u64 {
        self.before_access();
        let value = self.function().window_read(4, offset, bytes);
        self.settle();
        value
    }
    pub(crate) fn write(&mut self, offset: u64, bytes: u8, value: u64) {
        self.before_access();
        self.function().window_write(4, offset, bytes, value);
        let mut doorbells = Vec::new();
        self.function().doorbells(&mut doorbells);
        doorbells.iter().filter(|d| d.address.0 == BAR + offset).for_each(|d| d.target.ring());
        self.settle();
    }

    /// Driver initialisation with every feature but `without`, queues 0 to `queues - 1`, vector 1. VIRTIO 3.1.1
    pub(crate) fn start(&mut self, queues: u16, without: u64) {
        self.write(0x14, 1, 0);
        self.write(0x14, 1, 3);
        for half in 0..2 {
            self.write(0, 4, half);
            let offered = self.read(4, 4);
            self.write(8, 4, half);
            self.write(0xc, 4, offered & !(without >> (32 * half)));
        }
        self.write(0x14, 1, 11);
        assert_eq!(self.read(0x14, 1), 11, "features are accepted");
        self.write(0x10, 2, 0);
        for queue in 0..u64::from(queues) {
            let base = queue * RING_STEP;
            // A new driver's rings are empty.
            self.put(base, &[0; RING_STEP as usize]);
            for (offset, bytes, value) in [
                (0x16, 2, queue),
                (0x18, 2, QUEUE_ENTRIES.into()),
                (0x1a, 2, 1),
                (0x20, 8, base),
                (0x28, 8, base + AVAILABLE),
                (0x30, 8, base + USED),
                (0x1c, 2, 1),
            ] {
                self.write(offset, bytes, value);
            }
        }
        self.write(0x14, 1, 15);
        self.available = [0; 4];
        self.seen = [0; 4];
        self.rung.clear();
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Gpa(at), bytes).unwrap();
    }
    pub(crate) fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.ram.read(Gpa(at), &mut buffer).unwrap();
        buffer
    }

    /// Writes a chain of descriptors to a table.
    pub(crate) fn put_table(&self, table: u64, chain: &[Descriptor]) {
        for (i, &(address, bytes, flags)) in (0u16..).zip(chain) {
            let last = usize::from(i) + 1 == chain.len();
            let flags = if last { flags } else { flags | NEXT };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(bytes.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((i + 1).to_le_bytes());
            self.put(table + 16 * u64::from(i), &descriptor);
        }
    }

    /// Offers `chain` on `queue` and rings its doorbell; the driver wants to hear of this buffer's use.
    pub(crate) fn offer(&mut self, queue: u16, chain: &[Descriptor]) {
        let next = self.available[usize::from(queue)];
        self.offer_quietly(queue, chain, 0, next);
    }

    /// Offers with `flags` in the available ring, and interested in the used buffer `used_event`. VIRTIO 2.7.6, 2.7.7
    pub(crate) fn offer_quietly(&mut self, queue: u16, chain: &[Descriptor], flags: u16, used_event: u16) {
        let base = u64::from(queue) * RING_STEP;
        self.put_table(base, chain);
        let index = self.available[usize::from(queue)];
        self.put(base + AVAILABLE, &flags.to_le_bytes());
        self.put(base + AVAILABLE + 4 + 2 * u64::from(index % QUEUE_ENTRIES), &0u16.to_le_bytes());
        self.available[usize::from(queue)] = index.wrapping_add(1);
        self.put(base + AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
        self.put(base + AVAILABLE + 4 + 2 * u64::from(QUEUE_ENTRIES), &used_event.to_le_bytes());
        self.write(0x3000 + 4 * u64::from(queue), 2, queue.into());
    }
    /// The available buffer of `queue` for which the device wants its doorbell rung. VIRTIO 2.7.10
    pub(crate) fn available_event(&self, queue: u16) -> u16 {
        let at = u64::from(queue) * RING_STEP + USED + 4 + 8 * u64::from(QUEUE_ENTRIES);
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    /// Makes the chain in an indirect table available as the one with the head `head`.
    pub(crate) fn offer_table(&mut self, queue: u16, head: u16, table: u64, entries: u32) {
        let base = u64::from(queue) * RING_STEP;
        self.put_table(base + 16 * u64::from(head), &[(table, 16 * entries, INDIRECT)]);
        let index = self.available[usize::from(queue)];
        self.put(base + AVAILABLE, &[0, 0]);
        self.put(base + AVAILABLE + 4 + 2 * u64::from(index % QUEUE_ENTRIES), &head.to_le_bytes());
        self.available[usize::from(queue)] = index.wrapping_add(1);
        self.put(base + AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
        self.write(0x3000 + 4 * u64::from(queue), 2, queue.into());
    }

    /// Length of the next used element of `queue`; `None` if there is none.
    pub(crate) fn used(&mut self, queue: u16) -> Option<u32> {
        self.used_chain(queue).map(|(_, bytes)| bytes)
    }
    /// The same with its head.
    pub(crate) fn used_chain(&mut self, queue: u16) -> Option<(u32, u32)> {
        let base = u64::from(queue) * RING_STEP + USED;
        let index = u16::from_le_bytes(self.get(base + 2, 2).try_into().unwrap());
        let seen = &mut self.seen[usize::from(queue)];
        if index == *seen {
            return None;
        }
        let at = base + 4 + 8 * u64::from(*seen % QUEUE_ENTRIES);
        *seen = seen.wrapping_add(1);
        let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().unwrap());
        Some((word(at), word(at + 4)))
    }
    /// Data of the messages signalled since last asked.
    pub(crate) fn messages(&self) -> Vec<u32> {
        std::mem::take(&mut *self.messages.0.lock()).iter().map(|msi| msi.data).collect()
    }
    /// The machine goes on after a pause.
    pub(crate) fn resume(&mut self) {
        self.work.resumed();
        self.work.work();
        self.settle();
    }
    /// The back end is another.
    pub(crate) fn back_end_changed(&mut self) {
        self.work.back_end_changed();
    }
    /// Whether the device waits for its back end.
    pub(crate) fn waits(&self) -> bool {
        self.work.interest().readable
    }
    /// The back end of the device became ready.
    pub(crate) fn work(&mut self) {
        self.work.work();
        self.settle();
    }
}

fn lent(ram: &GuestRam, bell: &Arc<Bell>, messages: &Arc<Messages>) -> Lent {
    Lent {
        memory: ram.memory().clone(),
        messages: messages.clone(),
        interrupt_pin: IrqLine::unconnected(),
        bell: bell.clone(),
    }
}

/// Runs a test as it is and with a reload before every access.
pub(crate) fn twice(test: impl Fn(bool)) {
    test(false);
    test(true);
}

/// Transport features that change how rings are used.
pub(crate) const RING_FEATURES: [u64; 2] = [0, F_EVENT_IDX];

/// What a driver must accept.
#[allow(dead_code)]
pub(crate) const NEEDED: u64 = F_VERSION_1;
