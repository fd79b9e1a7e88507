//! Pieces of metadata tables in memory: bounded, least recently used goes first, dirty pieces never go.

use std::collections::HashMap;

const NONE: usize = usize::MAX;

struct Slot {
    key: u64,
    bytes: Box<[u8]>,
    dirty: bool,
    newer: usize,
    older: usize,
}

/// Table pieces of one size, by host offset. Dirty pieces stay until [`SliceCache::mark_clean`]: only the
/// owner knows in which order they may be written.
pub(crate) struct SliceCache {
    slice_bytes: usize,
    capacity: usize,
    by_key: HashMap<u64, usize>,
    slots: Vec<Slot>,
    newest: usize,
    oldest: usize,
    dirty: usize,
}

impl SliceCache {
    /// At most `bytes` of pieces, but at least four of them.
    pub(crate) fn new(slice_bytes: u64, bytes: u64) -> SliceCache {
        SliceCache {
            slice_bytes: slice_bytes as usize,
            capacity: usize::try_from(bytes / slice_bytes).unwrap_or(usize::MAX).max(4),
            by_key: HashMap::new(),
            slots: Vec::new(),
            newest: NONE,
            oldest: NONE,
            dirty: 0,
        }
    }

    /// Whether so much is dirty that the owner should write it before it loads more.
    pub(crate) fn is_crowded(&self) -> bool {
        self.dirty >= self.capacity.div_ceil(2)
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty > 0
    }

    pub(crate) fn contains(&self, key: u64) -> bool {
        self.by_key.contains_key(&key)
    }

    /// The piece, as the most recently used one.
    pub(crate) fn get(&mut self, key: u64) -> Option<&[u8]> {
        let index = *self.by_key.get(&key)?;
        self.touch(index);
        self.slots.get(index).map(|slot| &*slot.bytes)
    }

    /// The piece for changing; it is dirty from now on.
    pub(crate) fn get_dirty(&mut self, key: u64) -> Option<&mut [u8]> {
        let index = *self.by_key.get(&key)?;
        self.touch(index);
        let slot = self.slots.get_mut(index)?;
        self.dirty += usize::from(!slot.dirty);
        slot.dirty = true;
        Some(&mut slot.bytes)
    }

    /// Adds a piece that `fill` reads; on its error nothing is added. The caller has made sure that not
    /// everything is dirty.
    pub(crate) fn insert<E>(&mut self, key: u64, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        let index = self.free_slot();
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        let result = fill(&mut slot.bytes);
        if result.is_ok() {
            slot.key = key;
            self.by_key.insert(key, index);
        }
        result
    }

    /// A slot that holds nothing and is the most recently used.
    fn free_slot(&mut self) -> usize {
        if self.slots.len() >= self.capacity {
            let mut index = self.oldest;
            while let Some(slot) = self.slots.get_mut(index) {
                if !slot.dirty {
                    // A slot whose fill failed keeps an old key that may live elsewhere by now.
                    if self.by_key.get(&slot.key) == Some(&index) {
                        self.by_key.remove(&slot.key);
                    }
                    slot.key = u64::MAX;
                    self.touch(index);
                    return index;
                }
                index = slot.newer;
            }
        }
        let index = self.slots.len();
        let bytes = vec![0; self.slice_bytes].into_boxed_slice();
        self.slots.push(Slot { key: u64::MAX, bytes, dirty: false, newer: NONE, older: NONE });
        self.link_newest(index);
        index
    }

    fn touch(&mut self, index: usize) {
        if index == self.newest {
            return;
        }
        let Some((newer, older)) = self.slots.get(index).map(|slot| (slot.newer, slot.older)) else { return };
        match self.slots.get_mut(older) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        if let Some(slot) = self.slots.get_mut(newer) {
            slot.older = older;
        }
        self.link_newest(index);
    }

    fn link_newest(&mut self, index: usize) {
        let before = self.newest;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.newer = NONE;
            slot.older = before;
        }
        match self.slots.get_mut(before) {
            Some(slot) => slot.newer = index,
            None => self.oldest = index,
        }
        self.newest = index;
    }

    /// Dirty pieces in file order.
    pub(crate) fn dirty_keys(&self) -> Vec<u64> {
        let mut keys: Vec<u64> = self.slots.iter().filter(|slot| slot.dirty).map(|slot| slot.key).collect();
        keys.sort_unstable();
        keys
    }

    /// The piece has been written.
    pub(crate) fn mark_clean(&mut self, key: u64) {
        if let Some(slot) = self.by_key.get(&key).and_then(|index| self.slots.get_mut(*index)) {
            self.dirty -= usize::from(slot.dirty);
            slot.dirty = false;
        }
    }

    /// Forgets the pieces of a cluster that is no table any more, or not yet.
    pub(crate) fn forget(&mut self, start: u64, bytes: u64) {
        let mut key = start;
        while key < start + bytes {
            self.mark_clean(key);
            self.by_key.remove(&key);
            key += self.slice_bytes as u64;
        }
    }
}

#[test]
fn the_least_recently_used_clean_piece_goes_first() {
    let mut cache = SliceCache::new(8, 32);
    let fill = |byte: u8| {
        move |out: &mut [u8]| -> Result<(), ()> {
            out.fill(byte);
            Ok(())
        }
    };
    for key in 0..4u64 {
        cache.insert(key * 8, fill(key as u8)).unwrap();
    }
    assert!(cache.get(0).is_some());
    cache.get_dirty(8).unwrap()[0] = 9;
    cache.insert(32, fill(4)).unwrap(); // 8 is older, but dirty: 16 goes
    assert_eq!([0, 8, 16, 24, 32].map(|key| cache.contains(key)), [true, true, false, true, true]);
    assert_eq!((cache.dirty_keys(), cache.get(8).map(|b| b[0])), (vec![8], Some(9)));
    assert_eq!(cache.insert(40, |_| Err(())), Err(()));
    assert!(!cache.contains(40));
    cache.mark_clean(8);
    cache.forget(0, 16);
    assert!(!cache.has_dirty() && !cache.contains(0) && !cache.contains(8));
    assert_eq!(cache.get(32), Some(&[4u8; 8][..]));
}
