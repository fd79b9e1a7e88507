//! Twin directories: the same script runs with this tool in one and with qemu-img in the other, and what they print,
//! how they exit and what they leave is compared.
//!
//! A script is lines of words; single quotes keep blanks. The first word says how a line is judged:
//!
//! - `run`: both succeed; stdout and stderr are equal.
//! - `json`: both succeed; stdout is equal as JSON, apart from [`UNSTABLE`] fields.
//! - `ok`: both succeed; what they print is not compared.
//! - `fail CODE`: both exit with CODE; stderr is equal.
//! - `says CODE`: both exit with CODE; stdout and stderr are equal.
//! - `code CODE`: both exit with CODE; what they print is not compared.
//! - `usage`: both exit with 1, say something on stderr and nothing on stdout: texts of wrong command lines are free.
//! - `io`: qemu-io's commands for a file, run by the peer's qemu-io in both directories.
//! - `peer`: the peer's qemu-img runs in both directories; `ours`: this tool does.
//! - `file NAME TEXT`: a file with this text in both.
//! - `copy FROM TO`, `poke NAME OFFSET HEX`, `grow NAME BYTES`: files are copied and changed in both.
//! - `same NAME`: the images are equal in content and in what `info` says; the peer's check finds nothing wrong.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// JSON fields that may differ: space on the host, which depends on the order of writes, times, and what is random or
/// follows from how fast the host is.
pub const UNSTABLE: [&str; 11] = [
    "actual-size",
    "date-sec",
    "date-nsec",
    "image-end-offset",
    "fragmented-clusters",
    "offset",
    "cid",
    "parent-cid",
    "uuid",
    "iters",
    "master-key-iters",
];

/// Images with data, holes and zeroes of every kind, for those who copy and compare.
pub const FILLED: &str = "
    peer create -q -f qcow2 base.qcow2 8M
    io -c 'write -P 1 0 1M' -c 'write -P 2 3M 100k' -c 'write -z 5M 256k' base.qcow2
    peer create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 10M
    io -c 'write -P 3 512k 64k' -c 'write -z 0 64k' -c 'write -P 4 9M 3k' top.qcow2
    peer create -q raw.img 4M
    io -f raw -c 'write -P 5 1M 1M' -c 'write -P 0 2M 1M' -c 'write -P 6 3500k 512' raw.img
";

/// Both directories and the link that makes this tool `qemu-img`.
pub struct Twins {
    /// Holds everything below.
    _root: tempfile::TempDir,
    tool: PathBuf,
    ours: PathBuf,
    theirs: PathBuf,
}

/// Runs a script in fresh directories. The texts and options are those of qemu-img 10; with another release a script
/// says nothing, and does not run.
pub fn check(script: &str) {
    let version = run(Path::new("qemu-img"), Path::new("."), &["--version".to_owned()]);
    if stdout(&version).starts_with("qemu-img version 10.") {
        Twins::new().run(script);
    } else {
        eprintln!("not compared: {}", stdout(&version).lines().next().unwrap_or_default());
    }
}

impl Twins {
    /// Empty directories.
    pub fn new() -> Twins {
        let root = tempfile::tempdir().unwrap();
        let [ours, theirs] = ["ours", "theirs"].map(|name| {
            let path = root.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        let tool = root.path().join("qemu-img");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), &tool).unwrap();
        Twins { _root: root, tool, ours, theirs }
    }

