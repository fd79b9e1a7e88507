//! New vmdk images.

use std::path::Path;

use image::vmdk::SECTOR_BYTES;
use image::vmdk::layout::{AdapterType, NewExtent, NewImage, Subformat, lay_out};

use crate::create::{Preallocation, format_raw};
use crate::error::BlockError;
use crate::io::FileBackend;
use crate::mapped::{random_uuid, refused, write_new};

/// How a vmdk is created. The defaults are qemu-img's.
#[derive(Clone, Debug)]
pub struct VmdkOptions {
    /// `subformat`.
    pub subformat: Subformat,
    /// `adapter_type`.
    pub adapter_type: AdapterType,
    /// `hwversion`; `None` for `undefined`.
    pub hw_version: Option<String>,
    /// `toolsversion`.
    pub tools_version: Option<String>,
    /// `compat6`; excludes `hwversion`.
    pub compat6: bool,
    /// `zeroed_grain`.
    pub zeroed_grain: bool,
    /// `backing_file` as it shall be stored, and the CID of that image: see [`super::vmdk_descriptor`].
    pub backing: Option<(String, u32)>,
}

impl Default for VmdkOptions {
    fn default() -> VmdkOptions {
        VmdkOptions {
            subformat: Subformat::MonolithicSparse,
            adapter_type: AdapterType::Ide,
            hw_version: None,
            tools_version: None,
            compat6: false,
            zeroed_grain: false,
            backing: None,
        }
    }
}

/// Writes an empty vmdk into `file`, whose contents are lost; `path` names it in errors and in its descriptor. The files
/// of [`vmdk_extents`] belong to it.
pub fn create_vmdk(file: &dyn FileBackend, path: &Path, size_bytes: u64, opts: &VmdkOptions) -> Result<(), BlockError> {
    let layout = lay_out(&new_image(path, size_bytes, opts)?).map_err(|e| refused(path, e))?;
    write_new(file, path, &layout)
}

/// The files beside a new vmdk, which [`create_vmdk_extent`] makes: none where the image is one file.
pub fn vmdk_extents(path: &Path, size_bytes: u64, opts: &VmdkOptions) -> Result<Vec<NewExtent>, BlockError> {
    let new = new_image(path, size_bytes, opts)?;
    let extents = new.extents().map_err(|e| refused(path, e))?;
    if !extents.is_empty() {
        // What cannot be described is refused before any file is made.
        lay_out(&new).map_err(|e| refused(path, e))?;
    }
    Ok(extents)
}

/// Writes one of the files beside a new vmdk into `file`, whose contents are lost; `path` names it in errors. `room` is
/// for bytes that are there as they are.
pub fn create_vmdk_extent(
    file: &dyn FileBackend,
    path: &Path,
    extent: &NewExtent,
    opts: &VmdkOptions,
    room: Preallocation,
) -> Result<(), BlockError> {
    let size_bytes = extent.sectors * SECTOR_BYTES;
    if opts.subformat.is_flat() {
        return format_raw(file, path, size_bytes, room);
    }
    write_new(file, path, &new_image(path, size_bytes, opts)?.lay_out_extent(extent))
}

fn new_image(path: &Path, size_bytes: u64, opts: &VmdkOptions) -> Result<NewImage, BlockError> {
    Ok(NewImage {
        size_bytes,
        subformat: opts.subformat,
        adapter_type: opts.adapter_type,
        hw_version: opts.hw_version.clone(),
        tools_version: opts.tools_version.clone(),
        compat6: opts.compat6,
        zeroed_grain: opts.zeroed_grain,
        file_name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        cid: random_cid(path)?,
        parent: opts.backing.clone(),
    })
}

/// A random CID; all ones and all zeroes have meanings of their own.
pub(super) fn random_cid(path: &Path) -> Result<u32, BlockError> {
    let [a, b, c, d, ..] = random_uuid(path)?;
    Ok(u32::from_le_bytes([a, b, c, d]).clamp(1, u32::MAX - 1))
}
