//! A disk changes its size under a guest: the guest is told, and the image follows.

mod support;

use std::fs::File;
use std::process::Command;

use monitor::{ChainLink, Command as Ask, Disk, DiskBus, DiskFormat, FailureClass, Reply};
use support::Vm;
use support::blk::capacity_watcher;

#[test]
fn the_guest_sees_the_new_size_of_raw_and_qcow2_disks() {
    let directory = tempfile::tempdir().unwrap();
    for (format, name) in [(DiskFormat::Raw, "raw"), (DiskFormat::Qcow2, "qcow2")] {
        let path = directory.path().join(name);
        let status = Command::new("qemu-img").args(["create", "-q", "-f", name]).arg(&path).arg("1M").status();
        assert!(status.expect("qemu-img (Debian package qemu-utils)").success());
        let mut vm = Vm::start(&capacity_watcher(2048, 4096, 1024), |plan| {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let link = ChainLink { file: plan.add(file), path: name.into(), format };
            plan.config.disks.push(Disk::new("vda", DiskBus::Virtio, vec![link]));
        });
        assert_eq!(vm.line(), "ready");
        let resize = |target: &str, bytes| Ask::ResizeDisk { target: target.into(), bytes };
        assert_eq!(vm.ask(resize("vda", 2 << 20)), Ok(Reply::Done));
        assert_eq!(vm.line(), "grown");
        // Standing or not makes no difference.
        vm.ask(Ask::Stop).unwrap();
        assert_eq!(vm.ask(resize("vda", 512 << 10)), Ok(Reply::Done));
        vm.ask(Ask::Cont).unwrap();
        assert_eq!(vm.line(), "shrunk");
        let Ok(Reply::Stats(stats)) = vm.ask(Ask::QueryStats) else { panic!("no statistics") };
        assert_eq!(stats.disks[0].capacity_bytes, 512 << 10);
        assert_eq!(vm.ask(resize("vdz", 512)).unwrap_err().class, FailureClass::Config);
        let refused = vm.ask(resize("vda", u64::MAX)).unwrap_err();
        assert_eq!(refused.class, FailureClass::Image);
        assert!(refused.text.starts_with("disk 'vda' cannot be resized: "), "{}", refused.text);
        vm.ask(Ask::Quit).unwrap();
        assert_eq!(vm.end().0.code(), Some(0));
        let info = Command::new("qemu-img").arg("info").arg(&path).output().unwrap();
        let info = String::from_utf8(info.stdout).unwrap();
        assert!(info.contains("(524288 bytes)"), "{info}");
    }
}
