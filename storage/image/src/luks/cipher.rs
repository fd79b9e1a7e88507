//! AES over sectors: modes, initialisation vectors, and runs of sectors at a time.
//!
//! A batch of sectors goes through the processor's AES units as one row of independent blocks wherever the mode allows
//! it; CBC encryption, which chains the blocks of a sector, takes one block of each sector of the batch at a time.

use aes::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};

use super::kdf::Hash;
use super::{LuksError, SECTOR_BYTES};

const SECTOR: usize = SECTOR_BYTES as usize;
const BLOCK: usize = 16;
const BLOCKS: usize = SECTOR / BLOCK;
/// Sectors that go through together: their data and tweaks stay in the processor's first cache.
const BATCH: usize = 8;

type AesBlock = Block<Aes128>;

/// AES by the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names say it")]
pub enum CipherAlgorithm {
    Aes128,
    Aes192,
    Aes256,
}

impl CipherAlgorithm {
    /// All of them.
    pub const ALL: [CipherAlgorithm; 3] = [CipherAlgorithm::Aes128, CipherAlgorithm::Aes192, CipherAlgorithm::Aes256];

    /// The name in options: `aes-256`.
    pub fn name(self) -> &'static str {
        match self {
            CipherAlgorithm::Aes128 => "aes-128",
            CipherAlgorithm::Aes192 => "aes-192",
            CipherAlgorithm::Aes256 => "aes-256",
        }
    }

    /// Length of a key of AES.
    fn key_bytes(self) -> usize {
        match self {
            CipherAlgorithm::Aes128 => 16,
            CipherAlgorithm::Aes192 => 24,
            CipherAlgorithm::Aes256 => 32,
        }
    }
}

/// How the blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherMode {
    /// IEEE 1619, with two keys.
    Xts,
    /// Chained.
    Cbc,
    /// Not at all: equal blocks look equal.
    Ecb,
}

impl CipherMode {
    /// All of them.
    pub const ALL: [CipherMode; 3] = [CipherMode::Xts, CipherMode::Cbc, CipherMode::Ecb];

    /// The name in options and headers.
    pub fn name(self) -> &'static str {
        match self {
            CipherMode::Xts => "xts",
            CipherMode::Cbc => "cbc",
            CipherMode::Ecb => "ecb",
        }
    }
}

/// How the number of a sector becomes its initialisation vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGenerator {
    /// Its low 32 bits.
    Plain,
    /// Its 64 bits.
    Plain64,
    /// Its 64 bits, encrypted with the hash of the key.
    Essiv(Hash),
}

impl IvGenerator {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Essiv(_) => "essiv",
        }
    }
}

/// How a volume is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// AES of this size.
    pub algorithm: CipherAlgorithm,
    /// Its mode.
    pub mode: CipherMode,
    /// Its initialisation vectors.
    pub iv: IvGenerator,
}

impl Default for CipherSpec {
    /// QEMU's choice, and cryptsetup's: aes-256, xts, plain64.
    fn default() -> CipherSpec {
        CipherSpec { algorithm: CipherAlgorithm::Aes256, mode: CipherMode::Xts, iv: IvGenerator::Plain64 }
    }
}

impl CipherSpec {
    /// Length of the master key in bytes.
    pub fn key_bytes(&self) -> usize {
        self.algorithm.key_bytes() * if self.mode == CipherMode::Xts { 2 } else { 1 }
    }

    /// The header's cipher-mode: `xts-plain64`.
    pub fn mode_name(&self) -> String {
        let (mode, iv) = (self.mode.name(), self.iv.name());
        match self.iv {
            IvGenerator::Essiv(hash) => format!("{mode}-{iv}:{}", hash.name()),
            _ => format!("{mode}-{iv}"),
        }
    }

