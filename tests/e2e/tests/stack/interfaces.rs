//! What scripts rely on: names of processes and sockets, exit codes, where programs are looked for.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use e2e::host::{Host, shown, virsh};
use e2e::programs::program;
use e2e::{DEADLINE, guest, process};

#[test]
fn the_process_of_a_guest_is_found_by_its_name_and_shows_its_domain() {
    let host = Host::start();
    host.run("vm1");
    let pid = host.guest_pid("vm1");
    let uuid = host.virsh("domuuid vm1").trim().to_owned();
    assert_eq!(process::status(&pid, "Name"), "vireo-vmm");
    let words = process::command_line(&pid);
    assert!(words.first().is_some_and(|word| word.ends_with("vireo-vmm")), "{words:?}");
    for (option, value) in [("--name", "vm1"), ("--uuid", uuid.as_str())] {
        let at = words.iter().position(|word| word == option).unwrap_or_else(|| panic!("no {option} in {words:?}"));
        assert_eq!(words.get(at + 1).map(String::as_str), Some(value));
    }
    let listed = Command::new("ps").args(["-o", "comm=,args=", "-p", &pid]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.starts_with("vireo-vmm") && listed.contains(&uuid), "{listed}");
}

/// A daemon that is ended with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for_socket(path: &Path) {
    let start = Instant::now();
    while UnixStream::connect(path).is_err() {
        assert!(start.elapsed() < DEADLINE, "nobody answers at {}", path.display());
        std::thread::yield_now();
    }
}

/// The names in a directory that are sockets.
fn sockets(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::FileTypeExt;
    let entries = fs::read_dir(directory).unwrap().flatten();
    let found = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()));
    let mut names: Vec<String> = found.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn sockets_below_a_root() {
    let host = Host::start();
    assert_eq!(
        sockets(&host.path("run/libvirt")),
        ["libvirt-sock", "libvirt-sock-ro", "virtqemud-sock", "virtqemud-sock-ro"]
    );
    for (socket, mode) in [("libvirt-sock", "system"), ("virtqemud-sock", "system"), ("libvirt-sock-ro", "system")] {
        let uri = format!("qemu+unix:///{mode}?socket={}", host.path("run/libvirt").join(socket).display());
        let output = virsh(&uri, "uri", &host.path("")).output().unwrap();
        assert_eq!(shown(&output), format!("{uri}\n"));
    }
}

/// Runs in namespaces of its own on empty directories: the host's own are not touched. It waits for the socket that is
/// opened last.
const SYSTEM_DAEMON: &str = "
    for place in /run /etc/libvirt /var/log /var/lib; do mount -t tmpfs none $place || exit 77; done
    \"$0\" --system & daemon=$!
    until [ -S /run/libvirt/virtqemud-sock-ro ]; do kill -0 $daemon || exit 1; done
    cd /run/libvirt && ls -d *-sock*
    virsh -c qemu:///system uri && virsh -r -c qemu:///system list --name
    kill $daemon && wait $daemon
";

#[test]
fn sockets_of_the_system_are_where_virsh_looks() {
    let mut command = Command::new("unshare");
    let namespace = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
    command.args([namespace, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SYSTEM_DAEMON]);
    command.arg(program("vireod")).stdin(Stdio::null()).env("LC_ALL", "C").env_remove("LIBVIRT_DEFAULT_URI");
    let output = command.output().unwrap();
    let may_not = output.status.code() == Some(77) || shown(&output).contains("unshare failed");
    if may_not {
        eprintln!("skipped: this host lets this user mount nothing, in no namespace");
        return;
    }
    let sockets = "libvirt-sock\nlibvirt-sock-ro\nvirtqemud-sock\nvirtqemud-sock-ro\n";
    assert_eq!(shown(&output), format!("{sockets}qemu:///system\n"));
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn sockets_of_a_session_and_of_a_session_without_a_runtime_directory() {
    for runtime in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path();
        let mut command = Command::new(program("vireod"));
        command.arg("--session").env_clear().env("HOME", home).stdin(Stdio::null());
        let place = if runtime { home.join("run/libvirt") } else { home.join(".cache/libvirt") };
        if runtime {
            fs::create_dir(home.join("run")).unwrap();
            command.env("XDG_RUNTIME_DIR", home.join("run"));
        }
        let _daemon = Daemon(command.spawn().unwrap());
        wait_for_socket(&place.join("virtqemud-sock"));
        wait_for_socket(&place.join("libvirt-sock"));
        assert_eq!(sockets(&place), ["libvirt-sock", "virtqemud-sock"]);
        // Nobody else gets that far.
        let mode = fs::metadata(&place).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", place.display());
        // virsh finds it by itself, as the user does; root's would look for the host's daemon.
        if !rustix::process::geteuid().is_root() {
            let mut command = virsh("qemu:///session", "list --name", home);
            command.env("HOME", home).env_remove("XDG_RUNTIME_DIR").env_remove("XDG_CACHE_HOME");
            if runtime {
                command.env("XDG_RUNTIME_DIR", home.join("run"));
            }
            assert_eq!(shown(&command.output().unwrap()), "\n");
        }
    }
}

#[test]
fn a_throw_away_machine_ends_as_its_guest_does() {
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, guest::kernel()).unwrap();
    // vireo-vmm is found beside vireo, whatever the PATH holds, and through a link as well.
    let link = directory.path().join("bin");
    fs::create_dir(&link).unwrap();
    symlink(program("vireo"), link.join("vireo")).unwrap();
    for vireo in [program("vireo"), link.join("vireo")] {
        let mut command = Command::new(vireo);
        command.args(["run", "--accel", "soft", "--memory", "32M", "--cpus", "1", "--clock", "host", "--kernel"]);
        command.arg(&kernel).env("PATH", "/nonexistent");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut keyboard, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        keyboard.write_all(b"hello\n").unwrap();
        let mut seen = String::new();
        let mut byte = [0];
        while !seen.ends_with("HELLO\n") {
            assert_eq!(screen.read(&mut byte).unwrap(), 1, "the guest ended after {seen:?}");
            seen.push(char::from(byte[0]));
        }
        keyboard.write_all(&[guest::POWER_OFF]).unwrap();
        screen.read_to_string(&mut seen).unwrap();
        let mut words = String::new();
        child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        assert_eq!((child.wait().unwrap().code(), seen.as_str(), words.as_str()), (Some(0), "up\nHELLO\nbye\n", ""));
    }
}

#[test]
fn vireo_vmm_is_found_on_the_path_where_it_is_not_beside() {
    let directory = tempfile::tempdir().unwrap();
    let (home, bin) = (directory.path(), directory.path().join("bin"));
    fs::create_dir(&bin).unwrap();
    fs::copy(program("vireo"), home.join("vireo")).unwrap();
    let version = || {
        let mut command = Command::new(home.join("vireo"));
        command.args(["run", "--help"]).env("PATH", &bin).stdin(Stdio::null());
        command.output().unwrap()
    };
    let missing = version();
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(
        shown(&missing),
        "error: cannot run vireo-vmm: No such file or directory (os error 2); it belongs beside vireo or on the PATH\n"
    );
    symlink(program("vireo-vmm"), bin.join("vireo-vmm")).unwrap();
    let found = version();
    assert!(found.status.success() && shown(&found).starts_with("usage: vireo run "), "{found:?}");
}
