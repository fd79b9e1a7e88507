//! A chain of images as its files say it is: for `info --backing-chain`, `tree` and `explain`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use block::{
    BitmapInfo, BlockError, CHAIN_MAX, CacheMode, ImageInfo, Qcow2Image, Snapshot, beside, inspect, inspect_backend,
};

use block::spec::ImageSpec;

use crate::error::ImgError;
use crate::layers;
use crate::open::{self, Access, Named};

/// One image of a chain, and what it says.
pub struct Found {
    /// How outputs call it.
    pub name: String,
    /// As it is reached from where the tool runs.
    pub path: PathBuf,
    /// Its header.
    pub info: ImageInfo,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Its persistent bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
    /// How its file is reached: `file` or `nbd`.
    pub protocol: &'static str,
}

impl Found {
    /// Where its backing file is, if it has one.
    pub fn backing_path(&self) -> Option<PathBuf> {
        self.info.backing_name.as_ref().map(|name| beside(&self.path, name))
    }
}

/// Walks down a chain, one image at a time.
pub struct Walk {
    next: Option<Named>,
    share: bool,
    seen: HashSet<PathBuf>,
}

impl Walk {
    /// From an image on. `share` takes no locks.
    pub fn new(named: Named, share: bool) -> Walk {
        Walk { next: Some(named), share, seen: HashSet::new() }
    }

    fn step(&mut self, named: &Named) -> Result<Found, ImgError> {
        if named.is_export() {
            return of_export(named);
        }
        let path = named.plain_path()?.to_owned();
        let failed = |source| ImgError::Open { name: named.label.clone(), source };
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        if self.seen.len() == CHAIN_MAX {
            return Err(failed(BlockError::TooDeep { path, max: CHAIN_MAX }));
        }
        if !self.seen.insert(real) {
            return Err(failed(BlockError::Loop { path }));
        }
        let access = Access { write: false, share: self.share, cache: CacheMode::Writeback };
        let top = open::top(named, access)?;
        let info = inspect(&path, named.spec.driver).map_err(failed)?;
        let (snapshots, bitmaps) = kept_inside(&info, || Qcow2Image::open(top, true)).map_err(failed)?;
        let name = match named.spec.key_secret {
            Some(_) => ImageSpec { driver: Some(info.format), ..named.spec.clone() }.to_string(),
            None => path.display().to_string(),
        };
        let found = Found { name, path, info, snapshots, bitmaps, protocol: "file" };
        if let Some(below) = found.backing_path() {
            let below = Named::new(below.as_os_str(), false, found.info.backing_format.as_deref())?;
            self.next = Some(below.with(named.secrets.clone()));
        }
        Ok(found)
    }
}

impl Iterator for Walk {
    type Item = Result<Found, ImgError>;

    fn next(&mut self) -> Option<Result<Found, ImgError>> {
        let named = self.next.take()?;
        Some(self.step(&named))
    }
}

/// What an image says that a server exports. What is below it is on the server's host.
fn of_export(named: &Named) -> Result<Found, ImgError> {
    let failed = |source| ImgError::Open { name: named.label.clone(), source };
    let layer = layers::top(named)?;
    let (info, path) = (inspect_backend(&layer).map_err(failed)?, layer.path_label.clone());
    let (snapshots, bitmaps) = kept_inside(&info, || Qcow2Image::open_backend(layer, true)).map_err(failed)?;
    Ok(Found { name: path.display().to_string(), path, info, snapshots, bitmaps, protocol: "nbd" })
}

/// Snapshots and bitmaps of an image, which is opened only if it has some.
fn kept_inside(
    info: &ImageInfo,
    open: impl FnOnce() -> Result<Qcow2Image, BlockError>,
) -> Result<(Vec<Snapshot>, Vec<BitmapInfo>), BlockError> {
    match info.qcow2 {
        Some(qcow2) if qcow2.snapshots > 0 || qcow2.has_bitmaps => {
            let image = open()?;
            Ok((image.snapshots()?, image.bitmaps()?))
        }
        _ => Ok((Vec::new(), Vec::new())),
    }
}

/// The last part of a path, for people.
pub fn short(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
