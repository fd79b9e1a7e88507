//! Faults by rules, with the same commands on the same images by `io` and by qemu-io: what is printed, how it exits,
//! what a check finds afterwards and what the images hold.

use std::path::Path;
use std::process::Command;

/// Runs a program; its exit code, and what it prints without times.
fn run(program: &Path, dir: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(program).args(args).current_dir(dir).env("LC_ALL", "C").output();
    let out = out.unwrap_or_else(|error| panic!("{} (package qemu-utils) does not start: {error}", program.display()));
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let lines = said.lines().map(|line| line.split_once(" ops; ").map_or(line, |(amount, _)| amount).to_owned() + "\n");
    (out.status.code(), lines.collect())
}

/// A disk over another one, with data in both.
const IMAGES: &[&str] = &[
    "create -q -f qcow2 base.img 8M",
    "qemu-io -f qcow2 -c 'write -q -P 9 4M 1M' base.img",
    "create -q -f qcow2 -b base.img -F qcow2 a.img",
    "qemu-io -f qcow2 -c 'write -q -P 1 0 128k' -c 'write -q -c -P 2 1M 64k' a.img",
];

fn prepare(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for line in IMAGES {
        let status = Command::new("sh")
            .args(["-c", &if line.starts_with("qemu-io") { (*line).to_owned() } else { format!("qemu-img {line}") }])
            .current_dir(dir)
            .status();
        assert!(status.unwrap().success(), "{line}");
    }
}

