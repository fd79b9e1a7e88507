//! `--object tls-creds-x509,id=ID,endpoint=client|server,dir=DIR[,verify-peer=on|off]`: who encrypts connections, and
//! whom it believes. The files are read at once, as QEMU does.

use std::path::{Path, PathBuf};

use block::nbd::{TlsClient, TlsServer};

use crate::error::{ImgError, Rule};

/// Credentials of a command line.
#[derive(Clone, Debug)]
pub enum TlsCreds {
    /// Of whoever connects.
    Client(TlsClient),
    /// Of whoever listens.
    Server(TlsServer),
}

impl TlsCreds {
    /// Reads an object, whose parameters follow its type, and its files; with its id.
    pub fn read(parameters: &[String]) -> Result<(String, TlsCreds), ImgError> {
        let (mut id, mut dir, mut server, mut verify) = (None, None, false, true);
        for item in parameters {
            let (name, value) = item.split_once('=').unwrap_or((item, ""));
            let refused = |name| ImgError::ObjectValue { name, found: value.to_owned() };
            match (name, value) {
                ("id", _) => id = Some(value.to_owned()),
                ("dir", _) => dir = Some(PathBuf::from(value)),
                ("endpoint", "client") => server = false,
                ("endpoint", "server") => server = true,
                ("endpoint", _) => return Err(refused("endpoint")),
                ("verify-peer", "on" | "yes" | "true" | "y") => verify = true,
                ("verify-peer", "off" | "no" | "false" | "n") => verify = false,
                ("verify-peer", _) => return Err(refused("verify-peer")),
                // It asks for what is always checked.
                ("sanity-check", _) => {}
                ("priority" | "passwordid", _) => return Err(ImgError::ObjectNotBuilt(name.to_owned())),
                _ => return Err(ImgError::ObjectParameter(name.to_owned())),
            }
        }
        let id = id.filter(|id| !id.is_empty()).ok_or(ImgError::SecretId)?;
        let dir = dir.ok_or(ImgError::TlsDir)?;
        Ok((id, TlsCreds::of(&dir, server, verify)?))
    }

    fn of(dir: &Path, server: bool, verify: bool) -> Result<TlsCreds, ImgError> {
        match server {
            true => TlsServer::from_dir(dir, verify).map(TlsCreds::Server),
            false => TlsClient::from_dir(dir, verify).map(TlsCreds::Client),
        }
        .map_err(ImgError::Tls)
    }

    /// Those of a client.
    pub fn client(&self) -> Result<&TlsClient, Rule> {
        match self {
            TlsCreds::Client(client) => Ok(client),
            TlsCreds::Server(_) => Err(Rule::TlsEndpoint("client")),
        }
    }

    /// Those of a server.
    pub fn server(&self) -> Result<&TlsServer, Rule> {
        match self {
            TlsCreds::Server(server) => Ok(server),
            TlsCreds::Client(_) => Err(Rule::TlsEndpoint("server")),
        }
    }
}

#[test]
fn wrong_objects_are_named_as_qemu_names_them() {
    for (object, want) in [
        ("id=a,endpoint=client", "Missing 'dir' property value"),
        ("dir=/nowhere", "Parameter 'id' is missing"),
        ("id=a,endpoint=foo,dir=/nowhere", "Parameter 'endpoint' does not accept value 'foo'"),
        ("id=a,verify-peer=maybe,dir=/nowhere", "Parameter 'verify-peer' does not accept value 'maybe'"),
        ("id=a,dir=/nowhere,foo=bar", "Parameter 'foo' is unexpected"),
        ("id=a,dir=/nowhere,priority=NORMAL", "'priority' of tls-creds-x509 is not supported; leave it out"),
        ("id=a,dir=/nowhere", "Unable to access credentials /nowhere/ca-cert.pem: No such file or directory"),
        (
            "id=a,endpoint=server,dir=/nowhere",
            "Unable to access credentials /nowhere/ca-cert.pem: No such file or directory",
        ),
    ] {
        let parameters: Vec<String> = object.split(',').map(str::to_owned).collect();
        assert_eq!(TlsCreds::read(&parameters).unwrap_err().to_string(), want, "{object}");
    }
}
