//! `check`: compares what is referenced in an image with what is counted.

use std::io::{Write, stdout};

use block::{Checked, Format, check_image, inspect};
use serde_json::json;

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed, QUIET, opt};
use crate::json::write_json;
use crate::open::{self, Named};

/// `check`.
pub const COMMAND: Command =
    Command { name: "check", about: "Check basic image integrity", operands: "FILENAME", options: OPTIONS, run };

const OPTIONS: &[Opt] = &[
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    opt('T', &["cache"], "CACHE", "cache mode of the image (writeback)"),
    opt('r', &["repair"], "leaks|all", "mend leaked clusters, or everything"),
    FORCE_SHARE,
    OBJECT,
    OUTPUT,
    JSON,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let json = parsed.json()?;
    open::cache_named("source ", parsed.value("cache")?, block::CacheMode::Writeback)?;
    let named = Named::of(parsed, file, "format")?;
    match parsed.value("repair")? {
        None => {}
        Some("leaks" | "all") if parsed.has("force-share") => {
            return Err(ImgError::OpenRule { name: named.label, reason: Rule::ShareWrite });
        }
        Some("leaks" | "all") => return Err(ImgError::NotSupported("check -r")),
        Some(other) => {
            return Err(ImgError::Value {
                name: "--repair (-r)",
                possible: "'leaks' or 'all'",
                found: other.to_owned(),
            });
        }
    }
    let path = named.plain_path()?;
    let open = |source| ImgError::Open { name: named.label.clone(), source };
    let info = inspect(path, named.spec.driver).map_err(open)?;
    if info.format == Format::Raw {
        return Err(ImgError::NoChecks);
    }
    let checked = check_image(path).map_err(|source| ImgError::Failed { doing: "Check failed".to_owned(), source })?;
    let mut out = stdout().lock();
    if json {
        write_json(&mut out, &as_json(&named.label, &checked))?;
    } else if !parsed.has("quiet") {
        out.write_all(as_text(&checked).as_bytes())?;
    }
    Ok(match &checked {
        c if c.corruptions > 0 => 2,
        c if c.leaks > 0 => 3,
        _ => 0,
    })
}

fn as_json(file: &str, checked: &Checked) -> serde_json::Value {
    let mut value = json!({
        "image-end-offset": checked.image_end_bytes, "total-clusters": checked.total_clusters, "check-errors": 0,
        "filename": file, "format": "qcow2",
    });
    for (name, count) in [
        ("allocated-clusters", checked.allocated_clusters),
        ("corruptions", checked.corruptions),
        ("leaks", checked.leaks),
    ] {
        if count > 0 {
            value[name] = json!(count);
        }
    }
    value
}

fn as_text(checked: &Checked) -> String {
    let mut text: String = checked.findings.iter().map(|finding| format!("{finding}\n")).collect();
    let Checked { corruptions, leaks, .. } = checked;
    if *corruptions > 0 {
        text += &format!(
            "\n{corruptions} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n"
        );
    }
    if *leaks > 0 {
        text += &format!(
            "\n{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n"
        );
    }
    if *corruptions == 0 && *leaks == 0 {
        text += "No errors were found on the image.\n";
    }
    if checked.allocated_clusters > 0 && checked.total_clusters > 0 {
        let (used, all) = (checked.allocated_clusters, checked.total_clusters);
        text += &format!("{used}/{all} = {:.2}% allocated\n", used as f64 * 100.0 / all as f64);
    }
    if checked.image_end_bytes > 0 {
        text += &format!("Image end offset: {}\n", checked.image_end_bytes);
    }
    text
}
