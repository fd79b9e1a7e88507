//! `compare`: do two images hold the same?

use block::{CacheMode, Disk, ExtentKind};

use crate::Command;
use crate::convert::default_workers;
use crate::error::ImgError;
use crate::getopt::{FORCE_SHARE, IMAGE_OPTS, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::output::{self, say_line};
use crate::progress::Progress;

/// `compare`.
pub const COMMAND: Command = Command {
    name: "compare",
    about: "Check if two images have the same contents",
    operands: "FILENAME1 FILENAME2",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    opt('f', &["a-format", "left-format"], "FMT", "format of FILENAME1"),
    opt('F', &["b-format", "right-format"], "FMT", "format of FILENAME2"),
    IMAGE_OPTS,
    flag('s', &["strict"], "sizes and allocation must be equal too"),
    opt('T', &["cache"], "CACHE", "cache mode of both (writeback)"),
    FORCE_SHARE,
    OBJECT,
];

/// Exit codes past 0 (the same) and 1 (different).
const FAILED: u8 = 2;
const STATUS_FAILED: u8 = 3;
const READ_FAILED: u8 = 4;

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    compare(parsed).map_err(|error| match error {
        ImgError::WithCode { .. } => error,
        usage if usage.usage_of().is_some() => usage,
        other => ImgError::WithCode { code: FAILED, source: Box::new(other) },
    })
}

fn compare(parsed: &Parsed) -> Result<u8, ImgError> {
    let [first, second] = parsed.words.as_slice() else {
        return Err(ImgError::Expecting { command: "compare", expected: "two image file names" });
    };
    let cache = open::cache_named("source ", parsed.value("cache")?, CacheMode::Writeback)?;
    let access = Access { cache, ..Access::read(parsed) };
    let first = open::disk(&Named::of(parsed, first, "a-format")?, access)?;
    let second = open::disk(&Named::of(parsed, second, "b-format")?, access)?;
    let quiet = parsed.has("quiet");
    let strict = parsed.has("strict");
    let say = |text: String| {
        if !quiet {
            say_line(text);
        }
    };
    if first.size_bytes() != second.size_bytes() && strict {
        say("Strict mode: Image size mismatch!".to_owned());
        return Ok(1);
    }
    let status_at = if strict { status_differs(&first, &second)? } else { None };
    let progress = Progress::of(parsed, None);
    let differs = block::compare(&first, &second, default_workers(), &|done, total| progress.report(done, total))
        .map_err(|source| ImgError::WithCode { code: READ_FAILED, source: Box::new(ImgError::Comparing { source }) })?;
    if let Some(at) = differs {
        output::fact("mismatch-offset", at);
    }
    if let Some(at) = status_at.filter(|at| differs.is_none_or(|content| content >= *at)) {
        say(format!("Strict mode: Offset {at} block status mismatch!"));
        progress.end();
        return Ok(1);
    }
    // Said when the shorter image is done, before the rest of the longer one is looked at.
    let both = first.size_bytes().min(second.size_bytes());
    if first.size_bytes() != second.size_bytes() && differs.is_none_or(|at| at >= both) {
        say("Warning: Image size mismatch!".to_owned());
    }
    output::fact("identical", differs.is_none());
    match differs {
        Some(at) => say(format!("Content mismatch at offset {at}!")),
        None => say("Images are identical.".to_owned()),
    }
    progress.end();
    Ok(u8::from(differs.is_some()))
}

/// Where one of two disks of a size holds data and the other does not.
fn status_differs(first: &Disk, second: &Disk) -> Result<Option<u64>, ImgError> {
    let mut at = 0;
    while at < first.size_bytes() {
        let run = |disk: &Disk, bytes: u64| {
            disk.extent(at, bytes).map(|found| found.extent).map_err(|source| ImgError::WithCode {
                code: STATUS_FAILED,
                source: Box::new(ImgError::BlockStatus { source }),
            })
        };
        let one = run(first, first.size_bytes() - at)?;
        let two = run(second, one.bytes)?;
        let kind = |kind: ExtentKind| (kind != ExtentKind::Below, kind == ExtentKind::Data);
        if kind(one.kind) != kind(two.kind) {
            return Ok(Some(at));
        }
        at += two.bytes;
    }
    Ok(None)
}
