//! `serve` under the name `qemu-nbd`: its command lines beside qemu-nbd's, its life from `--fork` to SIGTERM, and
//! `nbd:` names in the other commands.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

struct Room {
    dir: tempfile::TempDir,
    tool: PathBuf,
}

impl Room {
    fn new() -> Room {
        let dir = tempfile::tempdir().unwrap();
        for name in ["qemu-nbd", "qemu-img"] {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vireo-img"), dir.path().join(name)).unwrap();
        }
        let tool = dir.path().join("qemu-nbd");
        let room = Room { dir, tool };
        assert_eq!(room.peer_img("create -q -f qcow2 a.qcow2 4M").0, Some(0));
        assert_eq!(room.peer_img("create -q -f raw a.raw 4M").0, Some(0));
        room
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Runs words; `DIR` in them is the directory.
    fn run(&self, program: &Path, line: &str) -> (Option<i32>, String, String) {
        let words = line.split_whitespace().map(|word| match word {
            "''" => String::new(),
            word => word.replace("DIR", &self.dir.path().display().to_string()),
        });
        let mut command = Command::new(program);
        command.args(words).current_dir(self.dir.path()).stdin(Stdio::null()).env("LC_ALL", "C");
        let Output { status, stdout, stderr } =
            command.output().unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (status.code(), text(stdout), text(stderr))
    }

    fn serve(&self, line: &str) -> (Option<i32>, String, String) {
        self.run(&self.tool, line)
    }

    fn img(&self, line: &str) -> (Option<i32>, String, String) {
        self.run(&self.dir.path().join("qemu-img"), line)
    }

    fn peer_img(&self, line: &str) -> (Option<i32>, String, String) {
        self.run(Path::new("qemu-img"), line)
    }

    fn peer_io(&self, line: &str) -> (Option<i32>, String, String) {
        self.run(Path::new("qemu-io"), line)
    }

    /// Starts a server in the background; it listens when this returns.
    fn start(&self, line: &str) -> Server {
        self.start_with(&self.tool, line)
    }

    /// The same with QEMU's server.
    fn start_peer(&self, line: &str) -> Server {
        self.start_with(Path::new("qemu-nbd"), line)
    }

    fn start_with(&self, program: &Path, line: &str) -> Server {
        let started = self.run(program, &format!("--fork --pid-file=DIR/pid {line}"));
        assert_eq!(started, (Some(0), String::new(), started.2.clone()), "{line}");
        let text = std::fs::read_to_string(self.path("pid")).unwrap();
        Server { pid: Pid::from_raw(text.trim().parse().unwrap()).unwrap() }
    }
}

struct Server {
    pid: Pid,
}

impl Server {
    /// Waits until the process has ended. It is no child of ours, and whoever collects it may take its time.
    fn wait(&self) {
        let Ok(process) = pidfd_open(self.pid, PidfdFlags::empty()) else { return };
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
        assert_eq!(ended, Ok(1), "the server is still there");
    }

    fn end(&self) {
        let _ = kill_process(self.pid, Signal::TERM);
        self.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::TERM);
    }
}

