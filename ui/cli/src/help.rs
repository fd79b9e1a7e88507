//! Explanations, made from the tables of verbs.

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::grammar::{Group, Kind, Opt, Verb};
use crate::verbs;

/// What `vireo --help` prints.
pub const USAGE: &str = "\
vireo [options]... [<verb>] [<option>]...
vireo [options]... <verb> [args...]

  options:
    -c | --connect=URI      daemon to connect to (VIREO_URI, LIBVIRT_DEFAULT_URI)
    -e | --escape <char>    escape character of consoles, default ^]
    -j | --json             print JSON for programs
    -q | --quiet            print only what was asked for
    -r | --readonly         ask for no more than reading
    -t | --timing           print how long each command took
    -h | --help             print this
    -v | --version          print the version

  Without a verb a session begins that takes verbs line by line.

  verbs (help <verb> explains one, help <family> lists a family):
";

fn family(group: Group) -> impl Iterator<Item = &'static Verb> {
    verbs::all().filter(move |verb| verb.group == group)
}

fn list_family(group: Group, title: &str, word: &str, out: &mut String) {
    out.push_str(&format!(" {title} (help keyword '{word}'):\n"));
    for verb in family(group) {
        out.push_str(&format!("    {:<30} {}\n", verb.name, verb.summary));
    }
}

/// Help about a verb, a family, or everything.
pub fn about(word: Option<&str>) -> Result<String, Failure> {
    let mut out = String::new();
    let Some(word) = word else {
        out.push_str("Grouped commands:\n\n");
        for (group, title, word) in Group::ALL {
            list_family(group, title, word, &mut out);
            out.push('\n');
        }
        return Ok(out);
    };
    if let Some(verb) = verbs::find(word) {
        return Ok(of_verb(verb));
    }
    match Group::ALL.iter().find(|(_, _, name)| *name == word) {
        Some((group, title, word)) => {
            list_family(*group, title, word, &mut out);
            Ok(out)
        }
        None => Err(Failure::new(format!("command or command group '{word}' doesn't exist"))),
    }
}

/// Verbs with their options for programs: all of them, a family's, or one.
pub fn as_json(word: Option<&str>) -> Value {
    let title = |group| Group::ALL.iter().find(|(found, _, _)| *found == group).map(|(_, _, word)| *word);
    let meant = |verb: &&Verb| word.is_none_or(|word| verb.name == word || title(verb.group) == Some(word));
    let option = |option: &Opt| {
        let takes = match option.kind {
            Kind::Flag => "nothing",
            Kind::Text => "string",
            Kind::Words => "strings",
            Kind::Number => "number",
            Kind::Size => "size",
        };
        json!({ "name": option.name, "takes": takes, "required": option.required, "help": option.help })
    };
    let verb = |verb: &'static Verb| {
        json!({
            "name": verb.name,
            "family": title(verb.group),
            "summary": verb.summary,
            "options": verb.options().map(option).collect::<Vec<_>>(),
        })
    };
    Value::Array(verbs::all().filter(meant).map(verb).collect())
}

fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Flag => "",
        Kind::Text | Kind::Words => "<string>",
        Kind::Number | Kind::Size => "<number>",
    }
}

fn synopsis(option: &Opt) -> String {
    match option.kind {
        Kind::Flag => format!(" [--{}]", option.name),
        Kind::Words => format!(" [<{}>]...", option.name),
        _ if option.required => format!(" <{}>", option.name),
        kind => format!(" [--{} {}]", option.name, kind_word(kind)),
    }
}

/// Help about one verb.
pub fn of_verb(verb: &'static Verb) -> String {
    let options = || verb.options();
    let mut out = format!("  NAME\n    {} - {}\n\n  SYNOPSIS\n    {}", verb.name, verb.summary, verb.name);
    options().for_each(|option| out.push_str(&synopsis(option)));
    out.push('\n');
    if options().next().is_some() {
        out.push_str("\n  OPTIONS\n");
    }
    for option in options() {
        let shown = match option.kind {
            Kind::Flag => format!("--{}", option.name),
            Kind::Words => format!("<{}>", option.name),
            kind if option.required => format!("[--{}] {}", option.name, kind_word(kind)),
            kind => format!("--{} {}", option.name, kind_word(kind)),
        };
        out.push_str(&format!("    {shown:<16} {}\n", option.help));
    }
    out.push('\n');
    out
}
