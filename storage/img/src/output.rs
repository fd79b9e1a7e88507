//! Where answers go: standard output, which is for reading. When nobody reads it, or the file behind it is full, the
//! command does its work all the same and exits as if all was printed, as qemu-img does.

use std::fmt::Display;
use std::io::{self, StdoutLock, Write};

/// Standard output; what it does not take is lost.
pub struct Answer(StdoutLock<'static>);

/// Standard output, for one thread until the value is dropped.
pub fn stdout() -> Answer {
    Answer(io::stdout().lock())
}

impl Write for Answer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

/// Prints a text.
pub fn say(text: impl Display) {
    let _ = write!(stdout(), "{text}");
}

/// Prints a line.
pub fn say_line(text: impl Display) {
    say(format_args!("{text}\n"));
}

/// Hands on what is printed but not a whole line yet.
pub fn flush() {
    let _ = stdout().flush();
}