#[test]
fn refusals_are_qemu_nbd_s() {
    let room = Room::new();
    for name in ["s1", "s2"] {
        assert_eq!(room.peer_img(&format!("snapshot -c {name} a.qcow2")).0, Some(0));
    }
    let mut wrong = String::new();
    for line in [
        "-e -1 a.raw",
        "-e x a.raw",
        "-o x a.raw",
        "-f raw -o 5M a.raw",
        "--cache=foo a.raw",
        "--discard=foo a.raw",
        "--aio=foo a.raw",
        "--detect-zeroes=foo a.raw",
        "-f foo a.raw",
        "-f raw -k DIR/s nofile",
        "-f qcow2 -k DIR/s a.raw",
        "-n --cache=none a.raw",
        "-k s a.raw",
        "-L a.raw",
        "--handshake-limit=x a.raw",
        "-f raw --fork --pid-file=/nowhere/x -k DIR/s a.raw",
        "--cache=none --cache=none a.raw",
        "-n -n a.raw",
        "--aio=threads --aio=threads a.raw",
        "--discard=unmap --discard=unmap a.raw",
        "-f raw -k DIR/s --aio=native a.raw",
        "-f raw -k DIR/s --aio=native --cache=writethrough a.raw",
        "-e 1x a.raw",
        "-e 0x a.raw",
        "-e 08 a.raw",
        "-e 3000000000 a.raw",
        "-f qcow2 -k DIR/s -l snapshot.id=1,snapshot.name=s2 a.qcow2",
        "-f qcow2 -k DIR/s -l snapshot.id=2,snapshot.name=s1 a.qcow2",
        "-f qcow2 -k DIR/s -l none a.qcow2",
    ] {
        let ours = room.serve(line);
        assert!(!Path::new(&room.path("s")).exists(), "{line}: the socket is left");
        let theirs = room.run(Path::new("qemu-nbd"), line);
        let _ = std::fs::remove_file(room.path("s"));
        if ours != theirs {
            wrong += &format!("\n{line}\n  ours: {ours:?}\ntheirs: {theirs:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let (code, _, err) = room.serve("--frob a.raw");
    assert!(code == Some(1) && err.contains("unrecognized option '--frob'\nTry 'qemu-nbd --help'"), "{err}");
    for line in ["", "a.raw a.qcow2"] {
        let [ours, theirs] = [room.serve(line), room.run(Path::new("qemu-nbd"), line)];
        assert_eq!((ours.0, ours.2.lines().next()), (theirs.0, theirs.2.lines().next()), "{line}");
    }
}

#[test]
fn what_qemu_nbd_takes_is_taken() {
    let room = Room::new();
    assert_eq!(room.peer_img("snapshot -c s1 a.qcow2").0, Some(0));
    for line in [
        "-f qcow2 -l snapshot.id=1,snapshot.name=s1 a.qcow2",
        "-f qcow2 -l snapshot.name=s1,snapshot.id=1 a.qcow2",
        "-f qcow2 -l s1 a.qcow2",
        "-f raw -e 0x10 a.raw",
        "-f raw -p 5 -b nowhere a.raw",
        "-f raw --aio=native --cache=none a.raw",
        "-f raw --detect-zeroes=on --detect-zeroes=on a.raw",
    ] {
        let server = room.start(&format!("-t -k DIR/s {line}"));
        assert_eq!(room.peer_img("info -f raw nbd+unix:///?socket=DIR/s").0, Some(0), "{line}");
        server.end();
    }
}

#[test]
fn a_pid_file_belongs_to_one_server() {
    let room = Room::new();
    std::fs::write(room.path("pid"), "a longer text of old\n").unwrap();
    let server = room.start("-t -k DIR/s -f raw a.raw");
    let held = std::fs::read_to_string(room.path("pid")).unwrap();
    let second = "--pid-file=DIR/pid -k DIR/s2 -r -f qcow2 a.qcow2";
    let theirs = room.run(Path::new("qemu-nbd"), second);
    assert!(theirs.0 == Some(1) && theirs.2.contains("Cannot lock pid file"), "{theirs:?}");
    for line in [second.to_owned(), format!("--fork {second}")] {
        assert_eq!(room.serve(&line), theirs, "{line}");
    }
    assert_eq!(std::fs::read_to_string(room.path("pid")).unwrap(), held);
    server.end();
    let server = room.start_peer("-t -k DIR/s -f raw a.raw");
    assert_eq!(room.serve(second), theirs);
    server.end();
}

/// Socket activation as systemd does it: descriptor 3 listens, and the environment names the process.
#[test]
fn an_activated_socket_is_served_from_the_background() {
    let room = Room::new();
    let script = "import socket,os,sys\n\
                  s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(5)\n\
                  os.dup2(s.fileno(), 3); os.set_inheritable(3, True)\n\
                  os.environ['LISTEN_FDS'] = '1'; os.environ['LISTEN_PID'] = str(os.getpid())\n\
                  os.execv(sys.argv[2], sys.argv[2:])\n";
    std::fs::write(room.path("activate.py"), script).unwrap();
    for socket in ["one", "two"] {
        let line = format!("activate.py DIR/{socket} DIR/qemu-nbd --fork --pid-file=DIR/pid -t -f raw a.raw");
        assert_eq!(room.run(Path::new("python3"), &line), (Some(0), String::new(), String::new()));
        let text = std::fs::read_to_string(room.path("pid")).unwrap();
        let server = Server { pid: Pid::from_raw(text.trim().parse().unwrap()).unwrap() };
        assert_eq!(room.peer_img(&format!("info -f raw nbd+unix:///?socket=DIR/{socket}")).0, Some(0));
        server.end();
    }
    for rest in ["-k DIR/s", "-p 5", "-b localhost"] {
        let [ours, theirs] = ["DIR/qemu-nbd", "/usr/bin/qemu-nbd"].map(|program| {
            let _ = std::fs::remove_file(room.path("third"));
            room.run(Path::new("python3"), &format!("activate.py DIR/third {program} --fork {rest} -f raw a.raw"))
        });
        assert_eq!(ours, theirs, "{rest}");
    }
}

#[test]
fn what_is_not_built_is_said() {
    let room = Room::new();
    for (line, want) in [
        ("-c /dev/nbd0 a.raw", "the option -c needs the NBD device of the host's kernel, which is not supported"),
        ("-d /dev/nbd0", "the option -d needs the NBD device of the host's kernel"),
        ("-B b a.qcow2", "the option -B without -r is not supported; add -r"),
        ("--tls-authz=a a.raw", "the option --tls-authz is not supported; whoever 'ca-cert.pem' has signed"),
    ] {
        let (code, out, err) = room.serve(line);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{line}");
        assert!(err.starts_with(&format!("qemu-nbd: {want}")), "{line}: {err}");
    }
    let (code, out, _) = room.serve("--version");
    assert!(code == Some(0) && out.starts_with("qemu-nbd version 10.0.2 "), "{out}");
    let (code, out, _) = room.serve("--help");
    assert!(code == Some(0) && out.contains("-k, --socket") && out.contains("Usage:"), "{out}");
    let (code, _, err) = room.img("info nbds://localhost/x");
    assert!(
        code == Some(1) && err.contains("an encrypted connection needs credentials: '--object tls-creds-x509"),
        "{err}"
    );
}

#[test]
fn a_server_in_the_background_from_start_to_end() {
    let room = Room::new();
    let server = room.start("-t -e 3 -k DIR/s -x disk -D words -f qcow2 a.qcow2");
    let uri = "nbd+unix:///disk?socket=DIR/s";
    let script = room.path("commands");
    std::fs::write(&script, "write -P 9 1M 64k\nwrite -z 2M 64k\nflush\nquit\n").unwrap();
    let commands = std::fs::File::open(&script).unwrap();
    let full = uri.replace("DIR", &room.dir.path().display().to_string());
    let io = Command::new("qemu-io").args(["-f", "raw", &full]).stdin(commands).output().unwrap();
    assert!(io.status.success(), "{io:?}");
    let listed = room.serve("-L -k DIR/s");
    assert_eq!(listed, room.run(Path::new("qemu-nbd"), "-L -k DIR/s"));
    // The image is locked while it is served, against QEMU too.
    let (code, _, err) = room.peer_img("info a.qcow2");
    assert!(code == Some(1) && err.contains("lock"), "{err}");
    // A second server does not take the socket away.
    let (code, _, err) = room.serve("-f raw -k DIR/s a.raw");
    assert!(code == Some(1) && err.contains("another server listens on it"), "{err}");
    assert_eq!(room.img(&format!("compare -f raw -F raw {uri} {uri}")).0, Some(0));
    server.end();
    assert!(!Path::new(&room.path("s")).exists());
    let out = room.peer_io("-r -f qcow2 -c map a.qcow2");
    assert_eq!(out.0, Some(0), "{out:?}");
    assert_eq!(room.peer_img("check a.qcow2").0, Some(0));
    let found = Command::new("qemu-io").args(["-r", "-c", "read -P 9 1M 64k", &room.path("a.qcow2")]).output().unwrap();
    assert!(!String::from_utf8_lossy(&found.stdout).contains("failed"), "{found:?}");
}

#[test]
fn a_server_ends_with_its_last_client() {
    let room = Room::new();
    let server = room.start("-k DIR/s -f raw a.raw");
    // A look is no client.
    assert_eq!(room.serve("-L -k DIR/s").0, Some(0));
    assert_eq!(room.img("convert -n -f qcow2 -O raw a.qcow2 nbd:unix:DIR/s").0, Some(0));
    server.wait();
    assert!(!Path::new(&room.path("s")).exists());
}

#[test]
fn the_foreground_ends_well_on_a_signal() {
    let room = Room::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut command = Command::new(&room.tool);
        let words = [
            "-t",
            "-v",
            "-b",
            "127.0.0.1",
            "-p",
            "0",
            "-f",
            "raw",
            "--pid-file",
            &room.path("pid"),
            &room.path("a.raw"),
        ];
        let _ = std::fs::remove_file(room.path("pid"));
        let mut child = command.args(words).stderr(Stdio::piped()).spawn().unwrap();
        while !std::fs::read_to_string(room.path("pid")).is_ok_and(|text| text.ends_with('\n')) {
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{signal:?}");
        let said = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok).collect::<Vec<_>>();
        assert!(said.is_empty(), "{said:?}");
    }
}

#[test]
fn names_of_exports_are_images_to_every_command() {
    let room = Room::new();
    let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| if i % 70_000 < 30_000 { (i / 7) as u8 | 1 } else { 0 }).collect();
    std::fs::write(room.path("a.raw"), &bytes).unwrap();
    let server = room.start("-r -t -e 0 -k DIR/s -f raw a.raw");
    for uri in [
        "nbd+unix:///?socket=DIR/s",
        "nbd:unix:DIR/s",
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"nbd\",\"path\":\"DIR/s\"}}",
    ] {
        for (out, to) in [("raw", "o.raw"), ("qcow2", "o.qcow2")] {
            let done = room.img(&format!("convert -O {out} {uri} {to}"));
            assert_eq!(done, (Some(0), String::new(), String::new()), "{uri}");
            assert_eq!(room.peer_img(&format!("compare -U -f raw -F {out} a.raw {to}")).0, Some(0), "{uri}");
        }
        for line in ["info", "info --output=json", "map --output=json", "map"] {
            let line = format!("{line} -f raw {uri}");
            let [ours, theirs] = [room.img(&line), room.peer_img(&line)];
            if line.contains("json ") {
                let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
                assert_eq!(value(&ours.1), value(&theirs.1), "{line}");
            } else {
                assert_eq!(ours, theirs, "{line}");
            }
        }
    }
    let (code, _, err) = room.img("convert -n -f raw -O raw a.raw nbd:unix:DIR/s");
    assert!(code == Some(1) && err.contains("the export is read only"), "{err}");
    let (code, _, err) = room.img("info nbd+unix:///other?socket=DIR/s");
    assert!(code == Some(1) && err.contains("Requested export not available"), "{err}");
    server.end();
    let uri = "nbd+unix:///?socket=DIR/s";
    assert_eq!(room.img(&format!("info {uri}")), room.peer_img(&format!("info {uri}")));
}

#[test]
fn an_internal_snapshot_and_a_part_of_a_disk_are_served() {
    let room = Room::new();
    let io = |commands: &[&str]| {
        let args = commands.iter().flat_map(|command| ["-c", command]);
        let out = Command::new("qemu-io").args(args).arg(room.path("a.qcow2")).output().unwrap();
        assert!(out.status.success(), "{out:?}");
    };
    io(&["write -P 1 0 4M"]);
    assert_eq!(room.peer_img("snapshot -c one a.qcow2").0, Some(0));
    io(&["write -P 2 0 4M"]);
    for (options, value, mib) in [("-l one", 1, 4), ("-l snapshot.name=one -o 1M", 1, 3), ("-r -o 3M", 2, 1)] {
        let _server = room.start(&format!("{options} -f qcow2 -k DIR/s a.qcow2"));
        assert_eq!(room.peer_img("convert -f raw -O raw nbd:unix:DIR/s o").0, Some(0), "{options}");
        assert!(std::fs::read(room.path("o")).unwrap() == vec![value; mib << 20], "{options}");
    }
}

#[test]
fn a_target_on_a_server_needs_no_making() {
    let room = Room::new();
    let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 4096) as u8).collect();
    std::fs::write(room.path("from"), &bytes).unwrap();
    let server = room.start("-t -k DIR/s -f raw a.raw");
    let done = room.img("convert -f raw -O raw from nbd:unix:DIR/s");
    assert_eq!(done, (Some(0), String::new(), String::new()));
    std::fs::write(room.path("longer"), vec![1; 5 << 20]).unwrap();
    let (code, _, err) = room.img("convert -f raw -O raw longer nbd:unix:DIR/s");
    assert_eq!((code, err.as_str()), (Some(1), "qemu-img: output file is smaller than input file\n"));
    server.end();
    assert!(std::fs::read(room.path("a.raw")).unwrap() == bytes);
}

