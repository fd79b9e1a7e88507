//! What verbs work with: the connection, the way to print, and what was asked for globally.

use std::io::{self, Write};
use std::time::Instant;

use client::{Connection, DomainRef, Lookup, Target};
use serde_json::Value;

use crate::failure::{Failure, WhileDoing};
use crate::grammar::{self, Args};
use crate::{help, verbs};

/// The state of one run of the program.
pub struct Shell {
    /// URI as it was given.
    pub uri: Option<String>,
    /// Ask for no more than reading.
    pub read_only: bool,
    /// Print JSON.
    pub json: bool,
    /// Print only what was asked for.
    pub quiet: bool,
    /// Print how long each command took.
    pub timing: bool,
    /// Leaves a console.
    pub escape: u8,
    /// Somebody has said `quit`.
    pub ending: bool,
    connection: Option<Connection>,
    out: String,
    shown_json: bool,
}

impl Shell {
    /// Not connected yet.
    pub fn new() -> Shell {
        Shell {
            uri: None,
            read_only: false,
            json: false,
            quiet: false,
            timing: false,
            escape: 0x1d,
            ending: false,
            connection: None,
            out: String::new(),
            shown_json: false,
        }
    }

    /// The connection, made at its first use.
    pub fn connection(&mut self) -> Result<&mut Connection, Failure> {
        if self.connection.is_none() {
            let root_user = rustix::process::geteuid().is_root();
            let open =
                || Connection::open(&Target::resolve(self.uri.as_deref(), self.read_only, root_user)?, self.read_only);
            self.connection = Some(open().while_doing(|| "failed to connect to the hypervisor".into())?);
        }
        self.connection.as_mut().ok_or_else(Failure::silent)
    }

    /// Ends the connection; the next use makes another.
    pub fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Whatever it says, it is over.
            let _ = connection.close();
        }
    }

    /// The domain that the option `domain` names.
    pub fn domain(&mut self, args: &Args) -> Result<DomainRef, Failure> {
        self.domain_named(args.need("domain"), Lookup::Any)
    }

    /// The domain that a word names.
    pub fn domain_named(&mut self, word: &str, how: Lookup) -> Result<DomainRef, Failure> {
        self.connection()?.lookup(word, how).map_err(|error| match error.code() {
            Some(client::ErrorCode::NoDomain) => Failure::new(format!("failed to get domain '{word}'")),
            _ => Failure::from(error),
        })
    }

    /// Prints.
    pub fn say(&mut self, text: impl AsRef<str>) {
        self.out.push_str(text.as_ref());
    }

    /// Prints what a person wants to know and a script does not.
    pub fn remark(&mut self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            self.out.push_str(text.as_ref());
        }
    }

    /// Prints a JSON document.
    pub fn show(&mut self, value: &Value) {
        // Values made of strings and numbers always print.
        let text = serde_json::to_string_pretty(value).unwrap_or_default();
        self.out.push_str(&text);
        self.out.push('\n');
        self.shown_json = true;
    }

    /// Hands what was printed to the terminal. An output that nobody reads any more ends the program.
    pub fn flush(&mut self) {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(self.out.as_bytes()).and_then(|()| stdout.flush());
        self.out.clear();
        if written.is_err() {
            std::process::exit(1);
        }
    }

    /// Carries out commands in order; the last one's success is the whole's.
    pub fn run(&mut self, commands: &[Vec<String>]) -> bool {
        let mut success = true;
        for words in commands {
            let start = Instant::now();
            let outcome = self.run_one(words);
            success = outcome.is_ok();
            self.flush();
            if let Err(failure) = outcome {
                self.report(&failure);
                if is_grammar_only(words) {
                    continue;
                }
            }
            if self.ending {
                break;
            }
            if self.timing {
                let took = start.elapsed().as_secs_f64() * 1000.0;
                self.say(format!("\n(Time: {took:.3} ms)\n\n"));
            } else if !std::mem::take(&mut self.shown_json) {
                self.remark("\n");
            }
            self.flush();
        }
        success
    }

    /// Prints a failure where failures go.
    pub fn report(&mut self, failure: &Failure) {
        for line in failure.lines() {
            eprintln!("error: {line}");
        }
    }

    fn run_one(&mut self, words: &[String]) -> Result<(), Failure> {
        let Some((name, rest)) = words.split_first() else { return Ok(()) };
        let verb = verbs::find(name).ok_or_else(|| verbs::unknown(name))?;
        let args = grammar::parse(verb, rest)?;
        if args.has("help") {
            self.say(help::of_verb(verb));
            return Ok(());
        }
        let globally = self.json;
        self.json |= args.has("json");
        let outcome = (verb.run)(self, &args);
        self.json = globally;
        outcome
    }
}

/// Whether words never became a command that ran: then nothing separates its output from the next.
fn is_grammar_only(words: &[String]) -> bool {
    let parsed = words.split_first().and_then(|(name, rest)| grammar::parse(verbs::find(name)?, rest).ok());
    parsed.is_none()
}
