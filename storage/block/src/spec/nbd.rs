//! Names of NBD exports: `nbd://host:port/export`, `nbd+unix:///export?socket=PATH`, `nbd:host:port:exportname=E`,
//! and the options of the `nbd` driver. The URI form is the NBD project's `doc/uri.md`.

use std::fmt;
use std::path::PathBuf;

use super::SpecError;
use super::tree::{Map, Tree, take_leaf};

/// The port that IANA gave to NBD.
pub const NBD_PORT: u16 = 10809;

/// One export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// Where the server listens.
    pub address: NbdAddress,
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// TLS is demanded.
    pub tls: Option<NbdTls>,
    /// A metadata context that is asked for in place of `base:allocation`, `x-dirty-bitmap`: what it marks is told by
    /// [`crate::Extent::marked`], and where data is, is not known.
    pub context: Option<String>,
    /// How many seconds a connection is tried for; 0: once.
    pub open_timeout_s: u32,
    /// How many seconds a lost connection is tried for again, while requests wait; 0: requests fail from then on.
    pub reconnect_delay_s: u32,
}

impl NbdSpec {
    /// An export without anything special.
    pub fn new(address: NbdAddress, export: impl Into<String>) -> NbdSpec {
        let export = export.into();
        NbdSpec { address, export, tls: None, context: None, open_timeout_s: 0, reconnect_delay_s: 0 }
    }
}

/// How a connection is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NbdTls {
    /// Id of the credentials; a name such as `nbds://` cannot give one.
    pub creds: Option<String>,
    /// Name that the server's certificate has to show; that of the host if none is given.
    pub hostname: Option<String>,
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A TCP port.
    Tcp {
        /// Name or address of the host, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// A socket file.
    Unix(PathBuf),
}

impl NbdAddress {
    pub(super) fn to_tree(&self) -> Tree {
        let fields = match self {
            NbdAddress::Tcp { host, port } => {
                vec![("type", "inet".to_owned()), ("host", host.clone()), ("port", port.to_string())]
            }
            NbdAddress::Unix(path) => vec![("type", "unix".to_owned()), ("path", path.display().to_string())],
        };
        Tree::Map(fields.into_iter().map(|(key, value)| (key.to_owned(), Tree::Leaf(value))).collect())
    }
}

impl fmt::Display for NbdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As QEMU prints it: credentials are no part of the name.
        let scheme = if self.tls.as_ref().is_some_and(|tls| tls.creds.is_none()) { "nbds" } else { "nbd" };
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                write!(f, "{scheme}://{host}:{port}")?;
                if !self.export.is_empty() {
                    write!(f, "/{}", self.export)?;
                }
                Ok(())
            }
            // As QEMU prints it.
            NbdAddress::Unix(path) if self.export.is_empty() => write!(f, "{scheme}+unix://?socket={}", path.display()),
            NbdAddress::Unix(path) => write!(f, "{scheme}+unix:///{}?socket={}", self.export, path.display()),
        }
    }
}

/// Reads a whole name that starts with `nbd` and a colon or a plus sign.
pub(super) fn parse(text: &str) -> Result<NbdSpec, SpecError> {
    match text.split_once("://") {
        Some((scheme, rest)) => parse_uri(scheme, rest),
        None => parse_old(text.strip_prefix("nbd:").ok_or(SpecError::Url)?),
    }
}

fn parse_uri(scheme: &str, rest: &str) -> Result<NbdSpec, SpecError> {
    let (tls, unix) = match scheme {
        "nbd" | "nbd+tcp" => (None, false),
        "nbd+unix" => (None, true),
        "nbds" | "nbds+tcp" => (Some(NbdTls::default()), false),
        "nbds+unix" => (Some(NbdTls::default()), true),
        _ => return Err(SpecError::Url),
    };
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = unescape(path).ok_or(SpecError::Url)?;
    if unix {
        let socket =
            query.and_then(|q| q.strip_prefix("socket=")).filter(|s| !s.contains('&')).ok_or(SpecError::Url)?;
        let socket = unescape(socket).filter(|s| !s.is_empty()).ok_or(SpecError::Url)?;
        if !authority.is_empty() {
            return Err(SpecError::Url);
        }
        return Ok(NbdSpec { tls, ..NbdSpec::new(NbdAddress::Unix(socket.into()), export) });
    }
    if query.is_some() {
        return Err(SpecError::Url);
    }
    // A user name has no meaning here.
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or(SpecError::Url)?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")).ok_or(SpecError::Url)?)
        }
        None => authority.rsplit_once(':').unwrap_or((authority, "")),
    };
    if host.is_empty() {
        return Err(SpecError::Url);
    }
    let port = if port.is_empty() { NBD_PORT } else { port.parse().map_err(|_| SpecError::Url)? };
    Ok(NbdSpec { tls, ..NbdSpec::new(NbdAddress::Tcp { host: host.to_owned(), port }, export) })
}

