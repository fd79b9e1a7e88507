//! `tree`: the backing chain of an image, drawn. Not a command of qemu-img.

use std::io::{IsTerminal, Write};

use serde_json::{Value, json};

use crate::Command;
use crate::chain::{Found, Walk};
use crate::error::ImgError;
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed};
use crate::json::write_json;
use crate::open::Named;
use crate::output::stdout;
use crate::ova;
use crate::size::human;

/// `tree`.
pub const COMMAND: Command = Command {
    name: "tree",
    about: "Draw the backing chain of an image, with sizes and snapshots",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[FORMAT, IMAGE_OPTS, FORCE_SHARE, OBJECT, OUTPUT, JSON];

/// Colours of a terminal, or nothing.
pub struct Ink {
    on: bool,
}

impl Ink {
    /// Only for people who look at it.
    pub fn of_stdout() -> Ink {
        Ink { on: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }
    fn paint(&self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
    /// What matters most.
    pub fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }
    /// What is wrong.
    pub fn red(&self, text: &str) -> String {
        self.paint("31", text)
    }
    /// What is well.
    pub fn green(&self, text: &str) -> String {
        self.paint("32", text)
    }
    /// What matters less.
    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    if let Some(archive) = ova::of(parsed)? {
        let mut out = stdout();
        match parsed.json()? {
            true => write_json(&mut out, &json!({"chain": [archive.to_json()?], "broken": null}))?,
            false => out.write_all(archive.tree()?.as_bytes())?,
        }
        return Ok(0);
    }
    let named = Named::of(parsed, parsed.one_file()?, "format")?;
    // Nothing here depends on whether the image changes meanwhile.
    let mut chain = Vec::new();
    let mut broken = None;
    for found in Walk::new(named, true) {
        match found {
            Ok(found) => chain.push(found),
            Err(error) if chain.is_empty() => return Err(error),
            Err(error) => broken = Some(error.to_string()),
        }
    }
    let mut out = stdout();
    if parsed.json()? {
        let layers: Vec<Value> = chain.iter().map(layer_json).collect();
        write_json(&mut out, &json!({"chain": layers, "broken": broken}))?;
    } else {
        out.write_all(draw(&chain, broken.as_deref(), &Ink::of_stdout()).as_bytes())?;
    }
    Ok(u8::from(broken.is_some()))
}

fn layer_json(found: &Found) -> Value {
    let names = found.snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name).into_owned());
    json!({
        "filename": found.path.display().to_string(), "format": found.info.format.name(),
        "virtual-size": found.info.virtual_size_bytes, "actual-size": found.info.allocated_bytes,
        "snapshots": names.collect::<Vec<_>>(),
    })
}

/// An image a line, those below indented; its snapshots under it.
fn draw(chain: &[Found], broken: Option<&str>, ink: &Ink) -> String {
    let mut out = String::new();
    for (depth, found) in chain.iter().enumerate() {
        let last = depth + 1 == chain.len() && broken.is_none();
        let lead = branch(depth);
        let info = &found.info;
        let sizes = format!("{} disk, {} on the host", human(info.virtual_size_bytes), human(info.allocated_bytes));
        let marks = match (info.corrupt, info.dirty) {
            (true, _) => ink.red("  marked corrupt"),
            (false, true) => ink.red("  not closed cleanly"),
            _ => String::new(),
        };
        let name = ink.bold(&found.path.display().to_string());
        out += &format!("{lead}{name}  {}  {}{marks}\n", info.format.name(), ink.dim(&sizes));
        let rail = format!("{}{}", "   ".repeat(depth), if last { "   " } else { "|  " });
        for snapshot in &found.snapshots {
            let name = String::from_utf8_lossy(&snapshot.name).into_owned();
            let state = match snapshot.vm_state_bytes {
                0 => String::new(),
                bytes => format!(", with {} of machine state", human(bytes)),
            };
            out += &format!("{rail}* snapshot {name}{}\n", ink.dim(&state));
        }
    }
    if let Some(error) = broken {
        out += &format!("{}{}\n", branch(chain.len()), ink.red(error));
    }
    out
}

fn branch(depth: usize) -> String {
    match depth.checked_sub(1) {
        None => String::new(),
        Some(above) => format!("{}`- ", "   ".repeat(above)),
    }
}
