//! Debian's stock kernel with its root on a qcow2 disk, under virsh from its start to its end.

use std::fs;
use std::process::Command;

use e2e::host::{Domain, Host, shown};
use e2e::programs::built;
use e2e::screen::Screen;

/// The guest, on a copy of its disk.
fn define(host: &Host) {
    let guest = built("VIREO_TEST_GUEST");
    let kernel = built("VIREO_TEST_KERNEL");
    fs::copy(guest.join("demo.qcow2"), host.path("demo.qcow2")).unwrap();
    let os = format!("<initrd>{}</initrd><cmdline>console=ttyS0 quiet</cmdline>", guest.join("initrd.img").display());
    let devices = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk><serial type='pty'><target port='0'/></serial>\
         <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        host.path("demo.qcow2").display()
    );
    host.define(&Domain {
        memory_mib: 256,
        kernel: Some(&kernel),
        os: &os,
        devices: &devices,
        ..Domain::named("demo")
    });
}

fn log_in(screen: &mut Screen) {
    screen.wait_for("login: ");
    screen.type_in("root\n");
    screen.wait_for("demo:");
}

#[test]
fn a_stock_linux_boots_pauses_resets_and_shuts_down() {
    let host = Host::start();
    define(&host);
    let mut screen = Screen::run(host.virsh_command("start demo --console"));
    log_in(&mut screen);
    screen.type_in("echo proof-$((6 * 7)) > /root/proof; sync; cat /root/proof\n");
    screen.wait_for("proof-42");
    screen.wait_for("demo:");

    assert_eq!(host.virsh("suspend demo"), "Domain 'demo' suspended\n");
    screen.type_in("echo awake-$((6 * 7))\n");
    assert_eq!(host.virsh("domstate demo --reason"), "paused (user)\n");
    assert!(!screen.shows("awake-42"), "a paused guest answers");
    assert_eq!(host.virsh("resume demo"), "Domain 'demo' resumed\n");
    screen.wait_for("awake-42");

    assert_eq!(host.virsh("reset demo"), "Domain 'demo' was reset\n");
    log_in(&mut screen);
    screen.type_in("cat /root/proof\n");
    screen.wait_for("proof-42");
    assert_eq!(host.virsh("domstate demo --reason"), "running (unpaused)\n");

    assert_eq!(host.virsh("shutdown demo"), "Domain 'demo' is being shutdown\n");
    assert!(screen.end().success());
    host.wait_for("domstate demo --reason", "shut off (shutdown)\n");
    let check = Command::new("qemu-img").arg("check").arg(host.path("demo.qcow2")).output();
    let check = check.expect("qemu-img runs (Debian package qemu-utils)");
    assert_eq!(check.status.code(), Some(0), "{}", shown(&check));
    assert!(shown(&check).starts_with("No errors were found on the image.\n"), "{}", shown(&check));
}
