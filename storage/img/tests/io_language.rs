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
        -s a.img: write -P 9 1M 70k; write -z 1100k 5k; read -P 9 1M 70k; read -P 9 2M 512; flush; map
        a.img: close; open -s a.img; write -P 8 1M 512; read -P 8 1M 512; close; open a.img; read -P 8 1M 512
        -s -r a.img: read -P 1 1M 512
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

#[test]
fn every_command_has_options_of_its_own() {
    let mut lines = String::from("a.img: write -q -P 5 0 64k; aio_write -zf 1M 64k");
    for (letters, command) in [
        ("abCipqrvslP", "read"),
        ("abCipqrvslP", "readv"),
        // QEMU's aio_* with -r abort.
        ("abCipqvslP", "aio_read"),
        ("abcCfinpqruzsP", "write"),
        ("abcCfinpqruzsP", "writev"),
        ("abcCfinpquzsP", "aio_write"),
        ("Cqr", "discard"),
    ] {
        // QEMU's ends at some time.
        let wait = if command.starts_with("aio") { "; aio_flush" } else { "" };
        for letter in letters.chars().filter(|letter| !(*letter == 'b' && matches!(command, "read" | "write"))) {
            let value = if matches!(letter, 's' | 'l' | 'P') { " 1" } else { "" };
            lines += &format!("\na.img: {command} -{letter}{value} 1M 64k{wait}; read -P 5 0 64k");
        }
        lines += &format!("\na.img: {command} 0; {command} 0 512 512{wait}; {command} -P; read -P 5 0 512");
    }
    check(&["create -q -f qcow2 a.img 8M"], &lines);
}

#[test]
fn a_request_has_a_largest_length() {
    let mut lines = String::new();
    for command in ["read", "readv", "aio_read", "discard", "writev 0 1M", "aio_write -P 1 0 1M"] {
        let start = if command.contains(' ') { command.to_owned() } else { format!("{command} 0") };
        lines += &format!("\na.img: {start} 2147483137; {start} 3G; read 0 512");
    }
    lines += "\na.img: read 0 2147483136; readv 0 2147483136; write -z 0 2147483136; discard 0 2147483136";
    lines += "\na.img: readv 9M 512; writev 9M 512; write 0 2147483137; write 0 3G; write -z 0 3G";
    lines += "\n-f raw a.img: truncate 1048577; length";
    check(&["create -q -f raw a.img 1M"], &lines);
}

#[test]
fn truncate_preallocates_where_qemu_io_does() {
    let mut lines = String::new();
    for image in ["-f qcow2 a.img", "-f raw b.img"] {
        for mode in ["off", "metadata", "falloc", "full", "bogus"] {
            for size in ["512k", "1048577", "3M", "1M"] {
                lines += &format!("\n{image}: truncate 2M; truncate -m {mode} {size}; length");
            }
        }
        lines += &format!("\n{image}: truncate 2M 3M; length; truncate 9E; truncate 1M; length");
    }
    check(&["create -q -f qcow2 a.img 1M", "create -q -f raw b.img 1M"], &lines);
}

/// Runs commands of a script on stdin, and compares what comes of it.
#[test]
fn a_script_fails_with_its_commands() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("qemu-io");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), &ours).unwrap();
    assert_eq!(run(Path::new("qemu-img"), dir.path(), &["create", "-q", "-f", "qcow2", "a.img", "1M"]).0, Some(0));
    for script in [
        "read -q -P 6 0 512\nquit\n",
        "read -q -P 0 0 512\nquit\n",
        "frob\nlength\n",
        "read -q 9M 512",
        "\n \nlength",
        "quit\nfrob\n",
    ] {
        std::fs::write(dir.path().join("script"), script).unwrap();
        let [a, b] = [ours.as_path(), Path::new("qemu-io")].map(|program| {
            let script = std::fs::File::open(dir.path().join("script")).unwrap();
            let out = Command::new(program).arg("a.img").current_dir(dir.path()).stdin(script).output().unwrap();
            (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
        });
        assert_eq!(a, b, "{script}");
    }
}

