//! Why an image is not changed as asked. Nothing has changed when one of these comes back.

use image::qcow2::bitmaps::BitmapError;
use image::qcow2::{HeaderError, SnapshotError};
use thiserror::Error;

/// A refusal of an operation on an image as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum MaintenanceError {
    #[error("no snapshot has the name or number '{name}'; list them to see which there are")]
    SnapshotNotFound { name: String },
    #[error("the snapshot table cannot be used")]
    Snapshots(#[source] SnapshotError),
    #[error("the bitmap directory cannot be used")]
    Bitmaps(#[source] BitmapError),
    #[error(
        "cluster {offset:#x} has {max} references, the most that refcounts of this width can count; delete a snapshot, or give the image wider refcounts"
    )]
    RefcountOverflow { offset: u64, max: u64 },
    #[error("the L2 table at {offset:#x} is used twice in one L1 table; run a check on the image")]
    SharedL2 { offset: u64 },
    #[error("an image of version 2 cannot be resized while it has snapshots; delete them, or upgrade it to compat=1.1")]
    SnapshotsInVersion2,
    #[error(
        "the new size {to_bytes} is smaller than the present {from_bytes}, and shrinking was not allowed; data behind the new end is lost by it"
    )]
    ShrinkNotAllowed { from_bytes: u64, to_bytes: u64 },
    #[error("the new header is refused")]
    Header(#[source] HeaderError),
    #[error("{what} cannot be changed on this image: {reason}")]
    Unsupported { what: &'static str, reason: &'static str },
    #[error("an image with an external data file cannot have {what}")]
    NotWithDataFile { what: &'static str },
    #[error("no bitmap has the name '{name}'")]
    BitmapNotFound { name: String },
    #[error("a bitmap named '{name}' exists already")]
    BitmapExists { name: String },
    #[error("bitmap '{name}' was not stored by its last writer, so it may miss changes; remove it")]
    BitmapInconsistent { name: String },
    #[error("bitmap '{name}' is of a disk of {have} bytes, the other one of a disk of {other}: they cannot be merged")]
    BitmapSizes { name: String, have: u64, other: u64 },
}

impl MaintenanceError {
    /// What a message begins with: that the image is not changed, or that it is damaged, whatever was to be done.
    pub(crate) fn heading(&self) -> &'static str {
        match self {
            MaintenanceError::Snapshots(SnapshotError::Extra { .. }) => "the image is damaged",
            MaintenanceError::Bitmaps(
                BitmapError::Extension { .. }
                | BitmapError::Directory { .. }
                | BitmapError::CutOff { .. }
                | BitmapError::Type { .. }
                | BitmapError::Table { .. }
                | BitmapError::Flags { .. }
                | BitmapError::Entry { .. },
            ) => "the image is damaged",
            other if other.is_damage() => "the image is damaged",
            _ => "the image cannot be changed as asked",
        }
    }

    /// Whether the image contradicts itself.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            MaintenanceError::SharedL2 { .. }
                | MaintenanceError::Snapshots(SnapshotError::CutOff { .. } | SnapshotError::L1 { .. })
        )
    }
}
