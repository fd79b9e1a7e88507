//! `io`, and the name `qemu-io`: requests to an image one by one, in qemu-io's command language.
//!
//! A command is a line of words split at blanks. A request of `aio_read` or `aio_write` that meets no breakpoint is done
//! before the next command starts: to a script it has finished early. As in qemu-io, its failure is printed and does not
//! fail the run.

mod background;
mod breaks;
mod commands;
mod report;
mod requests;

pub use report::amount;

use std::io::{BufRead, stdin};
use std::sync::Arc;

use block::{CacheMode, Disk, OpenOptions};

use self::background::Background;
use crate::Command;
use crate::error::{ImgError, Rule, why};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, flag, opt};
use crate::open::{self, Access, Named};
use crate::output::{self, say};
use crate::secret::Secrets;

/// `io`.
pub const COMMAND: Command = Command {
    name: "io",
    about: "Send requests to an image, one by one, in qemu-io's language",
    operands: "[-c COMMAND]... [FILENAME]",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    opt(
        'c',
        &["cmd"],
        "COMMAND",
        "a command to run; repeated, they run in order. Without any they are read from stdin",
    ),
    FORMAT,
    IMAGE_OPTS,
    flag('r', &["read-only"], "open the image read only"),
    flag('n', &["nocache"], "short for -t none"),
    opt('t', &["cache"], "CACHE", "cache mode (writeback)"),
    opt('d', &["discard"], "ignore|unmap", "what a discard does (ignore)"),
    opt('i', &["aio"], "threads|native|io_uring", "how the host is asked"),
    flag('k', &["native-aio"], "short for --aio=native"),
    flag('s', &["snapshot"], "send writes to a temporary file"),
    flag('C', &["copy-on-read"], "store in the image what is read from below it"),
    flag('m', &["misalign"], "use memory that is not aligned"),
    FORCE_SHARE,
    OBJECT,
];

/// The image that commands are for, and how it was opened.
pub struct Session {
    /// The image; `None` before `open` and after `close`.
    pub disk: Option<Arc<Disk>>,
    background: Background,
    named: Option<Named>,
    access: Access,
    /// Writes go to a temporary image, `-s`.
    scratch: bool,
    secrets: Secrets,
}

/// Whether to go on with the next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Yes.
    Go,
    /// Yes, and the run has failed.
    Failed,
    /// No.
    Quit,
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    if parsed.has("copy-on-read") {
        return Err(ImgError::NotSupported("io -C"));
    }
    let cache = if parsed.has("nocache") { Some("none") } else { parsed.value("cache")? };
    let cache = open::cache_named("", cache, CacheMode::Writeback)?;
    let access = Access { write: !parsed.has("read-only"), share: parsed.has("force-share"), cache };
    let background = Background::default();
    let (scratch, secrets) = (parsed.has("snapshot"), Secrets::of(parsed)?);
    let mut session = Session { disk: None, background, named: None, access, scratch, secrets };
    match parsed.words.as_slice() {
        [] => {}
        [file] => {
            let name = file.to_string_lossy();
            let name = Some(&*name).filter(|_| !parsed.has("image-opts"));
            let named = Named::of(parsed, file, "format").map_err(|error| match error {
                ImgError::Spec { .. } => cannot_open(name, error),
                other => other,
            })?;
            session.open(named, access, scratch).map_err(|error| cannot_open(name, error))?;
        }
        [_, extra, ..] => {
            return Err(ImgError::Extra { command: "io", found: extra.to_string_lossy().into_owned() });
        }
    }
    let commands = parsed.values("cmd")?;
    let mut code = 0;
    if commands.is_empty() {
        loop {
            say(format_args!("{}> ", crate::program()));
            output::flush();
            let mut line = String::new();
            if stdin().lock().read_line(&mut line)? == 0 {
                break;
            }
            match session.command(line.trim_end_matches('\n')) {
                Next::Go => {}
                Next::Failed => code = 1,
                Next::Quit => break,
            }
        }
    }
    for line in commands {
        match session.command(line) {
            Next::Go => {}
            Next::Failed => code = 1,
            Next::Quit => break,
        }
    }
    if session.end().is_err() {
        code = 1;
    }
    session.close()?;
    Ok(code)
}

/// qemu-io's form of a refusal to open; options alone are no name.
fn cannot_open(name: Option<&str>, error: ImgError) -> ImgError {
    let reason = match &error {
        ImgError::Open { source, .. } => why(source),
        ImgError::OpenRule { reason, .. } => reason.to_string(),
        ImgError::Spec { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    ImgError::Plain(match name {
        Some(name) => Rule::IoOpen { name: name.to_owned(), reason },
        None => Rule::IoOpenOptions(reason),
    })
}

impl Session {
    fn open(&mut self, named: Named, access: Access, scratch: bool) -> Result<(), ImgError> {
        let disk = open::disk_with_scratch(&named, access, OpenOptions::default(), scratch)?;
        background::announce(&disk);
        self.disk = Some(Arc::new(disk));
        self.named = Some(named);
        self.access = access;
        self.scratch = scratch;
        Ok(())
    }

    /// Closes the image when all requests are over; what was written is on the disk afterwards.
    fn close(&mut self) -> Result<(), ImgError> {
        let Some(disk) = self.disk.take() else { return Ok(()) };
        if self.access.write {
            let target = disk.path().display().to_string();
            disk.flush().map_err(|source| ImgError::Incomplete { target, source })?;
        }
        Ok(())
    }

    fn reopen(&mut self, write: bool, cache: CacheMode) -> Result<(), ImgError> {
        if self.scratch {
            // What was written would be lost.
            return Err(ImgError::NotSupported("reopen under -s"));
        }
        self.close()?;
        match self.named.clone() {
            Some(named) => self.open(named, Access { write, cache, ..self.access }, false),
            None => Ok(()),
        }
    }
}
