//! Refcounts that change together: new refcount blocks and a new refcount table beside those that are in use.
//!
//! Nothing that the image on disk refers to is written. A changed block goes to a new place, and so does the table;
//! a single write of the header then makes all of them count. Until then the old state is complete on disk, after it
//! the new one is.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use image::qcow2::{Geometry, REFTABLE_MAX_BYTES, refcount};

use super::maintenance_error::MaintenanceError;
use super::rewrite::Place;
use crate::blkdebug::Event;
use crate::error::BlockError;

/// Changed blocks in memory, in bytes; beyond, they wait in the file.
const LOADED_MAX_BYTES: usize = 8 << 20;
/// Table entries hold host offsets below 2^56.
const HOST_OFFSET_BITS: u32 = 56;

/// A refcount block before and after.
struct Pair {
    was: Vec<u8>,
    now: Vec<u8>,
}

#[derive(Default)]
struct Changed {
    /// Where the new block goes, once that is decided.
    offset: Option<u64>,
    /// The old block has lost its reference.
    old_released: bool,
    /// `None` while the new block waits in the file.
    pair: Option<Pair>,
}

pub(super) struct Recount<'f> {
    place: Place<'f>,
    geometry: Geometry,
    /// Offsets of the refcount blocks on disk.
    table: &'f [u64],
    changed: BTreeMap<u64, Changed>,
    loaded_bytes: usize,
    /// The unchanged block that was looked at last.
    viewed: Option<(u64, Vec<u8>)>,
    /// No cluster below is free.
    hint: u64,
    /// Clusters that hold tables, whatever their refcounts say.
    tables: &'f HashSet<u64>,
}

impl<'f> Recount<'f> {
    pub(super) fn new(place: Place<'f>, geometry: Geometry, table: &'f [u64], tables: &'f HashSet<u64>) -> Recount<'f> {
        let (changed, viewed) = (BTreeMap::new(), None);
        Recount { place, geometry, table, changed, loaded_bytes: 0, viewed, hint: 1, tables }
    }

    fn split(&self, cluster: u64) -> (u64, usize) {
        (cluster >> self.geometry.refblock_bits(), (cluster & (self.geometry.refblock_entries() - 1)) as usize)
    }

    fn old_block(&self, index: u64) -> Result<Vec<u8>, BlockError> {
        let mut block = vec![0; self.geometry.cluster_bytes() as usize];
        let offset = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0);
        if offset != 0 {
            self.place.read(offset, &mut block)?;
        }
        Ok(block)
    }

    /// Loads a block for changing.
    fn load(&mut self, index: u64) -> Result<&mut Pair, BlockError> {
        let loaded = self.changed.get(&index).is_some_and(|changed| changed.pair.is_some());
        if !loaded {
            let was = match self.viewed.take_if(|(viewed, _)| *viewed == index) {
                Some((_, block)) => block,
                None => self.old_block(index)?,
            };
            let mut now = was.clone();
            if let Some(offset) = self.changed.get(&index).and_then(|changed| changed.offset) {
                self.place.read(offset, &mut now)?;
            }
            self.loaded_bytes += was.len() + now.len();
            self.changed.entry(index).or_default().pair = Some(Pair { was, now });
        }
        let changed = self.changed.entry(index).or_default();
        Ok(changed.pair.get_or_insert_with(|| Pair { was: Vec::new(), now: Vec::new() }))
    }

