//! OVA files made by the real tar and read here, and made here and read by the real tar and qemu-img.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory with a disk, as qcow2 and as a stream for an archive.
struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { root: tempfile::tempdir().unwrap() };
        place.sh("qemu-img create -q -f qcow2 s.qcow2 40M
             qemu-io -f qcow2 -c 'write -q -P 1 0 3M' -c 'write -q -P 7 33M 100k' s.qcow2
             qemu-img convert -f qcow2 -O vmdk -o subformat=streamOptimized s.qcow2 disk.vmdk");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Runs lines of shell, which must succeed; returns what they print.
    fn sh(&self, lines: &str) -> String {
        let out = Command::new("sh").args(["-ec", lines]).current_dir(self.root.path()).output().unwrap();
        assert!(out.status.success(), "{lines}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn ours(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-img"));
        command.args(args).current_dir(self.root.path()).output().unwrap()
    }

    fn succeeds(&self, args: &[&str]) -> String {
        let out = self.ours(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// What is said by a command that must fail.
    fn fails(&self, args: &[&str]) -> String {
        let out = self.ours(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        String::from_utf8(out.stderr).unwrap()
    }

    /// Writes a descriptor of disks: identifier, name of the file, attributes of the file.
    fn describe(&self, disks: &[(&str, &str, &str)]) {
        let files = disks.iter().map(|(id, href, more)| format!("<File ovf:id='{id}' ovf:href='{href}' {more}/>"));
        let listed = disks.iter().map(|(id, ..)| {
            format!("<Disk ovf:diskId='d-{id}' ovf:fileRef='{id}' ovf:capacity='40' ovf:capacityAllocationUnits='byte * 2^20'/>")
        });
        let (files, listed): (String, String) = (files.collect(), listed.collect());
        let text = format!(
            "<?xml version='1.0'?><Envelope xmlns='x' xmlns:ovf='y'><References>{files}</References>\
             <DiskSection>{listed}</DiskSection></Envelope>"
        );
        std::fs::write(self.path("m.ovf"), text).unwrap();
    }
}

fn patch(path: &Path, at: usize, bytes: &[u8]) {
    let mut all = std::fs::read(path).unwrap();
    all[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, all).unwrap();
}

#[test]
fn what_is_written_is_read_by_tar_and_qemu_img() {
    let place = Place::new();
    place.succeeds(&["convert", "-O", "ova", "s.qcow2", "my vm.ova"]);
    let listed = place.sh("tar tf 'my vm.ova'; mkdir x; tar xf 'my vm.ova' -C x");
    assert_eq!(listed, "my_vm.ovf\nmy_vm.mf\nmy_vm-disk1.vmdk\n");
    place.sh("cd x; sed -E 's/SHA256\\((.*)\\)= (.*)/\\2  \\1/' my_vm.mf | sha256sum -c --strict
         qemu-img check my_vm-disk1.vmdk
         qemu-img compare -f vmdk -F qcow2 my_vm-disk1.vmdk ../s.qcow2
         grep -q 'ovf:capacity=\"41943040\"' my_vm.ovf
         grep -q \"ovf:size=\\\"$(stat -c %s my_vm-disk1.vmdk)\\\"\" my_vm.ovf");
    // And back, in place.
    place.succeeds(&["compare", "my vm.ova", "s.qcow2"]);
    place.succeeds(&["convert", "-f", "ova", "-O", "raw", "my vm.ova", "back.raw"]);
    place.sh("qemu-img compare -f raw -F qcow2 back.raw s.qcow2");
    // The name that info gives for the disk is one for qemu-img too.
    let info: serde_json::Value =
        serde_json::from_str(&place.succeeds(&["info", "--output=json", "my vm.ova"])).unwrap();
    assert_eq!((&info["format"], &info["virtual-size"]), (&"ova".into(), &41943040.into()));
    let name = info["format-specific"]["data"]["disks"][0]["image"].as_str().unwrap().replace('\'', "");
    place.sh(&format!("qemu-img compare -F qcow2 '{name}' s.qcow2"));
    let text = place.succeeds(&["info", "my vm.ova"]);
    assert!(text.contains("file format: ova") && text.contains("filename: my_vm-disk1.vmdk"), "{text}");
    let tree = place.succeeds(&["tree", "my vm.ova"]);
    assert!(tree.contains("my_vm-disk1.vmdk") && tree.contains("disk, vmdk, 40 MiB"), "{tree}");
    for args in [
        &["convert", "-O", "ova", "-o", "x=y", "s.qcow2", "n.ova"][..],
        &["convert", "-O", "ova", "-B", "b", "-F", "raw", "s.qcow2", "n.ova"],
        &["create", "-f", "ova", "n.ova", "1M"],
    ] {
        place.fails(args);
        assert!(!place.path("n.ova").exists());
    }
}

#[test]
fn archives_of_tar_are_read_in_every_dialect() {
    let place = Place::new();
    let long = format!("{}.vmdk", "long-name-".repeat(12));
    for (dialect, name) in [("ustar", "disk.vmdk"), ("gnu", &long), ("pax", &long), ("oldgnu", "disk.vmdk")] {
        for algorithm in ["sha1", "sha256", "sha512"] {
            place.describe(&[("f", name, "")]);
            place.sh(&format!(
                "test -e {name} || cp disk.vmdk {name}
                 {algorithm}sum --tag m.ovf {name} | sed -E 's/ \\((.*)\\) = /(\\1)= /' > m.mf
                 tar --format={dialect} -cf m.ova m.ovf m.mf {name}"
            ));
            place.succeeds(&["convert", "-O", "raw", "m.ova", "out.raw"]);
            place.sh("qemu-img compare -f raw -F qcow2 out.raw s.qcow2");
        }
    }
    let measured = place.succeeds(&["measure", "-O", "qcow2", "m.ova"]);
    assert_eq!(measured.lines().next(), place.sh("qemu-img measure -f vmdk -O qcow2 disk.vmdk").lines().next());
    // A raw disk in an archive: its offsets are the archive's.
    place.sh("qemu-img convert -f qcow2 -O raw s.qcow2 disk.img");
    place.describe(&[("f", "disk.img", "")]);
    place.sh("tar -cf raw.ova m.ovf disk.img");
    place.succeeds(&["compare", "raw.ova", "s.qcow2"]);
    let map = place.succeeds(&["map", "--output=json", "raw.ova"]);
    let first: serde_json::Value = serde_json::from_str(&map).unwrap();
    let at = first[0]["offset"].as_u64().unwrap() as usize;
    assert_eq!(std::fs::read(place.path("raw.ova")).unwrap()[at..at + 512], [1; 512]);
}

#[test]
fn damage_and_what_is_not_read_is_named() {
    let place = Place::new();
    place.describe(&[("f", "disk.vmdk", "")]);
    place.sh("sha256sum --tag m.ovf disk.vmdk | sed -E 's/ \\((.*)\\) = /(\\1)= /' > m.mf; tar -cf m.ova m.ovf m.mf disk.vmdk");
    let good = std::fs::read(place.path("m.ova")).unwrap();
    let says = |args: &[&str], words: &[&str]| {
        let said = place.fails(args);
        for word in words {
            assert!(said.contains(word), "{args:?}: {said}");
        }
    };
    // The disk's last kilobyte is behind its data: only the digest can tell.
    patch(&place.path("m.ova"), 100_000, b"XYZ");
    let convert = &["convert", "-O", "raw", "m.ova", "out.raw"][..];
    says(convert, &["'disk.vmdk'", "digest"]);
    assert!(!place.path("out.raw").exists());
    std::fs::write(place.path("m.ova"), &good).unwrap();
    patch(&place.path("m.ova"), 512, b" ");
    says(convert, &["'m.ovf'", "digest"]);
    std::fs::write(place.path("m.ova"), &good[..good.len() / 2]).unwrap();
    says(convert, &["'disk.vmdk'", "truncated"]);
    for (line, words) in [
        ("MD5(m.ovf)= 00", &["line 1", "SHA512"][..]),
        (&format!("SHA1(gone.vmdk)= {}", "00".repeat(20)), &["'gone.vmdk'", "not in the archive"]),
    ] {
        std::fs::write(place.path("m.mf"), line).unwrap();
        place.sh("tar -cf m.ova m.ovf m.mf disk.vmdk");
        says(convert, words);
    }
    place.sh("gzip -k disk.vmdk; cp disk.vmdk b.vmdk");
    for (disks, members, words) in [
        (&[("f", "disk.vmdk.gz", "ovf:compression='gzip'")][..], "disk.vmdk.gz", &["disk.vmdk.gz", "gzip"][..]),
        (&[("f", "disk.vmdk.gz", "")], "disk.vmdk.gz", &["disk.vmdk.gz", "gzip"]),
        (&[("f", "disk.vmdk", "ovf:chunkSize='7'")], "disk.vmdk", &["chunks"]),
        (&[("f", "none.vmdk", "")], "disk.vmdk", &["'none.vmdk'", "not in the archive"]),
        (&[], "disk.vmdk", &["no disk"]),
        (&[("f", "disk.vmdk", ""), ("g", "b.vmdk", "")], "disk.vmdk b.vmdk", &["several disks", "\"offset\": "]),
    ] {
        place.describe(disks);
        place.sh(&format!("tar -cf m.ova m.ovf {members}"));
        says(convert, words);
        // What it holds can be seen all the same, unless the descriptor is wrong.
        assert_eq!(place.ours(&["info", "m.ova"]).status.success(), !words.contains(&"not in the archive"));
    }
    place.sh("tar -cf m.ova disk.vmdk");
    says(&["info", "-f", "ova", "m.ova"], &["no descriptor"]);
    says(&["info", "-f", "ova", "s.qcow2"], &["no tar header"]);
    says(&["info", "-f", "ova", "gone.ova"], &["No such file"]);
}

#[test]
fn an_archive_is_never_written_to_and_its_names_lead_nowhere() {
    let place = Place::new();
    let href = "../../escape.vmdk";
    place.describe(&[("f", href, "")]);
    place.sh(&format!("tar --transform='s,^disk.vmdk,{href},' -P -cf m.ova m.ovf disk.vmdk"));
    let before = std::fs::read(place.path("m.ova")).unwrap();
    let entries = || std::fs::read_dir(place.root.path()).unwrap().count();
    let count = entries();
    place.succeeds(&["compare", "m.ova", "s.qcow2"]);
    for args in [
        &["resize", "m.ova", "+1M"][..],
        &["io", "-c", "write 0 512", "m.ova"],
        &["check", "-r", "all", "m.ova"],
        &["commit", "m.ova"],
        &["convert", "-n", "-f", "qcow2", "-O", "ova", "s.qcow2", "m.ova"],
        &["snapshot", "-c", "x", "m.ova"],
        &["rebase", "-u", "-b", "", "m.ova"],
    ] {
        place.fails(args);
    }
    assert!(std::fs::read(place.path("m.ova")).unwrap() == before);
    assert_eq!(entries(), count);
}

#[test]
fn virt_v2v_finds_that_parts_of_files_can_be_read() {
    let place = Place::new();
    std::fs::write(place.path("empty"), [0; 1024]).unwrap();
    place.succeeds(&["info", r#"json:{"file":{"driver":"raw","offset":512,"size":512,"file":{"filename":"empty"}}}"#]);
}