#[test]
fn libnbd_starts_a_server_with_its_own_socket() {
    let room = Room::new();
    std::fs::write(room.path("a.raw"), vec![5; 1 << 20]).unwrap();
    let done = room.run(Path::new("nbdcopy"), "-- [ DIR/qemu-nbd -r -f raw DIR/a.raw ] DIR/copy");
    assert_eq!(done.0, Some(0), "{done:?}");
    assert!(std::fs::read(room.path("copy")).unwrap() == vec![5; 1 << 20]);
    let done = room.run(Path::new("nbdinfo"), "--size -- [ DIR/qemu-nbd -f qcow2 DIR/a.qcow2 ]");
    assert_eq!((done.0, done.1.as_str()), (Some(0), "4194304\n"), "{done:?}");
}

#[test]
fn what_a_bitmap_marks_is_told_as_qemu_nbd_tells_it() {
    let room = Room::new();
    for line in ["bitmap --add -g 64k a.qcow2 b", "bitmap --add -g 4k a.qcow2 fine"] {
        assert_eq!(room.peer_img(line).0, Some(0));
    }
    for command in ["write 100k 70k", "write -z 1M 5k", "discard 2M 128k", "write 4095k 1k"] {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "qcow2", "-c", command, "a.qcow2"]).current_dir(room.dir.path());
        assert!(io.output().unwrap().status.success());
    }
    let map = |name: &str| {
        let driver = "driver=nbd,server.type=unix,server.path=DIR/s,x-dirty-bitmap=qemu:dirty-bitmap:";
        room.peer_img(&format!("map --output=json --image-opts {driver}{name}"))
    };
    let our_map = |name: &str| {
        let driver = "driver=nbd,server.type=unix,server.path=DIR/s,x-dirty-bitmap=qemu:dirty-bitmap:";
        ["--output=json", ""].map(|output| room.img(&format!("map {output} --image-opts {driver}{name}")))
    };
    let ours = {
        let server = room.start("-t -r -B b -B fine -f qcow2 -k DIR/s a.qcow2");
        let told = ["b", "fine", "other"].map(map);
        let list = room.run(Path::new("qemu-nbd"), "-L -k DIR/s").1;
        assert!(list.find(":fine").is_some_and(|fine| list.find(":b").is_some_and(|b| fine < b)), "{list}");
        assert!(list.contains("flags: 0x48f"), "{list}");
        let data = room.peer_img("map --output=json nbd+unix:///?socket=DIR/s");
        assert!(data.0 == Some(0) && data.1.contains("\"data\": true"), "{data:?}");
        server.end();
        told
    };
    let server = room.start_peer("-t -r -B b -B fine -f qcow2 -k DIR/s a.qcow2");
    let theirs = ["b", "fine", "other"].map(map);
    for (name, want) in ["b", "fine"].iter().zip(&theirs) {
        let [json, text] = our_map(name);
        assert_eq!(&json, want);
        assert!(text.0 == Some(0) && text.1.lines().count() > 3, "{text:?}");
    }
    let (code, _, err) = &our_map("other")[0];
    assert!(*code == Some(1) && err.contains("x-dirty-bitmap qemu:dirty-bitmap:other not found"), "{err}");
    // What is marked is no hole: a copy has all of it.
    let copy = "convert -O raw --image-opts driver=nbd,path=DIR/s,x-dirty-bitmap=qemu:dirty-bitmap:b copy.raw";
    assert_eq!(room.img(copy).0, Some(0));
    assert_eq!(room.peer_img("compare -f raw -F qcow2 copy.raw a.qcow2").0, Some(0));
    server.end();
    assert_eq!(ours, theirs);
    assert!(ours[0].1.lines().count() > 3, "{}", ours[0].1);
    let missing = "-r -B none -f qcow2 -k DIR/s a.qcow2";
    assert_eq!(room.serve(missing), room.run(Path::new("qemu-nbd"), missing));
    let (code, _, err) = room.serve("-B b -f qcow2 -k DIR/s a.qcow2");
    assert!(code == Some(1) && err.contains("add -r"), "{err}");
}

