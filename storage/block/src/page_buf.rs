//! Memory for file data that starts at a page. A processor copies between the page cache and memory whose offset in a
//! cache line differs at a third of the speed; what the allocator gives starts 16 bytes into a page.

use std::ops::{Deref, DerefMut};

use crate::sys::advise_huge_pages;

/// Alignment of the memory; also what direct I/O asks for.
const PAGE_BYTES: usize = 4096;
/// Memory of this size starts at a huge page: direct I/O pins each page of a request, which is a third of its work when
/// pages are small.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes that start at a page. It keeps its memory when it gets shorter.
#[derive(Default)]
pub struct PageBuf {
    store: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuf {
    /// So many bytes of zeroes.
    pub fn new(len: usize) -> PageBuf {
        let mut buf = PageBuf::default();
        buf.set_len(len);
        buf
    }

    /// Changes the length. What the bytes are afterwards is not said: they are about to be overwritten.
    pub fn set_len(&mut self, len: usize) {
        if self.start + len > self.store.len() {
            let align = if len < HUGE_PAGE_BYTES { PAGE_BYTES } else { HUGE_PAGE_BYTES };
            self.store = vec![0; len + align];
            // An address has an offset to the next page for every allocator; were there none, slow is all it would be.
            self.start = self.store.as_ptr().align_offset(align).min(align);
            if align == HUGE_PAGE_BYTES {
                advise_huge_pages(self.store.get_mut(self.start..self.start + len).unwrap_or_default());
            }
        }
        self.len = len;
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.store.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.store.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

#[test]
fn buffers_start_at_a_page_and_have_their_length() {
    let mut buf = PageBuf::default();
    assert!(buf.is_empty());
    for len in [1, 4096, 300_000, 5, 1 << 20, 2 << 20, 5_000_000, 0] {
        buf.set_len(len);
        assert_eq!(buf.len(), len);
        if len > 0 {
            let align = if len < HUGE_PAGE_BYTES { PAGE_BYTES } else { HUGE_PAGE_BYTES };
            assert_eq!(buf.as_ptr() as usize % align, 0, "{len}");
            buf.fill(7);
        }
    }
}
