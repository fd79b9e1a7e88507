//! What attackers have done to qemu-img and its callers with an image, done to this tool.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What no output may ever hold.
const SECRET: &[u8] = b"root:$6$the-host's-secret";
/// More memory than any of these may take: it leaves none to an allocation that a header's field sizes.
const ADDRESS_SPACE: &str = "--as=268435456";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        std::fs::write(place.path("secret"), SECRET.repeat(4096)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &Path, args: &[&str]) -> Output {
        Command::new("prlimit")
            .args([ADDRESS_SPACE, "--cpu=5"])
            .arg(program)
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    fn ours(&self, args: &[&str]) -> Output {
        self.run(Path::new(env!("CARGO_BIN_EXE_vireo-img")), args)
    }

    fn make(&self, args: &[&str]) {
        let out = Command::new("qemu-img").args(args).current_dir(self.0.path()).output().unwrap();
        assert!(out.status.success(), "{args:?}: {out:?}");
    }

    /// A qcow2 image of 1 MiB with an internal snapshot `s`.
    fn qcow2(&self, name: &str) {
        self.make(&["create", "-q", "-f", "qcow2", name, "1M"]);
        self.make(&["snapshot", "-c", "s", name]);
    }

    fn poke(&self, name: &str, at: usize, bytes: &[u8]) {
        let mut all = std::fs::read(self.path(name)).unwrap();
        all.splice(at..at + bytes.len(), bytes.iter().copied());
        std::fs::write(self.path(name), all).unwrap();
    }

    /// Where the header says that something is.
    fn pointer(&self, name: &str, at: usize) -> usize {
        let all = std::fs::read(self.path(name)).unwrap();
        u64::from_be_bytes(all[at..at + 8].try_into().unwrap()) as usize
    }

    /// It fails, with the exit code of its kind, and says why.
    fn refused(&self, args: &[&str], why: &str) {
        let out = self.ours(args);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(if args[0] == "compare" { 2 } else { 1 }), "{args:?}: {out:?}");
        assert!(said.contains(why), "{args:?}: {said}");
    }

    fn leaks_nothing(&self) {
        for name in ["out.raw", "out.qcow2"] {
            let bytes = std::fs::read(self.path(name)).unwrap_or_default();
            assert!(!bytes.windows(SECRET.len()).any(|part| part == SECRET), "{name} holds the secret");
        }
        assert_eq!(std::fs::read(self.path("secret")).unwrap(), SECRET.repeat(4096), "the secret has changed");
    }
}

/// Commands that open an image without being told its format.
const PROBING: &[&[&str]] = &[
    &["convert", "-O", "raw", "evil", "out.raw"],
    &["map", "evil"],
    &["resize", "evil", "8M"],
    &["resize", "--preallocation=full", "evil", "8M"],
    &["compare", "evil", "secret"],
    &["measure", "-O", "raw", "evil"],
    &["rebase", "-b", "", "evil"],
    &["commit", "evil"],
    &["dd", "if=evil", "of=out.raw"],
];

/// The name of a data file opened anything, already for `info`.
#[test]
fn cve_2024_4467_a_data_file_is_no_json() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "evil", "1M"]);
    let name = br#"json:{"driver":"file","filename":"secret"}"#;
    let all = std::fs::read(place.path("evil")).unwrap();
    let at = all.windows(8).position(|part| part == [0x44, 0x41, 0x54, 0x41, 0, 0, 0, 5]).unwrap();
    place.poke("evil", at + 4, &(name.len() as u32).to_be_bytes());
    place.poke("evil", at + 8, &[&name[..], &[0; 16]].concat());
    for args in [&["info", "evil"][..], &["info", "-f", "qcow2", "--output=json", "evil"]] {
        let out = place.ours(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {out:?}");
        assert!(String::from_utf8_lossy(&out.stdout).contains("json:"), "{args:?}: a caller must see it: {out:?}");
    }
    place.refused(&["convert", "-f", "qcow2", "-O", "raw", "evil", "out.raw"], "data file");
    place.leaks_nothing();
}

