//! `explain`: how an image is, in plain words, and what a repair would do before it does it. Not a command of qemu-img.

use std::io::Write;

use block::{BlockError, Checked, Format, check_foreign, check_image, rebuild_suffices};
use serde_json::json;

use crate::Command;
use crate::chain::{Found, Walk, short};
use crate::error::{ImgError, why};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed};
use crate::json::write_json;
use crate::open::{self, Access, Named};
use crate::output::stdout;
use crate::size::human;
use crate::tree::Ink;

/// `explain`.
pub const COMMAND: Command = Command {
    name: "explain",
    about: "Tell in plain words how an image is, and what a repair would do",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[FORMAT, IMAGE_OPTS, FORCE_SHARE, OBJECT, OUTPUT, JSON];

/// How a sentence is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tone {
    Fact,
    Well,
    Wrong,
    Advice,
}

/// What there is to say, and the exit code of `check`.
struct Account {
    lines: Vec<(Tone, String)>,
    code: u8,
}

impl Account {
    fn say(&mut self, tone: Tone, text: String) {
        self.lines.push((tone, text));
    }
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let named = Named::of(parsed, parsed.one_file()?, "format")?;
    let mut walk = Walk::new(named.clone(), true);
    let Some(first) = walk.next() else { return Ok(1) };
    let first = first?;
    let mut account = Account { lines: Vec::new(), code: 0 };
    describe(&first, &mut account);
    in_use(&named, &mut account);
    below(&first, walk, &mut account);
    match first.info.format {
        Format::Qcow2 => health(&first, &mut account),
        Format::Raw => {
            account.say(Tone::Fact, "It is the bytes of the disk and no more: there is nothing in it to check.".into());
        }
        format => foreign_health(&first, format, &mut account),
    }
    let mut out = stdout();
    if parsed.json()? {
        let lines: Vec<_> = account
            .lines
            .iter()
            .map(|(tone, text)| json!({"kind": format!("{tone:?}").to_lowercase(), "text": text}))
            .collect();
        write_json(&mut out, &json!({"filename": named.label, "exit-code": account.code, "account": lines}))?;
        return Ok(account.code);
    }
    let ink = Ink::of_stdout();
    for (tone, text) in &account.lines {
        let text = match tone {
            Tone::Fact => text.clone(),
            Tone::Well => ink.green(text),
            Tone::Wrong => ink.red(text),
            Tone::Advice => format!("  -> {text}"),
        };
        writeln!(out, "{text}")?;
    }
    Ok(account.code)
}

fn describe(found: &Found, account: &mut Account) {
    let info = &found.info;
    let version = info.qcow2.map(|q| format!(" (version {})", q.version)).unwrap_or_default();
    account.say(
        Tone::Fact,
        format!(
            "{} holds a disk of {} in the format {}{version}. It takes {} on the host.",
            short(&found.path),
            human(info.virtual_size_bytes),
            info.format.name(),
            human(info.allocated_bytes)
        ),
    );
    match found.snapshots.as_slice() {
        [] => {}
        all => {
            let names: Vec<String> =
                all.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name).into_owned()).collect();
            account.say(Tone::Fact, format!("Internal snapshots: {}.", names.join(", ")));
        }
    }
    if info.corrupt {
        account.code = 2;
        account.say(Tone::Wrong, "A program that wrote to it found damage and marked it corrupt.".to_owned());
    }
    if info.dirty {
        account.say(
            Tone::Wrong,
            "It was not closed cleanly: its counts of used clusters are rebuilt when it is next opened for writing."
                .to_owned(),
        );
    }
}

/// Tries the locks of a reader and lets them go again.
fn in_use(named: &Named, account: &mut Account) {
    let access = Access { write: false, share: false, cache: block::CacheMode::Writeback };
    if let Err(ImgError::Open { source: BlockError::Locked { .. }, .. }) = open::top(named, access) {
        account.say(
            Tone::Fact,
            "Another process is writing to it, a guest perhaps: what follows may be a moment old, and a fault may be \
             none."
                .to_owned(),
        );
    }
}

