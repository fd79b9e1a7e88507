//! From a connection URI to a socket, by the rules of libvirt's clients.

use std::env;
use std::path::{Path, PathBuf};

/// Why a URI does not name a daemon that can be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Another scheme than ours.
    #[error("no connection driver available for {uri}")]
    NoDriver {
        /// The URI.
        uri: String,
    },
    /// A transport that is not built.
    #[error("transport '{transport}' is not supported yet; run vireo on that host, or use virsh")]
    Transport {
        /// Its name.
        transport: String,
    },
    /// Another path than the two there are.
    #[error("internal error: unexpected {scheme} URI path '{path}', try {scheme}:///system")]
    Path {
        /// Scheme.
        scheme: String,
        /// Path found.
        path: String,
    },
    /// A session has no place for its socket.
    #[error("neither XDG_RUNTIME_DIR nor HOME is set: the session's socket has no place; give ?socket=PATH")]
    NoRuntimeDirectory,
}

/// A daemon to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As it was given.
    pub uri: String,
    /// What CONNECT_OPEN is told.
    pub name: String,
    /// Where it listens; the first that exists is taken.
    pub sockets: Vec<PathBuf>,
    /// One may be started where none listens.
    pub may_spawn: bool,
}

/// Names of the sockets, in the order in which they are looked for.
const SOCKETS: [&str; 2] = ["virtqemud-sock", "libvirt-sock"];

impl Target {
    /// The daemon that `uri` names; without one, what the environment names, else root's or the user's own.
    pub fn resolve(uri: Option<&str>, read_only: bool, root_user: bool) -> Result<Target, UriError> {
        let named = uri.filter(|uri| !uri.is_empty()).map(str::to_owned);
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let default = if root_user { "qemu:///system" } else { "qemu:///session" };
        let uri = named.or_else(|| variable("VIREO_URI")).or_else(|| variable("LIBVIRT_DEFAULT_URI"));
        let runtime = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
        let home_cache = || {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            cache.or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))
        };
        parse(uri.as_deref().unwrap_or(default), read_only, runtime.or_else(home_cache).as_deref())
    }
}

/// `session_base` is the directory that holds a session's `libvirt` directory.
fn parse(uri: &str, read_only: bool, session_base: Option<&Path>) -> Result<Target, UriError> {
    let no_driver = || UriError::NoDriver { uri: uri.into() };
    let (scheme, rest) = uri.split_once("://").ok_or_else(no_driver)?;
    let (scheme, transport) = scheme.split_once('+').unwrap_or((scheme, ""));
    if !matches!(scheme, "qemu" | "vireo") {
        return Err(no_driver());
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (host, path) = place.find('/').map_or((place, ""), |at| place.split_at(at));
    if !matches!(transport, "" | "unix") || !host.is_empty() {
        let transport = if transport.is_empty() { "tls" } else { transport };
        return Err(UriError::Transport { transport: transport.into() });
    }
    let name = format!("{scheme}://{path}");
    let wrong_path = || UriError::Path { scheme: scheme.into(), path: path.into() };
    if !matches!(path, "/system" | "/session") {
        return Err(wrong_path());
    }
    let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).map(percent_decoded);
    if let Some(socket) = socket {
        return Ok(Target { uri: uri.into(), name, sockets: vec![socket.into()], may_spawn: false });
    }
    let session = path == "/session";
    let directory =
        if session { session_base.ok_or(UriError::NoRuntimeDirectory)?.join("libvirt") } else { "/run/libvirt".into() };
    let suffix = if read_only && !session { "-ro" } else { "" };
    let sockets = SOCKETS.map(|socket| directory.join(format!("{socket}{suffix}"))).to_vec();
    Ok(Target { uri: uri.into(), name, sockets, may_spawn: session })
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match escaped.filter(|_| *first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_lead_to_sockets() {
        let check = |uri: &str, read_only, expected: Result<&str, &str>| {
            let found = parse(uri, read_only, Some(Path::new("/run/user/7"))).map(|target| {
                let sockets: Vec<_> = target.sockets.iter().map(|path| path.display().to_string()).collect();
                format!("{} {}", target.name, sockets.join(" "))
            });
            let found = found.map_err(|error| error.to_string());
            assert_eq!(found.as_deref().map_err(String::as_str), expected, "{uri}");
        };
        check("qemu:///system", false, Ok("qemu:///system /run/libvirt/virtqemud-sock /run/libvirt/libvirt-sock"));
        check(
            "vireo:///system",
            true,
            Ok("vireo:///system /run/libvirt/virtqemud-sock-ro /run/libvirt/libvirt-sock-ro"),
        );
        check(
            "qemu:///session",
            true,
            Ok("qemu:///session /run/user/7/libvirt/virtqemud-sock /run/user/7/libvirt/libvirt-sock"),
        );
        check("qemu+unix:///system?socket=/a%20b/c&x=1", false, Ok("qemu:///system /a b/c"));
        check("qemu:///system?socket=/100%", false, Ok("qemu:///system /100%"));
        check("foo:///system", false, Err("no connection driver available for foo:///system"));
        check("qemu", false, Err("no connection driver available for qemu"));
        check("qemu:///nosuch", false, Err("internal error: unexpected qemu URI path '/nosuch', try qemu:///system"));
        let remote = "transport 'ssh' is not supported yet; run vireo on that host, or use virsh";
        check("qemu+ssh://host/system", false, Err(remote));
        assert_eq!(parse("qemu:///session", false, None), Err(UriError::NoRuntimeDirectory));
    }
}
