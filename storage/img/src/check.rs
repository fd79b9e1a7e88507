//! `vireo-img check`.

use std::io::{Write, stdout};
use std::path::Path;

use block::{Checked, Format, check_image, inspect};
use serde_json::json;

use crate::error::ImgError;
use crate::options::{Known, parse};

const KNOWN: Known = &[
    (&["-f", "--format"], true),
    (&["--output"], true),
    (&["-q", "--quiet"], false),
    (&["-U", "--force-share"], false),
];

pub fn run(args: Vec<String>) -> Result<u8, ImgError> {
    let parsed = parse("check", KNOWN, args)?;
    let file = parsed.one_file()?;
    let path = Path::new(file);
    let open = |source| ImgError::Open { path: path.to_owned(), source };
    let info = inspect(path, parsed.format(file)?).map_err(open)?;
    if info.format == Format::Raw {
        return Err(ImgError::NoChecks);
    }
    let checked = check_image(path).map_err(ImgError::Block)?;
    let json = parsed.json()?;
    let mut out = stdout().lock();
    if json {
        writeln!(out, "{:#}", as_json(file, &checked))?;
    } else if !parsed.has("-q") {
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
