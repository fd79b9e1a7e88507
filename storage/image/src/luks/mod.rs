//! LUKS version 1: a volume whose sectors are encrypted, with up to eight passphrases for its one master key.
//!
//! [`Header`] is the header on disk, [`unseal`] finds the master key with a passphrase, [`seal_key_slot`] makes a key
//! slot of one, and [`SectorCipher`] encrypts and decrypts sectors with the key. A raw volume has its sectors behind
//! the header; qcow2 keeps the header in clusters of its own and encrypts its guest clusters.
//!
//! The specification meant below is "LUKS On-Disk Format Specification" 1.2.3. What it leaves open (which ciphers,
//! which limits) is as in QEMU, so that both accept the same volumes. Randomness and time come from the caller. Keys
//! are overwritten when they are dropped.

mod af;
mod cipher;
mod header;
mod kdf;
mod slots;

use thiserror::Error;

pub use af::STRIPES;
pub use cipher::{
    CipherAlgorithm, CipherMode, CipherSpec, IvGenerator, SectorCipher, decrypt_aes256_cbc, legacy_aes_cipher,
};
pub use header::{DIGEST_BYTES, HEADER_BYTES, Header, KEY_SLOTS, KeySlot, NewHeader, SALT_BYTES, slot_offset};
pub use kdf::{Hash, Key, pbkdf2};
pub use slots::{Unsealed, seal_key_slot, unseal};

/// Unit in which everything of a volume is placed and encrypted.
pub const SECTOR_BYTES: u64 = 512;
/// Most PBKDF2 iterations that a header may ask for: about half a minute of one processor. QEMU's own limit is 2^32.
pub const ITERATIONS_MAX: u32 = 100_000_000;
/// Fewest iterations of a new key slot or digest.
pub const ITERATIONS_MIN: u32 = 1000;
/// Most bytes of a passphrase that is tried.
pub const PASSPHRASE_MAX_BYTES: usize = 1 << 20;

/// Why a LUKS volume is refused. Field names are the specification's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum LuksError {
    #[error("Volume is not in LUKS format")]
    Magic,
    #[error("LUKS version {0} is not supported")]
    Version(u16),
    #[error("the LUKS header is cut off after {have_bytes} bytes; the image was truncated")]
    Truncated { have_bytes: usize },
    #[error("LUKS header {field} is not NUL-terminated text")]
    Text { field: &'static str },
    #[error("the LUKS cipher '{name}' is not supported here; aes is")]
    Cipher { name: String },
    #[error("the LUKS cipher mode '{mode}' is not supported here; xts, cbc and ecb are, with plain, plain64 or essiv")]
    CipherMode { mode: String },
    #[error("the LUKS hash '{name}' is not supported here; sha1, sha224, sha256, sha384 and sha512 are")]
    Hash { name: String },
    #[error("key-bytes is {bytes}, which {mode} cannot have; {want} are possible")]
    KeyBytes { bytes: u32, mode: &'static str, want: &'static str },
    #[error("No AES cipher with key size {0} available")]
    EssivHash(usize),
    #[error("mk-digest-iter is {found}; 1 to {ITERATIONS_MAX} are accepted")]
    DigestIterations { found: u32 },
    #[error("payload-offset is {sectors} sectors: the LUKS payload overlaps with the header")]
    PayloadOffset { sectors: u32 },
    #[error("the LUKS header is apart from the data (payload-offset is 0), which is not supported here")]
    Detached,
    #[error("Keyslot {slot}: active is {found:#010x}; 0x00ac71f3 and 0x0000dead are the states")]
    SlotState { slot: usize, found: u32 },
    #[error("Keyslot {slot}: iterations is {found}; 1 to {ITERATIONS_MAX} are accepted")]
    SlotIterations { slot: usize, found: u32 },
    #[error("Keyslot {slot}: stripes is {found}; it must be {STRIPES}")]
    SlotStripes { slot: usize, found: u32 },
    #[error("Keyslot {slot}: key-material-offset is {sector} sectors, which {what}")]
    SlotOffset { slot: usize, sector: u32, what: SlotPlace },
    #[error("the passphrase has {bytes} bytes; at most {PASSPHRASE_MAX_BYTES} are tried")]
    PassphraseSize { bytes: usize },
    #[error("stopped: trying the passphrase takes too long with the iterations that the header asks for")]
    TooLong,
    #[error("a buffer of {bytes} bytes was given where {want} belong")]
    Material { bytes: usize, want: usize },
}

impl LuksError {
    /// Whether the volume is sound but beyond this crate.
    pub fn is_unsupported(&self) -> bool {
        use LuksError as E;
        matches!(
            self,
            E::Version(_)
                | E::Cipher { .. }
                | E::CipherMode { .. }
                | E::Hash { .. }
                | E::Detached
                | E::EssivHash(_)
                | E::PassphraseSize { .. }
                | E::TooLong
        )
    }
}

/// What the key material of a slot must not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotPlace {
    /// The header.
    Header,
    /// The encrypted data.
    Payload,
    /// That of another slot.
    Slot(usize),
}

impl std::fmt::Display for SlotPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SlotPlace::Header => f.write_str("overlaps with the LUKS header"),
            SlotPlace::Payload => f.write_str("overlaps with the encrypted payload"),
            SlotPlace::Slot(other) => write!(f, "overlaps with the material of keyslot {other}"),
        }
    }
}