#[test]
fn in_which_image_data_is_is_told_as_qemu_nbd_tells_it() {
    let room = Room::new();
    for line in [
        "create -q -f raw bottom.raw 1M",
        "create -q -f qcow2 -b bottom.raw -F raw middle.qcow2 3M",
        "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2 4M",
    ] {
        assert_eq!(room.peer_img(line).0, Some(0), "{line}");
    }
    for (file, command) in [
        ("bottom.raw", "write 128k 70k"),
        ("middle.qcow2", "write 256k 64k"),
        ("middle.qcow2", "write -z 2M 64k"),
        ("top.qcow2", "write 384k 4k"),
        ("top.qcow2", "write -z 3M 128k"),
        ("a.qcow2", "write 1M 64k"),
    ] {
        let done = Command::new("qemu-io").args(["-c", command, file]).current_dir(room.dir.path()).output();
        assert!(done.unwrap().status.success(), "{command}");
    }
    let ask = || {
        ["qemu:allocation-depth", "base:allocation"]
            .map(|context| room.run(Path::new("nbdinfo"), &format!("--map={context} nbd+unix:///?socket=DIR/s")))
    };
    let list = || {
        let listed = room.run(Path::new("qemu-nbd"), "-L -k DIR/s").1;
        listed.split_once("available meta contexts").map(|(_, contexts)| contexts.to_owned())
    };
    for (image, want) in [("top.qcow2", &["1", "2", "3"][..]), ("a.qcow2", &["0", "1"])] {
        let line = format!("-t -A -r -f qcow2 -k DIR/s {image}");
        let [ours, theirs] = [true, false].map(|is_ours| {
            let server = if is_ours { room.start(&line) } else { room.start_peer(&line) };
            let told = (ask(), list());
            server.end();
            told
        });
        assert_eq!(ours, theirs);
        let depths: Vec<&str> = ours.0[0].1.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
        assert!(want.iter().all(|depth| depths.contains(depth)), "{depths:?}");
    }
}

