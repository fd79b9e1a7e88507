//! New LUKS volumes.

use std::path::Path;

use image::luks::{
    CipherSpec, DIGEST_BYTES, Hash, Header, ITERATIONS_MAX, ITERATIONS_MIN, Key, KeySlot, NewHeader, SALT_BYTES,
    SectorCipher, pbkdf2, seal_key_slot,
};
use rustix::time::{ClockId, clock_gettime};
use zeroize::Zeroizing;

use super::{Passphrase, Sealed};
use crate::create::{Preallocation, preallocate};
use crate::error::{Action, BlockError};
use crate::io::FileBackend;
use crate::mapped::random_uuid;
use crate::random::fill_random;
use crate::sys::WriteBufs;
use crate::zeroes::{PIECE_BYTES, write_zero_data};

/// Processor time that a measurement of PBKDF2 takes at least.
const MEASURE_NS: u64 = 50_000_000;
/// Part of the time for a passphrase that the digest of the master key takes: cryptsetup's choice, and QEMU's.
const DIGEST_SHARE: u64 = 8;

/// How a volume is made.
#[derive(Clone, Debug)]
pub struct LuksCreate {
    /// How it is encrypted.
    pub cipher: CipherSpec,
    /// Hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: Hash,
    /// How much processor time trying a passphrase shall cost on this host, in ms. 2000 is usual.
    pub iter_time_ms: u64,
    /// The passphrase of the first key slot.
    pub passphrase: Passphrase,
}

/// A volume that is not written yet.
pub(crate) struct NewVolume {
    /// The header; its first slot is active.
    pub(crate) header: Header,
    /// The material of the first slot.
    material: Vec<u8>,
    /// The key of the data.
    master_key: Key,
}

/// Writes an empty LUKS volume of `size_bytes` into `file`, whose contents are lost; `path` names it in errors. Where
/// nothing was written, the disk reads as arbitrary bytes.
pub fn create_luks(
    file: &dyn FileBackend,
    path: &Path,
    size_bytes: u64,
    opts: &LuksCreate,
    room: Preallocation,
) -> Result<(), BlockError> {
    let volume = new_volume(path, opts)?;
    let start = volume.header.payload_offset();
    let end = size_bytes.checked_add(start).filter(|end| *end <= i64::MAX as u64);
    let end = end.ok_or_else(|| BlockError::io(path, Action::Create, std::io::ErrorKind::FileTooLarge.into()))?;
    volume.write(file, path, 0)?;
    file.set_len_bytes(end).map_err(|e| BlockError::io(path, Action::Create, e))?;
    preallocate(file, path, start..end, room)
}

/// Makes keys and a header.
pub(crate) fn new_volume(path: &Path, opts: &LuksCreate) -> Result<NewVolume, BlockError> {
    let refused = |source| BlockError::Luks { path: path.to_owned(), source };
    opts.cipher.check().map_err(refused)?;
    let mut master_key = Zeroizing::new(vec![0; opts.cipher.key_bytes()]);
    fill_random(path, &mut master_key)?;
    let mut digest_salt = [0; SALT_BYTES];
    fill_random(path, &mut digest_salt)?;
    let per_ms = iterations_per_ms(opts.hash, DIGEST_BYTES).map_err(refused)?;
    let digest_iterations =
        scaled(path, per_ms, opts.iter_time_ms)?.div_euclid(DIGEST_SHARE as u32).max(ITERATIONS_MIN);
    let digest = pbkdf2(opts.hash, &master_key, &digest_salt, digest_iterations, DIGEST_BYTES, &|| true);
    let digest = digest.map_err(refused)?;
    let mut header = Header::new(NewHeader {
        cipher: opts.cipher,
        hash: opts.hash,
        digest: std::array::from_fn(|i| digest.get(i).copied().unwrap_or(0)),
        digest_salt,
        digest_iterations,
        uuid: uuid_text(random_uuid(path)?),
    });
    let [first, ..] = &header.slots;
    let key = SlotKey { passphrase: &opts.passphrase, master_key: &master_key, iter_time_ms: opts.iter_time_ms };
    let (slot, material) = new_slot(path, &header, first, key)?;
    let [first, ..] = &mut header.slots;
    *first = slot;
    Ok(NewVolume { header, material, master_key })
}

/// What a key slot is made of.
#[derive(Clone, Copy)]
pub(super) struct SlotKey<'a> {
    /// What opens it.
    pub passphrase: &'a Passphrase,
    /// What it holds.
    pub master_key: &'a [u8],
    /// As [`LuksCreate::iter_time_ms`].
    pub iter_time_ms: u64,
}

