//! A disk with several queues, served by several threads at once.

mod support;

use std::fs::File;
use std::io::Write;
use std::process::Command;

use monitor::{
    CacheMode, ChainLink, Command as Ask, Disk, DiskBus, DiskFormat, DiskIo, Event, FailureClass, Reply, ShutdownCause,
    StartReply,
};
use support::blk::{REQUEST_BYTES, check_written, writing};
use support::{Guest, Vm, plan, start};

const REQUESTS: u16 = 64;

#[test]
fn four_queues_write_at_once_and_nothing_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    for (format, name, cache, io, io_threads) in [
        (DiskFormat::Raw, "raw", CacheMode::Writeback, DiskIo::Auto, vec![0]),
        (DiskFormat::Qcow2, "qcow2", CacheMode::Writeback, DiskIo::Threads, vec![0, 1]),
        (DiskFormat::Qcow2, "qcow2", CacheMode::Writeback, DiskIo::Ring, vec![1, 2, 3, 4]),
        // Requests that go on while the threads do other things.
        (DiskFormat::Raw, "raw", CacheMode::None, DiskIo::Auto, vec![0]),
        (DiskFormat::Qcow2, "qcow2", CacheMode::None, DiskIo::Ring, vec![0, 1]),
        (DiskFormat::Qcow2, "qcow2", CacheMode::None, DiskIo::Auto, vec![1, 2, 3, 4]),
        (DiskFormat::Qcow2, "qcow2", CacheMode::None, DiskIo::Threads, vec![0]),
    ] {
        let path = directory.path().join(name);
        let size = (u64::from(REQUESTS) * u64::from(REQUEST_BYTES)).to_string();
        let direct = cache == CacheMode::None;
        // Only what has its place is written without the thread that was asked.
        let room = if direct { "preallocation=full" } else { "preallocation=off" };
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", name, "-o", room]).arg(&path).arg(&size).status();
        assert!(made.expect("qemu-img (Debian package qemu-utils)").success());
        let mut vm = Vm::start(&writing(4, REQUESTS).echo_byte().power_off(), |plan| {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            if direct {
                block::use_direct_io(&file).unwrap();
            }
            let link = ChainLink { file: plan.add(file), path: name.into(), format };
            let disk = Disk::new("vda", DiskBus::Virtio, vec![link]);
            plan.config.disks.push(Disk {
                queues: 4,
                queue_size: 64,
                cache,
                io,
                io_threads: io_threads.clone(),
                ..disk
            });
        });
        assert_eq!(rings(&vm), if io == DiskIo::Threads { 0 } else { 4 }, "one for each lane");
        // Pauses and a size that changes hold all threads, and lose none of their requests.
        let bytes = u64::from(REQUESTS) * u64::from(REQUEST_BYTES);
        for command in [Ask::Stop, Ask::Cont, Ask::ResizeDisk { target: "vda".into(), bytes: bytes + 512 }] {
            assert_eq!(vm.ask(command), Ok(Reply::Done), "{name}");
        }
        assert_eq!(vm.line(), "written", "{name}");
        // It ends when it is told, so that the commands find it there however quick it was.
        vm.serial.write_all(b"x").unwrap();
        while vm.event() != (Event::Shutdown { cause: ShutdownCause::PowerOff }) {}
        assert_eq!(vm.end().0.code(), Some(0));
        let raw = directory.path().join("converted");
        let converted =
            Command::new("qemu-img").args(["convert", "-f", name, "-O", "raw"]).arg(&path).arg(&raw).status();
        assert!(converted.unwrap().success());
        check_written(&File::open(raw).unwrap(), REQUESTS);
        if format == DiskFormat::Qcow2 {
            let check = Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
            assert!(check.status.success(), "{check:?}");
        }
        std::fs::remove_file(path).unwrap();
    }
}

/// How many rings a machine has.
fn rings(vm: &Vm) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", vm.child.id())).unwrap();
    let names: Vec<_> = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok()).collect();
    // The thread of a queue waits for a descriptor of its own.
    names.iter().filter(|name| name.to_string_lossy() == "anon_inode:[io_uring]").count() / 2
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for (queues, queue_size) in [(0, 256), (17, 256), (1, 100), (1, 2048), (1, 1)] {
        let mut plan = plan(&Guest::default().power_off(), directory.path());
        let file = plan.add(tempfile::tempfile().unwrap());
        let link = ChainLink { file, path: "disk.raw".into(), format: DiskFormat::Raw };
        plan.config.disks.push(Disk { queues, queue_size, ..Disk::new("vda", DiskBus::Virtio, vec![link]) });
        let (mut child, reply) = start(&plan);
        let StartReply::Failed(failure) = reply else { panic!("{queues} queues of {queue_size}") };
        assert_eq!(failure.class, FailureClass::Config);
        assert!(failure.text.contains("queues of"), "{}", failure.text);
        child.wait().unwrap();
    }
}