#[test]
fn a_temporary_image_takes_what_clients_write() {
    let room = Room::new();
    std::fs::write(room.path("b.raw"), vec![7; 4 << 20]).unwrap();
    for (line, image) in [("-s -t -f raw -k DIR/s b.raw", "b.raw"), ("-s -t -f qcow2 -k DIR/s a.qcow2", "a.qcow2")] {
        let before = std::fs::read(room.path(image)).unwrap();
        let server = room.start(line);
        for commands in [["write -P 1 64k 5k", "write -z 1M 1M"], ["read -P 1 64k 5k", "read -P 0 1M 1M"]] {
            let mut io = Command::new("qemu-io");
            io.args(commands.iter().flat_map(|command| ["-c", command])).arg("-f").arg("raw");
            let done = io.arg(format!("nbd+unix:///?socket={}", room.path("s"))).output().unwrap();
            assert!(done.status.success(), "{commands:?} {done:?}");
        }
        // Nobody keeps others from reading the image.
        let info = room.peer_img(&format!("info {image}"));
        assert_eq!(info.0, Some(0), "{info:?}");
        server.end();
        assert!(std::fs::read(room.path(image)).unwrap() == before, "{line}");
    }
    let mut command = Command::new(&room.tool);
    command.args(["-s", "-f", "raw", "-k", "/nowhere/s", "b.raw"]).current_dir(room.dir.path());
    let done = command.env("TMPDIR", "/nowhere").output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(text.contains("temporary file in '/nowhere': No such file or directory; TMPDIR names"), "{text}");
}

