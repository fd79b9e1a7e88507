//! Debian's stock kernels as guests of `vireo-vmm run`.
//!
//! `cargo xtask guest` builds what they boot and `cargo xtask test` says where it is.

mod support;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::{built, end_by, vmm};

/// Runs a guest with `options` to its end.
fn run<S: AsRef<OsStr>>(options: impl IntoIterator<Item = S>) -> Output {
    let mut command = vmm();
    command.args(["run", "--accel", "soft", "--no-reboot"]).args(options);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    end_by(&child);
    child.wait_with_output().unwrap()
}

/// What a program prints.
fn tool_bytes(program: &str, args: &[&OsStr]) -> Vec<u8> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).env("PATH", path).args(args).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
fn tool(program: &str, args: &[&OsStr]) -> String {
    String::from_utf8(tool_bytes(program, args)).unwrap()
}

/// What debugfs prints for `request` about the ext4 file system in a qcow2 image.
fn file_in(image: &Path, request: &str) -> Vec<u8> {
    let raw = image.with_extension("raw");
    tool("qemu-img", &["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), image.as_ref(), raw.as_ref()]);
    tool_bytes("debugfs", &["-R".as_ref(), request.as_ref(), raw.as_ref()])
}

/// The commands that the first process carries out: the kernel puts no devices into /dev by itself.
fn init(commands: &str) -> String {
    format!("init=/bin/sh -- -c \"mount -t devtmpfs dev /dev; exec > /dev/console 2>&1; {commands}; poweroff -f\"")
}

/// What the guest looks at, a line each, and what it then does to its disk.
const FACTS: &str = "mount -t proc proc /proc; mount -t sysfs sys /sys; cd /sys/class/nvme/nvme0; cat serial state; \
    mount; grep nvme /proc/interrupts; cd /sys/firmware/acpi/tables; echo tables [A-Z]*; grep ECAM /proc/iomem; \
    echo clocks $(cat /sys/devices/system/clocksource/*/available_clocksource); \
    dd if=/dev/urandom of=/root/random bs=64k count=32 2>/dev/null; fstrim /; echo 3 > /proc/sys/vm/drop_caches; \
    sha256sum /root/random; echo written through NVMe > /root/proof; sync";

#[test]
fn an_nvme_disk_holds_the_root_of_a_kernel_without_an_initrd() {
    let kernel = built("VIREO_TEST_NVME_KERNEL");
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("root.qcow2");
    std::fs::copy(built("VIREO_TEST_GUEST").join("demo.qcow2"), &disk).unwrap();
    let append = format!("console=ttyS0 quiet rw root=/dev/nvme0n1 rootwait {}", init(FACTS));
    let drive = format!("path={},format=qcow2,bus=nvme,serial=nvme-7", disk.display());
    let output = run(["--memory", "192", "--disk", &drive, "--append", &append, "--kernel", kernel.to_str().unwrap()]);
    let printed = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let line_with = |text: &str| {
        let line = printed.lines().find(|line| line.contains(text));
        line.unwrap_or_else(|| panic!("no line with {text:?}:\n{printed}"))
    };
    for text in [
        "nvme-7",
        "live",
        "/dev/root on / type ext4 (rw",
        "PCI-MSIX-0000:00:01.0",
        "tables APIC DSDT FACP FACS HPET MCFG WAET",
        "b0000000-b00fffff : PCI ECAM 0000 [bus 00-00]",
    ] {
        line_with(text);
    }
    let clocks = line_with("clocks ");
    assert!([" kvm-clock", " tsc", " hpet", " acpi_pm"].iter().all(|clock| clocks.contains(clock)), "{clocks}");
    let check = tool("qemu-img", &["check".as_ref(), disk.as_ref()]);
    assert!(check.contains("No errors were found"), "{check}");
    assert_eq!(file_in(&disk, "cat /root/proof"), b"written through NVMe\n");
    let random = directory.path().join("random");
    std::fs::write(&random, file_in(&disk, "cat /root/random")).unwrap();
    let sum = tool("sha256sum", &[random.as_os_str()]);
    assert_eq!(line_with("/root/random").split(' ').next(), sum.split(' ').next());
}

#[test]
fn a_boot_on_the_virtual_clock_is_repeatable_to_the_instruction() {
    let kernel = built("VIREO_TEST_KERNEL");
    let initrd = built("VIREO_TEST_GUEST").join("bench-initrd.img");
    let boot = |number: u32| {
        let directory = tempfile::tempdir().unwrap();
        let stats = directory.path().join("stats");
        let output = run([
            "--clock".as_ref(),
            "virtual".as_ref(),
            "--memory".as_ref(),
            "128".as_ref(),
            "--append".as_ref(),
            "console=ttyS0 quiet".as_ref(),
            "--kernel".as_ref(),
            kernel.as_os_str(),
            "--initrd".as_ref(),
            initrd.as_os_str(),
            "--stats".as_ref(),
            stats.as_os_str(),
        ]);
        assert!(output.status.success() && output.stderr.is_empty(), "boot {number}: {output:?}");
        (String::from_utf8(output.stdout).unwrap(), std::fs::read_to_string(stats).unwrap())
    };
    // Both at once: what else the host does must not show.
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| boot(1));
        (boot(2), first.join().unwrap())
    });
    assert!(first.0.contains("INIT-REACHED"), "{}", first.0);
    assert_eq!(first, second);
    let document: serde_json::Value = serde_json::from_str(&first.1).unwrap();
    assert_eq!(document["console_bytes"], first.0.len());
    // A kernel does not get to its first process with less; not a count of ours, a floor.
    assert!(document["instructions"].as_u64().unwrap() > 100_000_000, "{document}");
    assert!(document["exits"]["port_writes"].as_u64().unwrap() >= first.0.len() as u64, "{document}");
}
