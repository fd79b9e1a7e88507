//! `cargo xtask test`: what CI runs.

use anyhow::Result;

use crate::packages::{self, Consent};
use crate::run::{cargo, say};
use crate::{guest, tidy};

/// Runs everything that must hold; `long` adds the checks that take many minutes.
pub fn run(consent: Consent, long: bool) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::TEST, packages::GUEST], consent)?;
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
    say("everything passed");
    Ok(())
}

fn run_cargo(args: &[&str]) -> Result<()> {
    crate::run::run(cargo().args(args))
}