#[test]
fn output_that_nobody_takes_stops_no_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    assert_eq!(run(Path::new("qemu-img"), dir.path(), &["create", "-q", "-f", "raw", "a.img", "2M"]).0, Some(0));
    let ours = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-img"));
        command.args(["io", "-f", "raw"]).current_dir(dir.path());
        command
    };
    let commands = ["read -v 0 1M", "help", "map", "read -P 1 0 512", "read 0 512", "write -P 0x77 1M 64k"];
    let args = commands.iter().flat_map(|command| ["-c", command]).chain(["a.img"]);
    assert_eq!(ours().args(args).stdout(closed_pipe()).status().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(&path).unwrap()[1 << 20..][..65536], [0x77; 65536]);
    let script = dir.path().join("script");
    std::fs::write(&script, "read -v 0 1M\nwrite -P 0x78 1M 64k\n").unwrap();
    let script = std::fs::File::open(script).unwrap();
    assert_eq!(ours().arg("a.img").stdin(script).stdout(closed_pipe()).status().unwrap().code(), Some(0));
    assert_eq!(std::fs::read(&path).unwrap()[1 << 20..][..65536], [0x78; 65536]);
}

/// The end of a pipe to write to, of which the other is closed.
fn closed_pipe() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[test]
fn a_compressed_write_needs_whole_clusters() {
    check(
        &["create -q -f qcow2 a.img 8193k", "create -q -f raw raw.img 1M"],
        "
        a.img: write -P 5 0 192k
        a.img: write -P 9 -c 0 512; write -c 0 65537; write -c 1 64k; write -c 512 64k; write -c 64k 66048
        a.img: write -s pattern -c 128k 512; read -P 5 0 192k
        a.img: write -c 8M 512; write -c 8M 64k; write -c -P 7 7M 1025k; read -P 7 7M 1025k
        a.img: write -c 0 0; write -c -P 8 1M 128k; read -P 8 1M 128k
        -f raw raw.img: write -c 0 64k
        ",
    );
}

/// Options that make qemu-io and ours open an image through blkdebug.
const RAW: &str = "--image-opts driver=raw,discard=unmap,file.driver=blkdebug,file.discard=unmap,\
                   file.image.filename=a.img,file.image.discard=unmap";

#[test]
fn breakpoints_stop_requests_as_in_qemu_io() {
    let open = "open -o driver=raw,file.align=4k blkdebug::a.img";
    check(
        &["create -q -f qcow2 a.img 8M", "create -q -f raw b.img 8M"],
        "
        blkdebug::a.img: write -q -P 1 1M 64k; flush; break write_aio A; aio_write -P 6 0 64k; wait_break A; read -P 0 0 64k; resume A; aio_flush; read -P 6 0 64k
        blkdebug::a.img: break write_aio A; aio_write -P 2 1M 64k; wait_break A; read -P 1 1M 64k; write -P 7 1M 4k; resume A; aio_flush; flush; read -P 2 1M 64k
        blkdebug::a.img: break l2_update A; aio_write -q -f -P 5 2M 64k; wait_break A; aio_read -P 5 2M 64k; resume A; aio_flush; read -P 5 2M 64k
        blkdebug::a.img: break write_aio A; aio_write -P 10 0x318000 0x2000; wait_break A; aio_write -q -P 11 0x312000 0x2000; resume A; aio_flush; read -P 10 0x318000 0x2000; read -P 11 0x312000 0x2000; read -P 0 0x314000 0x4000
        blkdebug::a.img: break write_aio A; break write_aio B; aio_write 0 64k; wait_break A; resume A; resume B; resume A; aio_flush
        blkdebug::a.img: break write_aio A; break write_aio A; aio_write 0 64k; wait_break A; resume A; resume A; resume A; aio_flush
        blkdebug::a.img: break read_aio A; remove_break A; aio_read 0 64k; aio_flush; remove_break A; resume A
        blkdebug::a.img: break bogus A; break; break a; resume; wait_break; break a b c
        a.img: break write_aio A; resume A; remove_break A
        : break write_aio A; resume A; wait_break A; sigraise 0
        a.img: sleep x; sleep; sleep 0x10; sleep -1; sleep 010; sleep 1 2
        a.img: sigraise 0; sigraise x; sigraise 100; sigraise -1
        a.img: sigraise 15; length
        a.img: abort; length
        a.img: aio_write 9M 64k; aio_flush; aio_read 9M 64k; aio_flush; aio_read -i 0 512; aio_write -i 0 512
        a.img: aio_read -P x 0 512; aio_read 0; aio_write x 512; aio_write -u 0 512; aio_write -z 0 512 512
        a.img: aio_write -P 6 0 64k; length; aio_flush; aio_read -P 7 0 16; aio_flush; aio_read -v 0 16; aio_flush; aio_read -C 0 16; aio_flush
        a.img: length 1; alloc; truncate; help a b; discard 1; quit 1
        : open -o driver=qcow2 a.img; length
        : open -o driver=qcow2,file.filename=a.img a.img; length
        : open -o file.align=4k,driver=qcow2 blkdebug::a.img; write -P 8 5000 512; read -P 8 5000 512
        ",
    );
    // Padded requests wait for those whose blocks they share. One request of each script says when it is done: the
    // others may come before or after it.
    let mut lines = String::new();
    for event in ["pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev", "pwritev_done"] {
        lines += &format!(
            "\n: {open}; break {event} A; aio_write -P 10 0x200 0x200; wait_break A; aio_write -q -P 11 0x400 0x200; \
             resume A; aio_flush; read -P 10 0x200 0x200; read -P 11 0x400 0x200"
        );
    }
    lines += &format!(
        "\n: {open}; break pwritev_rmw_after_tail A; aio_write -q -P 10 0x6000 0x200; wait_break A; \
         break pwritev_rmw_after_head B; aio_write -P 10 0x7e00 0x200; wait_break B; aio_write -q -P 11 0x6800 0x1000; \
         resume A; resume B; aio_flush; read -P 10 0x6000 0x200; read -P 11 0x6800 0x1000"
    );
    check(&["create -q -f raw a.img 1M"], &lines);
}

