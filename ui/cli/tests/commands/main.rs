//! `vireo` against an unmodified virsh: the same words to the same daemon print the same bytes and exit the same way.
//!
//! The daemon and the player of its guests are programs of the `daemon` package; a build of the workspace's tests makes
//! them (`cargo build -p daemon --bins --examples` does it alone).

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Nothing here takes so long unless it is broken.
const DEADLINE: Duration = Duration::from_secs(60);

struct Host {
    directory: tempfile::TempDir,
    daemon: Child,
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.directory.path().join("run/libvirt/qemu")).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "pid") {
                let pid = fs::read_to_string(entry.path()).ok().and_then(|pid| pid.trim().parse().ok());
                let pid = pid.and_then(rustix::process::Pid::from_raw);
                pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_vireo")).with_file_name(name);
    assert!(path.is_file(), "{} is missing: cargo build -p daemon --bins --examples", path.display());
    path
}

impl Host {
    fn start() -> Host {
        let directory = tempfile::tempdir().unwrap();
        let ready = directory.path().join("ready");
        let socket = UnixDatagram::bind(&ready).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let daemon = Command::new(program("vireod"))
            .args(["--system", "--root"])
            .arg(directory.path())
            .arg("--vmm")
            .arg(program("examples/scripted_vmm"))
            .env("NOTIFY_SOCKET", &ready)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let host = Host { directory, daemon };
        socket.recv(&mut [0; 16]).expect("the daemon comes up");
        let file = |name: &str| host.directory.path().join(name).display().to_string();
        fs::write(file("kernel"), b"a kernel").unwrap();
        fs::write(file("disk.raw"), vec![0; 1 << 20]).unwrap();
        let document = format!(
            "<domain type='qemu'><name>vm1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>\
             <memory unit='MiB'>128</memory><vcpu>1</vcpu><os><type>hvm</type><kernel>{}</kernel></os><devices>\
             <disk><source file='{}'/><target dev='vda'/></disk><serial type='pty'/></devices></domain>",
            file("kernel"),
            file("disk.raw")
        );
        fs::write(file("vm1.xml"), document).unwrap();
        host
    }

    fn run(&self, program: &Path, words: &[&str]) -> Output {
        let socket = self.directory.path().join("run/libvirt/libvirt-sock");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let mut command = Command::new(program);
        command
            .args(["-c", &uri])
            .args(words)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .env("LC_ALL", "C");
        command
            .output()
            .unwrap_or_else(|error| panic!("{}: {error} (virsh: package libvirt-clients)", program.display()))
    }

    fn vireo(&self, words: &[&str]) -> Output {
        self.run(Path::new(env!("CARGO_BIN_EXE_vireo")), words)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_same_words_print_the_same() {
    let version = Command::new("virsh").arg("--version").output().expect("virsh runs (Debian package libvirt-clients)");
    let version = text(&version.stdout);
    // Later releases word a few of virsh's own texts differently.
    assert!(version.starts_with("9."), "the texts are those of virsh 9.0 (Debian 12), not {version}");
    let host = Host::start();
    let script = include_str!("../../testdata/same_as_virsh.txt");
    let mut compared = 0;
    for line in script.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        // What only one of the two may do is done by virsh alone.
        if let Some(line) = line.strip_prefix('!') {
            assert!(host.run(Path::new("virsh"), &[line]).status.success(), "{line}");
            continue;
        }
        let (theirs, ours) = (host.run(Path::new("virsh"), &[line]), host.vireo(&[line]));
        assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{line}");
        assert_eq!(text(&ours.stderr), text(&theirs.stderr), "{line}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}");
        compared += 1;
    }
    assert!(compared > 100, "{compared} lines");
}

#[test]
fn what_lists_or_shows_does_so_as_json() {
    let host = Host::start();
    let json = |words: &[&str]| {
        let output = host.vireo(words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}"))
    };
    assert!(host.vireo(&["define", "vm1.xml"]).status.success());
    assert_eq!(
        json(&["list", "--all", "--json"]),
        serde_json::json!([{
            "id": null, "name": "vm1", "uuid": "11111111-2222-3333-4444-555555555555", "state": "shut off"
        }])
    );
    // The switch before the verb does the same, and actions say nothing then.
    assert_eq!(text(&host.vireo(&["--json", "start", "vm1"]).stdout), "");
    assert_eq!(json(&["-j", "domstate", "vm1"]), serde_json::json!({ "state": "running", "reason": "booted" }));
    assert_eq!(json(&["dominfo", "vm1", "--json"])["max_memory_kib"], 131_072);
    assert_eq!(json(&["domstats", "--json"])[0]["stats"]["block.0.rd.bytes"], 4608);
    assert_eq!(json(&["domblklist", "vm1", "--json"])[0]["target"], "vda");
    for line in
        ["nodeinfo", "version", "vcpuinfo vm1", "vcpucount vm1", "capabilities", "net-list", "freecell", "doctor"]
    {
        let words: Vec<&str> = line.split(' ').chain(["--json"]).collect();
        // The doctor may find something broken here; it says so in JSON all the same.
        let output = host.vireo(&words);
        assert!(serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok(), "{line}");
    }
}

/// What a verb needs beside a domain to show something.
fn words_for(verb: &str) -> &'static [&'static str] {
    match verb {
        "domblkinfo" | "domblkstat" => &["vda"],
        "domifstat" => &["vnet0"],
        "metadata" => &["--uri", "http://x.example/1"],
        "event" => &["--event", "lifecycle", "--timeout", "1"],
        "cpu-stats" => &["--total"],
        _ => &[],
    }
}

