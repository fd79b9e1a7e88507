//! Command lines as qemu-img takes them: short options bundled or with the value attached, long ones with `=` or the
//! value behind, abbreviated where that is clear, before and after file names.

use std::ffi::{OsStr, OsString};
use std::iter::Peekable;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::vec::IntoIter;

use crate::error::ImgError;

/// What is wrong with an option, as getopt says it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum OptionFault {
    #[error("invalid option -- '{0}'")]
    NoLetter(char),
    #[error("unrecognized option '--{0}'")]
    NoName(String),
    #[error("option '--{name}' is ambiguous; possibilities:{}", possible.iter().map(|n| format!(" '--{n}'")).collect::<String>())]
    Ambiguous { name: String, possible: Vec<&'static str> },
    #[error("option requires an argument -- '{0}'")]
    LetterNeedsValue(char),
    #[error("option '--{0}' requires an argument")]
    NameNeedsValue(&'static str),
    #[error("option '--{0}' doesn't allow an argument")]
    ValueUnwanted(&'static str),
}

/// An option of a subcommand.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// Letter, or `'\0'`.
    pub short: char,
    /// Long names; the first is how the code asks for it.
    pub long: &'static [&'static str],
    /// What its value is called; empty for a switch.
    pub value: &'static str,
    /// What it does, for `--help`.
    pub help: &'static str,
}

/// An option with a value.
pub const fn opt(short: char, long: &'static [&'static str], value: &'static str, help: &'static str) -> Opt {
    Opt { short, long, value, help }
}

/// An option that is there or not.
pub const fn flag(short: char, long: &'static [&'static str], help: &'static str) -> Opt {
    Opt { short, long, value: "", help }
}

/// `-h`. What follows it is not looked at.
pub const HELP: Opt = flag('h', &["help"], "print this help and exit");
/// Options many subcommands share, in one spelling.
pub const QUIET: Opt = flag('q', &["quiet"], "print no more than errors");
/// `-p`.
pub const PROGRESS: Opt = flag('p', &["progress"], "show how far it is");
/// `-U`.
pub const FORCE_SHARE: Opt = flag('U', &["force-share"], "open the image even while another process uses it");
/// `-f`.
pub const FORMAT: Opt = opt('f', &["format"], "FMT", "format of the image; without it the file is looked at");
/// `--image-opts`.
pub const IMAGE_OPTS: Opt = flag('\0', &["image-opts"], "the file name is driver=...,file.filename=...");
/// `--object`.
pub const OBJECT: Opt = opt(
    '\0',
    &["object"],
    "OBJDEF",
    "secret,id=ID,data=...|file=PATH[,format=base64], or tls-creds-x509,id=ID,endpoint=client|server,dir=DIR",
);
/// `--output`.
pub const OUTPUT: Opt = opt('\0', &["output"], "human|json", "how the answer is printed");
/// `--json`, short for `--output=json`.
pub const JSON: Opt = flag('\0', &["json"], "short for --output=json");

/// Options and other words of one command line, in the order given.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Subcommand, for messages.
    pub command: &'static str,
    given: Vec<(&'static str, OsString)>,
    /// What is no option: file names, sizes.
    pub words: Vec<OsString>,
}

impl Parsed {
    /// The last value of an option, by its first long name.
    pub fn os_value(&self, name: &str) -> Option<&OsStr> {
        self.given.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v.as_os_str())
    }
    /// The same as text.
    pub fn value(&self, name: &'static str) -> Result<Option<&str>, ImgError> {
        self.os_value(name).map(|value| text(name, value)).transpose()
    }
    /// Every value of an option that may be repeated.
    pub fn values(&self, name: &'static str) -> Result<Vec<&str>, ImgError> {
        self.given.iter().filter(|(n, _)| *n == name).map(|(_, v)| text(name, v)).collect()
    }
    /// Whether an option was given.
    pub fn has(&self, name: &str) -> bool {
        self.os_value(name).is_some()
    }
    /// Options in the order given, by first long name: for commands in which the order counts.
    pub fn in_order(&self) -> impl Iterator<Item = (&'static str, &OsStr)> {
        self.given.iter().map(|(name, value)| (*name, value.as_os_str()))
    }
    /// The only file name.
    pub fn one_file(&self) -> Result<&OsStr, ImgError> {
        match self.words.as_slice() {
            [file] => Ok(file),
            _ => Err(ImgError::OneFile { command: self.command }),
        }
    }
    /// `--output`: JSON?
    pub fn json(&self) -> Result<bool, ImgError> {
        if self.has("json") {
            return Ok(true);
        }
        match self.value("output")? {
            None | Some("human") => Ok(false),
            Some("json") => Ok(true),
            Some(other) => Err(ImgError::OutputFormat { command: self.command, found: other.to_owned() }),
        }
    }
    /// Refuses `--image-opts` together with the option that declares a format.
    pub fn check_image_opts(&self, format_option: &str) -> Result<(), ImgError> {
        if self.has("image-opts") && self.has(format_option) {
            return Err(ImgError::ImageOptsAndFormat);
        }
        Ok(())
    }
}

