//! `resize`: makes a disk longer or shorter.

use block::{CacheMode, Preallocation};

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::output::{self, say_line};
use crate::size::{self, SizeError};

/// `resize`.
pub const COMMAND: Command = Command {
    name: "resize",
    about: "Resize an image to a new size",
    operands: "FILENAME [+-]SIZE",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    flag('\0', &["shrink"], "allow the new size to be smaller; what lies behind the new end is lost"),
    opt('\0', &["preallocation"], "off|metadata|falloc|full", "how the new part takes its space"),
    OBJECT,
];

/// The size word.
enum Change {
    To(u64),
    By { grow: bool, bytes: u64 },
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let (file, word) = match parsed.words.as_slice() {
        [file, word] => (file, word),
        [_, _, _, ..] => {
            return Err(ImgError::Needed { command: "resize", what: "Extra argument(s) in command line" });
        }
        _ => return Err(ImgError::Expecting { command: "resize", expected: "image file name and size" }),
    };
    let change = change(&word.to_string_lossy())?;
    let room = match parsed.value("preallocation")? {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => return Err(ImgError::Plain(Rule::PreallocationMode(other.to_owned()))),
    };
    let named = Named::of(parsed, file, "format")?;
    let disk = open::disk(&named, Access::write(CacheMode::Writeback))?;
    let now = disk.size_bytes();
    let wanted = match change {
        Change::To(bytes) => Some(bytes),
        Change::By { grow: true, bytes } => now.checked_add(bytes),
        Change::By { grow: false, bytes } => now.checked_sub(bytes),
    };
    let wanted = wanted.filter(|bytes| (1..=i64::MAX as u64).contains(bytes));
    let wanted = wanted.ok_or(ImgError::Plain(Rule::NotPositive))?;
    if wanted <= now && room != Preallocation::Off {
        return Err(ImgError::Plain(Rule::PreallocateShrink));
    }
    if wanted < now && !parsed.has("shrink") {
        return Err(ImgError::Plain(Rule::Shrink));
    }
    if disk.qcow2().is_none() && room == Preallocation::Metadata {
        return Err(ImgError::Plain(Rule::Preallocation("metadata".to_owned())));
    }
    if disk.qcow2().is_some() && wanted % 512 != 0 {
        return Err(ImgError::Plain(Rule::NotSectors));
    }
    let failed = |source| ImgError::Resize { source };
    disk.resize(wanted, parsed.has("shrink"), room).map_err(failed)?;
    disk.flush().map_err(failed)?;
    output::fact("virtual-size", disk.size_bytes());
    if !parsed.has("quiet") {
        say_line("Image resized.");
    }
    Ok(0)
}

fn change(word: &str) -> Result<Change, ImgError> {
    let read = |text: &str| {
        size::parse(text).map_err(|error| match error {
            SizeError::Text => ImgError::ParameterSize { subject: String::new(), name: "size" },
            SizeError::Range => {
                ImgError::ParameterRange { subject: String::new(), name: "size", found: text.to_owned() }
            }
        })
    };
    Ok(match (word.strip_prefix('+'), word.strip_prefix('-')) {
        (Some(bytes), _) => Change::By { grow: true, bytes: read(bytes)? },
        (_, Some(bytes)) => Change::By { grow: false, bytes: read(bytes)? },
        _ => Change::To(read(word)?),
    })
}
