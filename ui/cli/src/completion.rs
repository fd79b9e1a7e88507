//! Completion of words in shells. The scripts ask this program, which knows its verbs and asks the daemon for names.

use crate::failure::Failure;
use crate::grammar::{Args, Done, HELP, Kind};
use crate::shell::Shell;
use crate::verbs;

/// The hidden verb that the scripts call with the words typed so far, the last one being completed.
pub const COMPLETE: &str = "__complete";

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
const BASH: &str = "\
_vireo() {
    local IFS=$'\\n'
    COMPREPLY=($(vireo __complete \"${COMP_WORDS[@]:1:COMP_CWORD}\" 2>/dev/null))
}
complete -o default -F _vireo vireo
";
const ZSH: &str = "\
#compdef vireo
_vireo() {
    local -a found
    found=(\"${(@f)$(vireo __complete \"${(@)words[2,CURRENT]}\" 2>/dev/null)}\")
    compadd -a found
}
compdef _vireo vireo
";
const FISH: &str = "\
complete -c vireo -a '(vireo __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
";

/// Prints the script for a shell.
pub fn script(shell: &mut Shell, args: &Args) -> Done {
    let script = match args.need("shell") {
        "bash" => BASH,
        "zsh" => ZSH,
        "fish" => FISH,
        other => return Err(Failure::new(format!("no completion for '{other}'; there is one for bash, zsh and fish"))),
    };
    shell.say(script);
    Ok(())
}

/// Prints what the last of `words` may become.
pub fn complete(shell: &mut Shell, words: &[String]) {
    let (last, before) = words.split_last().map_or((String::new(), &[][..]), |(last, before)| (last.clone(), before));
    for candidate in candidates(shell, before).into_iter().filter(|candidate| candidate.starts_with(&last)) {
        shell.say(candidate + "\n");
    }
    shell.flush();
}

/// What may follow the words `before`: verbs, then options, domains and the words a verb knows.
pub fn candidates(shell: &mut Shell, before: &[String]) -> Vec<String> {
    let mut rest = before.iter();
    // Global options before the verb; the one for the daemon matters here.
    let verb = loop {
        match rest.next().map(String::as_str) {
            None => return verbs::all().map(|verb| verb.name.to_owned()).collect(),
            Some("-c" | "--connect") => shell.uri = rest.next().cloned(),
            Some(word) if word.starts_with('-') => {}
            Some(word) => break word,
        }
    };
    let Some(verb) = verbs::find(verb) else { return Vec::new() };
    let mut found: Vec<String> = verb
        .options()
        .chain(std::iter::once(&HELP))
        .filter(|option| option.kind != Kind::Words)
        .map(|option| format!("--{}", option.name))
        .filter(|option| !before.contains(option))
        .collect();
    match verb.name {
        "completion" => found.extend(SHELLS.map(str::to_owned)),
        "help" => found.extend(verbs::all().map(|verb| verb.name.to_owned())),
        _ => {}
    }
    let wants_domain = verb.options.iter().any(|option| option.name == "domain");
    if wants_domain && let Ok(connection) = shell.connection() {
        let names = connection.list(0).unwrap_or_default();
        found.extend(names.iter().map(|domain| domain.name.lossy().into_owned()));
    }
    found
}
