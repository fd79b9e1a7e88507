//! Random bytes of the host.

use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Action, BlockError};

/// Fills `out`; `path` names in errors what they are for.
pub(crate) fn fill_random(path: &Path, out: &mut [u8]) -> Result<(), BlockError> {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match getrandom(rest, GetRandomFlags::empty()) {
            Ok(got) => done += got,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(BlockError::io(path, Action::Create, errno.into())),
        }
    }
    Ok(())
}
