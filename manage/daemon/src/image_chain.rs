//! Opens a disk's image and everything behind it, so that vireo-vmm needs no path.
//!
//! Image headers are hostile: a backing file is followed only as an image, a bounded number of times, never in a circle.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use image::Format;
use image::qcow2::{Header, header_area_bytes};

use crate::error::DaemonError;

/// Most images behind one disk.
const CHAIN_MAX: usize = 64;

/// An opened image.
#[derive(Debug)]
pub struct OpenImage {
    /// The file.
    pub file: File,
    /// Where it was found.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
}

/// How a disk is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    /// Never written. Backing files never are.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// Opens the image at `path` and its backing files, top first.
pub fn open(path: &Path, format: Format, mode: OpenMode) -> Result<Vec<OpenImage>, DaemonError> {
    let mut chain = Vec::new();
    let mut seen = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next.take() {
        let parent = chain.last().map(|image: &OpenImage| image.path.clone());
        let mode = OpenMode { read_only: mode.read_only || parent.is_some(), ..mode };
        let file = open_file(&path, mode, parent.as_deref())?;
        let identity = file.metadata().map(|found| (found.dev(), found.ino()));
        let identity = identity.map_err(|source| storage_error(&path, parent.as_deref(), source))?;
        if seen.contains(&identity) || chain.len() >= CHAIN_MAX {
            let path = chain.first().map_or(path, |image: &OpenImage| image.path.clone());
            return Err(DaemonError::BackingLoop { path, limit: CHAIN_MAX });
        }
        seen.push(identity);
        next = backing_of(&path, format)?;
        chain.push(OpenImage { file, path, format });
    }
    Ok(chain)
}

/// Capacity in bytes, bytes taken on the host, and file length of an image.
pub fn sizes(path: &Path, format: Format) -> Result<(u64, u64, u64), DaemonError> {
    let failed = |source| storage_error(path, None, source);
    let file = open_file(path, OpenMode { read_only: true, direct: false }, None)?;
    let found = file.metadata().map_err(failed)?;
    let length = if found.file_type().is_block_device() {
        io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(failed)?
    } else {
        found.len()
    };
    let capacity = match format {
        Format::Raw => length,
        Format::Qcow2 => header_of(path)?.geometry.size_bytes,
    };
    Ok((capacity, found.blocks().saturating_mul(512), length))
}

/// The format that a definition names.
pub fn format_named(name: &str) -> Format {
    if name == "qcow2" { Format::Qcow2 } else { Format::Raw }
}

fn storage_error(path: &Path, parent: Option<&Path>, source: io::Error) -> DaemonError {
    match parent {
        None => DaemonError::StorageFile { path: path.into(), source },
        Some(parent) => DaemonError::BackingFile { path: path.into(), parent: parent.into(), source },
    }
}

fn open_file(path: &Path, mode: OpenMode, parent: Option<&Path>) -> Result<File, DaemonError> {
    let failed = |source| storage_error(path, parent, source);
    // Looked at before it is opened: opening a pipe or a device can do things of its own.
    let found = fs::metadata(path).map_err(failed)?.file_type();
    if found.is_dir() {
        return Err(DaemonError::StorageDirectory { path: path.into() });
    }
    if !found.is_file() && !found.is_block_device() {
        return Err(DaemonError::ImageFormat {
            path: path.into(),
            detail: "is neither a file nor a block device".into(),
        });
    }
    let flags = if mode.direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(!mode.read_only).custom_flags(flags | libc::O_NONBLOCK);
    options.open(path).map_err(failed)
}

/// Reads the header through a descriptor of its own: the disk's may bypass the page cache, which wants aligned memory.
fn header_of(path: &Path) -> Result<Header, DaemonError> {
    let failed = |source| storage_error(path, None, source);
    let bad = |detail: String| DaemonError::ImageFormat { path: path.into(), detail };
    let mut area = Vec::new();
    let mut file = File::open(path).map_err(failed)?;
    file.by_ref().take(image::PROBE_BYTES as u64).read_to_end(&mut area).map_err(failed)?;
    image::check_declared(Format::Qcow2, &area).map_err(|error| bad(error.to_string()))?;
    let total = header_area_bytes(&area).map_err(|error| bad(error.to_string()))?;
    let rest = total.saturating_sub(area.len() as u64);
    file.take(rest).read_to_end(&mut area).map_err(failed)?;
    Header::parse(&area).map_err(|error| bad(error.to_string()))
}

fn backing_of(path: &Path, format: Format) -> Result<Option<(PathBuf, Format)>, DaemonError> {
    if format == Format::Raw {
        return Ok(None);
    }
    let header = header_of(path)?;
    let Some(name) = header.backing_name else { return Ok(None) };
    let bad = |detail: String| DaemonError::ImageFormat { path: path.into(), detail };
    let local = name.strip_prefix("file:").unwrap_or(&name);
    if local.starts_with("json:") || local.contains("://") {
        return Err(bad(format!("its backing file '{name}' is not a local file, which is not supported")));
    }
    let format = match header.backing_format.as_deref() {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => return Err(bad(format!("its backing file '{name}' has format '{other}'; use raw or qcow2"))),
        // A guess would let a guest that once wrote a raw image decide what is opened.
        None => {
            let help = "qemu-img rebase -u -F FORMAT -b FILE IMAGE records it";
            return Err(bad(format!("the format of its backing file '{name}' is not recorded; {help}")));
        }
    };
    Ok(Some((path.parent().unwrap_or(Path::new("/")).join(local), format)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(directory: &Path, args: &str) {
        let status = Command::new("qemu-img").args(args.split(' ')).current_dir(directory).output();
        let output = status.expect("qemu-img (Debian package qemu-utils) makes the images of this test");
        assert!(output.status.success(), "qemu-img {args}: {output:?}");
    }

    #[test]
    fn chains_are_followed_and_traps_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        qemu_img(directory.path(), "create -q -f raw base.raw 1M");
        qemu_img(directory.path(), "create -q -f qcow2 -b base.raw -F raw mid.qcow2");
        qemu_img(directory.path(), "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 2M");
        let mode = OpenMode { read_only: false, direct: false };
        let chain = open(&at("top.qcow2"), Format::Qcow2, mode).unwrap();
        let found: Vec<_> = chain.iter().map(|image| (image.path.clone(), image.format)).collect();
        let expected = [("top.qcow2", Format::Qcow2), ("mid.qcow2", Format::Qcow2), ("base.raw", Format::Raw)];
        assert_eq!(found, expected.map(|(name, format)| (at(name), format)));
        assert_eq!(sizes(&at("top.qcow2"), Format::Qcow2).unwrap().0, 2 << 20);

        qemu_img(directory.path(), "rebase -u -F qcow2 -b top.qcow2 mid.qcow2");
        fs::write(at("garbage"), b"notqcow2").unwrap();
        fs::remove_file(at("base.raw")).unwrap();
        let check = |name: &str, format, expected: &str| {
            let error = open(&at(name), format, mode).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        };
        check("top.qcow2", Format::Qcow2, "form a loop");
        qemu_img(directory.path(), "rebase -u -F raw -b base.raw mid.qcow2");
        check("top.qcow2", Format::Qcow2, "Cannot access backing file");
        check("garbage", Format::Qcow2, "declared");
        check("missing", Format::Raw, "Cannot access storage file");
        check("", Format::Raw, "it is a directory");
    }
}
