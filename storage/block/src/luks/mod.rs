//! Encrypted layers: LUKS volumes as images of their own, and the encryption inside qcow2.
//!
//! [`Sealed`] moves guest data between a caller's buffers and an encrypted file, in `sealed`. [`Volume`] is a LUKS
//! header in its place, in `volume`; `create` makes one and `keyslots` changes its passphrases, both so that a power
//! cut leaves a volume that opens. [`LuksNode`] is a raw volume as a layer, in `node`.
//!
//! Guest memory is never encrypted or decrypted in place: a guest would see ciphertext, and change plain text under the
//! cipher. What goes to the file goes through buffers of our own.

mod create;
mod keyslots;
mod node;
mod sealed;
mod volume;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::error::BlockError;

pub use create::{LuksCreate, create_luks};
pub(crate) use create::{NewVolume, new_volume};
pub use keyslots::{KeySlotChange, KeySlotError, change_key_slots};
pub(crate) use node::{disk_bytes, open_luks};
pub(crate) use sealed::Sealed;
pub(crate) use volume::Volume;

/// Bytes that open an encrypted layer. They are overwritten when the last copy is dropped, and no message shows them.
#[derive(Clone)]
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// Takes the bytes.
    pub fn new(bytes: Vec<u8>) -> Passphrase {
        Passphrase(Arc::new(Zeroizing::new(bytes)))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

/// How a layer is opened that may be encrypted. One that is not needs no key and ignores it.
#[derive(Clone, Debug, Default)]
pub enum LayerKey {
    /// There is no key: an encrypted layer is refused.
    #[default]
    None,
    /// There is no key, and none is needed: only what describes the image is looked at. Reading data fails.
    Closed,
    /// The passphrase.
    Passphrase(Passphrase),
    /// The passphrase, also for the old AES-CBC encryption of qcow2, which can be read and not written. It is weak:
    /// for a person who gets their data out of such an image, never for a machine.
    PassphraseOrLegacy(Passphrase),
}

/// How an image is encrypted, as far as its header tells everybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncryptionInfo {
    /// LUKS.
    Luks(Box<image::luks::Header>),
    /// AES-128-CBC of old qcow2 images.
    LegacyAes,
}

/// The option that names the secret of a raw volume.
pub(crate) const LUKS_KEY_PARAMETER: &str = "key-secret";
/// The same of a qcow2 image.
pub(crate) const QCOW2_KEY_PARAMETER: &str = "encrypt.key-secret";

/// The passphrase of a key that must have one.
pub(crate) fn needed<'k>(
    key: &'k LayerKey,
    path: &Path,
    parameter: &'static str,
) -> Result<&'k Passphrase, BlockError> {
    match key {
        LayerKey::Passphrase(passphrase) | LayerKey::PassphraseOrLegacy(passphrase) => Ok(passphrase),
        LayerKey::None | LayerKey::Closed => Err(BlockError::KeyNeeded { path: path.to_owned(), parameter }),
    }
}
