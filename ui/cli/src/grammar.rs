//! virsh's grammar: a verb, its options in any order, and data that fills the options not yet given.

use std::collections::BTreeMap;

use crate::failure::Failure;
use crate::shell::Shell;

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Flag,
    /// A word.
    Text,
    /// A whole number.
    Number,
    /// A number with a unit.
    Size,
    /// Every word that is left.
    Words,
}

/// An option of a verb.
#[derive(Debug)]
pub struct Opt {
    /// Its name without hyphens.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// The verb means nothing without it.
    pub required: bool,
    /// Data without a name may be meant for it.
    pub positional: bool,
    /// One line for people.
    pub help: &'static str,
}

/// A switch.
pub const fn flag(name: &'static str, help: &'static str) -> Opt {
    Opt { name, kind: Kind::Flag, required: false, positional: false, help }
}

/// An option that may also be given by its place.
pub const fn option(name: &'static str, kind: Kind, help: &'static str) -> Opt {
    Opt { name, kind, required: false, positional: true, help }
}

/// An option that must be given by its name.
pub const fn named(name: &'static str, kind: Kind, help: &'static str) -> Opt {
    Opt { name, kind, required: false, positional: false, help }
}

/// Data that must be given.
pub const fn need(name: &'static str, kind: Kind, help: &'static str) -> Opt {
    Opt { name, kind, required: true, positional: true, help }
}

/// The domain a verb is about.
pub const DOMAIN: Opt = need("domain", Kind::Text, "domain by name, id or uuid");

/// Families of verbs, as `help` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Changes to domains.
    Domain,
    /// Questions about domains.
    Monitor,
    /// The host and the daemon.
    Host,
    /// What the daemon does not have yet, listed as empty.
    Other,
    /// This program itself.
    Vireo,
}

impl Group {
    /// Every family in order, with its title and its word for `help`.
    pub const ALL: [(Group, &'static str, &'static str); 5] = [
        (Group::Domain, "Domain Management", "domain"),
        (Group::Monitor, "Domain Monitoring", "monitor"),
        (Group::Host, "Host and Hypervisor", "host"),
        (Group::Other, "Networks, Pools and the rest", "other"),
        (Group::Vireo, "Vireo itself", "vireo"),
    ];
}

/// Outcome of a verb.
pub type Done = Result<(), Failure>;

/// A verb.
#[derive(Debug)]
pub struct Verb {
    /// Its name.
    pub name: &'static str,
    /// Its family.
    pub group: Group,
    /// One line for people.
    pub summary: &'static str,
    /// Its options.
    pub options: &'static [Opt],
    /// It lists or shows something, and can do so as JSON.
    pub shows: bool,
    /// What it does.
    pub run: fn(&mut Shell, &Args) -> Done,
}

/// The option that every verb has that shows something.
pub const JSON: Opt = flag("json", "print JSON for programs");
/// The option that every verb has.
pub const HELP: Opt = flag("help", "print help for this function");

impl Verb {
    /// Its options as people are shown them.
    pub fn options(&self) -> impl Iterator<Item = &'static Opt> {
        self.options.iter().chain(self.shows.then_some(&JSON))
    }

    fn find(&self, name: &str) -> Option<&'static Opt> {
        match name {
            "help" => Some(&HELP),
            "json" if self.shows => Some(&JSON),
            _ => self.options.iter().find(|option| option.name == name),
        }
    }
}

/// Options as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    values: BTreeMap<&'static str, Vec<String>>,
}

impl Args {
    /// Whether a switch (or any option) was given.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// An option's word.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.first().map(String::as_str)
    }

    /// A word that the grammar has made sure of.
    pub fn need(&self, name: &str) -> &str {
        self.text(name).unwrap_or_default()
    }

    /// All words of an option.
    pub fn words(&self, name: &str) -> &[String] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    /// An option's number.
    pub fn number(&self, name: &str) -> Result<Option<u32>, Failure> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| bad_number(text, name))
    }

    /// An option's size in KiB.
    pub fn kib(&self, name: &str) -> Result<Option<u64>, Failure> {
        let Some(text) = self.text(name) else { return Ok(None) };
        size_kib(text).map(Some).ok_or_else(|| bad_number(text, name))
    }
}

fn bad_number(text: &str, name: &str) -> Failure {
    Failure::new(format!("Scaled numeric value '{text}' for <{name}> option is malformed or out of range"))
}

/// A size: KiB where no unit is given, rounded up.
pub fn size_kib(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().ok()?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "k" | "kib" => 1 << 10,
        "b" | "byte" | "bytes" => 1,
        "kb" => 1000,
        "m" | "mib" => 1 << 20,
        "mb" => 1_000_000,
        "g" | "gib" => 1 << 30,
        "gb" => 1_000_000_000,
        "t" | "tib" => 1 << 40,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    Some(number.checked_mul(factor)?.div_ceil(1024))
}

/// Reads the words after a verb.
pub fn parse(verb: &'static Verb, words: &[String]) -> Result<Args, Failure> {
    let mut args = Args::default();
    let mut words = words.iter();
    let mut only_data = false;
    while let Some(word) = words.next() {
        let option = word.strip_prefix("--").filter(|name| !only_data && !name.is_empty());
        match option {
            Some(option) => take_option(verb, option, &mut words, &mut args)?,
            None if word == "--" && !only_data => only_data = true,
            None => take_data(verb, word, &mut args)?,
        }
    }
    if args.has("help") {
        return Ok(args);
    }
    match verb.options.iter().find(|option| option.required && !args.has(option.name)) {
        None => Ok(args),
        Some(missing) => Err(Failure::new(format!("command '{}' requires <{}> option", verb.name, missing.name))),
    }
}

