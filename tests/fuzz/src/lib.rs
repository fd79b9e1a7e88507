//! Fuzz targets: every parser of hostile bytes as a function of bytes that must return, true where it took the
//! bytes for what they should be.
//!
//! `cargo test -p fuzz` runs each on its corpus and on a bounded number of changed and invented inputs, on stable Rust.
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz/libfuzzer TARGET` runs one without bound, guided by coverage.
#![forbid(unsafe_code)]

mod archives;
mod code;
mod deflate;
mod disks;
mod images;
mod names;
mod nbd;
mod protocols;

/// A target: its name, which is its folder below `corpus`, and the function.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All targets.
pub const TARGETS: [Target; 16] = [
    ("frames", protocols::frames),
    ("monitor", protocols::monitor_lines),
    ("domain_xml", protocols::domain_xml),
    ("qcow2", images::qcow2),
    ("kernel", images::kernel),
    ("code", code::code),
    ("vmdk", disks::vmdk),
    ("vdi", disks::vdi),
    ("vpc", disks::vpc),
    ("vhdx", disks::vhdx),
    ("qcow2_disk", disks::qcow2_disk),
    ("luks", disks::luks),
    ("names", names::names),
    ("nbd", nbd::nbd),
    ("deflate", deflate::deflate),
    ("ova", archives::ova),
];

/// Runs a target by name: whether it took the bytes. Unknown names take nothing.
pub fn run(name: &str, data: &[u8]) -> bool {
    TARGETS.iter().find(|(n, _)| *n == name).is_some_and(|(_, target)| target(data))
}
