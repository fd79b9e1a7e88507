//! `vireo`: the command line of a daemon that speaks libvirt's protocol. Takes virsh's verbs and options, prints what
//! virsh prints, and JSON where programs read.
//!
//! - [`grammar`]: verbs and options as data, and how words become them. [`verbs`]: the tables and what they do.
//! - [`shell`]: connection, output, commands one after the other. [`session`]: line by line.
//! - [`doctor`], [`run`], [`completion`]: what virsh has no word for.
//!
//! Invariant: reaches the daemon through `client` alone, and vireo-vmm as a program.
#![forbid(unsafe_code)]

mod columns;
mod completion;
mod doctor;
mod editor;
mod failure;
mod grammar;
mod help;
mod names;
mod run;
mod session;
mod shell;
mod verbs;

use std::process::ExitCode;

use crate::failure::Failure;
use crate::shell::Shell;

/// What the words before the verb ask for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    /// Carry out what follows.
    Go,
    /// Print this and leave.
    Print(String),
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let mut shell = Shell::new();
    let success = match globals(&mut shell, &words) {
        Ok((Wish::Print(text), _)) => {
            shell.say(text);
            shell.flush();
            true
        }
        Ok((Wish::Go, rest)) => go(&mut shell, rest),
        Err(failure) => {
            shell.report(&failure);
            false
        }
    };
    shell.disconnect();
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn go(shell: &mut Shell, rest: &[String]) -> bool {
    match rest {
        [] => session::interactive(shell),
        // Its options are vireo-vmm's, not ours to read.
        [verb, arguments @ ..] if verb == "run" => match run::exec(arguments) {
            Ok(()) => true,
            Err(failure) => {
                shell.report(&failure);
                false
            }
        },
        [verb, typed @ ..] if verb == completion::COMPLETE => {
            completion::complete(shell, typed);
            true
        }
        // One word is a line as it would be typed, several are one command's words.
        [line] => match grammar::split(line) {
            Ok(commands) => shell.run(&commands),
            Err(failure) => {
                shell.report(&failure);
                false
            }
        },
        words => {
            let commands: Vec<Vec<String>> = words.split(|word| word == ";").map(<[String]>::to_vec).collect();
            let commands: Vec<_> = commands.into_iter().filter(|command| !command.is_empty()).collect();
            shell.run(&commands)
        }
    }
}

/// Reads the options before the verb; returns what is left.
fn globals<'a>(shell: &mut Shell, words: &'a [String]) -> Result<(Wish, &'a [String]), Failure> {
    let mut rest = words;
    while let Some((word, tail)) = rest.split_first() {
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (word.as_str(), None),
        };
        let mut left = tail;
        let mut value = || match (inline, left.split_first()) {
            (Some(value), _) => Ok(value.to_owned()),
            (None, Some((value, after))) => {
                left = after;
                Ok(value.clone())
            }
            (None, None) => Err(Failure::new(format!("option '{name}' requires an argument"))),
        };
        match name {
            "-c" | "--connect" => shell.uri = Some(value()?),
            "-e" | "--escape" => shell.escape = escape(&value()?)?,
            "-d" | "--debug" | "-k" | "--keepalive-interval" | "-K" | "--keepalive-count" | "-l" | "--log" => {
                // Of interest to virsh's own machinery; taken, so that scripts that give them work.
                value()?;
            }
            "-j" | "--json" => shell.json = true,
            "-q" | "--quiet" => shell.quiet = true,
            "-r" | "--readonly" => shell.read_only = true,
            "-t" | "--timing" => shell.timing = true,
            "-h" | "--help" => {
                return Ok((Wish::Print(help::USAGE.to_owned() + &help::about(None)?), left));
            }
            "-v" | "-V" | "--version" => return Ok((Wish::Print(format!("{}\n", env!("CARGO_PKG_VERSION"))), left)),
            _ if name.starts_with('-') => {
                let name = name.trim_start_matches('-');
                return Err(Failure::new(format!("unsupported option '-{name}'. See --help.")));
            }
            _ => break,
        }
        rest = left;
    }
    Ok((Wish::Go, rest))
}

/// `^]`, or the character itself.
fn escape(text: &str) -> Result<u8, Failure> {
    let wrong = || Failure::new(format!("Invalid string '{text}' for escape sequence"));
    match text.as_bytes() {
        [b'^', control] => {
            let control = control.to_ascii_uppercase();
            if (b'@'..=b'_').contains(&control) { Ok(control ^ 0x40) } else { Err(wrong()) }
        }
        [plain] => Ok(*plain),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_before_the_verb_are_options() {
        let mut shell = Shell::new();
        let words = ["-q", "--connect=qemu:///session", "-e", "^a", "list", "-q"].map(str::to_owned);
        let (wish, rest) = globals(&mut shell, &words).unwrap();
        assert_eq!((wish, rest), (Wish::Go, &["list".to_owned(), "-q".to_owned()][..]));
        assert_eq!((shell.uri.as_deref(), shell.quiet, shell.escape), (Some("qemu:///session"), true, 1));
        assert_eq!(globals(&mut shell, &["-c".to_owned()]).unwrap_err().lines(), ["option '-c' requires an argument"]);
        assert!(globals(&mut shell, &["--nosuch".to_owned()]).is_err());
    }

    #[test]
    fn escape_characters() {
        for (text, expected) in [("^]", Some(0x1d)), ("^a", Some(1)), ("x", Some(b'x')), ("^1", None), ("", None)] {
            assert_eq!(escape(text).ok(), expected, "{text}");
        }
    }
}
