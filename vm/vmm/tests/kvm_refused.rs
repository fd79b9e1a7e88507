//! `--accel kvm` on hosts where KVM cannot be used: the reason, and what helps.

mod support;

use std::process::{Command, Output, Stdio};

use monitor::{Accel, FailureClass, StartReply};
use support::{Guest, plan, start, vmm};

/// What the probe of this host's KVM says; `None`: it can be used.
fn refusal() -> Option<String> {
    let output = vmm().arg("--probe-kvm").output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.success(), report["usable"].as_bool().unwrap(), "{report}");
    report["reason"].as_str().map(str::to_owned)
}

#[test]
fn a_refused_kvm_is_explained_in_the_words_of_the_probe() {
    let Some(reason) = refusal() else {
        eprintln!("skipped: KVM works on this host");
        return;
    };
    assert!(!reason.is_empty());
    let directory = tempfile::tempdir().unwrap();
    let kernel = Guest::default().print("up\n").power_off().write(directory.path());
    let run =
        |accel| vmm().args(["run", "--memory", "32", "--accel", accel, "--kernel"]).arg(&kernel).output().unwrap();
    let words = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();
    let kvm = run("kvm");
    assert_eq!((kvm.status.code(), kvm.stdout.as_slice()), (Some(1), b"".as_slice()));
    assert_eq!(words(&kvm), format!("vireo-vmm: KVM cannot be used here: {reason}\n"));
    let auto = run("auto");
    assert_eq!((auto.status.code(), auto.stdout.as_slice(), words(&auto).as_str()), (Some(0), b"up\n".as_slice(), ""));
    // The same for whoever starts it by its socket.
    let mut plan = plan(&Guest::default().power_off(), directory.path());
    plan.config.accel = Accel::Kvm;
    let (mut child, reply) = start(&plan);
    let StartReply::Failed(failure) = reply else { panic!("{reply:?}") };
    assert_eq!(failure.class, FailureClass::Engine);
    assert_eq!(failure.text, format!("KVM cannot be used here: {reason}"));
    assert!(!child.wait().unwrap().success());
}

/// The probe's words on a host whose /dev has been changed by `change`, in a mount namespace. `None`: not allowed here.
fn with_dev(change: &str) -> Option<String> {
    let namespace = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
    let script = format!("{change} || exit 77; exec \"$0\" --probe-kvm");
    let mut command = Command::new("unshare");
    command.args([namespace, "--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_vireo-vmm")]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    Some(report["reason"].as_str().expect("KVM is refused").to_owned())
}

#[test]
fn a_host_without_kvm_or_with_something_else_in_its_place_is_told_what_helps() {
    let empty = "mount -t tmpfs none /dev";
    for (change, words) in [
        (empty.to_owned(), ["/dev/kvm does not exist", "load the module kvm_intel or kvm_amd"]),
        (format!("{empty} && : > /dev/kvm"), ["does not answer as KVM", "character device 10, 232"]),
        (format!("{empty} && mkdir /dev/kvm"), ["/dev/kvm cannot be opened", "is a directory"]),
    ] {
        let Some(reason) = with_dev(&change) else {
            eprintln!("skipped: this host lets this user mount nothing, in no namespace");
            return;
        };
        assert!(words.iter().all(|word| reason.contains(word)), "{change}: {reason}");
    }
}
