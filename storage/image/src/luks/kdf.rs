//! Hashes by the names that headers use, and PBKDF2 (RFC 8018 5.2) with HMAC of one of them.

use hmac::{EagerHash, Hmac, KeyInit, Mac};
use sha2::Digest;
use zeroize::Zeroizing;

use super::LuksError;

/// A key, overwritten when it is dropped.
pub type Key = Zeroizing<Vec<u8>>;

/// Iterations between two looks at whether to go on: a few milliseconds.
const STEP: u32 = 1 << 13;
/// Longest digest of [`Hash`], in bytes.
const DIGEST_MAX_BYTES: usize = 64;

/// A hash that a header may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names say it")]
pub enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// All of them.
    pub const ALL: [Hash; 5] = [Hash::Sha1, Hash::Sha224, Hash::Sha256, Hash::Sha384, Hash::Sha512];

    /// The name in headers and options.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha224 => "sha224",
            Hash::Sha256 => "sha256",
            Hash::Sha384 => "sha384",
            Hash::Sha512 => "sha512",
        }
    }

    /// The hash of a name.
    pub fn named(name: &str) -> Result<Hash, LuksError> {
        Hash::ALL.into_iter().find(|hash| hash.name() == name).ok_or_else(|| LuksError::Hash { name: name.to_owned() })
    }

    /// Length of its digest in bytes.
    pub fn digest_bytes(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha224 => 28,
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of the parts behind each other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Key {
        fn of<D: Digest>(parts: &[&[u8]]) -> Key {
            let mut hash = D::new();
            parts.iter().for_each(|part| hash.update(part));
            Zeroizing::new(hash.finalize().to_vec())
        }
        match self {
            Hash::Sha1 => of::<sha1::Sha1>(parts),
            Hash::Sha224 => of::<sha2::Sha224>(parts),
            Hash::Sha256 => of::<sha2::Sha256>(parts),
            Hash::Sha384 => of::<sha2::Sha384>(parts),
            Hash::Sha512 => of::<sha2::Sha512>(parts),
        }
    }
}

/// Derives `out_bytes` of key from a passphrase. `go_on` is asked every few thousand iterations; once it says no, this
/// ends with [`LuksError::TooLong`].
pub fn pbkdf2(
    hash: Hash,
    passphrase: &[u8],
    salt: &[u8],
    iterations: u32,
    out_bytes: usize,
    go_on: &dyn Fn() -> bool,
) -> Result<Key, LuksError> {
    let mut out = Zeroizing::new(vec![0; out_bytes]);
    let derive = match hash {
        Hash::Sha1 => derive::<sha1::Sha1>,
        Hash::Sha224 => derive::<sha2::Sha224>,
        Hash::Sha256 => derive::<sha2::Sha256>,
        Hash::Sha384 => derive::<sha2::Sha384>,
        Hash::Sha512 => derive::<sha2::Sha512>,
    };
    if derive(passphrase, salt, iterations, &mut out, go_on) { Ok(out) } else { Err(LuksError::TooLong) }
}

/// Returns false when told to stop.
fn derive<D: EagerHash>(
    passphrase: &[u8],
    salt: &[u8],
    iterations: u32,
    out: &mut [u8],
    go_on: &dyn Fn() -> bool,
) -> bool {
    // HMAC takes keys of any length.
    let Ok(keyed) = <Hmac<D> as KeyInit>::new_from_slice(passphrase) else { return false };
    let digest_bytes = <Hmac<D> as hmac::digest::OutputSizeUser>::output_size();
    for (block, index) in out.chunks_mut(digest_bytes).zip(1u32..) {
        let mut sum = Zeroizing::new([0u8; DIGEST_MAX_BYTES]);
        let mut last = keyed.clone().chain_update(salt).chain_update(index.to_be_bytes()).finalize().into_bytes();
        xor(&mut *sum, &last);
        for done in 1..iterations {
            if done % STEP == 0 && !go_on() {
                return false;
            }
            last = keyed.clone().chain_update(&last).finalize().into_bytes();
            xor(&mut *sum, &last);
        }
        block.iter_mut().zip(sum.iter()).for_each(|(out, sum)| *out = *sum);
    }
    true
}

pub(super) fn xor(into: &mut [u8], with: &[u8]) {
    into.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

#[cfg(test)]
pub(super) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter_map(|b| (b as char).to_digit(16)).map(|d| d as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn pbkdf2_has_the_published_values() {
    // RFC 6070 for SHA-1; RFC 7914 11 for SHA-256; "PBKDF2-HMAC-SHA512" of the same inputs as RFC 6070.
    for (hash, passphrase, salt, iterations, want) in [
        (Hash::Sha1, "password", "salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
        (Hash::Sha1, "password", "salt", 4096, "4b007901b765489abead49d926f721d065a429c1"),
        (
            Hash::Sha1,
            "passwordPASSWORDpassword",
            "saltSALTsaltSALTsaltSALTsaltSALTsalt",
            4096,
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038",
        ),
        (
            Hash::Sha256,
            "passwd",
            "salt",
            1,
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783",
        ),
        (
            Hash::Sha512,
            "password",
            "salt",
            4096,
            "d197b1b33db0143e018b12f3d1d1479e6cdebdcc97c5c0f87f6902e072f457b5\
             143f30602641b3d55cd335988cb36b84376060ecd532e039b742a239434af2d5",
        ),
    ] {
        let want = hex(want);
        let got = pbkdf2(hash, passphrase.as_bytes(), salt.as_bytes(), iterations, want.len(), &|| true).unwrap();
        assert_eq!(*got, want, "{} {iterations}", hash.name());
    }
    assert_eq!(pbkdf2(Hash::Sha1, b"", b"", u32::MAX, 20, &|| false), Err(LuksError::TooLong));
}

#[test]
fn names_and_lengths_of_hashes() {
    for hash in Hash::ALL {
        assert_eq!(Hash::named(hash.name()), Ok(hash));
        assert_eq!(hash.digest(&[b"a", b"bc"]), hash.digest(&[b"abc"]));
        assert_eq!(hash.digest(&[]).len(), hash.digest_bytes());
    }
    // FIPS 180-4, "abc".
    assert_eq!(*Hash::Sha1.digest(&[b"abc"]), hex("a9993e364706816aba3e25717850c26c9cd0d89d"));
    assert!(Hash::named("ripemd160").is_err());
}