/// An uploaded image named a file of the host as its data file, and was converted.
#[test]
fn cve_2024_32498_a_probed_image_opens_no_data_file() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "-o", "data_file=secret,data_file_raw=on", "evil", "64k"]);
    std::fs::write(place.path("secret"), SECRET.repeat(4096)).unwrap();
    for args in PROBING {
        place.refused(args, "keeps its data in the file 'secret'");
        place.leaks_nothing();
    }
    let out = place.ours(&["info", "--output=json", "evil"]);
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(said["format-specific"]["data"]["data-file"], "secret", "a caller must see it");
}

/// A guest wrote the header of a qcow2 image into its raw disk; `resize` without a format then changed a file of the
/// host.
#[test]
fn cve_2026_24708_resizing_a_probed_image_changes_no_other_file() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "-o", "data_file=secret,data_file_raw=on", "header", "64k"]);
    std::fs::write(place.path("secret"), SECRET.repeat(4096)).unwrap();
    place.make(&["create", "-q", "-f", "raw", "evil", "4M"]);
    place.poke("evil", 0, &std::fs::read(place.path("header")).unwrap());
    for size in ["8M", "+1M"] {
        place.refused(&["resize", "evil", size], "keeps its data in the file 'secret'");
        place.leaks_nothing();
    }
    let out = place.ours(&["resize", "-f", "raw", "evil", "8M"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(std::fs::metadata(place.path("evil")).unwrap().len(), 8 << 20);
    place.leaks_nothing();
}

/// A guest wrote the header of an image with a backing file into its raw disk, and had it copied.
#[test]
fn cve_2015_1850_a_raw_disk_stays_raw() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "header"]);
    let header = std::fs::read(place.path("header")).unwrap();
    place.make(&["create", "-q", "-f", "raw", "evil", "4M"]);
    place.poke("evil", 0, &header);
    let out = place.ours(&["convert", "-f", "raw", "-O", "raw", "evil", "out.raw"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(std::fs::read(place.path("out.raw")).unwrap()[..header.len()], header);
    place.leaks_nothing();
}

/// An uploaded image named a file of the host below it: callers ask `info` first, which must open nothing else.
#[test]
fn cve_2015_1851_and_5163_info_names_the_backing_file_and_leaves_it() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "evil"]);
    // A pipe would hold up whoever opens it, until the CPU's limit or for ever.
    std::fs::remove_file(place.path("secret")).unwrap();
    let made = Command::new("mkfifo").arg(place.path("secret")).status().unwrap();
    assert!(made.success());
    for args in [&["info", "--output=json", "evil"][..], &["info", "-U", "-f", "qcow2", "--output=json", "evil"]] {
        let out = place.ours(args);
        let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(said["backing-filename"], "secret", "{args:?}");
    }
}

/// A descriptor named a file of the host as an extent.
#[test]
fn cve_2022_47951_an_extent_is_beside_its_descriptor_or_nowhere() {
    let place = Place::new();
    let host = place.path("secret");
    std::fs::create_dir(place.path("uploads")).unwrap();
    for (name, extent) in [("uploads/abs", host.to_str().unwrap()), ("uploads/up", "../secret")] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
             RW 128 FLAT \"{extent}\" 0\nddb.adapterType = \"ide\"\n"
        );
        std::fs::write(place.path(name), text).unwrap();
        for format in [&["-f", "vmdk"][..], &[]] {
            let args = [&["convert"], format, &["-O", "raw", name, "out.raw"]].concat();
            let out = place.ours(&args);
            assert!(format.is_empty() || out.status.code() == Some(1), "{args:?}: {out:?}");
            place.leaks_nothing();
        }
    }
}

/// Fields of a qcow2 header that size a table, one after the other.
#[test]
fn cve_2014_0143_table_sizes_do_not_overflow() {
    for (what, at, bytes) in [
        ("l1_size", 36, &u32::MAX.to_be_bytes()[..]),
        ("l1_size that wraps", 36, &0x2000_0001u32.to_be_bytes()),
        ("refcount_table_clusters", 56, &u32::MAX.to_be_bytes()),
        ("nb_snapshots", 60, &u32::MAX.to_be_bytes()),
        ("size", 24, &u64::MAX.to_be_bytes()),
        ("size that no table maps", 24, &(1u64 << 62).to_be_bytes()),
    ] {
        let place = Place::new();
        place.qcow2("evil");
        place.poke("evil", at, bytes);
        for args in
            [&["check", "evil"][..], &["convert", "-O", "raw", "evil", "out.raw"], &["snapshot", "-a", "s", "evil"]]
        {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{what}: {args:?}: {out:?}");
        }
    }
}