/// Certificates as QEMU's documentation tells to make them: `pki` has all, `other` those of another authority, `onlyca`
/// no client's, `unnamed` a server's for another name.
fn make_certificates(room: &Room) {
    let openssl = |line: &str| {
        let done = room.run(Path::new("openssl"), line);
        assert_eq!(done.0, Some(0), "openssl {line}: {}", done.2);
    };
    let new_key = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30";
    for dir in ["pki", "other", "onlyca", "unnamed"] {
        std::fs::create_dir(room.path(dir)).unwrap();
    }
    for dir in ["pki", "other"] {
        openssl(&format!(
            "req {new_key} -keyout {dir}/ca-key.pem -out {dir}/ca-cert.pem -subj /CN=authority \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign"
        ));
        for (who, name) in [("server", "DNS:localhost,IP:127.0.0.1"), ("client", "DNS:client")] {
            openssl(&format!(
                "req {new_key} -CA {dir}/ca-cert.pem -CAkey {dir}/ca-key.pem -keyout {dir}/{who}-key.pem \
                 -out {dir}/{who}-cert.pem -subj /CN={who} -addext subjectAltName={name} \
                 -addext basicConstraints=critical,CA:FALSE"
            ));
        }
    }
    std::fs::copy(room.path("pki/ca-cert.pem"), room.path("onlyca/ca-cert.pem")).unwrap();
    for (from, to) in [("ca-cert", "ca-cert"), ("client-cert", "server-cert"), ("client-key", "server-key")] {
        std::fs::copy(room.path(&format!("pki/{from}.pem")), room.path(&format!("unnamed/{to}.pem"))).unwrap();
    }
}

fn creds(endpoint: &str, dir: &str) -> String {
    format!("--object tls-creds-x509,id=t,endpoint={endpoint},dir=DIR/{dir}")
}

/// The options of an image that is an export on the socket `s`.
fn export(more: &str) -> String {
    format!("driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=DIR/s{more}")
}

/// Every client with every server: data, in flight at once, arrives as it was sent.
#[test]
fn tls_carries_data_between_both_and_their_peers() {
    let room = Room::new();
    make_certificates(&room);
    let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 7 % 251) as u8).collect();
    std::fs::write(room.path("from"), &bytes).unwrap();
    let (server, client) = (creds("server", "pki"), creds("client", "pki"));
    let line = format!("{server} --tls-creds t -t -e 4 -k DIR/s -f raw a.raw");
    let name = export(",file.tls-creds=t,file.tls-hostname=localhost");
    for ours_serves in [true, false] {
        let running = if ours_serves { room.start(&line) } else { room.start_peer(&line) };
        for ours_asks in [true, false] {
            let who = format!("ours serves: {ours_serves}, ours asks: {ours_asks}");
            std::fs::write(room.path("a.raw"), vec![0; 4 << 20]).unwrap();
            let img = |line: &str| if ours_asks { room.img(line) } else { room.peer_img(line) };
            let sent = img(&format!("convert {client} -n --target-image-opts -m 8 -W -f raw from {name}"));
            assert_eq!(sent, (Some(0), String::new(), String::new()), "{who}");
            assert!(std::fs::read(room.path("a.raw")).unwrap() == bytes, "{who}");
            let got = img(&format!("convert {client} --image-opts -m 8 -W -O raw {name} to"));
            assert_eq!(got, (Some(0), String::new(), String::new()), "{who}");
            assert!(std::fs::read(room.path("to")).unwrap() == bytes, "{who}");
        }
        let info = format!("info {client} --image-opts {name}");
        assert_eq!(room.img(&info), room.peer_img(&info));
        let list = format!("-L {client} --tls-creds t --tls-hostname localhost -k DIR/s");
        let [ours, theirs] = [room.serve(&list), room.run(Path::new("qemu-nbd"), &list)];
        assert!(ours.0 == Some(0) && ours.1.contains("exports available: 1"), "{ours:?}");
        assert!(!ours_serves || ours == theirs, "{ours:?}\n{theirs:?}");
        running.end();
    }
}

