//! The anti-forensic splitter (specification 2.4): a key spread over so many stripes that losing any bit of them loses
//! the key.

use zeroize::Zeroizing;

use super::LuksError;
use super::kdf::{Hash, Key, xor};

/// Stripes of the material of a key slot: the only number that is in use, and the only one that QEMU takes.
pub const STRIPES: u32 = 4000;

/// Spreads a key. `material` holds random bytes, as many as stripes of the key's length; it holds the stripes
/// afterwards.
pub(super) fn split(hash: Hash, key: &[u8], material: &mut [u8]) -> Result<(), LuksError> {
    let want = key.len() * STRIPES as usize;
    if material.len() != want || key.is_empty() {
        return Err(LuksError::Material { bytes: material.len(), want });
    }
    let (random, last) = material.split_at_mut(want - key.len());
    let folded = fold(hash, random, key.len());
    last.copy_from_slice(key);
    xor(last, &folded);
    Ok(())
}

/// The key that was spread.
pub(super) fn merge(hash: Hash, material: &[u8], key_bytes: usize) -> Result<Key, LuksError> {
    let want = key_bytes * STRIPES as usize;
    if material.len() != want || key_bytes == 0 {
        return Err(LuksError::Material { bytes: material.len(), want });
    }
    let (stripes, last) = material.split_at(want - key_bytes);
    let mut key = fold(hash, stripes, key_bytes);
    xor(&mut key, last);
    Ok(key)
}

/// All stripes but the last, each diffused into the next.
fn fold(hash: Hash, stripes: &[u8], key_bytes: usize) -> Key {
    let mut sum = Zeroizing::new(vec![0; key_bytes]);
    for stripe in stripes.chunks_exact(key_bytes) {
        xor(&mut sum, stripe);
        diffuse(hash, &mut sum);
    }
    sum
}

/// Replaces each part of a digest's length by the digest of its number and itself; the last part may be shorter.
fn diffuse(hash: Hash, bytes: &mut [u8]) {
    for (part, number) in bytes.chunks_mut(hash.digest_bytes()).zip(0u32..) {
        let digest = hash.digest(&[&number.to_be_bytes(), part]);
        part.iter_mut().zip(digest.iter()).for_each(|(byte, new)| *byte = *new);
    }
}

#[test]
fn diffusing_numbers_the_parts() {
    // The digests of 00000000 and 00000001 before 32 and 8 zero bytes, with sha256sum.
    let mut bytes = [0; 40];
    diffuse(Hash::Sha256, &mut bytes);
    let want = [Hash::Sha256.digest(&[&[0; 36]]), Hash::Sha256.digest(&[&[0, 0, 0, 1], &[0; 8]])];
    assert_eq!((&bytes[..32], &bytes[32..]), (&want[0][..], &want[1][..8]));
}

#[test]
fn merging_undoes_splitting_and_needs_every_bit() {
    for (hash, key_bytes) in [(Hash::Sha1, 16), (Hash::Sha256, 32), (Hash::Sha512, 24), (Hash::Sha256, 64)] {
        let key: Vec<u8> = (0..key_bytes).map(|i| i as u8 * 3).collect();
        let mut material: Vec<u8> = (0..key_bytes * 4000).map(|i| ((i * i) >> 7) as u8).collect();
        split(hash, &key, &mut material).unwrap();
        assert_eq!(*merge(hash, &material, key_bytes).unwrap(), key);
        material[1000] ^= 1;
        assert_ne!(*merge(hash, &material, key_bytes).unwrap(), key);
        assert!(merge(hash, &material[1..], key_bytes).is_err() && split(hash, &key, &mut material[1..]).is_err());
    }
    assert!(merge(Hash::Sha1, &[], 0).is_err());
}
