//! The interactive mode: verbs line by line.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Context, Editor, Helper};

use crate::completion;
use crate::grammar;
use crate::shell::Shell;

/// Completes verbs at the start of a line, then options and domains.
struct Words {
    /// The daemon that is asked for domains.
    uri: Option<String>,
}

impl Helper for Words {}
impl Highlighter for Words {}
impl Validator for Words {}
impl Hinter for Words {
    type Hint = String;
}

impl Completer for Words {
    type Candidate = String;

    fn complete(&self, line: &str, position: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let before = line.get(..position).unwrap_or_default();
        let start = before.rfind([' ', ';']).map_or(0, |at| at + 1);
        let begun = before.get(start..).unwrap_or_default();
        let command = before.get(..start).unwrap_or_default().rsplit(';').next().unwrap_or_default();
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        // A connection of its own: the session's may be in the middle of something.
        let mut shell = Shell::new();
        shell.uri.clone_from(&self.uri);
        shell.read_only = true;
        let candidates = completion::candidates(&mut shell, &words);
        shell.disconnect();
        Ok((start, candidates.into_iter().filter(|candidate| candidate.starts_with(begun)).collect()))
    }
}

fn history() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("vireo/history"))
}

/// Takes lines until there are no more or somebody leaves.
pub fn interactive(shell: &mut Shell) -> bool {
    if !io::stdin().is_terminal() {
        return script(shell);
    }
    shell.remark("Welcome to vireo, the virtualization interactive terminal.\n\n");
    shell.remark("Type:  'help' for help with commands\n       'quit' to quit\n\n");
    shell.flush();
    let config = Config::builder().auto_add_history(true).build();
    let Ok(mut editor) = Editor::<Words, FileHistory>::with_config(config) else { return script(shell) };
    let history = history();
    if let Some(path) = &history {
        // The first session has none.
        let _ = editor.load_history(path);
    }
    while !shell.ending {
        editor.set_helper(Some(Words { uri: shell.uri.clone() }));
        let prompt = if shell.read_only { "vireo > " } else { "vireo # " };
        match editor.readline(prompt) {
            Ok(line) => {
                run_line(shell, &line);
            }
            Err(ReadlineError::Interrupted) => {}
            Err(_) => break,
        }
    }
    if let Some(path) = &history {
        // Forgetting what was typed does no harm.
        let _ = path.parent().map(std::fs::create_dir_all);
        let _ = editor.save_history(path);
    }
    true
}

fn run_line(shell: &mut Shell, line: &str) -> bool {
    match grammar::split(line) {
        Ok(commands) => shell.run(&commands),
        Err(failure) => {
            shell.report(&failure);
            false
        }
    }
}

/// Lines of a file or a pipe, without prompts.
fn script(shell: &mut Shell) -> bool {
    let mut success = true;
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { return false };
        success = run_line(shell, &line);
        if shell.ending {
            break;
        }
    }
    success
}
