//! A guest that writes garbage everywhere: random accesses to every port, register, ring and configuration space of a whole
//! board. Nothing may panic and nothing may go on for ever.
//!
//! `VIREO_FUZZ_SEED` replays one seed, `VIREO_FUZZ_ROUNDS` runs more of them; a failure prints its seed.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use guest_ram::{Gpa, GuestRam};
use hv_core::{Clock, DiskBackend, DiskFault, GuestBuffer, GuestNs, VcpuIo};
use hv_null::NullAccel;
use machine::{BootSource, DeviceSpec, Entry, Machine, MachineConfig};

const RAM_BYTES: u64 = 32 << 20;
const DISK_BYTES: u64 = 1 << 20;
const ACCESSES: usize = 60_000;

/// SplitMix64.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
    /// A value of the kinds that break things: small, all ones, an address in memory, anything.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => self.below(16),
            3 => 1 << self.below(64),
            4 | 5 => self.below(RAM_BYTES) & !0xfff,
            6 => RAM_BYTES - self.below(64),
            _ => self.next(),
        }
    }
}

/// Takes everything in range, fails now and then, counts.
struct Disk(Random, Arc<AtomicU64>);
impl Disk {
    fn check(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault> {
        self.1.fetch_add(1, Ordering::Relaxed);
        match self.0.below(16) {
            0 => Err(DiskFault::Report),
            1 => Err(DiskFault::Hold),
            _ if offset.checked_add(bytes).is_some_and(|end| end <= DISK_BYTES) => Ok(()),
            _ => Err(DiskFault::Report),
        }
    }
}
fn length(buffers: &[GuestBuffer<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}
impl DiskBackend for Disk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        self.check(offset, length(buffers))?;
        // What a disk reads is as hostile as what the guest writes.
        for buffer in buffers {
            let data: Vec<u8> = (0..buffer.len().min(4096)).map(|_| self.0.next() as u8).collect();
            buffer.copy_from(&data);
        }
        Ok(())
    }
    fn write(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        self.check(offset, length(buffers))
    }
    fn flush(&mut self) -> Result<(), DiskFault> {
        self.check(0, 0)
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault> {
        self.check(offset, bytes)
    }
    fn write_zeroes(&mut self, offset: u64, bytes: u64, _may_unmap: bool) -> Result<(), DiskFault> {
        self.check(offset, bytes)
    }
}

struct Console(Random);
impl virtio::ConsoleBackend for Console {
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        self.0.below(3) as usize * buffer.len() / 2
    }
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.below(2) as usize * bytes.len()
    }
    fn size(&self) -> Option<(u16, u16)> {
        None
    }
    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}
impl virtio::RandomSource for Random {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        buffer.fill(self.next() as u8);
        self.below(4) != 0
    }
}

fn build(seed: u64, asked: &[Arc<AtomicU64>; 2]) -> Machine {
    let random = |n| Random(seed.wrapping_add(n));
    let devices = vec![
        DeviceSpec::VirtioBlk {
            disk: Box::new(Disk(random(1), asked[0].clone())),
            more_lanes: vec![Box::new(Disk(random(1), asked[0].clone()))],
            queues: virtio::BlkQueues { count: 3, size: 64 },
            serial: "s".into(),
        },
        DeviceSpec::Nvme { disk: Box::new(Disk(random(2), asked[1].clone())), serial: "n".into() },
        DeviceSpec::VirtioConsole { backend: Box::new(Console(random(3))) },
        DeviceSpec::VirtioRng { source: Box::new(random(4)) },
    ];
    let config = MachineConfig {
        ram_bytes: RAM_BYTES,
        vcpus: 1,
        clock: Clock::virtual_clock(),
        unix_s: 1_767_225_600,
        serial: std::array::from_fn(|_| Some(Box::new(chipset::serial::NoSink) as Box<_>)),
        debug_console: Some(Box::new(|_| {})),
        devices,
        boot: BootSource { kernel: support::kernel(), initrd: None, cmdline: String::new(), entry: Entry::Fastest },
    };
    let (mut machine, _) = Machine::build(&NullAccel::idle(), config).unwrap();
    machine.reset().unwrap();
    machine
}

