//! The lab: a machine emulated by QEMU, with SVM, whose stock Debian kernel has a real KVM. Build machines often have none.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::guest::{self, Guest, Modules};
use crate::packages::{self, Consent};
use crate::run::{cargo, output, run, say, target};

/// Modules of the lab's kernel: KVM on AMD, and the disk that carries results out.
const MODULES: &[&str] = &["irqbypass", "ccp", "kvm", "kvm_amd", "virtio_pci", "virtio_blk"];
const APPLETS: &[&str] = &[
    "sh", "mount", "insmod", "mkdir", "mkfifo", "cat", "echo", "grep", "tail", "sleep", "kill", "poweroff", "sed",
    "awk", "tr", "sync", "wc", "rm",
];

/// Longest run of the lab for a check.
const LIMIT: Duration = Duration::from_secs(300);

const INIT: &str = "\
#!/bin/sh
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
mkdir -p /dev/pts /tmp; mount -t devpts none /dev/pts; mount -t tmpfs none /tmp
mount -t tracefs none /sys/kernel/tracing 2>/dev/null
while read m; do insmod /modules/$m.ko 2>/dev/null; done < /modules/order
echo LAB-BEGIN
sh /cmd
echo LAB-RC=$?
poweroff -f
";

/// Counts what leaves the guest during a boot of it: all hardware exits, and those that reach the monitor.
const COUNT_EXITS: &str = "\
T=/sys/kernel/tracing/events/kvm
echo 'hist:keys=exit_reason:size=512' > $T/kvm_exit/trigger
echo 'hist:keys=reason:size=128' > $T/kvm_userspace_exit/trigger
echo 'hist:keys=port.hex,rw:size=512' > $T/kvm_pio/trigger
echo 'hist:keys=type,gpa.hex:size=4096' > $T/kvm_mmio/trigger
echo 'hist:keys=ecx.hex,write:size=512' > $T/kvm_msr/trigger
vireo-vmm run --accel kvm --kernel /l2/vmlinuz --initrd /l2/bench.img --append 'console=ttyS0 quiet' --memory 128 < /dev/null
for e in kvm_exit kvm_userspace_exit kvm_pio kvm_mmio kvm_msr; do
  echo \"-- $e\"; grep hitcount $T/$e/hist | sed 's/.*{//' | awk '{ h=$0; sub(/.*hitcount: */,\"\",h); print h, $0 }' | sort -rn | head -14
  awk -v e=$e '/hitcount:/ { sub(/.*hitcount: */, \"\"); n += $1 } END { print \"LAB-COUNT \" e \" \" n + 0 }' $T/$e/hist
done
";

/// The demo guest to its shell: logs in, proves the disk by a file, powers off.
const DEMO: &str = "\
mkfifo /tmp/in; : > /tmp/out
vireo-vmm run --accel kvm --kernel /l2/vmlinuz --initrd /l2/initrd.img --append 'console=ttyS0 quiet' --memory 256 \
  --disk path=/l2/demo.qcow2,format=qcow2,bus=virtio < /tmp/in > /tmp/out &
