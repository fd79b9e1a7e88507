//! `bench disk`: a guest's disk under load, by ours and by QEMU in the lab, where KVM is real: the same guest, the same
//! files, the same requests. What counts is the processor time of the whole monitor for them.
//!
//! The lab's own processor is emulated, so its seconds are long ones, and their length changes with what else the machine
//! does: hence the turns, and the ratios of turns that follow each other.

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

/// Two guests, ours and QEMU's, that stand side by side and are given each load in turn, with the processor time that the
/// monitor takes for it, in hundredths of a second: all of it, and the guest's own. QEMU takes no locks, so that both can
/// have the same files. Both start with free memory in large pieces, so that both have huge pages.
const DRIVE: &str = "\
mkdir -p /mnt; mount -t ext4 /dev/vda /mnt || exit 1
cpu() { awk '{ print $14 + $15 }' /proc/$1/stat; }
inside() { awk '{ print $43 }' /proc/$1/stat; }
fail() { cat /tmp/$1.out; exit 1; }
wait_for() { n=0; until [ \"$(grep -c \"$2\" /tmp/$1.out)\" -ge $3 ]; do n=$((n + 1)); [ $n = 3000 ] && fail $1; [ -d /proc/$pid ] || fail $1; sleep 0.2; done; }
fresh() { sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory; mkfifo /tmp/$1.in; : > /tmp/$1.out; }
turn() {
  eval pid=\\$$1; who=$1; shift
  sync; [ $cache = writeback ] || echo 3 > /proc/sys/vm/drop_caches
  before=$(cpu $pid); guest=$(inside $pid)
  case $who in ours) echo \"/dev/vd$*\" >&3;; *) echo \"/dev/vd$*\" >&4;; esac
  wait_for $who LOAD-DONE $done
  echo \"LAB-LOAD $cache $1 $2-$3-$4 $round $who $(($(cpu $pid) - before)) $(($(inside $pid) - guest))\"
}
for cache in writeback none; do
  fresh ours
  vireo-vmm run --accel kvm --kernel /l2/vmlinuz --initrd /l2/load.img --append 'console=ttyS0 quiet' --memory 192 \\
    --disk path=/mnt/raw.img,format=raw,cache=$cache --disk path=/mnt/disk.qcow2,format=qcow2,cache=$cache \\
    < /tmp/ours.in > /tmp/ours.out &
  ours=$!; exec 3> /tmp/ours.in
  pid=$ours; wait_for ours GUEST-READY 1
  [ $cache = none ] && aio=native || aio=threads
  fresh peer
  disk=cache=$cache,aio=$aio,if=none,file.locking=off
  qemu-system-x86_64 -L /qemu -M q35 -accel kvm -cpu host -m 192 -nodefaults -no-user-config -display none -serial stdio \\
    -kernel /l2/vmlinuz -initrd /l2/load.img -append 'console=ttyS0 quiet' \\
    -drive $disk,id=a,format=raw,file.filename=/mnt/raw.img -device virtio-blk-pci,drive=a \\
    -drive $disk,id=b,format=qcow2,file.filename=/mnt/disk.qcow2 -device virtio-blk-pci,drive=b \\
    < /tmp/peer.in > /tmp/peer.out 3>&- &
  peer=$!; exec 4> /tmp/peer.in
  pid=$peer; wait_for peer GUEST-READY 1
  done=0
  for round in 0 1 2 3 4 5; do for disk in a b; do
    while read -r load; do
      done=$((done + 1))
      case $round in 0|2|4) turn ours $disk $load; turn peer $disk $load;; *) turn peer $disk $load; turn ours $disk $load;; esac
    done < /loads
  done; done
  for who in ours peer; do grep -q LOAD-FAILED /tmp/$who.out && fail $who; done
  echo off >&3; echo off >&4; wait $ours; wait $peer; exec 3>&- 4>&-
  rm /tmp/*.in /tmp/*.out
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

/// Processor time for a load in hundredths of a second: of the whole monitor, and of what is not the guest.
#[derive(Clone, Copy)]
struct Spent {
    all: f64,
    outside: f64,
}

/// What one monitor took for a load, round by round, without the first: there code is translated for the lab's processor.
fn spent(said: &str, cache: &str, disk: &str, load: &str, who: &str) -> Result<Vec<Spent>> {
    let way: Vec<&str> = load.split(' ').take(3).collect();
    let prefix = format!("LAB-LOAD {cache} {disk} {} ", way.join("-"));
    let parse = |line: &str| {
        let (round, rest) = line.strip_prefix(&prefix)?.split_once(' ')?;
        let mut numbers = rest.strip_prefix(who)?.split_whitespace().map(str::parse::<f64>);
        let (all, guest) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        (round != "0").then_some(Spent { all, outside: all - guest })
    };
    let rounds: Vec<Spent> = said.lines().filter_map(parse).collect();
    if rounds.is_empty() { bail!("the lab measured no {prefix}of {who}") } else { Ok(rounds) }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(said: &str) -> Result<()> {
    println!("\ndisk: requests per CPU second of the monitor, in the lab; ratio above 1: ours does more");
    println!("(medians of the rounds; the ratio is the median of the rounds' ratios, of turns that follow each other)");
    println!(
        "{:<44} {:>10} {:>10} {:>8} {:>8} {:>8} {:>16}",
        "", "vireo", "qemu", "ratio", "least", "most", "without guest"
    );
    let mut product = 0.0;
    let mut cases = 0;
    for cache in ["writeback", "none"] {
        for (disk, format) in [("a", "raw"), ("b", "qcow2")] {
            for (name, load, count) in LOADS {
                let [ours, peer] = [spent(said, cache, disk, load, "ours")?, spent(said, cache, disk, load, "peer")?];
                let per_s = |rounds: &[Spent]| f64::from(count) / median(rounds.iter().map(|spent| spent.all / 100.0));
                let ratios =
                    |of: fn(&Spent) -> f64| ours.iter().zip(&peer).map(move |(ours, peer)| of(peer) / of(ours));
                let ratio = median(ratios(|spent| spent.all));
                let least = ratios(|spent| spent.all).fold(f64::INFINITY, f64::min);
                let most = ratios(|spent| spent.all).fold(0.0, f64::max);
                let outside = median(ratios(|spent| spent.outside));
                product += ratio.ln();
                cases += 1;
                let what = format!("{format}, cache={cache}, {name}");
                let (ours, peer) = (per_s(&ours), per_s(&peer));
                println!("{what:<44} {ours:>10.0} {peer:>10.0} {ratio:>8.2} {least:>8.2} {most:>8.2} {outside:>16.2}");
            }
        }
    }
    let mean = (product / f64::from(cases)).exp();
    println!("{:<44} {:>10} {:>10} {mean:>8.2}", "geometric mean", "", "");
    Ok(())
}