/// A fault at one sector shows which request came past it, and so how requests are cut.
#[test]
fn limits_cut_and_pad_requests_as_qemu_does() {
    let all = "align=512,file.max-transfer=1k,file.opt-write-zero=4k,file.max-write-zero=8k,file.opt-discard=4k,\
               file.max-discard=8k";
    let mut lines = String::new();
    for (limits, requests) in [
        (all, ["write -P 3 700 9000", "write -z 512 20480", "write -z -u 5000 700", "discard 1000 20480"]),
        (
            "align=4k,file.max-transfer=8k",
            ["write -P 4 70000 20480", "read 5000 20480", "write -z 9000 66000", "w 0 1"],
        ),
        (
            "align=4k,file.opt-write-zero=12k,file.max-write-zero=24k,file.opt-discard=12k,file.max-discard=12k",
            ["write -z 4096 131072", "write -z 5000 20480", "discard 512 66000", "write -P 5 512 700"],
        ),
        (
            "max-transfer=1000,file.opt-write-zero=3000,file.opt-discard=3000,file.max-discard=6000",
            ["write -z 512 20480", "discard 1024 20480", "write -P 6 1000 9000", "read 1 9000"],
        ),
    ] {
        for request in requests {
            // A read around a write that fails, fails the write here; QEMU 10 writes what its buffer held.
            for io_type in ["write", "write-zeroes", "discard"] {
                for sector in [1, 9, 23] {
                    lines += &format!(
                        "\n-d unmap {RAW},file.{limits},file.inject-error.0.event=none,file.inject-error.0.once=on,\
                         file.inject-error.0.iotype={io_type},file.inject-error.0.sector={sector}: \
                         write -q -P 9 256k 64k; {request}; {request}; read -v 0 40"
                    );
                }
            }
        }
    }
    check(&["create -q -f raw a.img 1M"], &lines);
}

#[test]
fn limits_are_refused_as_qemu_refuses_them() {
    let mut lines = String::new();
    for option in [
        "align=3",
        "align=0",
        "align=1073741824",
        "align=x",
        "align=-1",
        "max-transfer=3",
        "max-transfer=2147483647",
        "align=512,file.max-transfer=1000",
        "align=3,file.max-transfer=7",
        "align=512,file.opt-write-zero=4096,file.max-write-zero=2048",
        "max-discard=2049,file.opt-discard=2048",
        "take-child-perms.0=write,file.take-child-perms.1=resize",
        "unshare-child-perms.0=consistent-read",
        "take-child-perms.0=graph-mod",
        "take-child-perms=write",
        "take-child-perms.1=write",
        "take-child-perms.x=write",
        "unshare-child-perms.0.x=write",
        "opt-bogus=1",
    ] {
        lines += &format!("\n{RAW},file.{option}: length\n-r {RAW},file.{option}: length");
    }
    lines += "\n: open -o driver=raw,file.align=4k blkdebug::odd.img; length";
    lines += "\n: open -r -o driver=raw,file.align=4k blkdebug::odd.img; length; read -v 1500 36";
    lines += "\n: open -o driver=raw,file.align=4k odd.img; length";
    check(&["create -q -f raw a.img 1M", "create -q -f raw odd.img 1536"], &lines);
}
