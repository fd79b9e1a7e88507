//! The demo guest: Debian's stock cloud kernel and a busybox root file system on an ext4 qcow2 disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use block::{Disk, Format, OpenOptions, Qcow2Create};

use crate::cpio::Archive;
use crate::packages::{self, Consent};
use crate::run::{run, say, target};

/// What is built.
pub struct Guest {
    pub kernel: PathBuf,
    /// Loads the disk driver and goes on from the disk.
    pub initrd: PathBuf,
    /// Prints a line from /sbin/init and powers off: for measurements.
    pub bench_initrd: PathBuf,
    /// qcow2 with an ext4 root file system.
    pub disk: PathBuf,
    /// The unpacked kernel package.
    pub kernel_tree: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
}

/// What the initrd needs to reach the disk, and the guest for consoles, random numbers and the power button.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk"];
const GUEST_MODULES: &[&str] = &["virtio_console", "virtio-rng", "button", "evdev"];
const DISK_BYTES: u64 = 64 << 20;

/// Builds what is missing below target/guest. Takes seconds beside the download.
pub fn build(consent: Consent) -> Result<Guest> {
    packages::ensure(&[packages::GUEST], consent)?;
    let dir = target().join("guest");
    let kernel_package = packages::depends_on("linux-image-cloud-amd64", "linux-image-", None)?;
    let kernel_tree = packages::unpack(&kernel_package, &dir, None, consent)?;
    let busybox_tree = packages::unpack("busybox-static", &dir, None, consent)?;
    let busybox = fs::read(busybox_tree.join("bin/busybox")).context("busybox-static holds no bin/busybox")?;
    let kernel = find(&kernel_tree.join("boot"), "vmlinuz-")?;
    let modules = Modules::scan(&kernel_tree.join("lib/modules"))?;
    let guest = Guest {
        kernel,
        initrd: dir.join("initrd.img"),
        bench_initrd: dir.join("bench-initrd.img"),
        disk: dir.join("demo.qcow2"),
        kernel_tree,
        busybox: busybox_tree.join("bin/busybox"),
    };
    fs::write(&guest.initrd, initrd(&busybox, &modules)?)?;
    fs::write(&guest.bench_initrd, bench_initrd(&busybox))?;
    if !guest.disk.exists() {
        say("making the root file system");
        disk(&dir, &guest.disk, &busybox, &modules)?;
    }
    Ok(guest)
}

/// Where Debian's newer kernel comes from.
const NEWER_SUITE: &str = "bookworm-backports";
/// What has to be built into a kernel that reaches its root on an NVMe disk with no initrd.
const NVME_ROOT: [&str; 4] = ["CONFIG_PCI=y", "CONFIG_BLK_DEV_NVME=y", "CONFIG_EXT4_FS=y", "CONFIG_DEVTMPFS=y"];

/// A stock kernel that mounts an ext4 root from NVMe with no initrd: Debian's newer cloud kernel, read out of its package.
pub fn nvme_kernel(consent: Consent) -> Result<PathBuf> {
    packages::add_suite(NEWER_SUITE, consent)?;
    let package = packages::depends_on("linux-image-cloud-amd64", "linux-image-", Some(NEWER_SUITE))?;
    let tree = packages::unpack(&package, &target().join("guest"), Some(NEWER_SUITE), consent)?;
    let config = find(&tree.join("boot"), "config-")?;
    let text = fs::read_to_string(&config).with_context(|| format!("{} cannot be read", config.display()))?;
    if let Some(missing) = NVME_ROOT.iter().find(|option| !text.lines().any(|line| line == **option)) {
        bail!("{package} was not built with {missing}: it cannot boot from an NVMe disk without an initrd");
    }
    find(&tree.join("boot"), "vmlinuz-")
}

fn find(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("{} cannot be read", dir.display()))?;
    let found = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)));
    found.with_context(|| format!("{} holds no {prefix}*", dir.display()))
}

/// Kernel modules by name, with the modules they need.
pub struct Modules {
    by_name: BTreeMap<String, PathBuf>,
}

impl Modules {
    pub fn scan(dir: &Path) -> Result<Modules> {
        let mut by_name = BTreeMap::new();
        let mut pending = vec![dir.to_path_buf()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).with_context(|| format!("{} cannot be read", dir.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(|n| n.strip_suffix(".ko")) {
                    by_name.insert(name.replace('-', "_"), entry.path());
                }
            }
        }
        if by_name.is_empty() {
            bail!("{} holds no kernel modules", dir.display());
        }
        Ok(Modules { by_name })
    }

    /// `names` and what they need, each after its needs; what is built into the kernel is not among them.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut done = Vec::new();
        for name in names {
            self.add(&name.replace('-', "_"), &mut done)?;
        }
        Ok(done)
    }

    fn add(&self, name: &str, done: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if done.iter().any(|(n, _)| n == name) {
            return Ok(());
        }
        let Some(path) = self.by_name.get(name) else { return Ok(()) };
        let bytes = fs::read(path)?;
        for need in depends(&bytes) {
            self.add(&need.replace('-', "_"), done)?;
        }
        done.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// The `depends=` line of a module's .modinfo section.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else { return Vec::new() };
    let value = &module[at + key.len()..];
    let end = value.iter().position(|&b| b == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end]).split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

