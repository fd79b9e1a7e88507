//! The tests of virsh once more with the virsh of Debian's backports, which is unpacked and never installed. They fetch
//! packages, so they run where `VIREO_TEST_LONG` is set.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program and its libraries, those of Debian 12 that its own virsh does without included.
const PACKAGES: [&str; 5] =
    ["libvirt-clients/bookworm-backports", "libvirt0/bookworm-backports", "libjson-c5", "libbsd0", "libmd0"];

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The packages' files, fetched once and kept beside the build.
fn unpacked() -> PathBuf {
    let beside = Path::new(env!("CARGO_TARGET_TMPDIR")).join("virsh-backports");
    if beside.join("usr/bin/virsh").is_file() {
        return beside;
    }
    let downloads = tempfile::tempdir().unwrap();
    for package in PACKAGES {
        let mut fetch = Command::new("apt-get");
        // Only root's files can be handed to apt's own user, and only by root.
        fetch.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]);
        run(fetch.current_dir(downloads.path()));
    }
    // Renamed when complete: a run that is broken off leaves nothing half done.
    let unfinished = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for archive in fs::read_dir(downloads.path()).unwrap().flatten() {
        run(Command::new("dpkg-deb").arg("-x").arg(archive.path()).arg(unfinished.path()));
    }
    match fs::rename(unfinished.path(), &beside) {
        Err(error) if !beside.is_dir() => panic!("{}: {error}", beside.display()),
        _ => beside,
    }
}

#[test]
fn the_virsh_of_backports_says_the_same() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        return;
    }
    let files = unpacked();
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("virsh");
    let libraries = ["usr/lib", "lib"].map(|place| {
        let directory = files.join(place).join(format!("{}-linux-gnu", std::env::consts::ARCH));
        directory.display().to_string()
    });
    let script = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' \"$@\"\n",
        libraries.join(":"),
        files.join("usr/bin/virsh").display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let version = run(Command::new(&program).arg("--version"));
    assert!(version.starts_with("11."), "the virsh of backports is {version}");
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap_or_default());
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["virsh::", "survival::", "consoles::"]).env("PATH", path);
    let output = tests.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("running 0 tests"), "with virsh {version}{said}");
}
