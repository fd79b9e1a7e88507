//! What a running machine holds on the host beside the guest's own memory.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{LIMIT, end_after, header, line};
use crate::guest::Guest;
use crate::run::say;

/// Guest memory, of a size that no other mapping has by chance.
const GUEST_MIB: u64 = 200;
/// What may be joined to the guest's memory in one mapping.
const SLACK_MIB: u64 = 8;

/// A machine at its login prompt.
#[derive(Debug, Default)]
struct Held {
    private_kib: f64,
    anonymous_kib: f64,
    threads: f64,
    files: f64,
}

/// Boots the demo guest to its login prompt under both and prints what each holds.
pub fn print(program: &Path, guest: &Guest) -> Result<()> {
    say("two machines at a login prompt");
    let disk = |name: &str| -> Result<String> {
        let copy = guest.disk.with_file_name(name);
        fs::copy(&guest.disk, &copy).with_context(|| format!("{} cannot be copied", guest.disk.display()))?;
        Ok(copy.display().to_string())
    };
    let memory = GUEST_MIB.to_string();
    let mut ours = Command::new(program);
    ours.arg("run").arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
    ours.args(["--append", "console=ttyS0 quiet", "--accel", "soft", "--memory", &memory]);
    ours.args(["--disk", &format!("{},format=qcow2", disk("bench-ours.qcow2")?)]);
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-M", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
    qemu.args(["-m", &memory, "-append", "console=ttyS0 quiet"]);
    qemu.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    qemu.args(["-drive", &format!("file={},format=qcow2,if=virtio", disk("bench-qemu.qcow2")?)]);
    let (a, b) = (held(ours)?, held(qemu)?);
    println!("\nvmm: a stock kernel at its login prompt on a qcow2 disk, software CPU, {GUEST_MIB} MiB");
    header("qemu tcg");
    let mib = |kib: f64| kib / 1024.0;
    line("private memory beyond the guest's", "MiB", mib(a.private_kib), mib(b.private_kib));
    line("  of it anonymous", "MiB", mib(a.anonymous_kib), mib(b.anonymous_kib));
    line("threads", "", a.threads, b.threads);
    line("file descriptors", "", a.files, b.files);
    Ok(())
}

fn held(mut command: Command) -> Result<Held> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    end_after(&child, LIMIT)?;
    let measured = prompt(&mut child).and_then(|()| look(child.id()));
    child.kill()?;
    child.wait()?;
    measured
}

fn prompt(child: &mut Child) -> Result<()> {
    let mut stdout = child.stdout.take().context("no output")?;
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !seen.windows(7).any(|w| w == b"login: ") {
        let got = stdout.read(&mut buffer)?;
        if got == 0 {
            bail!("a guest ended before its login prompt; it printed: {}", String::from_utf8_lossy(&seen));
        }
        seen.extend_from_slice(&buffer[..got]);
    }
    // The pipe stays open: a machine whose console is gone would end.
    child.stdout = Some(stdout);
    Ok(())
}

/// proc(5): smaps, task, fd.
fn look(pid: u32) -> Result<Held> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut held = Held { threads: count(pid, "task")?, files: count(pid, "fd")?, ..Held::default() };
    let mut guest_memory = false;
    for field in smaps.lines() {
        let Some((name, value)) = field.split_once(':') else { continue };
        let kib = || value.trim().trim_end_matches(" kB").parse::<u64>().ok();
        match name {
            "Size" => {
                let guests = GUEST_MIB << 10..=(GUEST_MIB + SLACK_MIB) << 10;
                guest_memory = kib().is_some_and(|size| guests.contains(&size));
            }
            "Private_Clean" | "Private_Dirty" if !guest_memory => {
                held.private_kib += kib().unwrap_or_default() as f64;
            }
            "Anonymous" if !guest_memory => held.anonymous_kib += kib().unwrap_or_default() as f64,
            _ => {}
        }
    }
    Ok(held)
}

fn count(pid: u32, what: &str) -> Result<f64> {
    Ok(fs::read_dir(format!("/proc/{pid}/{what}"))?.count() as f64)
}