/// `HOST:PORT[:exportname=E]` and `unix:PATH[:exportname=E]`.
fn parse_old(text: &str) -> Result<NbdSpec, SpecError> {
    let (address, export) = text.split_once(":exportname=").unwrap_or((text, ""));
    if address.is_empty() {
        return Err(SpecError::NbdAddress);
    }
    if let Some(path) = address.strip_prefix("unix:") {
        if path.is_empty() {
            return Err(SpecError::NbdAddress);
        }
        return Ok(NbdSpec::new(NbdAddress::Unix(path.into()), export));
    }
    let refused = || SpecError::NbdHostPort(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(refused)?;
    let port = port.parse().map_err(|_| refused())?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    Ok(NbdSpec::new(NbdAddress::Tcp { host: host.to_owned(), port }, export))
}

/// The options of a layer with `driver=nbd`: `server` with `type`, or the older `host`, `port`, `path`.
pub(super) fn from_map(map: &mut Map) -> Result<NbdSpec, SpecError> {
    let export = take_leaf(map, "export")?.unwrap_or_default();
    let hostname = take_leaf(map, "tls-hostname")?;
    let tls = take_leaf(map, "tls-creds")?.map(|id| NbdTls { creds: Some(id), hostname });
    let context = take_leaf(map, "x-dirty-bitmap")?;
    let (open_timeout_s, reconnect_delay_s) =
        (take_seconds(map, "open-timeout")?, take_seconds(map, "reconnect-delay")?);
    if let Some(Tree::Leaf(uri)) = map.get("uri") {
        let spec = parse(uri)?;
        map.remove("uri");
        return Ok(NbdSpec { tls: tls.or(spec.tls), context, open_timeout_s, reconnect_delay_s, ..spec });
    }
    let mut server = match map.remove("server") {
        Some(Tree::Map(server)) => server,
        Some(_) => return Err(SpecError::Parameter("server".to_owned())),
        None => Map::new(),
    };
    let kind = take_leaf(&mut server, "type")?;
    if server.is_empty() {
        for key in ["host", "port", "path"] {
            if let Some(value) = map.remove(key) {
                server.insert(key.to_owned(), value);
            }
        }
    }
    let path = take_leaf(&mut server, "path")?;
    let host = take_leaf(&mut server, "host")?;
    let port = take_leaf(&mut server, "port")?;
    if let Some(option) = server.keys().next() {
        return Err(SpecError::Parameter(format!("server.{option}")));
    }
    let address = match (kind.as_deref(), path, host) {
        (Some("unix") | None, Some(path), None) => NbdAddress::Unix(path.into()),
        (Some("inet") | None, None, Some(host)) => {
            let port = match port {
                None => NBD_PORT,
                Some(text) => text.parse().map_err(|_| SpecError::Value { option: "port".to_owned(), found: text })?,
            };
            NbdAddress::Tcp { host, port }
        }
        (Some("unix" | "inet") | None, _, _) => return Err(SpecError::NbdAddress),
        (Some(other), _, _) => {
            return Err(SpecError::Value { option: "type".to_owned(), found: other.to_owned() });
        }
    };
    Ok(NbdSpec { address, export, tls, context, open_timeout_s, reconnect_delay_s })
}

fn take_seconds(map: &mut Map, option: &str) -> Result<u32, SpecError> {
    let Some(text) = take_leaf(map, option)? else { return Ok(0) };
    text.parse().map_err(|_| SpecError::Value { option: option.to_owned(), found: text })
}

/// Percent escapes of a URI; `None` for a broken one or for bytes that are no UTF-8.
fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| char::from(b?).to_digit(16);
        let value = digit(bytes.next())? * 16 + digit(bytes.next())?;
        out.push(value as u8);
    }
    String::from_utf8(out).ok()
}