    /// Reads a header's cipher-name, cipher-mode and key-bytes.
    pub fn parse(name: &str, mode_name: &str, key_bytes: u32) -> Result<CipherSpec, LuksError> {
        if name != "aes" {
            return Err(LuksError::Cipher { name: name.to_owned() });
        }
        let refused = || LuksError::CipherMode { mode: mode_name.to_owned() };
        let (mode, iv) = mode_name.split_once('-').ok_or_else(refused)?;
        let mode = CipherMode::ALL.into_iter().find(|known| known.name() == mode).ok_or_else(refused)?;
        let iv = match iv.split_once(':') {
            None if iv == "plain" => IvGenerator::Plain,
            None if iv == "plain64" => IvGenerator::Plain64,
            Some(("essiv", hash)) => IvGenerator::Essiv(Hash::named(hash)?),
            _ => return Err(refused()),
        };
        let of_key = CipherAlgorithm::ALL.into_iter().find(|algorithm| {
            let spec = CipherSpec { algorithm: *algorithm, mode, iv };
            spec.key_bytes() == key_bytes as usize
        });
        let want = if mode == CipherMode::Xts { "32, 48 and 64" } else { "16, 24 and 32" };
        let algorithm = of_key.ok_or(LuksError::KeyBytes { bytes: key_bytes, mode: mode.name(), want })?;
        let spec = CipherSpec { algorithm, mode, iv };
        spec.check()?;
        Ok(spec)
    }

    /// Whether the initialisation vectors can be made.
    pub fn check(&self) -> Result<(), LuksError> {
        match self.iv {
            IvGenerator::Essiv(hash) if !matches!(hash.digest_bytes(), 16 | 24 | 32) => {
                Err(LuksError::EssivHash(hash.digest_bytes()))
            }
            _ => Ok(()),
        }
    }
}

/// AES with one key. Its key schedule is overwritten when it is dropped.
enum Aes {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
}

impl Aes {
    fn new(key: &[u8]) -> Option<Aes> {
        Some(match key.len() {
            16 => Aes::Aes128(Box::new(Aes128::new_from_slice(key).ok()?)),
            24 => Aes::Aes192(Box::new(Aes192::new_from_slice(key).ok()?)),
            32 => Aes::Aes256(Box::new(Aes256::new_from_slice(key).ok()?)),
            _ => return None,
        })
    }

    fn encrypt(&self, blocks: &mut [AesBlock]) {
        match self {
            Aes::Aes128(aes) => aes.encrypt_blocks(blocks),
            Aes::Aes192(aes) => aes.encrypt_blocks(blocks),
            Aes::Aes256(aes) => aes.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [AesBlock]) {
        match self {
            Aes::Aes128(aes) => aes.decrypt_blocks(blocks),
            Aes::Aes192(aes) => aes.decrypt_blocks(blocks),
            Aes::Aes256(aes) => aes.decrypt_blocks(blocks),
        }
    }
}

enum Mode {
    Xts { tweak: Aes },
    Cbc,
    Ecb,
}

enum Iv {
    Plain,
    Plain64,
    Essiv(Aes),
}

/// Encrypts and decrypts whole sectors in place. Several threads use it at once.
pub struct SectorCipher {
    data: Aes,
    mode: Mode,
    iv: Iv,
}

impl SectorCipher {
    /// A cipher with a key of [`CipherSpec::key_bytes`].
    pub fn new(spec: &CipherSpec, key: &[u8]) -> Result<SectorCipher, LuksError> {
        let refused =
            || LuksError::KeyBytes { bytes: key.len() as u32, mode: spec.mode.name(), want: spec.algorithm.name() };
        if key.len() != spec.key_bytes() {
            return Err(refused());
        }
        let (data, tweak) = key.split_at(spec.algorithm.key_bytes());
        let mode = match spec.mode {
            CipherMode::Xts => Mode::Xts { tweak: Aes::new(tweak).ok_or_else(refused)? },
            CipherMode::Cbc => Mode::Cbc,
            CipherMode::Ecb => Mode::Ecb,
        };
        let iv = match spec.iv {
            IvGenerator::Plain => Iv::Plain,
            IvGenerator::Plain64 => Iv::Plain64,
            IvGenerator::Essiv(hash) => {
                let aes = Aes::new(&hash.digest(&[key])).ok_or(LuksError::EssivHash(hash.digest_bytes()))?;
                Iv::Essiv(aes)
            }
        };
        Ok(SectorCipher { data: Aes::new(data).ok_or_else(refused)?, mode, iv })
    }