/// Base addresses of the memory BARs, as the board has assigned them.
fn windows(machine: &Machine) -> Vec<u64> {
    let board = machine.board();
    let dword = |device: u64, offset: u64| board.mmio_read(Gpa(0xb000_0000 + (device << 15) + offset), 4);
    let bars = (1..5).flat_map(|device| [0x10, 0x14, 0x20].map(|offset| dword(device, offset) & !0xf));
    bars.filter(|&base| base != 0).collect()
}

/// Lets the devices decode memory and be masters, as a driver would.
fn enable(machine: &Machine) {
    for device in 1..5u64 {
        machine.board().mmio_write(Gpa(0xb000_0000 + (device << 15) + 4), 2, 6);
    }
}

/// A virtio or NVMe device set up far enough that its queues are looked at.
fn bring_up(machine: &Machine, random: &mut Random, windows: &[u64]) {
    let board = machine.board();
    // Registers of the virtio disk, the NVMe controller, the console and the source of random bytes.
    let place = random.pick(&[1, 2, 4, 6]);
    let base = windows[place];
    let ring = random.below(RAM_BYTES - 0x3000) & !0xfff;
    litter_page(machine.ram(), random, ring);
    if random.below(2) == 0 {
        put_request(machine.ram(), random, ring);
    }
    // An available ring that says mostly believable things.
    let mut available = [0u8; 20];
    available[2] = random.pick(&[1, 2, 8, 9, 255]);
    available[4..].iter_mut().step_by(2).for_each(|head| *head = random.below(9) as u8);
    machine.ram().write(Gpa(ring + 0x1000), &available).unwrap();
    board.mmio_write(Gpa(base), 4, 0);
    let offered = board.mmio_read(Gpa(base + 4), 4);
    let virtio = [
        (0x14u64, 1u8, 0u64),
        (0x14, 1, 3),
        (0x08, 4, 0),
        (0x0c, 4, offered & random.pick(&[u64::MAX, 0, random.0])),
        (0x08, 4, 1),
        (0x0c, 4, 1),
        (0x14, 1, 11),
        (0x16, 2, random.below(2)),
        (0x18, 2, 8),
        (0x20, 8, ring),
        (0x28, 8, ring + 0x1000),
        (0x30, 8, ring + 0x2000),
        (0x1c, 2, 1),
        (0x14, 1, 15),
        (0x3000, 2, 0),
    ];
    let nvme =
        [(0x14u64, 4u8, 0u64), (0x24, 4, 0x001f_001f), (0x28, 8, ring), (0x30, 8, ring + 0x1000), (0x14, 4, 0x46_0001)];
    let script = if place == 2 { &nvme[..] } else { &virtio[..] };
    for &(offset, bytes, value) in script {
        board.mmio_write(Gpa(base + offset), bytes, value);
    }
}

/// Something for devices to find: descriptors, commands and lists that are nearly right.
fn litter(ram: &GuestRam, random: &mut Random) {
    let at = random.below(RAM_BYTES) & !0xfff;
    litter_page(ram, random, at);
}

