//! Debian's programs that call qemu-img, unmodified, with this tool as the qemu-img on their PATH: libvirt's storage
//! driver and virt-install, libguestfs with virt-sparsify and virt-resize. What they leave is judged by QEMU's own.
//!
//! They take minutes and packages of their own, so they run where `VIREO_TEST_LONG` is set.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use support::split;

/// A directory with this tool as `bin/qemu-img`, which notes what it is called with, and a home for what calls it.
struct Callers {
    dir: tempfile::TempDir,
}

impl Callers {
    fn new() -> Callers {
        let callers = Callers { dir: tempfile::tempdir().unwrap() };
        for name in ["bin", "ours", "home", "run", "tmp"] {
            fs::create_dir(callers.path(name)).unwrap();
            fs::set_permissions(callers.path(name), PermissionsExt::from_mode(0o777)).unwrap();
        }
        fs::set_permissions(callers.dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        // A copy, since the target directory may be closed to others.
        fs::copy(env!("CARGO_BIN_EXE_vireo-img"), callers.path("ours/qemu-img")).unwrap();
        let [calls, ours] = ["run/calls", "ours/qemu-img"].map(|name| callers.path(name).display().to_string());
        let wrapper = callers.path("bin/qemu-img");
        fs::write(&wrapper, format!("#!/bin/sh\necho \"$@\" >> {calls}\nexec {ours} \"$@\"\n")).unwrap();
        fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).unwrap();
        callers
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What qemu-img was called with since the last time, a line a call.
    fn calls(&self) -> String {
        let path = self.path("run/calls");
        let calls = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        calls
    }

    /// A program that finds this tool, with the home directory below. `as_user`: not as root.
    fn command(&self, program: &str, as_user: bool) -> Command {
        let mut command = Command::new(program);
        if as_user && rustix::process::geteuid().is_root() {
            command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]);
        }
        let path = format!("{}:{}:/usr/sbin", self.path("bin").display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("LC_ALL", "C").env("HOME", self.path("home")).env("TMPDIR", self.path("tmp"));
        command.env("XDG_RUNTIME_DIR", self.path("run")).current_dir(self.path("home"));
        for name in ["XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env_remove(name);
        }
        command
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} ({PACKAGES}) does not start: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

const PACKAGES: &str = "packages libguestfs-tools, libvirt-daemon-system, virtinst: `cargo xtask test --long`";

/// QEMU's own tool, which is not on the PATH of what is tested.
fn theirs(words: &[&str]) -> Output {
    Command::new("qemu-img").args(words).output().unwrap()
}

/// QEMU finds nothing wrong with an image, and reads from it what this tool reads.
fn judge(image: &Path, after: &str) {
    let dir = tempfile::tempdir().unwrap();
    let [ours, qemus] = ["ours", "qemus"].map(|name| dir.path().join(name).display().to_string());
    let image = image.to_str().unwrap();
    let check = theirs(&["check", image]);
    assert!(matches!(check.status.code(), Some(0 | 63)), "{after}: {image}: {}", text(&check));
    let read = theirs(&["convert", "-O", "raw", image, &qemus]);
    assert!(read.status.success(), "{after}: {image}: {}", text(&read));
    succeed(Command::new(env!("CARGO_BIN_EXE_vireo-img")).args(["convert", "-O", "raw", image, &ours]));
    let same = theirs(&["compare", "-f", "raw", "-F", "raw", &ours, &qemus]);
    assert!(same.status.success(), "{after}: {image}: {}", text(&same));
}

/// A stock libvirtd of a user, of its own.
struct Libvirtd {
    callers: Callers,
    daemon: Child,
}

impl Libvirtd {
    fn start() -> Libvirtd {
        let callers = Callers::new();
        let ready = callers.path("run/ready");
        let socket = UnixDatagram::bind(&ready).unwrap();
        fs::set_permissions(&ready, PermissionsExt::from_mode(0o777)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let log = fs::File::create(callers.path("libvirtd.log")).unwrap();
        let mut command = callers.command("libvirtd", true);
        command.env("NOTIFY_SOCKET", &ready).stdout(log.try_clone().unwrap()).stderr(log);
        let daemon = command.spawn().unwrap_or_else(|error| panic!("libvirtd ({PACKAGES}) does not start: {error}"));
        let libvirtd = Libvirtd { callers, daemon };
        let mut said = [0; 256];
        while socket.recv(&mut said).unwrap_or_else(|error| panic!("{error}: {}", libvirtd.log())) == 0 {}
        libvirtd
    }

    fn log(&self) -> String {
        fs::read_to_string(self.callers.path("libvirtd.log")).unwrap()
    }

    /// A line of a script: `virsh` or `virt-install`, on this daemon.
    fn run(&self, line: &str) -> Output {
        let words = split(line);
        let (program, words) = words.split_first().unwrap();
        let mut command = self.callers.command(program, true);
        command.args(["--connect", "qemu:///session"]).args(words);
        command.output().unwrap_or_else(|error| panic!("{program} ({PACKAGES}) does not start: {error}"))
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        // Its guests would outlive it.
        self.run("virsh destroy vm");
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Commands; the indented lines below one are the calls of qemu-img that it makes, by some of their words in order.
const VOLUMES: &str = "
virsh pool-define-as p dir --target POOL
virsh pool-build p
virsh pool-start p
virsh vol-create-as p a.qcow2 8M --format qcow2
    create -f qcow2 POOL/a.qcow2 8192K
virsh vol-create-as p b.raw 4M --format raw
virsh vol-upload b.raw UPLOAD --pool p
virsh vol-clone a.qcow2 c.qcow2 --pool p
    convert -f qcow2 -O qcow2 POOL/a.qcow2 POOL/c.qcow2
virsh vol-create-from p FILE/from.xml b.raw --inputpool p
    convert -f raw -O qcow2 POOL/b.raw POOL/from.qcow2
virsh vol-resize from.qcow2 16M --pool p
    resize POOL/from.qcow2 16777216
virsh vol-resize from.qcow2 12M --shrink --pool p
    resize --shrink POOL/from.qcow2 12582912
virsh vol-create-as p top.qcow2 16M --format qcow2 --backing-vol from.qcow2 --backing-vol-format qcow2
    create -f qcow2 -b POOL/from.qcow2 POOL/top.qcow2 16384K
virsh vol-create p FILE/wide.xml --prealloc-metadata
    create -f qcow2 POOL/wide.qcow2 4096K
virsh vol-clone top.qcow2 d.qcow2 --pool p
    convert -f qcow2 -O qcow2 POOL/top.qcow2 POOL/d.qcow2
virsh vol-create-as p v.vmdk 8M --format vmdk
    create -f vmdk POOL/v.vmdk 8192K
virsh vol-create-as p v.vdi 8M --format vdi
    create -f vdi POOL/v.vdi 8192K
virsh vol-create-as p v.vpc 8M --format vpc
    create -f vpc POOL/v.vpc 8192K
virsh vol-wipe b.raw --pool p
virsh vol-delete c.qcow2 --pool p
virsh pool-refresh p
";

/// A guest on a new volume, then at rest: internal snapshots, and an external one.
const GUEST: &str = "
virt-install --name vm --memory 64 --disk pool=p,size=0.03125,format=qcow2,bus=virtio --import --noautoconsole \
  --virt-type qemu --graphics none --network none --osinfo detect=off,require=off
    create -f qcow2 POOL/vm.qcow2 32768K
virsh destroy vm
virsh snapshot-create-as vm s1
    snapshot -c s1 POOL/vm.qcow2
virsh snapshot-create-as vm s2
    snapshot -c s2 POOL/vm.qcow2
virsh snapshot-revert vm s1
    snapshot -a s1 POOL/vm.qcow2
virsh snapshot-delete vm s2
    snapshot -d s2 POOL/vm.qcow2
virsh snapshot-create-as vm x1 --disk-only
    create -f qcow2 POOL/vm.x1
virsh start vm
virsh destroy vm
virsh undefine vm --snapshots-metadata
";

const FROM: &str = "<volume><name>from.qcow2</name><capacity unit='M'>4</capacity><target><format type='qcow2'/>\
    <compat>1.1</compat><features><lazy_refcounts/></features></target></volume>";
const WIDE: &str = "<volume><name>wide.qcow2</name><capacity unit='M'>4</capacity><allocation>0</allocation><target>\
    <format type='qcow2'/><compat>1.1</compat><clusterSize unit='KiB'>128</clusterSize>\
    <features><extended_l2/></features></target></volume>";

/// Whether a call has these words, in this order.
fn has_words(call: &str, words: &str) -> bool {
    let mut call = call.split_whitespace();
    words.split_whitespace().all(|word| call.any(|said| said == word))
}

#[test]
fn libvirt_and_virt_install_manage_volumes() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        return;
    }
    let libvirtd = Libvirtd::start();
    let callers = &libvirtd.callers;
    let pool = callers.path("home/pool");
    fs::write(callers.path("home/from.xml"), FROM).unwrap();
    fs::write(callers.path("home/wide.xml"), WIDE).unwrap();
    let uploaded: Vec<u8> = (0..3_000_000u32).map(|at| (at / 777) as u8).collect();
    fs::write(callers.path("home/upload"), &uploaded).unwrap();
    let script = format!("{VOLUMES}{}", GUEST.trim_start());
    let place = |line: &str| {
        let places = [("POOL", &pool), ("FILE", &callers.path("home")), ("UPLOAD", &callers.path("home/upload"))];
        places.iter().fold(line.to_owned(), |line, (name, path)| line.replace(name, path.to_str().unwrap()))
    };
    let mut lines = script.lines().filter(|line| !line.is_empty()).map(place).peekable();
    while let Some(line) = lines.next() {
        let said = libvirtd.run(&line);
        assert!(said.status.success(), "{line}: {}\n{}", text(&said), libvirtd.log());
        let calls = callers.calls();
        let mut made = calls.lines();
        while let Some(wanted) = lines.next_if(|line| line.starts_with(' ')) {
            assert!(made.any(|call| has_words(call, &wanted)), "{line}: not{wanted} in\n{calls}");
        }
        // A running guest holds its image.
        if !line.contains("install") && !line.contains("start vm") && pool.exists() {
            for image in fs::read_dir(&pool).unwrap() {
                judge(&image.unwrap().path(), &line);
            }
        }
        if line.contains("vol-create-from") {
            let seen = callers.path("run/seen");
            let read =
                theirs(&["convert", "-O", "raw", pool.join("from.qcow2").to_str().unwrap(), seen.to_str().unwrap()]);
            assert!(read.status.success() && fs::read(seen).unwrap().starts_with(&uploaded), "{}", text(&read));
        }
    }
}

/// Programs of libguestfs, whose appliance is built from Debian's cloud kernel and runs on QEMU's interpreter.
struct Guestfs {
    callers: Callers,
    kernel: PathBuf,
    version: String,
    _modules: HostModules,
}

/// The host's `/lib/modules`, whose mode supermin gives to the appliance's: on a host without a kernel package it is made,
/// and goes away again.
struct HostModules {
    is_ours: bool,
}

impl HostModules {
    const PATH: &str = "/lib/modules";

