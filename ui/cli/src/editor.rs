//! Lets a person change a text in an editor of their own.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::failure::Failure;

/// A file that goes away when it is no longer needed.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Somebody else has tidied up.
        let _ = fs::remove_file(&self.0);
    }
}

/// Hands `text` to `$VISUAL`, `$EDITOR` or vi; returns what came back.
pub fn edit(text: &str) -> Result<String, Failure> {
    let scratch = make(text).map_err(|error| Failure::new(format!("cannot make a temporary file: {error}")))?;
    let chosen = ["VISUAL", "EDITOR"].iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()));
    let editor = chosen.unwrap_or_else(|| "vi".into());
    // The variable may hold a command with options, so a shell reads it; the file is an argument and not read by it.
    let status = Command::new("/bin/sh").args(["-c", &format!("{editor} \"$1\""), "sh"]).arg(&scratch.0).status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(Failure::new(format!("editor '{editor}' ended with {status}"))),
        Err(error) => return Err(Failure::new(format!("editor '{editor}' cannot be run: {error}"))),
    }
    fs::read_to_string(&scratch.0)
        .map_err(|error| Failure::new(format!("cannot read {}: {error}", scratch.0.display())))
}

fn make(text: &str) -> io::Result<Scratch> {
    for attempt in 0..100 {
        let path = env::temp_dir().join(format!("vireo-{}-{attempt}.xml", std::process::id()));
        // Made anew and for us alone: nobody can have put a link in its place.
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => {
                file.write_all(text.as_bytes())?;
                return Ok(Scratch(path));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Whether a person wants to go on editing what was refused. Without a person: no.
pub fn again() -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("Failed. Try again? [y,n]: ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|error| Failure::new(error.to_string()))?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}
