//! Sizes with units, as libvirt reads `<memory unit='…'>`.

use crate::error::{DomainXmlError, XmlErrorKind};
use crate::tree::Element;

/// Size in KiB of an element like `<memory unit='MiB'>128</memory>`, rounded up.
pub fn memory_kib(element: &Element, path: &'static str) -> Result<u64, DomainXmlError> {
    let text = element.text();
    let bad = || DomainXmlError::BadValue { path, value: text.trim().into() };
    let number: u64 = text.trim().parse().map_err(|_| bad())?;
    let unit = element.attribute("unit").unwrap_or("KiB");
    let factor = factor(unit).ok_or_else(|| DomainXmlError::UnknownSuffix { suffix: unit.into() })?;
    number.checked_mul(factor).map(|bytes| bytes.div_ceil(1024)).ok_or_else(bad)
}

/// Bytes in a unit.
fn factor(unit: &str) -> Option<u64> {
    Some(match unit {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "K" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        "PB" => 1_000_000_000_000_000,
        "P" | "PiB" => 1 << 50,
        "EB" => 1_000_000_000_000_000_000,
        "E" | "EiB" => 1 << 60,
        _ => return None,
    })
}

impl DomainXmlError {
    /// The error's class, which decides its libvirt number.
    pub fn kind(&self) -> XmlErrorKind {
        crate::error::kind(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_libvirts() {
        for (unit, number, expected) in [
            (None, "131072", Some(131_072)),
            (Some("MiB"), "128", Some(131_072)),
            (Some("MB"), "1", Some(977)),
            (Some("b"), "1", Some(1)),
            (Some("G"), "1", Some(1 << 20)),
            (Some("EiB"), "16", None),
            (Some("parsec"), "1", None),
            (None, "banana", None),
            (None, "-1", None),
        ] {
            let mut element = Element::new("memory").text_node(number);
            if let Some(unit) = unit {
                element.set_attribute("unit", unit);
            }
            assert_eq!(memory_kib(&element, "./memory[1]").ok(), expected, "{unit:?} {number}");
        }
    }
}
