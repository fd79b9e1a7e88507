//! The vireo-vmm program: where it is, and what it says about KVM.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

/// Name of the program.
const PROGRAM: &str = "vireo-vmm";

/// What `vireo-vmm --probe-kvm` found by running a small guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct KvmReport {
    /// It ran as it should.
    pub usable: bool,
    /// Where it did not: one sentence on what failed and what helps.
    pub reason: Option<String>,
}

/// The program: as given, else beside this one, else on the PATH.
pub fn find_vmm(given: Option<&Path>) -> PathBuf {
    if let Some(given) = given {
        return given.into();
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(PROGRAM)));
    if let Some(beside) = beside.filter(|path| path.is_file()) {
        return beside;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(PROGRAM)).find(|path| path.is_file());
    found.unwrap_or_else(|| PROGRAM.into())
}

/// Runs the probe. A probe that cannot be run means that KVM is not used.
pub async fn probe_kvm(program: PathBuf) -> KvmReport {
    let failed = |reason: String| KvmReport {
        usable: false,
        reason: Some(format!("{reason}; use type 'qemu' for the software CPU")),
    };
    let shown = program.display().to_string();
    let run = move || Command::new(&program).arg("--probe-kvm").stdin(Stdio::null()).stderr(Stdio::null()).output();
    match tokio::task::spawn_blocking(run).await {
        Ok(Ok(output)) => serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| failed(format!("{shown} --probe-kvm gave no report ({error})"))),
        Ok(Err(error)) => failed(format!("{shown} --probe-kvm cannot be run ({error})")),
        Err(error) => failed(format!("the probe of {shown} broke off ({error})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_reports_of_vireo_vmm_are_understood() {
        for (text, usable, reason) in [
            (r#"{"usable":true,"reason":null}"#, true, None),
            (r#"{"reason":"no POPCNT","usable":false}"#, false, Some("no POPCNT".to_owned())),
        ] {
            assert_eq!(serde_json::from_str::<KvmReport>(text).unwrap(), KvmReport { usable, reason });
        }
    }
}
