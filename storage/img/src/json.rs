//! JSON as qemu-img prints it: four blanks of indentation.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

/// Writes a value and a line end.
pub fn write_json(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let mut serializer = Serializer::with_formatter(&mut *out, PrettyFormatter::with_indent(b"    "));
    value.serialize(&mut serializer)?;
    out.write_all(b"\n")
}
