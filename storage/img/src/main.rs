//! `vireo-img`: creates, describes and checks disk images, with qemu-img's options, outputs and exit codes.
//!
//! Subcommands of qemu-img that are not built end with a sentence that says so, never with half of their work.
#![forbid(unsafe_code)]

mod check;
mod create;
mod error;
mod info;
mod options;
mod size;

use std::process::ExitCode;

use error::ImgError;

/// qemu-img's subcommands that this tool does not have.
const NOT_BUILT: [&str; 13] = [
    "amend", "bench", "bitmap", "commit", "compare", "convert", "dd", "map", "measure", "rebase", "resize", "snapshot",
    "serve",
];

const HELP: &str = "\
vireo-img: disk images

  vireo-img create [-q] [-f FMT] [-b BACKING -F BACKING_FMT] [-o OPTIONS] FILE [SIZE]
      an empty image. FMT: raw (the default), qcow2. OPTIONS of qcow2: cluster_size, compat, size, backing_file,
      backing_fmt. SIZE in bytes, or with k, M, G, T, P, E.
  vireo-img info [-f FMT] [--output human|json] [--backing-chain] [-U] FILE
      what an image says about itself
  vireo-img check [-q] [-f FMT] [--output human|json] [-U] FILE
      compares what is referenced with what is counted; changes nothing.
      Exit code: 0 consistent, 1 the check failed, 2 damaged, 3 leaked clusters only, 63 the format has no checks
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let done = match command.as_str() {
        "create" => create::run(rest),
        "info" => info::run(rest),
        "check" => check::run(rest),
        "--help" | "-h" | "help" => {
            print!("{HELP}");
            Ok(0)
        }
        "--version" | "-V" => {
            println!("vireo-img version {}", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
        "" => Err(ImgError::NoCommand),
        other if NOT_BUILT.contains(&other) => Err(ImgError::NotBuilt(command)),
        _ => Err(ImgError::NoSuchCommand(command)),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vireo-img: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(below) = cause {
                eprintln!("  because: {below}");
                cause = below.source();
            }
            ExitCode::from(error.exit_code())
        }
    }
}
