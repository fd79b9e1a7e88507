//! Why a call was not carried out.

use std::io;
use std::path::PathBuf;

use rpc_wire::{ErrorBody, ErrorCode, FrameError, XdrError};

use crate::uri::UriError;

/// An error of the client or of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URI does not lead to a daemon.
    #[error("{0}")]
    Uri(#[from] UriError),
    /// Nobody listens on the socket.
    #[error("Failed to connect socket to '{path}': {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A session daemon was to be started and was not.
    #[error("cannot start a daemon for this session: {program}: {detail}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        detail: String,
    },
    /// The daemon refused the call.
    #[error("{message}")]
    Refused {
        /// libvirt's number of the error.
        code: i32,
        /// libvirt's number of the part that refused.
        domain: i32,
        /// The text for people.
        message: String,
    },
    /// The connection is gone.
    #[error("the daemon has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("connection to the daemon: {0}")]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error("the daemon does not speak the protocol: {0}")]
    Frame(#[from] FrameError),
    /// A reply has another shape than it should.
    #[error("a reply of the daemon cannot be read: {0}")]
    Reply(#[from] XdrError),
    /// The daemon wants to know who we are in a way that is not spoken here.
    #[error("the daemon asks for an authentication that this client does not have (types {types:?})")]
    Authentication {
        /// What it offers.
        types: Vec<i32>,
    },
}

impl ClientError {
    /// libvirt's number, where the daemon gave one.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ClientError::Refused { code, .. } => ErrorCode::from_number(*code),
            _ => None,
        }
    }
}

impl From<ErrorBody> for ClientError {
    fn from(body: ErrorBody) -> ClientError {
        let message = body.message.map(|message| message.lossy().into_owned());
        let message = message.unwrap_or_else(|| format!("error {}", body.code));
        ClientError::Refused { code: body.code, domain: body.domain, message }
    }
}
