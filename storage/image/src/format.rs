//! Which format is this? Declared by whoever owns the image; guessed only where a person asks.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// How many bytes from the start of a file [`probe`] and [`check_declared`] look at.
pub const PROBE_BYTES: usize = 512;

/// An image format that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk, nothing else.
    Raw,
    /// qcow2, version 2 (`compat=0.10`) or 3 (`compat=1.1`).
    Qcow2,
}

impl Format {
    /// The name libvirt and qemu-img use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format name that this crate does not open.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("image format '{name}' is not supported; the supported ones are raw and qcow2")]
pub struct UnknownFormat {
    /// The name that was given.
    pub name: String,
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(UnknownFormat { name: name.to_owned() }),
        }
    }
}

/// The first bytes of a file contradict the format its owner declared.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("declared as {declared}, but the file starts with {found}")]
pub struct FormatMismatch {
    /// What the owner said.
    pub declared: Format,
    /// What the first bytes look like, in words.
    pub found: &'static str,
}

/// Signatures of formats at offset 0, with the words an error uses for them.
const SIGNATURES: [(&[u8], &str); 9] = [
    (b"QFI\xfb", "a qcow signature"),
    (b"KDMV", "a VMDK signature"),
    (b"COWD", "an old VMDK signature"),
    (b"# Disk DescriptorFile", "a VMDK descriptor"),
    (b"vhdxfile", "a VHDX signature"),
    (b"conectix", "a VHD signature"),
    (b"LUKS\xba\xbe", "a LUKS header"),
    (b"QED\0", "a QED signature"),
    (b"\x1f\x8b", "a gzip signature (unpack the file first)"),
];

/// Guesses the format from the first [`PROBE_BYTES`] of a file: qcow2 by its magic and version, else raw.
///
/// A guest can write any bytes into its raw disk, so a guess must never decide how a disk of a machine is
/// opened. It serves a person who asks what a file is.
pub fn probe(first: &[u8]) -> Format {
    let version = crate::be32(first, 4);
    if first.starts_with(b"QFI\xfb") && matches!(version, Some(2 | 3)) { Format::Qcow2 } else { Format::Raw }
}

/// Checks that a file is what its owner declared. Raw accepts any bytes, because a guest may put an
/// image inside its disk; qcow2 needs its magic.
pub fn check_declared(declared: Format, first: &[u8]) -> Result<(), FormatMismatch> {
    if declared == Format::Raw || first.starts_with(b"QFI\xfb") {
        return Ok(());
    }
    let found =
        SIGNATURES.iter().find(|(magic, _)| first.starts_with(magic)).map_or(
            if first.is_empty() { "nothing: it is empty" } else { "no signature that is known" },
            |(_, words)| words,
        );
    Err(FormatMismatch { declared, found })
}

#[test]
fn probing_needs_magic_and_a_version_that_exists() {
    for (bytes, want) in [
        (&b"QFI\xfb\0\0\0\x02"[..], Format::Qcow2),
        (b"QFI\xfb\0\0\0\x03", Format::Qcow2),
        (b"QFI\xfb\0\0\0\x01", Format::Raw),
        (b"QFI\xfb", Format::Raw),
        (b"", Format::Raw),
    ] {
        assert_eq!(probe(bytes), want, "{bytes:?}");
    }
}

#[test]
fn a_declared_format_is_held_against_the_bytes() {
    for (declared, bytes, want) in [
        (Format::Raw, &b"QFI\xfb\0\0\0\x03"[..], None),
        (Format::Qcow2, b"QFI\xfb", None),
        (Format::Qcow2, b"KDMV", Some("a VMDK signature")),
        (Format::Qcow2, b"", Some("nothing: it is empty")),
        (Format::Qcow2, b"hello", Some("no signature that is known")),
    ] {
        assert_eq!(check_declared(declared, bytes).err().map(|e| e.found), want, "{declared} {bytes:?}");
    }
}
