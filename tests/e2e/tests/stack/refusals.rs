//! Starts that cannot be: the failing call says why.

use std::fs;
use std::process::{Command, Stdio};

use e2e::host::{Domain, Host};
use e2e::programs::program;

/// What `virsh start` says about a domain. It leaves nothing behind.
fn refusal(host: &Host, domain: &Domain<'_>) -> String {
    host.define(domain);
    let said = host.virsh(&format!("start {}", domain.name));
    assert_eq!(host.virsh(&format!("domstate {} --reason", domain.name)), "shut off (failed)\n");
    host.virsh(&format!("undefine {}", domain.name));
    let left = fs::read_dir(host.path("run/libvirt/qemu")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name != "autostarted").collect();
    assert!(left.is_empty(), "a failed start leaves {left:?}");
    let Some(reason) = said.strip_prefix(&format!("error: Failed to start domain '{}'\n", domain.name)) else {
        panic!("{said}");
    };
    reason.replace(&host.path("").display().to_string(), "ROOT/")
}

#[test]
fn a_kernel_that_cannot_be_loaded() {
    let host = Host::start();
    let kernel = fs::read(host.path("kernel")).unwrap();
    fs::write(host.path("text"), "#!/bin/sh\necho this is no kernel\n").unwrap();
    fs::write(host.path("empty"), "").unwrap();
    fs::write(host.path("short"), &kernel[..100]).unwrap();
    fs::write(host.path("noteless"), [&kernel[..56], &[1], &kernel[57..]].concat()).unwrap();
    // Opened as a file, it would keep the daemon waiting for a writer.
    let made = Command::new("mkfifo").arg(host.path("pipe")).status().unwrap();
    assert!(made.success());
    let boot = "error: internal error: the machine cannot be built: the kernel cannot be booted: ";
    let (open, none) = ("error: unable to open kernel 'ROOT/", "the kernel is neither a bzImage nor an ELF file");
    for (name, expected) in [
        ("absent", format!("{open}absent': No such file or directory")),
        ("", format!("{open}': it is no regular file")),
        ("pipe", format!("{open}pipe': it is no regular file")),
        ("text", format!("{boot}{none}: give the kernel image that the distribution boots")),
        ("empty", format!("{boot}{none}: give the kernel image that the distribution boots")),
        ("short", format!("{boot}the ELF file is cut short")),
        ("noteless", format!("{boot}the ELF kernel has no PVH entry: build it with CONFIG_PVH, or give its bzImage")),
    ] {
        let file = host.path(name);
        let domain = Domain { kernel: Some(&file), ..Domain::named("vm1") };
        assert_eq!(refusal(&host, &domain), format!("{expected}\n"), "{name}");
    }
}

#[test]
fn an_initrd_that_cannot_be_loaded() {
    let host = Host::start();
    let os = format!("<initrd>{}</initrd>", host.path("initrd").display());
    let said = refusal(&host, &Domain { os: &os, ..Domain::named("vm1") });
    assert_eq!(said, "error: unable to open initrd 'ROOT/initrd': No such file or directory\n");
}

#[test]
fn memory_beyond_the_host() {
    let host = Host::start();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")).unwrap();
    let memory_mib = 1 << 30;
    let expected = format!(
        "error: unsupported configuration: the domain wants {} KiB of memory and this host has {total} KiB; lower <memory>\n",
        memory_mib << 10
    );
    assert_eq!(refusal(&host, &Domain { memory_mib, ..Domain::named("vm1") }), expected);
}

#[test]
fn kvm_where_it_does_not_work() {
    let host = Host::start();
    let probe = Command::new(program("vireo-vmm")).arg("--probe-kvm").stdin(Stdio::null()).output().unwrap();
    let report = String::from_utf8(probe.stdout).unwrap();
    if probe.status.success() {
        eprintln!("skipped: KVM works on this host");
        return;
    }
    // {"reason":"…","usable":false}
    let (_, reason) = report.split_once("\"reason\":\"").unwrap();
    let (reason, _) = reason.split_once("\",").unwrap();
    let expected =
        format!("error: unsupported configuration: domain type 'kvm' does not work on this host: {reason}\n");
    assert_eq!(refusal(&host, &Domain { kind: "kvm", ..Domain::named("vm1") }), expected);
    assert!(!host.virsh("capabilities").contains("<domain type='kvm'>"));
}

#[test]
fn a_disk_that_is_not_what_its_document_says() {
    let host = Host::start();
    fs::write(host.path("text"), vec![b'x'; 1 << 20]).unwrap();
    for (format, file, expected) in [
        (
            "qcow2",
            "text",
            "internal error: ROOT/text: the file is not what it is declared to be; correct the format, or the file: \
             declared as qcow2, but the file starts with no signature that is known",
        ),
        ("raw", "absent", "Cannot access storage file 'ROOT/absent': No such file or directory"),
        (
            "raw",
            "",
            "Cannot access storage file 'ROOT/': it is a directory, a disk needs an image file or a block device",
        ),
    ] {
        let devices = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>",
            host.path(file).display()
        );
        let said = refusal(&host, &Domain { devices: &devices, ..Domain::named("vm1") });
        assert_eq!(said, format!("error: {expected}\n"));
    }
}

#[test]
fn a_vireo_vmm_that_is_not_there() {
    let host = Host::start_with(&["--vmm", "/nonexistent/vireo-vmm"]);
    let expected = "error: unable to run /nonexistent/vireo-vmm: No such file or directory; --vmm names the program\n";
    assert_eq!(refusal(&host, &Domain::named("vm1")), expected);
}
