//! Verbs about this program rather than about domains.

use std::env;

use crate::failure::Failure;
use crate::grammar::{Args, Done, Group, Kind, Opt, Verb, flag, need, option};
use crate::shell::Shell;
use crate::{completion, doctor, help, run};

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Vireo, summary, options, shows: false, run }
}

const CONNECT: &[Opt] =
    &[option("name", Kind::Text, "URI of the daemon"), flag("readonly", "ask for no more than reading")];
const ECHO: &[Opt] = &[
    flag("shell", "quoted for a shell"),
    flag("xml", "escaped for XML"),
    flag("split", "split first"),
    flag("err", "to standard error"),
    option("string", Kind::Words, "words"),
];

pub const VERBS: &[Verb] = &[
    verb("connect", "connect to another daemon", CONNECT, connect),
    Verb {
        shows: true,
        ..verb("help", "explain verbs", &[option("command", Kind::Text, "a verb or a family")], show_help)
    },
    verb("echo", "print words", ECHO, echo),
    verb("cd", "change the directory", &[option("dir", Kind::Text, "where to")], cd),
    verb("pwd", "print the directory", &[], pwd),
    verb("quit", "leave", &[], quit),
    verb("exit", "leave", &[], quit),
    verb(
        "run",
        "run a throw-away machine with no daemon: `vireo run --help`",
        &[option("argument", Kind::Words, "")],
        run_machine,
    ),
    Verb {
        shows: true,
        ..verb("doctor", "what works on this host, and what to do about the rest", &[], doctor::doctor)
    },
    verb(
        "completion",
        "print a script that completes words",
        &[need("shell", Kind::Text, "bash, zsh or fish")],
        completion::script,
    ),
];

fn connect(shell: &mut Shell, args: &Args) -> Done {
    shell.disconnect();
    if let Some(name) = args.text("name") {
        shell.uri = Some(name.to_owned());
    }
    shell.read_only = args.has("readonly");
    shell.connection().map(drop)
}

fn show_help(shell: &mut Shell, args: &Args) -> Done {
    let word = args.text("command");
    let text = help::about(word)?;
    if shell.json {
        shell.show(&help::as_json(word));
    } else {
        shell.say(text);
    }
    Ok(())
}

fn echo(shell: &mut Shell, args: &Args) -> Done {
    let quote = |word: &String| {
        let mut text = word.clone();
        if args.has("xml") {
            text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
        }
        let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:,@%+=".contains(c));
        if args.has("shell") && !plain { format!("'{}'", text.replace('\'', "'\\''")) } else { text }
    };
    let text = args.words("string").iter().map(quote).collect::<Vec<_>>().join(" ");
    if args.has("err") {
        eprintln!("{text}");
    } else {
        shell.say(text);
    }
    Ok(())
}

fn cd(_: &mut Shell, args: &Args) -> Done {
    let home = env::var("HOME").unwrap_or_else(|_| "/".into());
    let directory = args.text("dir").unwrap_or(&home);
    env::set_current_dir(directory).map_err(|error| Failure::new(format!("cd: {directory}: {error}")))
}

fn pwd(shell: &mut Shell, _: &Args) -> Done {
    let directory =
        env::current_dir().map_err(|error| Failure::new(format!("pwd: cannot get current directory: {error}")))?;
    shell.say(format!("{}\n", directory.display()));
    Ok(())
}

fn quit(shell: &mut Shell, _: &Args) -> Done {
    shell.ending = true;
    Ok(())
}

/// Reached from inside a session; the command line goes to [`run`] directly.
fn run_machine(_: &mut Shell, args: &Args) -> Done {
    run::exec(args.words("argument"))
}
