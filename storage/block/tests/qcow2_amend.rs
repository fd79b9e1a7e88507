//! Changes of version, refcount width and flags, against qemu-img and cut at every write.

mod support;

use std::path::Path;

use block::{Amend, Disk, Format, OpenOptions, Qcow2Image};
use support::{MemFile, Pages, open_chain, open_image, qemu_check, qemu_img, qemu_raw};

const SIZE_BYTES: u64 = 1 << 20;

/// An image with data and zeroes, shared with a snapshot and not; with `backing` in front of a file that is no zeroes.
fn image(dir: &Path, options: &str, backing: bool) -> std::path::PathBuf {
    let (path, base) = (dir.join("a.qcow2"), dir.join("base.raw"));
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    let mut files = vec![(path.as_path(), Format::Qcow2)];
    if backing {
        std::fs::write(&base, vec![3; SIZE_BYTES as usize]).unwrap();
        args.extend(["-b", "base.raw", "-F", "raw"]);
        files.push((&base, Format::Raw));
    }
    let size = SIZE_BYTES.to_string();
    args.extend([path.to_str().unwrap(), &size]);
    qemu_img(&args);
    let disk = open_chain(&files, &OpenOptions::default());
    disk.write(0, &[1; 300_032]).unwrap();
    disk.write_zeroes(65_536, 65_536, true).unwrap();
    disk.write_zeroes(131_072, 65_536, false).unwrap();
    // A refcount of one bit cannot be shared.
    if !options.contains("refcount_bits=1,") {
        disk.qcow2().unwrap().create_snapshot("s", &Default::default()).unwrap();
        disk.write_zeroes(200_192, 65_536, true).unwrap();
        disk.write(600_064, &[2; 70_144]).unwrap();
    }
    drop(disk);
    path
}

fn info(path: &Path) -> String {
    qemu_img(&["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()])
}

#[test]
fn qemu_sees_the_new_features_and_the_same_data() {
    let cases: &[(&str, Amend, &str)] = &[
        ("compat=0.10", Amend { version: Some(3), ..Amend::default() }, "\"compat\": \"1.1\""),
        (
            "compat=0.10,cluster_size=4k",
            Amend { version: Some(3), refcount_order: Some(6), lazy_refcounts: Some(true), ..Amend::default() },
            "\"refcount-bits\": 64",
        ),
        ("compat=1.1", Amend { version: Some(2), ..Amend::default() }, "\"compat\": \"0.10\""),
        (
            "compat=1.1,cluster_size=4k,lazy_refcounts=on",
            Amend { version: Some(2), ..Amend::default() },
            "\"compat\": \"0.10\"",
        ),
        (
            "refcount_bits=64",
            Amend { version: Some(2), refcount_order: Some(4), ..Amend::default() },
            "\"refcount-bits\": 16",
        ),
        ("cluster_size=4k", Amend { refcount_order: Some(1), ..Amend::default() }, "\"refcount-bits\": 2"),
        (
            "refcount_bits=1,cluster_size=512",
            Amend { refcount_order: Some(5), ..Amend::default() },
            "\"refcount-bits\": 32",
        ),
        ("cluster_size=64k", Amend { lazy_refcounts: Some(true), ..Amend::default() }, "\"lazy-refcounts\": true"),
        ("lazy_refcounts=on", Amend { lazy_refcounts: Some(false), ..Amend::default() }, "\"lazy-refcounts\": false"),
        ("extended_l2=on", Amend { refcount_order: Some(3), ..Amend::default() }, "\"refcount-bits\": 8"),
    ];
    for (options, amend, want) in cases {
        for backing in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = image(dir.path(), options, backing);
            let before = qemu_raw(&path);
            open_image(&path).amend(amend).unwrap();
            let what = format!("{options} {amend:?} backing {backing}");
            qemu_check(&path, &what);
            assert!(qemu_raw(&path) == before, "{what}");
            assert!(info(&path).contains(want), "{what}: {}", info(&path));
            if !options.contains("refcount_bits=1,") {
                qemu_img(&["snapshot", "-a", "s", path.to_str().unwrap()]);
                let at_snapshot = qemu_raw(&path);
                assert!(at_snapshot[200_192..262_144].iter().all(|byte| *byte == 1), "{what}");
                assert!(at_snapshot[65_536..196_608].iter().all(|byte| *byte == 0), "{what}");
                qemu_check(&path, &what);
            }
        }
    }
}

#[test]
fn what_the_version_does_not_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (options, amend) in [
        ("compat=0.10", Amend { lazy_refcounts: Some(true), version: Some(2), ..Amend::default() }),
        ("compat=0.10", Amend { refcount_order: Some(3), ..Amend::default() }),
        ("extended_l2=on", Amend { version: Some(2), ..Amend::default() }),
        ("compression_type=zstd", Amend { version: Some(2), ..Amend::default() }),
        ("refcount_bits=64", Amend { version: Some(2), ..Amend::default() }),
        ("cluster_size=4k", Amend { refcount_order: Some(0), ..Amend::default() }),
        ("cluster_size=4k", Amend { refcount_order: Some(7), ..Amend::default() }),
        ("cluster_size=4k", Amend { version: Some(4), ..Amend::default() }),
    ] {
        let path = image(dir.path(), options, false);
        let before = info(&path);
        assert!(open_image(&path).amend(&amend).is_err(), "{options} {amend:?}");
        qemu_check(&path, options);
        let features = |text: &str| text.split("format-specific").nth(1).map(str::to_owned);
        assert_eq!(features(&info(&path)), features(&before), "{options} {amend:?}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn any_cut_leaves_the_data() {
    for (options, amend) in [
        (
            "compat=0.10,cluster_size=4k",
            Amend { version: Some(3), refcount_order: Some(5), lazy_refcounts: Some(true), ..Amend::default() },
        ),
        ("cluster_size=4k", Amend { version: Some(2), ..Amend::default() }),
        ("cluster_size=64k", Amend { version: Some(2), ..Amend::default() }),
        ("cluster_size=512,refcount_bits=64", Amend { refcount_order: Some(1), ..Amend::default() }),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), options, false);
        let start = Pages::load(&path);
        let file = MemFile::of(start.clone());
        Qcow2Image::open_backend(file.layer(Format::Qcow2), false).unwrap().amend(&amend).unwrap();
        let log = file.0.lock().unwrap().log.clone();
        let contents = |pages: &Pages| {
            let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
            let layer = MemFile::of(pages.clone()).layer(Format::Qcow2);
            support::contents(&Disk::open_backends(vec![layer], &opts).unwrap())
        };
        let want = contents(&start);
        support::every_cut(&start, &log, &mut |torn, what, closer| {
            let report = torn.check();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{options} {what}: {:?}", report.findings);
            assert!(contents(torn) == want, "{options} {what}");
            if closer {
                torn.store(&path);
                qemu_check(&path, &format!("{options} {what}"));
            }
        });
    }
}
