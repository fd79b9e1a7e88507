//! What goes wrong around an image: odd names, other processes, loops, little memory, pipes.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

struct Place {
    root: tempfile::TempDir,
}

impl Place {
    /// A directory with a link that makes this tool `qemu-img`.
    fn new() -> Place {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), root.path().join("qemu-img")).unwrap();
        Place { root }
    }
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.root.path().join(name)
    }
    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.root.path()).env("LC_ALL", "C");
        command
    }
    fn ours(&self, args: &[&str]) -> Output {
        self.command(&self.path("qemu-img"), args).output().unwrap()
    }
    fn peer(&self, args: &[&str]) -> Output {
        self.command(Path::new("qemu-img"), args).output().expect("qemu-img (package qemu-utils) does not start")
    }
    /// Both with their exit codes and errors.
    fn both(&self, args: &[&str]) -> [(Option<i32>, String); 2] {
        [self.ours(args), self.peer(args)]
            .map(|out| (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned()))
    }
    fn make(&self, args: &[&str]) {
        let out = self.peer(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

/// A peer that has an image open for writing until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(place: &Place, image: &str) -> Holder {
        let mut command = place.command(Path::new("qemu-io"), &["-f", "qcow2", image]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-io does not start");
        // The prompt comes when the image is open.
        let mut prompt = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(stdin) = self.0.stdin.as_mut() {
            let _ = stdin.write_all(b"quit\n");
        }
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_in_use_is_left_alone() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    place.make(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
    let before = std::fs::read(place.path("a.qcow2")).unwrap();
    let holder = Holder::new(&place, "a.qcow2");
    for line in [
        "info a.qcow2",
        "check a.qcow2",
        "map a.qcow2",
        "convert a.qcow2 out.raw",
        "convert top.qcow2 out.raw",
        "convert -O qcow2 top.qcow2 a.qcow2",
        "resize a.qcow2 9M",
        "snapshot -c x a.qcow2",
        "rebase -u -b '' a.qcow2",
        "amend -o lazy_refcounts=on a.qcow2",
        "bitmap --add a.qcow2 b",
        "create -f qcow2 a.qcow2 1M",
        "commit top.qcow2",
        "compare a.qcow2 top.qcow2",
        "dd if=top.qcow2 of=a.qcow2",
    ] {
        let args: Vec<&str> = line.split(' ').map(|word| if word == "''" { "" } else { word }).collect();
        let [ours, theirs] = place.both(&args);
        assert_eq!(ours.0, theirs.0, "{line}: {}", ours.1);
        assert!(ours.1.contains("lock") && ours.1.contains("Is another process using the image"), "{line}: {}", ours.1);
        // The peer takes the lock of the image below later, and names no file then.
        if !line.starts_with("commit") {
            assert_eq!(ours.1, theirs.1, "{line}");
        }
    }
    assert_eq!(place.ours(&["info", "-U", "a.qcow2"]).status.code(), Some(0));
    assert_eq!(place.ours(&["map", "--force-share", "a.qcow2"]).status.code(), Some(0));
    drop(holder);
    assert_eq!(std::fs::read(place.path("a.qcow2")).unwrap(), before);
    assert_eq!(place.ours(&["info", "a.qcow2"]).status.code(), Some(0));
}

#[test]
fn odd_names_are_names() {
    let place = Place::new();
    std::fs::create_dir(place.path("sub")).unwrap();
    for name in ["./with:colon", "-dash", "two\nlines", "blank and 'quote'", "comma,equals=", "ünïcode", "sub/../x"] {
        let out = place.ours(&["create", "-q", "-f", "qcow2", "--", name, "1M"]);
        assert!(out.status.success(), "{name:?}: {}", String::from_utf8_lossy(&out.stderr));
        let [ours, theirs] = [place.ours(&["info", "--", name]), place.peer(&["info", "--", name])].map(|o| o.stdout);
        assert_eq!(String::from_utf8_lossy(&ours), String::from_utf8_lossy(&theirs), "{name:?}");
        let copy = place.ours(&["convert", "-O", "raw", "--", name, "copy.raw"]);
        assert!(copy.status.success(), "{name:?}: {}", String::from_utf8_lossy(&copy.stderr));
    }
    // A name that is no UTF-8 is a name for the host all the same.
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::OsStr::from_bytes(b"latin-\xe9");
    let run = |args: &[&std::ffi::OsStr]| {
        Command::new(place.path("qemu-img")).args(args).current_dir(place.root.path()).output().unwrap()
    };
    let word = std::ffi::OsStr::new;
    assert!(run(&[word("create"), word("-q"), name, word("1M")]).status.success());
    assert!(run(&[word("info"), name]).status.success());
    for name in ["a:b", "nbd:", "fat:.", "", "json:{"] {
        let [ours, theirs] = place.both(&["create", "-q", "-f", "qcow2", name, "1M"]);
        assert_eq!((ours.0, theirs.0), (Some(1), Some(1)), "{name:?}: {}", ours.1);
    }
}

#[test]
fn chains_that_lead_nowhere_end() {
    let place = Place::new();
    let chain = [("a", "b"), ("b", "a"), ("self", "self"), ("far", "nowhere")];
    for (name, below) in chain {
        place.make(&["create", "-q", "-f", "qcow2", name, "1M"]);
        place.make(&["rebase", "-u", "-b", below, "-F", "qcow2", name]);
    }
    for (name, _) in chain {
        for command in ["map", "commit", "measure"] {
            let mut args = vec![command, name];
            if command == "measure" {
                args.extend(["-O", "qcow2"]);
            }
            let out = place.ours(&args);
            assert_eq!(out.status.code(), Some(1), "{args:?}");
            assert!(String::from_utf8_lossy(&out.stderr).contains(name), "{args:?}: {out:?}");
        }
        assert_eq!(place.ours(&["info", "--backing-chain", name]).status.code(), Some(1), "{name}");
        // What it says about itself needs no other file.
        assert_eq!(place.ours(&["info", name]).status.code(), Some(0), "{name}");
        assert_eq!(place.ours(&["check", name]).status.code(), Some(0), "{name}");
    }
    for (name, _) in chain {
        assert_eq!(place.ours(&["rebase", "-u", "-b", "", name]).status.code(), Some(0), "{name}");
        assert_eq!(place.ours(&["map", name]).status.code(), Some(0), "{name}");
    }
}

#[test]
fn a_raw_image_goes_through_a_pipe() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "a.qcow2", "3M"]);
    let io = place.command(Path::new("qemu-io"), &["-c", "write -P 7 1M 64k", "a.qcow2"]).output().unwrap();
    assert!(io.status.success());
    // stdout is a pipe here.
    let out = place.ours(&["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "/dev/stdout"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut want = vec![0; 3 << 20];
    want[1 << 20..(1 << 20) + 65536].fill(7);
    assert!(out.stdout == want, "{} bytes came out", out.stdout.len());
    let out =
        place.ours(&["dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=2", "skip=1", "if=a.qcow2", "of=/dev/stdout"]);
    assert!(out.stdout == want[1 << 20..2 << 20], "{} bytes came out", out.stdout.len());
    let out = place.ours(&["convert", "-O", "qcow2", "a.qcow2", "/dev/stdout"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(out.stdout.is_empty());
}

#[test]
fn a_gibibyte_of_addresses_is_enough() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "qcow2", "a.qcow2", "1T"]);
    let io = place.command(Path::new("qemu-io"), &["-c", "write -P 7 500G 8M", "a.qcow2"]).output().unwrap();
    assert!(io.status.success());
    for line in [
        "info --output=json -U a.qcow2",
        "check a.qcow2",
        "map a.qcow2",
        "measure -O qcow2 a.qcow2",
        "convert -O qcow2 a.qcow2 b.qcow2",
        "convert -O qcow2 -c -m 16 a.qcow2 c.qcow2",
        "compare a.qcow2 b.qcow2",
    ] {
        let tool = place.path("qemu-img").display().to_string();
        let mut args = vec!["--as=1073741824", tool.as_str()];
        args.extend(line.split(' '));
        let out = place.command(Path::new("prlimit"), &args).output().expect("prlimit (util-linux) does not start");
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn work_is_done_when_nobody_reads_the_answer() {
    let lines = [
        ("create -f qcow2 new.qcow2 1M", "info new.qcow2"),
        ("create -f qcow2 -o help", "info a.qcow2"),
        ("info --output=json a.qcow2", "info a.qcow2"),
        ("map a.qcow2", "info a.qcow2"),
        ("check a.qcow2", "info a.qcow2"),
        ("measure -O qcow2 a.qcow2", "info a.qcow2"),
        ("snapshot -l a.qcow2", "info a.qcow2"),
        ("compare -p a.qcow2 a.qcow2", "info a.qcow2"),
        ("bench -c 10 a.qcow2", "info a.qcow2"),
        ("convert -p -O qcow2 a.qcow2 out.qcow2", "compare -s a.qcow2 out.qcow2"),
        ("commit top.qcow2", "compare a.qcow2 one.raw"),
        ("amend -p -o compat=0.10 a.qcow2", "info a.qcow2"),
        ("rebase -p -b  top.qcow2", "compare top.qcow2 one.raw"),
        ("resize a.qcow2 9M", "compare -s -f qcow2 -F qcow2 a.qcow2 nine.qcow2"),
        ("--version", "info a.qcow2"),
        ("info --help", "info a.qcow2"),
    ];
    for (line, probe) in lines {
        for full in [true, false] {
            let place = Place::new();
            place.make(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
            place.make(&["create", "-q", "-f", "qcow2", "nine.qcow2", "9M"]);
            place.make(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2"]);
            let io = place.command(Path::new("qemu-io"), &["-c", "write -P 7 1M 64k", "top.qcow2"]).output().unwrap();
            assert!(io.status.success());
            place.make(&["convert", "top.qcow2", "one.raw"]);
            let sink = match full {
                true => Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap()),
                // Its other end is gone at once.
                false => Stdio::from(std::io::pipe().unwrap().1),
            };
            let args: Vec<&str> = line.split(' ').collect();
            let out = place.command(&place.path("qemu-img"), &args).stdout(sink).output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success() && said.is_empty(), "{line}: {}: {said}", out.status);
            let args: Vec<&str> = probe.split(' ').collect();
            let probed = place.peer(&args);
            assert!(probed.status.success(), "{line}: {probe}: {}", String::from_utf8_lossy(&probed.stdout));
        }
    }
}

#[test]
fn a_limit_of_file_sizes_is_told_of() {
    let place = Place::new();
    place.make(&["create", "-q", "-f", "raw", "a.raw", "8M"]);
    std::fs::write(place.path("a.raw"), vec![7; 8 << 20]).unwrap();
    for (format, out) in [("qcow2", "o.qcow2"), ("vdi", "o.vdi"), ("vhdx", "o.vhdx"), ("vpc", "o.vpc")] {
        let line = format!("ulimit -f 4500; exec ./qemu-img convert -f raw -O {format} a.raw {out}");
        let done = place.command(Path::new("bash"), &["-c", &line]).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{format}: {said}");
        assert!(said.contains("File too large"), "{format}: {said}");
    }
}