/// Applets the scripts below call.
const APPLETS: &[&str] =
    &["sh", "mount", "insmod", "switch_root", "sleep", "cat", "mkdir", "reboot", "poweroff", "echo"];

/// An archive with a shell.
pub fn skeleton(busybox: &[u8]) -> Archive {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", true, busybox);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive
}

fn initrd(busybox: &[u8], modules: &Modules) -> Result<Vec<u8>> {
    let mut archive = skeleton(busybox);
    let mut script = String::from("#!/bin/sh\nmount -t devtmpfs dev /dev\n");
    for (name, bytes) in modules.closure(BOOT_MODULES)? {
        archive.file(&format!("modules/{name}.ko"), false, &bytes);
        script.push_str(&format!("insmod /modules/{name}.ko\n"));
    }
    script.push_str(
        "n=0\n\
         until [ -b /dev/vda ] || [ $n = 100 ]; do n=$((n + 1)); sleep 0.1; done\n\
         if mount -t ext4 /dev/vda /root; then\n\
         \tmount --move /dev /root/dev\n\
         \texec switch_root /root /sbin/init\n\
         fi\n\
         echo 'initrd: no root file system on /dev/vda'\n\
         exec sh\n",
    );
    archive.file("init", true, script.as_bytes());
    Ok(archive.finish())
}

fn bench_initrd(busybox: &[u8]) -> Vec<u8> {
    let mut archive = skeleton(busybox);
    archive.dir("sbin");
    archive.file("init", true, b"#!/bin/sh\nexec /sbin/init\n");
    archive.file("sbin/init", true, b"#!/bin/sh\necho INIT-REACHED\nexec poweroff -f\n");
    archive.finish()
}

const INITTAB: &str = "\
::sysinit:/etc/rc
ttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
";

const ACPI_POWER: &str = "#!/bin/sh\nexec poweroff\n";

fn rc(modules: &[(String, Vec<u8>)]) -> String {
    let mut text = String::from(
        "#!/bin/sh\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t tmpfs tmp /tmp\n\
         mount -o remount,rw /\n\
         hostname demo\n",
    );
    for (name, _) in modules {
        text.push_str(&format!("insmod /lib/modules/{name}.ko 2>/dev/null\n"));
    }
    text.push_str("acpid -l /tmp/acpid.log\n");
    text
}

/// Makes the ext4 file system in a raw file and copies it into a qcow2 image.
fn disk(dir: &Path, image: &Path, busybox: &[u8], modules: &Modules) -> Result<()> {
    let tree = dir.join("rootfs");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let put = |name: &str, mode: u32, data: &[u8]| -> Result<()> {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&tree))?;
        fs::write(&path, data)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    for name in
        ["dev", "proc", "sys", "tmp", "root", "sbin", "usr/bin", "usr/sbin", "etc/acpi/PWRF", "lib/modules", "var/run"]
    {
        fs::create_dir_all(tree.join(name))?;
    }
    put("bin/busybox", 0o755, busybox)?;
    let list = crate::run::output(Command::new(dir.join("busybox-static/bin/busybox")).arg("--list-full"))?;
    for applet in list.lines().filter(|l| !l.is_empty() && *l != "bin/busybox") {
        let link = tree.join(applet);
        fs::create_dir_all(link.parent().unwrap_or(&tree))?;
        symlink("/bin/busybox", link)?;
    }
    let guest_modules = modules.closure(GUEST_MODULES)?;
    for (name, bytes) in &guest_modules {
        put(&format!("lib/modules/{name}.ko"), 0o644, bytes)?;
    }
    put("etc/inittab", 0o644, INITTAB.as_bytes())?;
    put("etc/rc", 0o755, rc(&guest_modules).as_bytes())?;
    put("etc/acpi/PWRF/00000080", 0o755, ACPI_POWER.as_bytes())?;
    put("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")?;
    put("etc/group", 0o644, b"root:x:0:\n")?;
    put("etc/profile", 0o644, b"export PS1='demo:\\w# '\n")?;
    put("etc/issue", 0o644, b"A guest of Vireo. Log in as root, no password.\n")?;
    let raw = dir.join("rootfs.raw");
    File::create(&raw)?.set_len(DISK_BYTES)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", path_with_sbin()).args(["-q", "-F", "-t", "ext4", "-L", "demo", "-E", "root_owner=0:0", "-d"]);
    run(mke2fs.arg(&tree).arg(&raw))?;
    to_qcow2(&raw, image)?;
    fs::remove_file(&raw)?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// Where administrators' programs are found too.
pub fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn to_qcow2(raw: &Path, image: &Path) -> Result<()> {
    let partial = image.with_extension("partial");
    if partial.exists() {
        fs::remove_file(&partial)?;
    }
    block::create_qcow2(&partial, DISK_BYTES, &Qcow2Create::default())?;
    let chain = block::resolve_chain(&partial, Some(Format::Qcow2), false, true)?;
    let disk = Disk::open(chain, &OpenOptions { format: Format::Qcow2, ..OpenOptions::default() })?;
    let mut source = File::open(raw)?;
    let mut buffer = vec![0u8; 64 << 10];
    for offset in (0..DISK_BYTES).step_by(buffer.len()) {
        source.read_exact(&mut buffer)?;
        if buffer.iter().any(|&b| b != 0) {
            disk.write(offset, &buffer)?;
        }
    }
    disk.flush()?;
    drop(disk);
    fs::rename(partial, image)?;
    Ok(())
}