#[test]
fn every_verb_that_shows_something_shows_it_as_json_or_fails() {
    let host = Host::start();
    assert!(host.vireo(&["define", "vm1.xml"]).status.success());
    assert!(host.vireo(&["start", "vm1"]).status.success());
    let verbs: serde_json::Value = serde_json::from_slice(&host.vireo(&["help", "--json"]).stdout).unwrap();
    let mut shown = Vec::new();
    let mut failed = Vec::new();
    for verb in verbs.as_array().unwrap() {
        let name = verb["name"].as_str().unwrap();
        let has = |option: &str| verb["options"].as_array().unwrap().iter().any(|o| o["name"] == option);
        if !has("json") {
            continue;
        }
        let domain = verb["options"][0]["name"] == "domain" && verb["options"][0]["required"] == true;
        let words = [&[name][..], if domain { &["vm1"] } else { &[] }, words_for(name), &["--json"]].concat();
        let output = host.vireo(&words);
        let said = text(&output.stdout);
        if name != "doctor" && !output.status.success() {
            assert!(said.trim().is_empty(), "{words:?} fails and shows {said}");
            failed.push(name);
        } else {
            assert!(serde_json::from_str::<serde_json::Value>(&said).is_ok(), "{words:?}: {said}");
            shown.push(name);
        }
    }
    // What this domain and host do not have; the event does not come.
    assert_eq!(failed, ["metadata", "domifstat", "domdisplay", "vncdisplay", "event", "sysinfo"]);
    assert!(shown.len() > 40, "{shown:?}");
}

#[test]
fn verbs_that_are_not_built_say_so() {
    let host = Host::start();
    for (word, expected) in [
        ("save", "error: command 'save' is not supported yet; 'vireo help' lists what is\n"),
        ("net-start", "error: command 'net-start' is not supported yet; 'vireo help' lists what is\n"),
        ("nosuch", "error: unknown command: 'nosuch'\n"),
    ] {
        let output = host.vireo(&[word, "vm1"]);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), expected.into()));
    }
}

#[test]
fn lines_from_a_pipe_are_a_session() {
    let host = Host::start();
    let socket = host.directory.path().join("run/libvirt/libvirt-sock");
    let uri = format!("qemu+unix:///system?socket={}", socket.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.args(["-q", "-c", &uri]).current_dir(host.directory.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let lines = "define vm1.xml; domstate vm1\n# a remark\ndomstate nosuch\ndomname vm1\nquit\ndomname vm1\n";
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "shut off\nvm1\n");
    assert_eq!(text(&output.stderr), "error: failed to get domain 'nosuch'\n");
    assert!(output.status.success());
}

#[test]
fn shells_complete_verbs_options_and_domains() {
    let host = Host::start();
    assert!(host.vireo(&["define", "vm1.xml"]).status.success());
    let complete = |words: &[&str]| text(&host.vireo(&[&["__complete"], words].concat()).stdout);
    assert_eq!(complete(&["dominf"]), "dominfo\n");
    assert_eq!(complete(&["start", "--pau"]), "--paused\n");
    assert_eq!(complete(&["dominfo", "v"]), "vm1\n");
    assert_eq!(complete(&["dominfo", "vm1", "--js"]), "--json\n");
    assert_eq!(complete(&["completion", "z"]), "zsh\n");
    assert_eq!(complete(&["help", "domuu"]), "domuuid\n");
    assert_eq!(complete(&["nosuch", "x"]), "");
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&host.vireo(&["completion", shell]).stdout).contains("vireo __complete"));
    }
    let script = text(&host.vireo(&["completion", "bash"]).stdout);
    let status = Command::new("bash").args(["-n", "-c", &script]).status().unwrap();
    assert!(status.success());
}
