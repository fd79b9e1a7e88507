//! The log of vhdx: replayed when a writer did not come to its end, whatever the writer was.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use image::vhdx::Header;
use image::vhdx::header::HEADER_OFFSETS;

use super::{VhdxOptions, create_vhdx, open_vhdx};
use crate::host_file::HostFile;
use crate::io::FileBackend;
use crate::mapped::tests::{check_with_qemu, host_file, open, qemu_img, qemu_img_status, qemu_io, read_all, write};
use crate::node::Node;
use crate::sys::{ReadBufs, WriteBufs};

/// A file that takes no more changes after a number of them, as when the machine loses power.
struct Dying {
    file: Arc<HostFile>,
    left: AtomicU64,
}

impl Dying {
    fn alive(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

impl FileBackend for Dying {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        self.file.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        if self.alive() {
            return self.file.write_at(offset, bufs);
        }
        // The last write is torn.
        if self.left.swap(u64::MAX, Ordering::Relaxed) == 0 {
            self.file.write_at(offset, &bufs.range(0, bufs.len() / 2 / 512 * 512))?;
        }
        self.left.store(0, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(5))
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.alive() { self.file.punch_hole(offset, bytes) } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        if self.alive() { self.file.write_zeroes(offset, bytes, may_unmap) } else { Ok(()) }
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        if self.alive() { self.file.set_len_bytes(bytes) } else { Ok(()) }
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }
}

const SIZE_BYTES: usize = 16 << 20;

fn new_image(path: &Path) {
    let _ = std::fs::remove_file(path);
    let options = VhdxOptions { block_bytes: 1 << 20, ..VhdxOptions::default() };
    create_vhdx(&*host_file(path, true), path, SIZE_BYTES as u64, &options).unwrap();
}

/// Writes blocks and flushes after each, until the file dies; returns how many flushes succeeded.
fn write_until_death(path: &Path, changes: u64) -> usize {
    let file = Arc::new(Dying { file: host_file(path, true), left: AtomicU64::new(changes) });
    let Ok(node) = open_vhdx(file, path.to_owned(), false, false) else { return 0 };
    for block in 0..12usize {
        // Far apart and near, so that pages of the table change more than once.
        let at = (block * 5 % 16) << 20;
        let written = node.write(&[], at as u64, &WriteBufs::from_slice(&[1 + block as u8; 4096]));
        if written.and_then(|()| node.flush()).is_err() {
            return block;
        }
    }
    12
}

#[test]
fn what_was_flushed_survives_a_death_at_every_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhdx");
    let mut replayed = 0;
    new_image(&path);
    let empty = std::fs::read(&path).unwrap();
    for changes in 0..64 {
        std::fs::write(&path, &empty).unwrap();
        let flushed = write_until_death(&path, changes);
        // Read only: the log is replayed in memory, and the file stays as it is.
        let before = std::fs::read(&path).unwrap();
        let contents = read_all(&*open("vhdx", &path, true).unwrap()).unwrap();
        assert!(std::fs::read(&path).unwrap() == before);
        for block in 0..flushed {
            let at = (block * 5 % 16) << 20;
            assert!(contents[at..at + 4096].iter().all(|byte| *byte == 1 + block as u8), "{changes}: block {block}");
        }
        // QEMU replays ours, and comes to the same contents.
        let copy = dir.path().join("copy.vhdx");
        std::fs::write(&copy, &before).unwrap();
        let (status, text) = qemu_img_status(&["check", "-r", "all", "-f", "vhdx", copy.to_str().unwrap()]);
        assert_eq!(status, 0, "{changes}: {text}");
        replayed += usize::from(text.contains("corruptions"));
        check_with_qemu("vhdx", &copy, &contents, dir.path());
        // Writable: replayed into the file, which QEMU can open then.
        drop(open("vhdx", &path, false).unwrap());
        check_with_qemu("vhdx", &path, &contents, dir.path());
    }
    assert!(replayed > 0, "no death left a log behind");
}

/// The state between the log and the BAT: the header names the log of qemu-io's last entry, and the change that
/// the entry makes is not there.
#[test]
fn the_log_of_qemu_is_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhdx");
    qemu_img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", path.to_str().unwrap(), "16M"]);
    qemu_io("vhdx", &path, &["write -P 0x11 0 2M", "write -P 0x22 5M 1M"]);
    let mut want = vec![0; 16 << 20];
    want[..2 << 20].fill(0x11);
    want[5 << 20..6 << 20].fill(0x22);
    let mut file = std::fs::read(&path).unwrap();
    let entry = (1 << 20..2 << 20).step_by(4096).filter(|at| file[*at..].starts_with(b"loge")).max();
    let entry = entry.expect("qemu-io logs its changes");
    let (header, index) = Header::current(&file, file.len() as u64).unwrap();
    assert!(!header.needs_replay());
    let log_guid = file[entry + 32..entry + 48].try_into().unwrap();
    let at = HEADER_OFFSETS[index] as usize;
    file[at..at + 4096].copy_from_slice(&Header { log_guid, ..header }.serialise());
    file[2 << 20..(2 << 20) + 4096].fill(0);
    std::fs::write(&path, &file).unwrap();
    // QEMU does not open it read only.
    assert!(
        qemu_img_status(&["info", "-f", "vhdx", path.to_str().unwrap()]).1.contains("log that needs to be replayed")
    );
    assert!(read_all(&*open("vhdx", &path, true).unwrap()).unwrap() == want);
    assert!(std::fs::read(&path).unwrap() == file);
    let node = open("vhdx", &path, false).unwrap();
    assert!(read_all(&*node).unwrap() == want);
    want[9 << 20..10 << 20].fill(7);
    write(&*node, 9 << 20, &vec![7; 1 << 20]);
    drop(node);
    check_with_qemu("vhdx", &path, &want, dir.path());
}

#[test]
fn reading_changes_nothing_and_writing_changes_the_identity() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhdx");
    new_image(&path);
    let before = std::fs::read(&path).unwrap();
    drop(open("vhdx", &path, false).unwrap());
    assert!(std::fs::read(&path).unwrap() == before);
    write(&*open("vhdx", &path, false).unwrap(), 0, &[1; 512]);
    let after = std::fs::read(&path).unwrap();
    let guids = |file: &[u8], header: usize| file[header + 16..header + 64].to_vec();
    // The log is closed again: header 1 was the current one, so that it is the current one again.
    assert_ne!(guids(&before, 128 << 10)[..32], guids(&after, 128 << 10)[..32]);
    assert_eq!(guids(&after, 128 << 10)[32..], [0; 16]);
}

#[test]
fn qemu_opens_a_disk_of_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (fixed, block_bytes) in [(false, 0), (true, 0), (false, 1 << 20)] {
        let options = VhdxOptions { fixed, block_bytes, ..VhdxOptions::default() };
        create_vhdx(&*host_file(&path, true), &path, 0, &options).unwrap();
        let text = qemu_img(&["info", "-f", "vhdx", path.to_str().unwrap()]);
        assert!(text.contains("virtual size: 0 B"), "{text}");
        let node = open_vhdx(host_file(&path, true), path.clone(), false, false).unwrap();
        assert_eq!((node.size_bytes(), node.flush().is_ok()), (0, true));
    }
}
