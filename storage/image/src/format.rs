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
    /// LUKS version 1: the bytes of the disk, encrypted, behind a header.
    Luks,
    /// qcow2, version 2 (`compat=0.10`) or 3 (`compat=1.1`).
    Qcow2,
    /// VirtualBox.
    Vdi,
    /// VMware.
    Vmdk,
    /// Hyper-V.
    Vhdx,
    /// Virtual PC, and Hyper-V before vhdx.
    Vpc,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 7] =
        [Format::Raw, Format::Luks, Format::Qcow2, Format::Vdi, Format::Vmdk, Format::Vhdx, Format::Vpc];

    /// The name libvirt and qemu-img use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Luks => "luks",
            Format::Qcow2 => "qcow2",
            Format::Vdi => "vdi",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vpc => "vpc",
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
#[error("image format '{name}' is not supported; the supported ones are raw, luks, qcow2, vdi, vmdk, vhdx and vpc")]
pub struct UnknownFormat {
    /// The name that was given.
    pub name: String,
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        let known = Format::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| UnknownFormat { name: name.to_owned() })
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

/// The first bytes of a file are those of a format that this crate does not read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the file looks like {found}, which is not supported; convert it with a program that reads it, or declare it as raw \
     if it is a disk that begins like one"
)]
pub struct UnreadFormat {
    /// What it looks like, in words.
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

/// Guesses the format from the first [`PROBE_BYTES`] of a file, as QEMU does: by a magic, qcow2 also by its
/// version, else raw. A fixed vpc, whose magic is at its end, looks like a raw disk. What is known and not read is an error:
/// taken as a raw disk it would be copied, grown and written to as if its tables were data.
///
/// A guest can write any bytes into its raw disk, so a guess must never decide how a disk of a machine is
/// opened. It serves a person who asks what a file is.
pub fn probe(first: &[u8]) -> Result<Format, UnreadFormat> {
    let has = |at: usize, magic: &[u8]| first.get(at..at + magic.len()) == Some(magic);
    let unread = |found| Err(UnreadFormat { found });
    Ok(match crate::be32(first, 4) {
        // A version that does not exist yet is refused by who reads the header.
        Some(2..) if has(0, b"QFI\xfb") => Format::Qcow2,
        Some(1) if has(0, b"QFI\xfb") => return unread("qcow version 1"),
        _ if has(0, b"QED\0") => return unread("a QED image"),
        _ if has(0, b"WithoutFreeSpace") || has(0, b"WithouFreSpacExt") => return unread("a Parallels disk"),
        _ if has(0, b"LUKS\xba\xbe\0\x01") => Format::Luks,
        _ if has(0, b"vhdxfile") => Format::Vhdx,
        _ if has(0, b"conectix") => Format::Vpc,
        _ if has(0, b"KDMV") || has(0, b"COWD") || has(0, b"# Disk DescriptorFile") => Format::Vmdk,
        _ if has(0x40, &[0x7f, 0x10, 0xda, 0xbe]) => Format::Vdi,
        _ => Format::Raw,
    })
}

/// Checks that a file is what its owner declared. Raw accepts any bytes, because a guest may put an
/// image inside its disk; qcow2 needs its magic. What the others need, their parsers say.
pub fn check_declared(declared: Format, first: &[u8]) -> Result<(), FormatMismatch> {
    if declared != Format::Qcow2 || first.starts_with(b"QFI\xfb") {
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
        (b"QFI\xfb\0\0\0\x04", Format::Qcow2),
        (b"QFI\xfb\0\0\0\0", Format::Raw),
        (b"QFI\xfb", Format::Raw),
        (b"", Format::Raw),
        (b"LUKS\xba\xbe\0\x01", Format::Luks),
        (b"LUKS\xba\xbe\0\x02", Format::Raw),
        (b"vhdxfile", Format::Vhdx),
        (b"conectix", Format::Vpc),
        (b"KDMV", Format::Vmdk),
        (b"# Disk DescriptorFile\n", Format::Vmdk),
        (b"# Disk", Format::Raw),
        (&[&[0; 0x40][..], &0xbeda_107fu32.to_le_bytes()].concat(), Format::Vdi),
    ] {
        assert_eq!(probe(bytes), Ok(want), "{bytes:?}");
    }
    for (bytes, found) in [
        (&b"QFI\xfb\0\0\0\x01"[..], "qcow version 1"),
        (b"QED\0", "a QED image"),
        (b"WithoutFreeSpace", "a Parallels disk"),
        (b"WithouFreSpacExt", "a Parallels disk"),
    ] {
        assert_eq!(probe(bytes), Err(UnreadFormat { found }));
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
