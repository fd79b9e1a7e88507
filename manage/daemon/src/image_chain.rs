//! A disk's image and everything behind it, opened by the block engine so that vireo-vmm needs no path.
//!
//! The engine follows hostile headers a bounded number of times and takes QEMU's image locks, which travel with the
//! descriptors: an image has one writer, whoever runs it. Here its errors get libvirt's words.

use std::path::Path;

use block::{Action, BlockError, ChainFile, Format};

use crate::error::DaemonError;

/// How a disk is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    /// Never written. Backing files never are.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Others may write it at the same time: the guests see to that themselves.
    pub shared: bool,
}

/// Opens the image at `path` and its backing files, top first.
pub fn open(path: &Path, format: Format, mode: OpenMode) -> Result<Vec<ChainFile>, DaemonError> {
    let chain = block::resolve_chain(path, Some(format), mode.read_only, !mode.shared);
    let chain = chain.map_err(|error| in_libvirts_words(path, error))?;
    if mode.direct {
        for file in &chain {
            let failed = |source| DaemonError::StorageFile { path: file.path_label.clone(), source };
            block::use_direct_io(&file.file).map_err(failed)?;
        }
    }
    Ok(chain)
}

/// Capacity in bytes, bytes taken on the host, and file length of an image.
pub fn sizes(path: &Path, format: Format) -> Result<(u64, u64, u64), DaemonError> {
    let info = block::inspect(path, Some(format)).map_err(|error| in_libvirts_words(path, error))?;
    let capacity = if format == Format::Raw { info.file_bytes } else { info.virtual_size_bytes };
    Ok((capacity, info.allocated_bytes, info.file_bytes))
}

/// The format that a definition names.
pub fn format_named(name: &str) -> Format {
    if name == "qcow2" { Format::Qcow2 } else { Format::Raw }
}

fn in_libvirts_words(top: &Path, error: BlockError) -> DaemonError {
    let missing = || std::io::Error::from_raw_os_error(libc::ENOENT);
    match error {
        BlockError::Io { path, action: Action::Open | Action::Stat | Action::Lock, source }
        | BlockError::NoSpace { path, action: _, source } => {
            if path == top {
                DaemonError::StorageFile { path, source }
            } else {
                DaemonError::BackingFile { path, parent: top.into(), source }
            }
        }
        BlockError::BackingMissing { path, backing } => {
            DaemonError::BackingFile { path: backing, parent: path, source: missing() }
        }
        BlockError::IsDirectory { path } if path == top => DaemonError::StorageDirectory { path },
        BlockError::Loop { .. } | BlockError::TooDeep { .. } => DaemonError::BackingLoop { path: top.into() },
        BlockError::Locked { path, access: _ } => DaemonError::ImageInUse { path },
        other => DaemonError::ImageFormat { detail: with_causes(&other) },
    }
}

/// The text and its causes; each names the file itself.
fn with_causes(error: &BlockError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
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
        let mode = OpenMode { read_only: false, direct: false, shared: false };
        let chain = open(&at("top.qcow2"), Format::Qcow2, mode).unwrap();
        let found: Vec<_> = chain.iter().map(|image| (image.path_label.clone(), image.format)).collect();
        let expected = [("top.qcow2", Format::Qcow2), ("mid.qcow2", Format::Qcow2), ("base.raw", Format::Raw)];
        assert_eq!(found, expected.map(|(name, format)| (at(name), format)));
        assert_eq!(sizes(&at("top.qcow2"), Format::Qcow2).unwrap().0, 2 << 20);

        let check = |name: &str, format, mode, expected: &str| {
            let error = open(&at(name), format, mode).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        };
        let shared = OpenMode { shared: true, ..mode };
        check("top.qcow2", Format::Qcow2, mode, "in use");
        check("base.raw", Format::Raw, mode, "in use");
        open(&at("base.raw"), Format::Raw, OpenMode { read_only: true, ..mode }).unwrap();
        open(&at("top.qcow2"), Format::Qcow2, shared).unwrap();
        let peer = Command::new("qemu-img").arg("check").arg(at("top.qcow2")).output().unwrap();
        let said = String::from_utf8_lossy(&peer.stderr).into_owned();
        assert!(said.contains("Failed to get shared \"write\" lock"), "{said}");
        drop(chain);

        qemu_img(directory.path(), "rebase -u -F qcow2 -b top.qcow2 mid.qcow2");
        fs::write(at("garbage"), b"notqcow2").unwrap();
        fs::remove_file(at("base.raw")).unwrap();
        check("top.qcow2", Format::Qcow2, mode, "form a loop");
        qemu_img(directory.path(), "rebase -u -F raw -b base.raw mid.qcow2");
        check("top.qcow2", Format::Qcow2, mode, "Cannot access backing file");
        check("garbage", Format::Qcow2, mode, "declared");
        check("missing", Format::Raw, mode, "Cannot access storage file");
        check("", Format::Raw, mode, "it is a directory");
    }
}
