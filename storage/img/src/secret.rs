//! `--object secret,id=ID,data=...|file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64]`: passphrases that options name by
//! their id. With `keyid` the bytes are encrypted with another secret. TLS credentials are objects beside them.

use std::collections::HashMap;
use std::io::Read;

use base64::prelude::{BASE64_STANDARD, Engine};

use block::Passphrase;

use crate::error::{ImgError, Rule};
use crate::getopt::Parsed;
use crate::object::{Kind, Object};
use crate::tls_creds::TlsCreds;

/// Longest passphrase read from a file or the command line, in bytes.
const SECRET_MAX_BYTES: usize = 1 << 20;

/// The secrets of a command line, by id, and its TLS credentials.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    by_id: HashMap<String, Passphrase>,
    tls: HashMap<String, TlsCreds>,
}

impl Secrets {
    /// Reads every `--object`.
    pub fn of(parsed: &Parsed) -> Result<Secrets, ImgError> {
        let mut secrets = Secrets::default();
        for text in parsed.values("object")? {
            let object = Object::parse(text)?;
            if secrets.by_id.contains_key(&object.id) || secrets.tls.contains_key(&object.id) {
                return Err(ImgError::ObjectTwice(object.id));
            }
            match object.kind {
                Kind::TlsCredsX509 => {
                    let creds = TlsCreds::read(&object.parameters)?;
                    secrets.tls.insert(object.id, creds);
                }
                Kind::Secret => {
                    let bytes = read(&object, &secrets)?;
                    secrets.by_id.insert(object.id, Passphrase::new(bytes));
                }
            }
        }
        Ok(secrets)
    }

    /// The bytes of a secret; `None`: there is none with this id.
    pub fn get(&self, id: &str) -> Option<&Passphrase> {
        self.by_id.get(id)
    }

    /// The TLS credentials of an id.
    pub fn tls(&self, id: &str) -> Result<&TlsCreds, Rule> {
        self.tls.get(id).ok_or_else(|| Rule::NoTlsCreds(id.to_owned()))
    }
}

fn read(object: &Object, others: &Secrets) -> Result<Vec<u8>, ImgError> {
    let (mut data, mut file, mut base64) = (None, None, false);
    let (mut key_id, mut iv, mut unexpected) = (None, None, None);
    for (name, value) in &object.parameters {
        match (name.as_str(), value.as_str()) {
            ("data", _) => data = Some(value.as_bytes().to_vec()),
            ("file", _) => file = Some(value),
            ("format", "raw") => base64 = false,
            ("format", "base64") => base64 = true,
            ("format", found) => return Err(ImgError::ObjectValue { name: "format", found: found.to_owned() }),
            ("keyid", _) => key_id = Some(value),
            ("iv", _) => iv = Some(value),
            (other, _) => unexpected = unexpected.or(Some(other)),
        }
    }
    if let Some(name) = unexpected {
        return Err(ImgError::ObjectParameter(name.to_owned()));
    }
    let bytes = match (data, file) {
        (Some(_), Some(_)) => return Err(ImgError::SecretBoth),
        (Some(data), None) => data,
        (None, Some(path)) => read_file(path)?,
        (None, None) => return Err(ImgError::SecretNothing),
    };
    let id = &object.id;
    if bytes.len() > SECRET_MAX_BYTES {
        return Err(ImgError::SecretSize { id: id.clone(), max: SECRET_MAX_BYTES });
    }
    let bytes = if base64 { decode_base64(&bytes).ok_or_else(|| ImgError::SecretBase64(id.clone()))? } else { bytes };
    let Some(key_id) = key_id else { return Ok(bytes) };
    let iv = iv.ok_or(ImgError::SecretIv)?;
    let iv = decode_base64(iv.as_bytes()).ok_or_else(|| ImgError::SecretBase64(id.clone()))?;
    let iv: [u8; 16] = iv.try_into().map_err(|iv: Vec<u8>| ImgError::SecretIvSize(iv.len()))?;
    let key = others.get(key_id).ok_or_else(|| ImgError::NoSecret(key_id.clone()))?;
    let key: &[u8; 32] = key.bytes().try_into().map_err(|_| ImgError::SecretKeySize)?;
    decrypt(key, iv, bytes).ok_or_else(|| ImgError::SecretPadding(id.clone()))
}

