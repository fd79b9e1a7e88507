//! The host runs out of space or fails. The image stays consistent, and the same request succeeds later.

mod support;

use block::{Disk, ErrorKind, Format, OpenOptions};
use support::{MemFile, Pages, Rng, qemu_img};

const SIZE_BYTES: u64 = 2 << 20;

fn new_image(create: &str) -> Pages {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top.qcow2");
    let size = SIZE_BYTES.to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", create, path.to_str().unwrap(), &size]);
    Pages::load(&path)
}

#[test]
fn without_space_the_guest_can_wait_and_repeat() {
    for (create, seed) in
        ["cluster_size=512", "cluster_size=4k", "cluster_size=512,refcount_bits=64", "cluster_size=64k"]
            .into_iter()
            .zip(77u64..)
    {
        let file = MemFile::of(new_image(create));
        let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
        let mut shadow = vec![0u8; SIZE_BYTES as usize];
        let mut rng = Rng(seed);
        let mut refusals = 0;
        for step in 0..400 {
            file.0.lock().unwrap().room = Some(rng.below(200));
            let start = rng.below(SIZE_BYTES / 512 - 40) as usize * 512;
            let data = vec![(step % 251) as u8 + 1; (1 + rng.below(40) as usize) * 512];
            loop {
                let result = match step % 9 {
                    8 => disk.flush(),
                    _ => disk.write(start as u64, &data),
                };
                let Err(error) = result else { break };
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{create}: {error}");
                refusals += 1;
                let report = file.0.lock().unwrap().pages.check();
                assert_eq!(report.corruptions, 0, "{create} step {step}: {:?}", report.findings);
                file.0.lock().unwrap().room = Some(200 * refusals);
            }
            if step % 9 != 8 {
                shadow[start..start + data.len()].copy_from_slice(&data);
            }
        }
        assert!(refusals > 10, "{create}: only {refusals} requests met a full disk");
        file.0.lock().unwrap().room = None;
        assert!(support::contents(&disk) == shadow, "{create}");
        drop(disk);
        let pages = &file.0.lock().unwrap().pages;
        let report = pages.check();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{create}: {:?}", report.findings);
    }
}

#[test]
fn failed_writes_can_be_repeated() {
    for (create, seed) in ["cluster_size=512,refcount_bits=64", "cluster_size=4k,compat=0.10"].into_iter().zip(5u64..) {
        let file = MemFile::of(new_image(create));
        let opts = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
        let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &opts).unwrap();
        let mut shadow = vec![0u8; SIZE_BYTES as usize];
        let mut rng = Rng(seed);
        file.0.lock().unwrap().fail_one_in = Some((12, seed));
        let mut failures = 0;
        for step in 0..500u64 {
            let start = rng.below(SIZE_BYTES / 512 - 40) as usize * 512;
            let bytes = (1 + rng.below(40) as usize) * 512;
            let data = vec![if step % 5 == 0 { 0 } else { step as u8 }; bytes];
            while let Err(error) = match step % 5 {
                0 => disk.write_zeroes(start as u64, bytes as u64, true),
                _ => disk.write(start as u64, &data),
            } {
                assert_eq!(error.kind(), ErrorKind::Io, "{create}: {error}");
                failures += 1;
            }
            shadow[start..start + bytes].copy_from_slice(&data);
            if step % 20 == 0 {
                while disk.flush().is_err() {
                    failures += 1;
                }
                let report = file.0.lock().unwrap().pages.check();
                assert_eq!(report.corruptions, 0, "{create} step {step}: {:?}", report.findings);
            }
        }
        assert!(failures > 20, "{create}: only {failures} failures");
        assert!(support::contents(&disk) == shadow, "{create}");
        file.0.lock().unwrap().fail_one_in = None;
        drop(disk);
        let report = file.0.lock().unwrap().pages.check();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{create}: {:?}", report.findings);
    }
}

#[test]
fn after_a_failed_flush_nothing_is_promised_any_more() {
    let file = MemFile::of(new_image("cluster_size=4k"));
    let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
    disk.write(0, &[1; 4096]).unwrap();
    file.0.lock().unwrap().sync_fails = true;
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Io);
    file.0.lock().unwrap().sync_fails = false;
    // Linux would report success now, without the data.
    assert!(disk.flush().unwrap_err().to_string().contains("an earlier flush failed"));
    assert!(disk.write(0, &[2; 512]).is_err());
    let mut out = [0; 512];
    disk.read(0, &mut out).unwrap();
    assert_eq!(out, [1; 512]);
}

#[test]
fn a_hot_read_is_one_read_of_the_file() {
    let file = MemFile::of(new_image("cluster_size=64k"));
    let disk = Disk::open_backends(vec![file.layer(Format::Qcow2)], &OpenOptions::default()).unwrap();
    disk.write(0, &[1; 1 << 20]).unwrap();
    for (offset, bytes) in [(0, 4096), (61440, 8192), (0, 1 << 20)] {
        let before = file.0.lock().unwrap().reads;
        disk.read(offset, &mut vec![0; bytes]).unwrap();
        assert_eq!(file.0.lock().unwrap().reads - before, 1, "{bytes} at {offset}");
    }
}