    /// Runs the lines of a script. Every line that differs is reported, not only the first.
    pub fn run(&self, script: &str) {
        let mut wrong = String::new();
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let words = split(line);
            let (verb, words) = words.split_first().unwrap();
            if let Err(how) = self.step(verb, words) {
                wrong += &format!("\n{line}\n{how}\n");
            }
        }
        assert!(wrong.is_empty(), "{wrong}");
    }

    fn step(&self, verb: &str, words: &[String]) -> Result<(), String> {
        match verb {
            "file" => {
                for dir in [&self.ours, &self.theirs] {
                    std::fs::write(dir.join(&words[0]), &words[1]).unwrap();
                }
                Ok(())
            }
            "copy" => {
                for dir in [&self.ours, &self.theirs] {
                    std::fs::copy(dir.join(&words[0]), dir.join(&words[1])).unwrap();
                }
                Ok(())
            }
            "grow" => {
                for dir in [&self.ours, &self.theirs] {
                    let file = std::fs::OpenOptions::new().write(true).open(dir.join(&words[0])).unwrap();
                    file.set_len(words[1].parse().unwrap()).unwrap();
                }
                Ok(())
            }
            "poke" => {
                for dir in [&self.ours, &self.theirs] {
                    let mut bytes = std::fs::read(dir.join(&words[0])).unwrap();
                    let at: usize = words[1].parse().unwrap();
                    let hex = |i: usize| u8::from_str_radix(&words[2][i..i + 2], 16).unwrap();
                    let new: Vec<u8> = (0..words[2].len()).step_by(2).map(hex).collect();
                    bytes[at..at + new.len()].copy_from_slice(&new);
                    std::fs::write(dir.join(&words[0]), bytes).unwrap();
                }
                Ok(())
            }
            "io" | "peer" | "ours" => {
                let program = match verb {
                    "io" => Path::new("qemu-io"),
                    "peer" => Path::new("qemu-img"),
                    _ => &self.tool,
                };
                [&self.ours, &self.theirs].into_iter().try_for_each(|dir| succeeds(&run(program, dir, words)))
            }
            "same" => self.same(&words[0]),
            "fail" | "says" | "code" => {
                let code: i32 = words[0].parse().unwrap();
                let (a, b) = self.both(&words[1..]);
                let wanted = (Some(code), Some(code));
                equal((a.status.code(), b.status.code()), wanted).map_err(|e| e + &stderr(&a) + &stderr(&b))?;
                match verb {
                    "fail" => equal(stderr(&a), stderr(&b)),
                    "says" => equal(stderr(&a), stderr(&b)).and(equal(stdout(&a), stdout(&b))),
                    _ => Ok(()),
                }
            }
            "usage" => {
                let (a, b) = self.both(words);
                [a, b].iter().try_for_each(|out| {
                    let silent = out.stdout.is_empty() && !out.stderr.is_empty();
                    equal((out.status.code(), silent), (Some(1), true)).map_err(|e| e + &stdout(out) + &stderr(out))
                })
            }
            "run" | "json" | "ok" => {
                let (a, b) = self.both(words);
                succeeds(&b).and(succeeds(&a))?;
                match verb {
                    "run" => equal(stdout(&a), stdout(&b)).and(equal(stderr(&a), stderr(&b))),
                    "json" => equal(stable(&a.stdout), stable(&b.stdout)),
                    _ => Ok(()),
                }
            }
            other => panic!("no such verb: {other}"),
        }
    }

    fn both(&self, words: &[String]) -> (Output, Output) {
        (run(&self.tool, &self.ours, words), run(Path::new("qemu-img"), &self.theirs, words))
    }

    fn same(&self, name: &str) -> Result<(), String> {
        let peer = Path::new("qemu-img");
        let [a, b] = [&self.ours, &self.theirs].map(|dir| dir.join(name).display().to_string());
        // -U: nobody writes, but a backing file may be common to both.
        succeeds(&run(peer, &self.ours, &["compare".into(), "-U".into(), a, b]))?;
        let [a, b] = [&self.ours, &self.theirs].map(|dir| {
            let out = run(peer, dir, &["info".into(), "--output=json".into(), name.into()]);
            let mut info = stable(&out.stdout);
            info.as_object_mut().unwrap().remove("children");
            info
        });
        equal(a, b)?;
        let out = run(peer, &self.ours, &["check".into(), name.into()]);
        if out.status.code() == Some(63) { Ok(()) } else { succeeds(&out) }
    }
}

fn succeeds(output: &Output) -> Result<(), String> {
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{}: {}{}", output.status, stdout(output), stderr(output)))
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(ours: T, theirs: T) -> Result<(), String> {
    if ours == theirs { Ok(()) } else { Err(format!("  ours: {ours:?}\ntheirs: {theirs:?}\n")) }
}

fn run(program: &Path, dir: &Path, words: &[String]) -> Output {
    let mut command = Command::new(program);
    // Both call themselves as they were called.
    command.arg0(program.file_name().unwrap_or_default());
    command.args(words).current_dir(dir).env("LC_ALL", "C").env("TZ", "UTC");
    command
        .output()
        .unwrap_or_else(|error| panic!("{} (package qemu-utils) does not start: {error}", program.display()))
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stable(bytes: &[u8]) -> Value {
    let mut value = serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(bytes)));
    drop_unstable(&mut value);
    value
}

fn drop_unstable(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !UNSTABLE.contains(&key.as_str()));
            // The length of a file depends on what is allocated where.
            if map.get("format").is_some_and(|format| format == "file") {
                map.remove("virtual-size");
            }
            map.values_mut().for_each(drop_unstable);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_unstable),
        _ => {}
    }
}

/// Words; single quotes keep blanks and can be empty.
pub fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut any) = (String::new(), false, false);
    for c in line.chars() {
        match c {
            '\'' => (quoted, any) = (!quoted, true),
            c if c.is_whitespace() && !quoted => {
                if any {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            c => {
                word.push(c);
                any = true;
            }
        }
    }
    if any {
        words.push(word);
    }
    words
}
