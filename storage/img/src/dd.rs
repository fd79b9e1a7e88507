//! `dd`: blocks of one image into a new one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use block::{CacheMode, Disk, PageBuf};

use crate::Command;
use crate::create::Request;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, opt};
use crate::open::{self, Access, Named};
use crate::optlist::Value;
use crate::secret::Secrets;
use crate::stream;

/// `dd`.
pub const COMMAND: Command = Command {
    name: "dd",
    about: "Copy input to output with optional format conversion",
    operands: "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    FORMAT,
    IMAGE_OPTS,
    opt('O', &["output-format"], "FMT", "format of the output; raw if not given"),
    FORCE_SHARE,
    OBJECT,
];

/// Bytes in memory at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// The operands.
struct Operands<'a> {
    input: &'a OsStr,
    output: &'a OsStr,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let operands = operands(&parsed.words)?;
    let format = parsed.value("output-format")?.unwrap_or("raw");
    let named = Named::of(parsed, operands.input, "format")?;
    let source = open::disk(&named, Access::read(parsed))?;
    let mut end = source.size_bytes();
    if let Some(limit) = operands.count.and_then(|count| count.checked_mul(operands.block_bytes)) {
        // qemu-img counts the blocks that are skipped among them.
        end = end.min(limit);
    }
    let start = operands.skip.checked_mul(operands.block_bytes).filter(|start| *start <= end);
    if start.is_none() {
        eprintln!("{}: {}: cannot skip to specified offset", crate::program(), named.label);
    }
    let start = start.unwrap_or(end);
    if stream::is_stream(operands.output) {
        stream::copy_part(&source, start..end, &mut stream::open(operands.output)?, &mut |_| ())?;
        return Ok(0);
    }
    let mut request = Request::unnamed(operands.output, format, &[], Secrets::of(parsed)?)?;
    request.set("size", Value::Number(end - start));
    let label = operands.output.to_string_lossy().into_owned();
    request.make(false).map_err(|source| ImgError::CreatingOutput { name: label.clone(), source })?;
    let target = open::disk(&request.made(operands.output)?, Access::write(CacheMode::Writeback))?;
    copy(&source, start..end, &target)?;
    target.flush().map_err(|source| ImgError::Incomplete { target: label, source })?;
    Ok(0)
}

fn operands(words: &[OsString]) -> Result<Operands<'_>, ImgError> {
    let (mut input, mut output, mut block_bytes, mut count, mut skip) = (None, None, 512, None, 0);
    for word in words {
        let bytes = word.as_bytes();
        let at = bytes.iter().position(|b| *b == b'=').unwrap_or(bytes.len());
        let (name, value) = bytes.split_at(at);
        let value = OsStr::from_bytes(value.get(1..).unwrap_or_default());
        let text = value.to_string_lossy();
        let blocks = |what| ImgError::count(&text, what, 0..=i64::MAX as u64);
        match name {
            b"if" => input = Some(value),
            b"of" => output = Some(value),
            b"bs" => block_bytes = ImgError::number(&text, "bs", 1..=i32::MAX as u64)?,
            b"count" => count = Some(blocks("count")?),
            b"skip" => skip = blocks("skip")?,
            other => return Err(ImgError::Plain(Rule::DdOperand(String::from_utf8_lossy(other).into_owned()))),
        }
    }
    match (input, output) {
        (Some(input), Some(output)) => Ok(Operands { input, output, block_bytes, count, skip }),
        _ => Err(ImgError::Plain(Rule::Requires("Must specify both input and output files"))),
    }
}

/// Block by block, holes and all, as dd does.
fn copy(source: &Disk, range: std::ops::Range<u64>, target: &Disk) -> Result<(), ImgError> {
    let mut room = PageBuf::new(PIECE_BYTES.min(range.end - range.start) as usize);
    let mut at = range.start;
    while at < range.end {
        let now = PIECE_BYTES.min(range.end - at);
        let piece = room.get_mut(..now as usize).unwrap_or_default();
        source.read(at, piece).map_err(|source| ImgError::Reading { at, source })?;
        let to = at - range.start;
        target.write(to, piece).map_err(|source| ImgError::WritingDisk { at: to, source })?;
        at += now;
    }
    Ok(())
}
