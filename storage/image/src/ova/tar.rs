//! Tar as OVA files use it: POSIX ustar headers, GNU's long names and binary numbers, `path` and `size` of pax.
//! ("ustar Interchange Format" and "pax Interchange Format" in POSIX.1-2017; "Basic Tar Format" in the manual of GNU tar.)

use super::OvaError;

/// The unit of a tar file: a header has one, contents are filled up to whole ones.
pub const BLOCK_BYTES: u64 = 512;
/// Most members that are listed.
pub const MEMBERS_MAX: usize = 1024;
/// Most headers that are looked at, those of directories and of longer names included.
const HEADERS_MAX: usize = 8 * MEMBERS_MAX;
/// Longest name of a member, in bytes.
pub const NAME_MAX_BYTES: usize = 1024;
/// Longest contents of a header that says more about the next member, in bytes.
const EXTENSION_MAX_BYTES: u64 = 64 << 10;
/// Largest number that the octal digits of the size field hold.
const OCTAL_SIZE_MAX: u64 = 0o77_777_777_777;

/// A file in the archive. The name is text to compare and to print: no path is ever made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name as stored.
    pub name: String,
    /// Where its contents start in the archive, in bytes.
    pub offset: u64,
    /// Length of its contents in bytes; they lie inside the archive.
    pub bytes: u64,
}

/// Reads `out.len()` bytes at an offset of the archive, which has them.
pub type ReadAt<'a, E> = dyn FnMut(u64, &mut [u8]) -> Result<(), E> + 'a;

/// What one header says.
struct Header {
    name: String,
    bytes: u64,
    kind: u8,
}

/// What headers before a member say about it.
#[derive(Default)]
struct Before {
    name: Option<String>,
    bytes: Option<u64>,
}

/// How many bytes from the start of a file [`probe`] looks at: headers that say more about the first member fit.
pub const PROBE_BYTES: usize = 8 << 10;

/// Whether a file starts as an archive whose first member has a name that ends in `.ovf`: an OVA file. `first` are its
/// first [`PROBE_BYTES`], or fewer where it ends.
pub fn probe(first: &[u8]) -> bool {
    let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
        let from = usize::try_from(offset).map_err(drop)?;
        let bytes = from.checked_add(out.len()).and_then(|end| first.get(from..end)).ok_or(())?;
        out.copy_from_slice(bytes);
        Ok(())
    };
    let mut found = false;
    // The walk ends at the first member, or where `first` does.
    let _ = walk(u64::MAX, &mut read, &mut |member| {
        found = is_descriptor(&member.name);
        false
    });
    found
}

pub(super) fn is_descriptor(name: &str) -> bool {
    has_suffix(name, ".ovf")
}