    fn new() -> HostModules {
        let is_ours = !Path::new(Self::PATH).exists();
        if is_ours {
            let why = "supermin needs it; make it, or run this as root";
            fs::create_dir(Self::PATH).unwrap_or_else(|error| panic!("{}: {error}: {why}", Self::PATH));
        }
        HostModules { is_ours }
    }
}

impl Drop for HostModules {
    fn drop(&mut self) {
        if self.is_ours {
            // Whoever has put something there meanwhile keeps it.
            let _ = fs::remove_dir(Self::PATH);
        }
    }
}

impl Guestfs {
    fn new() -> Guestfs {
        let callers = Callers::new();
        let kernel = std::env::var_os("VIREO_TEST_KERNEL").map(PathBuf::from);
        let kernel = kernel.expect("VIREO_TEST_KERNEL is a kernel out of target/guest: `cargo xtask guest` builds it");
        let version = kernel.file_name().unwrap().to_str().unwrap().strip_prefix("vmlinuz-").unwrap().to_owned();
        let modules = kernel.parent().unwrap().with_file_name("lib").join("modules").join(&version);
        let copy = callers.path("root/lib/modules");
        fs::create_dir_all(&copy).unwrap();
        succeed(Command::new("cp").arg("-r").arg(modules).arg(copy));
        succeed(callers.command("depmod", false).arg("-b").arg(callers.path("root")).arg(&version));
        Guestfs { callers, kernel, version, _modules: HostModules::new() }
    }

