//! Internal snapshots: an L1 table of their own for each, sharing clusters by their refcounts.

use image::qcow2::{
    Header, SNAPSHOT_TABLE_MAX_BYTES, Snapshot, SnapshotError, SnapshotL1, SnapshotTable, find_by_id_or_name,
    find_by_name, next_snapshot_id, parse_damaged_snapshots, parse_snapshots, serialise_snapshots,
};

use super::maintenance::Qcow2Image;
use super::maintenance_error::MaintenanceError;
use super::rewrite::{Place, Rewrite};
use crate::error::{Action, BlockError};

/// What a new snapshot says about its moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTime {
    /// Seconds since 1970 in UTC.
    pub date_sec: u32,
    /// Nanoseconds of that second.
    pub date_nsec: u32,
    /// Time the guest has run, in nanoseconds; 0 for a guest that is off.
    pub vm_clock_nsec: u64,
}

impl Qcow2Image {
    /// The internal snapshots, oldest first; also those whose tables a check refuses.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, BlockError> {
        let tables = self.node.tables.lock();
        let place = Place { file: &*tables.file, path: &tables.path };
        Ok(read_table_with(place, &tables.header, parse_damaged_snapshots)?.snapshots)
    }

    /// Writes the snapshot table anew, as it is: its entries get all fields that the format's version demands.
    pub(super) fn rewrite_snapshot_table(&self) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| {
            let table = read_table(rewrite.place, &rewrite.header)?;
            replace_table(rewrite, &table)
        })
    }

    /// Takes a snapshot of the disk as it is. Names need not be unique. Returns its identifier.
    pub fn create_snapshot(&self, name: &str, time: &SnapshotTime) -> Result<String, BlockError> {
        self.node.rewrite(|rewrite| {
            rewrite.refuse_snapshots()?;
            let mut table = read_table(rewrite.place, &rewrite.header)?;
            let l1 = rewrite.old_l1.clone();
            rewrite.add_references(&l1)?;
            // The snapshot keeps the table that is there; the active one moves to a copy.
            let own = SnapshotL1 { offset: rewrite.header.l1_offset, entries: rewrite.header.l1_entries };
            let snapshot = new_snapshot(rewrite, &table.snapshots, name, time, own);
            let id = String::from_utf8_lossy(&snapshot.id).into_owned();
            table.snapshots.push(snapshot);
            rewrite.set_active(l1, true)?;
            replace_table(rewrite, &table)?;
            Ok(id)
        })
    }

    /// Makes the disk what it was when a snapshot was taken, with its size then. `name` is an identifier or a name. What was
    /// written since is lost, unless another snapshot holds it.
    pub fn apply_snapshot(&self, name: &str) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| {
            rewrite.refuse_snapshots()?;
            let table = read_table(rewrite.place, &rewrite.header)?;
            let snapshot = find(rewrite.place, &table.snapshots, name)?;
            let l1 = rewrite.read_l1(snapshot.l1.offset, snapshot.l1.entries)?;
            apply(rewrite, l1, snapshot.disk_bytes)
        })
    }

    /// Makes an image that was opened read only show a snapshot instead of the disk as it is, with its size then. `name` is
    /// an identifier or a name. Nothing in the file changes; no request may be under way.
    pub fn show_snapshot(&self, name: &str) -> Result<(), BlockError> {
        let mut tables = self.node.tables.lock();
        if !tables.options.read_only {
            let reason = "it is open for writing, which would change a snapshot";
            return Err(self.refuse(MaintenanceError::Unsupported { what: "what is shown", reason }));
        }
        let tables = &mut *tables;
        let place = Place { file: &*tables.file, path: &tables.path };
        let table = read_table(place, &tables.header)?;
        let snapshot = find(place, &table.snapshots, name)?;
        let l1 = tables.load_table("L1 table of a snapshot", snapshot.l1.offset, u64::from(snapshot.l1.entries))?;
        tables.l1 = l1;
        tables.geometry.size_bytes = snapshot.disk_bytes.min(i64::MAX as u64);
        self.node.set_size(tables.geometry.size_bytes);
        Ok(())
    }

    /// Deletes the first snapshot of a name.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), BlockError> {
        self.delete(name, |snapshots| find_by_name(snapshots, name.as_bytes()))
    }

    /// Deletes the snapshot of an identifier.
    pub fn delete_snapshot_by_id(&self, id: &str) -> Result<(), BlockError> {
        self.delete(id, |snapshots| snapshots.iter().position(|snapshot| snapshot.id == id.as_bytes()))
    }

    fn delete(&self, what: &str, find: impl FnOnce(&[Snapshot]) -> Option<usize>) -> Result<(), BlockError> {
        self.node.rewrite(|rewrite| {
            let mut table = read_table(rewrite.place, &rewrite.header)?;
            let Some(index) = find(&table.snapshots).filter(|index| *index < table.snapshots.len()) else {
                return Err(rewrite.place.refuse(MaintenanceError::SnapshotNotFound { name: what.to_owned() }));
            };
            let SnapshotL1 { offset, entries } = table.snapshots.remove(index).l1;
            let l1 = rewrite.read_l1(offset, entries)?;
            rewrite.drop_references(&l1)?;
            rewrite.drop_table(offset, u64::from(entries) * 8)?;
            rewrite.set_active(rewrite.old_l1.clone(), false)?;
            replace_table(rewrite, &table)
        })
    }
}