fn text<'a>(option: &'static str, value: &'a OsStr) -> Result<&'a str, ImgError> {
    value.to_str().ok_or(ImgError::NotText { option })
}

/// The subcommand whose second word may be a negative number, if it is right behind the first.
const SIGNED_SIZE: &str = "resize";

fn is_negative_number(arg: &OsString) -> bool {
    matches!(arg.as_bytes(), [b'-', digit, ..] if digit.is_ascii_digit())
}

/// Splits a subcommand's arguments.
pub fn parse(command: &'static str, known: &[Opt], args: Vec<OsString>) -> Result<Parsed, ImgError> {
    Splitter::new(command, known, args).split(false)
}

/// Splits options from what begins with the first word that is none, and is all words.
pub fn parse_leading(known: &[Opt], args: Vec<OsString>) -> Result<Parsed, ImgError> {
    Splitter::new("", known, args).split(true)
}

fn key(opt: &Opt) -> &'static str {
    opt.long.first().copied().unwrap_or_default()
}

/// A command line on its way.
struct Splitter<'k> {
    known: &'k [Opt],
    args: Peekable<IntoIter<OsString>>,
    parsed: Parsed,
}

impl<'k> Splitter<'k> {
    fn new(command: &'static str, known: &'k [Opt], args: Vec<OsString>) -> Splitter<'k> {
        Splitter { known, args: args.into_iter().peekable(), parsed: Parsed { command, ..Parsed::default() } }
    }

    fn split(mut self, leading_only: bool) -> Result<Parsed, ImgError> {
        while let Some(arg) = self.args.next() {
            let bytes = arg.as_bytes();
            if bytes == b"--" {
                self.parsed.words.extend(self.args.by_ref());
            } else if bytes.starts_with(b"--") {
                self.long(&arg).map_err(|fault| self.failed(fault))?;
            } else if bytes.len() > 1 && bytes.starts_with(b"-") {
                self.shorts(&arg).map_err(|fault| self.failed(fault))?;
            } else {
                self.word(arg, leading_only);
            }
            if self.parsed.has(key(&HELP)) {
                break;
            }
        }
        Ok(self.parsed)
    }

    fn failed(&self, fault: OptionFault) -> ImgError {
        ImgError::Option { command: self.parsed.command, fault }
    }

    fn word(&mut self, arg: OsString, leading_only: bool) {
        let is_first = self.parsed.words.is_empty();
        self.parsed.words.push(arg);
        if leading_only {
            self.parsed.words.extend(self.args.by_ref());
        } else if is_first && self.parsed.command == SIGNED_SIZE {
            self.parsed.words.extend(self.args.next_if(is_negative_number));
        }
    }

    /// `--name`, `--name=value`, `--name value`.
    fn long(&mut self, arg: &OsStr) -> Result<(), OptionFault> {
        let body = arg.as_bytes().get(2..).unwrap_or_default();
        let (name, attached) = match body.iter().position(|b| *b == b'=') {
            Some(at) => (body.get(..at).unwrap_or_default(), body.get(at + 1..)),
            None => (body, None),
        };
        let (opt, name) = find_long(self.known, name, &String::from_utf8_lossy(body))?;
        let value = match (opt.value.is_empty(), attached) {
            (true, None) => OsString::new(),
            (true, Some(_)) => return Err(OptionFault::ValueUnwanted(name)),
            (false, Some(value)) => OsString::from_vec(value.to_vec()),
            (false, None) => self.args.next().ok_or(OptionFault::NameNeedsValue(name))?,
        };
        self.parsed.given.push((key(opt), value));
        Ok(())
    }

    /// `-q`, `-qU`, `-f qcow2`, `-fqcow2`.
    fn shorts(&mut self, arg: &OsStr) -> Result<(), OptionFault> {
        let letters = arg.as_bytes();
        let mut at = 1;
        while let Some(letter) = letters.get(at) {
            let letter = char::from(*letter);
            let found = self.known.iter().find(|opt| opt.short == letter && opt.short != '\0');
            let opt = found.ok_or(OptionFault::NoLetter(letter))?;
            at += 1;
            if opt.value.is_empty() {
                self.parsed.given.push((key(opt), OsString::new()));
                continue;
            }
            let rest = letters.get(at..).filter(|rest| !rest.is_empty());
            let value = match rest {
                Some(rest) => OsString::from_vec(rest.to_vec()),
                None => self.args.next().ok_or(OptionFault::LetterNeedsValue(letter))?,
            };
            self.parsed.given.push((key(opt), value));
            break;
        }
        Ok(())
    }
}

