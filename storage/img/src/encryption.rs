//! The options of encryption: `key-secret`, `cipher-alg` and so on, for LUKS as they are and for qcow2 behind `encrypt.`.

use block::{
    CipherAlgorithm, CipherMode, CipherSpec, EncryptionInfo, Hash, IvGenerator, KeySlotChange, LuksCreate, LuksHeader,
    Passphrase,
};

use crate::error::Rule;
use crate::facts::Facts;
use crate::optlist::OptList;
use crate::secret::Secrets;

/// Time for a passphrase where `iter-time` is not given.
const ITER_TIME_MS: u64 = 2000;
/// Names that QEMU has and this tool does not: a refusal tells them from names that nobody knows.
const CIPHERS_ELSEWHERE: [&str; 10] = [
    "des",
    "3des",
    "cast5-128",
    "serpent-128",
    "serpent-192",
    "serpent-256",
    "twofish-128",
    "twofish-192",
    "twofish-256",
    "sm4",
];
const HASHES_ELSEWHERE: [&str; 3] = ["md5", "ripemd160", "sm3"];

/// The names of the options of one format.
struct Names {
    format: &'static str,
    key_secret: &'static str,
    cipher_alg: &'static str,
    cipher_mode: &'static str,
    ivgen_alg: &'static str,
    ivgen_hash_alg: &'static str,
    hash_alg: &'static str,
    iter_time: &'static str,
}

const OF_LUKS: Names = Names {
    format: "",
    key_secret: "key-secret",
    cipher_alg: "cipher-alg",
    cipher_mode: "cipher-mode",
    ivgen_alg: "ivgen-alg",
    ivgen_hash_alg: "ivgen-hash-alg",
    hash_alg: "hash-alg",
    iter_time: "iter-time",
};

const OF_QCOW2: Names = Names {
    format: "encrypt.format",
    key_secret: "encrypt.key-secret",
    cipher_alg: "encrypt.cipher-alg",
    cipher_mode: "encrypt.cipher-mode",
    ivgen_alg: "encrypt.ivgen-alg",
    ivgen_hash_alg: "encrypt.ivgen-hash-alg",
    hash_alg: "encrypt.hash-alg",
    iter_time: "encrypt.iter-time",
};

/// How a raw volume is encrypted.
pub fn of_luks(list: &OptList, secrets: &Secrets) -> Result<LuksCreate, Rule> {
    if list.has("detached-header") {
        return Err(Rule::Unexpected("detached-header"));
    }
    read(&OF_LUKS, list, secrets)
}

/// How a qcow2 image is encrypted, if it is.
pub fn of_qcow2(list: &OptList, secrets: &Secrets) -> Result<Option<LuksCreate>, Rule> {
    let format = list.text(OF_QCOW2.format);
    if list.has("encryption") && format.is_some() {
        return Err(Rule::Requires("'encrypt.format' and its alias 'encryption' can't be used at the same time"));
    }
    if list.switch("encryption") == Some(true) {
        return Err(Rule::Option("encryption=on".to_owned()));
    }
    match format {
        Some("luks") => read(&OF_QCOW2, list, secrets).map(Some),
        Some("aes") => Err(Rule::Option("encrypt.format=aes".to_owned())),
        Some(other) => Err(Rule::Value { name: "format", found: other.to_owned() }),
        None if list.names().any(|name| name.starts_with("encrypt.")) => Err(Rule::Missing(OF_QCOW2.format)),
        None => Ok(None),
    }
}

fn read(names: &Names, list: &OptList, secrets: &Secrets) -> Result<LuksCreate, Rule> {
    let cipher = cipher(names, list)?;
    let hash = hash("hash-alg", list.text(names.hash_alg))?.unwrap_or(Hash::Sha256);
    let iter_time_ms = list.number(names.iter_time).unwrap_or(ITER_TIME_MS);
    let id = list.text(names.key_secret).ok_or(Rule::KeySecret(names.key_secret))?;
    Ok(LuksCreate { cipher, hash, iter_time_ms, passphrase: passphrase(secrets, id)? })
}

/// The secret of an id.
pub fn passphrase(secrets: &Secrets, id: &str) -> Result<Passphrase, Rule> {
    secrets.get(id).cloned().ok_or_else(|| Rule::NoSecret(id.to_owned()))
}