/// Shifts and lengths of a qcow2 header.
#[test]
fn cve_2014_0144_header_fields_are_bounded() {
    for (what, at, value) in [
        ("cluster_bits", 20, 0u32),
        ("cluster_bits", 20, 8),
        ("cluster_bits", 20, 22),
        ("cluster_bits", 20, 63),
        ("cluster_bits", 20, u32::MAX),
        ("backing_file_size", 16, 0xffff_fff0),
        ("refcount_order", 96, 7),
        ("refcount_order", 96, u32::MAX),
        ("header_length", 100, u32::MAX),
        ("header_length", 100, 8),
    ] {
        let place = Place::new();
        place.qcow2("evil");
        if what == "backing_file_size" {
            place.poke("evil", 8, &4096u64.to_be_bytes());
        }
        place.poke("evil", at, &value.to_be_bytes());
        for args in [&["check", "-f", "qcow2", "evil"][..], &["convert", "-f", "qcow2", "-O", "raw", "evil", "out.raw"]]
        {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{what} {value:#x}: {args:?}: {out:?}");
        }
    }
}

/// The L1 table of a snapshot was read into memory that the header's L1 table had sized.
#[test]
fn cve_2014_0145_a_snapshot_has_an_l1_table_of_its_own_size() {
    for l1_size in [u32::MAX, 0x0400_0001, 1 << 20] {
        let place = Place::new();
        place.qcow2("evil");
        let snapshot = place.pointer("evil", 64);
        place.poke("evil", snapshot + 8, &l1_size.to_be_bytes());
        for args in [
            &["snapshot", "-a", "s", "evil"][..],
            &["convert", "-l", "s", "-O", "raw", "evil", "out.raw"],
            &["snapshot", "-d", "s", "evil"],
        ] {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{l1_size:#x}: {args:?}: {out:?}");
        }
    }
}

/// An image that cannot be opened was cleaned up as if it had been.
#[test]
fn cve_2014_0146_a_half_opened_image_is_left_well() {
    for at in [1u64 << 62, 3, u64::MAX] {
        let place = Place::new();
        place.qcow2("evil");
        place.poke("evil", 64, &at.to_be_bytes());
        for args in [&["snapshot", "-l", "evil"][..], &["snapshot", "-a", "s", "evil"], &["resize", "evil", "2M"]] {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{at:#x}: {args:?}: {out:?}");
        }
    }
}

/// Offsets and counts that are negative when taken as signed.
#[test]
fn cve_2014_0147_offsets_have_no_sign() {
    for (what, at, value) in [
        ("refcount_table_offset", 48, 1u64 << 63),
        ("refcount_table_offset", 48, u64::MAX - 0xffff),
        ("l1_table_offset", 40, 1 << 63),
        ("l1_table_offset", 40, u64::MAX - 0xffff),
        ("snapshots_offset", 64, 1 << 63),
    ] {
        let place = Place::new();
        place.qcow2("evil");
        place.poke("evil", at, &value.to_be_bytes());
        for args in [&["resize", "evil", "2M"][..], &["snapshot", "-c", "n", "evil"]] {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{what} {value:#x}: {args:?}: {out:?}");
        }
    }
}

/// Version 1 of the format: its tables and its size overflowed. It is not read at all, and never taken for raw.
#[test]
fn cve_2014_0222_and_0223_qcow_version_1_is_refused() {
    let place = Place::new();
    for (size, cluster_bits, l2_bits) in [(1u64 << 20, 12u8, 255u8), (u64::MAX, 12, 9), (1 << 62, 255, 3)] {
        let mut header = b"QFI\xfb\0\0\0\x01".to_vec();
        header.extend([0; 16]);
        header.extend(size.to_be_bytes());
        header.extend([cluster_bits, l2_bits, 0, 0, 0, 0, 0, 0]);
        header.extend(48u64.to_be_bytes());
        header.resize(65536, 0);
        std::fs::write(place.path("evil"), header).unwrap();
        for args in
            [&["info", "evil"][..], &["convert", "-O", "raw", "evil", "out.raw"], &["check", "-f", "qcow", "evil"]]
        {
            let out = place.ours(args);
            assert_eq!(out.status.code(), Some(1), "{args:?}: {out:?}");
        }
    }
}