pub(super) fn has_suffix(name: &str, suffix: &str) -> bool {
    let at = name.len().saturating_sub(suffix.len());
    name.get(at..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

/// Lists the files of an archive, in order.
pub fn members<E>(file_bytes: u64, read: &mut ReadAt<'_, E>) -> Result<Vec<Member>, OvaError<E>> {
    let mut found: Vec<Member> = Vec::new();
    let mut surplus = false;
    walk(file_bytes, read, &mut |member| {
        surplus = found.len() >= MEMBERS_MAX;
        found.push(member);
        !surplus
    })?;
    if surplus { Err(OvaError::TooManyMembers { max: MEMBERS_MAX }) } else { Ok(found) }
}

/// Calls `each` with the files of an archive until it returns `false`.
fn walk<E>(file_bytes: u64, read: &mut ReadAt<'_, E>, each: &mut dyn FnMut(Member) -> bool) -> Result<(), OvaError<E>> {
    let mut before = Before::default();
    let mut at = 0u64;
    let mut headers = 0;
    while at <= file_bytes.saturating_sub(BLOCK_BYTES) && file_bytes >= BLOCK_BYTES {
        headers += 1;
        if headers > HEADERS_MAX {
            return Err(OvaError::TooManyMembers { max: MEMBERS_MAX });
        }
        let mut block = [0; BLOCK_BYTES as usize];
        read(at, &mut block).map_err(OvaError::Read)?;
        let Some(header) = parse_header(&block, at).map_err(OvaError::from_text)? else { break };
        let offset = at + BLOCK_BYTES;
        let is_extension = matches!(header.kind, b'L' | b'K' | b'x' | b'g');
        let bytes = if is_extension { header.bytes } else { before.bytes.take().unwrap_or(header.bytes) };
        let end = offset.checked_add(bytes).filter(|end| *end <= file_bytes);
        let name = before.name.clone().unwrap_or_else(|| header.name.clone());
        let Some(end) = end else {
            return Err(OvaError::CutOff { name, offset, bytes, file_bytes });
        };
        match header.kind {
            b'L' | b'x' => {
                if bytes > EXTENSION_MAX_BYTES {
                    return Err(OvaError::LongExtension { at, bytes, max: EXTENSION_MAX_BYTES });
                }
                let mut text = vec![0; bytes as usize];
                read(offset, &mut text).map_err(OvaError::Read)?;
                if header.kind == b'L' { before.name = Some(text_of(&text)) } else { read_pax(&text, &mut before) }
            }
            // Names of link targets, and what is said of all members, do not matter here.
            b'K' | b'g' => {}
            kind => {
                before.name = None;
                if matches!(kind, b'0' | 0 | b'7') {
                    if name.len() > NAME_MAX_BYTES {
                        return Err(OvaError::LongName { at, bytes: name.len(), max: NAME_MAX_BYTES });
                    }
                    if !each(Member { name, offset, bytes }) {
                        return Ok(());
                    }
                } else if matches!(kind, b'S' | b'M') {
                    return Err(OvaError::SpecialMember { name, kind: char::from(kind) });
                }
            }
        }
        at = end.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
    }
    Ok(())
}

/// Why a header is none, with where it stands.
#[derive(Debug)]
pub(super) enum HeaderFault {
    NoTar { at: u64 },
    Checksum { at: u64 },
    Number { at: u64, field: &'static str },
}

/// Reads a header; `None` for a block of zeroes, which ends the archive.
fn parse_header(block: &[u8], at: u64) -> Result<Option<Header>, HeaderFault> {
    let block = block.get(..BLOCK_BYTES as usize).ok_or(HeaderFault::NoTar { at })?;
    let field = |from: usize, to: usize| block.get(from..to).unwrap_or_default();
    if block.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    // "ustar\0" of POSIX, "ustar " of GNU.
    if field(257, 262) != b"ustar" {
        return Err(HeaderFault::NoTar { at });
    }
    let sum: u64 = block.iter().enumerate().map(|(i, byte)| u64::from(checksum_byte(i, *byte))).sum();
    if number(field(148, 156)) != Some(sum) {
        return Err(HeaderFault::Checksum { at });
    }
    let bytes = number(field(124, 136)).ok_or(HeaderFault::Number { at, field: "size" })?;
    let mut name = text_of(field(0, 100));
    // The prefix is POSIX's; GNU keeps times there.
    if field(257, 263) == b"ustar\0" && block.get(345) != Some(&0) {
        name = format!("{}/{name}", text_of(field(345, 500)));
    }
    let kind = block.get(156).copied().unwrap_or(0);
    Ok(Some(Header { name, bytes, kind: if kind == 0 { b'0' } else { kind } }))
}

/// The checksum counts its own field as blanks.
fn checksum_byte(index: usize, byte: u8) -> u8 {
    if (148..156).contains(&index) { b' ' } else { byte }
}

/// A number: octal digits between blanks, or 63 bits when the first one is set.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) {
        let mut value = u64::from(first & 0x7f);
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(u64::from(*byte))?;
        }
        return Some(value);
    }
    let digits = field.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
    let mut value = 0u64;
    for digit in digits {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value = value.checked_mul(8)?.checked_add(u64::from(digit))?;
    }
    Some(value)
}

