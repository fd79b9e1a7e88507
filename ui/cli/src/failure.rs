//! What a person is told when something did not work: one `error:` line per step of the explanation.

use client::ClientError;

/// The lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    lines: Vec<String>,
}

impl Failure {
    /// A failure of one line.
    pub fn new(line: impl Into<String>) -> Failure {
        Failure { lines: vec![line.into()] }
    }

    /// A failure that has said all there is to say already.
    pub fn silent() -> Failure {
        Failure { lines: Vec::new() }
    }

    /// What was being done goes first.
    pub fn while_doing(mut self, line: impl Into<String>) -> Failure {
        self.lines.insert(0, line.into());
        self
    }

    /// The lines in order.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        Failure::new(error.to_string())
    }
}

/// Says what was being done when it failed.
pub trait WhileDoing<T> {
    /// `line` is put before the error.
    fn while_doing(self, line: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> WhileDoing<T> for Result<T, E> {
    fn while_doing(self, line: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| error.into().while_doing(line()))
    }
}
