//! Exports of a peer's NBD server as sources and targets, by every name they have.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn run(program: &Path, dir: &Path, args: &[&str]) -> Output {
    let out = Command::new(program).args(args).current_dir(dir).env("LC_ALL", "C").output();
    out.unwrap_or_else(|error| panic!("{} does not start: {error}", program.display()))
}

/// A qemu-nbd that is told to go when it is dropped.
struct Server(Child);

impl Server {
    fn new(dir: &Path, image: &str, socket: &str) -> Server {
        let socket = dir.join(socket);
        let mut command = Command::new("qemu-nbd");
        command.arg("-k").arg(&socket).args(["-x", "e1", "-t", "-f", "qcow2", image]).current_dir(dir);
        let child = command.stdout(Stdio::null()).spawn().expect("qemu-nbd (package qemu-utils) does not start");
        let server = Server(child);
        let limit = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < limit, "no server at {}", socket.display());
            std::thread::yield_now();
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn exports_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let peer = Path::new("qemu-img");
    let ours = Path::new(env!("CARGO_BIN_EXE_vireo-img"));
    for args in [
        &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"][..],
        &["create", "-q", "-f", "qcow2", "empty.qcow2", "4M"],
        &["create", "-q", "source.raw", "4M"],
    ] {
        assert!(run(peer, dir, args).status.success(), "{args:?}");
    }
    let writes = ["-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -P 8 3000k 1k", "source.raw"];
    assert!(run(Path::new("qemu-io"), dir, &writes).status.success());
    let _server = Server::new(dir, "a.qcow2", "s");
    let socket = dir.join("s").display().to_string();
    let uri = format!("nbd+unix:///e1?socket={socket}");
    // Twice: the second time there is data that has to become zeroes, in whole blocks and in parts.
    for source in ["source.raw", "empty.qcow2", "source.raw"] {
        let format = if source.ends_with("raw") { "raw" } else { "qcow2" };
        let out = run(ours, dir, &["convert", "-n", "-f", format, "-O", "raw", source, &uri]);
        assert!(out.status.success(), "{source}: {}", String::from_utf8_lossy(&out.stderr));
        let out = run(peer, dir, &["compare", source, &uri]);
        assert!(out.status.success(), "{source}: {}", String::from_utf8_lossy(&out.stdout));
    }
    for name in [
        uri.clone(),
        format!("nbd:unix:{socket}:exportname=e1"),
        format!(
            r#"json:{{"driver":"raw","file":{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}},"export":"e1"}}}}"#
        ),
    ] {
        let [a, b] = [ours, peer].map(|tool| {
            let out = run(tool, dir, &["info", &name]);
            String::from_utf8_lossy(&out.stdout).into_owned()
        });
        assert_eq!(a, b, "{name}");
        let [a, b] = [ours, peer].map(|tool| {
            let out = run(tool, dir, &["map", "--output=json", &name]);
            String::from_utf8_lossy(&out.stdout).into_owned()
        });
        assert_eq!(a, b, "{name}");
        let out = run(ours, dir, &["convert", "-O", "qcow2", &name, "copy.qcow2"]);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(run(peer, dir, &["compare", "copy.qcow2", "source.raw"]).status.success(), "{name}");
    }
    for name in [format!("nbd+unix:///nope?socket={socket}"), "nbd+unix:///e1?socket=/nowhere/s".to_owned()] {
        let out = run(ours, dir, &["info", &name]);
        assert_eq!(out.status.code(), Some(1), "{name}");
        assert!(String::from_utf8_lossy(&out.stderr).contains("Could not open"), "{name}");
    }
}