/// The whole name, or the beginning of those of just one option; with the whole name. `shown` is what was written.
fn find_long<'k>(known: &'k [Opt], name: &[u8], shown: &str) -> Result<(&'k Opt, &'static str), OptionFault> {
    let all = || known.iter().flat_map(|opt| opt.long.iter().map(move |long| (opt, *long)));
    if let Some(whole) = all().find(|(_, long)| long.as_bytes() == name) {
        return Ok(whole);
    }
    let fits: Vec<(&Opt, &'static str)> = all().filter(|(_, long)| long.as_bytes().starts_with(name)).collect();
    match fits.split_first() {
        None => Err(OptionFault::NoName(shown.to_owned())),
        Some((first, rest)) if rest.iter().all(|(opt, _)| key(opt) == key(first.0)) => Ok(*first),
        Some(_) => {
            let possible = fits.iter().map(|(_, long)| *long).collect();
            Err(OptionFault::Ambiguous { name: shown.to_owned(), possible })
        }
    }
}

/// A subcommand's options, one a line.
pub fn describe(known: &[Opt]) -> String {
    let mut out = String::new();
    for opt in known {
        let value = if opt.value.is_empty() { String::new() } else { format!(" {}", opt.value) };
        let short = if opt.short == '\0' { String::new() } else { format!("-{}, ", opt.short) };
        let long: Vec<String> = opt.long.iter().map(|name| format!("--{name}")).collect();
        out += &format!("  {short}{}{value}\n      {}\n", long.join(", "), opt.help);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Opt] = &[FORMAT, QUIET, OUTPUT, FORCE_SHARE, opt('o', &["options"], "OPTS", ""), IMAGE_OPTS];

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn options_stand_anywhere_and_in_every_spelling() {
        for line in [
            "-f qcow2 -q --output=json a -U -o x -o y",
            "a -fqcow2 --output json -q --force-share -ox --options=y",
            "-qU --output json -f raw -f qcow2 -o x --options y -- a",
            "-Uqfqcow2 a --out=json --opt x -oy",
        ] {
            let parsed = parse("info", KNOWN, words(line)).unwrap();
            assert_eq!(parsed.words, ["a"], "{line}");
            assert_eq!(parsed.value("format").unwrap(), Some("qcow2"), "{line}");
            assert!(parsed.has("quiet") && parsed.has("force-share") && parsed.json().unwrap(), "{line}");
            assert_eq!(parsed.values("options").unwrap(), ["x", "y"], "{line}");
        }
        let parsed = parse("info", KNOWN, words("-- -f --x -")).unwrap();
        assert_eq!(parsed.words, ["-f", "--x", "-"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, text) in [
            ("-x", "info: invalid option -- 'x'"),
            ("-qx", "info: invalid option -- 'x'"),
            ("--o a", "info: option '--o' is ambiguous; possibilities: '--output' '--options'"),
            ("--frob=1 a", "info: unrecognized option '--frob=1'"),
            ("a -f", "info: option requires an argument -- 'f'"),
            ("a --forma", "info: option '--format' requires an argument"),
            ("--quiet=1", "info: option '--quiet' doesn't allow an argument"),
            ("--output=xml a", "--output expects 'human' or 'json' not 'xml'"),
            ("a b", "Expecting one image file name"),
            ("-q", "Expecting one image file name"),
            ("a -f x --image-opts", "--image-opts and --format are mutually exclusive"),
        ] {
            let outcome = parse("info", KNOWN, words(line)).and_then(|parsed| {
                parsed.one_file()?;
                parsed.json()?;
                parsed.check_image_opts("format")
            });
            let said = outcome.unwrap_err().to_string();
            assert_eq!(said.lines().next(), Some(text), "{line}");
        }
    }
}
