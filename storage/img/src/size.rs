//! Sizes as people write and read them, in qemu-img's spelling.

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with at most one suffix.
    Text,
    /// Negative, or 2^64 and more.
    Range,
}

/// Bytes of `1024`, `10k`, `1.5G`, `0x200`.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(SizeError::Text);
        }
        let value = u64::from_str_radix(digits, 16).map_err(|_| SizeError::Range)?;
        return if negative { Err(SizeError::Range) } else { Ok(value) };
    }
    let (number, shift) = split_unit(text)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((_, fraction)) if shift == 0 && !fraction.is_empty() => return Err(SizeError::Text),
        Some(parts) => parts,
        None => (number, ""),
    };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return Err(SizeError::Text);
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::Range)? };
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::Range)?;
    let bytes = bytes.checked_add(part(fraction, shift)).ok_or(SizeError::Range)?;
    if negative && bytes != 0 { Err(SizeError::Range) } else { Ok(bytes) }
}

/// A number as C writes it: decimal, `0x` and hexadecimal, `0` and octal. No suffix.
pub fn integer(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(SizeError::Text);
    }
    let value = u64::from_str_radix(digits, radix).map_err(|_| SizeError::Range)?;
    if negative && value != 0 { Err(SizeError::Range) } else { Ok(value) }
}

fn split_unit(text: &str) -> Result<(&str, u32), SizeError> {
    let (at, unit) = text.char_indices().next_back().ok_or(SizeError::Text)?;
    let shift = match unit.to_ascii_lowercase() {
        '0'..='9' | '.' => return Ok((text, 0)),
        'b' => 0,
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        'p' => 50,
        'e' => 60,
        _ => return Err(SizeError::Text),
    };
    Ok((text.get(..at).unwrap_or_default(), shift))
}

/// The digits behind a point, in bytes of the unit, rounded. Digits past the 15th do not count.
fn part(fraction: &str, shift: u32) -> u64 {
    let digits = fraction.get(..fraction.len().min(15)).unwrap_or_default();
    let Ok(value) = digits.parse::<u128>() else { return 0 };
    let scale = 10u128.pow(digits.len() as u32);
    (((value << shift) + scale / 2) / scale) as u64
}

/// The size of a disk: at most 2^63 - 1 bytes. `None`: out of that range, or no size.
pub fn disk_bytes(text: &str) -> Result<u64, SizeError> {
    parse(text).and_then(|bytes| i64::try_from(bytes).map(|_| bytes).map_err(|_| SizeError::Range))
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
            (".5M", 1 << 19),
            ("1.M", 1 << 20),
            (" +1M", 1 << 20),
            ("0.0009k", 1),
            ("1.9999k", 2048),
            ("0x1f", 31),
            ("10G", 10 << 30),
            ("1t", 1 << 40),
            ("8E", 8 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "abc", "1.5", "1.5B", "1x", "k", ".k", ".", "1 G", "1M ", "1é", "1e3", "0x1M", "1KB", "--1"] {
            assert_eq!(parse(text), Err(SizeError::Text), "{text}");
        }
        for text in ["-1", "17E", "99999999999999999999"] {
            assert_eq!(parse(text), Err(SizeError::Range), "{text}");
        }
        for (text, number) in [("0", 0), ("10", 10), (" +7", 7), ("010", 8), ("0x1F", 31), ("-0", 0)] {
            assert_eq!(integer(text), Ok(number), "{text}");
        }
        for text in ["", "1k", "1.5", "08", "0x", "5 ", "- 1"] {
            assert_eq!(integer(text), Err(SizeError::Text), "{text}");
        }
        for text in ["-1", "18446744073709551616"] {
            assert_eq!(integer(text), Err(SizeError::Range), "{text}");
        }
        assert_eq!(disk_bytes("8E"), Err(SizeError::Range));
        assert_eq!(disk_bytes("7E"), Ok(7 << 60));
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
