//! What goes wrong between a client and a server.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use super::tls::TlsError;
use super::wire::WireError;

/// What a peer did that ends a connection.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum PeerError {
    #[error("the connection was closed from the other side")]
    Closed,
    #[error("the connection failed")]
    Io(#[source] io::Error),
    #[error("the peer broke the protocol")]
    Wire(#[from] WireError),
    #[error("the peer did not finish the handshake in {seconds} s")]
    TooSlow { seconds: u64 },
    #[error("Requested export not available: '{export}'")]
    NoExport { export: String },
    #[error(
        "the server demands TLS; make credentials with '--object tls-creds-x509,...' and name them with 'tls-creds'"
    )]
    TlsOnly,
    #[error("the server does not offer TLS ({text}); start it with '--tls-creds', or leave 'tls-creds' out here")]
    NoTls { text: String },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("requested x-dirty-bitmap {context} not found")]
    NoContext { context: String },
    #[error("the export is another one than before the connection was lost")]
    Changed,
    #[error("the server refused option {option} (error {kind:#x}): {text}")]
    Refused { option: u32, kind: u32, text: String },
    #[error("the server answered option {option} with more than {max} messages")]
    TooManyAnswers { option: u32, max: usize },
}

impl From<io::Error> for PeerError {
    fn from(error: io::Error) -> PeerError {
        match error.downcast::<TlsError>() {
            Ok(error) => PeerError::Tls(error),
            Err(error) => match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => PeerError::Closed,
                _ => PeerError::Io(error),
            },
        }
    }
}

/// An error of an NBD client or server. Each names the server.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum NbdError {
    #[error("Failed to connect to '{server}'")]
    Connect { server: String, source: io::Error },
    #[error(
        "{server}: an encrypted connection needs credentials: '--object tls-creds-x509,id=ID,endpoint=client,dir=DIR' \
         and 'driver=nbd,...,tls-creds=ID' with '--image-opts'"
    )]
    NoCredentials { server: String },
    #[error("{server}: the export cannot be used")]
    Handshake { server: String, source: PeerError },
    #[error("{server}: the connection is lost; what was not flushed may be lost with it")]
    Lost { server: String, source: Arc<PeerError> },
    #[error("{server}: the server refused the request (error {errno}): {text}")]
    Refused { server: String, errno: u32, text: String },
    #[error("{server}: data at {offset} lies past the end of the export ({size_bytes} bytes), which cannot grow")]
    PastEnd { server: String, offset: u64, size_bytes: u64 },
    #[error(
        "{server}: an export cannot change its size; resize the image on the server, or serve it with 'vireo-img serve --resizable'"
    )]
    NoResize { server: String },
    #[error("{server}: the export is read only")]
    ReadOnly { server: String },
    #[error("the name '{name}' of an export has more than 4096 bytes")]
    Name { name: String },
    #[error("Failed to find an available port or socket '{at}'")]
    Listen { at: String, source: io::Error },
    #[error("socket {path}: another server listens on it", path = path.display())]
    InUse { path: PathBuf },
    #[error("clients cannot be accepted")]
    Accept { source: io::Error },
}
