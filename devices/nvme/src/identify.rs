//! Identify data structures and log pages. Numbers are those of NVME 1.4 figures 245 to 249.

use crate::SERIAL_BYTES;
use crate::prp::MDTS;

/// Length of every identify structure.
pub(crate) const IDENTIFY_BYTES: usize = 4096;
/// Version 1.4.
pub(crate) const VERSION: u32 = 0x0001_0400;
/// Logical blocks of 512 bytes.
pub(crate) const BLOCK_SHIFT: u8 = 9;
/// PCI identity. The device number is not assigned to anything else; drivers match the class.
pub(crate) const VENDOR: u16 = 0x1af4;
pub(crate) const DEVICE: u16 = 0x11fe;
pub(crate) const SUBSYSTEM: u16 = 0x1100;
/// Notices of changed namespaces, in the events that are offered and in those that are asked for. NVME 5.21.1.11
pub(crate) const NAMESPACE_NOTICES: u32 = 1 << 8;
/// Asynchronous event requests that may wait.
pub(crate) const EVENT_REQUESTS: usize = 4;

const MODEL: &[u8] = b"Vireo NVMe disk";
const FIRMWARE: &[u8] = b"1";
/// Kelvin: 30 degrees Celsius, and the thresholds above it.
const TEMPERATURE: u16 = 303;
const WARNING: u16 = 343;
const CRITICAL: u16 = 353;

struct Page(Vec<u8>);
impl Page {
    fn new(bytes: usize) -> Page {
        Page(vec![0; bytes])
    }
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    /// Text, padded with spaces.
    fn text(&mut self, at: usize, bytes: usize, text: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes) {
            place.fill(b' ');
            place.iter_mut().zip(text).for_each(|(to, &from)| *to = from);
        }
    }
}

/// Characters that may stand in a serial number and in a qualified name.
pub(crate) fn clean_serial(serial: &str) -> String {
    serial.chars().filter(char::is_ascii_graphic).take(SERIAL_BYTES).collect()
}

/// Controller. CNS 1
pub(crate) fn controller(serial: &str, write_cache: bool) -> Vec<u8> {
    let mut page = Page::new(IDENTIFY_BYTES);
    page.put(0, &VENDOR.to_le_bytes());
    page.put(2, &VENDOR.to_le_bytes());
    page.text(4, SERIAL_BYTES, serial.as_bytes());
    page.text(24, 40, MODEL);
    page.text(64, 8, FIRMWARE);
    page.put(77, &[MDTS]);
    page.put(80, &VERSION.to_le_bytes());
    page.put(92, &NAMESPACE_NOTICES.to_le_bytes()); // asynchronous events
    page.put(111, &[1]); // I/O controller
    page.put(258, &[3, EVENT_REQUESTS as u8 - 1]); // abort limit, event request limit
    page.put(260, &[0b11]); // one firmware slot, read-only
    page.put(266, &WARNING.to_le_bytes());
    page.put(268, &CRITICAL.to_le_bytes());
    page.put(512, &[0x66, 0x44]); // entries of 64 and 16 bytes
    page.put(516, &1u32.to_le_bytes()); // namespaces
    page.put(520, &(1u16 << 2 | 1 << 3).to_le_bytes()); // dataset management, write zeroes
    page.put(525, &[write_cache.into()]); // volatile write cache
    page.put(768, format!("nqn.2026-01.org.vireo:nvme:{serial}").as_bytes());
    page.put(2048, &2500u16.to_le_bytes()); // power state 0: 25 W
    page.0
}

/// Namespace. CNS 0
pub(crate) fn namespace(blocks: u64, read_only: bool) -> Vec<u8> {
    let mut page = Page::new(IDENTIFY_BYTES);
    for at in [0, 8, 16] {
        page.put(at, &blocks.to_le_bytes()); // size, capacity, use
    }
    page.put(99, &[read_only.into()]); // write protected
    page.put(130, &[BLOCK_SHIFT]); // format 0: block size as a power of two
    page.0
}

/// Active namespaces above `after`. CNS 2
pub(crate) fn namespace_list(after: u32) -> Vec<u8> {
    let mut page = Page::new(IDENTIFY_BYTES);
    if after == 0 {
        page.put(0, &1u32.to_le_bytes());
    }
    page.0
}

/// Health. Log page 2
pub(crate) fn health() -> Vec<u8> {
    let mut page = Page::new(512);
    page.put(1, &TEMPERATURE.to_le_bytes());
    page.put(3, &[100, 10]); // spare, and its threshold, in percent
    page.0
}

/// Firmware slots. Log page 3
pub(crate) fn firmware() -> Vec<u8> {
    let mut page = Page::new(512);
    page.put(0, &[1]);
    page.text(8, 8, FIRMWARE);
    page.0
}

/// Changed namespaces: the one there is, if it has. Log page 4
pub(crate) fn changed_namespaces(changed: bool) -> Vec<u8> {
    let mut page = Page::new(4096);
    page.put(0, &u32::from(changed).to_le_bytes());
    page.0
}

/// Errors: none are kept. Log page 1
pub(crate) fn errors() -> Vec<u8> {
    vec![0; 64]
}
