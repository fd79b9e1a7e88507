//! The descriptor of a vmdk: found, named, and given a new CID when the contents change.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use image::vmdk::{DESCRIPTOR_MAX_BYTES, Descriptor, ExtentKind, SparseHeader, VmdkError, replace_cid};

use super::create::random_cid;
use super::sparse::read_header;
use crate::error::BlockError;
use crate::io::FileBackend;
use crate::mapped::Store;

/// Where a descriptor is in its file.
#[derive(Clone, Copy)]
pub(super) struct Place {
    offset: u64,
    /// How long it can be where it is embedded; `None` when it is the whole file.
    room: Option<u64>,
}

/// The descriptor, whose CID changes with the first write.
pub(super) struct Identity {
    pub(super) store: Store,
    place: Option<Place>,
    changed: Mutex<bool>,
}

/// The descriptor of a vmdk and where it is: embedded in the extent with `header`, or the file itself. `None` for an
/// extent without one.
pub(super) fn find_descriptor(
    store: &Store,
    header: Option<&SparseHeader>,
) -> Result<Option<(Descriptor, Place)>, BlockError> {
    let Some(header) = header else {
        let text = store.read_vec(0, DESCRIPTOR_MAX_BYTES + 1)?;
        let descriptor = Descriptor::parse(&text).map_err(|e| store.refused(e))?;
        return Ok(Some((descriptor, Place { offset: 0, room: None })));
    };
    let range = header.descriptor_range(store.len_bytes()?).map_err(|e| store.refused(e))?;
    let Some((offset, bytes)) = range else { return Ok(None) };
    let text = store.read_vec(offset, bytes)?;
    // One that is empty is as good as none.
    if text.first().is_none_or(|byte| *byte == 0) {
        return Ok(None);
    }
    let descriptor = Descriptor::parse_embedded(&text).map_err(|e| store.refused(e))?;
    Ok(Some((descriptor, Place { offset, room: Some(bytes) })))
}

/// The header of a sparse extent; `None` when the file does not start as one.
pub(super) fn sparse_header(store: &Store) -> Result<Option<SparseHeader>, BlockError> {
    let first = store.read_vec(0, 4)?;
    if first == b"COWD" {
        return Err(store.refused(VmdkError::Cowd));
    }
    if first == b"KDMV" { read_header(store).map(Some) } else { Ok(None) }
}

/// Names of the extent files that belong to the vmdk in `file`, in the order in which it is opened with them. They
/// are plain names: the caller opens them in the image's own directory, if it may at all. Empty for an image in one
/// file.
pub fn vmdk_extent_names(file: Arc<dyn FileBackend>, path: &Path) -> Result<Vec<String>, BlockError> {
    let store = Store { file, path: path.to_owned(), no_sync: false };
    if sparse_header(&store)?.is_some() {
        return Ok(Vec::new());
    }
    let extents = find_descriptor(&store, None)?.map(|(descriptor, _)| descriptor.extents).unwrap_or_default();
    Ok(extents.into_iter().filter(|extent| extent.kind != ExtentKind::Zero).map(|extent| extent.name).collect())
}

/// What the descriptor of a vmdk says; `None` for an extent without one.
pub fn vmdk_descriptor(file: Arc<dyn FileBackend>, path: &Path) -> Result<Option<Descriptor>, BlockError> {
    let store = Store { file, path: path.to_owned(), no_sync: false };
    let header = sparse_header(&store)?;
    Ok(find_descriptor(&store, header.as_ref())?.map(|(descriptor, _)| descriptor))
}

impl Identity {
    pub(super) fn new(store: Store, place: Option<Place>) -> Identity {
        Identity { store, place, changed: Mutex::new(false) }
    }

    /// Gives the contents a new CID before they change for the first time, so that images which have this one as
    /// their parent can tell.
    pub(super) fn change(&self) -> Result<(), BlockError> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if let (false, Some(Place { offset, room })) = (*changed, self.place) {
            let text = self.store.read_vec(offset, room.unwrap_or(DESCRIPTOR_MAX_BYTES))?;
            if let Some(text) = replace_cid(&text, random_cid(&self.store.path)?) {
                self.put(text, offset, room)?;
            }
        }
        *changed = true;
        Ok(())
    }

    fn put(&self, mut text: Vec<u8>, offset: u64, room: Option<u64>) -> Result<(), BlockError> {
        let bytes = text.len() as u64;
        match room {
            Some(room) if bytes > room => return Err(self.store.refused(VmdkError::DescriptorTooLarge { bytes })),
            Some(room) => text.resize(room as usize, 0),
            None => {}
        }
        self.store.write_slice(offset, &text)?;
        if room.is_none() { self.store.set_len_bytes(bytes) } else { Ok(()) }
    }

    /// Waits until a descriptor that was changed is on stable storage.
    pub(super) fn flush(&self) -> Result<(), BlockError> {
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed { self.store.sync() } else { Ok(()) }
    }
}
