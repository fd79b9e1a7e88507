//! Operations on a qcow2 image as a whole, on an image of a running disk or on its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::Format;
use image::qcow2::Header;
use parking_lot::MutexGuard;

use super::maintenance_error::MaintenanceError;
use super::rewrite::Rewrite;
use super::{DataFile, Health, Qcow2Node, Qcow2Options, Sealing, Tables, luks_volume};
use crate::chain::ChainFile;
use crate::disk::ChainBackend;
use crate::error::{Action, BlockError};
use crate::luks::{KeySlotChange, LayerKey, QCOW2_KEY_PARAMETER, needed};

/// Memory for L2 tables of an image that is opened for maintenance.
const L2_CACHE_BYTES: u64 = 256 << 10;

/// A qcow2 image, for what concerns it as a whole: snapshots, size, backing file name, features. From
/// [`crate::Disk::qcow2`] while guests use it, or opened on its own; backing files are not needed.
///
/// Every operation that changes the image takes effect at once: a power cut leaves the image as it was or as it
/// will be, and so does an error that comes before the change. Requests of guests wait meanwhile.
#[derive(Clone)]
pub struct Qcow2Image {
    pub(super) node: Arc<Qcow2Node>,
}

impl Qcow2Image {
    /// Opens an image on its own; one that is encrypted, without its key: what concerns guest data and the state of a
    /// machine fails then. Opening for writing rebuilds the refcounts of an image that was not closed cleanly.
    pub fn open(file: ChainFile, read_only: bool) -> Result<Qcow2Image, BlockError> {
        Qcow2Image::open_backend(ChainBackend::from_file(file)?, read_only)
    }

    /// As [`Qcow2Image::open`], with the key of an encrypted image.
    pub fn open_with_key(file: ChainFile, read_only: bool, key: &LayerKey) -> Result<Qcow2Image, BlockError> {
        Qcow2Image::open_layer(ChainBackend::from_file(file)?, read_only, key)
    }

    /// As [`Qcow2Image::open`], over a backend other than a host file.
    pub fn open_backend(layer: ChainBackend, read_only: bool) -> Result<Qcow2Image, BlockError> {
        Qcow2Image::open_layer(layer, read_only, &LayerKey::Closed)
    }

    fn open_layer(layer: ChainBackend, read_only: bool, key: &LayerKey) -> Result<Qcow2Image, BlockError> {
        let ChainBackend { file, path_label: path, format, extents } = layer;
        if format != Format::Qcow2 {
            return Err(BlockError::FormatDisagrees { path, opened: format, option: Format::Qcow2 });
        }
        let options = Qcow2Options {
            read_only,
            has_backing: true,
            punch_freed: true,
            no_sync: false,
            l2_cache_bytes: L2_CACHE_BYTES,
            sealing: Sealing::Plain,
        };
        let data = match ChainBackend::data_file(extents) {
            // Tables, snapshots and bitmaps are in the image's own file.
            DataFile::Inside => DataFile::Unneeded,
            given => given,
        };
        let node = Qcow2Node::open(file.into(), data, path, options, key)?;
        Ok(Qcow2Image { node: Arc::new(node) })
    }

    pub(crate) fn of(node: Arc<Qcow2Node>) -> Qcow2Image {
        Qcow2Image { node }
    }

    /// Its name in errors.
    pub fn path(&self) -> &Path {
        &self.node.path
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.node.tables.lock().header.clone()
    }

    /// Changes the name of the backing file and of its format as stored in the header, and nothing else: what the guest
    /// sees changes unless the new file holds the same. `None` for both removes it. An open disk keeps its chain.
    pub fn set_backing(&self, name: Option<&str>, format: Option<&str>) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| {
            backing_fits(&rewrite.header, name).map_err(|source| rewrite.place.refuse(source))?;
            rewrite.header.backing_name = name.filter(|name| !name.is_empty()).map(str::to_owned);
            let format = format.filter(|format| !format.is_empty() && rewrite.header.backing_name.is_some());
            rewrite.header.backing_format = format.map(str::to_owned);
            Ok(())
        })
    }

    /// Whether [`Qcow2Image::set_backing`] may store a backing file of this name, for those who prepare for it first.
    pub fn check_backing(&self, name: Option<&str>) -> Result<(), BlockError> {
        backing_fits(&self.header(), name).map_err(|source| self.refuse(source))
    }

    /// Unmaps everything, so that the backing file shows: what follows when all was committed to it. Snapshots stay.
    pub fn make_empty(&self) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| {
            let l1 = rewrite.old_l1.clone();
            rewrite.drop_references(&l1)?;
            rewrite.set_active(vec![0; l1.len()], false)
        })
    }

    /// Changes the key slots of an encrypted image that `key` opens, as [`crate::change_key_slots`] does.
    pub fn change_key_slots(&self, key: &LayerKey, change: &KeySlotChange, force: bool) -> Result<(), BlockError> {
        let tables = self.node.quiet()?;
        let mut volume = luks_volume(&*tables.file, &tables.path, &tables.header)?;
        volume.change_slots(needed(key, &tables.path, QCOW2_KEY_PARAMETER)?, change, force)
    }

    pub(super) fn refuse(&self, source: MaintenanceError) -> BlockError {
        BlockError::Maintenance { path: PathBuf::from(self.path()), source }
    }
}