fn take_option<'a>(
    verb: &'static Verb,
    option: &str,
    words: &mut impl Iterator<Item = &'a String>,
    args: &mut Args,
) -> Result<(), Failure> {
    let (name, inline) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value.to_owned())));
    let Some(found) = verb.find(name) else {
        return Err(Failure::new(format!("command '{}' doesn't support option --{name}", verb.name)));
    };
    if args.has(found.name) && found.kind != Kind::Words {
        return Err(Failure::new(format!("option --{name} already seen")));
    }
    if found.kind == Kind::Flag {
        if inline.is_some() {
            return Err(Failure::new(format!("invalid '=' after option --{name}")));
        }
        args.values.insert(found.name, Vec::new());
        return Ok(());
    }
    let shape = if found.kind == Kind::Number || found.kind == Kind::Size { "number" } else { "string" };
    let value = inline.or_else(|| words.next().cloned());
    let value = value.ok_or_else(|| Failure::new(format!("expected syntax: --{name} <{shape}>")))?;
    args.values.entry(found.name).or_default().push(value);
    Ok(())
}

fn take_data(verb: &'static Verb, word: &str, args: &mut Args) -> Result<(), Failure> {
    let open = |option: &&Opt| option.positional && (option.kind == Kind::Words || !args.has(option.name));
    let Some(option) = verb.options.iter().find(open) else {
        return Err(Failure::new(format!("unexpected data '{word}'")));
    };
    args.values.entry(option.name).or_default().push(word.to_owned());
    Ok(())
}

/// Splits a line into commands and words: `;` ends a command, quotes and backslashes keep characters together.
pub fn split(line: &str) -> Result<Vec<Vec<String>>, Failure> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        let unquoted_separator = quote.is_none() && (c.is_whitespace() || c == ';');
        if unquoted_separator {
            if let (Some(done), Some(command)) = (word.take(), commands.last_mut()) {
                command.push(done);
            }
            if matches!(c, ';' | '\n') {
                commands.push(Vec::new());
            }
            continue;
        }
        if quote.is_none() && c == '#' && word.is_none() {
            break;
        }
        let current = word.get_or_insert_default();
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None | Some('"'), '\\') => match characters.next() {
                Some(escaped) => current.push(escaped),
                None => return Err(Failure::new("dangling \\")),
            },
            _ => current.push(c),
        }
    }
    if quote.is_some() {
        return Err(Failure::new(format!("missing {}", quote.unwrap_or('"'))));
    }
    if let (Some(done), Some(command)) = (word, commands.last_mut()) {
        command.push(done);
    }
    commands.retain(|command| !command.is_empty());
    Ok(commands)
}

#[cfg(test)]
mod tests {
    use super::*;

    static VERB: Verb = Verb {
        name: "try",
        group: Group::Vireo,
        summary: "",
        options: &[
            DOMAIN,
            flag("all", ""),
            option("size", Kind::Size, ""),
            named("mode", Kind::Text, ""),
            option("rest", Kind::Words, ""),
        ],
        shows: true,
        run: |_, _| Ok(()),
    };

    #[test]
    fn words_find_their_options() {
        let check = |line: &str, expected: Result<&str, &str>| {
            let words = split(line).unwrap().pop().unwrap_or_default();
            let found = parse(&VERB, &words).map(|args| {
                let shown = args.values.iter().map(|(name, values)| format!("{name}={}", values.join(",")));
                shown.collect::<Vec<_>>().join(" ")
            });
            let found = found.map_err(|failure| failure.lines().join("|"));
            assert_eq!(found.as_deref().map_err(String::as_str), expected, "{line}");
        };
        check("vm1 --all", Ok("all= domain=vm1"));
        check("--all --domain vm1 64M a b", Ok("all= domain=vm1 rest=a,b size=64M"));
        check("--size=1 vm1 --json", Ok("domain=vm1 json= size=1"));
        check("-- --all", Ok("domain=--all"));
        check("'a \"b' --mode x\\ y", Ok("domain=a \"b mode=x y"));
        check("", Err("command 'try' requires <domain> option"));
        check("vm1 --nosuch", Err("command 'try' doesn't support option --nosuch"));
        check("vm1 --all --all", Err("option --all already seen"));
        check("vm1 --all=1", Err("invalid '=' after option --all"));
        check("vm1 --mode", Err("expected syntax: --mode <string>"));
        check("--help", Ok("help="));
    }

    #[test]
    fn lines_are_several_commands() {
        let commands = split("list --all; dominfo 'a;b' # c ; d\n").unwrap();
        assert_eq!(commands, [vec!["list", "--all"], vec!["dominfo", "a;b"]]);
        assert_eq!(split("'").unwrap_err().lines(), ["missing '"]);
    }

    #[test]
    fn sizes_are_kib_unless_they_say_otherwise() {
        for (text, expected) in [
            ("128", Some(128)),
            ("128M", Some(131_072)),
            ("1b", Some(1)),
            ("1GiB", Some(1 << 20)),
            ("x", None),
            ("1x", None),
        ] {
            assert_eq!(size_kib(text), expected, "{text}");
        }
    }
}
