//! Guest data of an image, which may be encrypted. Tables never are.
//!
//! With LUKS the number of a sector is its place in the file ("qcow2 image format", "Full disk encryption header
//! pointer"), with the old AES encryption its place in the disk. A compressed cluster is not encrypted, so an encrypted
//! image gets none.

use std::path::Path;
use std::sync::Arc;

use image::luks::legacy_aes_cipher;
use image::qcow2::{CryptMethod, Header};

use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::luks::{LayerKey, QCOW2_KEY_PARAMETER, Sealed, Volume, needed};
use crate::sys::{ReadBufs, WriteBufs};

/// How guest data lie in the file.
#[derive(Clone)]
pub(crate) enum Sealing {
    /// As they are.
    Plain,
    /// Encrypted, sectors numbered by their place in the file.
    ByHost(Arc<Sealed>),
    /// Encrypted, sectors numbered by their place in the disk.
    ByGuest(Arc<Sealed>),
    /// Encrypted, and the key is not there.
    Closed,
}

impl Sealing {
    /// What the header asks for, opened with `key`.
    pub(super) fn open(
        file: &dyn FileBackend,
        path: &Path,
        header: &Header,
        key: &LayerKey,
        read_only: bool,
    ) -> Result<Sealing, BlockError> {
        match (header.crypt_method, key) {
            (CryptMethod::None, _) => Ok(Sealing::Plain),
            (_, LayerKey::Closed) => Ok(Sealing::Closed),
            _ if header.geometry.data_file => Err(BlockError::SealedDataFile { path: path.to_owned() }),
            (CryptMethod::LegacyAes, LayerKey::PassphraseOrLegacy(passphrase)) if read_only => {
                let cipher = legacy_aes_cipher(passphrase.bytes());
                let cipher = cipher.map_err(|source| BlockError::Luks { path: path.to_owned(), source })?;
                Ok(Sealing::ByGuest(Arc::new(Sealed::new(cipher))))
            }
            (CryptMethod::LegacyAes, LayerKey::Passphrase(_) | LayerKey::PassphraseOrLegacy(_)) => {
                Err(BlockError::LegacyEncryption { path: path.to_owned() })
            }
            (CryptMethod::LegacyAes | CryptMethod::Luks(_), key) => {
                let passphrase = needed(key, path, QCOW2_KEY_PARAMETER)?;
                let volume = luks_volume(file, path, header)?;
                Ok(Sealing::ByHost(Arc::new(Sealed::new(volume.open(passphrase)?))))
            }
        }
    }

    /// Whether the bytes in the file are those of the disk.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self, Sealing::Plain)
    }

    /// Fills `bufs` from `host` in the file, which holds `guest` of the disk.
    pub(super) fn read(
        &self,
        file: &dyn FileBackend,
        path: &Path,
        host: u64,
        guest: u64,
        bufs: &ReadBufs<'_>,
    ) -> Result<(), BlockError> {
        let read = match self {
            Sealing::Plain => file.read_at(host, bufs),
            Sealing::ByHost(sealed) => sealed.read(file, host, host, bufs),
            Sealing::ByGuest(sealed) => sealed.read(file, host, guest, bufs),
            Sealing::Closed => return Err(BlockError::Closed { path: path.to_owned() }),
        };
        read.map_err(|e| BlockError::io(path, Action::Read, e))
    }

    /// Writes `bufs` to `host` in the file.
    pub(super) fn write(
        &self,
        file: &dyn FileBackend,
        path: &Path,
        host: u64,
        bufs: &WriteBufs<'_>,
    ) -> Result<(), BlockError> {
        let written = match self {
            Sealing::Plain => file.write_at(host, bufs),
            Sealing::ByHost(sealed) => sealed.write(file, host, host, bufs),
            Sealing::ByGuest(_) => return Err(BlockError::LegacyEncryption { path: path.to_owned() }),
            Sealing::Closed => return Err(BlockError::Closed { path: path.to_owned() }),
        };
        written.map_err(|e| BlockError::io(path, Action::Write, e))
    }
}

/// The LUKS header of an image that has one.
pub(crate) fn luks_volume<'f>(
    file: &'f dyn FileBackend,
    path: &'f Path,
    header: &Header,
) -> Result<Volume<'f>, BlockError> {
    match header.crypt_method {
        CryptMethod::Luks(place) => Volume::read(file, path, place.offset, place.bytes),
        _ => Err(BlockError::NotLuks { path: path.to_owned() }),
    }
}
