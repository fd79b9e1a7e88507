//! `bench disk`: a guest's disk under load, by ours and by QEMU in the lab, where KVM is real: the same guest, the same
//! files, the same requests. What counts is the processor time of the whole monitor for them.
//!
//! The lab's own processor is emulated, so its seconds are long ones; both monitors pay the same for an instruction. Of
//! three runs of a load the cheapest counts.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Guest, Modules};
use crate::lab::{self, Lab};
use crate::packages::{self, Consent};
use crate::programs;
use crate::run::{cargo, run, say, target};

const MIB: usize = 1 << 20;
/// Size of the disks under load.
const DISK_MIB: usize = 64;
const LIMIT: Duration = Duration::from_secs(3000);

/// A load: its name, what `disk_load` is told, how many requests.
const LOADS: [(&str, &str, u32); 4] = [
    ("4 KiB random read", "read random 4096 32", 4000),
    ("4 KiB random write", "write random 4096 32", 4000),
    ("1 MiB sequential read", "read sequential 1048576 8", 128),
    ("1 MiB sequential write", "write sequential 1048576 8", 128),
];

/// Files that QEMU needs to boot a kernel.
const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"];

/// The guest under load: does what its console says.
const GUEST: &str = "
n=0
until [ -b /dev/vdb ] || [ $n = 100 ]; do n=$((n + 1)); sleep 0.1; done
echo GUEST-READY
while read line; do
  [ \"$line\" = off ] && poweroff -f
  /bin/disk_load $line || echo LOAD-FAILED
  echo LOAD-DONE
done
";

/// The loads on both disks of one monitor, three times, with the processor time that the process takes for each, in
/// hundredths of a second: all of it, and the guest's own. The first time, code is translated for the lab's processor.
/// Both start with free memory in large pieces, so that both have huge pages.
const DRIVE: &str = "\
mkdir -p /mnt; mount -t ext4 /dev/vda /mnt || exit 1
cpu() { awk '{ print $14 + $15 }' /proc/$1/stat; }
inside() { awk '{ print $43 }' /proc/$1/stat; }
wait_for() { n=0; until [ \"$(grep -c \"$1\" /tmp/out)\" -ge $2 ]; do n=$((n + 1)); [ $n = 3000 ] && { cat /tmp/out; exit 1; }; [ -d /proc/$pid ] || { cat /tmp/out; exit 1; }; sleep 0.2; done; }
loads() {
  pid=$!
  exec 3> /tmp/in
  wait_for GUEST-READY 1
  done=0
  for disk in a b a b a b; do
    while read -r way order block depth count; do
      sync; [ $cache = writeback ] || echo 3 > /proc/sys/vm/drop_caches
      before=$(cpu $pid); guest=$(inside $pid)
      echo \"/dev/vd$disk $way $order $block $depth $count\" >&3
      done=$((done + 1)); wait_for LOAD-DONE $done
      echo \"LAB-LOAD $1 $disk $way-$order $(($(cpu $pid) - before)) $(($(inside $pid) - guest))\"
    done < /loads
  done
  grep -q LOAD-FAILED /tmp/out && { cat /tmp/out; exit 1; }
  echo off >&3; wait $pid; exec 3>&-
  rm /tmp/in /tmp/out
}
fresh() { sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory; mkfifo /tmp/in; : > /tmp/out; }
for cache in writeback none; do
  fresh
  vireo-vmm run --accel kvm --kernel /l2/vmlinuz --initrd /l2/load.img --append 'console=ttyS0 quiet' --memory 192 \\
    --disk path=/mnt/raw.img,format=raw,cache=$cache --disk path=/mnt/disk.qcow2,format=qcow2,cache=$cache < /tmp/in > /tmp/out &
  loads vireo-$cache
  [ $cache = none ] && aio=native || aio=threads
  fresh
  qemu-system-x86_64 -L /qemu -M q35 -accel kvm -cpu host -m 192 -nodefaults -no-user-config -display none -serial stdio \\
    -kernel /l2/vmlinuz -initrd /l2/load.img -append 'console=ttyS0 quiet' \\
    -drive file=/mnt/raw.img,if=none,id=a,format=raw,cache=$cache,aio=$aio -device virtio-blk-pci,drive=a \\
    -drive file=/mnt/disk.qcow2,if=none,id=b,format=qcow2,cache=$cache,aio=$aio -device virtio-blk-pci,drive=b < /tmp/in > /tmp/out &
  loads qemu-$cache
done
";

/// Measures and prints.
pub fn go(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::GUEST, packages::QEMU], consent)?;
    let guest = guest::build(consent)?;
    let vmm = programs::vmm()?;
    let load = build_load()?;
    let dir = target().join("lab");
    fs::create_dir_all(&dir)?;
    let disk = dir.join("disks.raw");
    make_disks(&dir, &disk)?;
    let mut files = vec![("l2/load.img".to_owned(), load_initrd(&guest, &load)?)];
    let list: Vec<String> = LOADS.iter().map(|(_, load, count)| format!("{load} {count}\n")).collect();
    files.push(("loads".to_owned(), list.concat().into_bytes()));
    for path in FIRMWARE {
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push((format!("qemu/{name}"), fs::read(path).with_context(|| format!("{path} cannot be read"))?));
    }
    let programs = [vmm, PathBuf::from("/usr/bin/qemu-system-x86_64")];
    let modules = ["ext4", "crc32c_generic", "tun"];
    let lab =
        Lab { programs: &programs, files: &files, modules: &modules, script: DRIVE, disk: Some(&disk), limit: LIMIT };
    print(&lab::run_in(&guest, &lab)?)
}

/// The load as a program that needs nothing of the guest.
fn build_load() -> Result<PathBuf> {
    say("building the load");
    let mut command = cargo();
    command.args(["rustc", "--release", "-p", "block", "--example", "disk_load", "--"]);
    run(command.args(["-C", "target-feature=+crt-static"]))?;
    Ok(target().join("release/examples/disk_load"))
}

fn load_initrd(guest: &Guest, load: &Path) -> Result<Vec<u8>> {
    let mut archive = guest::skeleton(&fs::read(&guest.busybox)?);
    archive.file("bin/disk_load", true, &fs::read(load)?);
    let modules = Modules::scan(&guest.kernel_tree.join("lib/modules"))?;
    let mut script = String::from("#!/bin/sh\nmount -t devtmpfs dev /dev\n");
    for (name, bytes) in modules.closure(&["virtio_pci", "virtio_blk"])? {
        archive.file(&format!("modules/{name}.ko"), false, &bytes);
        script.push_str(&format!("insmod /modules/{name}.ko\n"));
    }
    archive.file("init", true, (script + GUEST).as_bytes());
    Ok(archive.finish())
}

/// A file system that holds a raw disk and a qcow2 one, both full of data.
fn make_disks(dir: &Path, disk: &Path) -> Result<()> {
    say("making the disks");
    let tree = dir.join("disks");
    fs::create_dir_all(&tree)?;
    let raw = tree.join("raw.img");
    let file = File::create(&raw)?;
    let block: Vec<u8> = (0..MIB).map(|i| ((i * 7919) >> 5) as u8 | 1).collect();
    for at in 0..DISK_MIB {
        file.write_all_at(&block, (at * MIB) as u64)?;
    }
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(tree.join("disk.qcow2")))?;
    if disk.exists() {
        fs::remove_file(disk)?;
    }
    File::create(disk)?.set_len((4 * DISK_MIB * MIB) as u64)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", guest::path_with_sbin()).args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"]);
    run(mke2fs.arg(&tree).arg(disk))?;
    Ok(fs::remove_dir_all(&tree)?)
}

