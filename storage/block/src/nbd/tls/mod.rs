//! TLS below the protocol. `credentials` says who is who; `channel` carries bytes for a reader and a writer at once.

mod channel;
mod credentials;
mod error;

pub(super) use channel::{Channel, shake_hands};
pub use credentials::{TlsClient, TlsServer};
pub use error::TlsError;
