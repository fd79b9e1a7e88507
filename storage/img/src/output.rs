//! Where answers go: standard output, which is for reading. When nobody reads it, or the file behind it is full, the
//! command does its work all the same and exits as if all was printed, as qemu-img does.
//!
//! With `--json` a command that has no JSON of its own prints one object in the end: what it said, and facts.

use std::fmt::Display;
use std::io::{self, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::json::write_json;

/// Most text that is kept for the object; a server may talk for years.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// What is gathered for the object, if there will be one.
static GATHERED: Mutex<Option<Gathered>> = Mutex::new(None);
/// Something was printed, so that no object may follow it.
static PRINTED: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
struct Gathered {
    said: Vec<u8>,
    facts: Map<String, Value>,
}

fn gathered<T>(with: impl FnOnce(&mut Gathered) -> T) -> Option<T> {
    GATHERED.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(with)
}

/// From now on answers are kept for [`print_object`].
pub fn gather() {
    GATHERED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
}

/// Whether answers are kept.
pub fn is_gathering() -> bool {
    gathered(|_| ()).is_some()
}

/// A member for the object; nothing where there will be none.
pub fn fact(name: &str, value: impl Into<Value>) {
    let _ = gathered(|kept| kept.facts.insert(name.to_owned(), value.into()));
}

/// Prints the object of a command that is over: its name and exit code, its error if there is one, its facts, and the
/// lines that it said. Prints nothing behind other output.
pub fn print_object(command: &str, exit_code: u8, error: Option<String>) {
    let kept = GATHERED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if PRINTED.load(Ordering::Relaxed) {
        return;
    }
    let mut object = Map::from_iter([
        ("command".to_owned(), Value::from(command)),
        ("exit-code".to_owned(), Value::from(exit_code)),
    ]);
    object.extend(error.map(|error| ("error".to_owned(), Value::from(error))));
    if let Some(Gathered { said, facts }) = kept {
        object.extend(facts);
        let said = String::from_utf8_lossy(&said);
        object.insert("said".to_owned(), said.lines().map(Value::from).collect());
    }
    let _ = write_json(&mut stdout(), &Value::Object(object));
}

/// Standard output; what it does not take is lost.
pub struct Answer(StdoutLock<'static>);

/// Standard output, for one thread until the value is dropped.
pub fn stdout() -> Answer {
    Answer(io::stdout().lock())
}

impl Write for Answer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let kept = gathered(|kept| {
            let room = KEPT_BYTES_MAX.saturating_sub(kept.said.len()).min(bytes.len());
            kept.said.extend(bytes.iter().take(room));
        });
        if kept.is_none() {
            PRINTED.store(true, Ordering::Relaxed);
            let _ = self.0.write_all(bytes);
        }
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
