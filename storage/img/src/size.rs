//! Sizes as people write and read them, in qemu-img's spelling.

use crate::error::ImgError;

/// Bytes of `1024`, `10k`, `1.5G`.
pub fn parse(text: &str) -> Result<u64, ImgError> {
    let bad = || ImgError::Size(text.to_owned());
    let (number, shift) = match text.char_indices().last() {
        Some((at, unit)) if !unit.is_ascii_digit() => {
            let shift = match unit.to_ascii_lowercase() {
                'b' => 0,
                'k' => 10,
                'm' => 20,
                'g' => 30,
                't' => 40,
                'p' => 50,
                'e' => 60,
                _ => return Err(bad()),
            };
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || number.contains('.') && (!digits(fraction) || shift == 0) || fraction.len() > 15 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let mut bytes = whole.checked_mul(1 << shift).ok_or_else(bad)?;
    if !fraction.is_empty() {
        let part: u128 = fraction.parse().map_err(|_| bad())?;
        let part = (part << shift) / 10u128.pow(fraction.len() as u32);
        bytes = bytes.checked_add(part as u64).ok_or_else(bad)?;
    }
    if i64::try_from(bytes).is_err() {
        return Err(bad());
    }
    Ok(bytes)
}

/// Three significant digits and a binary unit, as qemu-img prints sizes.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The unit is chosen so that up to 999 of it are shown, not 1023.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes as f64 / 1024f64.powi(unit as i32) >= 1000.0 {
        unit += 1;
    }
    format!("{} {}", three_digits(bytes as f64 / 1024f64.powi(unit as i32)), UNITS[unit])
}

/// C's `%0.3g` for values below 1000.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        0.0 => 0,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("10b", 10),
            ("1k", 1024),
            ("1.5M", 3 << 19),
            ("10G", 10 << 30),
            ("1t", 1 << 40),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "abc", "-1", "1.5", "1x", "k", "8E", "1.G", ".5G", "99999999999999999999", "1 G", "1é"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_as_qemu_img_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (197120, "192 KiB"),
            (10 << 20, "10 MiB"),
            (1 << 30, "1 GiB"),
            (1023 << 10, "0.999 MiB"),
            (3 << 29, "1.5 GiB"),
            (12_345_678_901, "11.5 GiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