/// Each line: rules, then commands. A rule is `EVENT[ OPTION=VALUE]...`, `EVENT STATE>STATE` goes to another state.
fn check(lines: &str) {
    let (_, version) = run(Path::new("qemu-img"), Path::new("."), &["--version"]);
    if !version.starts_with("qemu-img version 10.") {
        eprintln!("not compared: {version}");
        return;
    }
    let mut wrong = String::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (rules, commands) = line.split_once(": ").unwrap();
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("qemu-io");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), &link).unwrap();
        let outcomes = ["ours", "theirs"].map(|name| {
            let dir = root.path().join(name);
            prepare(&dir);
            std::fs::write(dir.join("rules"), rules_file(rules)).unwrap();
            let program = if name == "ours" { &link } else { Path::new("qemu-io") };
            let mut args = vec!["blkdebug:rules:a.img"];
            args.extend(commands.split("; ").flat_map(|command| ["-c", command]));
            run(program, &dir, &args)
        });
        for name in ["ours", "theirs"] {
            // Leaks are allowed, damage is not.
            let (code, said) = run(Path::new("qemu-img"), &root.path().join(name), &["check", "a.img"]);
            assert!(matches!(code, Some(0 | 3)), "{line}: {name}: {said}");
        }
        if outcomes[0] != outcomes[1] {
            wrong += &format!("\n{line}\n  ours: {:?}\ntheirs: {:?}\n", outcomes[0], outcomes[1]);
        }
        let [a, b] = ["ours/a.img", "theirs/a.img"].map(|name| root.path().join(name).display().to_string());
        let (code, said) = run(Path::new("qemu-img"), root.path(), &["compare", "-U", &a, &b]);
        if code != Some(0) {
            wrong += &format!("\n{line}\n{said}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

fn rules_file(rules: &str) -> String {
    let mut text = String::new();
    for rule in rules.split(" + ") {
        let mut words = rule.split(' ');
        let event = words.next().unwrap();
        let states = words.clone().next().and_then(|word| word.split_once('>'));
        if let Some((from, to)) = states {
            text += &format!("[set-state]\nevent = \"{event}\"\nstate = \"{from}\"\nnew_state = \"{to}\"\n");
            continue;
        }
        text += &format!("[inject-error]\nevent = \"{event}\"\n");
        for option in words {
            let (name, value) = option.split_once('=').unwrap();
            text += &format!("{name} = \"{value}\"\n");
        }
    }
    text
}

#[test]
fn faults_are_reported_as_qemu_io_reports_them() {
    check(
        "
        read_aio once=on: read 0 64k; read -P 1 0 64k; write -P 3 2M 64k; flush
        read_aio once=on errno=28 immediately=on: read 0 64k; read -P 1 64k 64k; flush
        read_aio: read 0 64k; read 64k 64k
        read_aio sector=2048 once=on: read 0 64k; read 64k 64k
        read_backing_aio once=on: read -P 9 4M 64k; read -P 1 0 64k; read -P 9 4M 64k
        read_compressed once=on: read 1M 64k; read -P 2 1M 64k
        read_compressed once=on errno=28: read -P 1 0 64k; read 1M 512; read -P 2 1M 512
        write_aio once=on: write -P 3 0 64k; read -P 1 0 64k; write -P 4 0 64k; read -P 4 0 64k
        write_aio once=on errno=28: write -P 3 2M 64k; write -P 3 2M 64k; write -P 5 3M 64k
        write_aio once=on iotype=read: write -P 3 0 64k; read 0 64k; read -P 3 0 64k
        write_aio sector=99999: write -P 3 0 64k; write -P 3 2M 64k; flush; read -P 3 2M 64k
        cow_read once=on: write -P 3 4M 4k; write -P 3 4M 4k; read -P 9 4100k 4k; read -P 3 4M 4k
        cow_read once=on errno=28: write -P 3 4M 4k; read -P 9 4M 64k
        cow_write once=on: write -P 3 4M 4k; read -P 9 4M 64k; write -P 3 4M 4k; flush
        cow_write once=on errno=28: write -P 3 4M 4k; write -P 3 5M 4k; flush
        l2_load once=on: read 0 64k; read -P 1 0 64k; write -P 3 2M 64k
        l2_load once=on errno=28: write 0 64k; write -P 3 0 64k; read -P 1 64k 64k
        l2_load: read 0 64k; read 0 64k
        cluster_alloc once=on iotype=write: write -P 3 2M 64k; write -P 3 2M 64k
        cluster_alloc once=on errno=28: write -P 3 2M 64k; write -P 4 2M 64k; flush
        refblock_load once=on: write -P 3 2M 64k; write -P 4 2M 64k; flush; read -P 4 2M 64k
        pwritev once=on: write -P 3 0 64k; write -P 4 0 64k; read -P 4 0 64k
        l2_load 1>2 + read_aio state=2 once=on: read 0 64k; read 0 64k; read -P 1 0 64k
        read_aio 1>2 + read_aio 2>3 + read_aio state=3: read 0 64k; read 0 64k; read 0 64k
        read_aio once=on errno=5 + read_aio once=on errno=28: read 0 64k; read 0 64k; read 0 64k; read 0 64k
        none once=on: read 0 64k
        bogus: read 0 64k
        read_aio iotype=bogus: read 0 64k
        read_aio errno=x: read 0 64k
        read_aio bogus=1: read 0 64k
        ",
    );
}

#[test]
fn rules_stand_in_names_too() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("a");
    prepare(&dir);
    let [ours, theirs] = ["ours", "theirs"].map(|name| root.path().join(name));
    for (path, program) in [(&ours, env!("CARGO_BIN_EXE_vireo-img")), (&theirs, "/usr/bin/qemu-io")] {
        std::fs::create_dir(path).unwrap();
        std::os::unix::fs::symlink(program, path.join("qemu-io")).unwrap();
    }
    let list = r#"json:{"driver":"qcow2","file":{"driver":"blkdebug","inject-error":[{"event":"read_aio","once":true,
        "errno":28},{"event":"read_aio","errno":5,"sector":MANY}],"image":{"driver":"file","filename":"a.img"}}}"#;
    for name in [
        list,
        &list.replace("MANY", "0"),
        &list.replace("MANY", "0").replace("\"errno\":28", "\"errno\":\"x\""),
        &list.replace("MANY", "0").replace("once", "twice"),
        "blkdebug::a.img",
        "blkdebug:a.img",
        "blkdebug:nothere:a.img",
    ] {
        let args = [name, "-c", "read 0 64k", "-c", "read 0 64k", "-c", "read 0 64k"];
        let [a, b] = [&ours, &theirs].map(|path| run(&path.join("qemu-io"), &dir, &args));
        let json_error = "Could not parse the JSON options";
        if b.1.contains(json_error) {
            assert!(a.1.contains(json_error) && a.0 == b.0, "{name}: {a:?}");
        } else {
            assert_eq!(a, b, "{name}");
        }
    }
    let options = "driver=qcow2,file.driver=blkdebug,file.inject-error.0.event=read_aio,\
                   file.inject-error.0.once=on,file.max-transfer=4k,\
                   file.image.filename=a.img";
    let args = ["--image-opts", options, "-c", "read 0 64k", "-c", "write -P 3 0 64k"];
    let [a, b] = [&ours, &theirs].map(|path| run(&path.join("qemu-io"), &dir, &args));
    assert_eq!(a, b);
}
