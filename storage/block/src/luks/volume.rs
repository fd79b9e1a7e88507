//! A LUKS header in its place: read, and opened with a passphrase.

use std::path::Path;
use std::time::{Duration, Instant};

use image::luks::{HEADER_BYTES, Header, KEY_SLOTS, KeySlot, SectorCipher, Unsealed, unseal};

use super::Passphrase;
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::sys::{ReadBufs, WriteBufs};

/// Longest time that trying one passphrase may take. A volume of a slow host with all its slots in use needs half.
const UNSEAL_MAX: Duration = Duration::from_secs(120);

/// All key slots.
pub(super) const ALL_SLOTS: [usize; KEY_SLOTS] = [0, 1, 2, 3, 4, 5, 6, 7];

/// A header with the file that holds it.
pub(crate) struct Volume<'f> {
    pub(super) file: &'f dyn FileBackend,
    pub(super) path: &'f Path,
    /// Where the header starts in the file.
    pub(super) at: u64,
    pub(crate) header: Header,
}

impl<'f> Volume<'f> {
    /// Reads the header at `at`. It and the key material lie in the `room` bytes from there.
    pub(crate) fn read(
        file: &'f dyn FileBackend,
        path: &'f Path,
        at: u64,
        room: u64,
    ) -> Result<Volume<'f>, BlockError> {
        let mut bytes = vec![0; room.min(HEADER_BYTES as u64) as usize];
        let read = file.read_at(at, &ReadBufs::from_slice(&mut bytes));
        read.map_err(|e| BlockError::io(path, Action::Read, e))?;
        let header = Header::parse(&bytes).map_err(|source| BlockError::Luks { path: path.to_owned(), source })?;
        let volume = Volume { file, path, at, header };
        match volume.header.payload_offset() {
            need if need > room => Err(BlockError::LuksCutOff { path: path.to_owned(), need, room }),
            _ => Ok(volume),
        }
    }

    /// Finds the master key.
    pub(crate) fn unseal(&self, passphrase: &Passphrase) -> Result<Unsealed, BlockError> {
        let unsealed = self.try_slots(passphrase, &ALL_SLOTS)?;
        unsealed.ok_or_else(|| BlockError::WrongKey { path: self.path.to_owned() })
    }

    /// The cipher of the data.
    pub(crate) fn open(&self, passphrase: &Passphrase) -> Result<SectorCipher, BlockError> {
        let unsealed = self.unseal(passphrase)?;
        SectorCipher::new(&self.header.cipher, &unsealed.master_key).map_err(|source| self.refused(source))
    }

    /// Tries a passphrase on some slots.
    pub(super) fn try_slots(&self, passphrase: &Passphrase, slots: &[usize]) -> Result<Option<Unsealed>, BlockError> {
        let until = Instant::now() + UNSEAL_MAX;
        let mut material = |slot: &KeySlot| self.material(slot).map_err(Failure::Block);
        let go_on = || Instant::now() < until;
        unseal(&self.header, passphrase.bytes(), slots, &mut material, &go_on).map_err(|failure| match failure {
            Failure::Block(error) => error,
            Failure::Luks(source) => self.refused(source),
        })
    }

    /// The key material of a slot.
    fn material(&self, slot: &KeySlot) -> Result<Vec<u8>, BlockError> {
        let mut material = vec![0; self.header.material_bytes()];
        let read = self.file.read_at(self.at + slot.material_offset(), &ReadBufs::from_slice(&mut material));
        read.map_err(|e| BlockError::io(self.path, Action::Read, e))?;
        Ok(material)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let write = self.file.write_at(self.at + offset, &WriteBufs::from_slice(bytes));
        write.map_err(|e| BlockError::io(self.path, Action::Write, e))
    }

    pub(super) fn barrier(&self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(|e| BlockError::io(self.path, Action::Sync, e))
    }

    pub(super) fn refused(&self, source: image::luks::LuksError) -> BlockError {
        BlockError::Luks { path: self.path.to_owned(), source }
    }
}

/// Why a passphrase could not be tried.
enum Failure {
    Block(BlockError),
    Luks(image::luks::LuksError),
}

impl From<image::luks::LuksError> for Failure {
    fn from(error: image::luks::LuksError) -> Failure {
        Failure::Luks(error)
    }
}