    /// Encrypts sectors that are numbered from `first_sector` on. The last one may be a part of a sector in whole
    /// blocks of 16 bytes, which is what the same part of the whole sector becomes; other bytes at the end stay as
    /// they are.
    pub fn encrypt(&self, first_sector: u64, bytes: &mut [u8]) {
        self.each_batch(first_sector, bytes, |ivs, blocks| match &self.mode {
            Mode::Xts { tweak } => {
                tweak.encrypt(ivs);
                with_tweaks(ivs, blocks, |blocks| self.data.encrypt(blocks));
            }
            Mode::Cbc => self.encrypt_chained(ivs, blocks),
            Mode::Ecb => self.data.encrypt(blocks),
        });
    }

    /// Undoes [`SectorCipher::encrypt`].
    pub fn decrypt(&self, first_sector: u64, bytes: &mut [u8]) {
        self.each_batch(first_sector, bytes, |ivs, blocks| match &self.mode {
            Mode::Xts { tweak } => {
                tweak.encrypt(ivs);
                with_tweaks(ivs, blocks, |blocks| self.data.decrypt(blocks));
            }
            Mode::Cbc => self.decrypt_chained(ivs, blocks),
            Mode::Ecb => self.data.decrypt(blocks),
        });
    }

    /// Calls `work` with the initialisation vectors of some sectors and their blocks.
    fn each_batch(&self, first_sector: u64, bytes: &mut [u8], work: impl Fn(&mut [AesBlock], &mut [AesBlock])) {
        let mut sector = first_sector;
        for batch in bytes.chunks_mut(BATCH * SECTOR) {
            let mut ivs = [AesBlock::default(); BATCH];
            let count = batch.len().div_ceil(SECTOR).min(BATCH);
            let ivs = ivs.get_mut(..count).unwrap_or_default();
            for iv in ivs.iter_mut() {
                let number = if matches!(self.iv, Iv::Plain) { sector & 0xffff_ffff } else { sector };
                *iv = Array(u128::from(number).to_le_bytes());
                sector = sector.wrapping_add(1);
            }
            if let Iv::Essiv(aes) = &self.iv {
                aes.encrypt(ivs);
            }
            let (blocks, _) = AesBlock::slice_as_chunks_mut(batch);
            work(ivs, blocks);
        }
    }

    /// One block of each sector at a time: those do not depend on each other.
    fn encrypt_chained(&self, ivs: &mut [AesBlock], blocks: &mut [AesBlock]) {
        for place in 0..BLOCKS {
            let mut count = 0;
            for (previous, block) in ivs.iter_mut().zip(blocks.iter().skip(place).step_by(BLOCKS)) {
                xor_block(previous, block);
                count += 1;
            }
            self.data.encrypt(ivs.get_mut(..count).unwrap_or_default());
            for (previous, block) in ivs.iter().zip(blocks.iter_mut().skip(place).step_by(BLOCKS)) {
                *block = *previous;
            }
        }
    }

