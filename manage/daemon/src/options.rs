//! The command line: `vireod --session|--system [--root DIR] [--timeout SECS] [--vmm PATH]`.
//!
//! Clients that start a session daemon on demand run it under libvirt's names with `--timeout=120`; with no mode given
//! root gets the system daemon and everyone else a session.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Whose daemon this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The host's, `qemu:///system`.
    System,
    /// One user's, `qemu:///session`.
    Session,
}

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whose daemon.
    pub mode: Mode,
    /// Every file and socket goes below this directory.
    pub root: Option<PathBuf>,
    /// End after so long without clients and running domains.
    pub timeout: Option<Duration>,
    /// The vireo-vmm program; by default the one beside this program, then the one on the PATH.
    pub vmm: Option<PathBuf>,
}

/// Outcomes of reading the command line that are not options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// `--help`.
    #[error("{HELP}")]
    Help,
    /// `--version`.
    #[error("vireod {}", env!("CARGO_PKG_VERSION"))]
    Version,
    /// An option nobody knows.
    #[error("unknown option '{0}'; --help lists them")]
    Unknown(String),
    /// An option without its value.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// A value that is not a number of seconds.
    #[error("--timeout takes a number of seconds, not '{0}'")]
    BadTimeout(String),
}

const HELP: &str = "\
vireod: the Vireo management daemon

  --session       serve the calling user (qemu:///session)
  --system        serve the host (qemu:///system); the default for root
  --root DIR      keep every file and socket below DIR
  --timeout SECS  end when there was no client and no running domain for so long
  --vmm PATH      the vireo-vmm program to run (default: beside vireod, then the PATH)
  --version, --help";

impl Options {
    /// Reads the arguments after the program's name. `root_user` decides the mode where none is given.
    pub fn parse(args: impl IntoIterator<Item = OsString>, root_user: bool) -> Result<Options, OptionsError> {
        let default_mode = if root_user { Mode::System } else { Mode::Session };
        let mut options = Options { mode: default_mode, root: None, timeout: None, vmm: None };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let text = arg.to_string_lossy();
            let (name, mut inline) = match text.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(OsString::from(value))),
                None => (text.into_owned(), None),
            };
            let mut value = |option| inline.take().or_else(|| args.next()).ok_or(OptionsError::NoValue(option));
            match name.as_str() {
                "--session" => options.mode = Mode::Session,
                "--system" => options.mode = Mode::System,
                "--root" => options.root = Some(value("--root")?.into()),
                "--vmm" => options.vmm = Some(value("--vmm")?.into()),
                "--timeout" | "-t" => {
                    let seconds = value("--timeout")?.to_string_lossy().into_owned();
                    let parsed = seconds.parse().map_err(|_| OptionsError::BadTimeout(seconds))?;
                    options.timeout = Some(Duration::from_secs(parsed));
                }
                "--help" | "-h" => return Err(OptionsError::Help),
                "--version" | "-V" => return Err(OptionsError::Version),
                _ => return Err(OptionsError::Unknown(name)),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let parse = |line: &str, root| Options::parse(line.split_whitespace().map(OsString::from), root);
        let base = Options { mode: Mode::Session, root: None, timeout: None, vmm: None };
        let timeout = Some(Duration::from_secs(120));
        for (line, root, expected) in [
            ("", false, Ok(base.clone())),
            ("", true, Ok(Options { mode: Mode::System, ..base.clone() })),
            ("--timeout=120", false, Ok(Options { timeout, ..base.clone() })),
            ("--session --root /r --timeout 120", true, Ok(Options { root: Some("/r".into()), timeout, ..base })),
            ("--timeout x", false, Err(OptionsError::BadTimeout("x".into()))),
            ("--root", false, Err(OptionsError::NoValue("--root"))),
            ("--daemon", false, Err(OptionsError::Unknown("--daemon".into()))),
        ] {
            assert_eq!(parse(line, root), expected, "{line}");
        }
    }
}
