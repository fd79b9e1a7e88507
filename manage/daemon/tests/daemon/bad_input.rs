//! Domains that cannot be what their documents say: every refusal word for word, and nothing left behind.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::session::Session;

/// What a document says beside its name and kernel.
#[derive(Clone, Copy)]
struct Document<'a> {
    uuid: &'a str,
    memory: &'a str,
    vcpu: &'a str,
    devices: &'a str,
}

const PLAIN: Document = Document { uuid: "", memory: "<memory unit='MiB'>64</memory>", vcpu: "1", devices: "" };

fn write(session: &Session, name: &str, document: Document, kernel: &str) {
    let Document { uuid, memory, vcpu, devices } = document;
    let kernel = session.path(kernel);
    let text = format!(
        "<domain type='qemu'><name>{name}</name>{uuid}{memory}<vcpu>{vcpu}</vcpu><os><type>hvm</type>\
         <kernel>{}</kernel></os><devices>{devices}<serial type='pty'/></devices></domain>",
        kernel.display()
    );
    fs::write(session.path("bad.xml"), text).unwrap();
}

fn disk(session: &Session, file: &str, format: &str, target: &str) -> String {
    let source = session.path(file);
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/></disk>",
        source.display()
    )
}

/// What virsh says, with the root directory as `DIR`.
fn said(session: &Session, line: &str) -> String {
    let root = session.path("");
    session.virsh(line).replace(root.to_str().unwrap().trim_end_matches('/'), "DIR")
}

fn qemu_img(directory: &Path, args: &str) {
    let output = Command::new("qemu-img").args(args.split(' ')).current_dir(directory).output();
    let output = output.expect("qemu-img (Debian package qemu-utils) makes the images of this test");
    assert!(output.status.success(), "qemu-img {args}: {output:?}");
}

#[test]
fn images_that_cannot_be_used_are_refused_by_name() {
    let session = Session::start();
    let root = session.path("");
    for args in [
        "create -q -f raw plain.raw 1M",
        "create -q -f qcow2 -b plain.raw -F raw top.qcow2",
        "create -q -f qcow2 -b missing.raw -F raw -u orphan.qcow2 1M",
        "create -q -f qcow2 one.qcow2 1M",
        "create -q -f qcow2 -b one.qcow2 -F qcow2 two.qcow2",
        "rebase -u -b two.qcow2 -F qcow2 one.qcow2",
    ] {
        qemu_img(&root, args);
    }
    fs::write(session.path("garbage"), "no image").unwrap();
    let running = Document { devices: &disk(&session, "plain.raw", "raw", "vda"), ..PLAIN };
    write(&session, "running", running, "kernel");
    assert_eq!(said(&session, "create bad.xml"), "Domain 'running' created from bad.xml\n");
    let in_use = "resource busy: image 'DIR/plain.raw' is in use: another disk or process writes it, or reads it while \
                  this one would write";
    for (disks, expected) in [
        (disk(&session, "nosuch", "raw", "vda"), "Cannot access storage file 'DIR/nosuch': No such file or directory"),
        (
            disk(&session, "run", "raw", "vda"),
            "Cannot access storage file 'DIR/run': it is a directory, a disk needs an image file or a block device",
        ),
        (
            disk(&session, "one.qcow2", "qcow2", "vda"),
            "invalid argument: the backing files of 'DIR/one.qcow2' form a loop or are too many; 'qemu-img info' shows \
             each",
        ),
        (
            disk(&session, "orphan.qcow2", "qcow2", "vda"),
            "Cannot access backing file 'DIR/missing.raw' of storage file 'DIR/orphan.qcow2': No such file or directory",
        ),
        (
            disk(&session, "garbage", "qcow2", "vda"),
            "internal error: DIR/garbage: the file is not what it is declared to be; correct the format, or the file: \
             declared as qcow2, but the file starts with no signature that is known",
        ),
        (
            disk(&session, "garbage", "vmdk", "vda"),
            "unsupported configuration: image format 'vmdk' is not supported: use raw or qcow2",
        ),
        (disk(&session, "plain.raw", "raw", "vda"), in_use),
        (disk(&session, "top.qcow2", "qcow2", "vda"), in_use),
    ] {
        write(&session, "bad", Document { devices: &disks, ..PLAIN }, "kernel");
        let expected = format!("error: Failed to create domain from bad.xml\nerror: {expected}\n");
        assert_eq!(said(&session, "create bad.xml"), expected, "{disks}");
    }
    // The image is free as soon as its machine has ended.
    assert_eq!(session.virsh("destroy running"), "Domain 'running' destroyed\n");
    write(&session, "bad", Document { devices: &disk(&session, "top.qcow2", "qcow2", "vda"), ..PLAIN }, "kernel");
    assert_eq!(said(&session, "create bad.xml"), "Domain 'bad' created from bad.xml\n");
    assert_eq!(session.virsh("list --all --name"), "bad\n");
}

