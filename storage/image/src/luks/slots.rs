//! Key slots: the master key, spread and encrypted with a key that a passphrase gives.

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::kdf::{Key, pbkdf2};
use super::{DIGEST_BYTES, Header, KeySlot, LuksError, PASSPHRASE_MAX_BYTES, SALT_BYTES, SectorCipher, af};

/// A passphrase fitted.
pub struct Unsealed {
    /// The first slot that it fitted.
    pub slot: usize,
    /// The master key.
    pub master_key: Key,
}

/// Tries a passphrase on the active slots in turn; `None`: it fits none of them. `material` gives the key material of
/// a slot, [`Header::material_bytes`] long; `go_on` is asked now and then, see [`pbkdf2`].
pub fn unseal<E: From<LuksError>>(
    header: &Header,
    passphrase: &[u8],
    slots: &[usize],
    material: &mut dyn FnMut(&KeySlot) -> Result<Vec<u8>, E>,
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Unsealed>, E> {
    check_passphrase(passphrase)?;
    for (index, slot) in header.slots.iter().enumerate() {
        if !slot.active || !slots.contains(&index) {
            continue;
        }
        let material = Zeroizing::new(material(slot)?);
        if let Some(master_key) = open_slot(header, slot, passphrase, material, go_on)? {
            return Ok(Some(Unsealed { slot: index, master_key }));
        }
    }
    Ok(None)
}

fn open_slot(
    header: &Header,
    slot: &KeySlot,
    passphrase: &[u8],
    mut material: Key,
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Key>, LuksError> {
    let key_bytes = header.cipher.key_bytes();
    let key = pbkdf2(header.hash, passphrase, &slot.salt, slot.iterations, key_bytes, go_on)?;
    SectorCipher::new(&header.cipher, &key)?.decrypt(0, &mut material);
    let master_key = af::merge(header.hash, &material, key_bytes)?;
    let digest = digest(header, &master_key, go_on)?;
    Ok(bool::from(digest.ct_eq(&header.digest)).then_some(master_key))
}

/// The digest that a header holds of its master key.
fn digest(header: &Header, master_key: &[u8], go_on: &dyn Fn() -> bool) -> Result<Key, LuksError> {
    pbkdf2(header.hash, master_key, &header.digest_salt, header.digest_iterations, DIGEST_BYTES, go_on)
}

/// Makes a slot of a passphrase: `random` holds [`Header::material_bytes`] random bytes, and the key material
/// afterwards. The result is the slot, active, at the place that `at` has.
pub fn seal_key_slot(
    header: &Header,
    at: &KeySlot,
    passphrase: &[u8],
    master_key: &[u8],
    iterations: u32,
    salt: [u8; SALT_BYTES],
    random: &mut [u8],
) -> Result<KeySlot, LuksError> {
    check_passphrase(passphrase)?;
    let key_bytes = header.cipher.key_bytes();
    if master_key.len() != key_bytes {
        return Err(LuksError::Material { bytes: master_key.len(), want: key_bytes });
    }
    af::split(header.hash, master_key, random)?;
    let key = pbkdf2(header.hash, passphrase, &salt, iterations, key_bytes, &|| true)?;
    SectorCipher::new(&header.cipher, &key)?.encrypt(0, random);
    Ok(KeySlot { active: true, iterations, salt, material_sector: at.material_sector })
}

fn check_passphrase(passphrase: &[u8]) -> Result<(), LuksError> {
    match passphrase.len() {
        bytes if bytes > PASSPHRASE_MAX_BYTES => Err(LuksError::PassphraseSize { bytes }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::sample;
    use super::super::{CipherAlgorithm, CipherMode, CipherSpec, Hash, IvGenerator, KEY_SLOTS};
    use super::*;

    const ALL: [usize; KEY_SLOTS] = [0, 1, 2, 3, 4, 5, 6, 7];

    #[test]
    fn a_passphrase_opens_its_slot_and_no_other() {
        for algorithm in CipherAlgorithm::ALL {
            for (mode, iv) in [
                (CipherMode::Xts, IvGenerator::Plain64),
                (CipherMode::Cbc, IvGenerator::Essiv(Hash::Sha256)),
                (CipherMode::Ecb, IvGenerator::Plain),
            ] {
                let mut header = sample(CipherSpec { algorithm, mode, iv });
                let master_key: Vec<u8> = (0..header.cipher.key_bytes() as u8).collect();
                let of_key = digest(&header, &master_key, &|| true).unwrap();
                header.digest.copy_from_slice(&of_key);
                let mut stored = vec![Vec::new(); KEY_SLOTS];
                for (index, passphrase) in [(1, "one"), (6, "six")] {
                    let mut material: Vec<u8> = (0..header.material_bytes()).map(|i| ((i * i) >> 3) as u8).collect();
                    let slot = header.slots[index].clone();
                    let sealed =
                        seal_key_slot(&header, &slot, passphrase.as_bytes(), &master_key, 3, [5; 32], &mut material);
                    header.slots[index] = sealed.unwrap();
                    stored[index] = material;
                }
                let try_on = |passphrase: &str, slots: &[usize]| {
                    let places = &header.slots;
                    let mut give = |slot: &KeySlot| -> Result<Vec<u8>, LuksError> {
                        Ok(stored[places.iter().position(|other| other == slot).unwrap()].clone())
                    };
                    let unsealed = unseal(&header, passphrase.as_bytes(), slots, &mut give, &|| true).unwrap();
                    unsealed.map(|unsealed| (unsealed.slot, unsealed.master_key.to_vec()))
                };
                assert_eq!(try_on("one", &ALL), Some((1, master_key.clone())));
                assert_eq!(try_on("six", &ALL), Some((6, master_key.clone())));
                assert_eq!(try_on("six", &[0, 1, 2]), None);
                assert_eq!(try_on("seven", &ALL), None);
            }
        }
    }
}