    fn decrypt_chained(&self, ivs: &[AesBlock], blocks: &mut [AesBlock]) {
        let mut sealed = [AesBlock::default(); BATCH * BLOCKS];
        let sealed = sealed.get_mut(..blocks.len()).unwrap_or_default();
        sealed.copy_from_slice(blocks);
        self.data.decrypt(blocks);
        for ((plain, sealed), iv) in blocks.chunks_mut(BLOCKS).zip(sealed.chunks(BLOCKS)).zip(ivs) {
            for (block, previous) in plain.iter_mut().zip(std::iter::once(iv).chain(sealed)) {
                xor_block(block, previous);
            }
        }
    }
}

fn xor_block(block: &mut AesBlock, with: &AesBlock) {
    let sum = u128::from_ne_bytes(block.0) ^ u128::from_ne_bytes(with.0);
    block.0 = sum.to_ne_bytes();
}

/// XTS around the encryption or decryption of blocks (IEEE 1619-2007 5.3): each is combined with its tweak before and
/// after. The tweak of a sector's next block is that of the one before, times the primitive element of GF(2^128).
fn with_tweaks(firsts: &[AesBlock], blocks: &mut [AesBlock], work: impl FnOnce(&mut [AesBlock])) {
    let mut tweaks = [0u128; BATCH * BLOCKS];
    for (tweaks, first) in tweaks.chunks_mut(BLOCKS).zip(firsts) {
        let mut tweak = u128::from_le_bytes(first.0);
        for slot in tweaks {
            *slot = tweak;
            tweak = (tweak << 1) ^ (0x87 * (tweak >> 127));
        }
    }
    let combine = |blocks: &mut [AesBlock]| {
        for (block, tweak) in blocks.iter_mut().zip(&tweaks) {
            block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
        }
    };
    combine(blocks);
    work(blocks);
    combine(blocks);
}

/// Undoes AES-256-CBC without padding, as QEMU encrypts secrets: whole blocks in place; bytes behind the last whole block
/// stay as they are.
pub fn decrypt_aes256_cbc(key: &[u8; 32], iv: [u8; 16], bytes: &mut [u8]) {
    let aes = Aes256::new(&Array(*key));
    let mut previous = Array(iv);
    let (blocks, _) = AesBlock::slice_as_chunks_mut(bytes);
    for block in blocks {
        let sealed = *block;
        aes.decrypt_block(block);
        xor_block(block, &previous);
        previous = sealed;
    }
}

/// The cipher of qcow2's `crypt_method` 1: AES-128-CBC with plain64, keyed with the first 16 bytes of the passphrase,
/// filled up with zeroes.
pub fn legacy_aes_cipher(passphrase: &[u8]) -> Result<SectorCipher, LuksError> {
    let mut key = zeroize::Zeroizing::new([0; 16]);
    key.iter_mut().zip(passphrase).for_each(|(byte, given)| *byte = *given);
    let spec = CipherSpec { algorithm: CipherAlgorithm::Aes128, mode: CipherMode::Cbc, iv: IvGenerator::Plain64 };
    SectorCipher::new(&spec, &*key)
}

#[cfg(test)]
mod tests {
    use super::super::kdf::hex;
    use super::*;

    fn cipher(algorithm: CipherAlgorithm, mode: CipherMode, iv: IvGenerator, key: &str) -> SectorCipher {
        SectorCipher::new(&CipherSpec { algorithm, mode, iv }, &hex(key)).unwrap()
    }

    fn check(cipher: &SectorCipher, sector: u64, plain: &[u8], want: &str) {
        let mut bytes = plain.to_vec();
        cipher.encrypt(sector, &mut bytes);
        assert_eq!(bytes.get(..want.len() / 2).unwrap(), hex(want), "sector {sector}");
        cipher.decrypt(sector, &mut bytes);
        assert_eq!(bytes, plain, "sector {sector}");
    }

