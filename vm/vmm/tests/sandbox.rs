//! What a process that runs a guest has given up.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;

use monitor::{ChainLink, Command, Disk, DiskBus, DiskFormat, Reply, RunReason, RunState, Status};
use support::{Guest, Vm, signal, vmm};

#[test]
fn files_sockets_and_programs_are_refused() {
    const SIGSYS: i32 = 31;
    for deed in ["open", "connect", "execve"] {
        let output = vmm().args(["--try-inside", deed]).output().unwrap();
        assert_eq!(signal(output.status), Some(SIGSYS), "{deed}: {output:?}");
    }
}

/// The value of `field` in a status file. proc(5)
fn field(status: &str, field: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field}:\n{status}")).trim().to_owned()
}

#[test]
fn every_thread_of_a_running_machine_is_inside_and_holds_only_what_it_was_given() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.raw");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut vm = Vm::start(&Guest::default().print("up\n").spin(), |plan| {
        let file = plan.add(File::options().read(true).write(true).open(&image).unwrap());
        plan.config.rng = true;
        let link = ChainLink { file, path: "disk.raw".into(), format: DiskFormat::Raw };
        plan.config.disks.push(Disk::new("vda", DiskBus::Nvme, vec![link]));
    });
    assert_eq!(vm.line(), "up");
    let running = Status { state: RunState::Running, reason: RunReason::Booted };
    assert_eq!(vm.ask(Command::QueryStatus), Ok(Reply::Status(running)));
    let process = PathBuf::from(format!("/proc/{}", vm.child.id()));
    let mut names = BTreeSet::new();
    for thread in fs::read_dir(process.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        names.insert(field(&status, "Name"));
        // Seccomp mode 2 is a filter.
        assert_eq!((field(&status, "NoNewPrivs").as_str(), field(&status, "Seccomp").as_str()), ("1", "2"), "{status}");
    }
    assert_eq!(names, ["io0", "vcpu0", "vireo-vmm"].map(str::to_owned).into());
    let mut pipes = 0;
    for fd in fs::read_dir(process.join("fd")).unwrap() {
        let target = fs::read_link(fd.unwrap().path()).unwrap().into_os_string().into_string().unwrap();
        pipes += u32::from(target.starts_with("pipe:"));
        // Standard streams, sockets, wake-ups, the disk, the kernel (for a reset), the threads' statistics; no directory.
        let given = ["pipe:", "socket:", "anon_inode:[eventfd]", "anon_inode:[timerfd]"];
        let named = [image.to_str().unwrap(), "/dev/null"].contains(&target.as_str());
        let kernel = target.ends_with("/guest.elf");
        let statistics = target.starts_with(&format!("/proc/{}/task/", vm.child.id()));
        assert!(named || kernel || statistics || given.iter().any(|kind| target.starts_with(kind)), "{target}");
    }
    assert_eq!(pipes, 1, "standard error, and nothing that the starting process left open");
}

#[test]
fn descriptors_of_the_starting_process_are_not_kept() {
    // A descriptor that survives the start of a program, as a careless library leaves one.
    let leak = File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let mut vm = Vm::start(&Guest::default().print("up\n").spin(), |_| {});
    assert_eq!(vm.line(), "up");
    for fd in fs::read_dir(format!("/proc/{}/fd", vm.child.id())).unwrap() {
        assert_ne!(fs::read_link(fd.unwrap().path()).unwrap(), PathBuf::from("/dev/zero"));
    }
}
