//! Why a connection is not encrypted.

use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

/// What is wrong with credentials, or with a handshake.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum TlsError {
    #[error("Unable to access credentials {path}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path} holds no {what} in PEM form", path = path.display())]
    Pem { path: PathBuf, what: &'static str },
    #[error("{path}: a certificate of it cannot be an authority's", path = path.display())]
    Authorities { path: PathBuf },
    #[error("{dir}: the certificate and its key cannot be used", dir = dir.display())]
    Unusable { dir: PathBuf, source: rustls::Error },
    #[error("No hostname for certificate validation; give the server's with 'tls-hostname'")]
    NoName,
    #[error("'{found}' is neither the name of a host nor an address; give one with 'tls-hostname'")]
    Name { found: String },
    #[error("Certificate does not match the hostname {}; give a name that it has with 'tls-hostname'", .hostname.as_deref().unwrap_or("that was asked for"))]
    OtherName { hostname: Option<String> },
    #[error("The certificate hasn't got a known issuer; 'ca-cert.pem' must be of the authority that signed it")]
    UnknownIssuer,
    #[error("The certificate has expired; make a new one")]
    Expired,
    #[error("The certificate has been revoked; make a new one")]
    Revoked,
    #[error("the client shows no certificate; give it 'client-cert.pem', or serve with 'verify-peer=off'")]
    NoCertificate,
    #[error("the peer ended the TLS handshake ({alert:?}): it does not take our certificate, or we show none")]
    NotTaken { alert: AlertDescription },
    #[error(
        "the server ended the connection in the TLS handshake or right after it; see whether it knows the authority of \
         'client-cert.pem', and whether that is there"
    )]
    Dropped,
    #[error("TLS failed")]
    Failed(#[source] rustls::Error),
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> TlsError {
        use AlertDescription as Alert;
        match error {
            rustls::Error::InvalidCertificate(reason) => match reason {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::UnknownIssuer,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsError::Expired,
                CertificateError::Revoked => TlsError::Revoked,
                CertificateError::NotValidForName => TlsError::OtherName { hostname: None },
                CertificateError::NotValidForNameContext { expected, .. } => {
                    TlsError::OtherName { hostname: Some(expected.to_str().into_owned()) }
                }
                reason => TlsError::Failed(rustls::Error::InvalidCertificate(reason)),
            },
            rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
            rustls::Error::AlertReceived(
                alert @ (Alert::CertificateRequired
                | Alert::HandshakeFailure
                | Alert::DecryptError
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied),
            ) => TlsError::NotTaken { alert },
            other => TlsError::Failed(other),
        }
    }
}