    fn run(&self, line: &str) -> String {
        let words = split(line);
        let (program, words) = words.split_first().unwrap();
        let mut command = self.callers.command(program, false);
        let modules = self.callers.path("root/lib/modules").join(&self.version);
        command.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
        command.env("LIBGUESTFS_CACHEDIR", self.callers.path("tmp")).env("SUPERMIN_KERNEL", &self.kernel);
        command.env("SUPERMIN_KERNEL_VERSION", &self.version).env("SUPERMIN_MODULES", modules);
        succeed(command.args(words).stdin(Stdio::null()))
    }
}

#[test]
fn libguestfs_makes_sparse_resizes_and_describes() {
    if std::env::var_os("VIREO_TEST_LONG").is_none() {
        return;
    }
    let guestfs = Guestfs::new();
    let home = |name: &str| guestfs.callers.path("home").join(name);
    let said = guestfs.run(
        "guestfish -- disk-create c.qcow2 qcow2 150M preallocation:metadata compat:1.1 clustersize:32768 : \
         disk-create top.qcow2 qcow2 -1 backingfile:c.qcow2 backingformat:qcow2 : disk-format top.qcow2 : \
         disk-virtual-size top.qcow2 : disk-has-backing-file top.qcow2 : disk-has-backing-file c.qcow2",
    );
    assert_eq!(said, "qcow2\n157286400\ntrue\nfalse\n");
    judge(&home("top.qcow2"), "disk-create");
    fs::File::create(home("a.raw")).unwrap().set_len(100 << 20).unwrap();
    guestfs.run(
        "guestfish -a a.raw run : part-disk /dev/sda mbr : mkfs ext4 /dev/sda1 : mount /dev/sda1 / : \
         write /hello world : fill 7 30000000 /big : rm /big",
    );
    let before = fs::metadata(home("a.raw")).unwrap();
    guestfs.callers.calls();
    guestfs.run("virt-sparsify --convert qcow2 --format raw a.raw b.qcow2");
    let calls = guestfs.callers.calls();
    for wanted in ["info --output json", "create -f qcow2", "convert -f qcow2 -O qcow2 ./b.qcow2"] {
        assert!(calls.lines().any(|call| has_words(call, wanted)), "no {wanted} in\n{calls}");
    }
    judge(&home("b.qcow2"), "virt-sparsify");
    let after = fs::metadata(home("b.qcow2")).unwrap();
    assert!(after.len() < before.len() / 10, "30 MB of a removed file are gone: {}", after.len());
    // qcow2 from qcow2, packed.
    guestfs.run("virt-sparsify --compress --convert qcow2 b.qcow2 packed.qcow2");
    let calls = guestfs.callers.calls();
    assert!(calls.lines().any(|call| has_words(call, "convert -O qcow2 -c ./packed.qcow2")), "{calls}");
    judge(&home("packed.qcow2"), "virt-sparsify --compress");
    guestfs.run("virt-resize --expand /dev/sda1 packed.qcow2 c.qcow2");
    judge(&home("c.qcow2"), "virt-resize");
    let read = guestfs.run("guestfish --ro -a c.qcow2 -m /dev/sda1 cat /hello : list-filesystems");
    assert!(read.starts_with("world") && read.contains("/dev/sda1: ext4"), "{read}");
    assert!(guestfs.callers.calls().contains("create -f qcow2 -o backing_file="));
}
