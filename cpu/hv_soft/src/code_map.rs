//! Which bytes of guest memory have been decoded, so that stores to them are noticed.

use std::collections::HashMap;

use guest_ram::{Gpa, GuestRam, MARK_CODE, PAGE_BYTES};

/// Decoded bytes per page, in granules of 64 bytes, and the stores that hit them.
#[derive(Default)]
pub(crate) struct CodeMap {
    pages: HashMap<u64, u64>,
    /// (first byte, length) of stores that overlapped decoded granules since the run loop last looked.
    pub hits: Vec<(u64, u64)>,
}

fn granules(offset: u64, bytes: u64) -> u64 {
    let first = (offset & (PAGE_BYTES - 1)) / 64;
    let last = ((offset & (PAGE_BYTES - 1)) + bytes - 1).min(PAGE_BYTES - 1) / 64;
    (u64::MAX >> (63 - (last - first))) << first
}

impl CodeMap {
    /// Marks `bytes` at `gpa`, within one page, as decoded. True if the page was not marked before: its write
    /// translations must go.
    pub fn add(&mut self, ram: &GuestRam, gpa: u64, bytes: u64) -> bool {
        let page = gpa & !(PAGE_BYTES - 1);
        *self.pages.entry(page).or_default() |= granules(gpa, bytes);
        ram.host_page(Gpa(page)).is_some_and(|(_, marks, index)| marks.set(index, MARK_CODE))
    }

    /// A store of `bytes` at `gpa`, within one page, is about to happen. True if it hits decoded bytes.
    pub fn store(&mut self, gpa: u64, bytes: u64) -> bool {
        let hit = self.pages.get(&(gpa & !(PAGE_BYTES - 1))).is_some_and(|mask| mask & granules(gpa, bytes) != 0);
        if hit {
            self.hits.push((gpa, bytes));
        }
        hit
    }

    /// Nothing of `page` is decoded any more.
    pub fn forget_page(&mut self, ram: &GuestRam, page: u64) {
        self.pages.remove(&page);
        if let Some((_, marks, index)) = ram.host_page(Gpa(page)) {
            marks.clear(index, MARK_CODE);
        }
    }

    /// Nothing at all is decoded any more.
    pub fn forget_all(&mut self, ram: &GuestRam) {
        let pages: Vec<u64> = self.pages.keys().copied().collect();
        pages.into_iter().for_each(|page| self.forget_page(ram, page));
    }
}

#[cfg(test)]
mod tests {
    use super::granules;

    #[test]
    fn granules_cover_the_bytes_and_no_more() {
        for (offset, bytes, mask) in
            [(0, 1, 1), (63, 2, 3), (64, 64, 2), (0xfff, 1, 1 << 63), (0, 4096, u64::MAX), (0xfc0, 100, 1 << 63)]
        {
            assert_eq!(granules(offset, bytes), mask, "{offset:#x}+{bytes}");
        }
    }
}
