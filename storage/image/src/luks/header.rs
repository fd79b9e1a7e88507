//! The header (specification 2.3): what the volume is encrypted with, the digest of its master key, eight key slots.

use super::kdf::Hash;
use super::{CipherSpec, ITERATIONS_MAX, LuksError, SECTOR_BYTES, STRIPES, SlotPlace};
use crate::be32;
use crate::bytes::{be16, put};

/// Length of the header's fields.
pub const HEADER_BYTES: usize = 592;
/// Key slots of a header.
pub const KEY_SLOTS: usize = 8;
/// Length of a salt.
pub const SALT_BYTES: usize = 32;
/// Length of the digest of the master key.
pub const DIGEST_BYTES: usize = 20;

const MAGIC: &[u8] = b"LUKS\xba\xbe";
const VERSION: u16 = 1;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
/// Where the key material of the first slot starts, and what the material of each is aligned to.
const ALIGN_BYTES: u64 = 4096;
const ALIGN_SECTORS: u32 = (ALIGN_BYTES / SECTOR_BYTES) as u32;

/// One key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether it holds the master key.
    pub active: bool,
    /// PBKDF2 iterations of its passphrase.
    pub iterations: u32,
    /// PBKDF2 salt of its passphrase.
    pub salt: [u8; SALT_BYTES],
    /// Where its key material starts.
    pub material_sector: u32,
}

impl KeySlot {
    /// Where its key material starts, in bytes from the start of the header.
    pub fn material_offset(&self) -> u64 {
        u64::from(self.material_sector) * SECTOR_BYTES
    }
}

/// A checked header: names are known, numbers within their limits, and no two parts of the volume overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How key material and data are encrypted.
    pub cipher: CipherSpec,
    /// Hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: Hash,
    /// Where the data starts in a raw volume; qcow2 does not use it.
    pub payload_sector: u32,
    /// PBKDF2 digest of the master key.
    pub digest: [u8; DIGEST_BYTES],
    /// Its salt.
    pub digest_salt: [u8; SALT_BYTES],
    /// Its iterations.
    pub digest_iterations: u32,
    /// UUID as text.
    pub uuid: String,
    /// The key slots.
    pub slots: [KeySlot; KEY_SLOTS],
}

/// What a new header says.
#[derive(Clone, Debug)]
pub struct NewHeader {
    /// How key material and data are encrypted.
    pub cipher: CipherSpec,
    /// Hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: Hash,
    /// PBKDF2 digest of the master key.
    pub digest: [u8; DIGEST_BYTES],
    /// Its salt.
    pub digest_salt: [u8; SALT_BYTES],
    /// Its iterations.
    pub digest_iterations: u32,
    /// UUID as text, at most 39 bytes.
    pub uuid: String,
}

impl Header {
    /// The header of a new volume. No slot is active; the places are those that QEMU chooses.
    pub fn new(new: NewHeader) -> Header {
        let NewHeader { cipher, hash, digest, digest_salt, digest_iterations, uuid } = new;
        let step = material_sectors(&cipher).next_multiple_of(ALIGN_SECTORS);
        let slot = |index: usize| KeySlot {
            active: false,
            iterations: 0,
            salt: [0; SALT_BYTES],
            material_sector: ALIGN_SECTORS + index as u32 * step,
        };
        Header {
            cipher,
            hash,
            payload_sector: ALIGN_SECTORS + KEY_SLOTS as u32 * step,
            digest,
            digest_salt,
            digest_iterations,
            uuid,
            slots: std::array::from_fn(slot),
        }
    }

    /// Parses the first [`HEADER_BYTES`] of a volume.
    pub fn parse(bytes: &[u8]) -> Result<Header, LuksError> {
        if !bytes.starts_with(MAGIC) {
            return Err(LuksError::Magic);
        }
        let cut = || LuksError::Truncated { have_bytes: bytes.len() };
        let version = be16(bytes, 6).ok_or_else(cut)?;
        if version != VERSION {
            return Err(LuksError::Version(version));
        }
        if bytes.len() < HEADER_BYTES {
            return Err(cut());
        }
        let u32_at = |at| be32(bytes, at).ok_or_else(cut);
        let name = text(bytes, 8, 32, "cipher-name")?;
        let mode = text(bytes, 40, 32, "cipher-mode")?;
        let hash = Hash::named(&text(bytes, 72, 32, "hash-spec")?)?;
        let cipher = CipherSpec::parse(&name, &mode, u32_at(108)?)?;
        let digest_iterations = u32_at(164)?;
        if !(1..=ITERATIONS_MAX).contains(&digest_iterations) {
            return Err(LuksError::DigestIterations { found: digest_iterations });
        }
        let mut slots = Vec::with_capacity(KEY_SLOTS);
        for slot in 0..KEY_SLOTS {
            slots.push(parse_slot(bytes, slot)?);
        }
        let header = Header {
            cipher,
            hash,
            payload_sector: u32_at(104)?,
            digest: field(bytes, 112).ok_or_else(cut)?,
            digest_salt: field(bytes, 132).ok_or_else(cut)?,
            digest_iterations,
            uuid: text(bytes, 168, 40, "uuid")?,
            slots: slots.try_into().map_err(|_| cut())?,
        };
        header.check_places()?;
        Ok(header)
    }

