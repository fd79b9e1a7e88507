//! A guest that drives virtio-blk. VIRTIO 3.1.1, 4.1.4, 5.2.6

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Guest;

/// What one request writes.
pub const REQUEST_BYTES: u32 = 64 << 10;

const REGISTERS: u32 = 0xd000_0000;
/// Rings and headers of queue `n` lie `n` steps behind these of queue 0.
const STEP: u32 = 0x1_0000;
const TABLE: u32 = 0x30_0000;
const AVAILABLE: u32 = 0x30_1000;
const USED: u32 = 0x30_2000;
const HEADER: u32 = 0x30_3000;
const STATUS: u32 = 0x30_4000;
const DATA: u32 = 0x80_0000;
const NEXT: u16 = 1;
const WRITE_ONLY: u16 = 2;
/// VIRTIO_BLK_F_MQ
const F_MQ: u32 = 1 << 12;

/// What request `number` writes.
fn pattern(number: u16) -> u32 {
    0x5a00_0001 + u32::from(number) * 0x0101
}

/// A driver of device 1 with `queues` queues that writes `requests` times, one request in every queue at a time, says
/// `written` and powers off. A request that fails is waited for without end.
pub fn writer(queues: u16, requests: u16) -> Guest {
    writing(queues, requests).power_off()
}

/// The same without the end.
pub fn writing(queues: u16, requests: u16) -> Guest {
    let guest = (0..queues).fold(ready(queues), set_up);
    // DRIVER_OK
    let guest = guest.store8(REGISTERS + 0x14, 15);
    let guest = (0..requests.div_ceil(queues)).fold(guest, |guest, round| {
        let first = round * queues;
        let batch = first..requests.min(first + queues);
        let guest = batch.clone().fold(guest, |guest, number| submit(guest, number - first, round, number));
        batch.fold(guest, |guest, number| {
            let at = STEP * u32::from(number - first);
            // The answer, and that it is OK.
            guest.wait16(USED + at + 2, round + 1).wait16(STATUS + at, 0)
        })
    });
    guest.print("written\n")
}

/// Up to FEATURES_OK.
fn ready(queues: u16) -> Guest {
    let status = |guest: Guest, value| guest.store8(REGISTERS + 0x14, value);
    // Device 1: its registers are BAR 4; memory decoding and bus mastering on.
    let guest = Guest::default().configure(1, 0x20, REGISTERS).configure(1, 0x24, 0).configure(1, 4, 6);
    let guest = status(status(guest, 0), 3);
    // VIRTIO_F_VERSION_1, and several queues if there are.
    let features = if queues > 1 { F_MQ } else { 0 };
    let guest = guest.store32(REGISTERS + 8, 1).store32(REGISTERS + 0xc, 1);
    status(guest.store32(REGISTERS + 8, 0).store32(REGISTERS + 0xc, features), 11)
}

fn set_up(guest: Guest, queue: u16) -> Guest {
    let at = STEP * u32::from(queue);
    // Memory survives a reset, and with it what an earlier driver left.
    let guest = guest.fill32(AVAILABLE + at, 64, 0).fill32(USED + at, 64, 0);
    let guest = guest.store16(REGISTERS + 0x16, queue).store16(REGISTERS + 0x18, 4);
    let rings = [(0x20, TABLE), (0x28, AVAILABLE), (0x30, USED)];
    let guest = rings.into_iter().fold(guest, |guest, (register, ring)| {
        guest.store32(REGISTERS + register, ring + at).store32(REGISTERS + register + 4, 0)
    });
    let guest = guest.store16(REGISTERS + 0x1c, 1);
    let data = DATA + REQUEST_BYTES * u32::from(queue);
    let descriptors = [(HEADER + at, 16, NEXT), (data, REQUEST_BYTES, NEXT), (STATUS + at, 1, WRITE_ONLY)];
    let guest = (0u16..).zip(descriptors).fold(guest, |guest, (index, (address, bytes, flags))| {
        let entry = TABLE + at + 16 * u32::from(index);
        guest
            .store32(entry, address)
            .store32(entry + 8, bytes)
            .store16(entry + 12, flags)
            .store16(entry + 14, index + 1)
    });
    // The type: a write.
    guest.store32(HEADER + at, 1)
}

fn submit(guest: Guest, queue: u16, round: u16, number: u16) -> Guest {
    let (at, data) = (STEP * u32::from(queue), DATA + REQUEST_BYTES * u32::from(queue));
    let sector = u32::from(number) * (REQUEST_BYTES / 512);
    let guest = guest.fill32(data, REQUEST_BYTES, pattern(number)).store32(HEADER + at + 8, sector);
    let guest = guest.store16(STATUS + at, 0xff).store16(AVAILABLE + at + 2, round + 1);
    guest.store16(REGISTERS + 0x3000 + 4 * u32::from(queue), queue)
}

/// Checks what [`writer`] has written.
pub fn check_written(raw: &File, requests: u16) {
    for number in 0..requests {
        let mut bytes = vec![0; REQUEST_BYTES as usize];
        raw.read_exact_at(&mut bytes, u64::from(number) * u64::from(REQUEST_BYTES)).unwrap();
        assert!(bytes.as_chunks().0.iter().all(|&word| word == pattern(number).to_le_bytes()), "request {number}");
    }
}

/// A driver of device 1 that says `ready`, waits for the configuration interrupt and `grown` sectors, says so, and the same
/// once more for `shrunk` sectors. It ends when the machine does.
pub fn capacity_watcher(first: u16, grown: u16, shrunk: u16) -> Guest {
    /// The interrupt status register: reading it acknowledges. VIRTIO 4.1.4.5
    const CONFIG_CHANGED: u8 = 2;
    let guest = set_up(ready(1), 0).store8(REGISTERS + 0x14, 15);
    let guest = guest.wait16(REGISTERS + 0x2000, first).print("ready\n");
    let seen = |guest: Guest, sectors, text| {
        guest.wait8(REGISTERS + 0x1000, CONFIG_CHANGED).wait16(REGISTERS + 0x2000, sectors).print(text)
    };
    seen(seen(guest, grown, "grown\n"), shrunk, "shrunk\n").spin()
}
