//! Where the programs under test are.

use std::path::{Path, PathBuf};

/// A program of the workspace, from the directory that the running test was built in.
///
/// # Panics
/// Where it has not been built.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    // target/debug/deps/TEST
    let directory = own.parent().and_then(Path::parent).expect("a test lies in a build directory");
    let path = directory.join(name);
    assert!(path.is_file(), "{} is missing: `cargo build --workspace` builds it", path.display());
    path
}

/// What `cargo xtask test` names in the environment.
///
/// # Panics
/// Where it is not set or does not exist.
pub fn built(variable: &str) -> PathBuf {
    let Some(value) = std::env::var_os(variable) else {
        panic!(
            "{variable} is not set: `cargo xtask test` builds the guests and sets it, `cargo xtask guest` says where"
        );
    };
    let path = PathBuf::from(value);
    assert!(path.exists(), "{variable} names {}, which does not exist: `cargo xtask guest` builds it", path.display());
    path
}