/// A disk request as a driver would write it, but for its numbers: header, data, status.
fn put_request(ram: &GuestRam, random: &mut Random, table: u64) {
    let header = random.below(RAM_BYTES) & !0xfff;
    let mut words = [0u8; 16];
    words[0] = random.below(16) as u8;
    words[8..].copy_from_slice(&random.pick(&[0, 1, DISK_BYTES / 512 - 1, u64::MAX]).to_le_bytes());
    ram.write(Gpa(header), &words).unwrap();
    for (i, (bytes, flags)) in
        [(16u32, 1u16), (random.pick(&[16, 512, 4096]), 1 | (random.below(2) as u16) << 1), (1, 2)]
            .into_iter()
            .enumerate()
    {
        let address = if i == 0 { header } else { random.below(RAM_BYTES) & !0xfff };
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(bytes.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend((i as u16 + 1).to_le_bytes());
        ram.write(Gpa(table + 16 * i as u64), &descriptor).unwrap();
    }
}

fn litter_page(ram: &GuestRam, random: &mut Random, at: u64) {
    let mut page = vec![0u8; 4096];
    for chunk in page.chunks_mut(16) {
        let address = random.value();
        let length = random.pick(&[0u32, 1, 16, 512, 4096, 1 << 20, u32::MAX]);
        let flags = random.below(8) as u16;
        let next = random.below(9) as u16;
        chunk[..8].copy_from_slice(&address.to_le_bytes());
        match random.below(3) {
            0 => {
                chunk[8..12].copy_from_slice(&length.to_le_bytes());
                chunk[12..14].copy_from_slice(&flags.to_le_bytes());
                chunk[14..].copy_from_slice(&next.to_le_bytes());
            }
            1 => chunk[8..].copy_from_slice(&random.value().to_le_bytes()),
            // An NVMe command with a small opcode.
            _ => chunk[..8].copy_from_slice(&(random.below(16) | 1 << 32).to_le_bytes()),
        }
    }
    ram.write(Gpa(at), &page).unwrap();
}

fn one_access(machine: &Machine, random: &mut Random, windows: &[u64]) {
    let board = machine.board();
    let bytes = random.pick(&[1u8, 2, 4, 8]);
    let port_bytes = bytes.min(4);
    let port = match random.below(4) {
        0 => random.next() as u16,
        1 => 0xcf8 + random.below(8) as u16,
        2 => 0x600 + random.below(0x80) as u16,
        _ => random
            .pick(&[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x40, 0x42, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0x92, 0xb2, 0x3f8]),
    };
    let gpa = match random.below(8) {
        0..=3 => {
            random.pick(windows)
                + random.pick(&[
                    random.0 >> 4 & 0x3c,
                    random.0 >> 4 & 0xfff,
                    0x1000 + (random.0 >> 4 & 0x3c),
                    0x3000,
                    0x3004,
                ])
        }
        4 => 0xfec0_0000 + random.below(0x44) * 4 % 0x100,
        5 => 0xfed0_0000 + random.below(0x400),
        6 => 0xb000_0000 + random.below(1 << 21),
        _ => random.next() & 0xffff_ffff,
    };
    match random.below(16) {
        0..=2 => drop(board.port_read(port, port_bytes)),
        3..=5 => board.port_write(port, port_bytes, random.value() as u32),
        6 | 7 => drop(board.mmio_read(Gpa(gpa), bytes)),
        8..=11 => board.mmio_write(Gpa(gpa), bytes, random.value()),
        12 => litter(machine.ram(), random),
        13 => {
            let now = board.clock().now().plus(random.pick(&[0, 1000, 1_000_000, 10_000_000_000]));
            board.clock().advance_to(now);
            let _ = board.run_due(now);
        }
        14 => {
            let _ = board.pic_ack();
            board.eoi(random.next() as u8);
            let _ = board.serial_receive(random.below(4) as usize, b"typed");
        }
        _ => machine.resume_workers(),
    }
}

fn attack(seed: u64, asked: &[Arc<AtomicU64>; 2]) {
    let mut machine = build(seed, asked);
    let mut random = Random(seed);
    let windows = windows(&machine);
    assert_eq!(windows.len(), 7, "two BARs of each virtio device and one of the NVMe controller");
    for access in 0..ACCESSES {
        if access % 64 == 0 {
            enable(&machine);
            bring_up(&machine, &mut random, &windows);
        }
        one_access(&machine, &mut random, &windows);
        if access % 20_000 == 19_999 {
            machine.reset().unwrap();
        }
    }
    assert!(machine.board().run_due(GuestNs(0)).is_none_or(|due| due > GuestNs(0)));
}

#[test]
fn garbage_stops_nothing_but_the_guest() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("VIREO_FUZZ_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("VIREO_FUZZ_ROUNDS").unwrap_or(8)).collect(),
    };
    let one_seed = seeds.len() == 1;
    let asked = <[Arc<AtomicU64>; 2]>::default();
    for seed in seeds {
        println!("VIREO_FUZZ_SEED={seed}");
        attack(seed, &asked);
    }
    // The garbage is good enough to get through to the disks of both kinds.
    let asked = asked.map(|count| count.load(Ordering::Relaxed));
    assert!(one_seed || asked.iter().all(|&count| count > 20), "{asked:?}");
}

#[test]
fn a_seed_replays_exactly() {
    let exits = |seed| {
        let machine = build(seed, &Default::default());
        let mut random = Random(seed);
        let windows = windows(&machine);
        (0..5000).for_each(|_| one_access(&machine, &mut random, &windows));
        machine.board().exits()
    };
    assert_eq!(exits(7), exits(7));
}