vmm=$!
exec 3> /tmp/in
wait_for() { n=0; until grep -q \"$1\" /tmp/out; do n=$((n + 1)); [ $n = 600 ] && { echo \"no '$1':\"; cat /tmp/out; kill $vmm; exit 1; }; sleep 0.2; done; }
wait_for 'login:'; echo root >&3
wait_for 'demo:'; echo 'echo VIREO-$((6 * 7)) > /root/proof; cat /root/proof; grep -o KVM /sys/hypervisor/type /proc/cpuinfo; uname -r' >&3
wait_for 'VIREO-42'
awk '/^Size:/ { ram = $2 >= 262144 && $2 < 270336 } /^Anonymous:/ && !ram { n += $2 } END { print \"LAB-COUNT memory \" n }' /proc/$vmm/smaps
echo LAB-COUNT threads $(echo /proc/$vmm/task/* | wc -w)
echo LAB-COUNT descriptors $(echo /proc/$vmm/fd/* | wc -w)
echo poweroff >&3
wait $vmm; rc=$?
tail -n 12 /tmp/out
exit $rc
";

/// What to run.
pub enum Job {
    /// Probe, demo guest, tiny guests.
    Check,
    /// Exit counts of a boot.
    Exits,
}

/// What the lab is given, beside its kernel and the demo guest's files.
pub struct Lab<'a> {
    /// Programs, with the libraries they need.
    pub programs: &'a [PathBuf],
    /// Further files by their names inside.
    pub files: &'a [(String, Vec<u8>)],
    /// Further modules.
    pub modules: &'a [&'a str],
    /// What is run.
    pub script: &'a str,
    /// A raw disk: `/dev/vda`.
    pub disk: Option<&'a Path>,
    /// When it is ended.
    pub limit: Duration,
}

/// Builds and boots the lab and does `job` in it.
pub fn go(consent: Consent, job: &Job) -> Result<String> {
    packages::ensure(&[packages::BUILD, packages::QEMU], consent)?;
    let guest = guest::build(consent)?;
    say("building vireo-vmm and the tiny guests");
    run(cargo().args(["build", "-p", "vmm", "-p", "asm_guests"]))?;
    let script = match job {
        Job::Check => format!("vireo-vmm --probe-kvm || exit 1\nasm-guests kvm || exit 1\n{DEMO}"),
        Job::Exits => COUNT_EXITS.to_owned(),
    };
    let programs = ["vireo-vmm", "asm-guests"].map(|name| target().join("debug").join(name));
    let lab = Lab { programs: &programs, files: &[], modules: &[], script: &script, disk: None, limit: LIMIT };
    let said = run_in(&guest, &lab)?;
    Ok(match job {
        Job::Check => format!("{said}\n{}", summary(&said)),
        Job::Exits => said,
    })
}

/// Boots the lab and returns what its script said.
pub fn run_in(guest: &Guest, lab: &Lab<'_>) -> Result<String> {
    let dir = target().join("lab");
    fs::create_dir_all(&dir)?;
    let initrd = dir.join("initrd.img");
    fs::write(&initrd, l1(guest, lab)?)?;
    say("booting the lab (about 20 s)");
    boot(guest, lab, &initrd, &dir.join("serial.log"))
}

/// What a check that passed has shown.
fn summary(said: &str) -> String {
    let guests = said.lines().find(|l| l.contains(" passed, ") && l.ends_with(" skipped")).unwrap_or("no count");
    let skipped = said.lines().filter(|l| l.contains(" skipped: "));
    let names: String = skipped.map(|l| format!("\n                   {}", l.trim())).collect();
    let count = |what: &str| {
        let prefix = format!("LAB-COUNT {what} ");
        said.lines().find_map(|l| l.strip_prefix(&prefix)).map_or("?", str::trim).to_owned()
    };
    let (memory, threads, files) = (count("memory"), count("threads"), count("descriptors"));
    format!(
        "the lab, under real KVM:\n  \
         functional probe usable\n  \
         assembly guests  {guests}{names}\n  \
         demo guest       booted from its disk, logged in, kept a file, powered off\n  \
         it held          {memory} KiB of anonymous memory beyond the guest's, {threads} threads, {files} descriptors\n"
    )
}

fn l1(guest: &Guest, lab: &Lab<'_>) -> Result<Vec<u8>> {
    let modules = Modules::scan(&guest.kernel_tree.join("lib/modules"))?;
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "modules", "l2", "lib64", "lib"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", true, &fs::read(&guest.busybox)?);
    APPLETS.iter().for_each(|applet| archive.link(&format!("bin/{applet}"), "busybox"));
    let mut order = String::new();
    for (name, bytes) in modules.closure(&[MODULES, lab.modules].concat())? {
        archive.file(&format!("modules/{name}.ko"), false, &bytes);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", false, order.as_bytes());
    archive.file("init", true, INIT.as_bytes());
    archive.file("cmd", false, lab.script.as_bytes());
    let mut libraries = Vec::new();
    for program in lab.programs {
        let name = program.file_name().context("a program without a name")?.to_string_lossy();
        archive.file(&format!("bin/{name}"), true, &fs::read(program)?);
        for library in libraries_of(program)? {
            if !libraries.contains(&library) {
                libraries.push(library);
            }
        }
    }
    for library in libraries {
        put(&mut archive, library.trim_start_matches('/'), &fs::read(&library)?);
    }
    for (name, path) in [
        ("vmlinuz", &guest.kernel),
        ("initrd.img", &guest.initrd),
        ("bench.img", &guest.bench_initrd),
        ("demo.qcow2", &guest.disk),
    ] {
        archive.file(&format!("l2/{name}"), false, &fs::read(path)?);
    }
    for (name, bytes) in lab.files {
        put(&mut archive, name, bytes);
    }
    Ok(archive.finish())
}

/// Adds a file that may be executed, and the directories above it.
fn put(archive: &mut Archive, name: &str, bytes: &[u8]) {
    let mut parent = String::new();
    for part in Path::new(name).parent().into_iter().flat_map(Path::components) {
        parent.push_str(&part.as_os_str().to_string_lossy());
        archive.dir(&parent);
        parent.push('/');
    }
    archive.file(name, true, bytes);
}

/// The shared libraries of `program`, the loader among them.
fn libraries_of(program: &Path) -> Result<Vec<String>> {
    let text = output(Command::new("ldd").arg(program))?;
    Ok(text.split_whitespace().filter(|w| w.starts_with('/')).map(str::to_owned).collect())
}

fn boot(guest: &Guest, lab: &Lab<'_>, initrd: &Path, log: &Path) -> Result<String> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "EPYC-v4,+svm", "-m", "1536", "-smp", "1", "-nodefaults"]);
    qemu.args(["-no-user-config", "-display", "none", "-no-reboot", "-serial"]).arg(format!("file:{}", log.display()));
    qemu.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(initrd);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 tsc=reliable"]);
    if let Some(disk) = lab.disk {
        let drive = format!("file={},if=none,id=disk,format=raw,cache=unsafe", disk.display());
        qemu.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"]);
    }
    let _ = File::create(log)?;
    let mut child = qemu.stdin(Stdio::null()).spawn().context("cannot start qemu-system-x86_64")?;
    let status = wait(&mut child, lab.limit)?;
    let text = String::from_utf8_lossy(&fs::read(log)?).replace('\r', "");
    let Some((_, inside)) = text.split_once("LAB-BEGIN\n") else {
        bail!("the lab did not come up ({status}); its console is in {}", log.display());
    };
    let Some((inside, rc)) = inside.rsplit_once("LAB-RC=") else {
        bail!("the lab stopped in the middle; its console is in {}:\n{inside}", log.display());
    };
    if rc.lines().next() != Some("0") {
        bail!("a check in the lab failed:\n{inside}");
    }
    Ok(inside.to_owned())
}

/// Waits for QEMU's end, at most `limit`.
fn wait(child: &mut std::process::Child, limit: Duration) -> Result<std::process::ExitStatus> {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let timeout = rustix::time::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
    if rustix::event::poll(&mut fds, Some(&timeout))? == 0 {
        child.kill()?;
        child.wait()?;
        bail!("the lab did not end within {} s", limit.as_secs());
    }
    Ok(child.wait()?)
}
