//! The text descriptor: identity, extents, and the "disk data base" with geometry and adapter.

use std::collections::HashSet;

use super::{DESCRIPTOR_MAX_BYTES, SECTOR_BYTES, VmdkError};

const SIGNATURE: &str = "# Disk DescriptorFile";
/// Extents of 2 GiB for a disk of 8 TiB. Each takes a file descriptor.
pub(super) const EXTENTS_MAX: usize = 4096;

/// What may be done with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
}

/// What an extent's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// The bytes of the disk, from a byte offset in the file on.
    Flat {
        /// Where the extent starts in its file; a multiple of 512 below 2^63.
        offset: u64,
    },
    /// Grains behind tables, with a header.
    Sparse,
    /// Zeroes; there is no file.
    Zero,
}

/// One line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Its size in sectors.
    pub sectors: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// Name of its file, beside the descriptor: never a path. Empty for [`ExtentKind::Zero`].
    pub name: String,
}

/// A checked descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes with the contents of the disk.
    pub cid: u32,
    /// The parent's CID when this image was made; `0xffff_ffff` without a parent.
    pub parent_cid: u32,
    /// As stored: `monolithicSparse` and others.
    pub create_type: String,
    /// The parent's file name as stored; opened only by whoever has the caller's consent.
    pub parent_name: Option<String>,
    /// In the order of the disk; together below 2^63 bytes.
    pub extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Whether the bytes start as a descriptor file does.
    pub fn has_signature(bytes: &[u8]) -> bool {
        bytes.starts_with(SIGNATURE.as_bytes())
    }

    /// Parses a descriptor file of at most 1 MiB.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, VmdkError> {
        let text = std::str::from_utf8(text_of(bytes)?).map_err(|_| VmdkError::DescriptorText)?;
        let mut found = Descriptor::from_text(text)?;
        let mut sectors = 0u64;
        // Tables of one file, loaded for each of thousands of extents, would take memory without end.
        let mut sparse_names = HashSet::new();
        for (line_number, line) in lines(text) {
            let Some(extent) = parse_extent(line, line_number)? else { continue };
            sectors = sectors
                .checked_add(extent.sectors)
                .filter(|sum| *sum <= i64::MAX as u64 / SECTOR_BYTES)
                .ok_or(VmdkError::ExtentSum)?;
            if found.extents.len() >= EXTENTS_MAX {
                return Err(VmdkError::TooManyExtents { max: EXTENTS_MAX });
            }
            if extent.kind == ExtentKind::Sparse && !sparse_names.insert(extent.name.clone()) {
                return Err(VmdkError::ExtentTwice { line: line_number, name: extent.name });
            }
            found.extents.push(extent);
        }
        Ok(found)
    }

    /// Parses a descriptor inside its only extent, padded with zero bytes. Its extent lines are not looked at: they
    /// hold whatever name the file had when it was made, in any encoding.
    pub fn parse_embedded(bytes: &[u8]) -> Result<Descriptor, VmdkError> {
        Descriptor::from_text(&String::from_utf8_lossy(text_of(bytes)?))
    }

    /// Everything but the extents.
    fn from_text(text: &str) -> Result<Descriptor, VmdkError> {
        let mut found =
            Descriptor { cid: 0, parent_cid: u32::MAX, create_type: String::new(), parent_name: None, extents: vec![] };
        for (line_number, line) in lines(text) {
            if let Some((key, value)) = line.split_once('=') {
                found.set(key.trim(), value.trim().trim_matches('"'), line_number)?;
            }
        }
        Ok(found)
    }

    fn set(&mut self, key: &str, value: &str, line: usize) -> Result<(), VmdkError> {
        let hex = || {
            u32::from_str_radix(value, 16)
                .map_err(|_| VmdkError::DescriptorLine { line, what: "the CID is not a hexadecimal number" })
        };
        match key {
            "CID" => self.cid = hex()?,
            "parentCID" => self.parent_cid = hex()?,
            "createType" => self.create_type = value.to_owned(),
            "parentFileNameHint" => self.parent_name = Some(value.to_owned()),
            _ => {}
        }
        Ok(())
    }

    /// Size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.extents.iter().map(|extent| extent.sectors).sum()
    }
}

