//! The host's disk fills up while a guest writes: the machine pauses, says so, and goes on without loss when there is
//! room.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use monitor::{
    Boot, ChainLink, Command as Ask, Disk, DiskBus, DiskFormat, DiskIo, Event, Reply, RunReason, RunState,
    ShutdownCause, Status,
};
use support::blk::{check_written, writer};
use support::{Guest, Vm, built};

/// A file system of limited size in a mount namespace of its own, reached through its keeper's /proc entry. It goes with
/// the keeper.
struct SmallDisk {
    keeper: Child,
    mount_point: PathBuf,
}

impl SmallDisk {
    /// `None`: this host lets this user mount nothing.
    fn mount(mount_point: &Path, size: &str) -> Option<SmallDisk> {
        let options = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
        let mut command = Command::new("unshare");
        command.args([options, "--mount", "sh"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut keeper = command.spawn().ok()?;
        let mut answers = BufReader::new(keeper.stdout.take()?);
        let mut disk = SmallDisk { keeper, mount_point: mount_point.to_owned() };
        let mount = format!("mount -t tmpfs -o size={size} small {} && echo mounted", mount_point.display());
        let mut line = String::new();
        writeln!(disk.keeper.stdin.as_mut()?, "{mount} || exit").ok()?;
        answers.read_line(&mut line).ok()?;
        (line == "mounted\n").then_some(disk)
    }
    /// `name` on the disk, as seen from here.
    fn path(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.keeper.id()));
        root.join(self.mount_point.strip_prefix("/").unwrap()).join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

const REQUESTS: u16 = 48;
const DISK_BYTES: u64 = 8 << 20;

fn disk(file: monitor::FdIndex, bus: DiskBus, format: DiskFormat) -> Disk {
    let link = ChainLink { file, path: "small.img".into(), format };
    Disk::new("vda", bus, vec![link])
}

fn paused_for_room(vm: &mut Vm) {
    let error = vm.event();
    let Event::IoError { target, operation, reason, paused } = &error else { panic!("{error:?}") };
    assert_eq!((target.as_str(), operation.as_str(), reason.as_str(), *paused), ("vda", "write", "enospc", true));
    assert_eq!(vm.event(), Event::Stopped { reason: RunReason::IoError });
    let status = Status { state: RunState::Paused, reason: RunReason::IoError };
    assert_eq!(vm.ask(Ask::QueryStatus), Ok(Reply::Status(status)));
}

#[test]
fn the_guest_waits_for_room_and_loses_nothing() {
    waits_for_room(DiskFormat::Qcow2, "qcow2", DiskIo::Auto);
    // The kernel finds out, while the disk's thread does other things.
    waits_for_room(DiskFormat::Raw, "raw", DiskIo::Ring);
}

fn waits_for_room(format: DiskFormat, name: &str, io: DiskIo) {
    let directory = tempfile::tempdir().unwrap();
    let Some(small) = SmallDisk::mount(directory.path(), "8m") else {
        eprintln!("skipped: this host lets this user mount no file system, in no namespace");
        return;
    };
    let path = small.path("small.img");
    let image = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", name, image, &DISK_BYTES.to_string()]);
    let filler = small.path("filler");
    std::fs::write(&filler, vec![0; 6 << 20]).unwrap();
    let mut vm = Vm::start(&writer(1, REQUESTS), |plan| {
        plan.config.paused = true;
        let file = plan.add(File::options().read(true).write(true).open(&path).unwrap());
        plan.config.disks.push(Disk { io, ..disk(file, DiskBus::Virtio, format) });
    });
    assert_eq!(vm.ask(Ask::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    paused_for_room(&mut vm);
    // Nothing has changed: it pauses again, for the same request.
    assert_eq!(vm.ask(Ask::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    paused_for_room(&mut vm);
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(vm.ask(Ask::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    assert_eq!(vm.line(), "written");
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::PowerOff });
    let (status, words) = vm.end();
    assert_eq!(status.code(), Some(0), "{words}");
    assert!(words.contains("disk vda: write failed") && words.contains("small.img"), "{words}");
    if format == DiskFormat::Qcow2 {
        let check = qemu_img(&["check", image]);
        assert!(check.contains("No errors were found"), "{check}");
    }
    let raw = directory.path().join("raw");
    qemu_img(&["convert", "-f", name, "-O", "raw", image, raw.to_str().unwrap()]);
    check_written(&File::open(raw).unwrap(), REQUESTS);
}

/// Makes a file of random bytes in memory, copies it to the disk, reads it back from there.
const COPY: &str = "mount -t devtmpfs dev /dev; exec > /dev/console 2>&1; mount -t proc proc /proc; \
    mount -t tmpfs tmp /tmp; dd if=/dev/urandom of=/tmp/f bs=64k count=128 2>/dev/null; echo made $(sha256sum < /tmp/f); \
    cp /tmp/f /root/f; sync; echo 3 > /proc/sys/vm/drop_caches; echo read $(sha256sum < /root/f); poweroff -f";

#[test]
fn a_stock_kernel_on_nvme_waits_for_room_and_loses_nothing() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        eprintln!("skipped: a long test, for VIREO_TEST_LONG=1");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(small) = SmallDisk::mount(directory.path(), "24m") else {
        eprintln!("skipped: this host lets this user mount no file system, in no namespace");
        return;
    };
    let path = small.path("root.qcow2");
    std::fs::copy(built("VIREO_TEST_GUEST").join("demo.qcow2"), &path).unwrap();
    let filler = small.path("filler");
    std::fs::write(&filler, vec![0; 18 << 20]).unwrap();
    let mut vm = Vm::start(&Guest::default(), |plan| {
        let kernel = plan.add(File::open(built("VIREO_TEST_NVME_KERNEL")).unwrap());
        let cmdline = format!("console=ttyS0 quiet rw root=/dev/nvme0n1 rootwait init=/bin/sh -- -c \"{COPY}\"");
        plan.config.boot = Boot::Kernel { kernel, initrd: None, cmdline };
        plan.config.memory_kib = 192 << 10;
        let file = plan.add(File::options().read(true).write(true).open(&path).unwrap());
        plan.config.disks.push(disk(file, DiskBus::Nvme, DiskFormat::Qcow2));
    });
    let sum = |vm: &mut Vm, word: &str| {
        let lines = std::iter::repeat_with(|| vm.line());
        lines.into_iter().find_map(|line| line.strip_prefix(word).map(str::to_owned)).unwrap()
    };
    let made = sum(&mut vm, "made ");
    paused_for_room(&mut vm);
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(vm.ask(Ask::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    assert_eq!(sum(&mut vm, "read "), made);
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::PowerOff });
    assert_eq!(vm.end().0.code(), Some(0));
    let check = qemu_img(&["check", path.to_str().unwrap()]);
    assert!(check.contains("No errors were found"), "{check}");
}
