//! Images on a block device, which keeps its length and what it held before.

use std::path::Path;
use std::process::Command;

/// Root's: a loop device full of letters, each image on it made anew and judged by qemu-img.
const SCRIPT: &str = r#"
set -eu
tool=$1
truncate -s 32M disk
device=$(losetup -f --show disk) || { echo "no loop device"; exit 0; }
trap 'losetup -d $device' EXIT
fill() { tr '\0' x </dev/zero | head -c 32M >"$device"; }
wrong() { echo "wrong: $*"; exit 1; }
qemu-img create -q -f qcow2 source.qcow2 20M
qemu-io -c 'write -P 3 1M 3M' -c 'write -P 4 9000000 5000' source.qcow2 >said
qemu-img convert -O raw source.qcow2 source.raw
holds() {
    qemu-img compare -q "$@" -F raw "$device" source.raw || wrong "$@: holds something else"
}
for options in cluster_size=64k cluster_size=4k preallocation=metadata preallocation=falloc extended_l2=on compat=0.10; do
    fill; "$tool" convert -O qcow2 -o $options source.qcow2 "$device"
    qemu-img check -q "$device" >said || wrong "$options: $(cat said)"
    holds -f qcow2
done
fill; "$tool" create -q -f qcow2 "$device" 20M
qemu-img check -q "$device" >said || wrong "an empty image: $(cat said)"
"$tool" convert -n -O qcow2 source.qcow2 "$device"
for change in "amend -o refcount_bits=64" "snapshot -c a" "snapshot -d a" "amend -o refcount_bits=8"; do
    "$tool" $change "$device"
    qemu-img check -q "$device" >said || wrong "$change: $(cat said)"
    holds -f qcow2
done
for made in "convert -O raw source.qcow2 $device" "dd -f qcow2 if=source.qcow2 of=$device bs=1M"; do
    fill; "$tool" $made
    cmp -n 20971520 "$device" source.raw || wrong "$made"
done
fill; "$tool" convert -O vdi source.qcow2 "$device"; holds -f vdi
fill; "$tool" create -q -f qcow2 -o "data_file=$device,data_file_raw=on" apart.qcow2 4M
qemu-io -f qcow2 -c 'read -P 0 0 4M' apart.qcow2 | grep -q verification && wrong "a data file shows what was there"
for refused in "create -q -f raw $device 64M" "resize -f raw $device 64M" "resize -f raw --shrink $device 16M"; do
    "$tool" $refused 2>said && wrong "$refused: done"
    grep -q 'Cannot .* device files' said || wrong "$refused: $(cat said)"
done
"$tool" resize -q -f raw "$device" 32M
"#;

#[test]
fn what_a_device_held_is_in_no_new_image() {
    let dir = tempfile::tempdir().unwrap();
    let mut sh = Command::new("sh");
    sh.arg("-c").arg(SCRIPT).arg("sh").arg(Path::new(env!("CARGO_BIN_EXE_vireo-img")));
    let out = sh.current_dir(dir.path()).env("LC_ALL", "C").output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if said.contains("no loop device") {
        eprintln!("not tested: {said}");
        return;
    }
    assert!(out.status.success(), "{said}");
}
