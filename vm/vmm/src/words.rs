//! What the process has to say to people, on standard error: vireod keeps it as the last words of a machine.

use std::fmt::Display;
use std::io::Write;

/// Says it. Nobody listening is no reason to end.
pub fn say(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "vireo-vmm: {text}");
}