/// What does not fit is said in one sentence; nothing is read in the clear.
#[test]
fn tls_that_does_not_fit_says_what_helps() {
    let room = Room::new();
    make_certificates(&room);
    let needs = "the server demands TLS; make credentials with '--object tls-creds-x509";
    let cases = [
        ("pki", "", String::new(), "", needs),
        ("pki", "", creds("client", "pki"), ",file.tls-creds=x", "No TLS credentials with id 'x'"),
        (
            "pki",
            "",
            creds("server", "pki"),
            ",file.tls-creds=t,file.tls-hostname=localhost",
            "Expected TLS credentials for a client endpoint",
        ),
        (
            "pki",
            "",
            creds("client", "onlyca"),
            ",file.tls-creds=t,file.tls-hostname=localhost",
            "it does not take our certificate, or we show none",
        ),
        ("pki", ",verify-peer=off", creds("client", "onlyca"), ",file.tls-creds=t,file.tls-hostname=localhost", ""),
        (
            "pki",
            "",
            creds("client", "other"),
            ",file.tls-creds=t,file.tls-hostname=localhost",
            "The certificate hasn't got a known issuer",
        ),
        (
            "pki",
            "",
            creds("client", "other") + ",verify-peer=off",
            ",file.tls-creds=t,file.tls-hostname=localhost",
            "it does not take our certificate",
        ),
        ("pki", "", creds("client", "pki"), ",file.tls-creds=t,file.tls-hostname=localhost", ""),
        (
            "pki",
            "",
            creds("client", "pki"),
            ",file.tls-creds=t,file.tls-hostname=elsewhere",
            "Certificate does not match the hostname elsewhere; give a name that it has with 'tls-hostname'",
        ),
        ("unnamed", "", creds("client", "pki"), ",file.tls-creds=t,file.tls-hostname=client", ""),
        ("pki", "", creds("client", "pki"), ",file.tls-creds=t", "No hostname for certificate validation; give"),
        ("pki", ",verify-peer=off", creds("client", "onlyca") + ",verify-peer=off", ",file.tls-creds=t", ""),
        (
            "",
            "",
            creds("client", "pki"),
            ",file.tls-creds=t,file.tls-hostname=localhost",
            "the server does not offer TLS (TLS is not configured)",
        ),
    ];
    for (dir, more, object, options, want) in cases {
        let tls = if dir.is_empty() { String::new() } else { format!("{}{more} --tls-creds t", creds("server", dir)) };
        let server = room.start(&format!("{tls} -t -e 4 -k DIR/s -f raw a.raw"));
        let (code, _, err) = room.img(&format!("info {object} --image-opts {}", export(options)));
        assert_eq!(code, Some(i32::from(!want.is_empty())), "{dir} {object} {options}: {err}");
        assert!(err.contains(want) && err.lines().count() == usize::from(!want.is_empty()), "{object}: {err}");
        // QEMU's client fares the same.
        let theirs = room.peer_img(&format!("info {object} --image-opts {}", export(options)));
        assert_eq!(theirs.0, code, "{dir} {object} {options}: {theirs:?}");
        server.end();
    }
    // QEMU's server says of a client without a certificate nothing at all.
    let server = room.start_peer(&format!("{} --tls-creds t -t -k DIR/s -f raw a.raw", creds("server", "pki")));
    let (code, _, err) = room.img(&format!(
        "info {} --image-opts {}",
        creds("client", "onlyca"),
        export(",file.tls-creds=t,file.tls-hostname=localhost")
    ));
    assert!(code == Some(1) && err.contains("see whether it knows the authority of 'client-cert.pem'"), "{err}");
    server.end();
    for line in [
        "-f raw --tls-creds t -k DIR/s a.raw",
        "-L --tls-hostname x -k DIR/s",
        &format!("-f raw {} --tls-creds t -k DIR/s a.raw", creds("client", "pki")),
        &format!("-f raw {} --tls-creds t --tls-hostname x -k DIR/s a.raw", creds("server", "pki")),
    ] {
        assert_eq!(room.serve(line), room.run(Path::new("qemu-nbd"), line), "{line}");
    }
}

