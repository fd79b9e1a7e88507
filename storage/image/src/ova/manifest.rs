//! Manifests: a digest of each file, a line each. DSP0243 "Manifest": `ALGORITHM(FILE)= HEX`.

use super::OvaError;

/// Longest manifest, in bytes.
pub const MANIFEST_MAX_BYTES: u64 = 1 << 20;

/// How a digest is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    fn named(name: &str) -> Option<(Algorithm, usize)> {
        match name.to_ascii_uppercase().as_str() {
            "SHA1" => Some((Algorithm::Sha1, 20)),
            "SHA256" => Some((Algorithm::Sha256, 32)),
            "SHA512" => Some((Algorithm::Sha512, 64)),
            _ => None,
        }
    }
}

/// What a manifest says of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// How it is computed.
    pub algorithm: Algorithm,
    /// The file.
    pub name: String,
    /// The digest, as long as the algorithm's are.
    pub value: Vec<u8>,
}

/// Reads a manifest. The number of lines is bounded by its length.
pub fn parse<E>(text: &str) -> Result<Vec<Digest>, OvaError<E>> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let digest = parse_line(line).ok_or(OvaError::ManifestLine { line: index + 1 })?;
        found.push(digest);
    }
    Ok(found)
}

fn parse_line(line: &str) -> Option<Digest> {
    let (head, hex) = line.trim().rsplit_once('=')?;
    let (name, file) = head.trim_end().strip_suffix(')')?.split_once('(')?;
    let (algorithm, bytes) = Algorithm::named(name.trim())?;
    let hex = hex.trim();
    if hex.len() != bytes * 2 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let value = hex.as_bytes().chunks_exact(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    Some(Digest { algorithm, name: file.to_owned(), value: value.collect::<Option<Vec<u8>>>()? })
}

/// The line of a file with its SHA-256.
pub fn line(name: &str, sha256: &[u8]) -> String {
    let hex: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("SHA256({name})= {hex}\n")
}

#[test]
fn lines_of_all_algorithms_are_read() {
    let text = format!(
        "SHA1(a b.ovf)= {}\r\nSHA256(d(1).vmdk)={}\n\nsha512 (x) = {}\n",
        "0A".repeat(20),
        "ff".repeat(32),
        "01".repeat(64)
    );
    let digests = parse::<()>(&text).unwrap();
    let brief: Vec<(Algorithm, &str, usize, u8)> =
        digests.iter().map(|d| (d.algorithm, d.name.as_str(), d.value.len(), d.value[0])).collect();
    assert_eq!(
        brief,
        [
            (Algorithm::Sha1, "a b.ovf", 20, 10),
            (Algorithm::Sha256, "d(1).vmdk", 32, 255),
            (Algorithm::Sha512, "x", 64, 1)
        ]
    );
    assert_eq!(parse::<()>(&line("n", &[0xab; 32])).unwrap()[0].value, vec![0xab; 32]);
    for bad in
        ["SHA1(x)= 00", "MD5(x)= 00", "SHA1 x", "SHA1(x= 0", &format!("SHA1(x)= {}", "zz".repeat(20)), "=", "é=é"]
    {
        assert!(matches!(parse::<()>(bad), Err(OvaError::ManifestLine { line: 1 })), "{bad}");
    }
}