/// Text up to the first zero byte.
fn text_of(field: &[u8]) -> String {
    String::from_utf8_lossy(field.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// `LENGTH KEY=VALUE\n`, over and over.
fn read_pax(text: &[u8], before: &mut Before) {
    let mut rest = text;
    while let Some(blank) = rest.iter().position(|byte| *byte == b' ') {
        let length = rest.get(..blank).and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<usize>().ok());
        let Some(record) = length.filter(|length| *length > blank).and_then(|length| rest.get(blank + 1..length))
        else {
            return;
        };
        rest = rest.get(blank + 1 + record.len()..).unwrap_or_default();
        let Some((key, value)) =
            std::str::from_utf8(record).ok().and_then(|record| record.trim_end_matches('\n').split_once('='))
        else {
            continue;
        };
        match key {
            "path" => before.name = Some(value.to_owned()),
            "size" => before.bytes = value.parse().ok(),
            _ => {}
        }
    }
}

/// The header of a file of `bytes`, readable by all, last changed at `mtime_s` seconds since 1970. The name has at most
/// 100 bytes; what is longer is cut off.
pub fn header(name: &str, bytes: u64, mtime_s: u64) -> [u8; BLOCK_BYTES as usize] {
    let mut block = [0; BLOCK_BYTES as usize];
    let mut put = |at: usize, text: &[u8]| {
        for (target, byte) in block.iter_mut().skip(at).zip(text) {
            *target = *byte;
        }
    };
    put(0, name.as_bytes().get(..name.len().min(100)).unwrap_or_default());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if bytes <= OCTAL_SIZE_MAX {
        put(124, format!("{bytes:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &bytes.to_be_bytes());
    }
    put(136, format!("{:011o}\0", mtime_s.min(OCTAL_SIZE_MAX)).as_bytes());
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(265, b"root");
    put(297, b"root");
    let sum: u32 = block.iter().enumerate().map(|(i, byte)| u32::from(checksum_byte(i, *byte))).sum();
    for (target, byte) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").as_bytes()) {
        *target = *byte;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(archive: &[u8]) -> Result<Vec<Member>, String> {
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
            out.copy_from_slice(&archive[offset as usize..][..out.len()]);
            Ok(())
        };
        members(archive.len() as u64, &mut read).map_err(|error| error.to_string())
    }

    fn archive(files: &[(&str, u8, &[u8])]) -> Vec<u8> {
        let mut all = Vec::new();
        for (name, kind, contents) in files {
            let mut block = header(name, contents.len() as u64, 0);
            block[156] = *kind;
            let sum: u32 = block.iter().enumerate().map(|(i, byte)| u32::from(checksum_byte(i, *byte))).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            all.extend(block);
            all.extend_from_slice(contents);
            all.resize(all.len().next_multiple_of(512), 0);
        }
        all.resize(all.len() + 1024, 0);
        all
    }

    #[test]
    fn members_are_found_with_long_names_and_sizes() {
        let long = "n".repeat(300);
        let files: &[(&str, u8, &[u8])] = &[
            ("a.ovf", b'0', b"descriptor"),
            ("dir/", b'5', b""),
            ("././@LongLink", b'L', long.as_bytes()),
            ("nnn", b'0', b"x"),
            ("pax", b'x', b"20 path=b/disk.vmdk\n22 comment=not wanted\n"),
            ("short", 0, &[7; 513]),
        ];
        let member = |name: &str, offset, bytes| Member { name: name.to_owned(), offset, bytes };
        let want = vec![member("a.ovf", 512, 10), member(&long, 3072, 1), member("b/disk.vmdk", 5120, 513)];
        assert_eq!(list(&archive(files)), Ok(want));
        assert!(probe(&archive(files)) && probe(&archive(&[("x", b'x', b"16 path=d/a.OVF\n"), ("y", b'0', b"")])));
        assert!(!probe(&archive(files)[512..]) && !probe(&[0; 512]) && !probe(b"KDMV"));
        // More than 8 GiB: the size is binary.
        assert_eq!(number(&header("x", 1 << 40, 0)[124..136]), Some(1 << 40));
        assert_eq!(number(&header("x", OCTAL_SIZE_MAX, 0)[124..136]), Some(OCTAL_SIZE_MAX));
    }

    #[test]
    fn damage_is_named() {
        let good = archive(&[("a.ovf", b'0', b"descriptor"), ("d.vmdk", b'0', &[1; 600])]);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            list(&bad).unwrap_err()
        };
        assert!(with(1024 + 10, b"x").contains("checksum of the header at 1024"), "{}", with(1034, b"x"));
        assert!(with(257, b"USTAR").contains("no tar header at 0"));
        let cut = list(&good[..2000]).unwrap_err();
        assert!(cut.contains("d.vmdk") && cut.contains("600 bytes"), "{cut}");
        let sparse = list(&archive(&[("s", b'S', b"")])).unwrap_err();
        assert!(sparse.contains("'S'"), "{sparse}");
        let many: Vec<(&str, u8, &[u8])> = vec![("m", b'0', b""); MEMBERS_MAX + 1];
        assert!(list(&archive(&many)).unwrap_err().contains("more than 1024"));
        let mut endless = header("x", 0, 0);
        endless[124..136].fill(0xff);
        assert_eq!(number(&endless[124..136]), None);
    }
}
