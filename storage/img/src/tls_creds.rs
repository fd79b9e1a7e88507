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
    /// Reads the parameters of an object, and its files.
    pub fn read(parameters: &[(String, String)]) -> Result<TlsCreds, ImgError> {
        let (mut dir, mut server, mut verify) = (None, false, true);
        for (name, value) in parameters {
            match (name.as_str(), value.as_str()) {
                ("dir", _) => dir = Some(PathBuf::from(value)),
                ("endpoint", "client") => server = false,
                ("endpoint", "server") => server = true,
                ("endpoint", found) => {
                    return Err(ImgError::ObjectValue { name: "endpoint", found: found.to_owned() });
                }
                ("verify-peer", "on" | "yes" | "true" | "y") => verify = true,
                ("verify-peer", "off" | "no" | "false" | "n") => verify = false,
                ("verify-peer", _) => return Err(ImgError::ObjectSwitch { name: "verify-peer" }),
                // It asks for what is always checked.
                ("sanity-check", _) => {}
                ("priority" | "passwordid", _) => return Err(ImgError::ObjectNotBuilt(name.clone())),
                _ => return Err(ImgError::ObjectParameter(name.clone())),
            }
        }
        TlsCreds::of(&dir.ok_or(ImgError::TlsDir)?, server, verify)
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
        ("endpoint=client", "Missing 'dir' property value"),
        ("endpoint=foo,dir=/nowhere", "Parameter 'endpoint' does not accept value 'foo'"),
        ("verify-peer=maybe,dir=/nowhere", "Parameter 'verify-peer' expects 'on' or 'off'"),
        ("dir=/nowhere,foo=bar", "Parameter 'foo' is unexpected"),
        ("dir=/nowhere,priority=NORMAL", "'priority' of tls-creds-x509 is not supported; leave it out"),
        ("dir=/nowhere", "Unable to access credentials /nowhere/ca-cert.pem: No such file or directory"),
        (
            "endpoint=server,dir=/nowhere",
            "Unable to access credentials /nowhere/ca-cert.pem: No such file or directory",
        ),
    ] {
        let pair = |item: &str| item.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let parameters: Vec<_> = object.split(',').filter_map(pair).collect();
        assert_eq!(TlsCreds::read(&parameters).unwrap_err().to_string(), want, "{object}");
    }
}
