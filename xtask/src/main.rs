//! The project's chores: `cargo xtask demo`, `cargo xtask test` and what they are made of.
#![deny(unsafe_code)]

mod bench;
mod cpio;
mod demo;
mod guest;
mod lab;
mod layout;
mod packages;
mod programs;
mod run;
mod tests;
mod tidy;
#[allow(unsafe_code)]
mod usage;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask <task> [options]

  demo                a stock Linux guest on the software CPU, this terminal on its console
  demo --check        the same without a terminal: log in, write, shut down, start again, find what was written
  demo --clean        removes what a demo left
  build               the programs without checks, as they are installed, in target/release
  test [--long]       everything that must hold: tidy, formatting, lints, all tests (--long: the slow ones too)
  guest               builds the demo guest (kernel, initrd, disk) into target/guest and says where
  bench NAME          boot, disk, image, manage, vmm: our figure, the peer's from the same run, the ratio
  lab [--exits]       real KVM inside an emulated machine: probe, tiny guests, demo guest (--exits: counts of a boot)
  oracle [options]    the software CPU against this processor, without bound until it differs or is stopped
                      (--seed N, --cases N per form, --only NAME, --seconds N)
  layout              writes the order in which the code of vireo-img is linked, from runs of its usual commands
  tidy                compares ARCHITECTURE.md with the crates and their dependencies

  --yes               install missing Debian packages without asking (also with CI=true)
";

fn main() -> std::process::ExitCode {
    match task() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn task() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let yes = take_flag(&mut args, "--yes") || std::env::var("CI").is_ok_and(|v| v == "true");
    let consent = if yes { packages::Consent::Given } else { packages::Consent::Ask };
    let task = if args.is_empty() { String::new() } else { args.remove(0) };
    match task.as_str() {
        "test" => {
            let long = take_flag(&mut args, "--long");
            no_more(&args)?;
            tests::run(consent, long)
        }
        "guest" => {
            no_more(&args)?;
            let guest = guest::build(consent)?;
            println!("kernel {}", guest.kernel.display());
            println!("initrd {}", guest.initrd.display());
            println!("bench initrd {}", guest.bench_initrd.display());
            println!("disk   {}", guest.disk.display());
            println!("kernel for a root on NVMe {}", guest::nvme_kernel(consent)?.display());
            Ok(())
        }
        "bench" => {
            let name = if args.is_empty() { String::new() } else { args.remove(0) };
            let only = if name == "image" && !args.is_empty() { Some(args.remove(0)) } else { None };
            no_more(&args)?;
            bench::go(consent, &name, only.as_deref())
        }
        "build" => {
            no_more(&args)?;
            programs::go(consent)
        }
        "demo" => {
            let (check, clean) = (take_flag(&mut args, "--check"), take_flag(&mut args, "--clean"));
            no_more(&args)?;
            let mode = match (check, clean) {
                (_, true) => demo::Mode::Clean,
                (true, _) => demo::Mode::Check,
                _ => demo::Mode::Interactive,
            };
            demo::go(consent, mode)
        }
        "lab" => {
            let exits = take_flag(&mut args, "--exits");
            no_more(&args)?;
            let job = if exits { lab::Job::Exits } else { lab::Job::Check };
            print!("{}", lab::go(consent, &job)?);
            Ok(())
        }
        "oracle" => {
            run::run(run::cargo().args(["build", "-p", "oracle"]))?;
            if !args.iter().any(|a| a == "--seconds") {
                args.extend(["--seconds".to_owned(), u32::MAX.to_string()]);
            }
            run::run(std::process::Command::new(run::target().join("debug/oracle")).args(&args))
        }
        "layout" => {
            no_more(&args)?;
            layout::go(consent)
        }
        "tidy" => {
            no_more(&args)?;
            tidy::run()
        }
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => bail!("there is no task {other:?}; `cargo xtask help` lists them"),
    }
}

fn take_flag(args: &mut Vec<String>, flag: &str) -> bool {
    let before = args.len();
    args.retain(|a| a != flag);
    args.len() != before
}

fn no_more(args: &[String]) -> Result<()> {
    match args.first() {
        Some(extra) => bail!("unexpected argument {extra:?}; `cargo xtask help` lists what a task takes"),
        None => Ok(()),
    }
}