    fn check_places(&self) -> Result<(), LuksError> {
        match self.payload_sector {
            0 => return Err(LuksError::Detached),
            sectors if sectors < ALIGN_SECTORS => return Err(LuksError::PayloadOffset { sectors }),
            _ => {}
        }
        let sectors = u64::from(material_sectors(&self.cipher));
        let place = |slot: &KeySlot| u64::from(slot.material_sector)..u64::from(slot.material_sector) + sectors;
        let header_sectors = (HEADER_BYTES as u64).div_ceil(SECTOR_BYTES);
        for (index, slot) in self.slots.iter().enumerate() {
            let here = place(slot);
            let others = self.slots.iter().enumerate().take(index);
            let same = others.map(|(other, slot)| (other, place(slot)));
            let overlap = same.into_iter().find(|(_, there)| here.start < there.end && there.start < here.end);
            let what = if here.start < header_sectors {
                SlotPlace::Header
            } else if here.end > u64::from(self.payload_sector) {
                SlotPlace::Payload
            } else if let Some((other, _)) = overlap {
                SlotPlace::Slot(other)
            } else {
                continue;
            };
            return Err(LuksError::SlotOffset { slot: index, sector: slot.material_sector, what });
        }
        Ok(())
    }

    /// Bytes that the header of a new volume and its key material take.
    pub fn new_bytes(cipher: &CipherSpec) -> u64 {
        let step = u64::from(material_sectors(cipher).next_multiple_of(ALIGN_SECTORS));
        (u64::from(ALIGN_SECTORS) + KEY_SLOTS as u64 * step) * SECTOR_BYTES
    }

    /// Length of the key material of a slot in bytes.
    pub fn material_bytes(&self) -> usize {
        self.cipher.key_bytes() * STRIPES as usize
    }

    /// Where the data starts in a raw volume: header and key material end before it.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector) * SECTOR_BYTES
    }

    /// The fields as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        put(&mut out, 0, MAGIC);
        put(&mut out, 6, &VERSION.to_be_bytes());
        put_text(&mut out, 8, 32, "aes");
        put_text(&mut out, 40, 32, &self.cipher.mode_name());
        put_text(&mut out, 72, 32, self.hash.name());
        put(&mut out, 104, &self.payload_sector.to_be_bytes());
        put(&mut out, 108, &(self.cipher.key_bytes() as u32).to_be_bytes());
        put(&mut out, 112, &self.digest);
        put(&mut out, 132, &self.digest_salt);
        put(&mut out, 164, &self.digest_iterations.to_be_bytes());
        put_text(&mut out, 168, 40, &self.uuid);
        for (index, slot) in self.slots.iter().enumerate() {
            put(&mut out, slot_offset(index), &slot.to_bytes());
        }
        out
    }
}

impl KeySlot {
    /// The slot's record. It starts with the four bytes that say whether it is active, which lie in one sector
    /// whichever slot it is; the rest of the seventh slot lies in the next one.
    pub fn to_bytes(&self) -> [u8; SLOT_BYTES] {
        let mut out = [0; SLOT_BYTES];
        put(&mut out, 0, &if self.active { ENABLED } else { DISABLED }.to_be_bytes());
        put(&mut out, 4, &self.iterations.to_be_bytes());
        put(&mut out, 8, &self.salt);
        put(&mut out, 40, &self.material_sector.to_be_bytes());
        put(&mut out, 44, &STRIPES.to_be_bytes());
        out
    }
}

/// Where the record of a slot is in the header.
pub fn slot_offset(slot: usize) -> usize {
    SLOTS_AT + slot * SLOT_BYTES
}

fn parse_slot(bytes: &[u8], slot: usize) -> Result<KeySlot, LuksError> {
    let cut = || LuksError::Truncated { have_bytes: bytes.len() };
    let at = slot_offset(slot);
    let u32_at = |offset: usize| be32(bytes, at + offset).ok_or_else(cut);
    let active = match u32_at(0)? {
        ENABLED => true,
        DISABLED => false,
        found => return Err(LuksError::SlotState { slot, found }),
    };
    let (iterations, stripes) = (u32_at(4)?, u32_at(44)?);
    if active && !(1..=ITERATIONS_MAX).contains(&iterations) {
        return Err(LuksError::SlotIterations { slot, found: iterations });
    }
    if stripes != STRIPES {
        return Err(LuksError::SlotStripes { slot, found: stripes });
    }
    let salt = field(bytes, at + 8).ok_or_else(cut)?;
    Ok(KeySlot { active, iterations, salt, material_sector: u32_at(40)? })
}

