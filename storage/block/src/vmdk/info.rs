//! What a vmdk says about itself, and whether its tables make sense.

use std::path::PathBuf;

use image::vmdk::SECTOR_BYTES;

use super::{PartKind, VmdkNode};
use crate::error::BlockError;
use crate::foreign::{ForeignReport, Places};
use crate::mapped::Entry;

/// What only a vmdk says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkInfo {
    /// Changes with the contents.
    pub cid: u32,
    /// The parent's CID when the image was made; `0xffff_ffff` without a parent.
    pub parent_cid: u32,
    /// `monolithicSparse` and others; empty for an extent without a descriptor.
    pub create_type: String,
    /// In the order of the disk.
    pub extents: Vec<VmdkExtentInfo>,
}

/// An extent of a vmdk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkExtentInfo {
    /// Size of its part of the disk.
    pub size_bytes: u64,
    /// Its file; `None` where the descriptor says that there are zeroes.
    pub path: Option<PathBuf>,
    /// Grain size; 0 for a flat one.
    pub cluster_bytes: u64,
    /// `SPARSE`, `FLAT` or `ZERO`; empty for an image in one file.
    pub kind: &'static str,
    /// Whether its grains are compressed.
    pub compressed: bool,
}

impl VmdkNode {
    /// What the image says about itself.
    pub(crate) fn info(&self) -> VmdkInfo {
        let single = self.is_single;
        let extents = self.parts.iter().map(|part| VmdkExtentInfo {
            size_bytes: part.bytes,
            path: part.kind.path().cloned(),
            cluster_bytes: part.kind.grain_bytes().unwrap_or(0),
            kind: if single { "" } else { part.kind.name() },
            compressed: part.kind.is_compressed(),
        });
        VmdkInfo {
            cid: self.descriptor.as_ref().map_or(0, |descriptor| descriptor.cid),
            parent_cid: self.descriptor.as_ref().map_or(u32::MAX, |descriptor| descriptor.parent_cid),
            create_type: self.descriptor.as_ref().map_or_else(String::new, |descriptor| descriptor.create_type.clone()),
            extents: extents.collect(),
        }
    }

    /// Looks for entries that make no sense and for grains with two owners.
    pub(crate) fn check(&self) -> Result<ForeignReport, BlockError> {
        let mut report = ForeignReport::default();
        for part in &self.parts {
            let PartKind::Sparse(disk) = &part.kind else { continue };
            let unit = if disk.table.is_compressed() { SECTOR_BYTES } else { disk.block_bytes() };
            let mut places = Places::new(disk.store.len_bytes()?, unit);
            disk.check(&mut report, &mut |grain, entry, report| {
                if let Entry::At(offset) | Entry::Packed(offset) = entry
                    && !places.claim(offset)
                {
                    report.add(|| format!("grain {grain} is at {offset:#x}, where another grain is"));
                }
            })?;
        }
        Ok(report)
    }
}

impl PartKind {
    fn name(&self) -> &'static str {
        match self {
            PartKind::Flat(..) => "FLAT",
            PartKind::Zero => "ZERO",
            PartKind::Sparse(_) | PartKind::Stream(_) => "SPARSE",
        }
    }

    fn path(&self) -> Option<&PathBuf> {
        match self {
            PartKind::Flat(store, _) => Some(&store.path),
            PartKind::Zero => None,
            PartKind::Sparse(disk) => Some(&disk.store.path),
            PartKind::Stream(stream) => Some(stream.path()),
        }
    }

    fn is_compressed(&self) -> bool {
        match self {
            PartKind::Flat(..) | PartKind::Zero => false,
            PartKind::Sparse(disk) => disk.table.is_compressed(),
            PartKind::Stream(_) => true,
        }
    }
}
