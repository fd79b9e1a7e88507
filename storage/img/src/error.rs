//! What goes wrong, in words, and the exit code of each.

use std::path::PathBuf;

use block::BlockError;

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ImgError {
    /// Nothing was asked.
    #[error("Not enough arguments\nTry 'vireo-img --help' for more info")]
    NoCommand,
    /// Not a subcommand.
    #[error("Command not found: {0}\nTry 'vireo-img --help' for more info")]
    NoSuchCommand(String),
    /// A subcommand of qemu-img that is not built.
    #[error("'{0}' is not supported yet; qemu-img can do it on the same image")]
    NotBuilt(String),
    /// An option the subcommand does not have.
    #[error("'{command}' has no option {option}; 'vireo-img --help' lists them")]
    NoSuchOption {
        /// Subcommand.
        command: &'static str,
        /// What was given.
        option: String,
    },
    /// An option without its value.
    #[error("option {0} needs a value")]
    NoValue(String),
    /// No file name.
    #[error("Expecting one image file name")]
    OneFile,
    /// A word too many.
    #[error("unexpected argument '{0}'")]
    Extra(String),
    /// A value that is none of those possible.
    #[error("{option} cannot be '{found}': it is {possible}")]
    Value {
        /// Option.
        option: &'static str,
        /// What was given.
        found: String,
        /// What it can be.
        possible: &'static str,
    },
    /// Not a size.
    #[error("Invalid image size specified: '{0}'. Give bytes, or a number with k, M, G, T, P or E")]
    Size(String),
    /// No size and no backing file to take it from.
    #[error("{path}: Image creation needs a size parameter", path = .0.display())]
    NoSize(PathBuf),
    /// A backing file without its format.
    #[error("{path}: Backing file specified without backing format: add -F FORMAT", path = .0.display())]
    NoBackingFormat(PathBuf),
    /// raw with a backing file.
    #[error("{path}: a raw image cannot have a backing file; use -f qcow2", path = .0.display())]
    RawBacking(PathBuf),
    /// A format this tool does not write.
    #[error("{path}: Unknown file format '{format}': raw and qcow2 are known", path = path.display())]
    Format {
        /// Image.
        path: PathBuf,
        /// What was asked for.
        format: String,
    },
    /// An option of the image format that is not known.
    #[error("{path}: Invalid parameter '{name}'", path = path.display())]
    Parameter {
        /// Image.
        path: PathBuf,
        /// Name.
        name: String,
    },
    /// The finished image could not take its place.
    #[error("{path}: the new image cannot be put in its place", path = path.display())]
    Place {
        /// Image.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The format has no checks.
    #[error("This image format does not support checks")]
    NoChecks,
    /// The engine refused.
    #[error("{0}")]
    Block(#[source] BlockError),
    /// The same, on opening an image that a command is about.
    #[error("Could not open '{path}'", path = path.display())]
    Open {
        /// Image.
        path: PathBuf,
        /// Why.
        source: BlockError,
    },
    /// The output is gone.
    #[error("the answer cannot be written")]
    Output(#[from] std::io::Error),
}

impl ImgError {
    /// qemu-img's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            ImgError::NoChecks => 63,
            _ => 1,
        }
    }
}
