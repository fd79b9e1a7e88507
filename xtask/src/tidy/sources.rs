//! The sources: every crate says what it is and forbids `unsafe` or is listed with its reason; tests wait for events, not
//! for time; functions and files do not grow beyond what fits a reader's head.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::{output, root};

/// Crate roots that may hold `unsafe`, each with what for.
const UNSAFE: [(&str, &str); 7] = [
    ("cpu/guest_ram/src/lib.rs", "guest memory is shared with the guest and reached by raw pointers"),
    ("cpu/hv_kvm/src/lib.rs", "KVM's ioctls and its run page"),
    ("cpu/hv_soft/src/lib.rs", "native thunks and guest memory behind the TLB"),
    ("cpu/hv_soft/oracle/src/lib.rs", "a traced child process"),
    ("storage/block/src/lib.rs", "vectored I/O on guest memory"),
    ("vm/vmm/src/lib.rs", "process set-up: descriptors, signals, seccomp"),
    ("xtask/src/main.rs", "resource usage of measured programs"),
];

/// Where a thread may sleep, each with why.
const SLEEPS: [(&str, &str); 8] = [
    ("storage/block/src/nbd/client/link.rs", "tries again to reach a server, which tells nobody when it comes"),
    ("storage/img/src/io/breaks.rs", "has a command that waits, as qemu-io has"),
    ("storage/img/src/progress.rs", "keeps a copy to the rate that was asked for"),
    ("ui/cli/src/verbs/host.rs", "a rate is two readings a second apart"),
    ("xtask/src/bench/manage_daemon.rs", "lets a measured process settle, and polls it"),
    ("xtask/src/bench/orphans.rs", "polls the process table, which tells nobody of changes"),
    ("xtask/src/demo.rs", "watches another process"),
    ("xtask/src/tidy/sources.rs", "names the word"),
];

/// Lines of a function, its signature and braces among them.
const FUNCTION: usize = 70;
/// Functions that are longer, with the length that they may not pass: most are one table written as a `match`.
const LONG_FUNCTIONS: [(&str, &str, usize); 10] = [
    ("storage/block/src/nbd/wire/options.rs", "options_are_answered_as_the_spec_says", 80),
    ("storage/block/src/spec/tests.rs", "every_spelling_gives_the_same_image", 80),
    ("cpu/hv_soft/oracle/src/generate.rs", "operand", 117),
    ("cpu/hv_soft/oracle/src/lib.rs", "compare", 97),
    ("cpu/hv_soft/src/decode/integer.rs", "integer", 110),
    ("cpu/hv_soft/src/decode/system.rs", "tables", 84),
    ("cpu/hv_soft/src/native.rs", "offered_features", 71),
    ("manage/daemon/src/dispatch.rs", "remote_call", 110),
    ("manage/daemon/src/error.rs", "number", 90),
    ("manage/daemon/src/error.rs", "samples", 90),
];

/// Lines of a file.
const FILE: usize = 900;
/// Files that are longer, with the length that they may not pass.
const LONG_FILES: [(&str, usize); 0] = [];

/// Every problem, as a sentence.
pub fn check() -> Result<Vec<String>> {
    let listed = output(Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()))?;
    let mut problems = Vec::new();
    for path in listed.lines().filter(|p| root().join(p).exists()) {
        let text = fs::read_to_string(root().join(path)).with_context(|| format!("{path} cannot be read"))?;
        crate_root(path, &text, &mut problems);
        if !SLEEPS.iter().any(|(p, _)| *p == path) && text.contains("thread::sleep") {
            problems.push(format!("{path} sleeps; wait for the event instead"));
        }
        lengths(path, &text, &mut problems);
    }
    Ok(problems)
}

fn crate_root(path: &str, text: &str, problems: &mut Vec<String>) {
    let is_root = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    if !is_root {
        return;
    }
    if !text.starts_with("//!") {
        problems.push(format!("{path} does not say what its crate is (`//!`)"));
    }
    let forbids = text.contains("#![forbid(unsafe_code)]");
    let listed = UNSAFE.iter().any(|(p, _)| *p == path);
    if forbids == listed {
        let what =
            if listed { "is listed as unsafe but forbids it" } else { "neither forbids unsafe code nor is listed" };
        problems.push(format!("{path} {what}"));
    }
}

fn lengths(path: &str, text: &str, problems: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    let limit = LONG_FILES.iter().find(|(p, _)| *p == path).map_or(FILE, |(_, n)| *n);
    if lines.len() > limit {
        problems.push(format!("{path} has {} lines, more than {limit}", lines.len()));
    }
    let tests = Path::new(path).components().any(|c| c.as_os_str() == "tests");
    for (name, length) in functions(&lines) {
        let allowed = LONG_FUNCTIONS.iter().find(|(p, n, _)| *p == path && *n == name).map(|(_, _, n)| *n);
        let limit = allowed.unwrap_or(if tests { 2 * FUNCTION } else { FUNCTION });
        if length > limit {
            problems.push(format!("{path}: fn {name} has {length} lines, more than {limit}"));
        }
    }
}

/// Functions with their lengths, in text as rustfmt writes it: the closing brace stands under the first word.
fn functions<'a>(lines: &[&'a str]) -> Vec<(&'a str, usize)> {
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some((before, rest)) = line.split_once("fn ") else { continue };
        let words = ["pub", "const", "unsafe", "async", "extern", "\"C\""];
        let known = |w: &str| words.contains(&w) || w.starts_with("pub(");
        if !before.split_whitespace().all(known) || line.ends_with('}') {
            continue;
        }
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        let indent = &before[..before.len() - before.trim_start().len()];
        let body = lines[at..].iter().position(|l| l.ends_with('{') || l.ends_with(';'));
        if body.is_none_or(|b| lines[at + b].ends_with(';')) {
            continue;
        }
        if let Some(length) = lines[at..].iter().position(|l| l.strip_prefix(indent) == Some("}")) {
            found.push((name, length + 1));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_functions_as_rustfmt_writes_them() {
        let text = "impl A {\n    pub(crate) fn one(\n        a: u8,\n    ) -> u8 {\n        a\n    }\n    fn two(&self);\n}\n\
                    fn three() {}\nasync fn four() {\n    let fn_name = 1;\n}\n";
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(functions(&lines), [("one", 5), ("four", 3)]);
    }
}
