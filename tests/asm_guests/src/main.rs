//! `asm-guests [soft|kvm|qemu|soft-restored|kvm-restored] [NAME]`: runs the suite, or the guests whose names contain
//! NAME; `restored`: on a new machine after every character.
#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use asm_guests::engine::{self, Way};
use asm_guests::{Ran, Verdict, qemu};
use hv_core::{Accel, Clock};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let peer = args.next().unwrap_or_else(|| "soft".into());
    let name = args.next().unwrap_or_default();
    match suite(&peer, &name) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("asm-guests: {}", chain(&*error));
            ExitCode::from(2)
        }
    }
}

/// An error with everything that caused it.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Runs the guests; false if one failed.
fn suite(peer: &str, name: &str) -> Result<bool, Box<dyn Error>> {
    let soft = hv_soft::SoftAccel::default();
    let kvm = if peer.starts_with("kvm") { Some(hv_kvm::KvmAccel::open()?) } else { None };
    if let Some(refusal) = kvm.as_ref().and_then(|kvm| kvm.probe().refusal) {
        return Err(format!("KVM cannot be used here: {refusal}").into());
    }
    if peer == "qemu" && !qemu::installed() {
        return Err(format!("{} is not installed", qemu::PROGRAM).into());
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for guest in asm_guests::all().iter().filter(|g| g.name.contains(name)) {
        let way = if peer.ends_with("-restored") { Way::Restored } else { Way::Straight };
        let verdict = match (peer, &kvm) {
            ("soft" | "soft-restored", _) => {
                engine::check(guest, &soft, Ran::Soft, Clock::host(), way).map_err(|e| chain(&e))
            }
            ("kvm" | "kvm-restored", Some(kvm)) => {
                engine::check(guest, kvm, Ran::Kvm, Clock::host(), way).map_err(|e| chain(&e))
            }
            ("qemu", _) => qemu::check(guest).map_err(|e| chain(&e)),
            _ => return Err(format!("'{peer}' is none of soft, kvm, qemu, soft-restored, kvm-restored").into()),
        };
        let line = match verdict {
            Ok(verdict) => {
                match verdict {
                    Verdict::Passed | Verdict::Differs(_) => passed += 1,
                    Verdict::Skipped(_) => skipped += 1,
                    Verdict::Failed { .. } => failed += 1,
                }
                verdict.to_string()
            }
            Err(error) => {
                failed += 1;
                format!("FAILED: {error}")
            }
        };
        println!("{:<28} {line}", guest.name);
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}