    #[test]
    fn xts_has_the_values_of_its_standard() {
        use CipherAlgorithm::{Aes128, Aes256};
        // IEEE 1619-2007 annex B, vectors 1, 2, 4 (its first and last 16 bytes are enough to tell) and 10.
        let zero = cipher(Aes128, CipherMode::Xts, IvGenerator::Plain64, &"00".repeat(32));
        check(&zero, 0, &[0; 32], "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e");
        let key = format!("{}{}", "11".repeat(16), "22".repeat(16));
        let two = cipher(Aes128, CipherMode::Xts, IvGenerator::Plain64, &key);
        check(&two, 0x33_3333_3333, &[0x44; 32], "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0");
        // The standard writes this vector's number as 3333333333, low byte first; plain cuts it to 32 bits.
        let plain = cipher(Aes128, CipherMode::Xts, IvGenerator::Plain, &key);
        let mut cut = [0x44; 32];
        plain.encrypt(0x33_3333_3333, &mut cut);
        let mut low = [0x44; 32];
        two.encrypt(0x3333_3333, &mut low);
        assert_eq!(cut, low);
        let counting: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let four = cipher(
            Aes128,
            CipherMode::Xts,
            IvGenerator::Plain64,
            "2718281828459045235360287471352631415926535897932384626433832795",
        );
        check(&four, 0, &counting, "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c");
        let mut sealed = counting.clone();
        four.encrypt(0, &mut sealed);
        assert_eq!(sealed[480..], hex("eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568"));
        let ten = cipher(
            Aes256,
            CipherMode::Xts,
            IvGenerator::Plain64,
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
        );
        check(&ten, 0xff, &counting, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
    }

    #[test]
    fn cbc_and_ecb_have_the_values_of_sp_800_38a() {
        // F.1.1 and F.2.5. The vectors number no sectors: with ecb it does not matter, cbc's is taken out of the plain
        // text, whose first block is combined with it.
        let plain = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51";
        let ecb =
            cipher(CipherAlgorithm::Aes128, CipherMode::Ecb, IvGenerator::Plain64, "2b7e151628aed2a6abf7158809cf4f3c");
        check(&ecb, 7, &hex(plain), "3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf");
        let cbc = cipher(
            CipherAlgorithm::Aes256,
            CipherMode::Cbc,
            IvGenerator::Plain64,
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        );
        let mut shifted = hex(plain);
        (0..16).for_each(|i| shifted[i] ^= i as u8);
        shifted[0] ^= 5;
        let mut sealed = hex("f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d");
        let key = hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4").try_into().unwrap();
        decrypt_aes256_cbc(&key, std::array::from_fn(|i| i as u8), &mut sealed);
        assert_eq!(sealed, hex(plain));
        check(&cbc, 5, &shifted, "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d");
    }

    #[test]
    fn a_run_of_sectors_is_its_sectors_one_by_one() {
        let key = "2718281828459045235360287471352662497757247093699959574966967627\
                   3141592653589793238462643383279502884197169399375105820974944592";
        let essiv = IvGenerator::Essiv(Hash::Sha256);
        for (mode, iv) in [
            (CipherMode::Xts, IvGenerator::Plain64),
            (CipherMode::Xts, essiv),
            (CipherMode::Cbc, IvGenerator::Plain),
            (CipherMode::Cbc, essiv),
            (CipherMode::Ecb, IvGenerator::Plain64),
        ] {
            for algorithm in CipherAlgorithm::ALL {
                let spec = CipherSpec { algorithm, mode, iv };
                let cipher = SectorCipher::new(&spec, &hex(key)[..spec.key_bytes()]).unwrap();
                // 20 sectors and a half: whole batches, a part of one, and a part of a sector.
                let plain: Vec<u8> = (0..20 * 512 + 256u32).map(|i| ((i * i) >> 5) as u8).collect();
                let mut run = plain.clone();
                cipher.encrypt(u64::from(u32::MAX) - 3, &mut run);
                let mut apart = plain.clone();
                for (sector, bytes) in apart.chunks_mut(512).enumerate() {
                    cipher.encrypt(u64::from(u32::MAX) - 3 + sector as u64, bytes);
                }
                assert!(run == apart, "{spec:?}");
                let mut whole = [plain[20 * 512..].to_vec(), vec![9; 256]].concat();
                cipher.encrypt(u64::from(u32::MAX) + 17, &mut whole);
                assert_eq!(run[20 * 512..], whole[..256], "{spec:?}");
                cipher.decrypt(u64::from(u32::MAX) - 3, &mut run);
                assert!(run == plain, "{spec:?}");
                assert_eq!(CipherSpec::parse("aes", &spec.mode_name(), spec.key_bytes() as u32), Ok(spec));
            }
        }
    }

    #[test]
    fn names_that_are_not_known_are_refused_by_name() {
        for (name, mode, key_bytes, want) in [
            ("serpent", "xts-plain64", 64, "the LUKS cipher 'serpent'"),
            ("aes", "ctr-plain64", 32, "the LUKS cipher mode 'ctr-plain64'"),
            ("aes", "xts", 64, "the LUKS cipher mode 'xts'"),
            ("aes", "xts-plain64:sha256", 64, "the LUKS cipher mode 'xts-plain64:sha256'"),
            ("aes", "xts-benbi", 64, "the LUKS cipher mode 'xts-benbi'"),
            ("aes", "cbc-essiv", 32, "the LUKS cipher mode 'cbc-essiv'"),
            ("aes", "cbc-essiv:md5", 32, "the LUKS hash 'md5'"),
            ("aes", "cbc-essiv:sha1", 32, "No AES cipher with key size 20 available"),
            ("aes", "xts-plain64", 16, "key-bytes is 16"),
            ("aes", "cbc-plain64", u32::MAX, "key-bytes is 4294967295"),
            ("aes", "cbc-plain64", 0, "key-bytes is 0"),
        ] {
            let error = CipherSpec::parse(name, mode, key_bytes).unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
        assert!(SectorCipher::new(&CipherSpec::default(), &[0; 32]).is_err());
    }
}