/// The text, which a zero byte ends, after a look at its first line.
fn text_of(bytes: &[u8]) -> Result<&[u8], VmdkError> {
    if bytes.len() as u64 > DESCRIPTOR_MAX_BYTES {
        return Err(VmdkError::DescriptorTooLarge { bytes: bytes.len() as u64 });
    }
    if !Descriptor::has_signature(bytes) {
        return Err(VmdkError::DescriptorSignature);
    }
    Ok(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
}

/// The lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim()));
    numbered.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// A line such as `RW 4192256 SPARSE "disk-s001.vmdk"`; `None` when it is another line.
fn parse_extent(line: &str, line_number: usize) -> Result<Option<ExtentLine>, VmdkError> {
    let bad = |what| VmdkError::DescriptorLine { line: line_number, what };
    let Some((access, rest)) = line.split_once(char::is_whitespace) else { return Ok(None) };
    let access = match access {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        "NOACCESS" => return Err(bad("the extent may not be read (NOACCESS)")),
        _ => return Ok(None),
    };
    let (sectors, rest) = word(rest);
    let sectors: u64 = sectors.parse().map_err(|_| bad("the extent's size is not a number of sectors"))?;
    let (kind, rest) = word(rest);
    if kind == "ZERO" {
        return Ok(Some(ExtentLine { access, sectors, kind: ExtentKind::Zero, name: String::new() }));
    }
    let (name, rest) = rest
        .trim_start()
        .strip_prefix('"')
        .and_then(|rest| rest.split_once('"'))
        .ok_or(bad("the extent has no file name in quotes"))?;
    let kind = match kind {
        "FLAT" | "VMFS" => {
            let (offset, _) = word(rest);
            let offset: u64 = if offset.is_empty() && kind == "VMFS" {
                0
            } else {
                offset.parse().map_err(|_| bad("the flat extent has no offset in sectors"))?
            };
            let offset = offset
                .checked_mul(SECTOR_BYTES)
                .filter(|offset| *offset <= i64::MAX as u64)
                .ok_or(bad("the flat extent's offset is larger than 2^63 bytes"))?;
            ExtentKind::Flat { offset }
        }
        "SPARSE" => ExtentKind::Sparse,
        other => return Err(VmdkError::ExtentType { line: line_number, kind: other.chars().take(32).collect() }),
    };
    if !is_plain_name(name) {
        return Err(VmdkError::ExtentName { line: line_number, name: name.chars().take(255).collect() });
    }
    Ok(Some(ExtentLine { access, sectors, kind, name: name.to_owned() }))
}

/// The next word and what follows it.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace).unwrap_or((text, ""))
}

/// Whether a name stays in the directory of the descriptor, on Unix and on Windows.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && name.len() <= 255 && !name.contains(['/', '\\', '\0'])
}

/// The descriptor with another CID, without what follows the text. The length may change by the digits of the
/// number; `None` when the text has no CID line.
pub fn replace_cid(descriptor: &[u8], cid: u32) -> Option<Vec<u8>> {
    let text = text_of(descriptor).ok()?;
    const KEY: &[u8] = b"\nCID=";
    let at = text.windows(KEY.len()).position(|bytes| bytes == KEY)?;
    let (before, rest) = text.split_at_checked(at + KEY.len())?;
    let digits = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(rest.len());
    Some([before, format!("{cid:08x}").as_bytes(), rest.get(digits..)?].concat())
}

#[cfg(test)]
const TWO_EXTENTS: &str = "# Disk DescriptorFile\nversion=1\nCID=2b2caeb3\nparentCID=ffffffff\n\
    createType=\"twoGbMaxExtentSparse\"\n\n# Extent description\nRW 4194304 SPARSE \"b-s001.vmdk\"\n\
    RW 2097152 SPARSE \"b s002.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n";

#[test]
fn a_descriptor_of_qemu_img_is_read() {
    let got = Descriptor::parse(TWO_EXTENTS.as_bytes()).unwrap();
    assert_eq!((got.cid, got.parent_cid, got.create_type.as_str()), (0x2b2c_aeb3, u32::MAX, "twoGbMaxExtentSparse"));
    assert_eq!((got.sectors(), got.extents.len(), got.parent_name), (6_291_456, 2, None));
    assert_eq!(got.extents[1].name, "b s002.vmdk");
}

