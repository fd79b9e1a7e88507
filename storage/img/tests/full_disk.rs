//! A host whose disk is full: the command says so and fails, sources are untouched, images that are changed in place show
//! what they showed, and the same command works when there is room again. The disk is a file system in memory, mounted in
//! a namespace of the test's own.

use std::path::Path;
use std::process::Command;

/// Runs as root of its own namespaces: fills a file system of 1 MiB with a command, judges, makes room, and runs it again.
const SCRIPT: &str = r#"
set -eu
tool=$1; prepare=$2; image=$3; shift 3
mkdir full; mount -t tmpfs -o size=1m none full
qemu-img create -q -f raw base.raw 4M
qemu-io -f raw -c 'write -P 1 0 4M' base.raw >said
sh -euc "$prepare" >said
md5sum base.raw >before
shows() { qemu-img convert -U -O raw "$image" shown.raw && md5sum <shown.raw; }
there=no; if [ -e "$image" ]; then there=yes; shows >shown-before; fi
code=0; "$tool" "$@" >out 2>err || code=$?
[ "$code" = 1 ] || { echo "exit code $code"; cat err; exit 1; }
grep -q 'No space left on device' err || { echo "does not say why:"; cat err; exit 1; }
md5sum base.raw | cmp - before || { echo "a source has changed"; exit 1; }
if [ $there = yes ]; then
    shows | cmp - shown-before || { echo "shows something else after a full disk"; exit 1; }
    code=0; qemu-img check -q "$image" >said 2>&1 || code=$?
    case $code in 0|3|63) ;; *) cat said; exit 1;; esac
fi
mount -o remount,size=64m full
"$tool" "$@" >out 2>err || { echo "with room again:"; cat err; exit 1; }
md5sum base.raw | cmp - before || { echo "a source has changed in the end"; exit 1; }
"#;

/// What makes the files, the image that the command makes or changes, and the command.
const CASES: &[(&str, &str, &str)] = &[
    ("true", "full/x", "convert -O raw base.raw full/x"),
    ("true", "full/x", "convert -O raw -S 0 base.raw full/x"),
    ("true", "full/x", "convert -W -O qcow2 base.raw full/x"),
    ("true", "full/x", "convert -O vhdx base.raw full/x"),
    ("true", "full/x", "convert -O vdi base.raw full/x"),
    ("true", "full/x", "convert -O vpc base.raw full/x"),
    ("true", "full/x", "create -q -f raw -o preallocation=full full/x 4M"),
    ("true", "full/x", "create -q -f raw -o preallocation=falloc full/x 4M"),
    ("true", "full/x", "create -q -f qcow2 -o preallocation=full full/x 4M"),
    ("true", "full/x", "dd if=base.raw of=full/x"),
    (
        "qemu-img create -q -f qcow2 -b $PWD/base.raw -F raw full/x; qemu-io -c 'write -P 2 64k 64k' full/x",
        "full/x",
        "rebase -f qcow2 -b  full/x",
    ),
    (
        "qemu-img create -q -f qcow2 full/b 4M; qemu-img create -q -f qcow2 -b b -F qcow2 top.qcow2 2>said ||
         qemu-img create -q -u -f qcow2 -b full/b -F qcow2 top.qcow2 4M; qemu-io -c 'write -P 3 0 3M' top.qcow2",
        "top.qcow2",
        "commit -q -f qcow2 top.qcow2",
    ),
    (
        "qemu-img create -q -f qcow2 full/x 4M; qemu-io -c 'write -P 2 64k 256k' full/x",
        "full/x",
        "resize -q -f qcow2 --preallocation=full full/x 8M",
    ),
];

/// Blanks divide words; two in a row stand around an empty one.
fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

#[test]
fn a_full_disk_costs_nothing_but_time() {
    let script = tempfile::tempdir().unwrap();
    let script = script.path().join("script.sh");
    std::fs::write(&script, SCRIPT).unwrap();
    for (prepare, image, command) in CASES {
        let dir = tempfile::tempdir().unwrap();
        let out = in_namespace(&script, dir.path(), prepare, image, &words(command));
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if said.contains("unshare failed") {
            eprintln!("not tested: {said}");
            return;
        }
        assert!(out.status.success(), "{command}: {said}");
    }
}

fn in_namespace(script: &Path, dir: &Path, prepare: &str, image: &str, command: &[&str]) -> std::process::Output {
    let mut sh = Command::new("unshare");
    sh.args(["-r", "-m", "sh"]).arg(script).arg(env!("CARGO_BIN_EXE_vireo-img")).args([prepare, image]).args(command);
    sh.current_dir(dir).env("LC_ALL", "C").output().expect("unshare (package util-linux) starts")
}