#[test]
fn what_the_host_does_not_have_is_refused() {
    let session = Session::start();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let host_kib: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
    let more = host_kib + 4096;
    let too_much = format!("<memory unit='KiB'>{more}</memory>");
    for (document, kernel, expected) in [
        (
            Document { memory: &too_much, ..PLAIN },
            "kernel",
            format!(
                "unsupported configuration: the domain wants {more} KiB of memory and this host has {host_kib} KiB; \
                 lower <memory>"
            ),
        ),
        (
            Document { memory: "<memory>18446744073709551615</memory>", ..PLAIN },
            "kernel",
            "XML error: Invalid value '18446744073709551615' for element or attribute './memory[1]'".into(),
        ),
        (
            Document { vcpu: "300", ..PLAIN },
            "kernel",
            "unsupported configuration: Maximum CPUs greater than specified machine type limit 1: the domain wants 300; \
             lower <vcpu>"
                .into(),
        ),
        (Document { vcpu: "0", ..PLAIN }, "kernel", "XML error: invalid maximum number of vCPUs '0'".into()),
        (Document { vcpu: "-1", ..PLAIN }, "kernel", "XML error: maximum vcpus count must be an integer".into()),
        (PLAIN, "nosuch", "unable to open kernel 'DIR/nosuch': No such file or directory".into()),
    ] {
        write(&session, "bad", document, kernel);
        let expected = format!("error: Failed to create domain from bad.xml\nerror: {expected}\n");
        assert_eq!(said(&session, "create bad.xml"), expected);
    }
    assert_eq!(session.virsh("list --all --name"), "\n");
}

#[test]
fn what_must_be_unique_stays_so() {
    let session = Session::start();
    fs::write(session.path("a.raw"), vec![0; 512]).unwrap();
    let first = "<uuid>11111111-2222-3333-4444-555555555555</uuid>";
    let second = "<uuid>11111111-2222-3333-4444-555555555556</uuid>";
    write(&session, "one", Document { uuid: first, ..PLAIN }, "kernel");
    assert_eq!(said(&session, "define bad.xml"), "Domain 'one' defined from bad.xml\n");
    let twice = disk(&session, "a.raw", "raw", "vda") + &disk(&session, "b.raw", "raw", "vda");
    let taken = "operation failed: domain 'one' already exists with uuid 11111111-2222-3333-4444-555555555555";
    for (name, document, expected) in [
        ("one", Document { uuid: second, ..PLAIN }, taken),
        ("one", PLAIN, taken),
        (
            "two",
            Document { uuid: first, ..PLAIN },
            "operation failed: domain 'one' is already defined with uuid 11111111-2222-3333-4444-555555555555",
        ),
        ("two", Document { uuid: "<uuid>1111</uuid>", ..PLAIN }, "internal error: malformed uuid element"),
        (
            "two",
            Document { devices: &twice, ..PLAIN },
            "XML error: target 'vda' duplicated for disk sources 'DIR/a.raw' and 'DIR/b.raw'",
        ),
        ("t/wo", PLAIN, "XML error: name t/wo cannot contain '/'"),
    ] {
        write(&session, name, document, "kernel");
        for (verb, failed) in [("define", "Failed to define domain from"), ("create", "Failed to create domain from")] {
            let expected = format!("error: {failed} bad.xml\nerror: {expected}\n");
            assert_eq!(said(&session, &format!("{verb} bad.xml")), expected, "{verb} {name}");
        }
    }
    assert_eq!(session.virsh("list --all --name"), "one\n");
}
