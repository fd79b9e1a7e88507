//! `check`: compares what is referenced in an image with what is counted.

use std::io::Write;

use block::{CacheMode, ChainFile, Checked, Format, Repair, check_foreign, check_image, repair_image};
use serde_json::{Value, json};

use crate::Command;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, JSON, OBJECT, OUTPUT, Opt, Parsed, QUIET, opt};
use crate::json::write_json;
use crate::open::{self, Access, Named};
use crate::output::stdout;

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
    let repair = match parsed.value("repair")? {
        None => None,
        Some("leaks" | "all") if parsed.has("force-share") => {
            return Err(ImgError::OpenRule { name: named.label, reason: Rule::ShareWrite });
        }
        Some("leaks") => Some(Repair::Leaks),
        Some("all") => Some(Repair::All),
        Some(other) => {
            return Err(ImgError::RepairWhat { command: "check", found: other.to_owned() });
        }
    };
    let access = match repair {
        None => Access::read(parsed),
        Some(_) => Access::write(CacheMode::Writeback),
    };
    let top = open::top(&named, access)?;
    if top.format != Format::Qcow2 {
        return check_other(parsed, &named, &top, repair.is_some());
    }
    let failed = |source| ImgError::Failed { doing: "Check failed".to_owned(), source };
    open::require_key(&named, &top)?;
    let (checked, fixed) = match repair {
        None => (check_image(&top.path_label).map_err(failed)?, Fixed::default()),
        Some(what) => {
            let done = repair_image(top, what).map_err(failed)?;
            print_findings(&done.before);
            (done.after, Fixed { leaks: done.leaks_fixed, corruptions: done.corruptions_fixed })
        }
    };
    print_findings(&checked);
    let mut out = stdout();
    if json {
        write_json(&mut out, &as_json(&named.label, &checked, fixed))?;
    } else if !parsed.has("quiet") {
        out.write_all(as_text(&checked, fixed).as_bytes())?;
    }
    Ok(match &checked {
        c if c.corruptions > 0 => 2,
        c if c.leaks > 0 => 3,
        _ => 0,
    })
}

/// A format of another vendor, whose check counts nothing.
fn check_other(parsed: &Parsed, named: &Named, top: &ChainFile, repair: bool) -> Result<u8, ImgError> {
    open::require_key(named, top)?;
    let failed = |source| ImgError::Failed { doing: "Check failed".to_owned(), source };
    // As in qemu-img, these are looked at and never mended.
    if repair && matches!(top.format, Format::Vdi | Format::Vmdk) {
        return Err(ImgError::NoChecks);
    }
    let report = check_foreign(&top.path_label, top.format).map_err(failed)?.ok_or(ImgError::NoChecks)?;
    if repair && report.corruptions > 0 {
        return Err(ImgError::NotSupported("check -r of this format"));
    }
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    let mut out = stdout();
    if parsed.json()? {
        let mut value = json!({"check-errors": 0, "filename": named.label, "format": top.format.name()});
        if report.corruptions > 0 {
            value["corruptions"] = json!(report.corruptions);
        }
        write_json(&mut out, &value)?;
    } else if !parsed.has("quiet") {
        let checked = Checked { corruptions: report.corruptions, ..NOTHING };
        out.write_all(as_text(&checked, Fixed::default()).as_bytes())?;
    }
    Ok(if report.corruptions > 0 { 2 } else { 0 })
}

/// A check that counted nothing.
const NOTHING: Checked = Checked {
    corruptions: 0,
    leaks: 0,
    allocated_clusters: 0,
    compressed_clusters: 0,
    fragmented_clusters: 0,
    total_clusters: 0,
    image_end_bytes: 0,
    findings: Vec::new(),
};

/// What a repair mended.
#[derive(Clone, Copy, Debug, Default)]
struct Fixed {
    leaks: u64,
    corruptions: u64,
}

fn print_findings(checked: &Checked) {
    for finding in &checked.findings {
        eprintln!("{finding}");
    }
}

fn as_json(file: &str, checked: &Checked, fixed: Fixed) -> Value {
    let mut value = json!({
        "image-end-offset": checked.image_end_bytes, "total-clusters": checked.total_clusters, "check-errors": 0,
        "filename": file, "format": "qcow2",
    });
    for (name, count) in [
        ("allocated-clusters", checked.allocated_clusters),
        ("fragmented-clusters", checked.fragmented_clusters),
        ("compressed-clusters", checked.compressed_clusters),
        ("corruptions", checked.corruptions),
        ("leaks", checked.leaks),
        ("corruptions-fixed", fixed.corruptions),
        ("leaks-fixed", fixed.leaks),
    ] {
        if count > 0 {
            value[name] = json!(count);
        }
    }
    value
}

fn as_text(checked: &Checked, fixed: Fixed) -> String {
    let Checked { corruptions, leaks, .. } = checked;
    let mut text = String::new();
    if fixed.leaks > 0 || fixed.corruptions > 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            fixed.leaks, fixed.corruptions
        );
    }
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
    let (used, all) = (checked.allocated_clusters, checked.total_clusters);
    if used > 0 && all > 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text += &format!(
            "{used}/{all} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            share(used, all),
            share(checked.fragmented_clusters, used),
            share(checked.compressed_clusters, used)
        );
    }
    if checked.image_end_bytes > 0 {
        text += &format!("Image end offset: {}\n", checked.image_end_bytes);
    }
    text
}
