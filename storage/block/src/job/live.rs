//! A disk whose layers may change while a guest uses it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};

use crate::disk::Disk;
use crate::error::BlockError;

/// A disk that a guest uses and jobs work on. A request holds it by [`LiveDisk::get`] from its start to its end; a job
/// changes its layers when none is under way.
pub struct LiveDisk {
    disk: RwLock<Disk>,
    waiting: AtomicUsize,
    busy: AtomicBool,
}

impl LiveDisk {
    /// Takes a disk.
    pub fn new(disk: Disk) -> LiveDisk {
        LiveDisk { disk: RwLock::new(disk), waiting: AtomicUsize::new(0), busy: AtomicBool::new(false) }
    }

    /// The disk as it is now, for one request or for some that are under way together. A thread has it once at a time,
    /// and gives it back before it waits for something else.
    pub fn get(&self) -> RwLockReadGuard<'_, Disk> {
        self.disk.read()
    }

    /// Whether a job waits until no request is under way: whoever keeps several under way starts no more until he has
    /// given the disk back.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The disk again, when its guest is gone.
    pub fn into_disk(self) -> Disk {
        self.disk.into_inner()
    }

    /// Changes the disk while no request is under way.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Disk) -> Result<T, BlockError>) -> Result<T, BlockError> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut disk = self.disk.write();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        change(&mut disk)
    }

    /// The right to be the job of this disk, of which there is one at a time.
    pub(super) fn claim(&self) -> Result<Claim<'_>, BlockError> {
        match self.busy.swap(true, Ordering::Acquire) {
            true => Err(BlockError::BusyWithJob { path: self.get().path().to_owned() }),
            false => Ok(Claim(self)),
        }
    }
}

/// Until it is dropped, no other job can start.
pub(super) struct Claim<'a>(&'a LiveDisk);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}
