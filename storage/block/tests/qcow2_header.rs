//! Changes of the header alone: the name of the backing file.

mod support;

use block::{Format, Qcow2Image};
use support::{MemFile, Pages, open_image, qemu_check, qemu_img};

#[test]
fn qemu_sees_the_new_backing_file() {
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=64k,compat=0.10"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        std::fs::write(dir.path().join("base.raw"), [1; 4096]).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "1M"]);
        let long = "d/".repeat(50) + "long.qcow2";
        for (backing, format) in [
            (Some("base.raw"), Some("raw")),
            (Some(long.as_str()), Some("qcow2")),
            (Some("base.raw"), None),
            (Some("b"), Some("vmdk")),
            (None, None),
            (Some("base.raw"), Some("raw")),
        ] {
            open_image(&path).set_backing(backing, format).unwrap();
            let info = qemu_img(&["info", "--output=json", "-f", "qcow2", name]);
            let find =
                |key: &str| info.split(&format!("\"{key}\": \"")).nth(1).map(|rest| rest.split('"').next().unwrap());
            assert_eq!(
                (find("backing-filename"), find("backing-filename-format")),
                (backing, format),
                "{options}: {info}"
            );
        }
        qemu_check(&path, options);
        let raw = support::qemu_raw(&path);
        assert!(raw[..4096] == [1; 4096] && raw[4096..].iter().all(|byte| *byte == 0));
        let error = open_image(&path).set_backing(Some(&"n".repeat(1024)), Some("raw")).unwrap_err();
        assert!(matches!(error, block::BlockError::Maintenance { .. }), "{error}");
        qemu_check(&path, options);
    }
}

#[test]
fn a_cut_leaves_the_old_name_or_the_new() {
    let long = "some/directory/".repeat(40) + "base.qcow2";
    let names = [None, Some(("a.raw", "raw")), Some((long.as_str(), "qcow2")), Some(("other-base.qcow2", "qcow2"))];
    for options in ["cluster_size=64k", "cluster_size=2k", "cluster_size=64k,compat=0.10"] {
        for old in names {
            for new in names {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a.qcow2");
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "1M"]);
                let set = |image: &Qcow2Image, to: Option<(&str, &str)>| {
                    image.set_backing(to.map(|(name, _)| name), to.map(|(_, format)| format)).unwrap();
                };
                set(&open_image(&path), old);
                let start = Pages::load(&path);
                let file = MemFile::of(start.clone());
                set(&Qcow2Image::open_backend(file.layer(Format::Qcow2), false).unwrap(), new);
                let log = file.0.lock().unwrap().log.clone();
                support::every_cut(&start, &log, &mut |torn, what, _| {
                    assert_eq!(torn.check().corruptions, 0, "{options} {what}");
                    let header = Qcow2Image::open_backend(MemFile::of(torn.clone()).layer(Format::Qcow2), true)
                        .unwrap()
                        .header();
                    let now = header.backing_name.as_deref().zip(header.backing_format.as_deref());
                    assert!(now == old || now == new, "{options} {what}: {now:?}");
                });
            }
        }
    }
}