    /// References to a cluster after the change.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, BlockError> {
        let (index, within) = self.split(cluster);
        let order = self.geometry.refcount_order;
        if self.changed.contains_key(&index) {
            return Ok(refcount::get(&self.load(index)?.now, order, within).unwrap_or(0));
        }
        Ok(refcount::get(self.view(index)?, order, within).unwrap_or(0))
    }

    fn view(&mut self, index: u64) -> Result<&[u8], BlockError> {
        if self.viewed.as_ref().is_none_or(|(viewed, _)| *viewed != index) {
            self.viewed = Some((index, self.old_block(index)?));
        }
        Ok(self.viewed.as_ref().map_or(&[], |(_, block)| block))
    }

    fn set(&mut self, cluster: u64, count: u64) -> Result<(), BlockError> {
        let (index, within) = self.split(cluster);
        let order = self.geometry.refcount_order;
        let stored = refcount::set(&mut self.load(index)?.now, order, within, count);
        debug_assert!(stored, "the callers look at the width first");
        Ok(())
    }

    /// One more reference to every cluster that a range in use touches.
    pub(super) fn add(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        for cluster in self.clusters(offset, bytes) {
            let count = self.in_use(cluster)?;
            let max = self.geometry.refcount_max();
            if count >= max {
                let offset = cluster << self.geometry.cluster_bits;
                return Err(self.place.refuse(MaintenanceError::RefcountOverflow { offset, max }));
            }
            self.set(cluster, count + 1)?;
        }
        Ok(())
    }

    /// One reference less.
    pub(super) fn drop(&mut self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        for cluster in self.clusters(offset, bytes) {
            let count = self.in_use(cluster)?;
            self.set(cluster, count - 1)?;
        }
        Ok(())
    }

    fn clusters(&self, offset: u64, bytes: u64) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        offset >> bits..offset.saturating_add(bytes).div_ceil(1 << bits)
    }

    fn in_use(&mut self, cluster: u64) -> Result<u64, BlockError> {
        match self.get(cluster)? {
            0 => {
                let offset = cluster.saturating_mul(self.geometry.cluster_bytes());
                Err(BlockError::RefcountZero { path: self.place.path.to_owned(), offset })
            }
            count => Ok(count),
        }
    }

    /// Hands out consecutive clusters that are free on disk too; returns the offset of the first.
    pub(super) fn alloc(&mut self, count: u64) -> Result<u64, BlockError> {
        self.place.file.event(Event::CLUSTER_ALLOC);
        let (bits, entries) = (self.geometry.refblock_bits(), self.geometry.refblock_entries());
        let order = self.geometry.refcount_order;
        let (mut cluster, mut run, mut first_free) = (self.hint, 0u64, None);
        let end = 'found: loop {
            let (index, start) = self.split(cluster);
            let full = index >= REFTABLE_MAX_BYTES.max(self.geometry.cluster_bytes()) / 8;
            if full || cluster >> (HOST_OFFSET_BITS - self.geometry.cluster_bits) != 0 {
                return Err(BlockError::RefcountTableFull { path: self.place.path.to_owned() });
            }
            let changed = self.changed.contains_key(&index);
            let (was, now) = match changed {
                true => {
                    let pair = self.load(index)?;
                    (pair.was.as_slice(), pair.now.as_slice())
                }
                false => {
                    let block = self.view(index)?;
                    (block, block)
                }
            };
            for within in start..entries as usize {
                let free = refcount::get(now, order, within) == Some(0) && refcount::get(was, order, within) == Some(0);
                run = if free { run + 1 } else { 0 };
                if free && first_free.is_none() {
                    first_free = Some((index << bits) + within as u64);
                }
                if run == count {
                    break 'found (index << bits) + within as u64 + 1;
                }
            }
            cluster = (index + 1) << bits;
        };
        let start = end - count;
        if let Some(table) = (start..end).find(|cluster| self.tables.contains(cluster)) {
            let offset = table << self.geometry.cluster_bits;
            return Err(BlockError::FreeTable { path: self.place.path.to_owned(), offset });
        }
        for cluster in start..end {
            self.set(cluster, 1)?;
        }
        // Later requests may fit where this one did not.
        self.hint = if first_free == Some(start) { end } else { first_free.unwrap_or(end) };
        Ok(start << self.geometry.cluster_bits)
    }

    /// Keeps memory bounded. Called between steps, when no block is borrowed.
    pub(super) fn relieve(&mut self) -> Result<(), BlockError> {
        if self.loaded_bytes <= LOADED_MAX_BYTES {
            return Ok(());
        }
        for index in self.changed.keys().copied().collect::<Vec<_>>() {
            self.assign(index)?;
        }
        self.write_blocks(true)
    }

    fn assign(&mut self, index: u64) -> Result<(), BlockError> {
        if self.changed.get(&index).is_some_and(|changed| changed.offset.is_none()) {
            let offset = self.alloc(1)?;
            self.changed.entry(index).or_default().offset = Some(offset);
        }
        Ok(())
    }

    /// Writes changed blocks that have a place, and forgets their contents when `unload`.
    fn write_blocks(&mut self, unload: bool) -> Result<(), BlockError> {
        for changed in self.changed.values_mut() {
            if let (Some(offset), Some(pair)) = (changed.offset, &changed.pair) {
                self.place.write(offset, &pair.now)?;
                if unload {
                    self.loaded_bytes -= pair.was.len() + pair.now.len();
                    changed.pair = None;
                }
            }
        }
        Ok(())
    }

    /// Has every block written to a new place, whether its counts change or not.
    pub(super) fn renew(&mut self) -> Result<(), BlockError> {
        for index in 0..self.table.len() {
            if self.table.get(index).is_some_and(|offset| *offset != 0) {
                self.load(index as u64)?;
                self.relieve()?;
            }
        }
        Ok(())
    }

    pub(super) fn is_unchanged(&self) -> bool {
        self.changed.is_empty()
    }

    /// Writes everything to new places, with the old ones counted out. Returns offset and clusters of the new table.
    pub(super) fn write(&mut self, old_table: (u64, u32)) -> Result<(u64, u32), BlockError> {
        let bits = self.geometry.cluster_bits;
        self.drop(old_table.0, u64::from(old_table.1) << bits)?;
        let (mut offset, mut clusters) = (0, 0);
        loop {
            let open: Vec<u64> =
                self.changed.iter().filter(|(_, c)| c.offset.is_none() || !c.old_released).map(|(i, _)| *i).collect();
            let last = self.changed.keys().next_back().map_or(0, |last| last + 1);
            let want = (last.max(self.table.len() as u64) * 8).div_ceil(self.geometry.cluster_bytes());
            if open.is_empty() && clusters >= want {
                break;
            }
            for index in open {
                self.assign(index)?;
                self.release_old(index)?;
            }
            if clusters < want {
                if clusters > 0 {
                    self.drop(offset, clusters << bits)?;
                }
                offset = self.alloc(want)?;
                clusters = want;
            }
            self.relieve()?;
        }
        self.write_blocks(false)?;
        let mut raw = vec![0; (clusters << bits) as usize];
        for (index, target) in (0u64..).zip(raw.chunks_exact_mut(8)) {
            let old = self.table.get(index as usize).copied().unwrap_or(0);
            let entry = self.changed.get(&index).and_then(|changed| changed.offset).unwrap_or(old);
            target.copy_from_slice(&entry.to_be_bytes());
        }
        self.place.write(offset, &raw)?;
        Ok((offset, clusters as u32))
    }

    fn release_old(&mut self, index: u64) -> Result<(), BlockError> {
        let released = self.changed.get(&index).is_none_or(|changed| changed.old_released);
        let old = self.table.get(index as usize).copied().unwrap_or(0);
        if !released && old != 0 {
            self.drop(old, self.geometry.cluster_bytes())?;
        }
        self.changed.entry(index).or_default().old_released = true;
        Ok(())
    }

    /// Runs of clusters that were in use before and are free now.
    pub(super) fn freed(&mut self) -> Result<Vec<Range<u64>>, BlockError> {
        let order = self.geometry.refcount_order;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for index in self.changed.keys().copied().collect::<Vec<_>>() {
            let first = index << self.geometry.refblock_bits();
            let entries = self.geometry.refblock_entries();
            let pair = self.load(index)?;
            for within in 0..entries as usize {
                let is = |block: &[u8]| refcount::get(block, order, within).unwrap_or(0);
                if is(&pair.was) == 0 || is(&pair.now) != 0 {
                    continue;
                }
                let cluster = first + within as u64;
                match runs.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            }
            if self.loaded_bytes > LOADED_MAX_BYTES {
                self.changed.values_mut().for_each(|changed| changed.pair = None);
                self.loaded_bytes = 0;
            }
        }
        Ok(runs)
    }
}
