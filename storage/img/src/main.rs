//! `vireo-img`: creates, describes, copies, changes and checks disk images, with qemu-img's options, outputs, exit
//! codes and error texts. Under the name `qemu-img` (a link) it calls itself so; under its own it adds a few commands.
//!
//! A subcommand is a file with a table of its options and a `run`. What a command reads or changes in an image is done
//! by the crate `block`; here are command lines and words only. What is not built ends with a sentence that says so,
//! never with half of the work.
#![forbid(unsafe_code)]
#![allow(clippy::result_large_err, reason = "an error ends the process: it is made and moved once")]

mod amend;
mod bench;
mod bitmap;
mod chain;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod encryption;
mod error;
mod explain;
mod facts;
mod getopt;
mod info;
mod io;
mod json;
mod layers;
mod map;
mod measure;
mod object;
mod open;
mod optlist;
mod output;
mod ova;
mod progress;
mod qcow2_options;
mod rebase;
mod resize;
mod salvage;
mod secret;
mod serve;
mod size;
mod snapshot;
mod stream;
mod tls_creds;
mod tree;

use std::ffi::{OsString, c_int, c_void};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

use error::ImgError;
use getopt::{HELP, Opt, Parsed, flag, opt};

/// A subcommand.
pub struct Command {
    /// Name.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// What stands behind the options.
    pub operands: &'static str,
    /// Its options.
    pub options: &'static [Opt],
    /// Does it; the result is the exit code.
    pub run: fn(&Parsed) -> Result<u8, ImgError>,
}

const COMMANDS: &[&Command] = &[
    &amend::COMMAND,
    &bench::COMMAND,
    &bitmap::COMMAND,
    &check::COMMAND,
    &commit::COMMAND,
    &compare::COMMAND,
    &convert::COMMAND,
    &create::COMMAND,
    &dd::COMMAND,
    &info::COMMAND,
    &map::COMMAND,
    &measure::COMMAND,
    &rebase::COMMAND,
    &resize::COMMAND,
    &snapshot::COMMAND,
];

/// Commands that qemu-img does not have; under its name they are not there.
const OWN_COMMANDS: &[&Command] = &[&explain::COMMAND, &io::COMMAND, &serve::COMMAND, &tree::COMMAND];

fn commands() -> impl Iterator<Item = &'static &'static Command> {
    let own: &[&Command] = if program() == "qemu-img" { &[] } else { OWN_COMMANDS };
    COMMANDS.iter().chain(own)
}

/// The version of qemu-img whose options, outputs and texts these are. Callers read it to learn what they may use.
const PEER_VERSION: &str = "10.0.2";
const JSON_NAME: &str = "json";
/// For commands that have no JSON of their own.
const JSON: Opt = flag('\0', &[JSON_NAME], "print one JSON object in the end: exit code, error, what was said");
/// Options in front of the command. Tracing is QEMU's own affair.
const LEADING: &[Opt] =
    &[HELP, flag('V', &["version"], "print the version and exit"), opt('T', &["trace"], "TRACE", "ignored")];

/// Names of QEMU's tools that this one answers to, as a link to it.
const NAMES: [&str; 3] = ["qemu-img", "qemu-io", "qemu-nbd"];

/// What the tool calls itself in messages.
pub fn program() -> &'static str {
    static NAME: OnceLock<&'static str> = OnceLock::new();
    NAME.get_or_init(|| {
        let invoked = std::env::args_os().next().unwrap_or_default();
        let name = Path::new(&invoked).file_name().unwrap_or_default();
        NAMES.into_iter().find(|known| name == *known).unwrap_or("vireo-img")
    })
}

/// Whether the name stands for one command, as `qemu-io` and `qemu-nbd` do.
fn is_one_command() -> bool {
    matches!(program(), "qemu-io" | "qemu-nbd")
}

/// Prints a message that is no failure.
pub fn warn(text: &str) {
    eprintln!("{}: warning: {text}", program());
}

/// Does nothing: the write that raised it fails, and its error tells.
extern "C" fn file_too_large(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

fn main() -> ExitCode {
    // Its default, to end the process without a word, is no use to anybody.
    let _ = vmm_sys_util::signal::register_signal_handler(libc::SIGXFSZ, file_too_large);
    let done = run(std::env::args_os().skip(1).collect());
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = failure(&error);
            // Nobody is left to tell if this fails.
            let _ = std::io::stderr().write_all(text.as_bytes());
            ExitCode::from(error.exit_code())
        }
    }
}