/// A snapshot of the disk as it is.
pub(super) fn new_snapshot(
    rewrite: &Rewrite<'_>,
    others: &[Snapshot],
    name: &str,
    time: &SnapshotTime,
    l1: SnapshotL1,
) -> Snapshot {
    Snapshot {
        l1,
        id: next_snapshot_id(others),
        name: name.as_bytes().to_vec(),
        date_sec: time.date_sec,
        date_nsec: time.date_nsec,
        vm_clock_nsec: time.vm_clock_nsec,
        vm_state_bytes: 0,
        disk_bytes: rewrite.geometry.size_bytes,
        icount: Some(0),
        unknown_extra: Vec::new(),
    }
}

/// The snapshot of an identifier or a name.
pub(super) fn find<'s>(place: Place<'_>, snapshots: &'s [Snapshot], name: &str) -> Result<&'s Snapshot, BlockError> {
    let found = find_by_id_or_name(snapshots, name.as_bytes()).and_then(|index| snapshots.get(index));
    found.ok_or_else(|| place.refuse(MaintenanceError::SnapshotNotFound { name: name.to_owned() }))
}

fn apply(rewrite: &mut Rewrite<'_>, mut l1: Vec<u64>, disk_bytes: u64) -> Result<(), BlockError> {
    rewrite.header.geometry.size_bytes = disk_bytes;
    // A damaged entry may speak of a disk that no L1 table can map; the header's check says so in `finish`.
    let want = rewrite.header.geometry.l1_entries();
    if want > image::qcow2::L1_MAX_BYTES / 8 || disk_bytes > i64::MAX as u64 {
        let source = image::qcow2::HeaderError::L1TooLarge { entries: want, max: image::qcow2::L1_MAX_BYTES / 8 };
        return Err(rewrite.place.refuse(MaintenanceError::Header(source)));
    }
    // The state of a machine behind the disk stays with the snapshot: nobody reads it in the active table, and a writer
    // that lets the disk grow might show it to a guest.
    l1.resize(want.max(1) as usize, 0);
    let old = rewrite.old_l1.clone();
    rewrite.drop_references(&old)?;
    rewrite.add_references(&l1)?;
    rewrite.set_active(l1, false)?;
    rewrite.resize_bitmaps(true)
}

/// Reads the snapshot table that a header refers to.
pub(super) fn read_table(place: Place<'_>, header: &Header) -> Result<SnapshotTable, BlockError> {
    read_table_with(place, header, parse_snapshots)
}

fn read_table_with(
    place: Place<'_>,
    header: &Header,
    parse: impl Fn(&Header, &[u8]) -> Result<SnapshotTable, SnapshotError>,
) -> Result<SnapshotTable, BlockError> {
    if header.snapshot_count == 0 {
        return Ok(SnapshotTable::default());
    }
    let file_bytes = place.file.len_bytes().map_err(|e| BlockError::io(place.path, Action::Stat, e))?;
    let have = file_bytes.saturating_sub(header.snapshots_offset).min(SNAPSHOT_TABLE_MAX_BYTES);
    // Most tables are small, and what follows one in the file may be long.
    let mut want = have.min(64 << 10);
    loop {
        let mut raw = vec![0; want as usize];
        place.read(header.snapshots_offset, &mut raw)?;
        match parse(header, &raw) {
            Err(SnapshotError::CutOff { .. }) if want < have => want = (want * 8).min(have),
            parsed => return parsed.map_err(|source| place.refuse(MaintenanceError::Snapshots(source))),
        }
    }
}

/// Writes a new snapshot table; the old one goes.
pub(super) fn replace_table(rewrite: &mut Rewrite<'_>, table: &SnapshotTable) -> Result<(), BlockError> {
    let refused = |source| MaintenanceError::Snapshots(source);
    let raw = serialise_snapshots(&table.snapshots).map_err(|source| rewrite.place.refuse(refused(source)))?;
    let (old_offset, old_count) = (rewrite.header.snapshots_offset, rewrite.header.snapshot_count);
    rewrite.header.snapshot_count = table.snapshots.len() as u32;
    rewrite.header.snapshots_offset = if raw.is_empty() { 0 } else { rewrite.place(&raw)? };
    if old_count == 0 { Ok(()) } else { rewrite.drop_table(old_offset, table.bytes) }
}