#[cfg(test)]
fn check_line(line: &str, want: Result<(u64, ExtentKind, &str), &str>) {
    let text = format!("{SIGNATURE}\r\nCID=1\r\n{line}\r\n");
    let got = Descriptor::parse(text.as_bytes());
    match (got, want) {
        (Ok(got), Ok((sectors, kind, name))) => {
            let extent = &got.extents[0];
            assert_eq!((extent.sectors, extent.kind, extent.name.as_str()), (sectors, kind, name), "{line}");
        }
        (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{line}: {error}"),
        (got, want) => panic!("{line}: {got:?}, not {want:?}"),
    }
}

#[test]
fn extent_lines() {
    check_line(r#"RW 100 FLAT "a-flat.vmdk" 0"#, Ok((100, ExtentKind::Flat { offset: 0 }, "a-flat.vmdk")));
    check_line(r#"RW 100 FLAT "a" 8 extra"#, Ok((100, ExtentKind::Flat { offset: 4096 }, "a")));
    check_line(r#"RDONLY 100 VMFS "a-flat.vmdk""#, Ok((100, ExtentKind::Flat { offset: 0 }, "a-flat.vmdk")));
    check_line("RW 7 ZERO", Ok((7, ExtentKind::Zero, "")));
    check_line(r#"RW 1 SPARSE "..a""#, Ok((1, ExtentKind::Sparse, "..a")));
    for (line, want) in [
        (r#"NOACCESS 100 FLAT "a" 0"#, "NOACCESS"),
        (r#"RW -1 FLAT "a" 0"#, "number of sectors"),
        (r#"RW 18446744073709551615 FLAT "a" 0"#, "2^63"),
        (r#"RW 1 FLAT "a" 18446744073709551615"#, "2^63"),
        (r#"RW 1 FLAT "a""#, "no offset"),
        (r#"RW 1 SPARSE a"#, "in quotes"),
        (r#"RW 1 VMFSSPARSE "a""#, "'VMFSSPARSE' are not supported"),
        (r#"RW 1 SESPARSE "a""#, "'SESPARSE' are not supported"),
        (r#"RW 1 VMFSRAW "a""#, "not supported"),
    ] {
        check_line(line, Err(want));
    }
}

#[test]
fn cve_2022_47951_extents_name_no_file_elsewhere() {
    for name in ["/etc/shadow", "../x", "..", ".", "", "a/b", r"..\x", r"C:\x", "sub/../../x"] {
        check_line(&format!("RW 1 FLAT \"{name}\" 0"), Err("paths are refused"));
        check_line(&format!("RW 1 SPARSE \"{name}\""), Err("paths are refused"));
    }
}

#[test]
fn text_that_is_no_descriptor_is_refused() {
    for (bytes, want) in [
        (&b"RW 1 ZERO"[..], VmdkError::DescriptorSignature),
        (b"", VmdkError::DescriptorSignature),
        (b"# Disk DescriptorFile\nCID=\xff", VmdkError::DescriptorText),
        (
            b"# Disk DescriptorFile\nCID=wxyz",
            VmdkError::DescriptorLine { line: 2, what: "the CID is not a hexadecimal number" },
        ),
    ] {
        assert_eq!(Descriptor::parse(bytes), Err(want));
    }
    let many = format!("{SIGNATURE}\n{}", "RW 1 ZERO\n".repeat(EXTENTS_MAX + 1));
    assert_eq!(Descriptor::parse(many.as_bytes()), Err(VmdkError::TooManyExtents { max: EXTENTS_MAX }));
    let twice = format!("{SIGNATURE}\nRW 1 SPARSE \"a\"\nRW 1 SPARSE \"a\"\n");
    let error = VmdkError::ExtentTwice { line: 3, name: "a".to_owned() };
    assert_eq!(Descriptor::parse(twice.as_bytes()), Err(error));
    let sum = format!("{SIGNATURE}\nRW {0} ZERO\nRW {0} ZERO\n", i64::MAX as u64 / 512);
    assert_eq!(Descriptor::parse(sum.as_bytes()), Err(VmdkError::ExtentSum));
    let large = vec![b'#'; (1 << 20) + 1];
    assert_eq!(Descriptor::parse(&large), Err(VmdkError::DescriptorTooLarge { bytes: (1 << 20) + 1 }));
}

#[test]
fn the_cid_alone_is_replaced() {
    let padded = [TWO_EXTENTS.as_bytes(), &[0; 9]].concat();
    let changed = String::from_utf8(replace_cid(&padded, 0xabc).unwrap()).unwrap();
    assert_eq!(changed, TWO_EXTENTS.replace("CID=2b2caeb3", "CID=00000abc"));
    assert_eq!(replace_cid(format!("{SIGNATURE}\nparentCID=1\n").as_bytes(), 1), None);
}

#[test]
fn extents_of_an_embedded_descriptor_are_not_looked_at() {
    let text = b"# Disk DescriptorFile\nCID=7\nparentFileNameHint=\"\xe9.vmdk\"\nRW 1 SPARSE \"/a/b\"\n\0\0";
    let got = Descriptor::parse_embedded(text).unwrap();
    assert_eq!((got.cid, got.parent_name.as_deref(), got.extents.len()), (7, Some("\u{fffd}.vmdk"), 0));
    assert!(Descriptor::parse(text).is_err());
}
