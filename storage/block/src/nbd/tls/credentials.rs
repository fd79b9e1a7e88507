//! Certificates of TLS connections: a directory of PEM files under QEMU's names, and what a peer has to show.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, RootCertStore, ServerConfig, ServerConnection,
    SignatureScheme,
};

use super::TlsError;

/// Largest file of certificates, in bytes.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Stands for the name of a server that is not verified: an address is not told to it.
const NAMELESS: &str = "0.0.0.0";

/// What a client shows and demands. Clones share it.
#[derive(Clone, Debug)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

/// What a server shows and demands. Clones share it.
#[derive(Clone, Debug)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
}

/// The directory with the files.
struct Directory<'d> {
    dir: &'d Path,
}

impl TlsClient {
    /// Reads `ca-cert.pem`, `ca-crl.pem` if it is there, and `client-cert.pem` with `client-key.pem` if they are
    /// there. Without `verify_peer` any server will do.
    pub fn from_dir(dir: &Path, verify_peer: bool) -> Result<TlsClient, TlsError> {
        let files = Directory { dir };
        let (roots, revoked) = (files.authorities()?, files.revocations()?);
        let own = files.identity("client", false)?;
        let verifier = match verify_peer {
            false => None,
            true => {
                let builder = WebPkiServerVerifier::builder_with_provider(roots.into(), provider());
                let built = builder.with_crls(revoked).allow_unknown_revocation_status().build();
                Some(built.map_err(|_| TlsError::Authorities { path: files.path("ca-cert.pem") })?)
            }
        };
        let failed = |source| TlsError::Unusable { dir: dir.to_owned(), source };
        let verifier = Verifier { chain: verifier, provider: provider() };
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(failed)?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let config = match own {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(failed)?,
            None => builder.with_no_client_auth(),
        };
        Ok(TlsClient { config: Arc::new(config), verify_peer })
    }

    /// A session with the server of this name, which is needed to verify it.
    pub(in super::super) fn start(&self, hostname: Option<&str>) -> Result<Connection, TlsError> {
        let name = match hostname {
            Some(name) => name,
            None if self.verify_peer => return Err(TlsError::NoName),
            None => NAMELESS,
        };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { found: name.to_owned() })?;
        Ok(ClientConnection::new(self.config.clone(), name).map_err(TlsError::from)?.into())
    }
}

impl TlsServer {
    /// Reads `ca-cert.pem`, `ca-crl.pem` if it is there, `server-cert.pem` and `server-key.pem`. With `verify_peer` a
    /// client has to show a certificate.
    pub fn from_dir(dir: &Path, verify_peer: bool) -> Result<TlsServer, TlsError> {
        let files = Directory { dir };
        let (roots, revoked) = (files.authorities()?, files.revocations()?);
        let missing =
            || TlsError::File { path: files.path("server-cert.pem"), source: io::Error::from(io::ErrorKind::NotFound) };
        let (chain, key) = files.identity("server", true)?.ok_or_else(missing)?;
        let failed = |source| TlsError::Unusable { dir: dir.to_owned(), source };
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(failed)?;
        let builder = if verify_peer {
            let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider());
            let clients = clients.with_crls(revoked).allow_unknown_revocation_status().build();
            let clients = clients.map_err(|_| TlsError::Authorities { path: files.path("ca-cert.pem") })?;
            builder.with_client_cert_verifier(clients)
        } else {
            builder.with_no_client_auth()
        };
        Ok(TlsServer { config: Arc::new(builder.with_single_cert(chain, key).map_err(failed)?) })
    }

    /// A session with a client.
    pub(in super::super) fn start(&self) -> Result<Connection, TlsError> {
        Ok(ServerConnection::new(self.config.clone()).map_err(TlsError::from)?.into())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Directory<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, TlsError> {
        let path = self.path(name);
        let failed = |source| TlsError::File { path: path.clone(), source };
        let file = std::fs::File::open(&path).map_err(failed)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, FILE_MAX_BYTES + 1), &mut bytes).map_err(failed)?;
        match bytes.len() as u64 {
            ..=FILE_MAX_BYTES => Ok(bytes),
            _ => Err(failed(io::ErrorKind::FileTooLarge.into())),
        }
    }

    /// As [`Directory::read`]; `None`: there is no such file.
    fn read_if_there(&self, name: &str) -> Result<Option<Vec<u8>>, TlsError> {
        match self.read(name) {
            Err(TlsError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    fn broken(&self, name: &str, what: &'static str) -> TlsError {
        TlsError::Pem { path: self.path(name), what }
    }

    fn certificates(&self, name: &str, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(bytes).collect();
        found.ok().filter(|found| !found.is_empty()).ok_or_else(|| self.broken(name, "certificate"))
    }

    fn authorities(&self) -> Result<RootCertStore, TlsError> {
        let name = "ca-cert.pem";
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(name, &self.read(name)?)? {
            roots.add(certificate).map_err(|_| TlsError::Authorities { path: self.path(name) })?;
        }
        Ok(roots)
    }

    fn revocations(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let name = "ca-crl.pem";
        let Some(bytes) = self.read_if_there(name)? else { return Ok(Vec::new()) };
        let found: Result<Vec<_>, pem::Error> = CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
        found.map_err(|_| self.broken(name, "list of revoked certificates"))
    }

    /// A certificate and those between it and its authority, with its key; both of its files or none, or `needed`.
    fn identity(&self, who: &str, needed: bool) -> Result<Option<Identity>, TlsError> {
        let [cert, key] = ["cert", "key"].map(|what| format!("{who}-{what}.pem"));
        let chain = if needed { Some(self.read(&cert)?) } else { self.read_if_there(&cert)? };
        let Some(chain) = chain else { return Ok(None) };
        let found = PrivateKeyDer::from_pem_slice(&self.read(&key)?);
        let found = found.map_err(|_| self.broken(&key, "private key without a password"))?;
        Ok(Some((self.certificates(&cert, &chain)?, found)))
    }
}

/// Certificates, the own one first, and its key.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Decides over servers: by their chain and name, or not at all. That a server holds the key of the certificate that it
/// shows is always checked.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
