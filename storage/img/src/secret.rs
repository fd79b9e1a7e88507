//! `--object secret,id=ID,data=...|file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64]`: passphrases that options name by
//! their id. With `keyid` the bytes are encrypted with another secret. TLS credentials are objects beside them.

use std::collections::HashMap;
use std::io::Read;

use base64::prelude::{BASE64_STANDARD, Engine};

use block::Passphrase;

use crate::error::{ImgError, Rule};
use crate::getopt::Parsed;
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
        for object in parsed.values("object")? {
            let items = block::spec::split_commas(object);
            if let Some((kind, parameters)) = items.split_first()
                && kind.strip_prefix("qom-type=").unwrap_or(kind) == "tls-creds-x509"
            {
                let (id, creds) = TlsCreds::read(parameters)?;
                secrets.tls.insert(id, creds);
                continue;
            }
            let (id, bytes) = read(object, &secrets)?;
            secrets.by_id.insert(id, Passphrase::new(bytes));
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

fn read(object: &str, others: &Secrets) -> Result<(String, Vec<u8>), ImgError> {
    let (mut id, mut data, mut file, mut base64) = (None, None, None, false);
    let (mut key_id, mut iv) = (None, None);
    for (index, item) in block::spec::split_commas(object).into_iter().enumerate() {
        let (name, value) = item.split_once('=').unwrap_or(if index == 0 { ("qom-type", &item) } else { (&item, "") });
        match name {
            "qom-type" if value == "secret" => {}
            "qom-type" => return Err(ImgError::ObjectType(value.to_owned())),
            "id" => id = Some(value.to_owned()),
            "data" => data = Some(value.as_bytes().to_vec()),
            "file" => file = Some(value.to_owned()),
            "format" => match value {
                "raw" => base64 = false,
                "base64" => base64 = true,
                other => return Err(ImgError::SecretFormat(other.to_owned())),
            },
            "keyid" => key_id = Some(value.to_owned()),
            "iv" => iv = Some(value.to_owned()),
            other => return Err(ImgError::SecretParameter(other.to_owned())),
        }
    }
    let id = id.filter(|id| !id.is_empty()).ok_or(ImgError::SecretId)?;
    let bytes = match (data, file) {
        (Some(_), Some(_)) => return Err(ImgError::SecretBoth),
        (Some(data), None) => data,
        (None, Some(path)) => read_file(&path)?,
        (None, None) => return Err(ImgError::SecretNothing),
    };
    if bytes.len() > SECRET_MAX_BYTES {
        return Err(ImgError::SecretSize { id, max: SECRET_MAX_BYTES });
    }
    let bytes = if base64 { decode_base64(&bytes).ok_or_else(|| ImgError::SecretBase64(id.clone()))? } else { bytes };
    let Some(key_id) = key_id else { return Ok((id, bytes)) };
    let iv = iv.ok_or(ImgError::SecretIv)?;
    let iv = decode_base64(iv.as_bytes()).ok_or_else(|| ImgError::SecretBase64(id.clone()))?;
    let iv: [u8; 16] = iv.try_into().map_err(|_| ImgError::SecretIvSize)?;
    let key = others.get(&key_id).ok_or(ImgError::NoSecret(key_id))?;
    let key: &[u8; 32] = key.bytes().try_into().map_err(|_| ImgError::SecretKeySize)?;
    let plain = decrypt(key, iv, bytes).ok_or_else(|| ImgError::SecretPadding(id.clone()))?;
    Ok((id, plain))
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
            let (id, bytes) = read(&object, &Secrets::default()).unwrap();
            assert_eq!((id.as_str(), bytes.as_slice()), want, "{object}");
        }
        let mut others = Secrets::default();
        for (id, bytes) in [("k", vec![b'k'; 32]), ("s", vec![1; 16])] {
            others.by_id.insert(id.to_owned(), Passphrase::new(bytes));
        }
        // printf hello | openssl enc -aes-256-cbc -K 6b..6b -iv 41..41 -base64
        let encrypted = "secret,id=e,data=mK8CJeryCqQSqlJcF98Cmw==,format=base64,keyid=k,iv=QUFBQUFBQUFBQUFBQUFBQQ==";
        assert_eq!(read(encrypted, &others).unwrap(), ("e".to_owned(), b"hello".to_vec()));
        for (object, want) in [
            ("tls-creds-psk,id=a", "object type 'tls-creds-psk' is not supported; 'secret' and 'tls-creds-x509' are"),
            ("secret,data=x", "Parameter 'id' is missing"),
            ("secret,id=a", "Must provide 'file' or 'data'"),
            ("secret,id=a,data=x,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=a,data=x,format=hex", "Parameter 'format' does not accept value 'hex'"),
            ("secret,id=a,data=x,ivs=y", "Invalid parameter 'ivs'"),
            ("secret,id=a,data=x,keyid=k", "IV is required to decrypt secret"),
            ("secret,id=a,data=x,keyid=k,iv=QUFB", "IV should be 16 bytes in length"),
            ("secret,id=a,data=x,keyid=n,iv=QUFBQUFBQUFBQUFBQUFBQQ==", "No secret with id 'n'"),
            ("secret,id=a,data=x,keyid=s,iv=QUFBQUFBQUFBQUFBQUFBQQ==", "Key should be 32 bytes in length"),
            (
                "secret,id=a,data=x,keyid=k,iv=QUFBQUFBQUFBQUFBQUFBQQ==",
                "secret 'a' is not encrypted with its key: the padding is wrong",
            ),
            ("secret,id=a,data=xyz,format=base64", "secret 'a' is not valid base64"),
            ("secret,id=a,file=/nowhere/x", "Unable to read /nowhere/x: No such file or directory"),
        ] {
            assert_eq!(read(object, &others).unwrap_err().to_string(), want, "{object}");
        }
    }
}
