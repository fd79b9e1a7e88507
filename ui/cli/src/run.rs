//! `vireo run`: hands the command line to vireo-vmm and becomes it.

use std::env;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::failure::Failure;

const PROGRAM: &str = "vireo-vmm";

/// The program: beside this one, else on the PATH.
pub fn vmm() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|own| Some(own.parent()?.join(PROGRAM)));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into())
}

/// Becomes `vireo-vmm run ARGUMENTS`; returns only where that fails.
pub fn exec(arguments: &[String]) -> Result<(), Failure> {
    let program = vmm();
    let error = Command::new(&program).arg("run").args(arguments).exec();
    Err(Failure::new(format!("cannot run {}: {error}; it belongs beside vireo or on the PATH", program.display())))
}
