//! What this host lets a process do, found by trying: settings under `/proc` do not show what a container refuses.

use rustix::io::Errno;
use rustix::io_uring::{io_uring_params, io_uring_setup};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Per facility, what the kernel answered to the first call that any user of it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostReport {
    /// io_uring_setup(2)
    pub io_uring: Result<(), Errno>,
    /// landlock_create_ruleset(2), asked for its version
    pub landlock: Result<(), Errno>,
    /// unshare(2) with CLONE_NEWUSER
    pub user_namespaces: Result<(), Errno>,
}

/// Tries everything. The calling process may be in a user namespace of its own afterwards: it has nothing else to do. It
/// must have a single thread, or the kernel refuses the namespace for that reason.
#[allow(unsafe_code)]
pub fn probe() -> HostReport {
    let mut params = io_uring_params::default();
    // SAFETY: the parameters ask for nothing but a ring, whose descriptor is closed at once; no memory of it is mapped.
    let io_uring = unsafe { io_uring_setup(1, &mut params) }.map(drop);
    // SAFETY: a new user namespace changes rights, and neither memory nor descriptors.
    let user_namespaces = unsafe { unshare_unsafe(UnshareFlags::NEWUSER) };
    HostReport { io_uring, landlock: landlock(), user_namespaces }
}

#[allow(unsafe_code)]
fn landlock() -> Result<(), Errno> {
    // landlock_create_ruleset(2): without attributes and with this flag it answers with its version and makes nothing.
    const VERSION: libc::c_long = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: the call reads no memory where the length is 0, and opens no descriptor.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0 as libc::size_t, VERSION) };
    if answer < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOSYS))
    } else {
        Ok(())
    }
}

impl HostReport {
    /// One object: per facility `null` where it works, else the kernel's answer as number and text.
    pub fn to_json(&self) -> serde_json::Value {
        let shown = |result: Result<(), Errno>| {
            result.err().map(|errno| {
                let text = std::io::Error::from(errno).to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                serde_json::json!({ "errno": errno.raw_os_error(), "text": text })
            })
        };
        let HostReport { io_uring, landlock, user_namespaces } = *self;
        serde_json::json!({
            "io_uring": shown(io_uring), "landlock": shown(landlock), "user_namespaces": shown(user_namespaces),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_its_number_and_text() {
        let report =
            HostReport { io_uring: Err(Errno::PERM), landlock: Err(Errno::OPNOTSUPP), user_namespaces: Ok(()) };
        let expected = serde_json::json!({
            "io_uring": { "errno": 1, "text": "Operation not permitted" },
            "landlock": { "errno": 95, "text": "Operation not supported" },
            "user_namespaces": null,
        });
        assert_eq!(report.to_json(), expected);
    }
}
