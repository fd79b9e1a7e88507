//! What each cache mode promises: when writes are on stable storage, seen from the file below.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{CacheMode, ChainBackend, Disk, Format, HostFile, OpenOptions, Qcow2Create, create_qcow2, create_raw};
use support::{Request, Watched};

#[test]
fn writes_are_stable_when_the_mode_says_so() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        for (cache, after_write, after_flush) in [
            (CacheMode::Writeback, false, true),
            (CacheMode::None, false, true),
            (CacheMode::Writethrough, true, true),
            (CacheMode::DirectSync, true, true),
            (CacheMode::Unsafe, false, false),
        ] {
            let path = directory.path().join("image");
            let _ = std::fs::remove_file(&path);
            match format {
                Format::Raw => create_raw(&path, 1 << 20).unwrap(),
                _ => create_qcow2(&path, 1 << 20, &Qcow2Create::default()).unwrap(),
            }
            let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
            let syncs = Arc::new(AtomicUsize::new(0));
            let seen = syncs.clone();
            let file = Watched::before(HostFile::new(file).unwrap(), move |request| {
                if request == Request::Sync {
                    seen.fetch_add(1, Ordering::SeqCst);
                }
            });
            let backend = ChainBackend { file: Box::new(file), path_label: path.clone(), format, extents: Vec::new() };
            let disk =
                Disk::open_backends(vec![backend], &OpenOptions { format, cache, ..Default::default() }).unwrap();
            type Deed = fn(&Disk);
            let deeds: [(&str, Deed); 3] = [
                ("write", |disk| disk.write(4096, &[7; 4096]).unwrap()),
                ("zeroes", |disk| disk.write_zeroes(128 << 10, 64 << 10, true).unwrap()),
                ("write in place", |disk| disk.write(8192, &[8; 512]).unwrap()),
            ];
            for (name, deed) in deeds {
                let before = syncs.load(Ordering::SeqCst);
                deed(&disk);
                let synced = syncs.load(Ordering::SeqCst) > before;
                // qcow2 orders its tables with barriers of its own.
                assert!(synced == after_write || format == Format::Qcow2 && !after_write, "{format} {cache:?} {name}");
            }
            let before = syncs.load(Ordering::SeqCst);
            disk.flush().unwrap();
            assert_eq!(syncs.load(Ordering::SeqCst) > before, after_flush, "{format} {cache:?}");
            if after_write {
                // Without a flush or an end of this disk another one sees everything.
                disk.write(256 << 10, &[9; 512]).unwrap();
                let seen = block::inspect(&path, Some(format)).unwrap();
                assert_eq!(seen.virtual_size_bytes, 1 << 20);
                let copy = directory.path().join("copy");
                std::fs::copy(&path, &copy).unwrap();
                let chain = block::resolve_chain(&copy, Some(format), true, false).unwrap();
                let options = OpenOptions { format, read_only: true, ..OpenOptions::default() };
                let mut bytes = [0; 512];
                Disk::open(chain, &options).unwrap().read(256 << 10, &mut bytes).unwrap();
                assert_eq!(bytes, [9; 512], "{format} {cache:?}");
            }
        }
    }
}