/// AES-256-CBC; every byte of the padding, which is never empty, says how long it is. `None`: it does not.
fn decrypt(key: &[u8; 32], iv: [u8; 16], mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(16) {
        return None;
    }
    block::decrypt_aes256_cbc(key, iv, &mut bytes);
    let padding = *bytes.last()?;
    let plain = bytes.len().checked_sub(usize::from(padding)).filter(|_| (1..=16).contains(&padding))?;
    if bytes.get(plain..)?.iter().any(|byte| *byte != padding) {
        return None;
    }
    bytes.truncate(plain);
    Some(bytes)
}

fn read_file(path: &str) -> Result<Vec<u8>, ImgError> {
    let failed = |source| ImgError::SecretFile { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(SECRET_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// With padding; line ends, which files have, are skipped.
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    BASE64_STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_read_from_text_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pw");
        std::fs::write(&path, "cGFz\nc3c=\n").unwrap();
        for (object, want) in [
            ("secret,id=a,data=pass,,word".to_owned(), ("a", &b"pass,word"[..])),
            ("qom-type=secret,id=a,data=".to_owned(), ("a", b"")),
            (format!("secret,id=b,file={},format=base64", path.display()), ("b", b"passw")),
            (format!("secret,id=b,file={},format=raw", path.display()), ("b", b"cGFz\nc3c=\n")),
        ] {
            let object = Object::parse(&object).unwrap();
            let bytes = read(&object, &Secrets::default()).unwrap();
            assert_eq!((object.id.as_str(), bytes.as_slice()), want);
        }
        let mut others = Secrets::default();
        for (id, bytes) in [("k", vec![b'k'; 32]), ("s", vec![1; 16])] {
            others.by_id.insert(id.to_owned(), Passphrase::new(bytes));
        }
        // printf hello | openssl enc -aes-256-cbc -K 6b..6b -iv 41..41 -base64
        let encrypted = "secret,id=e,data=mK8CJeryCqQSqlJcF98Cmw==,format=base64,keyid=k,iv=QUFBQUFBQUFBQUFBQUFBQQ==";
        assert_eq!(read(&Object::parse(encrypted).unwrap(), &others).unwrap(), b"hello");
        for (object, want) in [
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            ("secret,id=a,data=x,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=a,data=x,format=hex", "Parameter 'format' does not accept value 'hex'"),
            ("secret,id=a,data=x,ivs=y", "Parameter 'ivs' is unexpected"),
            ("secret,id=a,data=x,keyid=k", "IV is required to decrypt secret"),
            ("secret,id=a,data=x,keyid=k,iv=QUFB", "IV should be 16 bytes in length not 3"),
            ("secret,id=a,data=x,keyid=n,iv=QUFBQUFBQUFBQUFBQUFBQQ==", "No secret with id 'n'"),
            ("secret,id=a,data=x,keyid=s,iv=QUFBQUFBQUFBQUFBQUFBQQ==", "Key should be 32 bytes in length"),
            (
                "secret,id=a,data=x,keyid=k,iv=QUFBQUFBQUFBQUFBQUFBQQ==",
                "secret 'a' is not encrypted with its key: the padding is wrong",
            ),
            ("secret,id=a,data=xyz,format=base64", "secret 'a' is not valid base64"),
            ("secret,id=a,file=/nowhere/x", "Unable to read /nowhere/x: No such file or directory"),
        ] {
            let parsed = Object::parse(object).unwrap();
            assert_eq!(read(&parsed, &others).unwrap_err().to_string(), want, "{object}");
        }
    }
}
