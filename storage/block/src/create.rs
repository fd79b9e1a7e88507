//! New images. A file that exists is never overwritten.

use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use image::Format;
use image::qcow2::layout::{NewImage, lay_out};

use crate::error::{Action, BlockError};
use crate::sys::{WriteBufs, pwrite};

/// How a qcow2 image is created.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Backing file as it shall be stored, relative to the new image's directory, and its format.
    pub backing: Option<(PathBuf, Format)>,
}

impl Default for CreateOptions {
    /// 64 KiB clusters, version 3, no backing file.
    fn default() -> CreateOptions {
        CreateOptions { cluster_bits: 16, version: 3, backing: None }
    }
}

/// Creates an empty qcow2 image, on stable storage when this returns. The size is rounded up to 512 bytes.
/// On an error no file is left behind.
pub fn create_qcow2(path: &Path, size_bytes: u64, opts: &CreateOptions) -> Result<(), BlockError> {
    let refused = |source| BlockError::Header { path: path.to_owned(), source };
    let size_bytes =
        size_bytes.checked_next_multiple_of(512).ok_or_else(|| refused(image::qcow2::HeaderError::Size(size_bytes)))?;
    let backing = opts.backing.as_ref().map(|(name, format)| {
        let text = name.to_str().ok_or_else(|| refused(image::qcow2::HeaderError::BackingNameText))?;
        Ok((text.to_owned(), format.name().to_owned()))
    });
    let new = NewImage {
        size_bytes,
        cluster_bits: opts.cluster_bits,
        version: opts.version,
        refcount_order: 4,
        backing: backing.transpose()?,
    };
    let layout = lay_out(&new).map_err(refused)?;
    create_file(path, |file| {
        for (offset, bytes) in &layout.pieces {
            pwrite(file, *offset, &WriteBufs::from_slice(bytes))?;
        }
        file.set_len(layout.file_bytes)
    })
}

/// Creates a sparse raw image. The size is rounded up to 512 bytes. On an error no file is left behind.
pub fn create_raw(path: &Path, size_bytes: u64) -> Result<(), BlockError> {
    let size_bytes = size_bytes.checked_next_multiple_of(512).unwrap_or(u64::MAX);
    create_file(path, |file| file.set_len(size_bytes))
}

fn create_file(path: &Path, fill: impl FnOnce(&File) -> std::io::Result<()>) -> Result<(), BlockError> {
    let failed = |e| BlockError::io(path, Action::Create, e);
    let file = FileOptions::new().write(true).create_new(true).mode(0o644).open(path).map_err(failed)?;
    let filled = fill(&file).and_then(|()| file.sync_all());
    if let Err(error) = filled {
        // The first error is what matters; a file that cannot even be removed is visible to the user.
        let _ = std::fs::remove_file(path);
        return Err(failed(error));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}
