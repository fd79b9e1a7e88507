//! Options as qemu-img takes them: short with the value attached or behind, long with `=` or behind, before and after
//! file names.

use block::Format;

use crate::error::ImgError;

/// What a subcommand accepts: `(names, takes a value)`.
pub type Known = &'static [(&'static [&'static str], bool)];

/// Options and file names in the order given.
#[derive(Debug, Default)]
pub struct Parsed {
    given: Vec<(&'static str, String)>,
    /// What is no option.
    pub words: Vec<String>,
}

impl Parsed {
    /// The last value of an option, by its first name.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.given.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
    }
    /// Every value of an option that may be repeated.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.given.iter().filter(move |(n, _)| *n == name).map(|(_, v)| v.as_str())
    }
    /// Whether an option was given.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }
    /// The only file name.
    pub fn one_file(&self) -> Result<&str, ImgError> {
        match self.words.as_slice() {
            [file] => Ok(file),
            [] => Err(ImgError::OneFile),
            [_, extra, ..] => Err(ImgError::Extra(extra.clone())),
        }
    }
    /// `-f`: the declared format; `None` probes.
    pub fn format(&self, path: &str) -> Result<Option<Format>, ImgError> {
        self.value("-f").map(|name| format_named(path, name)).transpose()
    }
    /// `--output`: JSON?
    pub fn json(&self) -> Result<bool, ImgError> {
        match self.value("--output") {
            None | Some("human") => Ok(false),
            Some("json") => Ok(true),
            Some(other) => {
                Err(ImgError::Value { option: "--output", found: other.to_owned(), possible: "human or json" })
            }
        }
    }
}

/// A format by name.
pub fn format_named(path: &str, name: &str) -> Result<Format, ImgError> {
    match name {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err(ImgError::Format { path: path.into(), format: name.to_owned() }),
    }
}

/// Splits a subcommand's arguments.
pub fn parse(command: &'static str, known: Known, args: Vec<String>) -> Result<Parsed, ImgError> {
    let mut parsed = Parsed::default();
    let mut args = args.into_iter();
    let mut only_words = false;
    while let Some(arg) = args.next() {
        if only_words || arg == "-" || !arg.starts_with('-') {
            parsed.words.push(arg);
            continue;
        }
        if arg == "--" {
            only_words = true;
            continue;
        }
        let (name, attached) = split(&arg);
        let (names, takes) = known
            .iter()
            .find(|(names, _)| names.contains(&name))
            .ok_or_else(|| ImgError::NoSuchOption { command, option: name.to_owned() })?;
        let first = names.first().copied().unwrap_or_default();
        let value = match (takes, attached) {
            (true, Some(value)) => value.to_owned(),
            (true, None) => args.next().ok_or_else(|| ImgError::NoValue(name.to_owned()))?,
            (false, None) => String::new(),
            (false, Some(_)) => return Err(ImgError::NoSuchOption { command, option: arg }),
        };
        parsed.given.push((first, value));
    }
    Ok(parsed)
}

/// `--name=value`, `-nvalue`.
fn split(arg: &str) -> (&str, Option<&str>) {
    if arg.starts_with("--") {
        return match arg.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (arg, None),
        };
    }
    match arg.char_indices().nth(2) {
        Some((at, _)) => (&arg[..at], Some(&arg[at..])),
        None => (arg, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Known = &[(&["-f"], true), (&["-q"], false), (&["--output"], true), (&["-U", "--force-share"], false)];

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn options_stand_anywhere_and_in_every_spelling() {
        for line in [
            "-f qcow2 -q --output=json a -U",
            "a -fqcow2 --output json -q --force-share",
            "-U -q --output json -f qcow2 -- a",
        ] {
            let parsed = parse("info", KNOWN, words(line)).unwrap();
            assert_eq!(parsed.words, ["a"], "{line}");
            assert_eq!((parsed.value("-f"), parsed.has("-q"), parsed.has("-U")), (Some("qcow2"), true, true), "{line}");
            assert!(parsed.json().unwrap(), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, text) in [
            ("-x", "'info' has no option -x; 'vireo-img --help' lists them"),
            ("a -f", "option -f needs a value"),
            ("--output=xml a", "--output cannot be 'xml': it is human or json"),
            ("a b", "unexpected argument 'b'"),
            ("-q", "Expecting one image file name"),
            ("-f vmdk a", "a: Unknown file format 'vmdk': raw and qcow2 are known"),
        ] {
            let outcome = parse("info", KNOWN, words(line)).and_then(|parsed| {
                parsed.one_file()?;
                parsed.json()?;
                parsed.format("a").map(|_| ())
            });
            assert_eq!(outcome.unwrap_err().to_string(), text, "{line}");
        }
    }
}