fn cipher(names: &Names, list: &OptList) -> Result<CipherSpec, Rule> {
    let value = |name: &'static str, found: &str| Rule::Value { name, found: found.to_owned() };
    let algorithm = match list.text(names.cipher_alg) {
        None => CipherAlgorithm::Aes256,
        Some(found) if CIPHERS_ELSEWHERE.contains(&found) => {
            return Err(Rule::Option(format!("cipher-alg={found}")));
        }
        Some(found) => {
            let known = CipherAlgorithm::ALL.into_iter().find(|known| known.name() == found);
            known.ok_or_else(|| value("cipher-alg", found))?
        }
    };
    let mode = match list.text(names.cipher_mode) {
        None => CipherMode::Xts,
        Some("ctr") => return Err(Rule::Option("cipher-mode=ctr".to_owned())),
        Some(found) => {
            let known = CipherMode::ALL.into_iter().find(|known| known.name() == found);
            known.ok_or_else(|| value("cipher-mode", found))?
        }
    };
    let of_iv = hash("ivgen-hash-alg", list.text(names.ivgen_hash_alg))?;
    let iv = match list.text(names.ivgen_alg) {
        None | Some("plain64") => IvGenerator::Plain64,
        Some("plain") => IvGenerator::Plain,
        Some("essiv") => IvGenerator::Essiv(of_iv.unwrap_or(Hash::Sha256)),
        Some(found) => return Err(value("ivgen-alg", found)),
    };
    Ok(CipherSpec { algorithm, mode, iv })
}

fn hash(name: &'static str, found: Option<&str>) -> Result<Option<Hash>, Rule> {
    match found {
        None => Ok(None),
        Some(found) if HASHES_ELSEWHERE.contains(&found) => Err(Rule::Option(format!("{name}={found}"))),
        Some(found) => Hash::named(found).map(Some).map_err(|_| Rule::Value { name, found: found.to_owned() }),
    }
}

/// What `amend` does to key slots, if its options say anything of them; `prefix` is before the names of the options.
/// The rules and their order are qemu-img's.
pub fn slot_change(list: &OptList, prefix: &str, secrets: &Secrets) -> Result<Option<KeySlotChange>, Rule> {
    let name = |name: &str| format!("{prefix}{name}");
    let is_given = |option: &str| list.has(&name(option));
    if !["state", "new-secret", "old-secret", "keyslot", "iter-time"].into_iter().any(is_given) {
        return Ok(None);
    }
    let secret = |option: &str| list.text(&name(option)).map(|id| passphrase(secrets, id)).transpose();
    let slot = list.number(&name("keyslot")).map(|slot| usize::try_from(slot).unwrap_or(usize::MAX));
    let requires = |text| Err(Rule::Requires(text));
    match list.text(&name("state")) {
        None => Err(Rule::Missing("state")),
        Some("active") => {
            let Some(passphrase) = secret("new-secret")? else {
                return requires("'new-secret' is required to activate a keyslot");
            };
            if is_given("old-secret") {
                return requires("'old-secret' must not be given when activating keyslots");
            }
            let iter_time_ms = list.number(&name("iter-time")).unwrap_or(ITER_TIME_MS);
            Ok(Some(KeySlotChange::Activate { slot, passphrase, iter_time_ms }))
        }
        Some("inactive") => {
            if is_given("new-secret") {
                return requires("'new-secret' must not be given when erasing keyslots");
            }
            if is_given("iter-time") {
                return requires("'iter-time' must not be given when erasing keyslots");
            }
            Ok(Some(KeySlotChange::Deactivate { slot, passphrase: secret("old-secret")? }))
        }
        Some(other) => Err(Rule::Value { name: "state", found: other.to_owned() }),
    }
}

/// What `info` tells of an encryption; `inside_qcow2` adds which it is.
pub fn facts(encryption: &EncryptionInfo, inside_qcow2: bool) -> Facts {
    match encryption {
        EncryptionInfo::LegacyAes => Facts::Group(vec![("format", "aes".into())]),
        EncryptionInfo::Luks(header) => luks_facts(header, inside_qcow2),
    }
}

/// The order is qemu-img's.
fn luks_facts(header: &LuksHeader, inside_qcow2: bool) -> Facts {
    let cipher = header.cipher;
    let slots = header.slots.iter().map(|slot| {
        let mut facts = vec![("active", Facts::from(slot.active))];
        if slot.active {
            facts.push(("iters", u64::from(slot.iterations).into()));
        }
        facts.push(("key-offset", slot.material_offset().into()));
        if slot.active {
            facts.push(("stripes", u64::from(block::LUKS_STRIPES).into()));
        }
        Facts::Group(facts)
    });
    let mut facts = vec![
        ("ivgen-alg", Facts::from(cipher.iv.name())),
        ("detached-header", Facts::from(false)),
        ("hash-alg", header.hash.name().into()),
        ("cipher-alg", cipher.algorithm.name().into()),
        ("uuid", header.uuid.as_str().into()),
    ];
    if let IvGenerator::Essiv(hash) = cipher.iv {
        facts.push(("ivgen-hash-alg", hash.name().into()));
    }
    if inside_qcow2 {
        facts.push(("format", "luks".into()));
    }
    facts.extend([
        ("cipher-mode", Facts::from(cipher.mode.name())),
        ("slots", Facts::List(slots.collect())),
        ("payload-offset", header.payload_offset().into()),
        ("master-key-iters", u64::from(header.digest_iterations).into()),
    ]);
    Facts::Group(facts)
}
