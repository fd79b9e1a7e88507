//! `io` under the name `qemu-io`, held against qemu-io: the same commands, the same answers, the same images.

use std::path::Path;
use std::process::Command;

/// Rates and times, which no two runs share.
fn stable(text: &str) -> String {
    let keep = |line: &str| match line.split_once(" ops; ") {
        Some((amount, _)) => format!("{amount} ops"),
        None => match line.split(',').collect::<Vec<_>>().as_slice() {
            [bytes, ops, _, _, _] => format!("{bytes},{ops}"),
            _ => line.to_owned(),
        },
    };
    text.lines().map(|line| keep(line) + "\n").collect()
}

fn run(program: &Path, dir: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(program).args(args).current_dir(dir).env("LC_ALL", "C").output();
    let out = out.unwrap_or_else(|error| panic!("{} (package qemu-utils) does not start: {error}", program.display()));
    let text = |bytes: &[u8]| stable(&String::from_utf8_lossy(bytes));
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

/// Runs the lines, each one qemu-io with the commands between semicolons, on both, and compares the images at the end.
fn check(image: &[&str], lines: &str) {
    let root = tempfile::tempdir().unwrap();
    let link = root.path().join("qemu-io");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), &link).unwrap();
    let dirs = ["ours", "theirs"].map(|name| root.path().join(name));
    for dir in &dirs {
        std::fs::create_dir(dir).unwrap();
        for line in image {
            let args: Vec<&str> = line.split(' ').collect();
            assert_eq!(run(Path::new("qemu-img"), dir, &args).0, Some(0), "{line}");
        }
        std::fs::write(dir.join("pattern"), "abc").unwrap();
    }
    let mut wrong = String::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (options, commands) = line.split_once(": ").unwrap();
        let mut args: Vec<&str> = options.split(' ').filter(|word| !word.is_empty()).collect();
        args.extend(commands.split("; ").flat_map(|command| ["-c", command]));
        let [a, b] = [run(&link, &dirs[0], &args), run(Path::new("qemu-io"), &dirs[1], &args)];
        if a != b {
            wrong += &format!("\n{line}\n  ours: {a:?}\ntheirs: {b:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let [a, b] = dirs.each_ref().map(|dir| dir.join("a.img").display().to_string());
    let (code, out, err) = run(Path::new("qemu-img"), root.path(), &["compare", &a, &b]);
    assert_eq!(code, Some(0), "{out}{err}");
    let (code, out, err) = run(Path::new("qemu-img"), root.path(), &["check", &a]);
    assert!(matches!(code, Some(0 | 63)), "{out}{err}");
}

#[test]
fn requests_and_answers_are_qemu_io_s() {
    check(
        &["create -q -f qcow2 base.img 8M", "create -q -f qcow2 -b base.img -F qcow2 a.img"],
        "
        a.img: write -P 1 0 64k; write 1M 1536; read -P 1 0 64k; read -P 2 0 64k; read -v 0 32
        a.img: write -z 0 64k; write -z -u 64k 64k; write -c -P 7 128k 64k; write -q 0 512; write -f 4M 512
        a.img: w -P 0x1f 5M 4k; r -P 31 5M 4k; read -q -P 31 5M 4k
        a.img: aio_write -P 3 2M 64k; aio_flush; aio_read -P 3 2M 64k; aio_flush; flush
        a.img: writev -P 4 3M 512 512 1k; readv -P 4 3M 512 512 1k; readv -v 3M 8 8
        a.img: write -s pattern 6M 1000; read -v 6M 40
        -d unmap a.img: discard 2M 64k; discard -q 2M 64k
        a.img: alloc 0 1M; alloc 2M 64k; alloc 0; a 8M; alloc 2097152 2M
        a.img: map
        a.img: length; l; info
        a.img: read -C 0 512; write -C 7M 512; discard -C 7M 0
        a.img: read -P 0 -s 100 -l 50 0 512; read -p 0 512
        a.img: truncate 10M; length; truncate 4M; length
        a.img: close; length; open a.img; length
        a.img: quit; read 0 512
        -r a.img: read -P 1 1M 512
        -U -r a.img: length
        --image-opts driver=qcow2,file.filename=a.img: length
        -f raw base.img: read -v 0 4
        -n a.img: write -P 9 64k 4k; read -P 9 64k 4k
        ",
    );
}

#[test]
fn refusals_are_qemu_io_s() {
    check(
        &["create -q -f qcow2 a.img 8M"],
        "
        a.img: write 9M 64k
        a.img: read 7M 2M
        a.img: discard 9M 1
        a.img: write -P 1 0
        a.img: write -P 300 0 512
        a.img: write -P x 0 512
        a.img: write abc 512
        a.img: write 0 abc
        a.img: frob
        a.img: write -n 0 1
        a.img: write -u 0 64k
        a.img: write -zP1 0 512
        a.img: read -s 100 0 512
        a.img: read -P 1 0 512
        a.img: aio_read -P 1 0 512
        -r a.img: write 0 512
        a.img: reopen -r; write 0 512; reopen -w; write -q 0 512
        nope: read 0 512
        -r -t foo a.img: length
        ",
    );
}
