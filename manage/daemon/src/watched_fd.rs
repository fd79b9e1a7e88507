//! Descriptors that the runtime waits for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Has the runtime watch a descriptor, which the watch owns.
// The constructor is deprecated because types exist whose descriptor number changes while it is watched. An `OwnedFd`
// is not one of them, and the constructor's replacement is unsafe for everyone.
#[allow(deprecated)]
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}