fn below(first: &Found, walk: Walk, account: &mut Account) {
    let Some(backing) = first.backing_path() else { return };
    let mut depth = 0;
    for found in walk {
        match found {
            Ok(found) => {
                depth += 1;
                if depth == 1 && found.info.virtual_size_bytes > first.info.virtual_size_bytes {
                    account.say(
                        Tone::Fact,
                        format!(
                            "Its backing file {} is longer ({}); what lies behind the end is not seen.",
                            short(&found.path),
                            human(found.info.virtual_size_bytes)
                        ),
                    );
                }
            }
            Err(error) => {
                account.code = account.code.max(1);
                account.say(Tone::Wrong, format!("It cannot be used as it is: {error}."));
                account.say(
                    Tone::Advice,
                    format!(
                        "Put the missing file back, or name another one that holds the same: vireo-img rebase -u -b \
                         FILE -F FORMAT {}",
                        first.path.display()
                    ),
                );
                return;
            }
        }
    }
    account.say(
        Tone::Fact,
        format!(
            "It holds only what differs from {} and needs that file ({depth} below it in all); they must not be changed.",
            backing.display()
        ),
    );
    if first.info.backing_format.is_none() {
        account.say(
            Tone::Wrong,
            "It does not say which format its backing file has: a guest that can write to a raw one could decide that."
                .to_owned(),
        );
        account.say(
            Tone::Advice,
            format!("vireo-img rebase -u -b '{}' -F FORMAT {}", backing.display(), first.path.display()),
        );
    }
}

fn unchecked(error: &BlockError, account: &mut Account) {
    account.code = account.code.max(1);
    account.say(Tone::Wrong, format!("It cannot be checked: {}.", why(error)));
}

/// A format of another vendor: what is wrong with it is found, and nothing here mends it.
fn foreign_health(first: &Found, format: Format, account: &mut Account) {
    match check_foreign(&first.path, format) {
        Err(error) => unchecked(&error, account),
        Ok(None) => account.say(Tone::Fact, "There is no check for its format.".to_owned()),
        Ok(Some(report)) if report.corruptions == 0 => {
            account.say(Tone::Well, "Its tables agree with each other.".to_owned());
        }
        Ok(Some(report)) => {
            account.code = 2;
            for finding in &report.findings {
                account.say(Tone::Wrong, format!("  {finding}"));
            }
            account.say(Tone::Wrong, contradictions(report.corruptions));
            account.say(Tone::Advice, rescue(first));
        }
    }
}

fn contradictions(count: u64) -> String {
    format!("{count} contradictions in its tables. Data may be damaged already, and writing may damage more.")
}

fn rescue(first: &Found) -> String {
    format!("Copy what can be read first: vireo-img convert -O qcow2 {} RESCUED", first.path.display())
}

fn health(first: &Found, account: &mut Account) {
    let path = first.path.display();
    let checked = match check_image(&first.path) {
        Ok(checked) => checked,
        Err(error) => return unchecked(&error, account),
    };
    usage(&checked, account);
    let cluster = first.info.cluster_bytes.unwrap_or(0);
    if checked.corruptions == 0 && checked.leaks == 0 {
        account.say(Tone::Well, "Its tables agree with each other: there is nothing to repair.".to_owned());
        return;
    }
    if first.info.dirty && rebuild_suffices(&first.path).is_ok_and(|suffices| suffices) {
        account.code = if checked.corruptions > 0 { 2 } else { account.code.max(3) };
        account.say(
            Tone::Fact,
            format!(
                "A check finds {} errors: counts that are behind, as is to be expected then. Nothing else is wrong, and \
                 no data is at risk.",
                checked.corruptions.saturating_add(checked.leaks)
            ),
        );
        account.say(Tone::Advice, format!("To have them counted anew now: vireo-img check -r all {path}"));
        return;
    }
    for finding in &checked.findings {
        account.say(Tone::Wrong, format!("  {finding}"));
    }
    if checked.corruptions > 0 {
        account.code = 2;
        account.say(Tone::Wrong, contradictions(checked.corruptions));
        account.say(Tone::Advice, rescue(first));
        account.say(
            Tone::Advice,
            format!(
                "A repair counts all clusters anew, and drops references that lead nowhere; those parts then read as \
                 zeroes, or as the backing file: vireo-img check -r all {path}"
            ),
        );
    }
    if checked.leaks > 0 {
        account.code = account.code.max(3);
        account.say(
            Tone::Wrong,
            format!(
                "{} clusters ({}) count as used and are not. They waste space; no data is at risk.",
                checked.leaks,
                human(checked.leaks.saturating_mul(cluster))
            ),
        );
        account.say(
            Tone::Advice,
            format!("A repair gives them back and touches no data: vireo-img check -r leaks {path}"),
        );
    }
    if checked.corruptions > 0 {
        account.code = 2;
    }
}

fn usage(checked: &Checked, account: &mut Account) {
    if checked.total_clusters == 0 {
        return;
    }
    let share = checked.allocated_clusters as f64 * 100.0 / checked.total_clusters as f64;
    let mut text = format!("{share:.1} % of the disk is allocated");
    if checked.compressed_clusters > 0 {
        text += &format!(", {} of {} clusters compressed", checked.compressed_clusters, checked.allocated_clusters);
    }
    account.say(Tone::Fact, text + ".");
}