/// Processor time for a load: of the whole monitor, and of what is not the guest.
struct Spent {
    all_s: f64,
    outside_s: f64,
}

fn spent(said: &str, who: &str, disk: &str, load: &str) -> Result<Spent> {
    let way: Vec<&str> = load.split(' ').take(2).collect();
    let prefix = format!("LAB-LOAD {who} {disk} {} ", way.join("-"));
    let parse = |line: &str| {
        let mut numbers = line.strip_prefix(&prefix)?.split_whitespace().map(str::parse::<f64>);
        let (all, guest) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some(Spent { all_s: all / 100.0, outside_s: (all - guest) / 100.0 })
    };
    let cheapest = said.lines().filter_map(parse).min_by(|a, b| a.all_s.total_cmp(&b.all_s));
    cheapest.with_context(|| format!("the lab measured no {prefix}"))
}

fn print(said: &str) -> Result<()> {
    println!("\ndisk: requests per CPU second of the monitor, in the lab; ratio above 1: ours does more");
    println!("{:<44} {:>10} {:>10} {:>8} {:>16}", "", "vireo", "qemu", "ratio", "without guest");
    let mut ratios = Vec::new();
    for cache in ["writeback", "none"] {
        for (disk, format) in [("a", "raw"), ("b", "qcow2")] {
            for (name, load, count) in LOADS {
                let ours = spent(said, &format!("vireo-{cache}"), disk, load)?;
                let peer = spent(said, &format!("qemu-{cache}"), disk, load)?;
                let per_s = |spent: f64| f64::from(count) / spent;
                let ratio = peer.all_s / ours.all_s;
                ratios.push(ratio);
                let what = format!("{format}, cache={cache}, {name}");
                let (a, b) = (per_s(ours.all_s), per_s(peer.all_s));
                println!("{what:<44} {a:>10.0} {b:>10.0} {ratio:>8.2} {:>16.2}", peer.outside_s / ours.outside_s);
            }
        }
    }
    if ratios.is_empty() {
        bail!("nothing was measured");
    }
    let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
    println!("{:<44} {:>10} {:>10} {mean:>8.2}", "geometric mean", "", "");
    Ok(())
}
