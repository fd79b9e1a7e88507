//! What qemu-img does not have: `tree`, `explain`, names and versions.

use std::path::Path;
use std::process::{Command, Output};

fn run(program: &Path, dir: &Path, line: &str) -> Output {
    let mut command = Command::new(program);
    command.args(line.split_whitespace()).current_dir(dir).env("LC_ALL", "C");
    command.output().unwrap_or_else(|error| panic!("{} does not start: {error}", program.display()))
}

fn ours(dir: &Path, line: &str) -> (Option<i32>, String) {
    let out = run(Path::new(env!("CARGO_BIN_EXE_vireo-img")), dir, line);
    (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

/// A chain of three with snapshots, and damaged copies.
fn images() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for line in [
        "create -q -f raw base.raw 4M",
        "create -q -f qcow2 -b base.raw -F raw mid.qcow2",
        "snapshot -c one mid.qcow2",
        "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "create -q -f qcow2 -u -b gone.qcow2 -F qcow2 orphan.qcow2 4M",
        "create -q -f qcow2 leaking.qcow2 4M",
        "create -q -f qcow2 broken.qcow2 4M",
        "create -q -f qcow2 -o lazy_refcounts=on dirty.qcow2 4M",
        "create -q -f vdi good.vdi 4M",
        "create -q -f vdi broken.vdi 4M",
        "create -q -f vpc good.vpc 4M",
    ] {
        assert!(run(Path::new("qemu-img"), dir.path(), line).status.success(), "{line}");
    }
    let poke = |name: &str, at: usize, new: &[u8], grow: usize| {
        let path = dir.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(bytes.len().max(grow), 0);
        bytes[at..at + new.len()].copy_from_slice(new);
        std::fs::write(path, bytes).unwrap();
    };
    // Cluster 2 is the refcount block: cluster 9 is counted, and cluster 3, the L1 table, is not.
    poke("leaking.qcow2", 2 * 65536 + 18, &[0, 1], 10 * 65536);
    poke("broken.qcow2", 2 * 65536 + 6, &[0, 0], 0);
    poke("broken.vdi", 0x184, &[9], 0);
    // A process that dies between a write and the close, as in a power cut.
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "qcow2", "-c", "write 0 1M", "-c", "flush", "-c", "abort", "dirty.qcow2"]);
    assert!(!writer.current_dir(dir.path()).output().expect("qemu-io does not start").status.success());
    dir
}

#[test]
fn a_tree_shows_every_file_and_snapshot() {
    let dir = images();
    let (code, text) = ours(dir.path(), "tree top.qcow2");
    let names: Vec<&str> = text.lines().map(|line| line.split("  qcow2").next().unwrap()).collect();
    assert_eq!(code, Some(0));
    assert_eq!(names[..3], ["top.qcow2", "`- mid.qcow2", "   |  * snapshot one"]);
    assert!(names[3].starts_with("   `- base.raw  raw  4 MiB disk, "), "{text}");
    let (code, text) = ours(dir.path(), "tree orphan.qcow2");
    assert_eq!(code, Some(1));
    assert!(text.contains("`- Could not open 'gone.qcow2'"), "{text}");
    let (_, text) = ours(dir.path(), "tree --json top.qcow2");
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["chain"][1]["snapshots"][0], "one");
    assert_eq!(value["chain"][2]["format"], "raw");
}

#[test]
fn explanations_say_what_is_and_what_helps() {
    let dir = images();
    for (image, code, says) in [
        ("top.qcow2", 0, &["needs that file (2 below it in all)", "there is nothing to repair"][..]),
        ("mid.qcow2", 0, &["Internal snapshots: one."]),
        ("base.raw", 0, &["nothing in it to check"]),
        ("leaking.qcow2", 3, &["1 clusters (64 KiB)", "no data is at risk", "check -r leaks leaking.qcow2"]),
        ("broken.qcow2", 2, &["1 contradictions", "convert -O qcow2 broken.qcow2", "check -r all broken.qcow2"]),
        ("orphan.qcow2", 1, &["gone.qcow2", "rebase -u -b"]),
        ("dirty.qcow2", 2, &["not closed cleanly", "as is to be expected", "no data is at risk"]),
        ("good.vdi", 0, &["agree with each other"]),
        ("broken.vdi", 2, &["allocated blocks mismatch", "1 contradictions", "convert -O qcow2 broken.vdi"]),
        ("good.vpc", 0, &["no check for its format"]),
    ] {
        let (got, text) = ours(dir.path(), &format!("explain {image}"));
        assert_eq!(got, Some(code), "{image}: {text}");
        for part in says {
            assert!(text.contains(part), "{image}: '{part}' is not in\n{text}");
        }
        assert_eq!(text.contains("damaged already"), image.starts_with("broken"), "{text}");
        let before = std::fs::read(dir.path().join(image)).unwrap();
        let (_, json) = ours(dir.path(), &format!("explain --json {image}"));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["exit-code"], code, "{image}");
        assert_eq!(std::fs::read(dir.path().join(image)).unwrap(), before, "{image} has changed");
    }
}

