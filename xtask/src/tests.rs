//! `cargo xtask test`: what CI runs.

use std::process::Command;

use anyhow::Result;

use crate::packages::{self, Consent};
use crate::run::{cargo, say};
use crate::{guest, tidy};

/// Runs everything that must hold; `long` adds the checks that take many minutes.
pub fn run(consent: Consent, long: bool) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::TEST, packages::GUEST], consent)?;
    if long {
        packages::ensure(&[packages::QEMU], consent)?;
        packages::ensure(&[packages::CALLERS], consent)?;
    }
    say("tidy");
    tidy::run()?;
    say("formatting");
    crate::run::run(cargo().args(["fmt", "--all", "--check"]))?;
    say("lints");
    run_cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    let guest = guest::build(consent)?;
    let nvme_kernel = guest::nvme_kernel(consent)?;
    say("building");
    run_cargo(&["build", "--workspace", "--all-targets"])?;
    say("tests");
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    // Whole-guest tests take what was built above; without it they say how to build it.
    tests.env("VIREO_TEST_GUEST", crate::run::target().join("guest"));
    tests.env("VIREO_TEST_KERNEL", &guest.kernel);
    tests.env("VIREO_TEST_NVME_KERNEL", nvme_kernel);
    if long {
        tests.env("VIREO_TEST_LONG", "1");
    }
    crate::run::run(&mut tests)?;
    if long {
        licences()?;
    }
    say("everything passed");
    Ok(())
}

/// Licences and sources of every dependency, by cargo-deny, which is built once below the target directory.
fn licences() -> Result<()> {
    let tools = crate::run::target().join("tools");
    if !tools.join("bin/cargo-deny").exists() {
        say("building cargo-deny (once; some minutes)");
        let install = ["install", "cargo-deny", "--version", "0.20.2", "--locked", "--root"];
        crate::run::run(cargo().args(install).arg(&tools))?;
    }
    say("licences");
    let mut deny = Command::new(tools.join("bin/cargo-deny"));
    deny.args(["--offline", "check", "bans", "licenses", "sources"]).current_dir(crate::run::root());
    crate::run::run(&mut deny)
}

fn run_cargo(args: &[&str]) -> Result<()> {
    crate::run::run(cargo().args(args))
}