/// Whole sectors of the key material of a slot.
fn material_sectors(cipher: &CipherSpec) -> u32 {
    (cipher.key_bytes() as u32 * STRIPES).div_ceil(SECTOR_BYTES as u32)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn text(bytes: &[u8], at: usize, len: usize, field: &'static str) -> Result<String, LuksError> {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(LuksError::Text { field })?;
    let text = bytes.get(..end).unwrap_or_default();
    match std::str::from_utf8(text) {
        Ok(text) if text.chars().all(|c| !c.is_control()) => Ok(text.to_owned()),
        _ => Err(LuksError::Text { field }),
    }
}

fn put_text(out: &mut [u8], at: usize, len: usize, text: &str) {
    put(out, at, text.as_bytes().get(..text.len().min(len - 1)).unwrap_or_default());
}

#[cfg(test)]
pub(super) fn sample(cipher: CipherSpec) -> Header {
    Header::new(NewHeader {
        cipher,
        hash: Hash::Sha256,
        digest: [1; 20],
        digest_salt: [2; 32],
        digest_iterations: 1000,
        uuid: "a7cde690-2057-40f7-8e15-e082a2771781".into(),
    })
}

#[test]
fn serialising_and_parsing_agree_and_places_are_qemus() {
    let header = sample(CipherSpec::default());
    assert_eq!(Header::parse(&header.to_bytes()), Ok(header.clone()));
    // As `qemu-img info` prints them.
    let offsets: Vec<u64> = header.slots.iter().map(KeySlot::material_offset).collect();
    assert_eq!(offsets, [4096, 262144, 520192, 778240, 1036288, 1294336, 1552384, 1810432]);
    assert_eq!((header.payload_offset(), header.material_bytes()), (2068480, 256_000));
    assert_eq!(Header::new_bytes(&header.cipher), 2068480);
    let mut active = header;
    active.slots[6] = KeySlot { active: true, iterations: 7, salt: [8; 32], ..active.slots[6].clone() };
    assert_eq!(Header::parse(&active.to_bytes()), Ok(active));
}

#[test]
fn each_field_is_checked() {
    use LuksError as E;
    let good = sample(CipherSpec::default()).to_bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        put(&mut bad, at, bytes);
        Header::parse(&bad).unwrap_err()
    };
    let slot = |index: usize, at: usize, value: u32| with(slot_offset(index) + at, &value.to_be_bytes());
    let enabled = |value: u32| with(slot_offset(3), &[ENABLED.to_be_bytes(), value.to_be_bytes()].concat());
    for (got, want) in [
        (with(0, b"K"), E::Magic),
        (with(6, &[0, 2]), E::Version(2)),
        (with(8, &[b'a'; 32]), E::Text { field: "cipher-name" }),
        (with(8, b"twofish\0"), E::Cipher { name: "twofish".into() }),
        (with(40, b"ctr-plain64\0"), E::CipherMode { mode: "ctr-plain64".into() }),
        (with(72, b"md5\0"), E::Hash { name: "md5".into() }),
        (with(72, b"\xff\0"), E::Text { field: "hash-spec" }),
        (with(104, &[0; 4]), E::Detached),
        (with(104, &[0, 0, 0, 7]), E::PayloadOffset { sectors: 7 }),
        (with(108, &[0xff; 4]), E::KeyBytes { bytes: u32::MAX, mode: "xts", want: "32, 48 and 64" }),
        (with(164, &[0; 4]), E::DigestIterations { found: 0 }),
        (with(164, &[0xff; 4]), E::DigestIterations { found: u32::MAX }),
        (with(168, &[b'u'; 40]), E::Text { field: "uuid" }),
        (with(168, b"a\nb\0"), E::Text { field: "uuid" }),
        (slot(3, 0, 1), E::SlotState { slot: 3, found: 1 }),
        (enabled(0), E::SlotIterations { slot: 3, found: 0 }),
        (enabled(ITERATIONS_MAX + 1), E::SlotIterations { slot: 3, found: ITERATIONS_MAX + 1 }),
        (slot(0, 44, 0), E::SlotStripes { slot: 0, found: 0 }),
        (slot(7, 44, u32::MAX), E::SlotStripes { slot: 7, found: u32::MAX }),
        (slot(2, 40, 1), E::SlotOffset { slot: 2, sector: 1, what: SlotPlace::Header }),
        (slot(2, 40, 4000), E::SlotOffset { slot: 2, sector: 4000, what: SlotPlace::Payload }),
        (slot(2, 40, u32::MAX), E::SlotOffset { slot: 2, sector: u32::MAX, what: SlotPlace::Payload }),
        (slot(2, 40, 100), E::SlotOffset { slot: 2, sector: 100, what: SlotPlace::Slot(0) }),
    ] {
        assert_eq!(got, want);
    }
    for len in 0..HEADER_BYTES {
        assert!(matches!(Header::parse(&good[..len]), Err(E::Magic | E::Truncated { .. })), "{len}");
    }
}
