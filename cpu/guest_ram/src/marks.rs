//! A byte of marks per guest page, looked at by every write that goes through `vm-memory`.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::mapping::Mapping;
use crate::{Gpa, PAGE_BYTES};

/// The page holds instructions that a software CPU has decoded: writes to it are reported.
pub const MARK_CODE: u8 = 1;

/// Told of device writes to pages that carry [`MARK_CODE`]. Called on the writing thread, after the bytes are there.
pub trait CodeWatcher: Send + Sync {
    /// Bytes of the page that starts at `page` were written.
    fn code_written(&self, page: Gpa);
}

struct Shared {
    /// The memory itself: whoever holds a region holds its marks, so it is unmapped after the last of them.
    mapping: Mapping,
    base: Gpa,
    marks: Box<[AtomicU8]>,
    watcher: OnceLock<Arc<dyn CodeWatcher>>,
}

/// The marks of one memory region.
#[derive(Clone)]
pub struct PageMarks(Arc<Shared>);

impl PageMarks {
    pub(crate) fn new(mapping: Mapping, base: Gpa, bytes: u64) -> PageMarks {
        let pages = (bytes / PAGE_BYTES) as usize;
        let marks = std::iter::repeat_with(|| AtomicU8::new(0)).take(pages).collect();
        PageMarks(Arc::new(Shared { mapping, base, marks, watcher: OnceLock::new() }))
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        self.0.mapping.resident_bytes()
    }

    pub(crate) fn watch(&self, watcher: Arc<dyn CodeWatcher>) {
        // A second registration would be a second software CPU on the same memory: the first keeps its place.
        let _ = self.0.watcher.set(watcher);
    }

    /// Sets `bits` of page `index`; true if one of them was clear before.
    pub fn set(&self, index: usize, bits: u8) -> bool {
        self.0.marks.get(index).is_some_and(|m| m.fetch_or(bits, Ordering::SeqCst) & bits != bits)
    }

    /// Clears `bits` of page `index`.
    pub fn clear(&self, index: usize, bits: u8) {
        if let Some(mark) = self.0.marks.get(index) {
            mark.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    /// The marks of page `index`; 0 past the end.
    #[inline]
    pub fn get(&self, index: usize) -> u8 {
        self.0.marks.get(index).map_or(0, |m| m.load(Ordering::Relaxed))
    }

    fn written(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_BYTES as usize;
        let last = offset.saturating_add(len - 1) / PAGE_BYTES as usize;
        let Some(marks) = self.0.marks.get(first..=last.min(self.0.marks.len().saturating_sub(1))) else { return };
        for (index, mark) in marks.iter().enumerate() {
            if mark.load(Ordering::Relaxed) & MARK_CODE != 0
                && let Some(watcher) = self.0.watcher.get()
            {
                watcher.code_written(Gpa(self.0.base.0 + (first + index) as u64 * PAGE_BYTES));
            }
        }
    }
}

impl fmt::Debug for PageMarks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageMarks({}, {} pages)", self.0.base, self.0.marks.len())
    }
}

impl<'a> WithBitmapSlice<'a> for PageMarks {
    type S = MarksSlice<'a>;
}

impl Bitmap for PageMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.written(offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.get(offset / PAGE_BYTES as usize) != 0
    }
    fn slice_at(&self, offset: usize) -> MarksSlice<'_> {
        MarksSlice { marks: self, base: offset }
    }
}

/// The marks from some byte of a region on, as `vm-memory` hands them to slices.
#[derive(Clone, Copy, Debug)]
pub struct MarksSlice<'a> {
    marks: &'a PageMarks,
    base: usize,
}

impl<'a> MarksSlice<'a> {
    pub(crate) fn marks(self) -> &'a PageMarks {
        self.marks
    }
}

impl WithBitmapSlice<'_> for MarksSlice<'_> {
    type S = Self;
}
impl BitmapSlice for MarksSlice<'_> {}

impl Bitmap for MarksSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.marks.written(self.base.saturating_add(offset), len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.marks.dirty_at(self.base.saturating_add(offset))
    }
    fn slice_at(&self, offset: usize) -> Self {
        MarksSlice { marks: self.marks, base: self.base.saturating_add(offset) }
    }
}
