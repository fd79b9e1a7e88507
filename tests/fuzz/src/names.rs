//! How images are named: by users, and by images that name others.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use block::spec::{ImageSpec, has_protocol, split_commas};

/// A name, as a whole and as `--image-opts`. What is printed as `json:` means the same when it is read again.
pub fn names(data: &[u8]) -> bool {
    let parsed = ImageSpec::parse(OsStr::from_bytes(data));
    let taken = parsed.is_ok();
    if let Ok(spec) = &parsed {
        printed(spec, data);
    }
    let Ok(text) = std::str::from_utf8(data) else { return taken };
    let _ = (has_protocol(text), split_commas(text));
    let options = ImageSpec::parse_options(text);
    if let Ok(spec) = &options {
        printed(spec, data);
    }
    taken | options.is_ok()
}

fn printed(spec: &ImageSpec, data: &[u8]) {
    let _ = (spec.plain_path(), spec.option("file.locking"));
    let text = spec.to_string();
    // Paths of any bytes are printed as well as text allows.
    if !text.starts_with("json:") || std::str::from_utf8(data).is_err() || spec.plain_path().is_some() {
        return;
    }
    let again = ImageSpec::parse(OsStr::new(&text)).unwrap_or_else(|e| panic!("{text} cannot be read again: {e}"));
    assert_eq!(again.to_string(), text);
}