/// A server on TCP has to show the name or address that it was called by.
#[test]
fn tls_over_tcp_believes_the_address_that_was_called() {
    let room = Room::new();
    make_certificates(&room);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server =
        room.start(&format!("{} --tls-creds t -t -e 4 -b 127.0.0.1 -p {port} -f raw a.raw", creds("server", "pki")));
    let client = creds("client", "pki");
    let name =
        |more: &str| format!("driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={port},file.tls-creds=t{more}");
    for (more, code) in [("", 0), (",file.tls-hostname=localhost", 0), (",file.tls-hostname=elsewhere", 1)] {
        let line = format!("info {client} --image-opts {}", name(more));
        let [ours, theirs] = [room.img(&line), room.peer_img(&line)];
        assert_eq!((ours.0, theirs.0), (Some(code), Some(code)), "{more}: {ours:?} {theirs:?}");
        assert_eq!(ours.1, theirs.1, "{more}");
    }
    server.end();
}

/// What an authority has taken back is good no more, and a client that stops in the middle is sent away.
#[test]
fn tls_servers_refuse_revoked_certificates_and_do_not_wait_for_ever() {
    use std::io::{Read, Write};
    let room = Room::new();
    make_certificates(&room);
    let config = "[ca]\ndefault_ca = d\n[d]\ndatabase = pki/index\ncrlnumber = pki/number\ndefault_md = sha256\n";
    for (name, text) in [("ca.cnf", config), ("pki/index", ""), ("pki/number", "01\n")] {
        std::fs::write(room.path(name), text).unwrap();
    }
    let authority = "ca -config ca.cnf -keyfile pki/ca-key.pem -cert pki/ca-cert.pem";
    let info = format!(
        "info {} --image-opts {}",
        creds("client", "pki"),
        export(",file.tls-creds=t,file.tls-hostname=localhost")
    );
    for (revoke, code) in [(false, 0), (true, 1)] {
        if revoke {
            let done = room.run(Path::new("openssl"), &format!("{authority} -revoke pki/client-cert.pem"));
            assert_eq!(done.0, Some(0), "{done:?}");
        }
        let list = format!("{authority} -gencrl -crldays 30 -out pki/ca-crl.pem");
        let done = room.run(Path::new("openssl"), &list);
        assert_eq!(done.0, Some(0), "{done:?}");
        let server = creds("server", "pki");
        let server = room.start(&format!("{server} --tls-creds t -t --handshake-limit 2 -k DIR/s -f raw a.raw"));
        let (found, _, err) = room.img(&info);
        assert_eq!(found, Some(code), "revoked: {revoke}: {err}");
        assert_eq!(err.contains("it does not take our certificate"), revoke, "{err}");
        let mut stalled = std::os::unix::net::UnixStream::connect(room.path("s")).unwrap();
        // Fixed newstyle; option 5 asks for TLS, and is acknowledged. A handshake would begin now.
        stalled.write_all(b"\0\0\0\x01IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
        let mut said = Vec::new();
        stalled.read_to_end(&mut said).unwrap();
        assert_eq!((said.len(), &said[30..34]), (38, &[0, 0, 0, 1][..]));
        server.end();
    }
}

#[test]
fn the_size_changes_from_afar_where_the_server_lets_it() {
    let room = Room::new();
    for (allowed, image, format) in [(false, "a.raw", "raw"), (true, "a.raw", "raw"), (true, "a.qcow2", "qcow2")] {
        let option = if allowed { "--resizable" } else { "" };
        let server = room.start(&format!("-t {option} -k DIR/s -f {format} {image}"));
        let (code, out, err) = room.img("resize -f raw nbd+unix:///?socket=DIR/s 8M");
        if allowed {
            assert_eq!((code, out.as_str(), err.as_str()), (Some(0), "Image resized.\n", ""), "{image}");
            let (_, out, _) = room.img("resize --shrink -f raw nbd+unix:///?socket=DIR/s 6M");
            assert_eq!(out, "Image resized.\n");
            let list = room.serve("-L -k DIR/s").1;
            assert!(list.contains("size:  6291456") && list.contains(" resize "), "{list}");
        } else {
            assert_eq!(code, Some(1));
            assert!(err.contains("serve it with 'vireo-img serve --resizable'"), "{err}");
        }
        server.end();
        let size = if allowed { "6 MiB (6291456 bytes)" } else { "4 MiB (4194304 bytes)" };
        let info = room.peer_img(&format!("info -f {format} {image}")).1;
        assert!(info.contains(&format!("virtual size: {size}")), "{info}");
    }
}