/// What is said of an error: as in qemu-img, getopt's words come from the tool under the name it was called by.
fn failure(error: &ImgError) -> String {
    let called = |command: &str| {
        let name = match (program(), std::env::args_os().next()) {
            ("qemu-img", Some(invoked)) => invoked.to_string_lossy().into_owned(),
            (name, _) => name.to_owned(),
        };
        if command.is_empty() || is_one_command() { name } else { format!("{name} {command}") }
    };
    let mut text = match error {
        ImgError::Option { command, fault } => format!("{}: {fault}\n", called(command)),
        error => format!("{}: {error}\n", program()),
    };
    if let Some(command) = error.usage_of() {
        text += &format!("Try '{} --help' for more info\n", called(command));
    }
    text
}

fn run(args: Vec<OsString>) -> Result<u8, ImgError> {
    if program() == "qemu-io" {
        if args.iter().any(|arg| arg == "-V" || arg == "--version") {
            return print(&version());
        }
        return run_command(&io::COMMAND, args);
    }
    if program() == "qemu-nbd" {
        if args.iter().any(|arg| arg == "-V" || arg == "--version") {
            return print(&version());
        }
        return run_command(&serve::COMMAND, args);
    }
    let leading = getopt::parse_leading(LEADING, args)?;
    match leading.in_order().map(|(name, _)| name).find(|name| *name != "trace") {
        Some("version") => return print(&version()),
        Some(_) => return print(&overview()),
        None => {}
    }
    let mut args = leading.words.into_iter();
    let name = args.next().ok_or(ImgError::NoCommand)?;
    let Some(command) = commands().find(|command| name == command.name) else {
        return Err(ImgError::NoSuchCommand(name.to_string_lossy().into_owned()));
    };
    run_command(command, args.collect())
}

fn run_command(command: &Command, args: Vec<OsString>) -> Result<u8, ImgError> {
    let with_json = has_json(command);
    let mut options: Vec<Opt> = [HELP].iter().chain(command.options).copied().collect();
    if !with_json && program() == "vireo-img" {
        options.push(JSON);
    }
    let parsed = getopt::parse(command.name, &options, args)?;
    if parsed.has("help") {
        return print(&help(command));
    }
    let json = parsed.has(JSON_NAME);
    if json && !with_json {
        output::gather();
    }
    // A wrong secret is told before anything is opened, whether the command comes to need it or not.
    let done = secret::Secrets::of(&parsed).and_then(|_| (command.run)(&parsed));
    match &done {
        Err(error) if json => output::print_object(command.name, error.exit_code(), Some(error.to_string())),
        Ok(code) if json && !with_json => output::print_object(command.name, *code, None),
        _ => {}
    }
    done
}

/// Whether a command answers in JSON by itself.
fn has_json(command: &Command) -> bool {
    command.options.iter().any(|option| option.long.contains(&JSON_NAME))
}

fn print(text: &str) -> Result<u8, ImgError> {
    output::say(text);
    Ok(0)
}

fn version() -> String {
    let own = env!("CARGO_PKG_VERSION");
    match program() {
        name @ ("qemu-img" | "qemu-io" | "qemu-nbd") => format!("{name} version {PEER_VERSION} (vireo-img {own})\n"),
        _ => format!("vireo-img version {own} (options and outputs of qemu-img version {PEER_VERSION})\n"),
    }
}

fn overview() -> String {
    let mut out = version();
    let program = program();
    out += &format!(
        "Disk image utility.  Usage:\n\n  {program} [standard options] COMMAND [--help | command options]\n\n\
         Standard options:\n  -h, --help\n     display this help and exit\n  -V, --version\n     display version info and \
         exit\n\nRecognized commands (run {program} COMMAND --help for command-specific help):\n\n"
    );
    for command in commands() {
        out += &format!("  {} - {}\n", command.name, command.about);
    }
    out += "\nMost commands take -U, --force-share: open the image even while another process uses it.\n";
    out
}

fn help(command: &Command) -> String {
    let Command { name, about, operands, options, .. } = command;
    let name = if is_one_command() { String::new() } else { format!("{name} ") };
    let json = if has_json(command) || program() != "vireo-img" { String::new() } else { getopt::describe(&[JSON]) };
    format!(
        "{about}.  Usage:\n\n  {} {name}[options] {operands}\n\nOptions:\n{}{}{json}",
        program(),
        getopt::describe(&[HELP]),
        getopt::describe(options)
    )
}
