//! Pieces of an image's tables in memory: a bounded number of pages, read when they are looked at, written when
//! the image is flushed.

use std::collections::HashMap;

use super::store::Store;
use crate::error::BlockError;
use crate::sys::ReadBufs;

/// Pages that are kept. With 4 KiB pages this is 4 MiB.
const PAGES_MAX: usize = 1024;
/// Pages that may wait for a flush; the rest is left for reading.
const DIRTY_MAX: usize = PAGES_MAX / 2;

struct Page {
    bytes: Box<[u8]>,
    /// Counts changes since the page was last on the disk; 0 is clean.
    changes: u64,
    /// Looked at since the last round of eviction.
    used: bool,
}

/// A page to be written: where it belongs, what it holds, how many changes that includes.
pub(crate) struct DirtyPage {
    pub(crate) offset: u64,
    pub(crate) bytes: Box<[u8]>,
    changes: u64,
}

/// The pages of an image's tables, by their offset in the file.
pub(crate) struct TablePages {
    page_bytes: usize,
    pages: HashMap<u64, Page>,
    dirty_count: usize,
}

impl TablePages {
    pub(crate) fn new(page_bytes: usize) -> TablePages {
        TablePages { page_bytes, pages: HashMap::new(), dirty_count: 0 }
    }

    /// The page at a file offset.
    pub(crate) fn get(&mut self, store: &Store, offset: u64) -> Result<&[u8], BlockError> {
        if !self.pages.contains_key(&offset) {
            self.make_room();
            let mut bytes = vec![0; self.page_bytes].into_boxed_slice();
            store.read(offset, &ReadBufs::from_slice(&mut bytes))?;
            self.pages.insert(offset, Page { bytes, changes: 0, used: false });
        }
        let page = self.pages.get_mut(&offset).map(|page| {
            page.used = true;
            &*page.bytes
        });
        Ok(page.unwrap_or_default())
    }

    /// Changes bytes of a page, which stays in memory until it has been written.
    pub(crate) fn put(&mut self, store: &Store, offset: u64, at: usize, raw: &[u8]) -> Result<(), BlockError> {
        self.get(store, offset)?;
        if let Some(page) = self.pages.get_mut(&offset) {
            if let Some(target) = page.bytes.get_mut(at..at + raw.len()) {
                target.copy_from_slice(raw);
            }
            self.dirty_count += usize::from(page.changes == 0);
            page.changes += 1;
        }
        Ok(())
    }

    /// Whether so many pages wait that a flush is due.
    pub(crate) fn is_full(&self) -> bool {
        self.dirty_count >= DIRTY_MAX
    }

    /// Copies of the pages that differ from the disk, in the order of the file.
    pub(crate) fn dirty(&self) -> Vec<DirtyPage> {
        let changed = self.pages.iter().filter(|(_, page)| page.changes > 0);
        let mut out: Vec<DirtyPage> = changed
            .map(|(offset, page)| DirtyPage { offset: *offset, bytes: page.bytes.clone(), changes: page.changes })
            .collect();
        out.sort_by_key(|page| page.offset);
        out
    }

    /// The copies are on the disk: pages that have not changed since are clean.
    pub(crate) fn written(&mut self, written: &[DirtyPage]) {
        for copy in written {
            if let Some(page) = self.pages.get_mut(&copy.offset).filter(|page| page.changes == copy.changes) {
                page.changes = 0;
                self.dirty_count -= 1;
            }
        }
    }

    /// Drops clean pages that were not looked at since the round before.
    fn make_room(&mut self) {
        while self.pages.len() >= PAGES_MAX {
            let before = self.pages.len();
            self.pages.retain(|_, page| page.changes > 0 || std::mem::take(&mut page.used));
            // All were used: their marks are gone now, so the next round finds some, unless all are dirty.
            if self.pages.len() == before && self.dirty_count >= before {
                break;
            }
        }
    }
}