#[test]
fn the_name_it_is_called_by_is_the_name_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), &link).unwrap();
    let said = |line: &str| {
        let out = run(&link, dir.path(), line);
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
    };
    // cinder's regular expression is `qemu-img version ([0-9\.]*)`; libguestfs looks for `-U` in the help.
    assert!(said("--version").starts_with("qemu-img version 10.0.2 (vireo-img "), "{}", said("--version"));
    assert!(said("--help").contains("-U, --force-share"));
    assert!(said("info --help").contains("-U, --force-share"));
    assert_eq!(
        said("info nope"),
        "qemu-img: Could not open 'nope': Could not open 'nope': No such file or directory\n"
    );
    assert_eq!(said("tree nope").lines().next(), Some("qemu-img: Command not found: tree"));
    let (_, text) = ours(dir.path(), "info nope");
    assert!(text.starts_with("vireo-img: Could not open 'nope'"), "{text}");
}

#[test]
fn progress_is_what_vdsm_reads() {
    let dir = images();
    let out = run(Path::new(env!("CARGO_BIN_EXE_vireo-img")), dir.path(), "convert -p -O raw top.qcow2 out.raw");
    let text = String::from_utf8(out.stdout).unwrap();
    // vdsm's regular expression: ` *\((\d+\.\d\d)/100%\)\r`.
    let mut last = -1.0;
    for part in text.trim_end_matches('\n').split_terminator('\r') {
        let number = part.strip_prefix("    (").and_then(|part| part.strip_suffix("/100%)")).unwrap();
        assert_eq!(number.split_once('.').map(|(_, digits)| digits.len()), Some(2), "{part}");
        let value: f64 = number.parse().unwrap();
        assert!(value >= last && value <= 100.0, "{text:?}");
        last = value;
    }
    assert_eq!(last, 100.0);
    assert!(text.ends_with("\r\n"), "{text:?}");
    let quiet = run(Path::new(env!("CARGO_BIN_EXE_vireo-img")), dir.path(), "convert -q -p -O raw top.qcow2 out.raw");
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty());
}

#[test]
fn secrets_are_looked_at_first() {
    let dir = images();
    for (line, says) in [
        ("info --object secret,id=a top.qcow2", "Either 'file' or 'data' must be provided"),
        ("info --object tls-creds,id=a top.qcow2", "Parameter 'qom-type' does not accept value 'tls-creds'"),
        ("map --image-opts driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=sec0", "No secret with id 'sec0'"),
    ] {
        let (code, text) = ours(dir.path(), line);
        assert_eq!(code, Some(1), "{line}");
        assert!(text.contains(says), "{line}: {text}");
    }
}

#[test]
fn every_command_answers_in_json_also_when_it_fails() {
    let dir = images();
    for (line, code, holds) in [
        ("create -f qcow2 new.qcow2 4M", 0, r#""command": "create""#),
        ("create -f qcow2 gone/new.qcow2 4M", 1, r#""error": "gone/new.qcow2: Could not create"#),
        ("convert -p -O raw mid.qcow2 out.raw", 0, r#""said": []"#),
        ("compare mid.qcow2 out.raw", 0, r#""identical": true"#),
        ("compare mid.qcow2 nope", 2, r#""exit-code": 2"#),
        ("resize new.qcow2 5M", 0, r#""virtual-size": 5242880"#),
        ("snapshot -c two new.qcow2", 0, r#""exit-code": 0"#),
        ("snapshot new.qcow2", 0, r#""name": "two""#),
        ("bitmap --add new.qcow2 b", 0, r#""command": "bitmap""#),
        ("amend -o compat=1.1 new.qcow2", 0, r#""command": "amend""#),
        ("rebase -b nope new.qcow2", 1, r#""error": "#),
        ("commit new.qcow2", 1, r#""error": "Image does not have a backing file""#),
        ("dd if=new.qcow2 of=part bs=1k count=1", 0, r#""command": "dd""#),
        ("bench -c 10 new.qcow2", 0, r#""seconds": "#),
        ("io -c length new.qcow2", 0, r#""5 MiB""#),
        ("serve -f nope new.qcow2", 1, r#""error": "#),
        ("info nope", 1, r#""error": "Could not open"#),
        ("check new.qcow2", 0, r#""check-errors": 0"#),
        ("map new.qcow2", 0, r#""start": 0"#),
    ] {
        let (command, rest) = line.split_once(' ').unwrap();
        let out = run(Path::new(env!("CARGO_BIN_EXE_vireo-img")), dir.path(), &format!("{command} --json {rest}"));
        let said = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(code), "{line}: {said}");
        serde_json::from_str::<serde_json::Value>(&said).unwrap_or_else(|error| panic!("{line}: {error}: {said}"));
        assert!(said.contains(holds), "{line}: {said}");
    }
}