/// Makes an active slot in the place of `at`, and its key material.
pub(super) fn new_slot(
    path: &Path,
    header: &Header,
    at: &KeySlot,
    key: SlotKey<'_>,
) -> Result<(KeySlot, Vec<u8>), BlockError> {
    let SlotKey { passphrase, master_key, iter_time_ms } = key;
    let refused = |source| BlockError::Luks { path: path.to_owned(), source };
    let per_ms = iterations_per_ms(header.hash, header.cipher.key_bytes()).map_err(refused)?;
    let iterations = scaled(path, per_ms, iter_time_ms)?;
    let mut salt = [0; SALT_BYTES];
    fill_random(path, &mut salt)?;
    let mut material = vec![0; header.material_bytes()];
    fill_random(path, &mut material)?;
    let slot = seal_key_slot(header, at, passphrase.bytes(), master_key, iterations, salt, &mut material);
    Ok((slot.map_err(refused)?, material))
}

impl NewVolume {
    /// Bytes that header and key material take.
    pub(crate) fn bytes(&self) -> u64 {
        self.header.payload_offset()
    }

    /// Writes header and key material to `at`.
    pub(crate) fn write(&self, file: &dyn FileBackend, path: &Path, at: u64) -> Result<(), BlockError> {
        let material_offset = self.header.slots.first().map_or(0, KeySlot::material_offset);
        for (offset, bytes) in [(0, &self.header.to_bytes()), (material_offset, &self.material)] {
            let write = file.write_at(at + offset, &WriteBufs::from_slice(bytes));
            write.map_err(|e| BlockError::io(path, Action::Create, e))?;
        }
        Ok(())
    }

    /// Writes encrypted zeroes to a range of a file whose sectors are numbered by their place in it.
    pub(crate) fn write_zeroes(
        &self,
        file: &dyn FileBackend,
        path: &Path,
        range: std::ops::Range<u64>,
    ) -> Result<(), BlockError> {
        let cipher = SectorCipher::new(&self.header.cipher, &self.master_key);
        let sealed = Sealed::new(cipher.map_err(|source| BlockError::Luks { path: path.to_owned(), source })?);
        let written = write_zero_data(range, PIECE_BYTES, |at, zeroes| sealed.write(file, at, at, zeroes));
        written.map_err(|e| BlockError::io(path, Action::Create, e))
    }
}

/// PBKDF2 iterations of a time, within limits.
fn scaled(path: &Path, per_ms: u64, time_ms: u64) -> Result<u32, BlockError> {
    match per_ms.saturating_mul(time_ms) {
        iterations if iterations > u64::from(ITERATIONS_MAX) => {
            Err(BlockError::IterTime { path: path.to_owned(), iterations, max: ITERATIONS_MAX })
        }
        iterations => Ok((iterations as u32).max(ITERATIONS_MIN)),
    }
}

/// PBKDF2 iterations that this processor does in a millisecond, from a measurement by the thread's processor time: what
/// else the host does counts for nothing.
fn iterations_per_ms(hash: Hash, out_bytes: usize) -> Result<u64, image::luks::LuksError> {
    let mut iterations = 1 << 12;
    loop {
        let start = thread_ns();
        pbkdf2(hash, b"passphrase", &[0x5a; SALT_BYTES], iterations, out_bytes, &|| true)?;
        let took_ns = thread_ns().saturating_sub(start).max(1);
        if took_ns >= MEASURE_NS || iterations >= ITERATIONS_MAX / 4 {
            return Ok((u64::from(iterations) * 1_000_000 / took_ns).max(1));
        }
        iterations *= 4;
    }
}

fn thread_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

/// A UUID in the spelling of RFC 9562.
fn uuid_text(bytes: [u8; 16]) -> String {
    let mut out = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            out.push('-');
        }
        out += &format!("{byte:02x}");
    }
    out
}

#[test]
fn a_uuid_is_five_groups() {
    assert_eq!(uuid_text(std::array::from_fn(|i| i as u8)), "00010203-0405-0607-0809-0a0b0c0d0e0f");
}

#[test]
fn iterations_stay_within_limits() {
    let path = Path::new("x");
    assert_eq!(scaled(path, 10, 0).unwrap(), ITERATIONS_MIN);
    assert_eq!(scaled(path, 1000, 2000).unwrap(), 2_000_000);
    assert!(matches!(scaled(path, 1 << 40, u64::MAX), Err(BlockError::IterTime { iterations: u64::MAX, .. })));
}