/// A data file that holds the disk as it is leaves nothing for a backing file to show.
fn backing_fits(header: &Header, name: Option<&str>) -> Result<(), MaintenanceError> {
    let named = name.is_some_and(|name| !name.is_empty());
    if named && header.is_data_file_raw() {
        let reason = "its external data file holds the whole disk (data_file_raw)";
        return Err(MaintenanceError::Unsupported { what: "the backing file", reason });
    }
    Ok(())
}

impl Qcow2Node {
    /// Changes the image as a whole while no request is under way.
    pub(super) fn rewrite<T>(
        &self,
        change: impl FnOnce(&mut Rewrite<'_>) -> Result<T, BlockError>,
    ) -> Result<T, BlockError> {
        let mut tables = self.quiet()?;
        let changed = tables.rewrite(change);
        let changed = tables.noticing(changed);
        self.set_size(tables.geometry.size_bytes);
        changed
    }

    /// As [`Qcow2Node::quiet`], and for an image that is read only just the tables: nothing in them is dirty.
    pub(super) fn quiet_for_reading(&self) -> Result<MutexGuard<'_, Tables>, BlockError> {
        let tables = self.tables.lock();
        if tables.options.read_only {
            return Ok(tables);
        }
        drop(tables);
        self.quiet()
    }

    /// The tables while no request is under way, with everything on disk as it is in memory.
    pub(super) fn quiet(&self) -> Result<MutexGuard<'_, Tables>, BlockError> {
        let mut tables = self.tables.lock();
        while !tables.filling.is_empty() {
            self.filled.wait(&mut tables);
        }
        tables.check_writable()?;
        // New requests need the lock that is held here; those in flight only have a system call to finish.
        while !(self.flights.landed(0) && self.flights.landed(1)) {
            std::thread::yield_now();
        }
        if tables.is_dirty() {
            let committed = tables.commit();
            tables.noticing(committed)?;
        }
        // What the commit dropped; the switch that follows has a barrier of its own before it.
        let written = tables.write_refcounts();
        tables.noticing(written)?;
        let stored = tables.store_bitmaps();
        tables.noticing(stored)?;
        Ok(tables)
    }
}

impl Tables {
    pub(super) fn rewrite<T>(
        &mut self,
        change: impl FnOnce(&mut Rewrite<'_>) -> Result<T, BlockError>,
    ) -> Result<T, BlockError> {
        let outcome = Rewrite::begin(self).and_then(|mut rewrite| {
            let value = change(&mut rewrite)?;
            rewrite.finish()?;
            Ok(value)
        });
        self.settle(outcome)
    }

    /// Brings memory in line with the file after an attempt to change the image as a whole, also a failed one: a header
    /// may have been written though the write failed, and what was written for nothing may no longer count as zeroes.
    pub(super) fn settle<T>(&mut self, outcome: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(BlockError::Io { action: Action::Sync, .. } | BlockError::NoSpace { action: Action::Sync, .. }) =
            &outcome
        {
            self.health = Health::FlushFailed;
            return outcome;
        }
        match (self.reload(), outcome) {
            (Ok(()), outcome) => outcome,
            (Err(error), outcome) => {
                self.health = Health::FlushFailed;
                outcome.and(Err(error))
            }
        }
    }

    /// Reads everything anew from the file.
    fn reload(&mut self) -> Result<(), BlockError> {
        let data = match self.geometry.data_file {
            true => DataFile::Given(self.data.file.clone(), self.data.path.clone()),
            false => DataFile::Inside,
        };
        let mut fresh = Tables::open(self.file.clone(), data, self.path.clone(), &self.options)?;
        fresh.flights = self.flights.clone();
        fresh.generation = self.generation;
        fresh.releases = self.releases + 1;
        fresh.recordings = self.recordings;
        fresh.changed = self.changed;
        *self = fresh;
        Ok(())
    }
}
