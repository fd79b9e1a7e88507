//! The formats of other vendors behind one door: opening, describing and checking them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::Format;

use crate::error::BlockError;
use crate::io::FileBackend;
use crate::node::Node;
use crate::vdi::{check_vdi, open_vdi};
use crate::vhdx::{check_vhdx, open_vhdx};
use crate::vmdk::{VmdkInfo, open_vmdk, vmdk_extent_names};
use crate::vpc::open_vpc;

/// An image of another vendor's format, as open files.
pub struct ForeignImage {
    /// The image's own file.
    pub file: Arc<dyn FileBackend>,
    /// Its name in errors.
    pub path: PathBuf,
    /// What it is: not raw, not LUKS and not qcow2.
    pub format: Format,
    /// The files of [`ForeignImage::extent_names`], in that order, with their names in errors.
    pub extents: Vec<(Arc<dyn FileBackend>, PathBuf)>,
}

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignInfo {
    /// Size of the disk.
    pub size_bytes: u64,
    /// The unit in which space is taken; 0 where there is none.
    pub cluster_bytes: u64,
    /// Storage of all its files on the host.
    pub allocated_bytes: u64,
    /// Name of the backing file as stored; only vmdk has one.
    pub backing_name: Option<String>,
    /// What only a vmdk says.
    pub vmdk: Option<VmdkInfo>,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignReport {
    /// Contradictions, in words; the first thousand.
    pub findings: Vec<String>,
    /// How many there are.
    pub corruptions: u64,
}

impl ForeignReport {
    pub(crate) fn add(&mut self, finding: impl FnOnce() -> String) {
        self.corruptions += 1;
        if self.findings.len() < 1000 {
            self.findings.push(finding());
        }
    }
}

/// Which places of a file have an owner: one bit for each block.
pub(crate) struct Places {
    block_bytes: u64,
    /// Where blocks start, modulo their size: as the first one does.
    phase: Option<u64>,
    owned: Vec<u64>,
}

impl Places {
    /// Bits of a file of 2^40 of the smallest grains in use; in a larger one, owners are not told apart.
    const WORDS_MAX: u64 = 1 << 21;

    pub(crate) fn new(file_bytes: u64, block_bytes: u64) -> Places {
        let words = (file_bytes / block_bytes.max(1)) / 64 + 1;
        let owned = if words > Places::WORDS_MAX { Vec::new() } else { vec![0; words as usize] };
        Places { block_bytes: block_bytes.max(1), phase: None, owned }
    }

    /// Takes a place; `false` when it has an owner already. Blocks that start between the others are not held
    /// against them.
    pub(crate) fn claim(&mut self, offset: u64) -> bool {
        let phase = *self.phase.get_or_insert(offset % self.block_bytes);
        let number = offset / self.block_bytes;
        match self.owned.get_mut((number / 64) as usize) {
            Some(word) if offset % self.block_bytes == phase => {
                let bit = 1 << (number % 64);
                std::mem::replace(word, *word | bit) & bit == 0
            }
            _ => true,
        }
    }
}

impl ForeignImage {
    /// An image in one file.
    pub fn new(file: Arc<dyn FileBackend>, path: &Path, format: Format) -> ForeignImage {
        ForeignImage { file, path: path.to_owned(), format, extents: Vec::new() }
    }

    /// Names of the files beside this one that belong to the image, none of them a path: only a vmdk has some.
    /// Whoever may open files of the image's directory opens them, read only or as this one, into
    /// [`ForeignImage::extents`].
    pub fn extent_names(&self) -> Result<Vec<String>, BlockError> {
        match self.format {
            Format::Vmdk => vmdk_extent_names(self.file.clone(), &self.path),
            _ => Ok(Vec::new()),
        }
    }

    /// Reads what the image says about itself. Its backing file is not looked at.
    pub fn inspect(self) -> Result<ForeignInfo, BlockError> {
        if self.format == Format::Vmdk {
            let node = open_vmdk(self.file, self.path, self.extents, true, true)?;
            return Ok(ForeignInfo { vmdk: Some(node.info()), ..describe(&node)? });
        }
        describe(&*open_foreign(self, true, true)?)
    }

    /// Looks for contradictions in the tables. `None`: the format has no check, as in QEMU.
    pub fn check(self) -> Result<Option<ForeignReport>, BlockError> {
        match self.format {
            Format::Vdi => check_vdi(self.file, self.path).map(Some),
            Format::Vhdx => check_vhdx(self.file, self.path).map(Some),
            Format::Vmdk => {
                let node = open_vmdk(self.file, self.path, self.extents, true, true)?;
                node.check().map(Some)
            }
            _ => Ok(None),
        }
    }
}

fn describe(node: &dyn Node) -> Result<ForeignInfo, BlockError> {
    Ok(ForeignInfo {
        size_bytes: node.size_bytes(),
        cluster_bytes: node.cluster_bytes(),
        allocated_bytes: node.allocated_bytes()?,
        backing_name: node.backing_name(),
        vmdk: None,
    })
}

/// Opens an image as a layer of a disk. `no_sync`: never wait for stable storage.
pub(crate) fn open_foreign(image: ForeignImage, read_only: bool, no_sync: bool) -> Result<Arc<dyn Node>, BlockError> {
    let ForeignImage { file, path, format, extents } = image;
    Ok(match format {
        Format::Vdi => Arc::new(open_vdi(file, path, read_only, no_sync)?),
        Format::Vmdk => Arc::new(open_vmdk(file, path, extents, read_only, no_sync)?),
        Format::Vhdx => Arc::new(open_vhdx(file, path, read_only, no_sync)?),
        Format::Vpc => open_vpc(file, path, read_only, no_sync)?,
        Format::Raw | Format::Luks | Format::Qcow2 => return Err(BlockError::NotForeign { path, format }),
    })
}

#[test]
fn a_place_has_one_owner() {
    let mut places = Places::new(1 << 20, 4096);
    for (offset, free) in [(512, true), (512 + 4096, true), (512, false), (1024, true), (1 << 40, true), (512, false)] {
        assert_eq!(places.claim(offset), free, "{offset}");
    }
}
