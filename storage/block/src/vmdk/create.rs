//! New vmdk images.

use std::path::Path;

use image::vmdk::layout::{AdapterType, NewImage, Subformat, lay_out};

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

/// Writes an empty vmdk into `file`, whose contents are lost; `path` names it in errors and in its descriptor.
pub fn create_vmdk(file: &dyn FileBackend, path: &Path, size_bytes: u64, opts: &VmdkOptions) -> Result<(), BlockError> {
    let new = NewImage {
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
    };
    let layout = lay_out(&new).map_err(|e| refused(path, e))?;
    write_new(file, path, &layout)
}

/// A random CID; all ones and all zeroes have meanings of their own.
pub(super) fn random_cid(path: &Path) -> Result<u32, BlockError> {
    let [a, b, c, d, ..] = random_uuid(path)?;
    Ok(u32::from_le_bytes([a, b, c, d]).clamp(1, u32::MAX - 1))
}
