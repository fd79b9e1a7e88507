//! `--object TYPE,id=ID,NAME=VALUE...`, or the same as JSON: `{"qom-type": TYPE, "id": ID, NAME: VALUE}`.

use serde_json::{Map, Value};

use crate::error::ImgError;

/// Types that qemu-img knows and this tool does not make.
const NOT_MADE: [&str; 10] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
];

/// Parameters that are on or off; all others are text.
const SWITCHES: [&str; 2] = ["verify-peer", "sanity-check"];

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A passphrase.
    Secret,
    /// Who encrypts connections.
    TlsCredsX509,
}

/// An object as the command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its type.
    pub kind: Kind,
    /// What options call it.
    pub id: String,
    /// The rest, by name.
    pub parameters: Vec<(String, String)>,
}

impl Object {
    /// Reads a description.
    pub fn parse(text: &str) -> Result<Object, ImgError> {
        let mut parameters = if text.starts_with('{') { from_json(text)? } else { from_items(text)? };
        // Of a name given twice the last value holds.
        let mut take = |name: &'static str| {
            let found = parameters.iter().rev().find(|(there, _)| there == name).map(|(_, value)| value.clone());
            parameters.retain(|(there, _)| there != name);
            found.ok_or(ImgError::ObjectMissing(name))
        };
        let kind = match take("qom-type")? {
            kind if kind == "secret" => Kind::Secret,
            kind if kind == "tls-creds-x509" => Kind::TlsCredsX509,
            kind if NOT_MADE.contains(&kind.as_str()) => return Err(ImgError::ObjectType(kind)),
            found => return Err(ImgError::ObjectValue { name: "qom-type", found }),
        };
        let id = take("id")?;
        if !is_identifier(&id) {
            return Err(ImgError::ObjectId);
        }
        Ok(Object { kind, id, parameters })
    }
}

fn is_identifier(id: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(rest)
}

fn from_items(text: &str) -> Result<Vec<(String, String)>, ImgError> {
    let items = block::spec::split_commas(text).into_iter().enumerate();
    let pair = |(index, item): (usize, String)| match item.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None if index == 0 => Ok(("qom-type".to_owned(), item)),
        None => Err(ImgError::ObjectNoValue(item)),
    };
    items.map(pair).collect()
}

fn from_json(text: &str) -> Result<Vec<(String, String)>, ImgError> {
    let all: Map<String, Value> = serde_json::from_str(text).map_err(ImgError::ObjectJson)?;
    let pair = |(name, value): (String, Value)| match (SWITCHES.contains(&name.as_str()), value) {
        (true, Value::Bool(on)) => Ok((name, if on { "on" } else { "off" }.to_owned())),
        (true, _) => Err(ImgError::ObjectValueKind { name, expected: "boolean" }),
        (false, Value::String(value)) => Ok((name, value)),
        (false, _) => Err(ImgError::ObjectValueKind { name, expected: "string" }),
    };
    all.into_iter().map(pair).collect()
}

#[test]
fn both_forms_say_the_same() {
    let parameters = [("data", "a,b"), ("format", "raw")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let want = Object { kind: Kind::Secret, id: "x".to_owned(), parameters: parameters.to_vec() };
    for text in [
        "secret,id=x,data=a,,b,format=raw",
        "data=a,,b,format=raw,id=y,qom-type=secret,id=x",
        r#"{"qom-type": "secret", "id": "x", "data": "a,b", "format": "raw"}"#,
    ] {
        assert_eq!(Object::parse(text).unwrap(), want, "{text}");
    }
    let tls = Object::parse(r#"{"qom-type": "tls-creds-x509", "id": "x", "verify-peer": false}"#).unwrap();
    assert_eq!(tls.parameters, [("verify-peer".to_owned(), "off".to_owned())]);
    let not_made = Object::parse("tls-creds-psk,id=a").unwrap_err().to_string();
    assert_eq!(not_made, "object type 'tls-creds-psk' is not supported; 'secret' and 'tls-creds-x509' are");
}
